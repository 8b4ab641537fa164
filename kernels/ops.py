"""The public attention ops: `attention` and `cross_attention`, checked here and computed by the Triton kernels beside.

Importing this module imports torch only; Triton is imported by the first call. Each op is registered with
torch.library (schema, fake kernel), so that torch.compile keeps it in its graph. `cross_attention` is two ops, a pure
one and one that writes to its `save` arguments, and the function picks: an op whose mutated arguments are all None
breaks inductor.

The kernels are for inference: under autograd they raise, `impl="sdpa"` of minisd.attention is the differentiable
choice.
"""

import torch
from torch import Tensor

MAX_KEYS = 128  # cross_attention holds the whole key row in one tile
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(q: Tensor, k: Tensor, v: Tensor, source_row: Tensor | None = None) -> Tensor:
    """Flash attention; the last S rows may take the map of another row: out[b] = softmax(q k^T / sqrt(D))[row[b]] v[b].

    No map is ever stored: the kernel reads q and k of row `source_row` (self-attention injection) and v of its own.
    q: (batch, heads, queries, D); k, v: (batch, heads, keys, D); D a multiple of 8 up to 256; float16, bfloat16 or
    float32, any strides. source_row: (S,) int32 or int64 with values in [0, S), counted within the last S rows; the
    values are not checked here, that would synchronise the device.
    Returns (batch, heads, queries, D) as a view of (batch, queries, heads, D) memory.
    ValueError: shapes, dtypes, devices. RuntimeError: an input needs a gradient.
    Source: Dao et al. 2022, 2023 (FlashAttention 1 and 2); Hertz et al. 2022 (self-attention injection).
    """
    check(q, k, v, source_row=source_row)
    check_kernel(q, k, v)
    return torch.ops.minisd_kernels.attention(q, k, v, source_row)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    source_row: Tensor | None = None,
    inject: Tensor | None = None,
    token_map: Tensor | None = None,
    blend: Tensor | None = None,
    reweight: Tensor | None = None,
    save: Tensor | None = None,
    save_mean: Tensor | None = None,
) -> Tensor:
    """Attention over at most 128 keys whose map is edited, and optionally saved, in the last S rows of the batch.

        P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

    P_source is the map of row `source_row` (counted within the S rows), recomputed in the kernel, or the stored map
    `inject`. blend None with a source means 1. Without a source P' = reweight * P_own. Unless a save asks for P', it is
    never formed: it is linear in both maps and so folds into V (see `fold`).

    q: (batch, heads, queries, D); k, v: (batch, heads, keys, D); D a multiple of 8 up to 256; float16, bfloat16 or
    float32, any strides. source_row: (S,) int32 or int64, values in [0, S), not checked here. inject: (S, heads,
    queries, keys). token_map: (S, keys, keys) float32, source tokens -> own tokens. blend, reweight: (S, keys)
    float32. save: (S, heads, queries, keys), overwritten with P'. save_mean: (S, queries, keys) float32, += mean of P'
    over heads. inject and save may be float16, bfloat16 or float32. Returns (batch, heads, queries, D) as a view of
    (batch, queries, heads, D) memory. ValueError: shapes, dtypes, devices, more than 128 keys, two sources, a
    token_map or blend without a source. RuntimeError: an input needs a gradient. Source: Hertz et al. 2022
    (prompt-to-prompt).
    """
    check(q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean)
    check_kernel(q, k, v, inject, token_map, blend, reweight, save, save_mean)
    if k.shape[2] > MAX_KEYS:
        raise ValueError(f"cross_attention takes at most {MAX_KEYS} keys, got {k.shape[2]}; use attention()")
    if save is not None or save_mean is not None:
        return torch.ops.minisd_kernels.cross_attention_save(
            q, k, v, source_row, inject, token_map, blend, reweight, save, save_mean
        )
    return torch.ops.minisd_kernels.cross_attention(q, k, v, source_row, inject, token_map, blend, reweight)


def fold(
    v: Tensor, has_source: bool, token_map: Tensor | None, blend: Tensor | None, reweight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(V_own, V_source) such that the edited output is P_own V_own + P_source V_source; None: the term is zero.

        V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

    Exact, because the edit is linear in both maps. v: (S, heads, keys, D), the rows that are edited; the result has its
    dtype and is computed in float32 at least. The kernels do the same in fold.py; this is what impl="sdpa" uses.
    """
    x = v if v.dtype == torch.float64 else v.float()
    if reweight is not None:
        x = reweight[:, None, :, None] * x
    if not has_source:
        return x.to(v.dtype), None
    own = None
    if blend is not None:
        own = ((1 - blend)[:, None, :, None] * x).to(v.dtype)
        x = blend[:, None, :, None] * x
    if token_map is not None:
        x = token_map[:, None].to(x.dtype) @ x
    return own, x.to(v.dtype)


# Checks. They look at shapes, dtypes and devices only, never at values.


def check(
    q, k, v, source_row=None, inject=None, token_map=None, blend=None, reweight=None, save=None, save_mean=None
) -> None:
    """ValueError unless q, k, v and the edit agree in shape, dtype and device; holds for every implementation."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v: expected 4 dimensions (batch, heads, tokens, head_dim), got {shapes(q, k, v)}")
    B, H, N, D = q.shape
    L = k.shape[2]
    if k.shape != (B, H, L, D) or v.shape != k.shape:
        raise ValueError(f"q, k, v: expected (B, H, N, D), (B, H, L, D), (B, H, L, D), got {shapes(q, k, v)}")
    if 0 in q.shape or L == 0:
        raise ValueError(f"q, k, v: expected no empty dimension, got {shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")

    ints, maps = (torch.int32, torch.int64), (*DTYPES, q.dtype)
    edit = {  # name: (tensor, shape after the rows, dtypes)
        "source_row": (source_row, (), ints),
        "inject": (inject, (H, N, L), maps),
        "token_map": (token_map, (L, L), (torch.float32,)),
        "blend": (blend, (L,), (torch.float32,)),
        "reweight": (reweight, (L,), (torch.float32,)),
        "save": (save, (H, N, L), maps),
        "save_mean": (save_mean, (N, L), (torch.float32,)),
    }
    edit = {name: what for name, what in edit.items() if what[0] is not None}
    if not edit:
        return
    rows = {name: x.shape[0] if x.ndim else 0 for name, (x, _, _) in edit.items()}
    S = next(iter(rows.values()))
    if set(rows.values()) != {S} or not 1 <= S <= B:
        raise ValueError(f"edit: expected one number of rows from 1 to the batch, {B}, in every tensor, got {rows}")
    for name, (x, shape, dtypes) in edit.items():
        if tuple(x.shape) != (S, *shape):
            raise ValueError(f"{name}: expected shape {(S, *shape)}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise ValueError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device} like q, got {x.device}")
    if source_row is not None and inject is not None:
        raise ValueError("edit: expected one source, got both source_row and inject")
    if source_row is None and inject is None and (token_map is not None or blend is not None):
        name = "token_map" if token_map is not None else "blend"
        raise ValueError(f"{name}: expected a source (source_row or inject) with it, got none")


def check_kernel(q: Tensor, k: Tensor, v: Tensor, *edit: Tensor | None) -> None:
    """ValueError for what the Triton kernels do not take; RuntimeError if an input needs a gradient."""
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim: expected a multiple of 8 up to {MAX_HEAD_DIM}, got {q.shape[3]}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v: expected {' or '.join(map(str, DTYPES))}, got {q.dtype}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *edit)):
        raise RuntimeError(NO_BACKWARD)


NO_BACKWARD = "the Triton kernels have no backward; use impl='sdpa' (unet.attention = 'sdpa') or torch.no_grad()"


def shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


# Registration. The schemas are the ops' signatures; (a!) marks an argument that is written to.

torch.library.define(
    "minisd_kernels::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? source_row) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "minisd_kernels::cross_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? source_row, Tensor? inject, Tensor? token_map, Tensor? blend, "
    "Tensor? reweight) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "minisd_kernels::cross_attention_save",
    "(Tensor q, Tensor k, Tensor v, Tensor? source_row, Tensor? inject, Tensor? token_map, Tensor? blend, "
    "Tensor? reweight, Tensor(a!)? save, Tensor(b!)? save_mean) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def empty_out(q: Tensor, *args) -> Tensor:
    """The output, uninitialised; also the fake kernel of every op, so both promise the same strides."""
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D).transpose(1, 2)


@torch.library.impl("minisd_kernels::attention", ("CPU", "CUDA"))
def _(q, k, v, *edit):
    from . import attention as kernel

    return run(kernel.launch, q, k, v, *edit)


@torch.library.impl("minisd_kernels::cross_attention", ("CPU", "CUDA"))
def _(q, k, v, *edit):
    from . import cross_attention as kernel

    return run(kernel.launch, q, k, v, *edit)


@torch.library.impl("minisd_kernels::cross_attention_save", ("CPU", "CUDA"))
def _(q, k, v, *edit):
    from . import cross_attention as kernel

    return run(kernel.launch_save, q, k, v, *edit)


def run(launch, q: Tensor, k: Tensor, v: Tensor, *edit) -> Tensor:
    """Allocate the output and launch on q's device."""
    import triton

    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"the Triton kernels need a CUDA device, got {q.device}; impl='sdpa' runs everywhere")
    out = empty_out(q)
    with torch.cuda.device_of(q):
        launch(q, k, v, *edit, out)
    return out


def no_backward(ctx, grad):
    raise RuntimeError(NO_BACKWARD)


for _name in ("attention", "cross_attention", "cross_attention_save"):
    torch.library.register_fake(f"minisd_kernels::{_name}", empty_out)
for _name in ("attention", "cross_attention"):  # called directly, past check_kernel
    torch.library.register_autograd(f"minisd_kernels::{_name}", no_backward)
