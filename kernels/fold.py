"""Folding an edit of the map into the values, in one launch: out = P_own V_own + P_source V_source.

    V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

ops.fold is the same in PyTorch, in about ten launches, which would take longer than the attention that follows. Inside
the attention kernel it would cost more registers than there are.
"""

import triton
import triton.language as tl

from . import ops
from .attention import dot, head, load, strides, unit, zeros

STEP = 16  # columns of V to a program, and keys to a step


@triton.jit
def column(p, rows, limit):
    return tl.load(p + rows, mask=rows < limit, other=0.0)[:, None]


@triton.jit
def store(p, tile, rows, cols, step, limit_row, limit_col):
    mask = (rows[:, None] < limit_row) & (cols[None, :] < limit_col)
    tl.store(p + rows[:, None] * step[0] + cols[None, :] * step[1], tile.to(p.dtype.element_ty), mask=mask)


@triton.heuristics(
    {
        "HAS_OWN": lambda args: args["own"] is not None,
        "HAS_SOURCE": lambda args: args["source"] is not None,
        "HAS_TOKEN_MAP": lambda args: args["token_map"] is not None,
        "HAS_BLEND": lambda args: args["blend"] is not None,
        "HAS_REWEIGHT": lambda args: args["reweight"] is not None,
    }
)
@triton.jit(do_not_specialize=["first"])
def fold_kernel(
    v, token_map, blend, reweight, own, source,
    first, stride_v, stride_own, stride_source,  # strides in units of UNIT
    L: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_L: tl.constexpr, STEP: tl.constexpr,
    HAS_OWN: tl.constexpr, HAS_SOURCE: tl.constexpr,
    HAS_TOKEN_MAP: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_REWEIGHT: tl.constexpr,
):  # fmt: skip
    """STEP columns of one head of row b: of `own`, a copy of V where a row is not edited, and of `source`."""
    h, b = tl.program_id(1), tl.program_id(2)
    cols = tl.program_id(0) * STEP + tl.arange(0, STEP)
    p_v, step_v = head(v, stride_v, b, h, UNIT)
    if b < first:
        if HAS_OWN:
            p_own, step_own = head(own, stride_own, b, h, UNIT)
            for start in range(0, L, STEP):
                keys = start + tl.arange(0, STEP)
                store(p_own, load(p_v, keys, cols, step_v, L, D, True, True), keys, cols, step_own, L, D)
    else:
        edited = b - first
        rows = tl.arange(0, BLOCK_L)
        total = zeros(BLOCK_L, STEP)
        for start in range(0, L, STEP):
            keys = start + tl.arange(0, STEP)
            # (STEP, STEP)
            x = load(p_v, keys, cols, step_v, L, D, True, True).to(tl.float32)
            if HAS_REWEIGHT:
                x = column(reweight + edited * L, keys, L) * x
            if HAS_BLEND or not HAS_SOURCE:
                p_own, step_own = head(own, stride_own, b, h, UNIT)
                share = column(blend + edited * L, keys, L) if HAS_BLEND else 0.0
                store(p_own, (1 - share) * x, keys, cols, step_own, L, D)
                x = share * x
            if HAS_SOURCE:
                p_source, step_source = head(source, stride_source, edited, h, UNIT)
                if HAS_TOKEN_MAP:
                    p_map = token_map + edited.to(tl.int64) * (L * L)
                    total = dot(load(p_map, rows, keys, (L, 1), L, L, True, True), x, total)
                else:
                    store(p_source, x, keys, cols, step_source, L, D)
        if HAS_TOKEN_MAP:
            p_source, step_source = head(source, stride_source, edited, h, UNIT)
            store(p_source, total, rows, cols, step_source, L, D)


def launch(v, source_row, inject, token_map, blend, reweight) -> tuple:
    """(v, v_source, keep_own) as cross_attention_kernel takes them.

    The edited rows of v are V_own, or V_source if that is the only term and its map is computed as V_own's would be.
    v_source: V_source of the edited rows beside V_own, or of a stored map. keep_own: whether v is used in edited rows.
    """
    B, H, L, D = v.shape
    first = B - next((x.shape[0] for x in (source_row, inject, reweight) if x is not None), 0)
    if token_map is None and blend is None and reweight is None:
        return (v, None, True) if inject is None else (v, v[first:], False)
    keep_own, beside = inject is None or blend is not None, inject is not None or blend is not None
    own = ops.empty_out(v) if keep_own else None
    source = None
    if source_row is not None or inject is not None:
        source = ops.empty_out(v[first:]) if beside else own[first:]
    u = unit(v, own, source)
    fold_kernel[(triton.cdiv(D, STEP), H, B)](
        v, *(None if x is None else x.contiguous() for x in (token_map, blend, reweight)), own, source,
        first, *(strides(x, u) for x in (v, own, source)),
        L=L, D=D, UNIT=u, BLOCK_L=max(STEP, triton.next_power_of_2(L)), STEP=STEP,
    )  # fmt: skip
    return (own if keep_own else v), (source if beside else None), keep_own
