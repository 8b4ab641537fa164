"""Attention over at most 256 keys with the map edited in flight: the whole key row at once, one
pass, no rescaling.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

One program owns BLOCK_N queries of one head of one row, forms their P' in registers and multiplies
it with V; P_source is recomputed from q and k of another row, or read. P' is written only where it
is asked for, and its mean over the heads by `mean_kernel`. Source: Hertz et al. 2022
(prompt-to-prompt) for the edits.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import tuned
from .launch import Launch
from .tiles import (
    LOG2_E,
    Inputs,
    Matrix,
    arch,
    bias_strides,
    dot,
    finite,
    head,
    launch_grid,
    load,
    load_bias,
    load_queries,
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
    x,
    b,
    h,
    offs_n,
    offs_l,
    L: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """P = softmax(scale q k^T + bias) of one block of queries of row b: float32, zero beyond L.
    x: Inputs."""
    block = load_queries(x, b, h, offs_n, D, STEP, UNIT, EVEN_N)
    k = head(x.k, x.stride_k, b, h // x.group, UNIT)
    s = scores(x, block, k, offs_l, L, D, STEP, EVEN_N, offs_l.shape[0] != L)
    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    if x.bias is not None:
        s = s * x.scale + load_bias(block.bias, offs_n, offs_l, block.biased, L)
        p = tl.exp2(s - finite(tl.max(s, 1))[:, None])
        total = tl.sum(p, 1)
        return p * (1 / tl.where(total == 0, 1.0, total))[:, None]
    else:
        p = tl.exp2(s * x.scale - (tl.max(s, 1) * x.scale)[:, None])
        return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def stored_map(
    inject, stride, row, h, offs_n, offs_l, queries, L: tl.constexpr, EVEN_N: tl.constexpr
):
    """A stored map of one block of queries, float32."""
    at = head(inject, stride, row, h, 1)
    return load(at, offs_n, offs_l, queries, L, not EVEN_N, offs_l.shape[0] != L).to(tl.float32)


@triton.jit
def row_vector(p, stride, row, h, offs_l, L):
    """One row of a table, of head h if it has heads: (1, KEYS), zero beyond L."""
    p += row * stride[0] + h.to(tl.int64) * stride[1]
    return tl.load(p + offs_l.to(tl.int64) * stride[2], mask=offs_l < L, other=0.0)[None, :]


@triton.jit
def add_moved(acc, source, moves, first, limit: tl.constexpr, PIECE: tl.constexpr):
    """acc + source @ token_map[first :], PIECE rows at a time, so that they fit into shared memory
    and registers. source: (BLOCK_N, WIDTH), the columns that belong to these rows."""
    WIDTH: tl.constexpr = source.shape[1]
    if WIDTH > PIECE:
        HALF: tl.constexpr = WIDTH // 2
        left, right = source.reshape([source.shape[0], 2, HALF]).permute(0, 2, 1).split()
        acc = add_moved(acc, left, moves, first, limit, PIECE)
        return add_moved(acc, right, moves, first + HALF, limit, PIECE)
    else:
        rows, cols = tl.arange(0, WIDTH) + first, tl.arange(0, acc.shape[1])
        b_m = load(moves, rows, cols, limit, limit, acc.shape[1] != limit, acc.shape[1] != limit)
        return dot(source, b_m.to(source.dtype), acc)


@triton.jit
def store_columns(
    start, p, v, out, offs_n, queries, L: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr
):
    """STEP columns of out = P V."""
    d, offs_l = start + tl.arange(0, STEP), tl.arange(0, p.shape[1])
    b_v = load(v, offs_l, d, L, D, p.shape[1] != L, D % STEP != 0)
    acc = dot(p.to(b_v.dtype), b_v, zeros(p.shape[0], STEP))
    store(out, acc, offs_n, d, queries, D)


# A compile for each value, or for each step whose row of a table begins elsewhere, would be waste.
@triton.jit(
    do_not_specialize=["heads", "first", "head_dim"],
    do_not_specialize_on_alignment=["source_row", "token_map", "blend", "reweight", "bias"],
)
def cross_attention_kernel(
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
    group,  # heads of q to one of k and v
    first,
    head_dim,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_out,  # in units of UNIT
    stride_inject,
    stride_blend,
    stride_reweight,
    stride_bias,
    stride_save,  # in elements
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """One block of queries of head h of row b: out = P' V, and P' itself where there is a `save`.

    Rows from `first` on are edited. The gate is a value: of a row whose weights in `blend` are all
    0 no source is computed, and where they are all 1 no map of its own. token_map: contiguous.
    """
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n, offs_l = start_n + tl.arange(0, BLOCK_N), tl.arange(0, KEYS)
    edited = (b - first).to(tl.int64)
    steps = (stride_q, stride_k, stride_bias)
    x = Inputs(q, k, bias, *steps, queries, group, first, head_dim, scale)

    HAS_SOURCE: tl.constexpr = source_row is not None or inject is not None
    takes = b >= first  # whether the row takes something of a source
    if HAS_SOURCE and blend is not None:
        if takes:
            w = row_vector(blend, stride_blend, edited, h, offs_l, L)
            takes = tl.sum(tl.abs(w)) != 0
    b_map = b
    if source_row is not None:
        if takes:
            b_map = first + tl.load(source_row + edited).to(tl.int32)

    if inject is not None and takes:
        at = (edited, h, offs_n, offs_l, queries)
        p = stored_map(inject, stride_inject, *at, L, EVEN_N)
    else:
        p = softmax_map(x, b_map, h, offs_n, offs_l, L, D, STEP, UNIT, EVEN_N)
    if HAS_SOURCE and takes:
        if token_map is not None:
            moves = Matrix(token_map + edited * (L * L), (L, 1))
            p = add_moved(zeros(BLOCK_N, KEYS), p.to(q.dtype.element_ty), moves, 0, L, PIECE)
        if blend is not None:
            w = row_vector(blend, stride_blend, edited, h, offs_l, L)
            source = (w * p).to(q.dtype.element_ty)  # half the registers while there are two maps
            if tl.sum(tl.where(offs_l[None, :] < L, tl.abs(1 - w), 0.0)) != 0:
                p = softmax_map(x, b, h, offs_n, offs_l, L, D, STEP, UNIT, EVEN_N)
                p = source + (1 - w) * p
            else:
                p = source.to(tl.float32)
    if b >= first:
        if reweight is not None:
            p = row_vector(reweight, stride_reweight, edited, h, offs_l, L) * p
        if save is not None:
            store(head(save, stride_save, edited, h, 1), p, offs_n, offs_l, queries, L)

    of_v, to_out = head(v, stride_v, b, h // group, UNIT), head(out, stride_out, b, h, UNIT)
    if STEP < D:
        for start in range(0, head_dim, STEP):
            store_columns(start, p, of_v, to_out, offs_n, queries, L, D, STEP)
    else:
        store_columns(0, p, of_v, to_out, offs_n, queries, L, D, STEP)


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
        of_head = head(maps, stride_maps, edited, h, 1)
        total += load(of_head, offs_n, keys, queries, L, True, KEYS != L).to(tl.float32)
    mean = head(save_mean, stride_mean, edited, 0, 1)
    before = load(mean, offs_n, keys, queries, L, True, KEYS != L)
    store(mean, before + total / heads, offs_n, keys, queries, L)


# The launches: plain Python from here on.

MEAN_BLOCK = 16  # queries


def piece(keys: int, itemsize: int) -> int:
    """Rows of a token map to a product: all of them, or in float32, and of a wide one, what a
    thread has registers for."""
    return keys if itemsize == 2 and keys <= 128 else 16


def row_of(L: int, bias, saves, edits) -> str:
    """What a launch is called in tiles.TABLE, by what takes registers beside a map."""
    more = [("bias", [bias]), ("save", saves), ("edited", edits)]
    names = [name for name, tensors in more if any(x is not None for x in tensors)]
    return ", ".join(["cross_attention", *(["wide"] if L > 128 else names[:1])])


def prepare(q, k, v, source_row, inject, token_map, blend, reweight, bias, *others) -> Callable:
    """The launches for tensors like these; all checks are done in checks.py. They take the same
    tensors. others: save and save_mean, if the op has them, scale and out.

    The mean is taken of maps in q's dtype, which are `save` if that is as exact.
    """
    *saves, scale, out = others
    save, save_mean = saves or (None, None)
    (B, H, N, D), L = q.shape, k.shape[2]
    edit = (source_row, inject, reweight, bias, save, save_mean)
    S = next((x.shape[0] for x in edit if x is not None), 0)
    u = unit(q, k, v, out)
    op = row_of(L, bias, (save, save_mean), (inject, token_map, blend, reweight))
    # one entry for rows with and without an edit: these come out the same beside those
    choice = tile(op, q, arch()) | tuned.tile(op.removesuffix(", edited"), q)
    sizes = {"L": L, "KEYS": width(L), "D": D, "UNIT": u, "EVEN_N": N % choice["BLOCK_N"] == 0}
    sizes["PIECE"] = piece(width(L), q.element_size())
    exact = save is not None and torch.finfo(save.dtype).eps <= torch.finfo(q.dtype).eps
    own_maps = save_mean is not None and not exact
    maps = q.new_empty(S, H, N, L) if own_maps else save
    numbers = (N, H, H // k.shape[1], B - S, D, (D**-0.5 if scale is None else scale) * LOG2_E)
    steps = *(strides(x, u) for x in (q, k, v, out)), strides(inject, 1)
    steps += table_strides(blend), table_strides(reweight), bias_strides(bias, H, N)
    numbers = (*numbers, *steps, strides(maps, 1))
    grid = launch_grid(q, choice)
    attend = Launch(cross_attention_kernel, grid, numbers, **sizes, **choice)
    if save_mean is not None:
        grid, numbers = (triton.cdiv(N, MEAN_BLOCK) * S,), (N, H, strides(maps, 1))
        numbers += (strides(save_mean[:, None], 1),)
        sizes = {"L": L, "KEYS": width(L), "BLOCK_N": MEAN_BLOCK}
        add_mean = Launch(mean_kernel, grid, numbers, **sizes, num_warps=4)

    moved = token_map is not None and not token_map.is_contiguous()

    def launch(q, k, v, source_row, inject, token_map, blend, reweight, bias, *others):
        out, (save, save_mean) = others[-1], others[:2] if saves else (None, None)
        maps = q.new_empty(S, H, N, L) if own_maps else save
        token_map = token_map.contiguous() if moved else token_map
        attend(q, k, v, source_row, inject, token_map, blend, reweight, bias, maps, out)
        if save_mean is not None:
            add_mean(maps, save_mean)
        if save is not None and own_maps:
            save.copy_(maps)

    return launch
