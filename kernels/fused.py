"""The public fused ops beside attention: `group_norm`, `group_norm_silu`, `layer_norm`,
`add_layer_norm`, `geglu`, checked here, computed in norms.py.

As in ops.py: importing this imports torch only, and each op is registered with torch.library
(dispatch.py); there is no backward. minisd's models use them on CUDA where no gradient is asked for
(minisd/models/ops.py).
"""

import torch
from torch import Tensor

from .checks import DTYPES, check_tensor
from .dispatch import inference, register

MAX_WIDTH = 16384  # layer_norm holds whole rows


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm(x + shift), for images in channels_last memory.

        y = (x + shift - mean) / sqrt(var + eps) * weight + bias
        mean and var of x + shift over a group of channels of one image; without a shift it is 0

    x: (batch, channels, height, width), channels_last, float16, bfloat16 or float32; weight, bias:
    (channels,), the same dtypes. shift: (rows, channels), the same dtypes, is added to x first, row
    b % rows to image b: in float32, and only to the means, so where it takes away an offset of x,
    what x lost to that offset stays lost. Returns x's shape, dtype and memory format. ValueError:
    shapes, dtypes, devices, memory format. TypeError: no tensor. RuntimeError: an input needs a
    gradient. Source: Wu and He 2018.
    """
    return inference("group_norm", x, weight, bias, shift, groups, eps)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x, groups, weight, bias, eps, shift)), with the same arguments and errors."""
    return inference("group_norm_silu", x, weight, bias, shift, groups, eps)


def check_images(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> None:
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
    if shift is None:
        return
    check_tensor("shift", shift)
    rows = len(shift) if shift.ndim == 2 else 0
    if not rows or x.shape[0] % rows or shift.shape[1] != x.shape[1] or shift.stride(1) != 1:
        raise ValueError(
            f"shift: expected contiguous rows of {x.shape[1]} channels, as many as divide the "
            f"{x.shape[0]} images, got {tuple(shift.shape)}, {shift.stride()}"
        )
    check_like(x, "shift", shift)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    x: (..., channels), contiguous, at most 16384 channels, float16, bfloat16 or float32; weight,
    bias: (channels,), the same dtypes. ValueError and RuntimeError as in group_norm_silu. Source:
    Ba et al. 2016.
    """
    return inference("layer_norm", x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """A residual sum and the norm behind it, x + h and layer_norm(x + h, weight, bias, eps), with
    x and h read once.

    h: of x's shape and dtype, contiguous. The norm is of the sum as it is returned, rounded.
    TypeError: h is no tensor. ValueError and RuntimeError as in layer_norm.
    """
    return inference("add_layer_norm", x, h, weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """h * gelu(gate) with h the first half of the last dimension, gate the second, and the exact
    GELU.

    x: (..., 2 * channels), contiguous, float16, bfloat16 or float32 -> (..., channels). ValueError
    and RuntimeError as in group_norm_silu. Source: Shazeer 2020.
    """
    return inference("geglu", x)


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_rows(x)
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x: expected at most {MAX_WIDTH} channels, got {x.shape[-1]}")
    check(x, x.shape[-1], weight, bias)


def check_add_layer_norm(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_layer_norm(x, weight, bias, eps)
    check_tensor("h", h)
    if h.shape != x.shape or h.dtype != x.dtype or not h.is_contiguous():
        raise ValueError(
            f"h: expected contiguous {tuple(x.shape)}, {x.dtype}, like x, got {tuple(h.shape)}, "
            f"{h.dtype}, strides {h.stride()}"
        )
    check_like(x, "h", h)


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
        check_like(x, name, y)
        if y is not x and (y.shape != (channels,) or y.stride() != (1,)):
            raise ValueError(
                f"{name}: expected contiguous shape ({channels},), got {tuple(y.shape)}, "
                f"{y.stride()}"
            )


def check_like(x: Tensor, name: str, y: Tensor) -> None:
    """ValueError unless the kernels take y's dtype, and it is where x is."""
    if y.dtype not in DTYPES:
        raise ValueError(f"{name}: expected {' or '.join(map(str, DTYPES))}, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {y.device}")


def empty_out(x: Tensor, *args) -> Tensor:
    """The output of the norms, uninitialised."""
    return torch.empty_like(x)


def empty_pair(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The sum and its norm, uninitialised."""
    return torch.empty_like(x), torch.empty_like(x)


def empty_half(x: Tensor) -> Tensor:
    """The output of geglu, uninitialised."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


IMAGES = "(Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps) -> Tensor"
ROWS = "Tensor weight, Tensor bias, float eps)"
for _name, _schema, _check, _empty in (
    ("group_norm", IMAGES, check_images, empty_out),
    ("group_norm_silu", IMAGES, check_images, empty_out),
    ("layer_norm", f"(Tensor x, {ROWS} -> Tensor", check_layer_norm, empty_out),
    (
        "add_layer_norm",
        f"(Tensor x, Tensor h, {ROWS} -> (Tensor, Tensor)",
        check_add_layer_norm,
        empty_pair,
    ),
    ("geglu", "(Tensor x) -> Tensor", check_geglu, empty_half),
):
    register(_name, _schema, _check, _empty, "torch.nn.functional")
