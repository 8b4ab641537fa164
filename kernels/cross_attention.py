"""Attention over at most 128 keys with the map edited in flight: the whole key row at once, one pass, no rescaling.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

`cross_attention_kernel` never forms P': the edit is linear in both maps, so fold.py moved it into the values and what
is left is out = P_own V_own + P_source V_source. `cross_attention_save_kernel` forms P', because it is asked to write
it, and `mean_kernel` then takes the mean over heads, if that is what was asked for. P_source is recomputed from q and k
of another row, or read. Source: Hertz et al. 2022 (prompt-to-prompt) for the edits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import fold, tuned
from .tiles import (
    LOG2_E, arch, dot, head, launch_grid, load, place, scores, store, strides, tile, unit, width, zeros,
)  # fmt: skip


@triton.jit
def softmax_map(q, k, b, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
                BLOCK_N: tl.constexpr, STEP: tl.constexpr, MASK_N: tl.constexpr):  # fmt: skip
    """P = softmax(q k^T / sqrt(D)) of one block of queries of row b: (BLOCK_N, KEYS) float32, zero beyond L."""
    p_q, step_q = head(q, stride_q, b, h, UNIT)
    p_k, step_k = head(k, stride_k, b, h, UNIT)
    b_q = load(p_q, offs_n, tl.arange(0, STEP), step_q, queries, D, MASK_N, D % STEP != 0)
    s = scores(p_q, b_q, offs_n, queries, step_q, p_k, tl.arange(0, KEYS), L, step_k, head_dim,
               D, BLOCK_N, KEYS, STEP, MASK_N, KEYS != L)  # fmt: skip
    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    p = tl.exp2(s * scale - (tl.max(s, 1) * scale)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def stored_map(inject, b, h, offs_n, queries, stride, L: tl.constexpr, KEYS: tl.constexpr, MASK_N: tl.constexpr):
    """A stored map of one block of queries: (BLOCK_N, KEYS) float32."""
    p_map, step = head(inject, stride, b, h, 1)
    return load(p_map, offs_n, tl.arange(0, KEYS), step, queries, L, MASK_N, KEYS != L).to(tl.float32)


@triton.jit
def store_columns(d, p, p_v, step_v, source, p_source, step_source, p_out, step_out, offs_n, queries,
                  L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
                  TWO_TERMS: tl.constexpr):  # fmt: skip
    """Columns d of out = P V, with TWO_TERMS plus P_source V_source."""
    keys = tl.arange(0, KEYS)
    b_v = load(p_v, keys, d, step_v, L, D, KEYS != L, D % STEP != 0)
    acc = dot(p.to(b_v.dtype), b_v, zeros(BLOCK_N, STEP))
    if TWO_TERMS:
        b_v = load(p_source, keys, d, step_source, L, D, KEYS != L, D % STEP != 0)
        acc = dot(source.to(b_v.dtype), b_v, acc)
    store(p_out, acc, offs_n, d, step_out, queries, D)


@triton.jit
def store_product(p, p_v, step_v, source, p_source, step_source, p_out, step_out, offs_n, queries, head_dim,
                  L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
                  TWO_TERMS: tl.constexpr):  # fmt: skip
    """out = P V, STEP columns at a time; head_dim as in `scores`."""
    if STEP < D:
        for start in range(0, head_dim, STEP):
            store_columns(start + tl.arange(0, STEP), p, p_v, step_v, source, p_source, step_source, p_out, step_out,
                          offs_n, queries, L, KEYS, D, BLOCK_N, STEP, TWO_TERMS)  # fmt: skip
    else:
        store_columns(tl.arange(0, STEP), p, p_v, step_v, source, p_source, step_source, p_out, step_out,
                      offs_n, queries, L, KEYS, D, BLOCK_N, STEP, TWO_TERMS)  # fmt: skip


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None and args["KEEP_OWN"],
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
# A compile for each value, or for each step whose row of a table begins elsewhere, would be waste.
@triton.jit(do_not_specialize=["heads", "first"], do_not_specialize_on_alignment=["source_row"])
def cross_attention_kernel(
    q, k, v, v_source, source_row, inject, out,
    queries, heads, first, head_dim, scale,
    stride_q, stride_k, stride_v, stride_source, stride_inject, stride_out,  # inject: elements, the others: UNIT
    KEEP_OWN: tl.constexpr,
    L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_INJECT: tl.constexpr, TWO_TERMS: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b: out = P V, and rows from `first` on may differ in one of three ways.

    source_row alone: out = P_source V.  With v_source: out = P_own V + P_source V_source.  inject without KEEP_OWN:
    out = inject V_source.
    """
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + b - first).to(tl.int32)
    p_v, step_v = head(v, stride_v, b, h, UNIT)
    p_out, step_out = head(out, stride_out, b, h, UNIT)

    if (KEEP_OWN and not TWO_TERMS) or b < first:
        p = softmax_map(q, k, b_source, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                        L, KEYS, D, UNIT, BLOCK_N, STEP, not EVEN_N)  # fmt: skip
        store_product(p, p_v, step_v, p, p_v, step_v, p_out, step_out, offs_n, queries, head_dim,
                      L, KEYS, D, BLOCK_N, STEP, False)  # fmt: skip
    elif TWO_TERMS or not KEEP_OWN:
        if HAS_INJECT:
            source = stored_map(inject, b - first, h, offs_n, queries, stride_inject, L, KEYS, not EVEN_N)
        else:
            source = softmax_map(q, k, b_source, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                                 L, KEYS, D, UNIT, BLOCK_N, STEP, not EVEN_N)  # fmt: skip
        p_source, step_source = head(v_source, stride_source, b - first, h, UNIT)
        p = source
        if TWO_TERMS:
            source = source.to(v.dtype.element_ty)  # half the registers while the other map is computed
            p = softmax_map(q, k, b, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                            L, KEYS, D, UNIT, BLOCK_N, STEP, not EVEN_N)  # fmt: skip
            store_product(p, p_v, step_v, source, p_source, step_source, p_out, step_out, offs_n, queries, head_dim,
                          L, KEYS, D, BLOCK_N, STEP, True)  # fmt: skip
        else:
            store_product(source, p_source, step_source, p, p_v, step_v, p_out, step_out, offs_n, queries, head_dim,
                          L, KEYS, D, BLOCK_N, STEP, False)  # fmt: skip


@triton.jit
def row_vector(p, L: tl.constexpr, KEYS: tl.constexpr):
    cols = tl.arange(0, KEYS)
    return tl.load(p + cols, mask=cols < L, other=0.0)[None, :]


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "HAS_TOKEN_MAP": lambda args: args["token_map"] is not None,
        "HAS_BLEND": lambda args: args["blend"] is not None,
        "HAS_REWEIGHT": lambda args: args["reweight"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
@triton.jit(
    do_not_specialize=["heads", "first", "head_dim"],
    do_not_specialize_on_alignment=["source_row", "blend", "reweight"],
)
def cross_attention_save_kernel(
    q, k, v, source_row, inject, token_map, blend, reweight, save, out,
    queries, heads, first, head_dim, scale,
    stride_q, stride_k, stride_v, stride_inject, stride_save, stride_out,  # inject, save: elements, the others: UNIT
    L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_INJECT: tl.constexpr, HAS_TOKEN_MAP: tl.constexpr, HAS_BLEND: tl.constexpr,
    HAS_REWEIGHT: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b: P', written to `save` in the edited rows, and out = P' V.

    token_map: (S, KEYS, KEYS), zero beyond L, so that no load of it needs a mask; it, blend and reweight are
    contiguous.
    """
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keys = tl.arange(0, KEYS)
    edited = (b - first).to(tl.int64)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + edited).to(tl.int32)

    p = softmax_map(q, k, b if HAS_BLEND else b_source, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                    L, KEYS, D, UNIT, BLOCK_N, STEP, not EVEN_N)  # fmt: skip
    if b >= first:
        source = p
        if HAS_INJECT:
            source = stored_map(inject, edited, h, offs_n, queries, stride_inject, L, KEYS, not EVEN_N)
        elif HAS_BLEND:
            source = softmax_map(q, k, b_source, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                                 L, KEYS, D, UNIT, BLOCK_N, STEP, not EVEN_N)  # fmt: skip
        if HAS_TOKEN_MAP:
            b_m = load(token_map + edited * (KEYS * KEYS), keys, keys, (KEYS, 1), KEYS, KEYS, False, False)
            source = dot(source.to(b_m.dtype), b_m, zeros(BLOCK_N, KEYS))
        if HAS_BLEND:
            w = row_vector(blend + edited * L, L, KEYS)
            source = w * source + (1 - w) * p
        if HAS_REWEIGHT:
            source = row_vector(reweight + edited * L, L, KEYS) * source
        p_save, step_save = head(save, stride_save, edited, h, 1)
        store(p_save, source, offs_n, keys, step_save, queries, L)
        p = source
    p_v, step_v = head(v, stride_v, b, h, UNIT)
    p_out, step_out = head(out, stride_out, b, h, UNIT)
    store_product(p, p_v, step_v, p, p_v, step_v, p_out, step_out, offs_n, queries, head_dim,
                  L, KEYS, D, BLOCK_N, STEP, False)  # fmt: skip


@triton.jit(do_not_specialize=["heads"], do_not_specialize_on_alignment=["save_mean"])
def mean_kernel(
    maps, save_mean, queries, heads, stride_maps, stride_mean,
    L: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """save_mean += the mean over heads of maps (S, H, N, L), one block of queries, summed in the order of the heads."""
    start_n, _, edited = place(queries, 1, BLOCK_N)
    offs_n, keys = start_n + tl.arange(0, BLOCK_N), tl.arange(0, KEYS)
    total = zeros(BLOCK_N, KEYS)
    for h in range(heads):
        p_map, step_map = head(maps, stride_maps, edited, h, 1)
        total += load(p_map, offs_n, keys, step_map, queries, L, True, KEYS != L).to(tl.float32)
    p_mean, step_mean = head(save_mean, stride_mean, edited, 0, 1)
    before = load(p_mean, offs_n, keys, step_mean, queries, L, True, KEYS != L)
    store(p_mean, before + total / heads, offs_n, keys, step_mean, queries, L)


# The launches: plain Python from here on.


def shape_args(q, k, unit: int) -> dict:
    """The constexprs that follow from the shapes."""
    L, D = k.shape[2], q.shape[3]
    return {"L": L, "KEYS": width(L), "D": D, "UNIT": unit}


def first_row(q, *edits) -> int:
    """B - S, the first edited row; B if there is no edit."""
    return q.shape[0] - next((x.shape[0] for x in edits if x is not None), 0)


def launch(q, k, v, source_row, inject, token_map, blend, reweight, out) -> None:
    """The folded form; see cross_attention_kernel. All checks are done in ops.py."""
    B, H, N, D = q.shape
    v, v_source, keep_own = fold.launch(v, source_row, inject, token_map, blend, reweight)
    u = unit(q, k, v, v_source, out)
    choice = tile("cross_attention", q, arch()) | tuned.tile("cross_attention", q)
    cross_attention_kernel[launch_grid(q, choice)](
        q, k, v, v_source, source_row, inject, out,
        N, H, first_row(q, source_row, inject), D, D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v, v_source)), strides(inject, 1), strides(out, u),
        KEEP_OWN=keep_own, **shape_args(q, k, u), **choice,
    )  # fmt: skip


def launch_save(q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean, out) -> None:
    """The form that writes P' or its mean; see cross_attention_save_kernel. All checks are done in ops.py.

    The mean is taken of maps in q's dtype, which are `save` if that is as exact.
    """
    N, H, D, L = q.shape[2], q.shape[1], q.shape[3], k.shape[2]
    u = unit(q, k, v, out)
    choice = tile("cross_attention_save", q, arch()) | tuned.tile("cross_attention_save", q)
    args = shape_args(q, k, u)
    if token_map is not None:  # both factors of a product have one dtype
        beyond = args["KEYS"] - L
        token_map = F.pad(token_map.to(q.dtype), (0, beyond, 0, beyond)).contiguous()
    S = save.shape[0] if save is not None else save_mean.shape[0]
    maps = save
    if save is None or save_mean is not None and torch.finfo(save.dtype).eps > torch.finfo(q.dtype).eps:
        maps = q.new_empty(S, H, N, L)
    cross_attention_save_kernel[launch_grid(q, choice)](
        q, k, v, source_row, inject, token_map,
        *(None if x is None else x.contiguous() for x in (blend, reweight)), maps, out,
        N, H, q.shape[0] - S, D, D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v)), strides(inject, 1), strides(maps, 1), strides(out, u),
        **args, **choice,
    )  # fmt: skip
    if save_mean is not None:
        block = 16
        mean_kernel[(triton.cdiv(N, block) * S,)](
            maps, save_mean, N, H, strides(maps, 1), strides(save_mean[:, None], 1),
            L=L, KEYS=args["KEYS"], BLOCK_N=block, num_warps=4,
        )  # fmt: skip
    if save is not None and maps is not save:
        save.copy_(maps)
