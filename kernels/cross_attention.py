"""Attention over at most 128 keys with the map edited in flight: the whole key row is one tile, so one pass, no rescaling.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

Two kernels. `cross_attention_kernel` never forms P': the edit is linear in both maps, so ops.fold moved it into the values
and what is left is out = P_own V_own + P_source V_source. `cross_attention_save_kernel` forms P', because it is asked to
write it (`save`) or the mean over heads (`save_mean`). P_source is recomputed from q and k of another row, or read.
Source: Hertz et al. 2022 (prompt-to-prompt) for the edits.

A key row is split like a head dim, 77 = 64 + 13 (padded to 16), and so a map is a pair of tiles (p0, p1). KEYS1 = 0 or
HEAD1 = 0: no second tile, the second of the pair is a stand-in that is never used.
"""

import triton
import triton.language as tl

from .attention import LOG2_E, dot, head, load, split, store, strides, unit


@triton.jit
def scores(q, p_k, offs_l, d, stride_k, L: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
           MASK_L: tl.constexpr, MASK_D: tl.constexpr, acc):  # fmt: skip
    """acc + q k^T for the columns d of the head dim: (BLOCK_N, keys of the tile)."""
    b_k = load(p_k, offs_l, d, stride_k[2] * UNIT, stride_k[3], L, D, MASK_L, MASK_D)
    return dot(q, b_k.T, acc)


@triton.jit
def softmax_map(p_q, p_k, offs_n, queries, stride_q, stride_k, scale,
                L: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr,
                D: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr,
                UNIT: tl.constexpr, MASK_N: tl.constexpr):  # fmt: skip
    """P = softmax(q k^T / sqrt(D)) of one block of queries, as (BLOCK_N, KEYS0) and (BLOCK_N, KEYS1), zero beyond L."""
    d0, d1 = tl.arange(0, HEAD0), HEAD0 + tl.arange(0, HEAD1 if HEAD1 > 0 else 16)
    l0, l1 = tl.arange(0, KEYS0), KEYS0 + tl.arange(0, KEYS1 if KEYS1 > 0 else 16)
    q0 = load(p_q, offs_n, d0, stride_q[2] * UNIT, stride_q[3], queries, D, MASK_N, HEAD0 > D)
    s0 = tl.zeros([offs_n.shape[0], KEYS0], tl.float32)
    s0 = scores(q0, p_k, l0, d0, stride_k, L, D, UNIT, KEYS0 > L, HEAD0 > D, s0)
    if HEAD1 > 0:
        q1 = load(p_q, offs_n, d1, stride_q[2] * UNIT, stride_q[3], queries, D, MASK_N, HEAD0 + HEAD1 > D)
        s0 = scores(q1, p_k, l0, d1, stride_k, L, D, UNIT, KEYS0 > L, HEAD0 + HEAD1 > D, s0)
    if KEYS0 > L:
        s0 = tl.where(l0[None, :] < L, s0, float("-inf"))
    m = tl.max(s0, 1)
    s1 = s0
    if KEYS1 > 0:
        s1 = tl.zeros([offs_n.shape[0], KEYS1], tl.float32)
        s1 = scores(q0, p_k, l1, d0, stride_k, L, D, UNIT, KEYS0 + KEYS1 > L, HEAD0 > D, s1)
        if HEAD1 > 0:
            s1 = scores(q1, p_k, l1, d1, stride_k, L, D, UNIT, KEYS0 + KEYS1 > L, HEAD0 + HEAD1 > D, s1)
        if KEYS0 + KEYS1 > L:
            s1 = tl.where(l1[None, :] < L, s1, float("-inf"))
        m = tl.maximum(m, tl.max(s1, 1))

    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    m = m * scale
    p0 = tl.exp2(s0 * scale - m[:, None])
    total = tl.sum(p0, 1)
    p1 = p0
    if KEYS1 > 0:
        p1 = tl.exp2(s1 * scale - m[:, None])
        total += tl.sum(p1, 1)
    inverse = 1 / total
    return p0 * inverse[:, None], p1 * inverse[:, None]


@triton.jit
def load_map(p, offs_n, queries, stride, L: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr, MASK_N: tl.constexpr):
    """A stored map of one block of queries, float32, as the pair of tiles."""
    p0 = load(p, offs_n, tl.arange(0, KEYS0), stride[2], stride[3], queries, L, MASK_N, KEYS0 > L).to(tl.float32)
    p1 = p0
    if KEYS1 > 0:
        l1 = KEYS0 + tl.arange(0, KEYS1)
        p1 = load(p, offs_n, l1, stride[2], stride[3], queries, L, MASK_N, KEYS0 + KEYS1 > L).to(tl.float32)
    return p0, p1


@triton.jit
def weigh(p0, p1, p_v, stride_row, stride_col, acc, cols, L: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr,
          LIMIT: tl.constexpr, MASK_COL: tl.constexpr):  # fmt: skip
    """acc + P M for some columns of a matrix M with L rows: values (columns of the head dim) or a token map."""
    b_v = load(p_v, tl.arange(0, KEYS0), cols, stride_row, stride_col, L, LIMIT, KEYS0 > L, MASK_COL)
    acc = dot(p0.to(b_v.dtype), b_v, acc)
    if KEYS1 > 0:
        l1 = KEYS0 + tl.arange(0, KEYS1)
        b_v = load(p_v, l1, cols, stride_row, stride_col, L, LIMIT, KEYS0 + KEYS1 > L, MASK_COL)
        acc = dot(p1.to(b_v.dtype), b_v, acc)
    return acc


@triton.jit
def weigh_values(p0, p1, p_v, stride_v, acc0, acc1, L: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr,
                 D: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """(acc0, acc1) + P V: (BLOCK_N, HEAD0) and (BLOCK_N, HEAD1)."""
    step = stride_v[2] * UNIT
    acc0 = weigh(p0, p1, p_v, step, stride_v[3], acc0, tl.arange(0, HEAD0), L, KEYS0, KEYS1, D, HEAD0 > D)
    if HEAD1 > 0:
        d1 = HEAD0 + tl.arange(0, HEAD1)
        acc1 = weigh(p0, p1, p_v, step, stride_v[3], acc1, d1, L, KEYS0, KEYS1, D, HEAD0 + HEAD1 > D)
    return acc0, acc1


@triton.jit
def blended(own, source, blend, cols, L: tl.constexpr):
    """blend * source + (1 - blend) * own, column by column."""
    b = tl.load(blend + cols, mask=cols < L, other=0.0)[None, :]
    return b * source + (1 - b) * own


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None and args["KEEP_OWN"],
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
@triton.jit
def cross_attention_kernel(
    q, k, v, v_source, source_row, inject, out,
    queries, first, scale,
    stride_q, stride_k, stride_v, stride_source, stride_inject, stride_out,  # inject: elements, the others: UNIT
    KEEP_OWN: tl.constexpr,
    L: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr,
    D: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_INJECT: tl.constexpr, TWO_TERMS: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of head h of row b: out = P V, and rows from `first` on may differ in one of three ways.

    source_row alone: out = P_source V.  With v_source: out = P_own V + P_source V_source.  inject without KEEP_OWN:
    out = inject V_source.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_v = head(v, stride_v, b, h, UNIT)
    acc0 = tl.zeros([BLOCK_N, HEAD0], tl.float32)
    acc1 = tl.zeros([BLOCK_N, HEAD1 if HEAD1 > 0 else 16], tl.float32)

    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + b - first).to(tl.int32)
    b_map = b if TWO_TERMS else b_source
    p_q, p_k = head(q, stride_q, b_map, h, UNIT), head(k, stride_k, b_map, h, UNIT)
    if KEEP_OWN:
        p0, p1 = softmax_map(p_q, p_k, offs_n, queries, stride_q, stride_k, scale,
                             L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT, not EVEN_N)  # fmt: skip
        acc0, acc1 = weigh_values(p0, p1, p_v, stride_v, acc0, acc1, L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT)
    elif b < first:
        p0, p1 = softmax_map(p_q, p_k, offs_n, queries, stride_q, stride_k, scale,
                             L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT, not EVEN_N)  # fmt: skip
        acc0, acc1 = weigh_values(p0, p1, p_v, stride_v, acc0, acc1, L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT)

    if TWO_TERMS or not KEEP_OWN:
        if b >= first:
            if HAS_INJECT:
                p_map = head(inject, stride_inject, b - first, h, 1)
                p0, p1 = load_map(p_map, offs_n, queries, stride_inject, L, KEYS0, KEYS1, not EVEN_N)
            else:
                p_q, p_k = head(q, stride_q, b_source, h, UNIT), head(k, stride_k, b_source, h, UNIT)
                p0, p1 = softmax_map(p_q, p_k, offs_n, queries, stride_q, stride_k, scale,
                                     L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT, not EVEN_N)  # fmt: skip
            p_v = head(v_source, stride_source, b - first, h, UNIT)
            acc0, acc1 = weigh_values(p0, p1, p_v, stride_source, acc0, acc1,
                                      L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT)  # fmt: skip

    store_head(out, acc0, acc1, b, h, offs_n, queries, stride_out, D, HEAD0, HEAD1, UNIT)


@triton.jit
def store_head(out, acc0, acc1, b, h, offs_n, queries, stride_out,
               D: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    p_out, step = head(out, stride_out, b, h, UNIT), stride_out[2] * UNIT
    store(p_out, acc0, offs_n, tl.arange(0, HEAD0), step, stride_out[3], queries, D)
    if HEAD1 > 0:
        store(p_out, acc1, offs_n, HEAD0 + tl.arange(0, HEAD1), step, stride_out[3], queries, D)


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "HAS_TOKEN_MAP": lambda args: args["token_map"] is not None,
        "HAS_BLEND": lambda args: args["blend"] is not None,
        "HAS_REWEIGHT": lambda args: args["reweight"] is not None,
        "HAS_SAVE": lambda args: args["save"] is not None,
        "HAS_SAVE_MEAN": lambda args: args["save_mean"] is not None,
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
@triton.jit
def cross_attention_save_kernel(
    q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean, out,
    queries, heads, first, scale,
    stride_q, stride_k, stride_v, stride_inject, stride_save, stride_out,  # inject, save: elements, the others: UNIT
    L: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr,
    D: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr, HAS_INJECT: tl.constexpr, HAS_TOKEN_MAP: tl.constexpr, HAS_BLEND: tl.constexpr,
    HAS_REWEIGHT: tl.constexpr, HAS_SAVE: tl.constexpr, HAS_SAVE_MEAN: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of row b: P', written where asked, and out = P' V.

    A program owns one head, or all of them for save_mean, which is then a plain sum in registers without atomics.
    token_map, blend, reweight, save_mean are contiguous.
    """
    b = tl.program_id(2)
    edited = b - first
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    l0, l1 = tl.arange(0, KEYS0), KEYS0 + tl.arange(0, KEYS1 if KEYS1 > 0 else 16)
    mean0 = tl.zeros([BLOCK_N, KEYS0], tl.float32)
    mean1 = tl.zeros([BLOCK_N, KEYS1 if KEYS1 > 0 else 16], tl.float32)

    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + edited).to(tl.int32)
    b_map = b if HAS_BLEND else b_source

    for i in range(heads if HAS_SAVE_MEAN else 1):
        h = tl.program_id(1) + i
        p_q, p_k = head(q, stride_q, b_map, h, UNIT), head(k, stride_k, b_map, h, UNIT)
        p0, p1 = softmax_map(p_q, p_k, offs_n, queries, stride_q, stride_k, scale,
                             L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT, not EVEN_N)  # fmt: skip
        if b >= first:
            s0, s1 = p0, p1
            if HAS_INJECT:
                p_map = head(inject, stride_inject, edited, h, 1)
                s0, s1 = load_map(p_map, offs_n, queries, stride_inject, L, KEYS0, KEYS1, not EVEN_N)
            elif HAS_BLEND:
                p_q, p_k = head(q, stride_q, b_source, h, UNIT), head(k, stride_k, b_source, h, UNIT)
                s0, s1 = softmax_map(p_q, p_k, offs_n, queries, stride_q, stride_k, scale,
                                     L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT, not EVEN_N)  # fmt: skip
            if HAS_TOKEN_MAP:
                # P_source @ token_map, its columns split like the map's
                p_m = token_map + edited.to(tl.int64) * (L * L)
                t0 = tl.zeros([BLOCK_N, KEYS0], tl.float32)
                t0 = weigh(s0, s1, p_m, L, 1, t0, l0, L, KEYS0, KEYS1, L, KEYS0 > L)
                if KEYS1 > 0:
                    t1 = tl.zeros([BLOCK_N, KEYS1], tl.float32)
                    s1 = weigh(s0, s1, p_m, L, 1, t1, l1, L, KEYS0, KEYS1, L, KEYS0 + KEYS1 > L)
                s0 = t0
            if HAS_BLEND:
                p_blend = blend + edited * L
                p0 = blended(p0, s0, p_blend, l0, L)
                if KEYS1 > 0:
                    p1 = blended(p1, s1, p_blend, l1, L)
            else:
                p0, p1 = s0, s1
            if HAS_REWEIGHT:
                p_weight = reweight + edited * L
                p0 *= tl.load(p_weight + l0, mask=l0 < L, other=0.0)[None, :]
                if KEYS1 > 0:
                    p1 *= tl.load(p_weight + l1, mask=l1 < L, other=0.0)[None, :]
            if HAS_SAVE:
                p_save = head(save, stride_save, edited, h, 1)
                store(p_save, p0, offs_n, l0, stride_save[2], stride_save[3], queries, L)
                if KEYS1 > 0:
                    store(p_save, p1, offs_n, l1, stride_save[2], stride_save[3], queries, L)
        if HAS_SAVE_MEAN:
            mean0 += p0
            if KEYS1 > 0:
                mean1 += p1
        acc0 = tl.zeros([BLOCK_N, HEAD0], tl.float32)
        acc1 = tl.zeros([BLOCK_N, HEAD1 if HEAD1 > 0 else 16], tl.float32)
        p_v = head(v, stride_v, b, h, UNIT)
        acc0, acc1 = weigh_values(p0, p1, p_v, stride_v, acc0, acc1, L, KEYS0, KEYS1, D, HEAD0, HEAD1, UNIT)
        store_head(out, acc0, acc1, b, h, offs_n, queries, stride_out, D, HEAD0, HEAD1, UNIT)

    if HAS_SAVE_MEAN:
        if b >= first:
            p_mean = save_mean + edited.to(tl.int64) * queries * L
            add_to(p_mean, mean0 / heads, offs_n, l0, queries, L)
            if KEYS1 > 0:
                add_to(p_mean, mean1 / heads, offs_n, l1, queries, L)


@triton.jit
def add_to(p, tile, rows, cols, limit_row, L: tl.constexpr):
    """Add the tile to a contiguous matrix with L columns; one program owns it, so a load and a store do."""
    p_tile = p + rows[:, None] * L + cols[None, :]
    mask = (rows[:, None] < limit_row) & (cols[None, :] < L)
    tl.store(p_tile, tl.load(p_tile, mask=mask, other=0.0) + tile, mask=mask)


# The launches: plain Python from here on.


def config(B: int, H: int, N: int, D: int, itemsize: int, two_maps: bool) -> dict:
    """Tile and warps for a shape, by rule; two_maps: the kernel holds two maps at a time."""
    if itemsize == 4:  # no tensor cores: float32 products are multiply-adds, and their operands live in registers
        return {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1}


def shape_args(q, k, u: int) -> dict:
    """The constexprs that follow from the shapes."""
    (keys0, keys1), (head0, head1) = split(k.shape[2]), split(q.shape[3])
    return {"L": k.shape[2], "KEYS0": keys0, "KEYS1": keys1, "D": q.shape[3], "HEAD0": head0, "HEAD1": head1, "UNIT": u}


def first_row(q, *edits) -> int:
    """B - S, the first edited row; B if there is no edit."""
    return q.shape[0] - next((x.shape[0] for x in edits if x is not None), 0)


def launch(q, k, v, v_source, source_row, inject, keep_own, out) -> None:
    """The folded form; see cross_attention_kernel. All checks are done in ops.py."""
    B, H, N, D = q.shape
    u = unit(q, k, v, v_source, out)
    choice = config(B, H, N, D, q.element_size(), two_maps=False)
    cross_attention_kernel[(triton.cdiv(N, choice["BLOCK_N"]), H, B)](
        q, k, v, v_source, source_row, inject, out,
        N, first_row(q, source_row, inject), D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v, v_source)), strides(inject, 1), strides(out, u),
        KEEP_OWN=keep_own, **shape_args(q, k, u), **choice,
    )  # fmt: skip


def launch_save(q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean, out) -> None:
    """The form that writes P' or its mean; see cross_attention_save_kernel. All checks are done in ops.py."""
    B, H, N, D = q.shape
    u = unit(q, k, v, out)
    choice = config(B, H, N, D, q.element_size(), two_maps=True)
    mean = None if save_mean is None else save_mean.contiguous()
    cross_attention_save_kernel[(triton.cdiv(N, choice["BLOCK_N"]), 1 if mean is not None else H, B)](
        q, k, v, source_row, inject,
        None if token_map is None else token_map.to(q.dtype).contiguous(),  # both factors of a product have one dtype
        *(None if x is None else x.contiguous() for x in (blend, reweight)), save, mean, out,
        N, H, first_row(q, save, mean), D**-0.5 * LOG2_E,
        *(strides(x, u) for x in (q, k, v)), strides(inject, 1), strides(save, 1), strides(out, u),
        **shape_args(q, k, u), **choice,
    )  # fmt: skip
    if mean is not save_mean:
        save_mean.copy_(mean)
