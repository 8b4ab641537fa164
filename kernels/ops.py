"""The public attention ops, checked here and computed by the Triton kernels beside.

Importing this module imports torch only; Triton is imported by the first call. Each op is
registered with torch.library (schema, fake kernel), so that torch.compile keeps it in its graph.
An op that writes to `save` arguments is apart from the pure one, and the function picks: an op
whose mutated arguments are all None breaks inductor.

What depends on shapes, strides, dtypes and devices alone, the checks and the choice of a launch,
is done at the first call and kept by them (`run`). Gradients are a path of their own
(gradients.py), taken where an input needs one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.autograd.forward_ad
from torch import Tensor

MAX_KEYS = 128  # up to here cross_attention is the op for plain attention too
MAX_EDITED_KEYS = 256  # cross_attention holds the whole key row in one tile; it takes up to so many
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_row: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    kv_row: Tensor | None = None,
    own_value: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Flash attention; the last S rows may take the map of another row, or other keys and values.

        out[b] = softmax(scale q k^T + bias)[source_row[b]] v[b]

    No map is ever stored: the kernel reads q and k of row `source_row` (self-attention injection)
    and v of its own. With kv_row, k and v are those of the rows kv_row[b], one after the other;
    a row whose own_value is not 0 has the identity for a map, out = v.

    q: (batch, heads, queries, D); k, v: (batch, heads, keys, D); D a multiple of 8 up to 256;
    float16, bfloat16 or float32, any strides; under autocast they are cast to its dtype, as by
    scaled_dot_product_attention. source_row: (S,) int32 or int64 with values in [0, S), counted
    within the last S rows; kv_row: (S, M), likewise. The values are not checked here, that would
    synchronise the device. bias: (S, 1 or heads, 1 or queries, keys), float16, bfloat16 or
    float32, -inf to hide a key; with kv_row over M times the keys. own_value: (S,) float32 or
    bool. scale: None for 1 / sqrt(D).
    Returns (batch, heads, queries, D) as a view of (batch, queries, heads, D) memory.
    Differentiable in q, k and v. ValueError: shapes, dtypes, devices. RuntimeError: forward-mode
    derivatives, a gradient of the bias.
    Source: Dao et al. 2022, 2023 (FlashAttention 1 and 2); Hertz et al. 2022 (self-attention
    injection); Cao et al. 2023 (MasaCtrl, kv_row); Ahn et al. 2024 (own_value).
    """
    q, k, v = as_autocast(q, k, v)
    edit = (source_row, bias, kv_row, own_value)
    if needs_gradient(q, k, v, *edit):
        from . import gradients

        names = ("source_row", "bias", "kv_row", "own_value")
        return gradients.attention(q, k, v, **dict(zip(names, edit)), scale=scale)
    return call(torch.ops.minisd_kernels.attention.default, q, k, v, *edit, scale)


class Folded(NamedTuple):
    """The values of an edited cross-attention, `fold_values`; for the two arguments of the kernel.

    v: (batch, heads, keys, D), with V_own in the edited rows, or V_source if that is their only
    term and its map is recomputed; None: V_source of a stored map is the only term.
    v_source: (S, heads, keys, D), V_source beside V_own or of a stored map.
    """

    v: Tensor | None
    v_source: Tensor | None


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
    bias: Tensor | None = None,
    kv_row: Tensor | None = None,
    own_value: Tensor | None = None,
    save: Tensor | None = None,
    save_mean: Tensor | None = None,
    folded: Folded | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over at most 256 keys whose map is edited, and optionally saved, in the last S
    rows.

        P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

    P_own = softmax(scale q k^T + bias). P_source is the map of row `source_row` (counted within
    the S rows), recomputed in the kernel, or the stored map `inject`. blend None with a source
    means 1. Without a source P' = reweight * P_own. Unless a save asks for P', it is never
    formed: it is linear in both maps and so folds into V. That costs a launch beside the
    attention, unless `folded` brings what fold_values made of v, token_map, blend and reweight:
    it serves all steps with the same prompt and gate.

    q: (batch, heads, queries, D); k, v: (batch, heads, keys, D); D a multiple of 8 up to 256;
    float16, bfloat16 or float32, any strides; cast under autocast. source_row: (S,) int32 or int64,
    values in [0, S), not checked here. inject: (S, heads, queries, keys). token_map: (S, keys,
    keys) float32, source tokens -> own tokens. blend, reweight: (S, keys) or, for single heads, (S,
    heads, keys), float32. bias: (S, 1 or heads, 1 or queries, keys). save: (S, heads, queries,
    keys), overwritten with P'. save_mean: (S, queries, keys) float32, += mean of P' over heads.
    inject, bias and save may be float16, bfloat16 or float32. Returns (batch, heads, queries, D) as
    a view of (batch, queries, heads, D) memory.

    Differentiable in all but bias; a map that carries gradients is `edited_map`'s. ValueError:
    shapes, dtypes, devices, more than 256 keys (attention takes any number, `impl="sdpa"` of minisd
    edits and saves such maps), two sources, a token_map or blend without a source, save memory that
    overlaps, kv_row or own_value (attention takes them). RuntimeError: forward-mode derivatives.
    Where an input needs a gradient, P' is `edited_map`'s and the save buffers, written in place,
    carry it. Source: Hertz et al. 2022 (prompt-to-prompt).
    """
    q, k, v = as_autocast(q, k, v)
    tables = (token_map, blend, reweight)
    if folded is not None:
        check_folded(folded, v, source_row, inject, *tables, save, save_mean)
    if kv_row is not None or own_value is not None:
        name = "own_value" if kv_row is None else "kv_row"
        raise ValueError(
            f"{name}: cross_attention does not take it; attention() does, and "
            "impl='sdpa' takes it with all else"
        )
    gradient = needs_gradient(
        q, k, v, source_row, inject, *tables, bias, save, save_mean, *(folded or ())
    )
    if gradient:
        from . import gradients

        edit = dict(source_row=source_row, inject=inject, bias=bias, save=save, save_mean=save_mean)
        edit |= dict(token_map=token_map, blend=blend, reweight=reweight)
        return gradients.cross_attention(q, k, v, **edit, folded=folded, scale=scale)
    op = torch.ops.minisd_kernels
    if save is not None or save_mean is not None:
        edit = (source_row, inject, *tables, bias, save, save_mean)
        return call(op.cross_attention_save.default, q, k, v, *edit, scale)
    if folded is not None:
        values = v if folded.v is None else folded.v
        edit = (folded.v_source, source_row, inject, bias)
        return call(
            op.cross_attention_folded.default, q, k, values, *edit, folded.v is not None, scale
        )
    return call(op.cross_attention.default, q, k, v, source_row, inject, *tables, bias, scale)


def fold_values(
    v: Tensor,
    *,
    source: str | None = None,
    token_map: Tensor | None = None,
    blend: Tensor | None = None,
    reweight: Tensor | None = None,
) -> Folded:
    """What an edit of cross-attention makes of the values, once for all steps that share them; in
    one launch.

        V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

    v: (batch, heads, keys, D), under autocast cast to its dtype; source: "source_row" or
    "inject", whichever cross_attention will be called with, or None; the tables as there, at
    least one of them. The result is for `cross_attention(q, k, v, source_row=..., folded=...)`.
    ValueError: as in cross_attention.
    """
    if source not in (None, "source_row", "inject"):
        raise ValueError(f"source: expected 'source_row', 'inject' or None, got {source!r}")
    if token_map is None and blend is None and reweight is None:
        raise ValueError("fold_values: expected a token_map, blend or reweight, got none")
    (v,) = as_autocast(v)
    if needs_gradient(v, token_map, blend, reweight):
        from . import gradients

        return gradients.fold_values(v, source, token_map, blend, reweight)
    has_source, stored = source is not None, source == "inject"
    values = call(
        torch.ops.minisd_kernels.fold.default, v, token_map, blend, reweight, has_source, stored
    )
    return unpack(values, stored and blend is None)


def unpack(values: list[Tensor], only_source: bool) -> Folded:
    """The tensors that the op `fold` returned, named."""
    if only_source:
        return Folded(None, values[0])
    return Folded(values[0], values[1] if values[1:] else None)


def edited_map(
    q: Tensor,
    k: Tensor,
    *,
    rows: int | None = None,
    source_row: Tensor | None = None,
    inject: Tensor | None = None,
    token_map: Tensor | None = None,
    blend: Tensor | None = None,
    reweight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """P' of cross_attention as a new tensor that carries gradients: what a save holds under them.

    Arguments as in cross_attention; rows: how many of the last rows where no tensor says so
    (None: all). Returns (S, heads, queries, keys) in q's dtype. The map is formed in PyTorch, as
    it is the result; its gradients recompute it, so that none is kept for them.
    """
    from . import gradients

    q, k = as_autocast(q, k)
    edit = dict(source_row=source_row, inject=inject, token_map=token_map, blend=blend)
    return gradients.edited_map(q, k, rows, **edit, reweight=reweight, bias=bias, scale=scale)


def fold(
    v: Tensor,
    has_source: bool,
    token_map: Tensor | None,
    blend: Tensor | None,
    reweight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(V_own, V_source) such that the edited output is P_own V_own + P_source V_source; None: zero.

        V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

    Exact, because the edit is linear in both maps. v: (S, heads, keys, D), the rows that are
    edited; the result has its dtype and is computed in float32 at least. blend, reweight: (S,
    keys) or (S, heads, keys). The kernel in fold.py does the same; this is what impl="sdpa" uses,
    and the gradients.
    """
    x = v if v.dtype == torch.float64 else v.float()
    if reweight is not None:
        x = as_column(reweight) * x
    if not has_source:
        return x.to(v.dtype), None
    own = None
    if blend is not None:
        own = ((1 - as_column(blend)) * x).to(v.dtype)
        x = as_column(blend) * x
    if token_map is not None:
        x = token_map[:, None].to(x.dtype) @ x
    return own, x.to(v.dtype)


def as_column(table: Tensor) -> Tensor:
    """(S, keys) or (S, heads, keys) as (S, 1 or heads, keys, 1)."""
    return table[:, None, :, None] if table.ndim == 2 else table[..., None]


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast that is on, as scaled_dot_product_attention takes
    them."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in DTYPES else x for x in tensors)


# Checks. They look at shapes, dtypes and devices only, never at values.


def check(
    q,
    k,
    v,
    source_row=None,
    inject=None,
    token_map=None,
    blend=None,
    reweight=None,
    save=None,
    save_mean=None,
    *,
    bias=None,
    kv_row=None,
    own_value=None,
) -> None:
    """ValueError unless q, k, v and the edit agree in shape, dtype and device; of every
    implementation."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "q, k, v: expected 4 dimensions (batch, heads, tokens, head_dim), "
            f"got {shapes(q, k, v)}"
        )
    B, H, N, D = q.shape
    if k.shape != (B, H, k.shape[2], D) or v.shape != k.shape:
        raise ValueError(
            f"q, k, v: expected (B, H, N, D), (B, H, L, D), (B, H, L, D), got {shapes(q, k, v)}"
        )
    if 0 in q.shape or k.shape[2] == 0:
        raise ValueError(f"q, k, v: expected no empty dimension, got {shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
    if kv_row is not None and (kv_row.ndim != 2 or not kv_row.shape[1]):
        raise ValueError(f"kv_row: expected shape (S, M), M at least 1, got {tuple(kv_row.shape)}")

    L = k.shape[2] * (1 if kv_row is None else kv_row.shape[1])
    ints, maps, tables = (torch.int32, torch.int64), (*DTYPES, q.dtype), (torch.float32,)
    edit = {  # name: (tensor, the shapes it may have after the rows, dtypes)
        "source_row": (source_row, [()], ints),
        "inject": (inject, [(H, N, L)], maps),
        "token_map": (token_map, [(L, L)], tables),
        "blend": (blend, [(L,), (H, L)], tables),
        "reweight": (reweight, [(L,), (H, L)], tables),
        "bias": (bias, [(h, n, L) for h in (H, 1) for n in (N, 1)], maps),
        "kv_row": (kv_row, None if kv_row is None else [kv_row.shape[1:]], ints),
        "own_value": (own_value, [()], (torch.float32, torch.bool)),
        "save": (save, [(H, N, L)], maps),
        "save_mean": (save_mean, [(N, L)], tables),
    }
    check_edit(q, {name: what for name, what in edit.items() if what[0] is not None})
    if source_row is not None and inject is not None:
        raise ValueError("edit: expected one source, got both source_row and inject")
    if source_row is None and inject is None and (token_map is not None or blend is not None):
        name = "token_map" if token_map is not None else "blend"
        raise ValueError(f"{name}: expected a source (source_row or inject) with it, got none")
    if own_value is not None and k.shape[2] != N:
        raise ValueError(f"own_value: expected as many keys as queries, {N}, got {k.shape[2]}")
    if own_value is not None and kv_row is not None and (save is not None or save_mean is not None):
        raise ValueError(
            "own_value: expected no saved map with kv_row, whose keys are not the row's own"
        )
    for name, x in (("save", save), ("save_mean", save_mean)):
        if x is not None and overlaps(x):
            raise ValueError(
                f"{name}: expected memory of its own for every element, got strides {x.stride()}"
            )


def check_edit(q: Tensor, edit: dict) -> None:
    """ValueError unless all tensors have the same number of rows, and the shape, dtype and device
    they should."""
    if not edit:
        return
    rows = {name: x.shape[0] if x.ndim else 0 for name, (x, _, _) in edit.items()}
    S, B = next(iter(rows.values())), q.shape[0]
    if any(each != S for each in rows.values()) or not 1 <= S <= B:
        raise ValueError(
            f"edit: expected one number of rows from 1 to the batch, {B}, in every tensor, "
            f"got {rows}"
        )
    for name, (x, allowed, dtypes) in edit.items():
        if tuple(x.shape[1:]) not in allowed:
            expected = " or ".join(str((S, *shape)) for shape in dict.fromkeys(allowed))
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device} like q, got {x.device}")


def overlaps(x: Tensor) -> bool:
    """Whether two elements of x may lie at one address: a stride is shorter than what the smaller
    ones span."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < span:
            return True
        span += stride * (size - 1)
    return False


def check_folded(folded: Folded, v: Tensor, source_row, inject, *others: Tensor | None) -> None:
    """ValueError unless `folded` is of an edit with this source, and nothing else says what it
    says."""
    if any(x is not None for x in others):
        raise ValueError(
            "folded: expected no token_map, blend, reweight, save or save_mean beside it"
        )
    if source_row is None and inject is None and folded.v_source is not None:
        raise ValueError(
            "folded: expected what fold_values made for this source, got V_source without one"
        )
    if folded.v is None and inject is None or inject is not None and folded.v_source is None:
        raise ValueError("folded: expected what fold_values made for this source, 'inject'")
    if folded.v is not None and folded.v.shape != v.shape:
        raise ValueError(
            f"folded: expected values of shape {tuple(v.shape)} like v, got {tuple(folded.v.shape)}"
        )


def check_kernel(q: Tensor, k: Tensor, at_most: int | None = None) -> None:
    """ValueError for what the Triton kernels do not take."""
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim: expected a multiple of 8 up to {MAX_HEAD_DIM}, got {q.shape[3]}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v: expected {' or '.join(map(str, DTYPES))}, got {q.dtype}")
    if at_most is not None and k.shape[2] > at_most:
        raise ValueError(
            f"cross_attention takes at most {at_most} keys, got {k.shape[2]}; "
            "attention() takes any number, and impl='sdpa' edits and saves maps of more"
        )


def shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether the backward pass will ask for a gradient; RuntimeError for forward-mode
    derivatives."""
    if torch.autograd.forward_ad._current_level >= 0:
        unpack_dual = torch.autograd.forward_ad.unpack_dual
        if any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(
                "the Triton kernels have no forward-mode derivatives; use impl='sdpa'"
            )
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


# Registration. The schemas are the ops' signatures; (a!) marks an argument that is written to.

EDIT = (
    "Tensor? source_row, Tensor? inject, Tensor? token_map, Tensor? blend, Tensor? reweight, "
    "Tensor? bias"
)
SCHEMAS = {
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? source_row, Tensor? bias, Tensor? kv_row, "
    "Tensor? own_value, float? scale) -> Tensor",
    "cross_attention": f"(Tensor q, Tensor k, Tensor v, {EDIT}, float? scale) -> Tensor",
    "cross_attention_folded": "(Tensor q, Tensor k, Tensor v, Tensor? v_source, "
    "Tensor? source_row, Tensor? inject, Tensor? bias, bool keep_own, float? scale) -> Tensor",
    "cross_attention_save": f"(Tensor q, Tensor k, Tensor v, {EDIT}, Tensor(a!)? save, "
    "Tensor(b!)? save_mean, float? scale) -> Tensor",
    "fold": "(Tensor v, Tensor? token_map, Tensor? blend, Tensor? reweight, bool has_source, "
    "bool stored) -> Tensor[]",
    "attention_backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? v_source, "
    "Tensor? source_row, Tensor? bias, float? scale) -> (Tensor, Tensor, Tensor, Tensor)",
}


def empty_out(q: Tensor, *args) -> Tensor:
    """The output, uninitialised; of the fake kernels too, so both promise the same strides."""
    B, H, N, D = q.shape
    return torch.empty_strided(q.shape, (N * H * D, D, H * D, 1), dtype=q.dtype, device=q.device)


def empty_folded(
    v: Tensor, token_map, blend, reweight, has_source: bool, stored: bool
) -> list[Tensor]:
    """The tensors that `fold` returns, uninitialised: v, v_source, or one of them."""
    S = next(x.shape[0] for x in (token_map, blend, reweight) if x is not None)
    own = [] if stored and blend is None else [empty_out(v)]
    beside = has_source and (stored or blend is not None)
    return own + ([empty_out(v[v.shape[0] - S :])] if beside else [])


def empty_gradients(grad_out, q, k, v, v_source, source_row, bias, scale) -> tuple[Tensor, ...]:
    """The tensors that `attention_backward` returns, uninitialised; the last is empty without
    v_source."""
    source = v.new_empty(0) if v_source is None else empty_out(v_source)
    return empty_out(q), empty_out(k), empty_out(v), source


def check_attention(q, k, v, source_row, bias, kv_row, own_value, scale):
    check(q, k, v, source_row, bias=bias, kv_row=kv_row, own_value=own_value)
    check_kernel(q, k)


def check_cross_attention(q, k, v, source_row, inject, token_map, blend, reweight, bias, *others):
    *saves, _ = others
    check(q, k, v, source_row, inject, token_map, blend, reweight, *saves, bias=bias)
    check_kernel(q, k, MAX_EDITED_KEYS)


def check_cross_attention_folded(q, k, v, v_source, source_row, inject, bias, keep_own, scale):
    check(q, k, v, source_row, inject, bias=bias)
    check_kernel(q, k, MAX_EDITED_KEYS)
    if v_source is not None:
        rows = (source_row if inject is None else inject).shape[:1]
        if v_source.shape != rows + v.shape[1:] or v_source.dtype != v.dtype:
            expected = f"{tuple(rows + v.shape[1:])}, {v.dtype}"
            raise ValueError(
                f"v_source: expected {expected}, got {tuple(v_source.shape)}, {v_source.dtype}"
            )


def check_fold(v, token_map, blend, reweight, has_source, stored):
    check(v, v, v)
    check_kernel(v, v, MAX_EDITED_KEYS)
    (H, L), tables = v.shape[1:3], (torch.float32,)
    edit = {
        "token_map": (token_map, [(L, L)], tables),
        "blend": (blend, [(L,), (H, L)], tables),
        "reweight": (reweight, [(L,), (H, L)], tables),
    }
    check_edit(v, {name: what for name, what in edit.items() if what[0] is not None})
    if not has_source and (token_map is not None or blend is not None):
        raise ValueError("fold_values: expected a source with a token_map or blend, got none")


def check_attention_backward(grad_out, q, k, v, v_source, source_row, bias, scale):
    """Nothing: gradients.py calls it with what the forward op has checked."""


# What computes each op: (inputs) -> a function of the inputs and the output that launches kernels.


def prepare(name: str, args: tuple, out) -> Callable:
    """The function of (*args, out) that computes an op for inputs like these; the import of Triton
    is here."""
    from . import attention, backward, cross_attention, fold

    if name == "cross_attention":
        return prepare_edit(fold.prepare, cross_attention.prepare, args, out)
    of = {
        "attention": attention.prepare,
        "cross_attention_folded": cross_attention.prepare,
        "cross_attention_save": cross_attention.prepare_save,
        "fold": fold.prepare,
        "attention_backward": backward.prepare,
    }
    return of[name](*args, out)


def prepare_edit(
    prepare_fold: Callable, prepare_attend: Callable, args: tuple, out: Tensor
) -> Callable:
    """cross_attention: fold the tables into the values, if there are any, and attend."""
    q, k, v, source_row, inject, token_map, blend, reweight, bias, scale = args
    has_source, stored = source_row is not None or inject is not None, inject is not None
    folds = token_map is not None or blend is not None or reweight is not None

    def values(v, *tables):
        """(Folded, its tensors): allocated, or what they are without a table."""
        if folds:
            made = empty_folded(v, *tables, has_source, stored)
            return unpack(made, stored and blend is None), made
        return Folded(v, None) if inject is None else Folded(None, v[-inject.shape[0] :]), []

    first, made = values(v, token_map, blend, reweight)
    fold = prepare_fold(v, token_map, blend, reweight, has_source, stored, made) if folds else None
    keep_own = first.v is not None
    used = (first.v if keep_own else v, first.v_source)
    attend = prepare_attend(q, k, *used, source_row, inject, bias, keep_own, scale, out)

    def launch(q, k, v, source_row, inject, token_map, blend, reweight, bias, scale, out):
        (own, v_source), made = values(v, token_map, blend, reweight)
        if folds:
            fold(v, token_map, blend, reweight, has_source, stored, made)
        used = (v if own is None else own, v_source)
        attend(q, k, *used, source_row, inject, bias, keep_own, scale, out)

    return launch


KNOWN = {}  # signature of an op's inputs -> the function that launches its kernels
MOST = 4096  # signatures that are kept
# how many of an op's inputs are tensors; they come first
TENSORS = {name: schema.split("->")[0].count("Tensor") for name, schema in SCHEMAS.items()}


def refuse_cpu(q: Tensor) -> None:
    """ValueError for a tensor that no kernel can be launched on."""
    import triton

    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton kernels need a CUDA device, got {q.device}; impl='sdpa' runs everywhere"
        )


def run(name: str, args: tuple):
    """The op on its device: checked and prepared at the first call with inputs like these, then
    launched.

    Whether a pointer is a multiple of 16 bytes is part of that, because Triton compiles it in.
    """
    tensors, numbers = args[: TENSORS[name]], args[TENSORS[name] :]
    facts = [
        x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        for x in tensors
    ]
    key = (name, numbers, *facts)
    launch = KNOWN.get(key)
    if launch is None:
        CHECKS[name](*args)
        refuse_cpu(args[0])
    with torch.cuda.device_of(args[0]):
        out = EMPTY[name](*args)
        if launch is None:
            if len(KNOWN) >= MOST:
                KNOWN.clear()
            launch = KNOWN[key] = prepare(name, args, out)
        launch(*args, out)
    if name == "cross_attention_save":  # by pointer, which caches by version do not see
        torch.autograd.graph.increment_version([x for x in args[-3:-1] if x is not None])
    return out


def call(op, *args):
    """op(*args) past the autograd key, which would only look for inputs that need a gradient:
    `needs_gradient` has."""
    if torch.compiler.is_compiling():  # which cannot trace the guard
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def register(name: str, schema: str) -> None:
    op = f"minisd_kernels::{name}"
    torch.library.define(op, schema, tags=torch.Tag.pt2_compliant_tag)
    overload = getattr(torch.ops.minisd_kernels, name).default

    def fake(*args):
        CHECKS[name](*args)
        return EMPTY[name](*args)

    def refuse_gradients(*args):
        if needs_gradient(*[x for x in args if isinstance(x, Tensor)]):
            raise RuntimeError(
                f"torch.ops.minisd_kernels.{name} has no backward; minisd_kernels.ops has"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    torch.library.impl(op, ("CPU", "CUDA"))(lambda *args: run(name, args))
    torch.library.register_fake(op)(fake)
    torch.library.impl(op, "Autograd")(refuse_gradients)


CHECKS = {
    "attention": check_attention,
    "cross_attention": check_cross_attention,
    "cross_attention_folded": check_cross_attention_folded,
    "cross_attention_save": check_cross_attention,
    "fold": check_fold,
    "attention_backward": check_attention_backward,
}
EMPTY = dict.fromkeys(SCHEMAS, lambda q, *args: empty_out(q))
EMPTY |= {"fold": empty_folded, "attention_backward": empty_gradients}
for _name, _schema in SCHEMAS.items():
    register(_name, _schema)
