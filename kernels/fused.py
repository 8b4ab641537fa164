"""The public fused ops beside attention: `group_norm`, `group_norm_silu`, `layer_norm`, `geglu`,
checked here, computed in norms.py.

As in ops.py: importing this imports torch only, and each op is registered with torch.library
(dispatch.py); there is no backward. minisd's models use them on CUDA where no gradient is asked for
(minisd/models/ops.py).
"""

import torch
from torch import Tensor

from .checks import DTYPES
from .dispatch import inference, register

MAX_WIDTH = 16384  # layer_norm holds whole rows


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """GroupNorm(x), for images in channels_last memory.

        y = (x - mean) / sqrt(var + eps) * weight + bias
        mean and var over a group of channels of one image

    x: (batch, channels, height, width), channels_last, float16, bfloat16 or float32; weight, bias:
    (channels,), the same dtypes. Returns x's shape, dtype and memory format. ValueError: shapes,
    dtypes, devices, memory format. RuntimeError: an input needs a gradient. Source: Wu and He 2018.
    """
    return inference("group_norm", x, weight, bias, groups, eps)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """silu(group_norm(x, groups, weight, bias, eps)), with the same arguments and errors."""
    return inference("group_norm_silu", x, weight, bias, groups, eps)


def check_images(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> None:
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
    return inference("layer_norm", x, weight, bias, eps)


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


def empty_out(x: Tensor, *args) -> Tensor:
    """The output of the norms, uninitialised."""
    return torch.empty_like(x)


def empty_half(x: Tensor) -> Tensor:
    """The output of geglu, uninitialised."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


NORM = "(Tensor x, Tensor weight, Tensor bias, {}float eps) -> Tensor"
for _name, _schema, _check, _empty in (
    ("group_norm", NORM.format("int groups, "), check_images, empty_out),
    ("group_norm_silu", NORM.format("int groups, "), check_images, empty_out),
    ("layer_norm", NORM.format(""), check_layer_norm, empty_out),
    ("geglu", "(Tensor x) -> Tensor", check_geglu, empty_half),
):
    register(_name, _schema, _check, _empty, "torch.nn.functional")
