"""Folding an edit of the map into the values, in one launch: out = P_own V_own + P_source V_source.

    V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

ops.fold is the same in PyTorch, in about ten launches, which would take longer than the attention that follows. Inside
the attention kernel it would cost more registers than there are.
"""

import triton
import triton.language as tl

from .tiles import dot, empty_heads, head, load, store, strides, unit, zeros

# Columns of V to a program, and keys to a step; keys of the result to a program. Fewer than 64 of these, because on
# sm_100 Triton turns float32 products of 64 rows or more, of numbers that were halves, into TF32, "ieee" or not.
STEP, ROWS = 16, 32


@triton.jit
def column(p, rows, limit):
    return tl.load(p + rows, mask=rows < limit, other=0.0)[:, None]


@triton.jit
def weighted(p_v, keys, cols, step_v, reweight, L: tl.constexpr, D: tl.constexpr, HAS_REWEIGHT: tl.constexpr):
    """reweight * V, float32."""
    x = load(p_v, keys, cols, step_v, L, D, True, True).to(tl.float32)
    if HAS_REWEIGHT:
        x = column(reweight, keys, L) * x
    return x


@triton.heuristics(
    {
        "HAS_OWN": lambda args: args["own"] is not None,
        "HAS_SOURCE": lambda args: args["source"] is not None,
        "HAS_TOKEN_MAP": lambda args: args["token_map"] is not None,
        "HAS_BLEND": lambda args: args["blend"] is not None,
        "HAS_REWEIGHT": lambda args: args["reweight"] is not None,
    }
)
@triton.jit(
    do_not_specialize=["heads", "first"], do_not_specialize_on_alignment=["token_map", "blend", "reweight"]
)
def fold_kernel(
    v, token_map, blend, reweight, own, source,
    heads, first, stride_v, stride_own, stride_source,  # strides in units of UNIT
    L: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    HAS_OWN: tl.constexpr, HAS_SOURCE: tl.constexpr,
    HAS_TOKEN_MAP: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_REWEIGHT: tl.constexpr,
):  # fmt: skip
    """ROWS keys and STEP columns of one head of row b, of `own` (V where a row is not edited) and of `source`."""
    h, b = tl.program_id(0) % heads, tl.program_id(0) // heads
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(2) * STEP + tl.arange(0, STEP)
    p_v, step_v = head(v, stride_v, b, h, UNIT)
    if b < first:
        if HAS_OWN:
            p_own, step_own = head(own, stride_own, b, h, UNIT)
            store(p_own, load(p_v, rows, cols, step_v, L, D, True, True), rows, cols, step_own, L, D)
    else:
        edited = (b - first).to(tl.int64)
        if HAS_REWEIGHT:
            reweight += edited * L
        if HAS_BLEND:
            blend += edited * L
        if HAS_BLEND or not HAS_SOURCE:
            p_own, step_own = head(own, stride_own, b, h, UNIT)
            x = weighted(p_v, rows, cols, step_v, reweight, L, D, HAS_REWEIGHT)
            if HAS_BLEND:
                x = (1 - column(blend, rows, L)) * x
            store(p_own, x, rows, cols, step_own, L, D)
        if HAS_SOURCE:
            p_source, step_source = head(source, stride_source, edited, h, UNIT)
            if HAS_TOKEN_MAP:
                total = zeros(ROWS, STEP)
                for start in range(0, L, STEP):
                    keys = start + tl.arange(0, STEP)
                    # (STEP, STEP)
                    values = weighted(p_v, keys, cols, step_v, reweight, L, D, HAS_REWEIGHT)
                    if HAS_BLEND:
                        values = column(blend, keys, L) * values
                    p_map = token_map + edited * (L * L)
                    total = dot(load(p_map, rows, keys, (L, 1), L, L, True, True), values, total)
            else:
                total = weighted(p_v, rows, cols, step_v, reweight, L, D, HAS_REWEIGHT)
                if HAS_BLEND:
                    total = column(blend, rows, L) * total
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
    own = empty_heads(v) if keep_own else None
    source = None
    if source_row is not None or inject is not None:
        source = empty_heads(v[first:]) if beside else own[first:]
    u = unit(v, own, source)
    fold_kernel[(H * B, triton.cdiv(L, ROWS), triton.cdiv(D, STEP))](
        v, *(None if x is None else x.contiguous() for x in (token_map, blend, reweight)), own, source,
        H, first, *(strides(x, u) for x in (v, own, source)),
        L=L, D=D, UNIT=u, ROWS=ROWS, STEP=STEP,
    )  # fmt: skip
    return (own if keep_own else v), (source if beside else None), keep_own
