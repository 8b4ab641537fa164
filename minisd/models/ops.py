"""The models' layers as plain functions: each chooses the code by what it is given, at the call.

Every function takes the torch module that holds the parameters. Where something is special about it
(hooks, a LoRA wrapper or another class in its place, a parametrisation, gradients, autocast,
torch.compile) it is called as any module is, layer(x). Where nothing is, on a CPU:

- torch gives a float32 linear layer to MKL, which leaves AVX-512 unused on AMD processors; `linear`
  gives it to oneDNN.
- oneDNN brings the weights of a 3x3 convolution into an order of its own at every call, which on
few
  positions takes as long as the convolution itself. There `conv2d` is one product of the 3x3
  windows with the weights as they lie in channels_last memory: no copy of weights exists, none can
  be stale.
- a 1x1 convolution is a linear layer over the channels.

The results are the same up to the order of the sums. docs/benchmarks.md has what it gains.
"""

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..engine import bands

Layer = Any  # the nn.Module that holds the parameters, or what somebody put in its place

# Rows (batch x height x width) up to which a 3x3 convolution is one product of windows and weights.
# Above, oneDNN's convolution is quicker although it reorders the weights: measured on widths of 640
# to 2560 in each dtype.
FEW_ROWS = {torch.float32: 512, torch.bfloat16: 128}
FEWER = 2  # times fewer rows than output channels


@functools.cache
def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN computes in that dtype."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (torch.backends.mkldnn.is_available() and x86):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def is_plain(layer: Layer, kind: type) -> bool:
    """Whether the layer is exactly torch's own and nobody watches or changes its calls."""
    weight = layer.__dict__.get("_parameters", {}).get("weight")
    own = type(layer) is kind and "forward" not in layer.__dict__ and not is_hooked(layer)
    return own and type(weight) is nn.Parameter


def is_hooked(layer: Layer) -> bool:
    """Whether a call of the layer calls somebody else, too."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return bool(hooks or layer._backward_pre_hooks or torch_module._has_any_global_hook())


def by_onednn(layer: Layer, kind: type, x: Tensor) -> bool:
    """Whether oneDNN may be called with this layer's parameters in place of layer(x)."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not is_plain(layer, kind):
        return False
    # Forward-mode derivatives and torch.func: oneDNN's operators know neither.
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    weight = layer.weight
    if x.dtype != weight.dtype or weight.device != x.device or not onednn_computes(x.dtype):
        return False
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not (differentiable or torch.is_autocast_enabled("cpu"))


def linear(layer: Layer, x: Tensor) -> Tensor:
    """y = x W^T + b. x: (..., in) -> (..., out)."""
    if by_onednn(layer, nn.Linear, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def conv2d(layer: Layer, x: Tensor) -> Tensor:
    """The convolution of x (B, in, h, w)."""
    if not (by_onednn(layer, nn.Conv2d, x) and is_usual(layer)):
        return layer(x)
    weight, bias, padding = layer.weight, layer.bias, layer.padding
    once = layer.stride == layer.dilation == (1, 1)
    if once and layer.kernel_size == (1, 1) and padding == (0, 0):
        windows = x.permute(0, 2, 3, 1)  # (B, h, w, in)
    elif once and layer.kernel_size == (3, 3) and padding == (1, 1) and is_few(x, weight):
        windows = windows_3x3(x)
    else:  # by oneDNN, whatever torch would choose
        numbers = list(padding), list(layer.stride), list(layer.dilation), 1
        op = torch.ops.mkldnn._convolution_pointwise
        return op(x, weight, bias, *numbers, "none", [], "")
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (out, kernel * in), a view
    y = torch.ops.mkldnn._linear_pointwise(windows, matrix, bias, "none", [], "")
    return y.permute(0, 3, 1, 2)  # channels_last memory


def is_usual(layer: Layer) -> bool:
    """Whether a convolution is one that `conv2d` writes out: of the models' kinds and memory."""
    zeros = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    ordered = layer.weight.is_contiguous(memory_format=torch.channels_last)
    return zeros and ordered and layer.groups == 1


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether x (B, C, h, w) has so few positions that bringing the weights in order is what costs.

    The windows are rows x 9 C numbers, the weights out x 9 C: so few rows beside the channels, too.
    """
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    return rows <= FEW_ROWS[x.dtype] and FEWER * rows <= weight.shape[0]


def windows_3x3(x: Tensor) -> Tensor:
    """The 3x3 window around each position, zeros outside: (B, C, h, w) -> (B, h, w, 9 C)."""
    B, C, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()  # (B, h + 2, w + 2, C)
    b, row, column, channel = padded.stride()
    windows = padded.as_strided((B, h, w, 3, 3, C), (b, row, column, row, column, channel))
    return windows.reshape(B, h, w, 9 * C)


# Without gradients the next ones write over a tensor that is not needed again: on a CPU, memory
# that is fresh from the system costs five times as much as the arithmetic.


def group_norm_silu(norm: Layer, x: Tensor) -> Tensor:
    """silu(norm(x)). x: (B, C, h, w)."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def norm_silu_conv(norm: Layer, conv: Layer, x: Tensor, in_place: bool = False) -> Tensor:
    """conv(silu(norm(x))), large images in bands (engine/bands.py); in_place: x is needed no
    more."""
    if bands.is_large(x) and is_plain(norm, nn.GroupNorm) and is_plain(conv, nn.Conv2d):
        return bands.norm_silu_conv(norm, conv, x, in_place)
    return conv2d(conv, group_norm_silu(norm, x))


def upsample_conv(conv: Layer, x: Tensor, size: tuple[int, int]) -> Tensor:
    """conv(x enlarged to `size`, each position the nearest), large images in bands."""
    twice = (2 * x.shape[2], 2 * x.shape[3])
    if bands.is_large(x, 2) and tuple(size) == twice and is_plain(conv, nn.Conv2d):
        return bands.upsample_conv(conv, x)
    return conv2d(conv, F.interpolate(x, size=size, mode="nearest"))


def add_conv(conv: Layer, x: Tensor, h: Tensor) -> Tensor:
    """conv(x) + h for a 1x1 convolution, in the memory of h where it may; large images in bands."""
    if bands.is_large(x) and is_plain(conv, nn.Conv2d):
        return bands.add_conv(conv, x, h)
    return add(conv2d(conv, x), h)


def geglu(x: Tensor) -> Tensor:
    """h * gelu(gate), x = [h, gate] along the last dimension, the exact (erf) GELU."""
    h, gate = x.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        return h * F.gelu(gate)
    return F.gelu(gate).mul_(h)


def add(x: Tensor, h: Tensor) -> Tensor:
    """x + h, in the memory of h; where x has fewer rows they count for every group of h."""
    groups = h.unflatten(0, (-1, x.shape[0]))
    if torch.is_grad_enabled() or x.dtype != h.dtype:
        return (x + groups).flatten(0, 1)
    groups.add_(x)
    return h  # not a view of `groups`: its strides would hide channels_last


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """The whole batch of x group after group until it has `rows` rows; x itself if it has them."""
    return x if x.shape[0] == rows else x.repeat(rows // x.shape[0], *[1] * (x.ndim - 1))
