"""Flash attention forward: out = softmax(q k^T / sqrt(D)) v for any number of queries and keys,
nothing stored between.

One program owns BLOCK_N queries of one head of one row and walks over the keys in blocks, keeping
for each query the largest score m, the sum l of exp(score - m) and the weighted sum acc of values,
and rescaling when m grows. Source: Dao, FlashAttention-2 (2023), algorithm 1, forward only and
non-causal.

`source_row` routes: the program of an edited row reads q and k of another row, and v of its own.
`kv_row` joins: it walks over the keys and values of several rows, one after the other. A row whose
`own_value` is not 0 is its values, copied.
"""

from collections.abc import Callable

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
    p_q,
    b_q,
    offs_n,
    queries,
    step_q,
    p_k,
    p_v,
    offs_l,
    keys,
    step_k,
    step_v,
    scale,
    p_bias,
    step_bias,
    biased,
    before,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_L: tl.constexpr,
):
    """One block of keys: scores, new maximum, rescale, add. biased: queries with a bias, all or 0;
    before: keys of other rows, which come first in the bias."""
    s = scores(
        p_q,
        b_q,
        offs_n,
        queries,
        step_q,
        p_k,
        offs_l,
        keys,
        step_k,
        D,
        D,
        BLOCK_N,
        BLOCK_L,
        STEP,
        MASK_N,
        MASK_L,
    )

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    if HAS_BIAS:
        s = s * scale + load_bias(p_bias, offs_n, before + offs_l, step_bias, biased, before + keys)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - finite(m_new)[:, None])
        shrink = tl.exp2(m - finite(m_new))
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)

    b_v = load(p_v, offs_l, tl.arange(0, WIDTH), step_v, keys, D, MASK_L, D != WIDTH)
    acc = dot(p.to(b_v.dtype), b_v, acc * shrink[:, None])
    return acc, m_new, l


@triton.jit
def walk(
    acc,
    m,
    l,
    p_q,
    b_q,
    offs_n,
    queries,
    step_q,
    p_k,
    p_v,
    keys,
    step_k,
    step_v,
    scale,
    p_bias,
    step_bias,
    biased,
    before,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_L: tl.constexpr,
):
    """All keys of one row."""
    offs_l = tl.arange(0, BLOCK_L)
    whole = keys if EVEN_L else keys // BLOCK_L * BLOCK_L
    for start_l in range(0, whole, BLOCK_L):
        acc, m, l = visit(
            acc,
            m,
            l,
            p_q,
            b_q,
            offs_n,
            queries,
            step_q,
            p_k,
            p_v,
            start_l + offs_l,
            keys,
            step_k,
            step_v,
            scale,
            p_bias,
            step_bias,
            biased,
            before,
            D,
            WIDTH,
            BLOCK_N,
            BLOCK_L,
            STEP,
            HAS_BIAS,
            not EVEN_N,
            False,
        )
    if not EVEN_L:  # the last block is the only one that needs a mask
        acc, m, l = visit(
            acc,
            m,
            l,
            p_q,
            b_q,
            offs_n,
            queries,
            step_q,
            p_k,
            p_v,
            whole + offs_l,
            keys,
            step_k,
            step_v,
            scale,
            p_bias,
            step_bias,
            biased,
            before,
            D,
            WIDTH,
            BLOCK_N,
            BLOCK_L,
            STEP,
            HAS_BIAS,
            not EVEN_N,
            True,
        )
    return acc, m, l


@triton.jit
def joined_row(kv_row, stride, row, j):
    """The j-th row whose keys and values `row` takes."""
    return tl.load(kv_row + row.to(tl.int64) * stride[0] + tl.cast(j, tl.int64) * stride[1]).to(
        tl.int32
    )


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "HAS_KV_ROW": lambda args: args["kv_row"] is not None,
        "HAS_OWN_VALUE": lambda args: args["own_value"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
        "EVEN_L": lambda args: args["keys"] % args["BLOCK_L"] == 0,
    }
)
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
    queries,
    keys,
    heads,
    first,
    joined,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_out,  # (batch, head, token, element), all but the last in units of UNIT
    stride_bias,
    stride_rows,  # of bias and of kv_row, in elements
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KV_ROW: tl.constexpr,
    HAS_OWN_VALUE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_L: tl.constexpr,
):
    """One block of queries of head h of row b; rows from `first` on may take q and k of another
    row, or keys and values of `joined` rows."""
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    p_out, step_out = head(out, stride_out, b, h, UNIT)
    is_own = False
    if HAS_OWN_VALUE:
        if b >= first:
            is_own = tl.load(own_value + b - first) != 0
    if is_own:  # the map is the identity
        p_v, step_v = head(v, stride_v, b, h, UNIT)
        b_v = load(p_v, offs_n, tl.arange(0, WIDTH), step_v, queries, D, not EVEN_N, D != WIDTH)
        store(p_out, b_v, offs_n, tl.arange(0, WIDTH), step_out, queries, D)
    else:
        b_map = b
        if HAS_SOURCE_ROW:
            if b >= first:
                b_map = first + tl.load(source_row + b - first).to(tl.int32)
        p_q, step_q = head(q, stride_q, b_map, h, UNIT)
        p_bias, step_bias, biased = q, (0, 0), 0
        if HAS_BIAS:
            p_bias, step_bias = head(bias, stride_bias, tl.maximum(b_map - first, 0), h, 1)
            biased = tl.where(b_map >= first, queries, 0)
        # (BLOCK_N, STEP), not needed if STEP < D
        b_q = load(p_q, offs_n, tl.arange(0, STEP), step_q, queries, D, not EVEN_N, D % STEP != 0)
        acc = zeros(BLOCK_N, WIDTH)
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_N], tl.float32)

        if HAS_KV_ROW:
            for j in range(tl.where(b >= first, joined, 1)):
                b_k, b_v = b_map, b
                if b >= first:
                    b_k = first + joined_row(kv_row, stride_rows, b_map - first, j)
                    b_v = first + joined_row(kv_row, stride_rows, b - first, j)
                p_k, step_k = head(k, stride_k, b_k, h, UNIT)
                p_v, step_v = head(v, stride_v, b_v, h, UNIT)
                acc, m, l = walk(
                    acc,
                    m,
                    l,
                    p_q,
                    b_q,
                    offs_n,
                    queries,
                    step_q,
                    p_k,
                    p_v,
                    keys,
                    step_k,
                    step_v,
                    scale,
                    p_bias,
                    step_bias,
                    biased,
                    j * keys,
                    D,
                    WIDTH,
                    BLOCK_N,
                    BLOCK_L,
                    STEP,
                    HAS_BIAS,
                    EVEN_N,
                    EVEN_L,
                )
        else:
            p_k, step_k = head(k, stride_k, b_map, h, UNIT)
            p_v, step_v = head(v, stride_v, b, h, UNIT)
            acc, m, l = walk(
                acc,
                m,
                l,
                p_q,
                b_q,
                offs_n,
                queries,
                step_q,
                p_k,
                p_v,
                keys,
                step_k,
                step_v,
                scale,
                p_bias,
                step_bias,
                biased,
                0,
                D,
                WIDTH,
                BLOCK_N,
                BLOCK_L,
                STEP,
                HAS_BIAS,
                EVEN_N,
                EVEN_L,
            )
        if HAS_BIAS:  # a query from which all keys are hidden attends to nothing
            l = tl.where(l == 0, 1.0, l)
        store(p_out, acc / l[:, None], offs_n, tl.arange(0, WIDTH), step_out, queries, D)


# The launch: plain Python from here on.


def prepare(q, k, v, source_row, bias, kv_row, own_value, scale, out) -> Callable:
    """The launch of out = attention(q, k, v, ...), for tensors like these; all checks are done in
    ops.py.

    It takes the same arguments.
    """
    (B, H, N, D), L = q.shape, k.shape[2]
    u = unit(q, k, v, out)
    op = "attention" if bias is None else "attention, bias"
    choice = tile(op, q, arch()) | tuned.tile(op, q)
    S = next((x.shape[0] for x in (source_row, bias, kv_row, own_value) if x is not None), 0)
    numbers = (
        N,
        L,
        H,
        B - S,
        1 if kv_row is None else kv_row.shape[1],
        (D**-0.5 if scale is None else scale) * LOG2_E,
    )
    steps = *(strides(x, u) for x in (q, k, v, out)), bias_strides(bias, H, N)
    rows = (0, 0) if kv_row is None else kv_row.stride()
    attend = Launch(
        attention_kernel,
        launch_grid(q, choice),
        (*numbers, *steps, rows),
        D=D,
        WIDTH=width(D),
        UNIT=u,
        **choice,
    )

    def launch(q, k, v, source_row, bias, kv_row, own_value, scale, out):
        attend(q, k, v, source_row, bias, kv_row, own_value, out)

    return launch
