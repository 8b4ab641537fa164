"""Attention over at most 256 keys that writes the edited map, or its mean over the heads.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

P' is formed because it is asked for, by `cross_attention_save_kernel`; `mean_kernel` then takes
the mean over heads. Everything else is as in cross_attention.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import tuned
from .cross_attention import Inputs, shape_args, softmax_map, store_product, stored_map, wide
from .launch import Launch
from .tiles import (
    LOG2_E,
    Matrix,
    arch,
    bias_strides,
    dot,
    head,
    launch_grid,
    load,
    place,
    store,
    strides,
    table_strides,
    tile,
    unit,
    zeros,
)


@triton.jit
def row_vector(p, stride, row, h, L: tl.constexpr, KEYS: tl.constexpr):
    """One row of a table, of head h if it has heads: (1, KEYS)."""
    cols = tl.arange(0, KEYS)
    p += row * stride[0] + h.to(tl.int64) * stride[1]
    return tl.load(p + cols.to(tl.int64) * stride[2], mask=cols < L, other=0.0)[None, :]


@triton.jit
def add_moved(
    acc,
    source,
    moves,
    first,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """acc + source @ token_map[first : first + WIDTH], PIECE rows at a time, so that they fit into
    shared memory. source: (BLOCK_N, WIDTH), the columns that belong to these rows."""
    if WIDTH > PIECE:
        HALF: tl.constexpr = WIDTH // 2
        left, right = source.reshape([BLOCK_N, 2, HALF]).permute(0, 2, 1).split()
        acc = add_moved(acc, left, moves, first, HALF, BLOCK_N, KEYS, PIECE)
        return add_moved(acc, right, moves, first + HALF, HALF, BLOCK_N, KEYS, PIECE)
    else:
        rows = first + tl.arange(0, WIDTH)
        b_m = load(moves, rows, tl.arange(0, KEYS), KEYS, KEYS, False, False)
        return dot(source.to(b_m.dtype), b_m, acc)  # converted here: earlier takes more registers


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
    group,  # heads of q to one of k and v
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
    PIECE: tl.constexpr,
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
    offs_n, keys = start_n + tl.arange(0, BLOCK_N), tl.arange(0, KEYS)
    edited = (b - first).to(tl.int64)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + edited).to(tl.int32)
    x = Inputs(q, k, stride_q, stride_k, queries, group, first, head_dim, scale)

    p = softmax_map(
        x,
        bias,
        stride_bias,
        b if HAS_BLEND else b_source,
        h,
        offs_n,
        L,
        KEYS,
        D,
        UNIT,
        STEP,
        BLOCK_N,
        EVEN_N,
        HAS_BIAS,
    )
    if b >= first:
        source = p
        if HAS_INJECT:
            source = stored_map(inject, stride_inject, edited, h, offs_n, queries, L, KEYS, EVEN_N)
        elif HAS_BLEND:
            source = softmax_map(
                x,
                bias,
                stride_bias,
                b_source,
                h,
                offs_n,
                L,
                KEYS,
                D,
                UNIT,
                STEP,
                BLOCK_N,
                EVEN_N,
                HAS_BIAS,
            )
        if HAS_TOKEN_MAP:
            moves = Matrix(token_map + edited * (KEYS * KEYS), (KEYS, 1))
            if KEYS > PIECE:
                source = source.to(token_map.dtype.element_ty)
            source = add_moved(zeros(BLOCK_N, KEYS), source, moves, 0, KEYS, BLOCK_N, KEYS, PIECE)
        if HAS_BLEND:
            w = row_vector(blend, stride_blend, edited, h, L, KEYS)
            source = w * source + (1 - w) * p
        if HAS_REWEIGHT:
            source = row_vector(reweight, stride_reweight, edited, h, L, KEYS) * source
        store(head(save, stride_save, edited, h, 1), source, offs_n, keys, queries, L)
        p = source
    own_v, to_out = head(v, stride_v, b, h // group, UNIT), head(out, stride_out, b, h, UNIT)
    store_product(
        p, own_v, p, own_v, to_out, offs_n, queries, head_dim, L, KEYS, D, STEP, BLOCK_N, False
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
        of_head = head(maps, stride_maps, edited, h, 1)
        total += load(of_head, offs_n, keys, queries, L, True, KEYS != L).to(tl.float32)
    mean = head(save_mean, stride_mean, edited, 0, 1)
    before = load(mean, offs_n, keys, queries, L, True, KEYS != L)
    store(mean, before + total / heads, offs_n, keys, queries, L)


# The launches: plain Python from here on.


def piece(keys: int, itemsize: int) -> int:
    """Rows of a token map to a product: all of them, or of a wide one what every card has shared
    memory and float32 products have registers for."""
    return keys if keys <= 128 else 64 if itemsize == 2 else 32


def prepare(
    q, k, v, source_row, inject, token_map, blend, reweight, bias, save, save_mean, scale, out
) -> Callable:
    """The form that writes P' or its mean, for tensors like these; all checks are done in
    checks.py.
    It takes the same.

    The mean is taken of maps in q's dtype, which are `save` if that is as exact.
    """
    N, H, D, L = q.shape[2], q.shape[1], q.shape[3], k.shape[2]
    S = save.shape[0] if save is not None else save_mean.shape[0]
    u = unit(q, k, v, out)
    op = "cross_attention_save" + wide(k)
    choice = tile(op, q, arch()) | tuned.tile(op, q)
    args = shape_args(q, k, u)
    beyond, args["PIECE"] = args["KEYS"] - L, piece(args["KEYS"], q.element_size())
    own_maps = (
        save is None
        or save_mean is not None
        and torch.finfo(save.dtype).eps > torch.finfo(q.dtype).eps
    )
    maps = q.new_empty(S, H, N, L) if own_maps else save

    group, scale = H // k.shape[1], (D**-0.5 if scale is None else scale) * LOG2_E
    numbers = (N, H, group, q.shape[0] - S, D, scale)
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
