"""From a call of an op to the launches that compute it; each op is registered with torch.library.

The registration (schema, fake kernel) keeps an op as one node in torch.compile's graph. What
depends on shapes, strides, dtypes and devices alone, the checks and the choice of a launch, is
done at the first call and kept by them (`run`). Importing this module imports torch only; Triton
is imported by the first call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import CHECKS


def needs_gradient(*inputs: Any) -> bool:
    """Whether the backward pass will ask for a gradient; RuntimeError for forward-mode
    derivatives. inputs: tensors, and others that need none."""
    level, enabled = forward_ad._current_level, torch.is_grad_enabled()
    if level < 0 and not enabled:
        return False
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if level >= 0:
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(
                "the Triton kernels have no forward-mode derivatives; use impl='sdpa'"
            )
    return enabled and any(x.requires_grad for x in tensors)


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
    "cross_attention_save": f"(Tensor q, Tensor k, Tensor v, {EDIT}, Tensor(a!)? save, "
    "Tensor(b!)? save_mean, float? scale) -> Tensor",
    "attention_backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? v_source, "
    "Tensor? source_row, Tensor? bias, Tensor? grad_lse, float? scale, bool is_causal) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
}


def empty_out(q: Tensor, *args) -> Tensor:
    """The output, uninitialised."""
    B, H, N, D = q.shape
    return q.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1))


def empty_lse(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The output and the logarithms of the softmax's denominators, uninitialised."""
    return empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def empty_gradients(grad_out, q, k, v, v_source, *args) -> tuple[Tensor, ...]:
    """The tensors that `attention_backward` returns, uninitialised; the last is empty without
    v_source."""
    source = v.new_empty(0) if v_source is None else empty_out(v_source)
    return empty_out(q), empty_out(k), empty_out(v), source


# What computes each op: (inputs) -> a function of its tensors and the output that launches kernels.


def prepare(name: str, args: tuple, out) -> Callable:
    """The function of the tensors among args, and of out, that computes an op for inputs like
    these; the import of Triton is here."""
    from . import attention, backward, cross_attention, norms

    of = {
        "group_norm": norms.prepare_group_norm,
        "group_norm_silu": norms.prepare_group_norm_silu,
        "layer_norm": norms.prepare_layer_norm,
        "add_layer_norm": norms.prepare_add_layer_norm,
        "geglu": norms.prepare_geglu,
        "attention": attention.prepare,
        "attention_lse": attention.prepare,
        "cross_attention": cross_attention.prepare,
        "cross_attention_save": cross_attention.prepare,
        "attention_backward": backward.prepare,
    }
    return of[name](*args, out)


KNOWN = {}  # signature of an op's inputs -> the function that launches its kernels
MOST = 4096  # signatures that are kept
TENSORS: dict[str, int] = {}  # op -> how many of its inputs are tensors; they come first
EMPTY: dict[str, Callable] = {}  # op -> its output, uninitialised


def refuse_cpu(q: Tensor) -> None:
    """ValueError for a tensor that no kernel can be launched on."""
    import triton

    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton kernels need a CUDA device, got {q.device}; impl='sdpa' runs everywhere, "
            "as torch.nn.functional does"
        )


def run(name: str, *args):
    """The op on its device: checked and prepared at the first call with inputs like these, then
    launched.

    Whether a pointer is a multiple of 16 bytes is part of that, because Triton compiles it in.
    """
    device = args[0].get_device()  # -1: the interpreter's CPU
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return run(name, *args)
    tensors, numbers = args[: TENSORS[name]], args[TENSORS[name] :]
    try:
        facts = [
            x if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15)
            for x in tensors
        ]
    except AttributeError:  # not a tensor
        CHECKS[name](*args)  # which says what it is
        raise
    key = (name, numbers, *facts)
    launch = KNOWN.get(key) or prepared(key, args)
    out = EMPTY[name](*args)
    launch(*tensors, out)
    if name == "cross_attention_save":  # by pointer, which caches by version do not see
        torch.autograd.graph.increment_version([x for x in args[-3:-1] if x is not None])
    return out


def prepared(key: tuple, args: tuple) -> Callable:
    """What launches the op for inputs like these, kept from now on; ValueError if they do not
    fit."""
    name = key[0]
    CHECKS[name](*args)
    refuse_cpu(args[0])
    if len(KNOWN) >= MOST:
        KNOWN.clear()
    KNOWN[key] = prepare(name, args, EMPTY[name](*args))
    return KNOWN[key]


def is_eager(x: Tensor) -> bool:
    """Whether an op of x, of which no gradient is asked, is nothing but its launches: no compiler,
    tracer or mode looks on, and x is no tensor without values or of somebody's own class. Then the
    dispatcher is left out, which takes longer than all else before the launch."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not (x.is_cuda or x.is_cpu):
        return False
    c = torch._C
    looks_on = c._len_torch_dispatch_stack() or c._len_torch_function_stack()
    return not (looks_on or c._get_tracing_state() or c._functorch.peek_interpreter_stack())


def call(name: str, *args):
    """The op past the autograd key, which would only look for inputs that need a gradient:
    `needs_gradient` has."""
    if is_eager(args[0]):
        return run(name, *args)
    op = getattr(torch.ops.minisd_kernels, name).default
    if torch.compiler.is_compiling():  # which cannot trace the guard
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def inference(name: str, *args):
    """The op of what has no backward; RuntimeError where an input needs a gradient."""
    if not torch.is_grad_enabled() and forward_ad._current_level < 0 and is_eager(args[0]):
        return run(name, *args)
    return getattr(torch.ops.minisd_kernels, name).default(*args)  # which looks for one


def register(name: str, schema: str, check: Callable, empty: Callable, instead: str) -> None:
    """Make an op known to torch. check: of its inputs; empty: its output, of the fake kernel, too,
    so both promise the same strides; instead: what has a backward."""
    op = f"minisd_kernels::{name}"
    TENSORS[name] = schema.split("->")[0].count("Tensor")
    CHECKS[name], EMPTY[name] = check, empty
    torch.library.define(op, schema, tags=torch.Tag.pt2_compliant_tag)
    overload = getattr(torch.ops.minisd_kernels, name).default

    def fake(*args):
        CHECKS[name](*args)
        return EMPTY[name](*args)

    def refuse_gradients(*args):
        if needs_gradient(*args):
            raise RuntimeError(f"torch.ops.minisd_kernels.{name} has no backward; {instead} has")
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    torch.library.impl(op, ("CPU", "CUDA"))(partial(run, name))
    torch.library.register_fake(op)(fake)
    torch.library.impl(op, "Autograd")(refuse_gradients)


OUTPUTS = {"attention_lse": empty_lse, "attention_backward": empty_gradients}
for _name, _schema in SCHEMAS.items():
    _empty = OUTPUTS.get(_name, empty_out)
    register(_name, _schema, CHECKS[_name], _empty, "minisd_kernels.ops")
