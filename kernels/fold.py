"""Folding an edit of the map into the values, in one launch: out = P_own V_own + P_source V_source.

    V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

ops.fold is the same in PyTorch, in about ten launches, which would take longer than the attention
that follows. Inside the attention kernel it would cost more registers than there are.
"""

from collections.abc import Callable

import triton
import triton.language as tl

from .launch import Launch
from .tiles import Matrix, arch, dot, head, load, store, strides, table_strides, unit, zeros

# Columns of V to a program, and keys to a step; keys of the result to a program. Fewer than 64 of
# these, because on sm_100 Triton turns float32 products of 64 rows or more, of numbers that were
# halves, into TF32, "ieee" or not.
STEP, ROWS = 16, 32


@triton.jit
def column(p, stride, rows, limit):
    return tl.load(p + rows.to(tl.int64) * stride, mask=rows < limit, other=0.0)[:, None]


@triton.jit
def weighted(
    v, keys, cols, reweight, stride, L: tl.constexpr, D: tl.constexpr, HAS_REWEIGHT: tl.constexpr
):
    """reweight * V, float32."""
    x = load(v, keys, cols, L, D, True, True).to(tl.float32)
    if HAS_REWEIGHT:
        x = column(reweight, stride, keys, L) * x
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
    do_not_specialize=["heads", "first"],
    do_not_specialize_on_alignment=["token_map", "blend", "reweight"],
)
def fold_kernel(
    v,
    token_map,
    blend,
    reweight,
    own,
    source,
    heads,
    group,  # of `own` and `source` to one of v
    first,
    stride_v,
    stride_own,
    stride_source,  # in units of UNIT
    stride_map,
    stride_blend,
    stride_reweight,  # in elements
    L: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_TOKEN_MAP: tl.constexpr,
    HAS_BLEND: tl.constexpr,
    HAS_REWEIGHT: tl.constexpr,
):
    """ROWS keys and STEP columns of one head of row b, of `own` (V where a row is not edited) and
    of `source`."""
    h, b = tl.program_id(0) % heads, tl.program_id(0) // heads
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(2) * STEP + tl.arange(0, STEP)
    of_v = head(v, stride_v, b, h // group, UNIT)
    if b < first:
        if HAS_OWN:
            unedited = load(of_v, rows, cols, L, D, True, True)
            store(head(own, stride_own, b, h, UNIT), unedited, rows, cols, L, D)
    else:
        edited = (b - first).to(tl.int64)
        if HAS_REWEIGHT:
            reweight += edited * stride_reweight[0] + h.to(tl.int64) * stride_reweight[1]
        if HAS_BLEND:
            blend += edited * stride_blend[0] + h.to(tl.int64) * stride_blend[1]
        if HAS_BLEND or not HAS_SOURCE:
            x = weighted(of_v, rows, cols, reweight, stride_reweight[2], L, D, HAS_REWEIGHT)
            if HAS_BLEND:
                x = (1 - column(blend, stride_blend[2], rows, L)) * x
            store(head(own, stride_own, b, h, UNIT), x, rows, cols, L, D)
        if HAS_SOURCE:
            if HAS_TOKEN_MAP:
                total = zeros(ROWS, STEP)
                moves = Matrix(token_map + edited * stride_map[0], (stride_map[1], stride_map[2]))
                for start in range(0, L, STEP):
                    keys = start + tl.arange(0, STEP)
                    # (STEP, STEP)
                    of_keys = weighted(
                        of_v, keys, cols, reweight, stride_reweight[2], L, D, HAS_REWEIGHT
                    )
                    if HAS_BLEND:
                        of_keys = column(blend, stride_blend[2], keys, L) * of_keys
                    total = dot(load(moves, rows, keys, L, L, True, True), of_keys, total)
            else:
                total = weighted(of_v, rows, cols, reweight, stride_reweight[2], L, D, HAS_REWEIGHT)
                if HAS_BLEND:
                    total = column(blend, stride_blend[2], rows, L) * total
            store(head(source, stride_source, edited, h, UNIT), total, rows, cols, L, D)


# The launch: plain Python from here on.


def prepare(v, token_map, blend, reweight, has_source, stored, out) -> Callable:
    """The launch that folds tables like these into values like v; all checks are done in checks.py.

    It takes the same arguments. out: the tensors of ops.Folded that are not None.
    """
    arch()  # the first launch chooses the ptxas
    (B, _, L, D), H = v.shape, out[0].shape[1]
    S = next(x.shape[0] for x in (token_map, blend, reweight) if x is not None)

    def parts(out):
        """(V_own in all rows, V_source); where V_source is a row's only term and its map
        recomputed, it is in V_own."""
        own = None if stored and blend is None else out[0]
        only = blend is None and not stored
        return own, None if not has_source else own[B - S :] if only else out[-1]

    tensors = v, *parts(out)
    u = unit(*tensors)
    map_steps = (0, 0, 0) if token_map is None else token_map.stride()
    steps = *(strides(x, u) for x in tensors), map_steps
    numbers = (H, H // v.shape[1], B - S, *steps, table_strides(blend), table_strides(reweight))
    grid = (H * B, triton.cdiv(L, ROWS), triton.cdiv(D, STEP))
    fold = Launch(fold_kernel, grid, numbers, L=L, D=D, UNIT=u, ROWS=ROWS, STEP=STEP)

    def launch(v, token_map, blend, reweight, has_source, stored, out):
        fold(v, token_map, blend, reweight, *parts(out))

    return launch
