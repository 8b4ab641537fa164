"""Flash attention forward: out = softmax(q k^T / sqrt(D)) v for any number of queries and keys, nothing stored between.

One program owns BLOCK_N queries of one head of one row and walks over the keys in blocks, keeping for each query the
largest score m, the sum l of exp(score - m) and the weighted sum acc of values, and rescaling when m grows.
Source: Dao, FlashAttention-2 (2023), algorithm 1, forward only and non-causal.

`source_row` routes: the program of an edited row reads q and k of another row, and v of its own. Of rows with the same
map, two may be done by one program, which computes the map once and multiplies it with both rows' values (`shares_maps`
says when): the map is most of the work at small head dims. Which rows these are is read on the device.

A head dim is cut into power-of-two tiles, 40 = 32 + 8 (padded to 16), 80 = 64 + 16, 160 = 128 + 32, where padding to
the next power of two would waste a third of the matrix work. So q, k, v and acc are tuples of tiles, and HEAD says
where each one starts and how wide it is: ((0, 32), (32, 16)).
"""

import triton
import triton.language as tl

from . import tuned


@triton.jit
def columns(CUT: tl.constexpr, i: tl.constexpr):
    """The column numbers of tile i."""
    return CUT[i][0] + tl.arange(0, CUT[i][1])


@triton.jit
def load(p, rows, cols, stride, limit_row, limit_col, MASK_ROW: tl.constexpr, MASK_COL: tl.constexpr):
    """Tile (rows, cols) of the matrix at p, zero outside of the limits; a mask that is not needed costs time."""
    p_tile = p + rows[:, None] * stride[0] + cols[None, :] * stride[1]
    if MASK_ROW and MASK_COL:
        return tl.load(p_tile, mask=(rows[:, None] < limit_row) & (cols[None, :] < limit_col), other=0.0)
    elif MASK_ROW:
        return tl.load(p_tile, mask=rows[:, None] < limit_row, other=0.0)
    elif MASK_COL:
        return tl.load(p_tile, mask=cols[None, :] < limit_col, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def load_cut(p, rows, stride, limit_row, WIDTH: tl.constexpr, CUT: tl.constexpr, MASK_ROW: tl.constexpr):
    """All columns of some rows, as a tuple of tiles."""
    tiles = ()
    for i in tl.static_range(len(CUT)):
        tiles = tiles + (load(p, rows, columns(CUT, i), stride, limit_row, WIDTH, MASK_ROW, beyond(CUT, i, WIDTH)),)
    return tiles


@triton.jit
def store_cut(p, tiles, rows, stride, limit_row, WIDTH: tl.constexpr, CUT: tl.constexpr):
    """Write the tuple of tiles, without what lies outside of the limits."""
    for i in tl.static_range(len(CUT)):
        cols = columns(CUT, i)
        mask = (rows[:, None] < limit_row) & (cols[None, :] < WIDTH)
        tl.store(p + rows[:, None] * stride[0] + cols[None, :] * stride[1], tiles[i].to(p.dtype.element_ty), mask=mask)


@triton.constexpr_function
def beyond(CUT, i, width):
    """Whether tile i reaches over the last column."""
    return CUT[i][0] + CUT[i][1] > width


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def zeros_cut(ROWS: tl.constexpr, CUT: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(CUT)):
        tiles = tiles + (zeros(ROWS, CUT[i][1]),)
    return tiles


@triton.jit
def dot(a, b, acc):
    """a @ b + acc; "ieee" because Triton's default for float32 is TF32, which keeps 10 bits of the mantissa."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def head(p, stride, row, h, UNIT: tl.constexpr):
    """(address, (token stride, element stride)) of one head of one row; 64 bits, as maps pass 2^31 elements."""
    p += row.to(tl.int64) * (stride[0] * UNIT) + h.to(tl.int64) * (stride[1] * UNIT)
    return p, (stride[2] * UNIT, stride[3])


@triton.jit
def scores(p_q, b_q, offs_n, queries, step_q, p_k, offs_l, keys, step_k, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
           D: tl.constexpr, HEAD: tl.constexpr,
           MASK_N: tl.constexpr, MASK_L: tl.constexpr, REREAD: tl.constexpr, head_dim):  # fmt: skip
    """q k^T: (BLOCK_N, BLOCK_L), -inf for keys beyond the last.

    b_q are the tiles of q. float32 products run without tensor cores, where a thread needs whole rows of q in
    registers; REREAD > 0 loads q again, that many columns at a time. head_dim is D: as a number known at run time only,
    it keeps the compiler from unrolling that loop.
    """
    s = zeros(BLOCK_N, BLOCK_L)
    if REREAD > 0:
        for start in range(0, head_dim, REREAD):
            d = start + tl.arange(0, REREAD)
            piece_q = load(p_q, offs_n, d, step_q, queries, D, MASK_N, D % REREAD != 0)
            piece_k = load(p_k, offs_l, d, step_k, keys, D, MASK_L, D % REREAD != 0)
            s = dot(piece_q, piece_k.T, s)
    else:
        for i in tl.static_range(len(HEAD)):
            # (BLOCK_L, width of tile i)
            b_k = load(p_k, offs_l, columns(HEAD, i), step_k, keys, D, MASK_L, beyond(HEAD, i, D))
            s = dot(b_q[i], b_k.T, s)
    if MASK_L:
        s = tl.where(offs_l[None, :] < keys, s, float("-inf"))
    return s


@triton.jit
def visit(acc, m, l, p_q, b_q, offs_n, queries, step_q, p_k, p_v, offs_l, keys, step_k, step_v, scale,
          D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
          MASK_N: tl.constexpr, MASK_L: tl.constexpr, REREAD: tl.constexpr):  # fmt: skip
    """One block of keys: scores, new maximum, rescale, add. acc: the tiles of the first row of values, of the next."""
    s = scores(p_q, b_q, offs_n, queries, step_q, p_k, offs_l, keys, step_k, BLOCK_N, BLOCK_L,
               D, HEAD, MASK_N, MASK_L, REREAD, D)  # fmt: skip

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)

    grown = ()
    for r in tl.static_range(ROWS):
        for i in tl.static_range(len(HEAD)):
            b_v = load(p_v[r], offs_l, columns(HEAD, i), step_v, keys, D, MASK_L, beyond(HEAD, i, D))
            grown = grown + (dot(p.to(b_v.dtype), b_v, acc[r * len(HEAD) + i] * shrink[:, None]),)
    return grown, m_new, l


@triton.jit
def attend(p_q, p_k, p_v, p_out, queries, keys, scale, step_q, step_k, step_v, step_out,
           D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
           REREAD: tl.constexpr, EVEN_N: tl.constexpr, EVEN_L: tl.constexpr):  # fmt: skip
    """One block of queries: out[r] = softmax(q k^T / sqrt(D)) v[r] for the ROWS rows that p_v and p_out point to."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_l = tl.arange(0, BLOCK_L)
    # tuples of (BLOCK_N, width of tile i)
    b_q = load_cut(p_q, offs_n, step_q, queries, D, HEAD, not EVEN_N)
    acc = ()
    for r in tl.static_range(ROWS):
        acc = acc + zeros_cut(BLOCK_N, HEAD)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)

    whole = keys if EVEN_L else keys // BLOCK_L * BLOCK_L
    for start in range(0, whole, BLOCK_L):
        acc, m, l = visit(acc, m, l, p_q, b_q, offs_n, queries, step_q, p_k, p_v, start + offs_l, keys, step_k, step_v,
                          scale, D, HEAD, ROWS, BLOCK_N, BLOCK_L, not EVEN_N, False, REREAD)  # fmt: skip
    if not EVEN_L:  # the last block is the only one that needs a mask
        acc, m, l = visit(acc, m, l, p_q, b_q, offs_n, queries, step_q, p_k, p_v, whole + offs_l, keys, step_k, step_v,
                          scale, D, HEAD, ROWS, BLOCK_N, BLOCK_L, not EVEN_N, True, REREAD)  # fmt: skip

    for r in tl.static_range(ROWS):
        mean = ()
        for i in tl.static_range(len(HEAD)):
            mean = mean + (acc[r * len(HEAD) + i] / l[:, None],)
        store_cut(p_out[r], mean, offs_n, step_out, queries, D, HEAD)


@triton.jit
def first_taker(source_row, row, rows):
    """The first row other than `row` itself that takes the map of `row`; -1 if none does."""
    taker = -1
    for i in range(rows):
        takes = (tl.load(source_row + i).to(tl.int32) == row) & (i != row)
        taker = tl.where(takes & (taker < 0), i, taker)
    return taker


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
        "EVEN_L": lambda args: args["keys"] % args["BLOCK_L"] == 0,
    }
)
@triton.jit(do_not_specialize=["first"])  # a compile for each value would be waste
def attention_kernel(
    q, k, v, source_row, out,
    queries, keys, first, scale,
    stride_q, stride_k, stride_v, stride_out,  # (batch, head, token, element), all but the last in units of UNIT
    D: tl.constexpr, HEAD: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    REREAD: tl.constexpr, PAIRS: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, EVEN_N: tl.constexpr, EVEN_L: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b; rows from `first` on may take q and k of another row.

    With PAIRS, a row that keeps its own map does the first row that takes it as well, and that row's program rests.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    b_map = b
    partner, rests = -1, False
    if HAS_SOURCE_ROW:
        if b >= first:
            row = tl.load(source_row + b - first).to(tl.int32)
            b_map = first + row
            if PAIRS:
                keeps = tl.load(source_row + row).to(tl.int32) == row
                taker = first_taker(source_row, row, tl.num_programs(2) - first)
                rests = keeps & (taker == b - first)
                partner = tl.where(b_map == b, taker, -1)
    p_q, step_q = head(q, stride_q, b_map, h, UNIT)
    p_k, step_k = head(k, stride_k, b_map, h, UNIT)
    p_v, step_v = head(v, stride_v, b, h, UNIT)
    p_out, step_out = head(out, stride_out, b, h, UNIT)

    if not PAIRS:
        attend(p_q, p_k, (p_v,), (p_out,), queries, keys, scale, step_q, step_k, step_v, step_out,
               D, HEAD, 1, BLOCK_N, BLOCK_L, REREAD, EVEN_N, EVEN_L)  # fmt: skip
    elif partner >= 0:
        p_v2, _ = head(v, stride_v, first + partner, h, UNIT)
        p_out2, _ = head(out, stride_out, first + partner, h, UNIT)
        attend(p_q, p_k, (p_v, p_v2), (p_out, p_out2), queries, keys, scale, step_q, step_k, step_v, step_out,
               D, HEAD, 2, BLOCK_N, BLOCK_L, REREAD, EVEN_N, EVEN_L)  # fmt: skip
    elif not rests:
        attend(p_q, p_k, (p_v,), (p_out,), queries, keys, scale, step_q, step_k, step_v, step_out,
               D, HEAD, 1, BLOCK_N, BLOCK_L, REREAD, EVEN_N, EVEN_L)  # fmt: skip


# The launch: plain Python from here on.

LOG2_E = 1.4426950408889634


def cut(n: int, widest: int = 256) -> tuple[tuple[int, int], ...]:
    """(start, width) of the power-of-two tiles, 16 to `widest` wide, that cover n columns with little to spare.

    40 -> 32 + 16, 48 -> 32 + 16, 77 -> 64 + 16, 80 -> 64 + 16, 100 -> 128, 160 -> 128 + 32. At most two tiles unless
    `widest` asks for more: a third would save less than it costs.
    """
    tiles, start = [], 0
    while n - start > widest:
        tiles, start = [*tiles, (start, widest)], start + widest
    rest = n - start
    whole = max(16, triton.next_power_of_2(rest))
    if rest <= 16 or rest > whole * 3 // 4:
        return (*tiles, (start, whole))
    whole //= 2
    return (*tiles, (start, whole), (start + whole, max(16, triton.next_power_of_2(rest - whole))))


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


def arch() -> int:
    """Compute capability of the current device, 90 for 9.0; the interpreter has none and takes that of sm_90."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def config(B: int, H: int, N: int, D: int, itemsize: int, arch: int) -> dict:
    """Tile and warps by rule: what does not spill, by the compiler's word (python -m bench.kernel_resources)."""
    if itemsize == 4:  # no tensor cores: float32 products are multiply-adds, and their operands live in registers
        tile = {"BLOCK_N": 16, "BLOCK_L": 32 if 48 < D <= 160 else 16, "WIDEST": 32 if D <= 160 else 64}
        # In between, pieces of 16 spill 8 bytes, D = 48 with Triton 3.6 and 3.7, D = 64 with 3.6 and 3.9.
        return tile | {"REREAD": 32 if 40 < D <= 64 else 16, "num_warps": 4, "num_stages": 1}
    if arch < 90 and D > 160:
        tile = {"BLOCK_N": 64, "BLOCK_L": 32, "WIDEST": 128, "REREAD": 64, "num_warps": 8}
    elif D > 160 or arch < 90 and D > 80:  # on sm_80 the masks of uneven sizes take the last registers
        tile = {"BLOCK_N": 64, "BLOCK_L": 32, "REREAD": 32 if arch < 90 and N % 64 else 0, "num_warps": 4}
    elif N % 128 == 0 and B * H * (N // 128) >= 132:  # enough programs to fill a large card
        tile = {"BLOCK_N": 128, "BLOCK_L": 64, "REREAD": 0, "num_warps": 8}
        if arch < 90 and D <= 48:
            # So that two programs fit on a multiprocessor; with two stages it would take 136 registers.
            return tile | {"maxnreg": 128, "num_stages": 3}
    else:
        tile = {"BLOCK_N": 64, "BLOCK_L": 64, "REREAD": 0, "num_warps": 4}
    return tile | {"num_stages": 2}


def shares_maps(S: int, D: int, itemsize: int, arch: int) -> bool:
    """Whether one program does two rows with the same map: where its registers leave as many programs on the card."""
    return S > 1 and D <= 48 and itemsize == 2 and arch >= 90


def launch(q, k, v, source_row, out) -> None:
    """out = attention(q, k, v, source_row); all checks are done in ops.py."""
    (B, H, N, D), L = q.shape, k.shape[2]
    u = unit(q, k, v, out)
    choice = config(B, H, N, D, q.element_size(), arch()) | tuned.tile("attention", q)
    widest = choice.pop("WIDEST", 256)
    S = 0 if source_row is None else source_row.shape[0]
    attention_kernel[(triton.cdiv(N, choice["BLOCK_N"]), H, B)](
        q, k, v, source_row, out,
        N, L, B - S, D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v, out)),
        D=D, HEAD=cut(D, widest), UNIT=u, PAIRS=shares_maps(S, D, q.element_size(), arch()), **choice,
    )  # fmt: skip
