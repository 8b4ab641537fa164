"""Attention over at most 128 keys with the map edited in flight: the whole key row at once, one pass, no rescaling.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

Two kernels. `cross_attention_kernel` never forms P': the edit is linear in both maps, so fold.py moved it into the
values and what is left is out = P_own V_own + P_source V_source. `cross_attention_save_kernel` forms P', because it is
asked to write it (`save`) or the mean over heads (`save_mean`). P_source is recomputed from q and k of another row, or
read. Source: Hertz et al. 2022 (prompt-to-prompt) for the edits.

A key row is cut like a head dim (see attention.py), 77 = 64 + 13 (padded to 16), and so a map is a tuple of tiles too.
"""

import torch.nn.functional as F
import triton
import triton.language as tl

from . import fold, tuned
from .attention import (
    LOG2_E, arch, beyond, columns, cut, dot, head, load, load_cut, scores, store_cut, strides, unit, zeros, zeros_cut,
)  # fmt: skip


@triton.jit
def softmax_map(q, k, b, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
                UNIT: tl.constexpr, BLOCK_N: tl.constexpr, MASK_N: tl.constexpr, REREAD: tl.constexpr):  # fmt: skip
    """P = softmax(q k^T / sqrt(D)) of one block of queries of row b, tiles (BLOCK_N, KEYS[j]), zero beyond L."""
    p_q, step_q = head(q, stride_q, b, h, UNIT)
    p_k, step_k = head(k, stride_k, b, h, UNIT)
    b_q = load_cut(p_q, offs_n, step_q, queries, D, HEAD, MASK_N)
    s = ()
    for j in tl.static_range(len(KEYS)):
        s = s + (scores(p_q, b_q, offs_n, queries, step_q, p_k, columns(KEYS, j), L, step_k, BLOCK_N, KEYS[j][1],
                        D, HEAD, MASK_N, beyond(KEYS, j, L), REREAD, head_dim),)  # fmt: skip
    m = tl.max(s[0], 1)
    for j in tl.static_range(1, len(KEYS)):
        m = tl.maximum(m, tl.max(s[j], 1))

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    m = m * scale
    total = tl.zeros([BLOCK_N], tl.float32)
    weights = ()
    for j in tl.static_range(len(KEYS)):
        w = tl.exp2(s[j] * scale - m[:, None])
        total += tl.sum(w, 1)
        weights = weights + (w,)
    inverse = 1 / total
    p = ()
    for j in tl.static_range(len(KEYS)):
        p = p + (weights[j] * inverse[:, None],)
    return p


@triton.jit
def stored_map(inject, b, h, offs_n, queries, stride, L: tl.constexpr, KEYS: tl.constexpr, MASK_N: tl.constexpr):
    """A stored map of one block of queries, float32, as tiles (BLOCK_N, width of KEYS[j])."""
    p_map, step = head(inject, stride, b, h, 1)
    tiles = load_cut(p_map, offs_n, step, queries, L, KEYS, MASK_N)
    p = ()
    for j in tl.static_range(len(KEYS)):
        p = p + (tiles[j].to(tl.float32),)
    return p


@triton.jit
def add_product(acc, p, p_m, step, L: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr):
    """acc + P M for a matrix M with L rows and WIDTH columns, values or a token map: tiles (BLOCK_N, CUT[i])."""
    total = acc
    for j in tl.static_range(len(KEYS)):
        longer = ()
        for i in tl.static_range(len(CUT)):
            b_m = load(p_m, columns(KEYS, j), columns(CUT, i), step, L, WIDTH,
                       beyond(KEYS, j, L), beyond(CUT, i, WIDTH))  # fmt: skip
            longer = longer + (dot(p[j].to(b_m.dtype), b_m, total[i]),)
        total = longer
    return total


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None and args["KEEP_OWN"],
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
@triton.jit(do_not_specialize=["first"])  # a compile for each value would be waste
def cross_attention_kernel(
    q, k, v, v_source, source_row, inject, out,
    queries, first, scale,
    stride_q, stride_k, stride_v, stride_source, stride_inject, stride_out,  # inject: elements, the others: UNIT
    KEEP_OWN: tl.constexpr,
    L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, REREAD: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_INJECT: tl.constexpr, TWO_TERMS: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b: out = P V, and rows from `first` on may differ in one of three ways.

    source_row alone: out = P_source V.  With v_source: out = P_own V + P_source V_source.  inject without KEEP_OWN:
    out = inject V_source.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + b - first).to(tl.int32)

    acc = zeros_cut(BLOCK_N, HEAD)
    if KEEP_OWN or b < first:
        p = softmax_map(q, k, b if TWO_TERMS else b_source, h, offs_n, queries, D, stride_q, stride_k, scale,
                        L, KEYS, D, HEAD, UNIT, BLOCK_N, not EVEN_N, REREAD)  # fmt: skip
        p_v, step_v = head(v, stride_v, b, h, UNIT)
        acc = add_product(acc, p, p_v, step_v, L, KEYS, D, HEAD)
    if TWO_TERMS or not KEEP_OWN:
        if b >= first:
            if HAS_INJECT:
                p = stored_map(inject, b - first, h, offs_n, queries, stride_inject, L, KEYS, not EVEN_N)
            else:
                p = softmax_map(q, k, b_source, h, offs_n, queries, D, stride_q, stride_k, scale,
                                L, KEYS, D, HEAD, UNIT, BLOCK_N, not EVEN_N, REREAD)  # fmt: skip
            p_v, step_v = head(v_source, stride_source, b - first, h, UNIT)
            acc = add_product(acc, p, p_v, step_v, L, KEYS, D, HEAD)

    p_out, step_out = head(out, stride_out, b, h, UNIT)
    store_cut(p_out, acc, offs_n, step_out, queries, D, HEAD)


@triton.jit
def blended(own, source, weight, L: tl.constexpr, KEYS: tl.constexpr):
    """weight * source + (1 - weight) * own, column by column; weight: L numbers."""
    p = ()
    for j in tl.static_range(len(KEYS)):
        w = row_vector(weight, L, columns(KEYS, j))
        p = p + (w * source[j] + (1 - w) * own[j],)
    return p


@triton.jit
def scaled(p, weight, L: tl.constexpr, KEYS: tl.constexpr):
    """weight * p, column by column; weight: L numbers."""
    product = ()
    for j in tl.static_range(len(KEYS)):
        product = product + (row_vector(weight, L, columns(KEYS, j)) * p[j],)
    return product


@triton.jit
def row_vector(p, L: tl.constexpr, cols):
    return tl.load(p + cols, mask=cols < L, other=0.0)[None, :]


@triton.jit
def store_product(p, p_v, step_v, p_out, step_out, offs_n, queries, head_dim,
                  L: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
                  STEP: tl.constexpr):  # fmt: skip
    """out = P V, STEP columns at a time, so that no more of it is in registers; head_dim as in `scores`."""
    for start in range(0, head_dim, STEP):
        d = start + tl.arange(0, STEP)
        acc = zeros(BLOCK_N, STEP)
        for j in tl.static_range(len(KEYS)):
            b_v = load(p_v, columns(KEYS, j), d, step_v, L, D, beyond(KEYS, j, L), D % STEP != 0)
            acc = dot(p[j].to(b_v.dtype), b_v, acc)
        p_tile = p_out + offs_n[:, None] * step_out[0] + d[None, :] * step_out[1]
        tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=(offs_n[:, None] < queries) & (d[None, :] < D))


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "HAS_TOKEN_MAP": lambda args: args["token_map"] is not None,
        "HAS_BLEND": lambda args: args["blend"] is not None,
        "HAS_REWEIGHT": lambda args: args["reweight"] is not None,
        "HAS_SAVE": lambda args: args["save"] is not None,
        "HAS_SAVE_MEAN": lambda args: args["save_mean"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
@triton.jit(do_not_specialize=["first", "heads"])
def cross_attention_save_kernel(
    q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean, out,
    queries, heads, first, head_dim, scale,
    stride_q, stride_k, stride_v, stride_inject, stride_save, stride_out,  # inject, save: elements, the others: UNIT
    L: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, REREAD: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_INJECT: tl.constexpr, HAS_TOKEN_MAP: tl.constexpr, HAS_BLEND: tl.constexpr,
    HAS_REWEIGHT: tl.constexpr, HAS_SAVE: tl.constexpr, HAS_SAVE_MEAN: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of row b: P', written where asked, and out = P' V.

    A program owns one head, or all of them for save_mean, which is then a plain sum in registers without atomics.
    token_map: (S, WIDTH, WIDTH), zero beyond L, so that no load of it needs a mask; it, blend, reweight and save_mean
    are contiguous. What is computed outside of the loop over heads stays in registers all through it, and there are
    none to spare: hence disable_licm, and loops over head_dim that are not unrolled.
    """
    b = tl.program_id(2)
    edited = b - first
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + edited).to(tl.int32)

    mean = zeros_cut(BLOCK_N, KEYS)
    for i in tl.range(0, heads if HAS_SAVE_MEAN else 1, disable_licm=True):
        h = tl.program_id(1) + i
        p = softmax_map(q, k, b if HAS_BLEND else b_source, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                        L, KEYS, D, HEAD, UNIT, BLOCK_N, not EVEN_N, REREAD)  # fmt: skip
        if b >= first:
            source = p
            if HAS_INJECT:
                source = stored_map(inject, edited, h, offs_n, queries, stride_inject, L, KEYS, not EVEN_N)
            elif HAS_BLEND:
                source = softmax_map(q, k, b_source, h, offs_n, queries, head_dim, stride_q, stride_k, scale,
                                     L, KEYS, D, HEAD, UNIT, BLOCK_N, not EVEN_N, REREAD)  # fmt: skip
            if HAS_TOKEN_MAP:
                p_m = token_map + edited.to(tl.int64) * (WIDTH * WIDTH)
                source = add_product(zeros_cut(BLOCK_N, KEYS), source, p_m, (WIDTH, 1), WIDTH, KEYS, WIDTH, KEYS)
            p = blended(p, source, blend + edited * L, L, KEYS) if HAS_BLEND else source
            if HAS_REWEIGHT:
                p = scaled(p, reweight + edited * L, L, KEYS)
            if HAS_SAVE:
                p_save, step_save = head(save, stride_save, edited, h, 1)
                store_cut(p_save, p, offs_n, step_save, queries, L, KEYS)
        if HAS_SAVE_MEAN:
            mean = plus(mean, p, KEYS)
        p_v, step_v = head(v, stride_v, b, h, UNIT)
        p_out, step_out = head(out, stride_out, b, h, UNIT)
        if REREAD > 0:
            store_product(p, p_v, step_v, p_out, step_out, offs_n, queries, head_dim, L, KEYS, D, BLOCK_N, REREAD)
        else:
            acc = add_product(zeros_cut(BLOCK_N, HEAD), p, p_v, step_v, L, KEYS, D, HEAD)
            store_cut(p_out, acc, offs_n, step_out, queries, D, HEAD)

    if HAS_SAVE_MEAN:
        if b >= first:  # one program owns these numbers, so a load and a store add to them
            p_mean = save_mean + edited.to(tl.int64) * queries * L
            before = load_cut(p_mean, offs_n, (L, 1), queries, L, KEYS, not EVEN_N)
            store_cut(p_mean, plus(before, mean, KEYS, 1 / heads), offs_n, (L, 1), queries, L, KEYS)


@triton.jit
def plus(a, b, CUT: tl.constexpr, weight=1.0):
    """a + weight * b, tile by tile."""
    total = ()
    for i in tl.static_range(len(CUT)):
        total = total + (a[i] + weight * b[i],)
    return total


# The launches: plain Python from here on.


def config(D: int, itemsize: int, arch: int, all_heads: bool = False, refines: bool = False) -> dict:
    """Tile and warps by rule: what does not spill, as far as the compiler can tell (python -m bench.kernel_resources).

    arch: compute capability, 80 or 90; all_heads: one program does all heads (save_mean); refines: a source row's map
    goes through a token map. That decides about stages alone, so that rows without an edit have the same bits whatever
    the edit of the others. Where stages are two, one would spill 8 bytes in some form with some version of Triton.
    """
    tile = {"num_stages": 1}
    if itemsize == 4:  # no tensor cores: float32 products are multiply-adds, and their operands live in registers
        tile |= {"BLOCK_N": 16, "WIDEST": 16 if D <= 64 else 32 if D <= 160 else 256, "WIDEST_KEYS": 32}
        if all_heads and D > 16:  # refining leaves no registers for a second stage
            return tile | {"REREAD": 16, "num_warps": 4, "num_stages": 1 if refines else 2}
        return tile | {"REREAD": 16 if all_heads else 32, "num_warps": 8}
    if arch >= 90:  # wgmma takes 64 rows and 4 warps, and its operands from shared memory
        tile |= {"BLOCK_N": 64, "REREAD": 64 if D > 160 else 0, "num_warps": 4}
        if all_heads:
            tile |= {"WIDEST": 32, "WIDEST_KEYS": 32, "REREAD": 32} if D > 80 else {"WIDEST_KEYS": 32}
        return tile
    if D <= 80:  # q stays in registers, unless the saving forms would spill with some version of Triton
        tile |= {"BLOCK_N": 64, "num_warps": 8 if all_heads and D > 32 else 4}
        return tile | {"REREAD": 64 if D == 64 else 32 if D > 64 and all_heads else 0}
    tile |= {"BLOCK_N": 16, "num_warps": 4}
    if all_heads:
        return tile | {"WIDEST": 32, "WIDEST_KEYS": 32, "REREAD": 32}
    return tile | {"WIDEST": 64} | ({"REREAD": 64, "num_stages": 2} if D > 160 else {"REREAD": 0})


def shape_args(q, k, unit: int, choice: dict) -> dict:
    """The constexprs that follow from the shapes."""
    L, D = k.shape[2], q.shape[3]
    keys, head = choice.pop("WIDEST_KEYS", 128), choice.pop("WIDEST", 256)
    return {"L": L, "KEYS": cut(L, keys), "D": D, "HEAD": cut(D, head), "UNIT": unit}


def first_row(q, *edits) -> int:
    """B - S, the first edited row; B if there is no edit."""
    return q.shape[0] - next((x.shape[0] for x in edits if x is not None), 0)


def launch(q, k, v, source_row, inject, token_map, blend, reweight, out) -> None:
    """The folded form; see cross_attention_kernel. All checks are done in ops.py."""
    v, v_source, keep_own = fold.launch(v, source_row, inject, token_map, blend, reweight)
    launch_folded(q, k, v, v_source, source_row, inject, keep_own, out)


def launch_folded(q, k, v, v_source, source_row, inject, keep_own, out) -> None:
    """The same with values that are folded already."""
    B, H, N, D = q.shape
    u = unit(q, k, v, v_source, out)
    choice = config(D, q.element_size(), arch()) | tuned.tile("cross_attention", q)
    cross_attention_kernel[(triton.cdiv(N, choice["BLOCK_N"]), H, B)](
        q, k, v, v_source, source_row, inject, out,
        N, first_row(q, source_row, inject), D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v, v_source)), strides(inject, 1), strides(out, u),
        KEEP_OWN=keep_own, **shape_args(q, k, u, choice), **choice,
    )  # fmt: skip


def launch_save(q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean, out) -> None:
    """The form that writes P' or its mean; see cross_attention_save_kernel. All checks are done in ops.py."""
    B, H, N, D = q.shape
    u = unit(q, k, v, out)
    refines = token_map is not None and inject is None
    choice = config(D, q.element_size(), arch(), all_heads=save_mean is not None, refines=refines)
    choice |= tuned.tile("cross_attention_save" if save_mean is None else "cross_attention_save_mean", q)
    args = shape_args(q, k, u, choice)
    width = sum(args["KEYS"][-1])  # of all tiles of a key row
    if token_map is not None:  # both factors of a product have one dtype
        beyond_L = width - token_map.shape[1]
        token_map = F.pad(token_map.to(q.dtype), (0, beyond_L, 0, beyond_L)).contiguous()
    mean = None if save_mean is None else save_mean.contiguous()
    cross_attention_save_kernel[(triton.cdiv(N, choice["BLOCK_N"]), 1 if mean is not None else H, B)](
        q, k, v, source_row, inject, token_map,
        *(None if x is None else x.contiguous() for x in (blend, reweight)), save, mean, out,
        N, H, first_row(q, save, mean), D, D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v)), strides(inject, 1), strides(save, 1), strides(out, u),
        WIDTH=width, **args, **choice,
    )  # fmt: skip
    if mean is not save_mean:
        save_mean.copy_(mean)
