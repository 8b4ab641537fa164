"""Attention over at most 256 keys with the map edited in flight: the whole key row at once, one
pass, no rescaling.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

`cross_attention_kernel` never forms P': the edit is linear in both maps, so fold.py moved it into
the values and what is left is out = P_own V_own + P_source V_source. `cross_attention_save_kernel`
forms P', because it is asked to write it, and `mean_kernel` then takes the mean over heads, if that
is what was asked for. P_source is recomputed from q and k of another row, or read. Source: Hertz et
al. 2022 (prompt-to-prompt) for the edits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import tuned
from .launch import Launch
from .tiles import (
    LOG2_E,
    arch,
    bias_strides,
    dot,
    finite,
    head,
    launch_grid,
    load,
    load_bias,
    place,
    scores,
    store,
    strides,
    table_strides,
    tile,
    unit,
    width,
    zeros,
)


@triton.jit
def softmax_map(
    q,
    k,
    bias,
    b,
    h,
    first,
    offs_n,
    queries,
    head_dim,
    stride_q,
    stride_k,
    stride_bias,
    scale,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK_N: tl.constexpr,
):
    """P = softmax(scale q k^T + bias) of one block of queries of row b: (BLOCK_N, KEYS) float32,
    zero beyond L."""
    p_q, step_q = head(q, stride_q, b, h, UNIT)
    p_k, step_k = head(k, stride_k, b, h, UNIT)
    b_q = load(p_q, offs_n, tl.arange(0, STEP), step_q, queries, D, MASK_N, D % STEP != 0)
    s = scores(
        p_q,
        b_q,
        offs_n,
        queries,
        step_q,
        p_k,
        tl.arange(0, KEYS),
        L,
        step_k,
        head_dim,
        D,
        BLOCK_N,
        KEYS,
        STEP,
        MASK_N,
        KEYS != L,
    )
    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    if HAS_BIAS:
        biased = tl.where(
            b >= first, queries, 0
        )  # queries with a bias: rows before `first` have none
        p_bias, step = head(bias, stride_bias, tl.maximum(b - first, 0), h, 1)
        s = s * scale + load_bias(p_bias, offs_n, tl.arange(0, KEYS), step, biased, L)
        p = tl.exp2(s - finite(tl.max(s, 1))[:, None])
        total = tl.sum(p, 1)
        return p * (1 / tl.where(total == 0, 1.0, total))[:, None]
    else:
        p = tl.exp2(s * scale - (tl.max(s, 1) * scale)[:, None])
        return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def stored_map(
    inject, b, h, offs_n, queries, stride, L: tl.constexpr, KEYS: tl.constexpr, MASK_N: tl.constexpr
):
    """A stored map of one block of queries: (BLOCK_N, KEYS) float32."""
    p_map, step = head(inject, stride, b, h, 1)
    return load(p_map, offs_n, tl.arange(0, KEYS), step, queries, L, MASK_N, KEYS != L).to(
        tl.float32
    )


@triton.jit
def store_columns(
    d,
    p,
    p_v,
    step_v,
    source,
    p_source,
    step_source,
    p_out,
    step_out,
    offs_n,
    queries,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    TWO_TERMS: tl.constexpr,
):
    """Columns d of out = P V, with TWO_TERMS plus P_source V_source."""
    keys = tl.arange(0, KEYS)
    b_v = load(p_v, keys, d, step_v, L, D, KEYS != L, D % STEP != 0)
    acc = dot(p.to(b_v.dtype), b_v, zeros(BLOCK_N, STEP))
    if TWO_TERMS:
        b_v = load(p_source, keys, d, step_source, L, D, KEYS != L, D % STEP != 0)
        acc = dot(source.to(b_v.dtype), b_v, acc)
    store(p_out, acc, offs_n, d, step_out, queries, D)


@triton.jit
def store_product(
    p,
    p_v,
    step_v,
    source,
    p_source,
    step_source,
    p_out,
    step_out,
    offs_n,
    queries,
    head_dim,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    TWO_TERMS: tl.constexpr,
):
    """out = P V, STEP columns at a time; head_dim as in `scores`."""
    if STEP < D:
        for start in range(0, head_dim, STEP):
            store_columns(
                start + tl.arange(0, STEP),
                p,
                p_v,
                step_v,
                source,
                p_source,
                step_source,
                p_out,
                step_out,
                offs_n,
                queries,
                L,
                KEYS,
                D,
                BLOCK_N,
                STEP,
                TWO_TERMS,
            )
    else:
        store_columns(
            tl.arange(0, STEP),
            p,
            p_v,
            step_v,
            source,
            p_source,
            step_source,
            p_out,
            step_out,
            offs_n,
            queries,
            L,
            KEYS,
            D,
            BLOCK_N,
            STEP,
            TWO_TERMS,
        )


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None and args["KEEP_OWN"],
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
# A compile for each value, or for each step whose row of a table begins elsewhere, would be waste.
@triton.jit(
    do_not_specialize=["heads", "first"], do_not_specialize_on_alignment=["source_row", "bias"]
)
def cross_attention_kernel(
    q,
    k,
    v,
    v_source,
    source_row,
    inject,
    bias,
    out,
    queries,
    heads,
    first,
    head_dim,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_source,
    stride_out,  # in units of UNIT
    stride_inject,
    stride_bias,  # in elements
    KEEP_OWN: tl.constexpr,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_INJECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """One block of queries of head h of row b: out = P V, and rows from `first` on may differ in
    one of three ways.

    source_row alone: out = P_source V.  With v_source: out = P_own V + P_source V_source.  inject
    without KEEP_OWN: out = inject V_source.
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
        p = softmax_map(
            q,
            k,
            bias,
            b_source,
            h,
            first,
            offs_n,
            queries,
            head_dim,
            stride_q,
            stride_k,
            stride_bias,
            scale,
            L,
            KEYS,
            D,
            UNIT,
            BLOCK_N,
            STEP,
            HAS_BIAS,
            not EVEN_N,
        )
        store_product(
            p,
            p_v,
            step_v,
            p,
            p_v,
            step_v,
            p_out,
            step_out,
            offs_n,
            queries,
            head_dim,
            L,
            KEYS,
            D,
            BLOCK_N,
            STEP,
            False,
        )
    elif TWO_TERMS or not KEEP_OWN:
        if HAS_INJECT:
            source = stored_map(
                inject, b - first, h, offs_n, queries, stride_inject, L, KEYS, not EVEN_N
            )
        else:
            source = softmax_map(
                q,
                k,
                bias,
                b_source,
                h,
                first,
                offs_n,
                queries,
                head_dim,
                stride_q,
                stride_k,
                stride_bias,
                scale,
                L,
                KEYS,
                D,
                UNIT,
                BLOCK_N,
                STEP,
                HAS_BIAS,
                not EVEN_N,
            )
        p_source, step_source = head(v_source, stride_source, b - first, h, UNIT)
        p = source
        if TWO_TERMS:
            source = source.to(
                v.dtype.element_ty
            )  # half the registers while the other map is computed
            p = softmax_map(
                q,
                k,
                bias,
                b,
                h,
                first,
                offs_n,
                queries,
                head_dim,
                stride_q,
                stride_k,
                stride_bias,
                scale,
                L,
                KEYS,
                D,
                UNIT,
                BLOCK_N,
                STEP,
                HAS_BIAS,
                not EVEN_N,
            )
            store_product(
                p,
                p_v,
                step_v,
                source,
                p_source,
                step_source,
                p_out,
                step_out,
                offs_n,
                queries,
                head_dim,
                L,
                KEYS,
                D,
                BLOCK_N,
                STEP,
                True,
            )
        else:
            store_product(
                source,
                p_source,
                step_source,
                p,
                p_v,
                step_v,
                p_out,
                step_out,
                offs_n,
                queries,
                head_dim,
                L,
                KEYS,
                D,
                BLOCK_N,
                STEP,
                False,
            )


@triton.jit
def row_vector(p, stride, row, h, L: tl.constexpr, KEYS: tl.constexpr):
    """One row of a table, of head h if it has heads: (1, KEYS)."""
    cols = tl.arange(0, KEYS)
    p += row * stride[0] + h.to(tl.int64) * stride[1]
    return tl.load(p + cols.to(tl.int64) * stride[2], mask=cols < L, other=0.0)[None, :]


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "HAS_TOKEN_MAP": lambda args: args["token_map"] is not None,
        "HAS_BLEND": lambda args: args["blend"] is not None,
        "HAS_REWEIGHT": lambda args: args["reweight"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
@triton.jit(
    do_not_specialize=["heads", "first", "head_dim"],
    do_not_specialize_on_alignment=["source_row", "blend", "reweight", "bias"],
)
def cross_attention_save_kernel(
    q,
    k,
    v,
    source_row,
    inject,
    token_map,
    blend,
    reweight,
    bias,
    save,
    out,
    queries,
    heads,
    first,
    head_dim,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_out,  # in units of UNIT
    stride_inject,
    stride_save,
    stride_bias,
    stride_blend,
    stride_reweight,  # in elements
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_INJECT: tl.constexpr,
    HAS_TOKEN_MAP: tl.constexpr,
    HAS_BLEND: tl.constexpr,
    HAS_REWEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """One block of queries of head h of row b: P', written to `save` in the edited rows, and out =
    P' V.

    token_map: (S, KEYS, KEYS), zero beyond L, so that no load of it needs a mask, contiguous.
    """
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keys = tl.arange(0, KEYS)
    edited = (b - first).to(tl.int64)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + edited).to(tl.int32)

    p = softmax_map(
        q,
        k,
        bias,
        b if HAS_BLEND else b_source,
        h,
        first,
        offs_n,
        queries,
        head_dim,
        stride_q,
        stride_k,
        stride_bias,
        scale,
        L,
        KEYS,
        D,
        UNIT,
        BLOCK_N,
        STEP,
        HAS_BIAS,
        not EVEN_N,
    )
    if b >= first:
        source = p
        if HAS_INJECT:
            source = stored_map(
                inject, edited, h, offs_n, queries, stride_inject, L, KEYS, not EVEN_N
            )
        elif HAS_BLEND:
            source = softmax_map(
                q,
                k,
                bias,
                b_source,
                h,
                first,
                offs_n,
                queries,
                head_dim,
                stride_q,
                stride_k,
                stride_bias,
                scale,
                L,
                KEYS,
                D,
                UNIT,
                BLOCK_N,
                STEP,
                HAS_BIAS,
                not EVEN_N,
            )
        if HAS_TOKEN_MAP:
            b_m = load(
                token_map + edited * (KEYS * KEYS), keys, keys, (KEYS, 1), KEYS, KEYS, False, False
            )
            source = dot(source.to(b_m.dtype), b_m, zeros(BLOCK_N, KEYS))
        if HAS_BLEND:
            w = row_vector(blend, stride_blend, edited, h, L, KEYS)
            source = w * source + (1 - w) * p
        if HAS_REWEIGHT:
            source = row_vector(reweight, stride_reweight, edited, h, L, KEYS) * source
        p_save, step_save = head(save, stride_save, edited, h, 1)
        store(p_save, source, offs_n, keys, step_save, queries, L)
        p = source
    p_v, step_v = head(v, stride_v, b, h, UNIT)
    p_out, step_out = head(out, stride_out, b, h, UNIT)
    store_product(
        p,
        p_v,
        step_v,
        p,
        p_v,
        step_v,
        p_out,
        step_out,
        offs_n,
        queries,
        head_dim,
        L,
        KEYS,
        D,
        BLOCK_N,
        STEP,
        False,
    )


@triton.jit(do_not_specialize=["heads"], do_not_specialize_on_alignment=["save_mean"])
def mean_kernel(
    maps,
    save_mean,
    queries,
    heads,
    stride_maps,
    stride_mean,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """save_mean += the mean over heads of maps (S, H, N, L), one block of queries, summed in the
    order of the heads."""
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


def wide(k) -> str:
    """What the ops with more than 128 keys are called in tiles.TABLE, beyond their name."""
    return ", wide" if k.shape[2] > 128 else ""


def first_row(q, *edits) -> int:
    """B - S, the first edited row; B if there is no edit."""
    return q.shape[0] - next((x.shape[0] for x in edits if x is not None), 0)


def prepare(q, k, v, v_source, source_row, inject, bias, keep_own, scale, out) -> Callable:
    """The launch of cross_attention_kernel for tensors like these; all checks are done in ops.py.

    It takes the same arguments.
    """
    B, H, N, D = q.shape
    u = unit(q, k, v, v_source, out)
    op = "cross_attention" + (wide(k) or ("" if bias is None else ", bias"))
    choice = tile(op, q, arch()) | tuned.tile(op, q)
    numbers = (
        N,
        H,
        first_row(q, source_row, inject, bias),
        D,
        (D**-0.5 if scale is None else scale) * LOG2_E,
    )
    steps = (
        *(strides(x, u) for x in (q, k, v, v_source, out)),
        strides(inject, 1),
        bias_strides(bias, H, N),
    )
    attend = Launch(
        cross_attention_kernel,
        launch_grid(q, choice),
        (*numbers, *steps),
        KEEP_OWN=keep_own,
        **shape_args(q, k, u),
        **choice,
    )

    def launch(q, k, v, v_source, source_row, inject, bias, keep_own, scale, out):
        attend(q, k, v, v_source, source_row, inject, bias, out)

    return launch


def prepare_save(
    q, k, v, source_row, inject, token_map, blend, reweight, bias, save, save_mean, scale, out
) -> Callable:
    """The form that writes P' or its mean, for tensors like these; all checks are done in ops.py.
    It takes the same.

    The mean is taken of maps in q's dtype, which are `save` if that is as exact.
    """
    N, H, D, L = q.shape[2], q.shape[1], q.shape[3], k.shape[2]
    S = save.shape[0] if save is not None else save_mean.shape[0]
    u = unit(q, k, v, out)
    op = "cross_attention_save" + wide(k)
    choice = tile(op, q, arch()) | tuned.tile(op, q)
    args = shape_args(q, k, u)
    beyond = args["KEYS"] - L
    own_maps = (
        save is None
        or save_mean is not None
        and torch.finfo(save.dtype).eps > torch.finfo(q.dtype).eps
    )
    maps = q.new_empty(S, H, N, L) if own_maps else save

    numbers = (N, H, q.shape[0] - S, D, (D**-0.5 if scale is None else scale) * LOG2_E)
    steps = (
        *(strides(x, u) for x in (q, k, v, out)),
        strides(inject, 1),
        strides(maps, 1),
        bias_strides(bias, H, N),
        table_strides(blend),
        table_strides(reweight),
    )
    attend = Launch(
        cross_attention_save_kernel, launch_grid(q, choice), (*numbers, *steps), **args, **choice
    )
    if save_mean is not None:
        block = 16
        add_mean = Launch(
            mean_kernel,
            (triton.cdiv(N, block) * S,),
            (N, H, strides(maps, 1), strides(save_mean[:, None], 1)),
            L=L,
            KEYS=args["KEYS"],
            BLOCK_N=block,
            num_warps=4,
        )

    def launch(
        q, k, v, source_row, inject, token_map, blend, reweight, bias, save, save_mean, scale, out
    ):
        if token_map is not None:  # both factors of a product have one dtype
            token_map = F.pad(token_map.to(q.dtype), (0, beyond, 0, beyond)).contiguous()
        maps = q.new_empty(S, H, N, L) if own_maps else save
        attend(q, k, v, source_row, inject, token_map, blend, reweight, bias, maps, out)
        if save_mean is not None:
            add_mean(maps, save_mean)
        if save is not None and own_maps:
            save.copy_(maps)

    return launch
