"""From a call of an op to the launches that compute it; each op is registered with torch.library.

The registration (schema, fake kernel) keeps an op as one node in torch.compile's graph. What
depends on shapes, strides, dtypes and devices alone, the checks and the choice of a launch, is
done at the first call and kept by them (`run`). Importing this module imports torch only; Triton
is imported by the first call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.autograd.forward_ad
from torch import Tensor

from .checks import CHECKS


class Folded(NamedTuple):
    """The values of an edited cross-attention, `fold_values`; for the two arguments of the kernel.

    v: (batch, heads, keys, D), with V_own in the edited rows, or V_source if that is their only
    term and its map is recomputed; None: V_source of a stored map is the only term.
    v_source: (S, heads, keys, D), V_source beside V_own or of a stored map.
    """

    v: Tensor | None
    v_source: Tensor | None


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
ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? source_row, Tensor? bias, Tensor? kv_row, "
    "Tensor? own_value, float? scale, bool is_causal"
)
SCHEMAS = {
    "attention": f"({ATTENTION}) -> Tensor",
    "attention_lse": f"({ATTENTION}) -> (Tensor, Tensor)",
    "cross_attention": f"(Tensor q, Tensor k, Tensor v, {EDIT}, float? scale) -> Tensor",
    "cross_attention_folded": "(Tensor q, Tensor k, Tensor v, Tensor? v_source, "
    "Tensor? source_row, Tensor? inject, Tensor? bias, bool keep_own, float? scale) -> Tensor",
    "cross_attention_save": f"(Tensor q, Tensor k, Tensor v, {EDIT}, Tensor(a!)? save, "
    "Tensor(b!)? save_mean, float? scale) -> Tensor",
    "fold": "(Tensor v, Tensor? token_map, Tensor? blend, Tensor? reweight, bool has_source, "
    "bool stored) -> Tensor[]",
    "attention_backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? v_source, "
    "Tensor? source_row, Tensor? bias, Tensor? grad_lse, float? scale, bool is_causal) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
}


def empty_out(q: Tensor, *args) -> Tensor:
    """The output, uninitialised; of the fake kernels too, so both promise the same strides."""
    B, H, N, D = q.shape
    return q.new_empty_strided(q.shape, (N * H * D, D, H * D, 1))


def empty_lse(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The output and the logarithms of the softmax's denominators, uninitialised."""
    return empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def empty_folded(
    v: Tensor, token_map, blend, reweight, has_source: bool, stored: bool
) -> list[Tensor]:
    """The tensors that `fold` returns, uninitialised: v, v_source, or one of them; with as many
    heads as v, or as a table for single heads."""
    tables = [x for x in (token_map, blend, reweight) if x is not None]
    S, heads = (
        len(tables[0]),
        [x.shape[1] for x in (blend, reweight) if x is not None and x.ndim == 3],
    )
    if heads and heads[0] != v.shape[1]:
        v = v[:, :1].expand(-1, heads[0], -1, -1)
    own = [] if stored and blend is None else [empty_out(v)]
    beside = has_source and (stored or blend is not None)
    return own + ([empty_out(v[v.shape[0] - S :])] if beside else [])


def unpack(values: list[Tensor], only_source: bool) -> Folded:
    """The tensors that the op `fold` returned, named."""
    if only_source:
        return Folded(None, values[0])
    return Folded(values[0], values[1] if values[1:] else None)


def empty_gradients(grad_out, q, k, v, v_source, *args) -> tuple[Tensor, ...]:
    """The tensors that `attention_backward` returns, uninitialised; the last is empty without
    v_source."""
    source = v.new_empty(0) if v_source is None else empty_out(v_source)
    return empty_out(q), empty_out(k), empty_out(v), source


# What computes each op: (inputs) -> a function of the inputs and the output that launches kernels.


def prepare(name: str, args: tuple, out) -> Callable:
    """The function of (*args, out) that computes an op for inputs like these; the import of Triton
    is here."""
    from . import attention, backward, cross_attention, fold, saved_map

    if name == "cross_attention":
        return prepare_edit(fold.prepare, cross_attention.prepare, args, out)
    of = {
        "attention": attention.prepare,
        "attention_lse": attention.prepare,
        "cross_attention_folded": cross_attention.prepare,
        "cross_attention_save": saved_map.prepare,
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
        x if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15)
        for x in tensors
    ]
    key = (name, numbers, *facts)
    launch, device = KNOWN.get(key), args[0].get_device()  # -1: the interpreter's CPU
    if launch is None:
        CHECKS[name](*args)
        refuse_cpu(args[0])
    if device < 0 or device == torch.cuda.current_device():
        out = launched(key, launch, args)
    else:
        with torch.cuda.device(device):
            out = launched(key, launch, args)
    if name == "cross_attention_save":  # by pointer, which caches by version do not see
        torch.autograd.graph.increment_version([x for x in args[-3:-1] if x is not None])
    return out


def launched(key: tuple, launch: Callable | None, args: tuple):
    """The op's output, computed on the current device; without a launch, one is prepared and
    kept."""
    name = key[0]
    out = EMPTY[name](*args)
    if launch is None:
        if len(KNOWN) >= MOST:
            KNOWN.clear()
        launch = KNOWN[key] = prepare(name, args, out)
    launch(*args, out)
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


EMPTY = dict.fromkeys(SCHEMAS, lambda q, *args: empty_out(q))
EMPTY |= {"attention_lse": empty_lse, "fold": empty_folded}
EMPTY |= {"attention_backward": empty_gradients}
for _name, _schema in SCHEMAS.items():
    register(_name, _schema)
