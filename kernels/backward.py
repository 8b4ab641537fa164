"""Gradients of attention, recomputed: no map is stored, and memory grows with the tokens alone.

A *term* is one product of a map with values: out[b] = P[m] V. A row has its own term; a row whose
edit blends has a second one, with the map of its source row and other values (V_source of
ops.fold); and a row that `source_row` alone routes has one, with the map of another row. Of a term

    dP = dO V^T;   delta = rowsum(P dP);   dS = P (dP - delta);   dV = P^T dO

and the gradients of a row's q and k are sums over all terms that use its map, dQ = scale dS K and
dK = scale dS^T Q. One program owns a block of queries or of keys of one map and gathers over those
terms in their order: no atomics, the same bits every time.

Three kernels: `statistics_kernel` finds the logarithm of each softmax's denominator, and delta, of
every term; `query_kernel` dQ; `key_kernel` dK, and dV of every term.
Source: Dao, FlashAttention-2 (2023), algorithm 2; here delta is not taken from the output, which
may be the sum of two terms.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import Launch
from .terms import Scores, logits, rows_of, statistics_kernel, values_of
from .tiles import (
    arch,
    bias_strides,
    dot,
    head,
    instructions,
    load,
    place,
    store,
    strides,
    unit,
    width,
    zeros,
)


@triton.jit
def map_gradient(
    b_q,
    b_k,
    b_v,
    b_grad,
    log_sum,
    delta,
    at,
    offs_n,
    offs_l,
    x,
    bias,
    stride_bias,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """(P, dS = P (dP - delta)) of one term for one block of queries and keys, both (BLOCK_N,
    BLOCK_L). at: where the statistics of the term's head begin."""
    seen = offs_n < x.queries
    b_log_sum = tl.load(log_sum + at + offs_n, mask=seen, other=float("inf"))  # P = 0 beyond
    b_delta = tl.load(delta + at + offs_n, mask=seen, other=0.0)
    p = tl.exp2(
        logits(b_q, b_k, offs_n, offs_l, x, bias, stride_bias, BLOCK_N, BLOCK_L, CAUSAL)
        - b_log_sum[:, None]
    )
    return p, p * (dot(b_grad, b_v.T, zeros(BLOCK_N, BLOCK_L)) - b_delta[:, None])


@triton.jit(
    do_not_specialize=["heads", "first", "rows", "terms"],
    do_not_specialize_on_alignment=["source_row", "bias"],
)
def query_kernel(
    q,
    k,
    v,
    v_source,
    grad_out,
    source_row,
    bias,
    log_sum,
    delta,
    grad_q,
    queries,
    keys,
    heads,
    first,
    rows,
    terms,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_source,
    stride_grad,
    stride_bias,
    stride_grad_q,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dQ = scale dS K of one block of queries of head h of row b, over the terms that use its
    map."""
    start_n, h, b = place(queries, heads, BLOCK_N)
    x = Scores(scale, b, first, h, queries, keys)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_q, of_k = head(q, stride_q, b, h, UNIT), head(k, stride_k, b, h, UNIT)
    b_q = load(of_q, offs_n, offs_d, queries, D, True, WIDTH != D)

    acc = zeros(BLOCK_N, WIDTH)
    for t in range(terms):
        map_row, row = rows_of(t, source_row, first, rows, v_source is None)
        if map_row == b:
            of_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT)
            of_grad = head(grad_out, stride_grad, row, h, UNIT)
            b_grad = load(of_grad, offs_n, offs_v, queries, DV, True, WIDTH_V != DV)
            at = (tl.cast(t, tl.int64) * heads + h) * queries
            for start in range(0, tl.minimum(keys, start_n + BLOCK_N) if CAUSAL else keys, BLOCK_L):
                offs_l = start + tl.arange(0, BLOCK_L)
                b_k = load(of_k, offs_l, offs_d, keys, D, True, WIDTH != D)
                b_v = load(of_v, offs_l, offs_v, keys, DV, True, WIDTH_V != DV)
                _, ds = map_gradient(
                    b_q,
                    b_k,
                    b_v,
                    b_grad,
                    log_sum,
                    delta,
                    at,
                    offs_n,
                    offs_l,
                    x,
                    bias,
                    stride_bias,
                    BLOCK_N,
                    BLOCK_L,
                    CAUSAL,
                )
                acc = dot(ds.to(b_k.dtype), b_k, acc)

    store(head(grad_q, stride_grad_q, b, h, UNIT), acc * scale, offs_n, offs_d, queries, D)


@triton.jit(
    do_not_specialize=["heads", "first", "rows", "terms"],
    do_not_specialize_on_alignment=["source_row", "bias"],
)
def key_kernel(
    q,
    k,
    v,
    v_source,
    grad_out,
    source_row,
    bias,
    log_sum,
    delta,
    grad_k,
    grad_v,
    grad_source,
    queries,
    keys,
    heads,
    first,
    rows,
    terms,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_source,
    stride_grad,
    stride_bias,
    stride_grad_k,
    stride_grad_v,
    stride_grad_source,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dK = scale dS^T Q of one block of keys of head h of row b, and dV = P^T dO of every term that
    uses its map."""
    start_l, h, b = place(keys, heads, BLOCK_L)
    x = Scores(scale, b, first, h, queries, keys)
    offs_l = start_l + tl.arange(0, BLOCK_L)
    offs_d, offs_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_q, of_k = head(q, stride_q, b, h, UNIT), head(k, stride_k, b, h, UNIT)
    b_k = load(of_k, offs_l, offs_d, keys, D, True, WIDTH != D)

    acc_k = zeros(BLOCK_L, WIDTH)
    for t in range(terms):
        map_row, row = rows_of(t, source_row, first, rows, v_source is None)
        if map_row == b:
            of_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT)
            of_grad = head(grad_out, stride_grad, row, h, UNIT)
            b_v = load(of_v, offs_l, offs_v, keys, DV, True, WIDTH_V != DV)
            acc_v = zeros(BLOCK_L, WIDTH_V)
            at = (tl.cast(t, tl.int64) * heads + h) * queries
            for start in range(start_l // BLOCK_N * BLOCK_N if CAUSAL else 0, queries, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                b_q = load(of_q, offs_n, offs_d, queries, D, True, WIDTH != D)
                b_grad = load(of_grad, offs_n, offs_v, queries, DV, True, WIDTH_V != DV)
                p, ds = map_gradient(
                    b_q,
                    b_k,
                    b_v,
                    b_grad,
                    log_sum,
                    delta,
                    at,
                    offs_n,
                    offs_l,
                    x,
                    bias,
                    stride_bias,
                    BLOCK_N,
                    BLOCK_L,
                    CAUSAL,
                )
                acc_v = dot(p.to(b_grad.dtype).T, b_grad, acc_v)
                acc_k = dot(ds.to(b_q.dtype).T, b_q, acc_k)
            to_v = values_of(
                t, grad_v, stride_grad_v, grad_source, stride_grad_source, h, rows, UNIT
            )
            store(to_v, acc_v, offs_l, offs_v, keys, DV)

    store(head(grad_k, stride_grad_k, b, h, UNIT), acc_k * scale, offs_l, offs_d, keys, D)


# The launch: plain Python from here on.


def config(wide: int, itemsize: int, arch: int) -> dict:
    """Tile and warps of all three kernels; wide: the width of a head. By the compiler's word (a
    cubin's registers)."""
    if itemsize == 4:  # no tensor cores: operands of float32 products live in registers
        return {"BLOCK_N": 16, "BLOCK_L": 16, "num_warps": 4, "num_stages": 1}
    if wide <= 64 and instructions(arch) == "warpgroup":
        return {
            "BLOCK_N": 64,
            "BLOCK_L": 64,
            "num_warps": 4,
            "num_stages": 1,
        }  # a second stage spills
    block_l = 32 if wide <= 128 else 16
    return {"BLOCK_N": 32, "BLOCK_L": block_l, "num_warps": 4, "num_stages": 1}


def prepare(
    grad_out, q, k, v, v_source, source_row, bias, grad_lse, scale, is_causal, out
) -> Callable:
    """The launches that fill out = (grad_q, grad_k, grad_v, grad_source), for tensors like these.

    They take the same tensors. grad_lse: (B, H, N), the gradient of each row's lse, or None.
    """
    (B, H, N, D), (L, DV) = q.shape, v.shape[2:]
    S = next((x.shape[0] for x in (source_row, bias, v_source) if x is not None), 0)
    terms = B + (0 if v_source is None else S)
    u = unit(q, k, v, v_source, grad_out, *out[:3], None if v_source is None else out[3])
    steps = *(strides(x, u) for x in (q, k, v, v_source, grad_out)), bias_strides(bias, H, N)
    choice = config(max(width(D), width(DV)), q.element_size(), arch())
    blocks_n, blocks_l = triton.cdiv(N, choice["BLOCK_N"]), triton.cdiv(L, choice["BLOCK_L"])
    choice |= {"D": D, "DV": DV, "WIDTH": width(D), "WIDTH_V": width(DV), "UNIT": u}
    choice |= {"CAUSAL": is_causal}
    scale = D**-0.5 if scale is None else scale
    sizes = (N, L, H, B - S, B, terms, scale)
    written = *(strides(x, u) for x in out[1:3]), strides(None if v_source is None else out[3], u)
    statistics = Launch(
        statistics_kernel, (blocks_n * H * terms,), (N, L, H, B - S, B, scale, *steps), **choice
    )
    queries = Launch(
        query_kernel, (blocks_n * H * B,), (*sizes, *steps, strides(out[0], u)), **choice
    )
    keys = Launch(key_kernel, (blocks_l * H * B,), (*sizes, *steps, *written), **choice)

    def launch(grad_out, q, k, v, v_source, source_row, bias, grad_lse, out):
        grad_q, grad_k, grad_v, grad_source = out
        log_sum, delta = (q.new_empty(terms, H, N, dtype=torch.float32) for _ in range(2))
        tensors = (q, k, v, v_source, grad_out, source_row, bias, log_sum, delta)
        statistics(*tensors)
        if grad_lse is not None:  # dS = P (dP - delta + d lse)
            delta[:B] -= grad_lse
        queries(*tensors, grad_q)
        keys(*tensors, grad_k, grad_v, None if v_source is None else grad_source)

    return launch
