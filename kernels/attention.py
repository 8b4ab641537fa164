"""Flash attention forward: out = softmax(q k^T / sqrt(D)) v for any number of queries and keys, nothing stored between.

One program owns BLOCK_N queries of one head of one row and walks over the keys in blocks, keeping for each query the
largest score m, the sum l of exp(score - m) and the weighted sum acc of values, and rescaling when m grows.
Source: Dao, FlashAttention-2 (2023), algorithm 1, forward only and non-causal.

`source_row` routes: the program of an edited row reads q and k of another row, and v of its own.
"""

import triton
import triton.language as tl

from . import tuned
from .tiles import LOG2_E, arch, dot, head, launch_grid, load, place, scores, store, strides, tile, unit, width, zeros


@triton.jit
def visit(acc, m, l, p_q, b_q, offs_n, queries, step_q, p_k, p_v, offs_l, keys, step_k, step_v, scale,
          D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, STEP: tl.constexpr,
          MASK_N: tl.constexpr, MASK_L: tl.constexpr):  # fmt: skip
    """One block of keys: scores, new maximum, rescale, add."""
    s = scores(p_q, b_q, offs_n, queries, step_q, p_k, offs_l, keys, step_k, D,
               D, BLOCK_N, BLOCK_L, STEP, MASK_N, MASK_L)  # fmt: skip

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)

    b_v = load(p_v, offs_l, tl.arange(0, WIDTH), step_v, keys, D, MASK_L, D != WIDTH)
    acc = dot(p.to(b_v.dtype), b_v, acc * shrink[:, None])
    return acc, m_new, l


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
        "EVEN_L": lambda args: args["keys"] % args["BLOCK_L"] == 0,
    }
)
# A compile for each value, or for each step whose row of a table begins elsewhere, would be waste.
@triton.jit(do_not_specialize=["heads", "first"], do_not_specialize_on_alignment=["source_row"])
def attention_kernel(
    q, k, v, source_row, out,
    queries, keys, heads, first, scale,
    stride_q, stride_k, stride_v, stride_out,  # (batch, head, token, element), all but the last in units of UNIT
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    STEP: tl.constexpr, HAS_SOURCE_ROW: tl.constexpr, EVEN_N: tl.constexpr, EVEN_L: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b; rows from `first` on may take q and k of another row."""
    start_n, h, b = place(queries, heads, BLOCK_N)
    b_map = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_map = first + tl.load(source_row + b - first).to(tl.int32)
    p_q, step_q = head(q, stride_q, b_map, h, UNIT)
    p_k, step_k = head(k, stride_k, b_map, h, UNIT)
    p_v, step_v = head(v, stride_v, b, h, UNIT)

    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_l = tl.arange(0, BLOCK_L)
    # (BLOCK_N, STEP), not needed if STEP < D
    b_q = load(p_q, offs_n, tl.arange(0, STEP), step_q, queries, D, not EVEN_N, D % STEP != 0)
    acc = zeros(BLOCK_N, WIDTH)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)

    whole = keys if EVEN_L else keys // BLOCK_L * BLOCK_L
    for start_l in range(0, whole, BLOCK_L):
        acc, m, l = visit(acc, m, l, p_q, b_q, offs_n, queries, step_q, p_k, p_v, start_l + offs_l, keys, step_k,
                          step_v, scale, D, WIDTH, BLOCK_N, BLOCK_L, STEP, not EVEN_N, False)  # fmt: skip
    if not EVEN_L:  # the last block is the only one that needs a mask
        acc, m, l = visit(acc, m, l, p_q, b_q, offs_n, queries, step_q, p_k, p_v, whole + offs_l, keys, step_k,
                          step_v, scale, D, WIDTH, BLOCK_N, BLOCK_L, STEP, not EVEN_N, True)  # fmt: skip

    p_out, step_out = head(out, stride_out, b, h, UNIT)
    store(p_out, acc / l[:, None], offs_n, tl.arange(0, WIDTH), step_out, queries, D)


# The launch: plain Python from here on.


def launch(q, k, v, source_row, out) -> None:
    """out = attention(q, k, v, source_row); all checks are done in ops.py."""
    (B, H, N, D), L = q.shape, k.shape[2]
    u = unit(q, k, v, out)
    choice = tile("attention", q, arch()) | tuned.tile("attention", q)
    S = 0 if source_row is None else source_row.shape[0]
    attention_kernel[launch_grid(q, choice)](
        q, k, v, source_row, out,
        N, L, H, B - S, D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v, out)),
        D=D, WIDTH=width(D), UNIT=u, **choice,
    )  # fmt: skip
