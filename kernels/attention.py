"""Flash attention forward: out = softmax(q k^T / sqrt(D)) v for any number of queries and keys,
nothing stored between.

One program owns BLOCK_N queries of one head of one row and walks over the keys in blocks, keeping
for each query the largest score m, the sum l of exp(score - m) and the weighted sum acc of values,
and rescaling when m grows. Source: Dao, FlashAttention-2 (2023), algorithm 1.

`is_causal` leaves out the blocks of keys that come after all queries, and masks those beside the
diagonal. `source_row` routes: the program of an edited row reads q and k of another row, and v of
its own. `kv_row` joins: it walks over the keys and values of several rows, one after the other. A
row whose `own_value` is not 0 is its values, copied.
"""

from collections.abc import Callable

import triton
import triton.language as tl

from . import tuned
from .launch import Launch
from .tiles import (
    LOG2_E,
    Inputs,
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
    tile,
    unit,
    width,
    zeros,
)


@triton.jit
def visit(
    acc,
    m,
    l,
    x,
    block,
    k,
    v,
    offs_l,
    keys,
    before,
    D: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_N: tl.constexpr,
    MASK_L: tl.constexpr,
):
    """One block of keys: scores, new maximum, rescale, add. x: Inputs; block: Queries; before: keys
    of other rows, which come first in the bias."""
    s = scores(x, block, k, offs_l, keys, D, STEP, EVEN_N, MASK_L)
    if CAUSAL and MASK_L:  # blocks without a mask are of keys before the first query
        s = tl.where(offs_l[None, :] <= block.offs_n[:, None], s, float("-inf"))

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    if x.bias is not None:
        cols, limit = before + offs_l, before + keys
        s = s * x.scale + load_bias(block.bias, block.offs_n, cols, block.biased, limit)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - finite(m_new)[:, None])
        shrink = tl.exp2(m - finite(m_new))
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * x.scale)
        p = tl.exp2(s * x.scale - m_new[:, None])
        shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)

    WIDTH: tl.constexpr = acc.shape[1]
    b_v = load(v, offs_l, tl.arange(0, WIDTH), keys, D, MASK_L, D != WIDTH)
    acc = dot(p.to(b_v.dtype), b_v, acc * shrink[:, None])
    return acc, m_new, l


@triton.jit
def walk(
    acc,
    m,
    l,
    x,
    block,
    start_n,
    k,
    v,
    keys,
    before,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_L: tl.constexpr,
):
    """All keys of one row: blocks that need no mask, then the rest."""
    offs_l = tl.arange(0, BLOCK_L)
    whole = keys if EVEN_L else keys // BLOCK_L * BLOCK_L
    if CAUSAL:
        whole = tl.minimum(keys, start_n) // BLOCK_L * BLOCK_L
    for start in range(0, whole, BLOCK_L):
        now = (acc, m, l, x, block, k, v, start + offs_l, keys, before)
        acc, m, l = visit(*now, D, STEP, CAUSAL, EVEN_N, False)
    if CAUSAL:
        for start in range(whole, tl.minimum(keys, start_n + block.b_q.shape[0]), BLOCK_L):
            now = (acc, m, l, x, block, k, v, start + offs_l, keys, before)
            acc, m, l = visit(*now, D, STEP, CAUSAL, EVEN_N, True)
    elif not EVEN_L:
        now = (acc, m, l, x, block, k, v, whole + offs_l, keys, before)
        acc, m, l = visit(*now, D, STEP, CAUSAL, EVEN_N, True)
    return acc, m, l


@triton.jit
def joined_row(kv_row, stride, row, j):
    """The j-th row whose keys and values `row` takes."""
    p_row = kv_row + row.to(tl.int64) * stride[0] + tl.cast(j, tl.int64) * stride[1]
    return tl.load(p_row).to(tl.int32)


# A compile for each value, or for each step whose row of a table begins elsewhere, would be waste.
@triton.jit(
    do_not_specialize=["heads", "first", "joined"],
    do_not_specialize_on_alignment=["source_row", "bias", "kv_row", "own_value"],
)
def attention_kernel(
    q,
    k,
    v,
    source_row,
    bias,
    kv_row,
    own_value,
    out,
    lse,
    queries,
    keys,
    heads,
    group,  # heads of q to one of k and v
    first,
    joined,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_out,  # (batch, head, token, element), all but the last in units of UNIT
    stride_bias,
    stride_rows,  # of bias and of kv_row, in elements
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
):
    """One block of queries of head h of row b; rows from `first` on may take q and k of another
    row, or keys and values of `joined` rows. lse: (batch, heads, queries) float32, contiguous."""
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n, offs_d = start_n + tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    h_kv = h // group
    to_out = head(out, stride_out, b, h, UNIT)
    is_own = False
    if own_value is not None:
        if b >= first:
            is_own = tl.load(own_value + b - first) != 0
    if is_own:  # the map is the identity
        own_v = head(v, stride_v, b, h_kv, UNIT)
        b_v = load(own_v, offs_n, offs_d, queries, D, not EVEN_N, D != WIDTH)
        store(to_out, b_v, offs_n, offs_d, queries, D)
    else:
        b_map = b
        if source_row is not None:
            if b >= first:
                b_map = first + tl.load(source_row + b - first).to(tl.int32)
        strides = (stride_q, stride_k, stride_bias)
        x = Inputs(q, k, bias, *strides, queries, group, first, D, scale)
        block = load_queries(x, b_map, h, offs_n, D, STEP, UNIT, EVEN_N)
        acc = zeros(BLOCK_N, WIDTH)
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_N], tl.float32)

        if kv_row is not None:
            for j in range(tl.where(b >= first, joined, 1)):
                b_k, b_v = b_map, b
                if b >= first:
                    b_k = first + joined_row(kv_row, stride_rows, b_map - first, j)
                    b_v = first + joined_row(kv_row, stride_rows, b - first, j)
                of_k, of_v = head(k, stride_k, b_k, h_kv, UNIT), head(v, stride_v, b_v, h_kv, UNIT)
                now, before = (acc, m, l, x, block, start_n, of_k, of_v, keys), j * keys
                acc, m, l = walk(*now, before, D, STEP, BLOCK_L, CAUSAL, EVEN_N, EVEN_L)
        else:
            of_k, of_v = head(k, stride_k, b_map, h_kv, UNIT), head(v, stride_v, b, h_kv, UNIT)
            now = (acc, m, l, x, block, start_n, of_k, of_v, keys)
            acc, m, l = walk(*now, 0, D, STEP, BLOCK_L, CAUSAL, EVEN_N, EVEN_L)
        if bias is not None:  # a query from which all keys are hidden attends to nothing
            l = tl.where(l == 0, 1.0, l)
        store(to_out, acc / l[:, None], offs_n, offs_d, queries, D)
        if lse is not None:
            at = (b.to(tl.int64) * heads + h) * queries + offs_n
            tl.store(lse + at, (m + tl.log2(l)) * 0.6931471805599453, mask=offs_n < queries)


# The launch: plain Python from here on.


def prepare(q, k, v, source_row, bias, kv_row, own_value, scale, is_causal, out) -> Callable:
    """The launch of out = attention(q, k, v, ...), for tensors like these; all checks are done in
    checks.py.

    It takes the same tensors. out: the output, or (output, lse).
    """
    (B, H, N, D), L = q.shape, k.shape[2]
    first_out = out[0] if isinstance(out, tuple) else out
    u = unit(q, k, v, first_out)
    op = "attention" if bias is None else "attention, bias"
    choice = tile(op, q, arch()) | tuned.tile(op, q)
    S = next((x.shape[0] for x in (source_row, bias, kv_row, own_value) if x is not None), 0)
    joined = 1 if kv_row is None else kv_row.shape[1]
    scale = (D**-0.5 if scale is None else scale) * LOG2_E
    steps = *(strides(x, u) for x in (q, k, v, first_out)), bias_strides(bias, H, N)
    rows = (0, 0) if kv_row is None else kv_row.stride()
    numbers = (N, L, H, H // k.shape[1], B - S, joined, scale, *steps)
    even = {"EVEN_N": N % choice["BLOCK_N"] == 0, "EVEN_L": L % choice["BLOCK_L"] == 0}
    constants = {"CAUSAL": is_causal, "D": D, "WIDTH": width(D), "UNIT": u} | even | choice
    attend = Launch(attention_kernel, launch_grid(q, choice), (*numbers, rows), **constants)

    def launch(*tensors):
        *inputs, out = tensors
        attend(*inputs, *(out if isinstance(out, tuple) else (out, None)))

    return launch
