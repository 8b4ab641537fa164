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
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch
from .tiles import (
    Matrix,
    arch,
    bias_strides,
    dot,
    finite,
    head,
    instructions,
    load,
    load_bias,
    place,
    store,
    strides,
    unit,
    width,
    zeros,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(t, source_row, first, rows, ROUTED: tl.constexpr, HAS_SOURCE_ROW: tl.constexpr):
    """(row of the map, row of the output) of term t: the rows' own terms first, then the second
    ones."""
    t = tl.cast(t, tl.int32)
    row = tl.where(t < rows, t, first + t - rows)
    map_row = row
    if HAS_SOURCE_ROW:
        if (t >= rows) | (ROUTED & (row >= first)):
            map_row = first + tl.load(source_row + row - first).to(tl.int32)
    return map_row, row


@triton.jit
def values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT: tl.constexpr, TWO_TERMS):
    """The Matrix of the values of term t, or of their gradients."""
    p, step = head(v, stride_v, tl.minimum(t, rows - 1), h, UNIT)
    if TWO_TERMS:
        if t >= rows:
            p, step = head(v_source, stride_source, t - rows, h, UNIT)
    return Matrix(p, step)


class Scores(NamedTuple):
    """What the scores of one map are computed with, beside blocks of q and k."""

    scale: tl.tensor
    map_row: tl.tensor
    first: tl.tensor
    h: tl.tensor
    queries: tl.tensor
    keys: tl.tensor


@triton.jit
def logits(
    b_q,
    b_k,
    offs_n,
    offs_l,
    x,
    bias,
    stride_bias,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """log2(e) (scale q k^T + bias): (BLOCK_N, BLOCK_L), -inf for keys that are not seen. x:
    Scores."""
    s = dot(b_q, b_k.T, zeros(BLOCK_N, BLOCK_L)) * (x.scale * LOG2_E)
    if HAS_BIAS:
        if x.map_row >= x.first:
            of_bias = head(bias, stride_bias, x.map_row - x.first, x.h, 1)
            s += load_bias(of_bias, offs_n, offs_l, x.queries, x.keys)
    if CAUSAL:
        s = tl.where(offs_l[None, :] <= offs_n[:, None], s, float("-inf"))
    return tl.where(offs_l[None, :] < x.keys, s, float("-inf"))


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None,
    }
)
@triton.jit(
    do_not_specialize=["heads", "first", "rows"],
    do_not_specialize_on_alignment=["source_row", "bias"],
)
def statistics_kernel(
    q,
    k,
    v,
    v_source,
    grad_out,
    source_row,
    bias,
    log_sum,
    delta,
    queries,
    keys,
    heads,
    first,
    rows,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_source,
    stride_grad,
    stride_bias,  # bias: elements, the others: UNIT
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_TERMS: tl.constexpr,
):
    """One block of queries of head h of term t: log_sum, in base 2, and delta = rowsum(P dP).

    log_sum, delta: (terms, heads, queries) float32, contiguous.
    """
    start_n, h, t = place(queries, heads, BLOCK_N)
    map_row, row = rows_of(t, source_row, first, rows, not TWO_TERMS, HAS_SOURCE_ROW)
    x = Scores(scale, map_row, first, h, queries, keys)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_q, of_k = head(q, stride_q, map_row, h, UNIT), head(k, stride_k, map_row, h, UNIT)
    of_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT, TWO_TERMS)
    of_grad = head(grad_out, stride_grad, row, h, UNIT)
    # (BLOCK_N, WIDTH), (BLOCK_N, WIDTH_V)
    b_q = load(of_q, offs_n, offs_d, queries, D, True, WIDTH != D)
    b_grad = load(of_grad, offs_n, offs_v, queries, DV, True, WIDTH_V != DV)

    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tl.minimum(keys, start_n + BLOCK_N) if CAUSAL else keys, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        b_k = load(of_k, offs_l, offs_d, keys, D, True, WIDTH != D)
        b_v = load(of_v, offs_l, offs_v, keys, DV, True, WIDTH_V != DV)
        s = logits(
            b_q, b_k, offs_n, offs_l, x, bias, stride_bias, BLOCK_N, BLOCK_L, HAS_BIAS, CAUSAL
        )
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - finite(m_new)[:, None])
        shrink = tl.exp2(m - finite(m_new))
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * dot(b_grad, b_v.T, zeros(BLOCK_N, BLOCK_L)), 1)
        m = m_new

    at = (t.to(tl.int64) * heads + h) * queries + offs_n
    # a query that attends to nothing: P, delta and all gradients are 0
    total = tl.where(total == 0, 1.0, total)
    tl.store(log_sum + at, finite(m) + tl.log2(total), mask=offs_n < queries)
    tl.store(delta + at, weighted / total, mask=offs_n < queries)


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
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """(P, dS = P (dP - delta)) of one term for one block of queries and keys, both (BLOCK_N,
    BLOCK_L). at: where the statistics of the term's head begin."""
    seen = offs_n < x.queries
    b_log_sum = tl.load(log_sum + at + offs_n, mask=seen, other=float("inf"))  # P = 0 beyond
    b_delta = tl.load(delta + at + offs_n, mask=seen, other=0.0)
    p = tl.exp2(
        logits(b_q, b_k, offs_n, offs_l, x, bias, stride_bias, BLOCK_N, BLOCK_L, HAS_BIAS, CAUSAL)
        - b_log_sum[:, None]
    )
    return p, p * (dot(b_grad, b_v.T, zeros(BLOCK_N, BLOCK_L)) - b_delta[:, None])


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None,
    }
)
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
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_TERMS: tl.constexpr,
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
        map_row, row = rows_of(t, source_row, first, rows, not TWO_TERMS, HAS_SOURCE_ROW)
        if map_row == b:
            of_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT, TWO_TERMS)
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
                    HAS_BIAS,
                    CAUSAL,
                )
                acc = dot(ds.to(b_k.dtype), b_k, acc)

    store(head(grad_q, stride_grad_q, b, h, UNIT), acc * scale, offs_n, offs_d, queries, D)


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None,
    }
)
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
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_TERMS: tl.constexpr,
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
        map_row, row = rows_of(t, source_row, first, rows, not TWO_TERMS, HAS_SOURCE_ROW)
        if map_row == b:
            of_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT, TWO_TERMS)
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
                    HAS_BIAS,
                    CAUSAL,
                )
                acc_v = dot(p.to(b_grad.dtype).T, b_grad, acc_v)
                acc_k = dot(ds.to(b_q.dtype).T, b_q, acc_k)
            to_v = values_of(
                t, grad_v, stride_grad_v, grad_source, stride_grad_source, h, rows, UNIT, TWO_TERMS
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

    It takes the same arguments. grad_lse: (B, H, N), the gradient of each row's lse, or None.
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

    def launch(grad_out, q, k, v, v_source, source_row, bias, grad_lse, scale, is_causal, out):
        grad_q, grad_k, grad_v, grad_source = out
        log_sum, delta = (q.new_empty(terms, H, N, dtype=torch.float32) for _ in range(2))
        tensors = (q, k, v, v_source, grad_out, source_row, bias, log_sum, delta)
        statistics(*tensors)
        if grad_lse is not None:  # dS = P (dP - delta + d lse)
            delta[:B] -= grad_lse
        queries(*tensors, grad_q)
        keys(*tensors, grad_k, grad_v, None if v_source is None else grad_source)

    return launch
