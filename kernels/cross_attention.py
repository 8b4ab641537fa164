"""Attention over at most 256 keys with the map edited in flight: the whole key row at once, one
pass, no rescaling.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

P' is never formed here: the edit is linear in both maps, so fold.py moved it into the values and
what is left is out = P_own V_own + P_source V_source. Where a map is asked for, saved_map.py forms
it. P_source is recomputed from q and k of another row, or read. Source: Hertz et al. 2022
(prompt-to-prompt) for the edits.
"""

from collections.abc import Callable
from typing import NamedTuple

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


class Inputs(NamedTuple):
    """What the maps are computed from: tensors, their strides, and numbers."""

    q: tl.tensor
    k: tl.tensor
    stride_q: tl.tuple
    stride_k: tl.tuple
    queries: tl.tensor
    group: tl.tensor  # heads of q to one of k
    first: tl.tensor
    head_dim: tl.tensor
    scale: tl.tensor


@triton.jit
def softmax_map(
    x,
    bias,
    stride_bias,
    b,
    h,
    offs_n,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """P = softmax(scale q k^T + bias) of one block of queries of row b: (BLOCK_N, KEYS) float32,
    zero beyond L. x: Inputs."""
    keys, offs_d = tl.arange(0, KEYS), tl.arange(0, STEP)
    q = head(x.q, x.stride_q, b, h, UNIT)
    k = head(x.k, x.stride_k, b, h // x.group, UNIT)
    b_q = load(q, offs_n, offs_d, x.queries, D, not EVEN_N, D % STEP != 0)
    s = scores(
        q, b_q, offs_n, x.queries, k, keys, L, x.head_dim, D, STEP, BLOCK_N, KEYS, EVEN_N, KEYS != L
    )
    # exp(x) = 2^(x log2 e), and log2 e is in the scale
    if HAS_BIAS:
        biased = tl.where(b >= x.first, x.queries, 0)  # rows before `first` have none
        of_bias = head(bias, stride_bias, tl.maximum(b - x.first, 0), h, 1)
        s = s * x.scale + load_bias(of_bias, offs_n, keys, biased, L)
        p = tl.exp2(s - finite(tl.max(s, 1))[:, None])
        total = tl.sum(p, 1)
        return p * (1 / tl.where(total == 0, 1.0, total))[:, None]
    else:
        p = tl.exp2(s * x.scale - (tl.max(s, 1) * x.scale)[:, None])
        return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def stored_map(
    inject, stride, b, h, offs_n, queries, L: tl.constexpr, KEYS: tl.constexpr, EVEN_N: tl.constexpr
):
    """A stored map of one block of queries: (BLOCK_N, KEYS) float32."""
    keys, at = tl.arange(0, KEYS), head(inject, stride, b, h, 1)
    p = load(at, offs_n, keys, queries, L, not EVEN_N, KEYS != L)
    return p.to(tl.float32)


@triton.jit
def store_columns(
    d,
    p,
    v,
    source,
    v_source,
    out,
    offs_n,
    queries,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWO: tl.constexpr,
):
    """Columns d of out = P V, if there are TWO terms plus P_source V_source."""
    keys = tl.arange(0, KEYS)
    MASK_L: tl.constexpr = KEYS != L
    MASK_D: tl.constexpr = D % STEP != 0
    b_v = load(v, keys, d, L, D, MASK_L, MASK_D)
    acc = dot(p.to(b_v.dtype), b_v, zeros(BLOCK_N, STEP))
    if TWO:
        b_v = load(v_source, keys, d, L, D, MASK_L, MASK_D)
        acc = dot(source.to(b_v.dtype), b_v, acc)
    store(out, acc, offs_n, d, queries, D)


@triton.jit
def store_product(
    p,
    v,
    source,
    v_source,
    out,
    offs_n,
    queries,
    head_dim,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWO: tl.constexpr,
):
    """out = P V, with TWO terms plus P_source V_source, STEP columns at a time; head_dim as in
    `scores`."""
    d = tl.arange(0, STEP)
    if STEP < D:
        for start in range(0, head_dim, STEP):
            store_columns(
                start + d,
                p,
                v,
                source,
                v_source,
                out,
                offs_n,
                queries,
                L,
                KEYS,
                D,
                STEP,
                BLOCK_N,
                TWO,
            )
    else:
        store_columns(
            d, p, v, source, v_source, out, offs_n, queries, L, KEYS, D, STEP, BLOCK_N, TWO
        )


@triton.heuristics(
    {
        "HAS_SOURCE_ROW": lambda args: args["source_row"] is not None,
        "HAS_INJECT": lambda args: args["inject"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "TWO_TERMS": lambda args: args["v_source"] is not None and args["KEEP_OWN"],
        "EVEN_N": lambda args: args["queries"] % args["BLOCK_N"] == 0,
    }
)
# A compile for each value, or for each step whose row of a table begins elsewhere, would be waste.
@triton.jit(
    do_not_specialize=["heads", "first"], do_not_specialize_on_alignment=["source_row", "bias"]
)
def cross_attention_kernel(
    q,
    k,
    v,
    v_source,
    source_row,
    inject,
    bias,
    out,
    queries,
    heads,
    groups,  # heads of q to one of k, of v, of v_source
    first,
    head_dim,
    scale,
    stride_q,
    stride_k,
    stride_v,
    stride_source,
    stride_out,  # in units of UNIT
    stride_inject,
    stride_bias,  # in elements
    KEEP_OWN: tl.constexpr,
    L: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SOURCE_ROW: tl.constexpr,
    HAS_INJECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """One block of queries of head h of row b: out = P V, and rows from `first` on may differ in
    one of three ways.

    source_row alone: out = P_source V.  With v_source: out = P_own V + P_source V_source.  inject
    without KEEP_OWN: out = inject V_source.
    """
    start_n, h, b = place(queries, heads, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    b_source = b
    if HAS_SOURCE_ROW:
        if b >= first:
            b_source = first + tl.load(source_row + b - first).to(tl.int32)
    x = Inputs(q, k, stride_q, stride_k, queries, groups[0], first, head_dim, scale)
    own_v = head(v, stride_v, b, h // groups[1], UNIT)
    to_out = head(out, stride_out, b, h, UNIT)

    if (KEEP_OWN and not TWO_TERMS) or b < first:
        p = softmax_map(
            x,
            bias,
            stride_bias,
            b_source,
            h,
            offs_n,
            L,
            KEYS,
            D,
            UNIT,
            STEP,
            BLOCK_N,
            EVEN_N,
            HAS_BIAS,
        )
        store_product(
            p, own_v, p, own_v, to_out, offs_n, queries, head_dim, L, KEYS, D, STEP, BLOCK_N, False
        )
    elif TWO_TERMS or not KEEP_OWN:
        if HAS_INJECT:
            source = stored_map(
                inject, stride_inject, b - first, h, offs_n, queries, L, KEYS, EVEN_N
            )
        else:
            source = softmax_map(
                x,
                bias,
                stride_bias,
                b_source,
                h,
                offs_n,
                L,
                KEYS,
                D,
                UNIT,
                STEP,
                BLOCK_N,
                EVEN_N,
                HAS_BIAS,
            )
        of_source = head(v_source, stride_source, b - first, h // groups[2], UNIT)
        if TWO_TERMS:
            # half the registers while the other map is computed
            source = source.to(v.dtype.element_ty)
            p = softmax_map(
                x,
                bias,
                stride_bias,
                b,
                h,
                offs_n,
                L,
                KEYS,
                D,
                UNIT,
                STEP,
                BLOCK_N,
                EVEN_N,
                HAS_BIAS,
            )
            store_product(
                p,
                own_v,
                source,
                of_source,
                to_out,
                offs_n,
                queries,
                head_dim,
                L,
                KEYS,
                D,
                STEP,
                BLOCK_N,
                True,
            )
        else:
            store_product(
                source,
                of_source,
                source,
                of_source,
                to_out,
                offs_n,
                queries,
                head_dim,
                L,
                KEYS,
                D,
                STEP,
                BLOCK_N,
                False,
            )


# The launches: plain Python from here on.


def shape_args(q, k, unit: int) -> dict:
    """The constexprs that follow from the shapes."""
    L, D = k.shape[2], q.shape[3]
    return {"L": L, "KEYS": width(L), "D": D, "UNIT": unit}


def wide(k) -> str:
    """What the ops with more than 128 keys are called in tiles.TABLE, beyond their name."""
    return ", wide" if k.shape[2] > 128 else ""


def first_row(q, *edits) -> int:
    """B - S, the first edited row; B if there is no edit."""
    return q.shape[0] - next((x.shape[0] for x in edits if x is not None), 0)


def prepare(q, k, v, v_source, source_row, inject, bias, keep_own, scale, out) -> Callable:
    """The launch of cross_attention_kernel for tensors like these; all checks are done in
    checks.py.

    It takes the same arguments.
    """
    B, H, N, D = q.shape
    u = unit(q, k, v, v_source, out)
    op = "cross_attention" + (wide(k) or ("" if bias is None else ", bias"))
    choice = tile(op, q, arch()) | tuned.tile(op, q)
    groups = tuple(1 if x is None else H // x.shape[1] for x in (k, v, v_source))
    first = first_row(q, source_row, inject, bias)
    numbers = (N, H, groups, first, D, (D**-0.5 if scale is None else scale) * LOG2_E)
    steps = *(strides(x, u) for x in (q, k, v, v_source, out)), strides(inject, 1)
    numbers = (*numbers, *steps, bias_strides(bias, H, N))
    constants = {"KEEP_OWN": keep_own} | shape_args(q, k, u) | choice
    attend = Launch(cross_attention_kernel, launch_grid(q, choice), numbers, **constants)

    def launch(q, k, v, v_source, source_row, inject, bias, keep_own, scale, out):
        attend(q, k, v, v_source, source_row, inject, bias, out)

    return launch
