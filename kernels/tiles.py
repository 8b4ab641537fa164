"""What the attention kernels share: loads, products, where a head lies in memory, and which tile a
launch takes.

A tile has powers of two on its sides, so a head dim or a key row is one tile padded with zeros: 40
-> 64, 77 -> 128. To cut it into two widths, 40 = 32 + 8, would save products, but ptxas 12.8 makes
wrong code of that on sm_90 (see toolchain.py), and at head dim 40 the padded tile was the quicker
one on an H200. Where one tile is too much for the registers, the kernels walk over it in pieces of
equal width (STEP).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import toolchain


@triton.jit
def place(queries, heads, BLOCK_N: tl.constexpr):
    """(first query, head, row) of this program. The grid has one dimension, as the other two end at
    65535."""
    blocks = tl.cdiv(queries, BLOCK_N)
    i = tl.program_id(0)
    return i % blocks * BLOCK_N, i // blocks % heads, i // blocks // heads


class Matrix(NamedTuple):
    """A matrix in memory, such as one head of one row: tokens by elements."""

    p: tl.tensor  # address
    step: tl.tuple  # strides, (token, element), in 64 bits


@triton.jit
def head(p, stride, row, h, UNIT: tl.constexpr):
    """The Matrix of one head of one row, in 64 bits before anything is multiplied."""
    p += tl.cast(row, tl.int64) * stride[0] * UNIT + tl.cast(h, tl.int64) * stride[1] * UNIT
    return Matrix(p, (tl.cast(stride[2], tl.int64) * UNIT, stride[3]))


@triton.jit
def address(x, rows, cols):
    return x.p + (rows.to(tl.int64)[:, None] * x.step[0] + cols.to(tl.int64)[None, :] * x.step[1])


@triton.jit
def load(x, rows, cols, limit_row, limit_col, MASK_ROW: tl.constexpr, MASK_COL: tl.constexpr):
    """Tile (rows, cols) of a Matrix, zero outside of the limits; a mask that is not needed costs
    time."""
    p_tile = address(x, rows, cols)
    if MASK_ROW and MASK_COL:
        return tl.load(
            p_tile, mask=(rows[:, None] < limit_row) & (cols[None, :] < limit_col), other=0.0
        )
    elif MASK_ROW:
        return tl.load(p_tile, mask=rows[:, None] < limit_row, other=0.0)
    elif MASK_COL:
        return tl.load(p_tile, mask=cols[None, :] < limit_col, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store(x, tile, rows, cols, limit_row, limit_col):
    """Write a tile into a Matrix, without what lies outside of the limits."""
    mask = (rows[:, None] < limit_row) & (cols[None, :] < limit_col)
    tl.store(address(x, rows, cols), tile.to(x.p.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc; "ieee" because Triton's default for float32 is TF32, which keeps 10 bits of the
    mantissa."""
    return tl.dot(a, b, acc, input_precision="ieee")


class Inputs(NamedTuple):
    """What the maps of all rows are computed from."""

    q: tl.tensor
    k: tl.tensor
    bias: tl.tensor  # or None
    stride_q: tl.tuple
    stride_k: tl.tuple
    stride_bias: tl.tuple
    queries: tl.tensor
    group: tl.tensor  # heads of q to one of k
    first: tl.tensor  # row with a bias
    head_dim: tl.tensor  # D; known at run time only, it keeps `scores` from being unrolled
    scale: tl.tensor  # times log2(e)


class Queries(NamedTuple):
    """One block of queries of a head of a row, as its scores need it."""

    q: Matrix
    b_q: tl.tensor  # (BLOCK_N, STEP), not used if STEP < D
    offs_n: tl.tensor
    bias: Matrix
    biased: tl.tensor  # queries with a bias, all or 0


@triton.jit
def load_queries(
    x, row, h, offs_n, D: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, EVEN_N: tl.constexpr
):
    """The Queries of one block. x: Inputs."""
    of_q = head(x.q, x.stride_q, row, h, UNIT)
    of_bias, biased = of_q, 0  # without a bias they are not used
    if x.bias is not None:
        of_bias = head(x.bias, x.stride_bias, tl.maximum(row - x.first, 0), h, 1)
        biased = tl.where(row >= x.first, x.queries, 0)
    b_q = load(of_q, offs_n, tl.arange(0, STEP), x.queries, D, not EVEN_N, D % STEP != 0)
    return Queries(of_q, b_q, offs_n, of_bias, biased)


@triton.jit
def scores(
    x,
    block,
    k,
    offs_l,
    keys,
    D: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_N: tl.constexpr,
    MASK_L: tl.constexpr,
):
    """q k^T: (BLOCK_N, BLOCK_L), -inf for keys beyond the last. x: Inputs; block: Queries; k: one
    head, as a Matrix. If STEP < D, q and k are read STEP columns at a time."""
    d = tl.arange(0, STEP)
    s = zeros(block.b_q.shape[0], offs_l.shape[0])
    if STEP < D:
        for start in range(0, x.head_dim, STEP):
            uneven: tl.constexpr = D % STEP != 0
            piece_q = load(block.q, block.offs_n, start + d, x.queries, D, not EVEN_N, uneven)
            piece_k = load(k, offs_l, start + d, keys, D, MASK_L, uneven)
            s = dot(piece_q, piece_k.T, s)
    else:
        b_k = load(k, offs_l, d, keys, D, MASK_L, D % STEP != 0)
        s = dot(block.b_q, b_k.T, s)
    if MASK_L:
        s = tl.where(offs_l[None, :] < keys, s, float("-inf"))
    return s


@triton.jit
def finite(x):
    """x, or 0 for the -inf of a query that attends to nothing: -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def load_bias(bias, rows, cols, limit_row, limit_col):
    """A tile of a bias in the units of the scores, which are multiplied with log2(e)."""
    b = load(bias, rows, cols, limit_row, limit_col, True, True)
    return b.to(tl.float32) * 1.4426950408889634


# The launch: plain Python from here on.

LOG2_E = 1.4426950408889634


def width(n: int) -> int:
    """The tile that holds n columns: the next power of two, at least 16, the least that tensor
    cores take."""
    return max(16, triton.next_power_of_2(n))


class Tile(NamedTuple):
    """The sizes of a launch. STEP: columns of a head to a product, at most; num_stages: loads that
    are on their way."""

    BLOCK_N: int  # queries
    BLOCK_L: int  # keys; cross-attention takes all of them
    STEP: int
    num_warps: int
    num_stages: int


ALL = 256  # a STEP: the whole head

# (op, numbers, matrix instructions, up to this width of a head) -> Tile; the first row that fits.
# What is said of registers is the compiler's word (python -m bench.kernel_resources), what is said
# of times was measured on an H200.
TABLE = (
    # wgmma and tcgen05 take 64 rows at a time, and their operands from shared memory, of which
    # there are 227 KiB. "attention, many": enough programs to fill a large card with twice as many
    # queries each. 167 us at N 4096, D 40, against 187 of a head cut into 32 + 8 and 176 with two
    # stages
    ("attention, many", "half", "warpgroup", 128, Tile(128, 64, ALL, 8, 3)),
    ("attention", "half", "warpgroup", 64, Tile(64, 64, ALL, 4, 3)),
    # a third stage leaves one program, not two
    ("attention", "half", "warpgroup", 128, Tile(64, 64, ALL, 4, 2)),
    ("attention", "half", "warpgroup", 256, Tile(64, 64, ALL, 8, 2)),  # with 4 warps it spills
    # a row without an edit at D 160: 126 registers, 254 in one piece
    ("cross_attention", "half", "warpgroup", 256, Tile(64, 0, 64, 4, 3)),
    # two maps and a token map: with three stages D 160 spills on sm_100
    ("cross_attention, edited", "half", "warpgroup", 256, Tile(64, 0, 64, 4, 1)),
    # with 4 warps the addresses of two stored maps spill
    ("cross_attention, save", "half", "warpgroup", 256, Tile(64, 0, 64, 8, 3)),
    # mma.sync works from registers. All of these fit into 99 KiB, what sm_86, sm_89 and sm_120
    # have.
    ("attention", "half", "mma", 64, Tile(64, 64, ALL, 4, 2)),
    # q in one piece spills where N is uneven
    ("attention", "half", "mma", 128, Tile(64, 32, 64, 8, 2)),
    ("attention", "half", "mma", 256, Tile(64, 32, 32, 8, 2)),
    ("cross_attention", "half", "mma", 256, Tile(64, 0, 32, 4, 1)),
    ("cross_attention, edited", "half", "mma", 256, Tile(64, 0, 32, 4, 1)),
    ("cross_attention, save", "half", "mma", 256, Tile(64, 0, 32, 8, 1)),  # with 4 warps it spills
    # More than 128 keys, long prompts: a map of so many takes the registers. No wgmma, which needs
    # 64 rows. All fit into 99 KiB.
    ("cross_attention, wide", "half", "any", 256, Tile(16, 0, 32, 8, 1)),
    # A bias is one more tile of scores in registers, and its addresses: with half the warps joined
    # rows and two maps spill.
    ("attention, bias", "half", "warpgroup", 64, Tile(64, 64, ALL, 8, 1)),
    # with 64 keys, or q in one piece, joined rows spill
    ("attention, bias", "half", "warpgroup", 256, Tile(64, 32, 64, 8, 1)),
    ("attention, bias", "half", "mma", 256, Tile(64, 32, 32, 8, 1)),
    # with STEP 64 it spills
    ("cross_attention, bias", "half", "warpgroup", 256, Tile(64, 0, 32, 8, 1)),
    # with 64 rows it spills on sm_120
    ("cross_attention, bias", "half", "mma", 256, Tile(32, 0, 32, 4, 1)),
    # float32 products are multiply-adds, and a thread needs whole rows and columns of both factors
    # in registers.
    ("attention", "single", "any", 256, Tile(16, 16, 16, 4, 1)),
    ("attention, bias", "single", "any", 256, Tile(16, 16, 16, 4, 1)),
    ("cross_attention", "single", "any", 256, Tile(16, 0, 16, 4, 3)),
    # with three stages a blend at D 160 spills on sm_90
    ("cross_attention, edited", "single", "any", 256, Tile(16, 0, 16, 4, 2)),
    ("cross_attention, save", "single", "any", 256, Tile(16, 0, 16, 4, 3)),
    ("cross_attention, bias", "single", "any", 256, Tile(16, 0, 16, 4, 3)),
    ("cross_attention, wide", "single", "any", 256, Tile(16, 0, 16, 8, 3)),
)


def instructions(arch: int) -> str:
    """The matrix instructions of a compute capability: 90 has wgmma, 100 to 110 tcgen05, all others
    (120!) mma.sync."""
    return "warpgroup" if arch // 10 in (9, 10, 11) else "mma"


def tile(op: str, q, arch: int) -> dict:
    """The tile of a launch by TABLE, as the kernels' arguments."""
    B, H, N, D = q.shape
    many = f"{op}, many" if N % 128 == 0 and B * H * (N // 128) >= 132 else op
    numbers, card = "single" if q.element_size() == 4 else "half", instructions(arch)
    found = next(
        row[-1]
        for row in TABLE
        if row[0] in (op, many)
        and row[1] == numbers
        and row[2] in (card, "any")
        and width(D) <= row[3]
    )
    choice = found._asdict() | {"STEP": min(found.STEP, width(D))}
    return (
        choice
        if op.startswith("attention")
        else {name: x for name, x in choice.items() if name != "BLOCK_L"}
    )


def launch_grid(q, choice: dict) -> tuple[int]:
    """One program for each block of queries of each head of each row; see `place`."""
    B, H, N, _ = q.shape
    return (triton.cdiv(N, choice["BLOCK_N"]) * H * B,)


def unit(*tensors) -> int:
    """8 if every stride but the last is a multiple of 8 and the last is 1, otherwise 1.

    The kernels take strides in this unit and multiply. A head stride of 40 is no multiple of 16, so
    Triton would know nothing of its alignment and load two bytes at a time; 5 * 8 shows that 16
    bytes at a time are in order.
    """
    ok = all(
        x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1])
        for x in tensors
        if x is not None
    )
    return 8 if ok else 1


def strides(x, unit: int) -> tuple[int, ...]:
    """(batch, head, token, element) strides, all but the last in `unit`s; of a missing tensor
    zeros, never used."""
    return (0, 0, 0, 0) if x is None else (*(s // unit for s in x.stride()[:-1]), x.stride(-1))


def table_strides(table) -> tuple[int, int, int]:
    """(row, head, key) strides of a table (S, keys) or (S, heads, keys); of a missing one zeros,
    never used."""
    return (
        (0, 0, 0)
        if table is None
        else (table.stride(0), table.stride(1) if table.ndim == 3 else 0, table.stride(-1))
    )


def bias_strides(bias, H: int, N: int) -> tuple[int, ...]:
    """(row, head, query, key) strides of a bias (S, 1 or heads, 1 or queries, keys), 0 where it has
    one for all."""
    return strides(None if bias is None else bias.expand(bias.shape[0], H, N, bias.shape[3]), 1)


def arch() -> int:
    """Compute capability of the current device, 90 for 9.0; the interpreter has none and takes that
    of sm_90."""
    if triton.knobs.runtime.interpret:
        return 90
    found = triton.runtime.driver.active.get_current_target().arch
    toolchain.choose(found)
    return found
