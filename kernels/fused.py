"""The public fused ops beside attention: `group_norm`, `group_norm_silu`, `layer_norm`, `geglu`,
checked here, computed in norms.py.

As in ops.py: importing this imports torch only, each op is registered with torch.library, what
depends on shapes, dtypes and devices alone is done once (`run`), and there is no backward. minisd's
models use them on CUDA where no gradient is asked for (minisd/models/ops.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import DTYPES
from .dispatch import MOST, call, needs_gradient

MAX_WIDTH = 16384  # layer_norm holds whole rows


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """GroupNorm(x), for images in channels_last memory.

        y = (x - mean) / sqrt(var + eps) * weight + bias
        mean and var over a group of channels of one image

    x: (batch, channels, height, width), channels_last, float16, bfloat16 or float32; weight, bias:
    (channels,), the same dtypes. Returns x's shape, dtype and memory format. ValueError: shapes,
    dtypes, devices, memory format. RuntimeError: an input needs a gradient. Source: Wu and He 2018.
    """
    return without_gradient("group_norm", x, groups, weight, bias, eps)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """silu(group_norm(x, groups, weight, bias, eps)), with the same arguments and errors."""
    return without_gradient("group_norm_silu", x, groups, weight, bias, eps)


def check_images(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"x: expected (batch, channels, height, width), none of them 0, got {tuple(x.shape)}"
        )
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels, got {groups}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"x: expected channels_last memory, got strides {x.stride()} for shape {tuple(x.shape)}"
        )
    check(x, x.shape[1], weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    x: (..., channels), contiguous, at most 16384 channels, float16, bfloat16 or float32; weight,
    bias: (channels,), the same dtypes. ValueError and RuntimeError as in group_norm_silu. Source:
    Ba et al. 2016.
    """
    return without_gradient("layer_norm", x, weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """h * gelu(gate) with h the first half of the last dimension, gate the second, and the exact
    GELU.

    x: (..., 2 * channels), contiguous, float16, bfloat16 or float32 -> (..., channels). ValueError
    and RuntimeError as in group_norm_silu. Source: Shazeer 2020.
    """
    return without_gradient("geglu", x)


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_rows(x)
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x: expected at most {MAX_WIDTH} channels, got {x.shape[-1]}")
    check(x, x.shape[-1], weight, bias)


def check_geglu(x: Tensor) -> None:
    check_rows(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, got {x.shape[-1]}")
    check(x, x.shape[-1])


def check_rows(x: Tensor) -> None:
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(
            f"x: expected at least one dimension, none of them 0, got shape {tuple(x.shape)}"
        )
    if not x.is_contiguous():
        raise ValueError(
            f"x: expected contiguous memory, got strides {x.stride()} for shape {tuple(x.shape)}"
        )


def check(x: Tensor, channels: int, *parameters: Tensor) -> None:
    """ValueError unless dtypes, devices and the shapes of the parameters fit."""
    for name, y in zip(("x", "weight", "bias"), (x, *parameters)):
        if y.dtype not in DTYPES:
            raise ValueError(f"{name}: expected {' or '.join(map(str, DTYPES))}, got {y.dtype}")
        if y.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {y.device}")
        if y is not x and (y.shape != (channels,) or y.stride() != (1,)):
            raise ValueError(
                f"{name}: expected contiguous shape ({channels},), got {tuple(y.shape)}, "
                f"{y.stride()}"
            )


NO_BACKWARD = (
    "the fused Triton kernels have no backward; use torch.nn.functional or torch.no_grad()"
)


def without_gradient(name: str, *args) -> Tensor:
    """The op; RuntimeError where an input needs a gradient."""
    if needs_gradient(*[x for x in args if isinstance(x, Tensor)]):
        raise RuntimeError(NO_BACKWARD)
    return call(getattr(torch.ops.minisd_kernels, name).default, *args)


# Registration, as in ops.py.

CHECKS = {
    "group_norm": check_images,
    "group_norm_silu": check_images,
    "layer_norm": check_layer_norm,
    "geglu": check_geglu,
}

SCHEMAS = {
    "group_norm": "(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    "group_norm_silu": "(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    "layer_norm": "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    "geglu": "(Tensor x) -> Tensor",
}


def empty_out(x: Tensor, *args) -> Tensor:
    """The output of both norms, uninitialised, and their fake kernel."""
    return torch.empty_like(x)


def empty_half(x: Tensor) -> Tensor:
    """The output of geglu, uninitialised, and its fake kernel."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


KNOWN: dict[tuple, Callable] = {}  # launches by what they are right for


def run(name: str, empty: Callable, x: Tensor, *args) -> Tensor:
    """Allocate the output and launch on x's device; prepared at the first call with such inputs."""
    facts = [
        (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15) if isinstance(a, Tensor) else a
        for a in (x, *args)
    ]
    key = (name, *facts)
    launch = KNOWN.get(key)
    if launch is None:
        CHECKS[name](x, *args)
    with torch.cuda.device_of(x):
        out = empty(x)
        if launch is None:
            if len(KNOWN) >= MOST:
                KNOWN.clear()
            launch = KNOWN[key] = prepare(name, x, *args, out)
        launch(x, *args, out)
    return out


def prepare(name: str, x: Tensor, *args) -> Callable:
    """What launches the op for tensors like these; ValueError without a card."""
    import triton

    from . import norms

    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton kernels need a CUDA device, got {x.device}; torch.nn.functional runs "
            f"everywhere"
        )
    return getattr(norms, f"prepare_{name}")(x, *args)


def register(name: str, schema: str, empty) -> None:
    def no_backward(ctx, grad):
        raise RuntimeError(NO_BACKWARD)

    op = f"minisd_kernels::{name}"
    torch.library.define(op, schema, tags=torch.Tag.pt2_compliant_tag)

    def fake(x, *args):
        CHECKS[name](x, *args)
        return empty(x)

    torch.library.impl(op, ("CPU", "CUDA"))(lambda x, *args: run(name, empty, x, *args))
    torch.library.register_fake(op, fake)
    torch.library.register_autograd(op, no_backward)


for _name, _schema in SCHEMAS.items():
    register(_name, _schema, empty_half if _name == "geglu" else empty_out)
