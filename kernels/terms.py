"""The terms of a backward pass: which map and which values each has, and the statistics of its map.

See backward.py for what a term is. `statistics_kernel` finds, of every query of every term, the
logarithm of the softmax's denominator and delta = rowsum(P dP), from which the passes recompute P
and dS = P (dP - delta) block by block.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import Matrix, dot, finite, head, load, load_bias, place, zeros

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(t, source_row, first, rows, ROUTED: tl.constexpr):
    """(row of the map, row of the output) of term t: the rows' own terms first, then the second
    ones."""
    t = tl.cast(t, tl.int32)
    row = tl.where(t < rows, t, first + t - rows)
    map_row = row
    if source_row is not None:
        if (t >= rows) | (ROUTED & (row >= first)):
            map_row = first + tl.load(source_row + row - first).to(tl.int32)
    return map_row, row


@triton.jit
def values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT: tl.constexpr):
    """The Matrix of the values of term t, or of their gradients."""
    p, step = head(v, stride_v, tl.minimum(t, rows - 1), h, UNIT)
    if v_source is not None:
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
    CAUSAL: tl.constexpr,
):
    """log2(e) (scale q k^T + bias): (BLOCK_N, BLOCK_L), -inf for keys that are not seen. x:
    Scores."""
    s = dot(b_q, b_k.T, zeros(BLOCK_N, BLOCK_L)) * (x.scale * LOG2_E)
    if bias is not None:
        if x.map_row >= x.first:
            of_bias = head(bias, stride_bias, x.map_row - x.first, x.h, 1)
            s += load_bias(of_bias, offs_n, offs_l, x.queries, x.keys)
    if CAUSAL:
        s = tl.where(offs_l[None, :] <= offs_n[:, None], s, float("-inf"))
    return tl.where(offs_l[None, :] < x.keys, s, float("-inf"))


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
):
    """One block of queries of head h of term t: log_sum, in base 2, and delta = rowsum(P dP).

    log_sum, delta: (terms, heads, queries) float32, contiguous.
    """
    start_n, h, t = place(queries, heads, BLOCK_N)
    map_row, row = rows_of(t, source_row, first, rows, v_source is None)
    x = Scores(scale, map_row, first, h, queries, keys)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_q, of_k = head(q, stride_q, map_row, h, UNIT), head(k, stride_k, map_row, h, UNIT)
    of_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, UNIT)
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
        s = logits(b_q, b_k, offs_n, offs_l, x, bias, stride_bias, BLOCK_N, BLOCK_L, CAUSAL)
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
