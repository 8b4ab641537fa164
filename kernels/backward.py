"""Gradients of attention, recomputed: no map is stored, and memory grows with the tokens, not with their square.

A *term* is one product of a map with values: out[b] = P[m] V. A row has its own term; a row whose
edit blends has a second one, with the map of its source row and other values (V_source of
ops.fold), and a row routed by `source_row` alone has one with the map of another row. For a term,

    dP = dO V^T;   delta = rowsum(P dP);   dS = P (dP - delta);   dV = P^T dO

and the gradients of the map's row m are sums over all terms that use it, dQ = scale dS K and
dK = scale dS^T Q. One program owns a block of queries or of keys of one map and gathers over
those terms in order: no atomics, the same bits every time.

Three kernels: `statistics_kernel` computes the logarithm of each softmax's denominator, and
delta, of every term; `query_kernel` computes dQ; `key_kernel` computes dK, and dV of every term.
Source: Dao, FlashAttention-2 (2023), algorithm 2.
"""

import torch
import triton
import triton.language as tl

from .attention import dot, head, load, strides


@triton.jit
def term(t, source_row, first, rows, ROUTED: tl.constexpr, HAS_SOURCE_ROW: tl.constexpr):
    """(row of the map, row of the output) of term t: the rows' own terms, then the second ones."""
    row = tl.cast(t, tl.int32)
    row = tl.where(row < rows, row, first + row - rows)
    map_row = row
    if HAS_SOURCE_ROW:
        if (t >= rows) | (ROUTED & (row >= first)):
            map_row = first + tl.load(source_row + row - first).to(tl.int32)
    return map_row, row


@triton.jit
def values_of(t, v, stride_v, v_source, stride_source, h, rows, TWO_TERMS: tl.constexpr):
    """(address, steps) of the values of term t."""
    p_v, step_v = head(v, stride_v, tl.minimum(t, rows - 1), h, 1)
    if TWO_TERMS:
        if t >= rows:
            p_v, step_v = head(v_source, stride_source, t - rows, h, 1)
    return p_v, step_v


@triton.jit
def logits(b_q, b_k, offs_n, offs_l, queries, keys, scale, bias, stride_bias, map_row, first, h,
           HAS_BIAS: tl.constexpr):  # fmt: skip
    """log2(e) (scale q k^T + bias): (BLOCK_N, BLOCK_L), -inf beyond the last key."""
    s = dot(b_q, b_k.T, tl.zeros([b_q.shape[0], b_k.shape[0]], tl.float32)) * (scale * 1.4426950408889634)
    if HAS_BIAS:
        if map_row >= first:
            p_bias, step = head(bias, stride_bias, map_row - first, h, 1)
            s += load(p_bias, offs_n, offs_l, step, queries, keys, True, True).to(tl.float32) * 1.4426950408889634
    return tl.where(offs_l[None, :] < keys, s, float("-inf"))


@triton.jit
def finite(x):
    """x, or 0 where a query attends to nothing and x is -inf: -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None,
    }
)
@triton.jit(do_not_specialize=["first", "rows"])
def statistics_kernel(
    q, k, v, v_source, grad_out, source_row, bias, log_sum, delta,
    queries, keys, first, rows, scale,
    stride_q, stride_k, stride_v, stride_source, stride_grad, stride_bias,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, TWO_TERMS: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of term t: log_sum, in base 2, and delta = rowsum(P dP).

    log_sum, delta: (terms, heads, queries) float32, contiguous.
    """
    h, t = tl.program_id(1), tl.program_id(2)
    map_row, row = term(t, source_row, first, rows, not TWO_TERMS, HAS_SOURCE_ROW)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q, step_q = head(q, stride_q, map_row, h, 1)
    p_k, step_k = head(k, stride_k, map_row, h, 1)
    p_v, step_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, TWO_TERMS)
    p_grad, step_grad = head(grad_out, stride_grad, row, h, 1)
    # (BLOCK_N, BLOCK_D), (BLOCK_N, BLOCK_DV)
    b_q = load(p_q, offs_n, offs_d, step_q, queries, D, True, True)
    b_grad = load(p_grad, offs_n, offs_v, step_grad, queries, DV, True, True)

    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, keys, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        b_k = load(p_k, offs_l, offs_d, step_k, keys, D, True, True)
        b_v = load(p_v, offs_l, offs_v, step_v, keys, DV, True, True)
        s = logits(b_q, b_k, offs_n, offs_l, queries, keys, scale, bias, stride_bias, map_row, first, h,
                   HAS_BIAS)  # fmt: skip
        dp = dot(b_grad, b_v.T, tl.zeros([BLOCK_N, BLOCK_L], tl.float32))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - finite(m_new)[:, None])
        shrink = tl.exp2(m - finite(m_new))
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * dp, 1)
        m = m_new

    p_out = (t.to(tl.int64) * tl.num_programs(1) + h) * queries + offs_n
    empty = total == 0
    tl.store(log_sum + p_out, tl.where(empty, 0.0, m + tl.log2(tl.where(empty, 1.0, total))), mask=offs_n < queries)
    tl.store(delta + p_out, tl.where(empty, 0.0, weighted / tl.where(empty, 1.0, total)), mask=offs_n < queries)


@triton.jit
def one_term(b_q, b_k, b_v, b_grad, log_sum, delta, p_n, offs_n, offs_l, queries, keys, scale,
             bias, stride_bias, map_row, first, h, HAS_BIAS: tl.constexpr):  # fmt: skip
    """(P, dS = P (dP - delta)) of one block of queries and keys, both (BLOCK_N, BLOCK_L)."""
    b_log_sum = tl.load(log_sum + p_n + offs_n, mask=offs_n < queries, other=0.0)
    b_delta = tl.load(delta + p_n + offs_n, mask=offs_n < queries, other=0.0)
    s = logits(b_q, b_k, offs_n, offs_l, queries, keys, scale, bias, stride_bias, map_row, first, h, HAS_BIAS)
    p = tl.where(offs_n[:, None] < queries, tl.exp2(s - b_log_sum[:, None]), 0.0)
    dp = dot(b_grad, b_v.T, tl.zeros([b_q.shape[0], b_k.shape[0]], tl.float32))
    return p, p * (dp - b_delta[:, None])


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None,
    }
)
@triton.jit(do_not_specialize=["first", "rows", "terms"])
def query_kernel(
    q, k, v, v_source, grad_out, source_row, bias, log_sum, delta, grad_q,
    queries, keys, first, rows, terms, scale,
    stride_q, stride_k, stride_v, stride_source, stride_grad, stride_bias, stride_grad_q,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, TWO_TERMS: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K of one block of queries of head h of row b, dS summed over the terms that use its map."""
    h, b = tl.program_id(1), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q, step_q = head(q, stride_q, b, h, 1)
    p_k, step_k = head(k, stride_k, b, h, 1)
    b_q = load(p_q, offs_n, offs_d, step_q, queries, D, True, True)

    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for t in range(terms):
        map_row, row = term(t, source_row, first, rows, not TWO_TERMS, HAS_SOURCE_ROW)
        if map_row == b:
            p_v, step_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, TWO_TERMS)
            p_grad, step_grad = head(grad_out, stride_grad, row, h, 1)
            b_grad = load(p_grad, offs_n, offs_v, step_grad, queries, DV, True, True)
            p_n = (tl.cast(t, tl.int64) * tl.num_programs(1) + h) * queries
            for start in range(0, keys, BLOCK_L):
                offs_l = start + tl.arange(0, BLOCK_L)
                b_k = load(p_k, offs_l, offs_d, step_k, keys, D, True, True)
                b_v = load(p_v, offs_l, offs_v, step_v, keys, DV, True, True)
                _, ds = one_term(b_q, b_k, b_v, b_grad, log_sum, delta, p_n, offs_n, offs_l, queries, keys, scale,
                                 bias, stride_bias, b, first, h, HAS_BIAS)  # fmt: skip
                acc = dot(ds.to(b_k.dtype), b_k, acc)

    p_out, step_out = head(grad_q, stride_grad_q, b, h, 1)
    mask = (offs_n[:, None] < queries) & (offs_d[None, :] < D)
    p_tile = p_out + offs_n[:, None] * step_out[0] + offs_d[None, :] * step_out[1]
    tl.store(p_tile, (acc * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None,
    }
)
@triton.jit(do_not_specialize=["first", "rows", "terms"])
def key_kernel(
    q, k, v, v_source, grad_out, source_row, bias, log_sum, delta, grad_k, grad_v, grad_source,
    queries, keys, first, rows, terms, scale,
    stride_q, stride_k, stride_v, stride_source, stride_grad, stride_bias,
    stride_grad_k, stride_grad_v, stride_grad_source,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, TWO_TERMS: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q of one block of keys of head h of row b, and dV = P^T dO of every term that uses its map."""
    h, b = tl.program_id(1), tl.program_id(2)
    offs_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q, step_q = head(q, stride_q, b, h, 1)
    p_k, step_k = head(k, stride_k, b, h, 1)
    b_k = load(p_k, offs_l, offs_d, step_k, keys, D, True, True)
    m_v = (offs_l[:, None] < keys) & (offs_v[None, :] < DV)

    acc_k = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for t in range(terms):
        map_row, row = term(t, source_row, first, rows, not TWO_TERMS, HAS_SOURCE_ROW)
        if map_row == b:
            p_v, step_v = values_of(t, v, stride_v, v_source, stride_source, h, rows, TWO_TERMS)
            p_grad, step_grad = head(grad_out, stride_grad, row, h, 1)
            b_v = load(p_v, offs_l, offs_v, step_v, keys, DV, True, True)
            p_n = (tl.cast(t, tl.int64) * tl.num_programs(1) + h) * queries
            acc_v = tl.zeros([BLOCK_L, BLOCK_DV], tl.float32)
            for start in range(0, queries, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                b_q = load(p_q, offs_n, offs_d, step_q, queries, D, True, True)
                b_grad = load(p_grad, offs_n, offs_v, step_grad, queries, DV, True, True)
                p, ds = one_term(b_q, b_k, b_v, b_grad, log_sum, delta, p_n, offs_n, offs_l, queries, keys, scale,
                                 bias, stride_bias, b, first, h, HAS_BIAS)  # fmt: skip
                acc_v = dot(p.to(b_grad.dtype).T, b_grad, acc_v)
                acc_k = dot(ds.to(b_q.dtype).T, b_q, acc_k)
            p_out, step_out = values_of(t, grad_v, stride_grad_v, grad_source, stride_grad_source, h, rows, TWO_TERMS)
            p_tile = p_out + offs_l[:, None] * step_out[0] + offs_v[None, :] * step_out[1]
            tl.store(p_tile, acc_v.to(grad_v.dtype.element_ty), mask=m_v)

    p_out, step_out = head(grad_k, stride_grad_k, b, h, 1)
    p_tile = p_out + offs_l[:, None] * step_out[0] + offs_d[None, :] * step_out[1]
    mask = (offs_l[:, None] < keys) & (offs_d[None, :] < D)
    tl.store(p_tile, (acc_k * scale).to(grad_k.dtype.element_ty), mask=mask)


# The launches: plain Python from here on.


def config(D: int, DV: int, itemsize: int) -> dict:
    """Tile and warps by rule: what does not spill, by the compiler's word."""
    wide = max(D, DV)
    if itemsize == 4:  # no tensor cores: operands of float32 products live in registers
        return {"BLOCK_N": 16, "BLOCK_L": 16, "num_warps": 4, "num_stages": 1}
    if wide <= 64:
        return {"BLOCK_N": 64, "BLOCK_L": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 32, "BLOCK_L": 64, "num_warps": 8, "num_stages": 1}


def launch(grad_out, q, k, v, v_source, source_row, bias, scale, out) -> None:
    """Fill out = (grad_q, grad_k, grad_v, grad_source) with the gradients; all checks are done in ops.py."""
    grad_q, grad_k, grad_v, grad_source = out
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if v_source is None:
        grad_source = None
    (B, H, N, D), (L, DV) = q.shape, v.shape[2:]
    S = next((x.shape[0] for x in (source_row, bias, v_source) if x is not None), 0)
    terms = B + (0 if v_source is None else S)
    bias = None if bias is None else bias.expand(S, H, N, L)
    log_sum, delta = (q.new_empty(terms, H, N, dtype=torch.float32) for _ in range(2))
    choice = config(D, DV, q.element_size())
    block_n, block_l = choice["BLOCK_N"], choice["BLOCK_L"]
    choice |= {"BLOCK_D": max(16, triton.next_power_of_2(D)), "BLOCK_DV": max(16, triton.next_power_of_2(DV))}
    inputs = q, k, v, v_source, grad_out, source_row, bias, log_sum, delta
    steps = [strides(x, 1) for x in (q, k, v, v_source, grad_out, bias)]
    statistics_kernel[(triton.cdiv(N, block_n), H, terms)](
        *inputs, N, L, B - S, B, scale, *steps, D=D, DV=DV, **choice
    )
    query_kernel[(triton.cdiv(N, block_n), H, B)](
        *inputs, grad_q, N, L, B - S, B, terms, scale, *steps, strides(grad_q, 1), D=D, DV=DV, **choice
    )
    outputs = grad_k, grad_v, grad_source
    key_kernel[(triton.cdiv(L, block_l), H, B)](
        *inputs, *outputs, N, L, B - S, B, terms, scale, *steps, *(strides(x, 1) for x in outputs), D=D, DV=DV, **choice
    )
