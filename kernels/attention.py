"""Flash attention forward: out = softmax(q k^T / sqrt(D)) v for any number of queries and keys, nothing stored between.

One program owns BLOCK_N queries of one head of one row and walks over the keys in blocks, keeping for each query the
largest score m, the sum l of exp(score - m) and the weighted sum acc of values, and rescaling when m grows.
Source: Dao, FlashAttention-2 (2023), algorithm 1, forward only and non-causal.

`source_row` routes: the program of an edited row reads q and k of another row, and v of its own.

Head dims are split into two power-of-two tiles, 40 = 32 + 8 (padded to 16), 80 = 64 + 16, 160 = 128 + 32, where padding to
the next power of two would waste a third of the matrix work. Tiles carry the suffix 0 or 1; HEAD1 = 0 means no second one.
"""

import triton
import triton.language as tl


@triton.jit
def load(p, rows, cols, stride_row, stride_col, limit_row, limit_col, MASK_ROW: tl.constexpr, MASK_COL: tl.constexpr):
    """Tile (rows, cols) of the matrix at p, zero outside of the limits; a mask that is not needed costs time."""
    p_tile = p + rows[:, None] * stride_row + cols[None, :] * stride_col
    if MASK_ROW and MASK_COL:
        return tl.load(p_tile, mask=(rows[:, None] < limit_row) & (cols[None, :] < limit_col), other=0.0)
    elif MASK_ROW:
        return tl.load(p_tile, mask=rows[:, None] < limit_row, other=0.0)
    elif MASK_COL:
        return tl.load(p_tile, mask=cols[None, :] < limit_col, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store(p, tile, rows, cols, stride_row, stride_col, limit_row, limit_col):
    """Write the part of the tile that lies inside of the limits."""
    p_tile = p + rows[:, None] * stride_row + cols[None, :] * stride_col
    mask = (rows[:, None] < limit_row) & (cols[None, :] < limit_col)
    tl.store(p_tile, tile.to(p.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc; "ieee" because Triton's default for float32 is TF32, which keeps 10 bits of the mantissa."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def head(p, stride, row, h, UNIT: tl.constexpr):
    """Address of one head of one row; 64 bits, because a batch of maps can exceed 2^31 elements."""
    return p + row.to(tl.int64) * (stride[0] * UNIT) + h.to(tl.int64) * (stride[1] * UNIT)


@triton.jit
def visit(acc0, acc1, m, l, q0, q1, p_k, p_v, offs_l, keys, stride_k, stride_v, scale,
          D: tl.constexpr, UNIT: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """One block of keys: scores, new maximum, rescale, add."""
    d0 = tl.arange(0, HEAD0)
    # (BLOCK_L, HEAD0)
    b_k0 = load(p_k, offs_l, d0, stride_k[2] * UNIT, stride_k[3], keys, D, MASK, HEAD0 > D)
    # (BLOCK_N, BLOCK_L)
    s = dot(q0, b_k0.T, tl.zeros([q0.shape[0], b_k0.shape[0]], tl.float32))
    if HEAD1 > 0:
        d1 = HEAD0 + tl.arange(0, HEAD1)
        b_k1 = load(p_k, offs_l, d1, stride_k[2] * UNIT, stride_k[3], keys, D, MASK, HEAD0 + HEAD1 > D)
        s = dot(q1, b_k1.T, s)
    if MASK:
        s = tl.where(offs_l[None, :] < keys, s, float("-inf"))

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)

    b_v0 = load(p_v, offs_l, d0, stride_v[2] * UNIT, stride_v[3], keys, D, MASK, HEAD0 > D)
    p = p.to(b_v0.dtype)
    acc0 = dot(p, b_v0, acc0 * shrink[:, None])
    if HEAD1 > 0:
        b_v1 = load(p_v, offs_l, d1, stride_v[2] * UNIT, stride_v[3], keys, D, MASK, HEAD0 + HEAD1 > D)
        acc1 = dot(p, b_v1, acc1 * shrink[:, None])
    return acc0, acc1, m_new, l


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
        "EVEN_L": lambda args: args["keys"] % args["BLOCK_L"] == 0,
    }
)
@triton.jit
def attention_kernel(
    q, k, v, source_row, out,
    queries, keys, first, scale,
    stride_q, stride_k, stride_v, stride_out,  # (batch, head, token, element), all but the last in units of UNIT
    D: tl.constexpr, UNIT: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, EVEN_N: tl.constexpr, EVEN_L: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b; rows from `first` on may take q and k of another row."""
    h, b = tl.program_id(1), tl.program_id(2)
    b_map = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_map = first + tl.load(source_row + b - first).to(tl.int32)
    p_q, p_k = head(q, stride_q, b_map, h, UNIT), head(k, stride_k, b_map, h, UNIT)
    p_v, p_out = head(v, stride_v, b, h, UNIT), head(out, stride_out, b, h, UNIT)

    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_l = tl.arange(0, BLOCK_L)
    d0 = tl.arange(0, HEAD0)
    # (BLOCK_N, HEAD0) and (BLOCK_N, HEAD1)
    q0 = load(p_q, offs_n, d0, stride_q[2] * UNIT, stride_q[3], queries, D, not EVEN_N, HEAD0 > D)
    acc0 = tl.zeros([BLOCK_N, HEAD0], tl.float32)
    q1, acc1 = q0, acc0  # stand-ins, unused without a second tile
    if HEAD1 > 0:
        d1 = HEAD0 + tl.arange(0, HEAD1)
        q1 = load(p_q, offs_n, d1, stride_q[2] * UNIT, stride_q[3], queries, D, not EVEN_N, HEAD0 + HEAD1 > D)
        acc1 = tl.zeros([BLOCK_N, HEAD1], tl.float32)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)

    whole = keys if EVEN_L else keys // BLOCK_L * BLOCK_L
    for start in range(0, whole, BLOCK_L):
        acc0, acc1, m, l = visit(acc0, acc1, m, l, q0, q1, p_k, p_v, start + offs_l, keys, stride_k, stride_v, scale,
                                 D, UNIT, HEAD0, HEAD1, MASK=False)  # fmt: skip
    if not EVEN_L:  # the last block is the only one that needs a mask
        acc0, acc1, m, l = visit(acc0, acc1, m, l, q0, q1, p_k, p_v, whole + offs_l, keys, stride_k, stride_v, scale,
                                 D, UNIT, HEAD0, HEAD1, MASK=True)  # fmt: skip

    store(p_out, acc0 / l[:, None], offs_n, d0, stride_out[2] * UNIT, stride_out[3], queries, D)
    if HEAD1 > 0:
        store(p_out, acc1 / l[:, None], offs_n, d1, stride_out[2] * UNIT, stride_out[3], queries, D)


# The launch: plain Python from here on.

LOG2_E = 1.4426950408889634


def split(n: int) -> tuple[int, int]:
    """n covered by one or two powers of two from 16 up, as few columns as possible; the second is 0 if one will do.

    40 -> (32, 16), 48 -> (32, 16), 77 -> (64, 16), 80 -> (64, 16), 100 -> (128, 0), 160 -> (128, 32).
    """
    whole = max(16, triton.next_power_of_2(n))
    if n <= 16 or n > whole * 3 // 4:
        return whole, 0
    return whole // 2, max(16, triton.next_power_of_2(n - whole // 2))


def unit(*tensors) -> int:
    """8 if every stride but the last is a multiple of 8 and the last is 1, otherwise 1.

    The kernels take strides in this unit and multiply. A head stride of 40 is no multiple of 16, so Triton would know
    nothing of its alignment and load two bytes at a time; 5 * 8 shows that 16 bytes at a time are in order.
    """
    ok = all(x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) for x in tensors if x is not None)
    return 8 if ok else 1


def strides(x, unit: int) -> tuple[int, ...]:
    """(batch, head, token, element) strides, all but the last in `unit`s; of a missing tensor zeros, never used."""
    return (0, 0, 0, 0) if x is None else (*(s // unit for s in x.stride()[:-1]), x.stride(-1))


def config(B: int, H: int, N: int, L: int, D: int, itemsize: int) -> dict:
    """Tile and warps for a shape, by rule."""
    if itemsize == 4:  # no tensor cores: float32 products are multiply-adds, and their operands live in registers
        return {"BLOCK_N": 32, "BLOCK_L": 32, "num_warps": 4, "num_stages": 1}
    if D > 160:
        return {"BLOCK_N": 64, "BLOCK_L": 32, "num_warps": 4, "num_stages": 2}
    if B * H * triton.cdiv(N, 128) >= 132:
        return {"BLOCK_N": 128, "BLOCK_L": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 64, "BLOCK_L": 64, "num_warps": 4, "num_stages": 2}


def launch(q, k, v, source_row, out) -> None:
    """out = attention(q, k, v, source_row); all checks are done in ops.py."""
    (B, H, N, D), L = q.shape, k.shape[2]
    u = unit(q, k, v, out)
    head0, head1 = split(D)
    choice = config(B, H, N, L, D, q.element_size())
    attention_kernel[(triton.cdiv(N, choice["BLOCK_N"]), H, B)](
        q, k, v, source_row, out,
        N, L, B - (0 if source_row is None else source_row.shape[0]), D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v, out)),
        D=D, UNIT=u, HEAD0=head0, HEAD1=head1, **choice,
    )  # fmt: skip
