"""The models' layers as plain functions: each chooses the code by what it is given, at the call.

Every function takes the torch module that holds the parameters. Where something is special about it
(hooks, a LoRA wrapper or another class in its place, a parametrisation, gradients, autocast,
torch.compile) it is called as any module is, layer(x). Where nothing is, on CUDA norms, with the
sum before them, and GEGLU are the kernels of minisd_kernels.fused, which read channels_last memory
as it lies and leave no intermediate result there, a 1x1 convolution is a linear layer over the
channels, and on a CPU:

- torch gives a float32 linear layer to MKL, which leaves AVX-512 unused on AMD processors; `linear`
  gives it to oneDNN.
- oneDNN brings the weights of a 3x3 convolution into an order of its own at every call, which on
  few positions takes as long as the convolution itself. There `conv2d` is one product of the 3x3
  windows with the weights as they lie in channels_last memory: no copy of weights exists, none can
  be stale. Of an enlarged image, and with many channels in float32, fewer multiplications do
  (convolutions.py).
- a 1x1 convolution is a linear layer over the channels.

The results are the same up to the order of the sums. docs/benchmarks.md has what it gains.

What an image comes to on a CPU does not depend on its batch, to the last bit. oneDNN's products
and convolutions have one order of sums for each row, however many there are, but for a single one
(`product`). What this file chooses it chooses by the size of one image, never of the batch. torch
cuts a batch among the threads wherever that falls, which changes the order of GroupNorm's sums, and
computes the last numbers of a cut by other instructions than the rest, which changes the last bits
of SiLU and GELU: so they get one image at a time, or are part of a product. Texts and decoded
images are computed one by one (minisd/pipeline.py). tests/test_batch.py compares bits.
"""

import functools
import importlib.util
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from minisd_kernels import fused
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..engine import bands
from .convolutions import BOTH, Edges, by_windows, in_parts, product, upsampled, winograd

Layer = Any  # the nn.Module that holds the parameters, or what somebody put in its place

# Positions (height x width) up to which a 3x3 convolution is one product of windows and weights.
# Above, other forms are quicker although they bring the weights in order: measured on widths of 640
# to 2560 in each dtype, on the two images of a guided step.
FEW = 64
FEWER = 4  # times fewer positions than output channels
TOGETHER = 2  # images at a time, where a batch of them would take much memory
POSITIONS = 2**13  # of all images that are computed at a time, where their number matters
GELU = "none"  # no approximation: the exact one, by erf
CHANNELS = 128  # from which on Winograd's form is quicker
# From so many positions torch's GroupNorm on a CPU cuts a batch among the threads, from so many
# elements an elementwise function, which computes that many together.
CUT, ELEMENTS, WIDE = 1024, 2**15, 32
ROWS = 2048  # tokens of a feed-forward at a time
HALF = (torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN computes in that dtype."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (torch.backends.mkldnn.is_available() and x86):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def plain(layer: Layer, kind: type) -> Mapping[str, Any] | None:
    """The parameters of a layer that is exactly torch's own and whose calls nobody watches or
    changes; None of any other."""
    if type(layer) is not kind or "forward" in layer.__dict__ or is_hooked(layer):
        return None
    own: Mapping[str, Any] = layer.__dict__["_parameters"]
    named = "weight" in own and "bias" in own
    return own if named and type(own["weight"]) is nn.Parameter else None


def is_plain(layer: Layer, kind: type) -> bool:
    """Whether it is one."""
    return plain(layer, kind) is not None


def is_known(module: nn.Module) -> bool:
    """Whether a call of the module does nothing but what its class in torch or minisd says."""
    own = type(module).__module__.startswith(("torch.nn.modules.", "minisd."))
    return own and "forward" not in module.__dict__ and not is_hooked(module)


def is_hooked(layer: Layer) -> bool:
    """Whether a call of the layer calls somebody else, too."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return bool(hooks or layer._backward_pre_hooks or torch_module._has_any_global_hook())


def is_inference(first: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but the values is asked for: no gradient, derivative, graph or autocast."""
    if torch.compiler.is_compiling():
        return False
    # Forward-mode derivatives and torch.func
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.is_grad_enabled():
        if any(x is not None and x.requires_grad for x in (first, *others)):
            return False
    some = torch._C._is_any_autocast_enabled()  # a tenth of the time of asking for the device
    return not (some and torch.is_autocast_enabled(first.device.type))


def by_onednn(layer: Layer, kind: type, x: Tensor) -> bool:
    """Whether oneDNN may be called with this layer's parameters in place of layer(x)."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    own = plain(layer, kind)
    if own is None or not onednn_computes(x.dtype):
        return False
    weight = own["weight"]
    alike = weight.dtype == x.dtype and weight.device == x.device
    return alike and is_inference(x, weight, own["bias"])


def is_on_card(x: Tensor) -> bool:
    """Whether cuDNN, cuBLAS and, where it is installed, Triton compute what is asked of x."""
    return x.is_cuda


def by_kernels(x: Tensor, *parameters: Tensor) -> bool:
    """Whether minisd_kernels.fused may compute something of x, and of parameters."""
    if not (HAS_TRITON and is_on_card(x)) or x.dtype not in fused.DTYPES or x.numel() == 0:
        return False
    return is_inference(x, *parameters)


def norm_for_kernels(
    norm: Layer, kind: type, x: Tensor, plus: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a plain norm that minisd_kernels.fused may compute of x, or of x + plus;
    else None."""
    own = plain(norm, kind)
    if own is None or own["bias"] is None:
        return None
    weight, bias = own["weight"], own["bias"]
    plus = x if plus is None else plus
    alike = weight.dtype == bias.dtype == x.dtype == plus.dtype
    return (weight, bias) if alike and by_kernels(x, weight, bias, plus) else None


def linear(layer: Layer, x: Tensor) -> Tensor:
    """y = x W^T + b. x: (..., in) -> (..., out)."""
    if by_onednn(layer, nn.Linear, x):
        return product(x, layer.weight, layer.bias)
    return by_torch(layer, x)


def by_torch(layer: Layer, x: Tensor) -> Tensor:
    """A linear layer of x by the code that torch chooses."""
    own = plain(layer, nn.Linear)
    return call(layer, x) if own is None else F.linear(x, own["weight"], own["bias"])


def call(layer: Layer, x: Tensor) -> Tensor:
    """layer(x), and a copy of it where somebody may have kept it: what comes next writes there."""
    y = layer(x)
    return y.clone() if may_be_kept(layer) else y


def may_be_kept(layer: Layer) -> bool:
    """Whether a hook or a wrapper may hold on to what a call of the layer returned, and will see
    what is written there: under gradients nothing is."""
    known = type(layer).__module__.startswith(("torch.nn.modules.", "minisd."))
    if known and not (layer._forward_hooks or torch_module._global_forward_hooks):
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def conv2d(layer: Layer, x: Tensor, edges: Edges = BOTH) -> Tensor:
    """The convolution of x (B, in, h, w); edges: of a band of an image (engine/bands.py)."""
    if not (by_onednn(layer, nn.Conv2d, x) and is_usual(layer)):
        return convolution(layer, x, edges)
    weight, bias, padding = layer.weight, layer.bias, layer.padding
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (out, kernel * in), a view
    if is_1x1(layer):
        return product(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
    if is_usual_3x3(layer):
        if is_few(x, weight):
            return in_parts(lambda x: by_windows(x, weight, bias, edges), x, TOGETHER)
        if is_wide(x, weight, edges):
            return in_parts(lambda x: winograd(x, weight, bias, edges), x, many(x))
    if edges != BOTH:
        x, padding = with_edges(x, edges), (0, 1)
    numbers = list(padding), list(layer.stride), list(layer.dilation), 1
    op = torch.ops.mkldnn._convolution_pointwise  # whatever torch would choose
    return op(x, weight, bias, *numbers, "none", [], "")


def convolution(layer: Layer, x: Tensor, edges: Edges = BOTH) -> Tensor:
    """layer(x) by the code that torch chooses."""
    own = plain(layer, nn.Conv2d)
    if own is None or layer.padding_mode != "zeros":
        return call(layer, x)
    padding, weight, bias = layer.padding, own["weight"], own["bias"]
    if is_1x1(layer) and by_cublas(x, weight, bias):
        return pointwise(x, weight, bias)
    if edges != BOTH:
        x, padding = with_edges(x, edges), (0, 1)
    numbers = layer.stride, padding, layer.dilation, layer.groups
    return F.conv2d(x, weight, bias, *numbers)


def by_cublas(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product may stand for the 1x1 convolution of x: where x lies as it reads it, and in
    half precision, for cuDNN may compute float32 in TF32 and cuBLAS does not."""
    if not (is_on_card(x) and x.dtype in HALF and in_channels_last(x)):
        return False
    return is_inference(x, weight, bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of channels_last x as cuBLAS's product, which adds the bias as it writes:
    behind cuDNN's convolution torch adds it in a pass over memory of its own."""
    (B, C, h, w), out = x.shape, weight.shape[0]
    y = F.linear(x.as_strided((B * h * w, C), (C, 1)), weight.view(out, C), bias)
    return y.as_strided((B, out, h, w), (h * w * out, 1, w * out, out))


def with_edges(x: Tensor, edges: Edges) -> Tensor:
    """A band with the rows of zeros above and below it; a 3x3 convolution then pads its sides."""
    return F.pad(x, (0, 0, *edges)) if any(edges) else x


def is_usual(layer: Layer) -> bool:
    """Whether a convolution is one that `conv2d` writes out: of the models' kinds and memory."""
    zeros = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    ordered = layer.weight.is_contiguous(memory_format=torch.channels_last)
    return zeros and ordered and layer.groups == 1


def is_usual_3x3(layer: Layer) -> bool:
    """Whether it is a 3x3 convolution that keeps the size."""
    return is_usual(layer) and is_3x3(layer)


def is_1x1(layer: Layer) -> bool:
    """Whether a convolution is a linear layer over the channels."""
    if layer.kernel_size != (1, 1):
        return False
    return layer.groups == 1 and layer.padding == (0, 0) and layer.stride == (1, 1)


def is_3x3(layer: Layer) -> bool:
    """Whether a convolution is 3x3, of the next positions, with zeros around the image."""
    numbers = layer.kernel_size, layer.padding, layer.stride, layer.dilation
    return layer.padding_mode == "zeros" and numbers == ((3, 3), (1, 1), (1, 1), (1, 1))


def may_be_cut(conv: Layer) -> bool:
    """Whether engine/bands.py may compute a convolution in bands."""
    return is_plain(conv, nn.Conv2d) and is_3x3(conv)


def many(x: Tensor) -> int:
    """How many images to compute at a time: few large ones, or many small ones."""
    return max(1, POSITIONS // (x.shape[2] * x.shape[3]))


def is_wide(x: Tensor, weight: Tensor, edges: Edges) -> bool:
    """Whether Winograd's form is quicker: float32, even sides, and so many channels that products
    take longer than the sums before and after them."""
    even = (x.shape[2] + sum(edges)) % 2 == x.shape[3] % 2 == 0
    return even and x.dtype == torch.float32 and min(weight.shape[:2]) >= CHANNELS


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether an image of x (B, C, h, w) has so few positions that bringing the weights in order is
    what costs.

    The windows are positions x 9 C numbers, the weights out x 9 C: so few beside the channels, too.
    """
    positions = x.shape[2] * x.shape[3]
    return positions <= FEW and FEWER * positions <= weight.shape[0]


# Without gradients the next ones write over a tensor that is not needed again: on a CPU, memory
# that is fresh from the system costs five times as much as the arithmetic.


def group_norm(norm: Layer, x: Tensor) -> Tensor:
    """norm(x), on a CPU large images one by one. x: (B, C, h, w)."""
    own = norm_for_kernels(norm, nn.GroupNorm, x) if in_channels_last(x) else None
    if own is not None:
        return fused.group_norm(x, norm.num_groups, *own, norm.eps)
    if not one_by_one(norm, x):
        return norm(x)
    out = torch.empty_like(x)
    for image, y in zip(x.split(1), out.split(1)):
        y.copy_(norm(image))
    return out


def one_by_one(norm: Layer, x: Tensor) -> bool:
    """Whether torch's norm and SiLU of a batch x would depend on the batch, and may be split."""
    if torch.compiler.is_compiling() or len(x) == 1 or x.device.type != "cpu":
        return False
    if not is_plain(norm, nn.GroupNorm):
        return False
    cut = x.shape[2] * x.shape[3] >= CUT or x.numel() > ELEMENTS or x[0].numel() % WIDE != 0
    return cut and is_inference(x, norm.weight, norm.bias)


def group_norm_silu(norm: Layer, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x + shift)). x: (B, C, h, w), which may be written over where there is a shift;
    shift: (rows, C), for each group of so many rows of x."""
    rows = shift is None or shift.stride(1) == 1
    own = norm_for_kernels(norm, nn.GroupNorm, x, shift) if rows and in_channels_last(x) else None
    if own is not None:
        return fused.group_norm_silu(x, norm.num_groups, *own, norm.eps, shift)
    if shift is not None:
        x = add(shift[:, :, None, None], x)
    if not one_by_one(norm, x):
        return F.silu(call(norm, x), inplace=not torch.is_grad_enabled())
    out = torch.empty_like(x)
    for image, y in zip(x.split(1), out.split(1)):
        torch.ops.aten.silu.out(norm(image), out=y)
    return out


def in_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def layer_norm(norm: Layer, x: Tensor) -> Tensor:
    """norm(x) over the last dimension."""
    own = layer_norm_for_kernels(norm, x)
    return norm(x) if own is None else fused.layer_norm(x, *own, norm.eps)


def add_layer_norm(norm: Layer, x: Tensor, h: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """x + h, as `add` has it, and norm of that. x and h: of one shape."""
    own = layer_norm_for_kernels(norm, x, h) if h.is_contiguous() else None
    if own is not None:
        return fused.add_layer_norm(x, h, *own, norm.eps)
    x = add(x, h, layer)
    return x, layer_norm(norm, x)


def layer_norm_for_kernels(
    norm: Layer, x: Tensor, plus: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a plain LayerNorm that minisd_kernels.fused may compute of x, or of
    x + plus; else None."""
    own = norm_for_kernels(norm, nn.LayerNorm, x, plus) if x.is_contiguous() else None
    width = x.shape[-1:]
    fits = own is not None and norm.normalized_shape == width and width[0] <= fused.MAX_WIDTH
    return own if fits else None


def norm_silu_conv(
    norm: Layer, conv: Layer, x: Tensor, in_place: bool = False, shift: Tensor | None = None
) -> Tensor:
    """conv(silu(norm(x + shift))), large images in bands (engine/bands.py). in_place: x may be
    written over, as where there is a shift: (rows, C), for each group of so many rows of x."""
    if not (bands.are_large(x) and is_plain(norm, nn.GroupNorm) and may_be_cut(conv)):
        return conv2d(conv, group_norm_silu(norm, x, shift))
    if shift is not None:
        x = add(shift[:, :, None, None], x)
    if bands.is_large(x):
        return bands.norm_silu_conv(norm, partial(conv2d, conv), x, in_place)
    return in_parts(lambda x: conv2d(conv, group_norm_silu(norm, x)), x, TOGETHER)


def upsample_conv(conv: Layer, x: Tensor, size: tuple[int, int]) -> Tensor:
    """conv(x enlarged to `size`, each position the nearest), large images in bands."""
    if tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
        return conv2d(conv, F.interpolate(x, size=size, mode="nearest"))
    if by_onednn(conv, nn.Conv2d, x) and is_usual_3x3(conv):
        weight, bias, rows = conv.weight, conv.bias, bands.bands(x)
        return in_parts(lambda x: upsampled(x, weight, bias, rows), x, many(x))
    if bands.is_large(x, 2) and may_be_cut(conv):
        return bands.upsample_conv(partial(double_conv, conv), x)
    return double_conv(conv, x)


def double_conv(conv: Layer, x: Tensor, edges: Edges = BOTH) -> Tensor:
    """conv(x with each pixel repeated in a square of 2 x 2); edges: of a band of an image."""
    enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
    if edges == BOTH:
        return conv2d(conv, enlarged)
    above, below = edges  # of the rows that lie above and below only the next is needed
    rows = slice(1 - above, enlarged.shape[2] - 1 + below)
    return conv2d(conv, enlarged[:, :, rows], edges)


def add_conv(conv: Layer, x: Tensor, h: Tensor) -> Tensor:
    """conv(x) + h for a 1x1 convolution, in the memory of h where it may; large images in bands."""
    if bands.is_large(x) and is_plain(conv, nn.Conv2d):
        return bands.add_conv(partial(conv2d, conv), x, h)
    return add(conv2d(conv, x), h)


def geglu(layer: Layer, x: Tensor) -> Tensor:
    """h * gelu(gate), [h, gate] = layer(x) along the last dimension, the exact (erf) GELU."""
    if by_onednn(layer, nn.Linear, x):
        weights, biases = layer.weight.chunk(2), (None, None)
        if layer.bias is not None:
            biases = layer.bias.chunk(2)
        gate = product(x, weights[1], biases[1], "gelu", GELU)
        return gate.mul_(product(x, weights[0], biases[0]))
    x = by_torch(layer, x)
    if x.is_contiguous() and by_kernels(x):
        return fused.geglu(x)
    h, gate = x.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        return h * F.gelu(gate, approximate=GELU)
    return F.gelu(gate, approximate=GELU).mul_(h)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, modules: Iterable[Layer]) -> Tensor:
    """function(x) of every row, the last dimension, by itself: on a CPU some rows at a time, unless
    somebody watches or has replaced one of the modules that it calls.

    Tensors above 32 MB come fresh from the system at every call, which takes longer than to fill
    them; smaller ones are in memory that is there already, if not in the cache.
    """
    few = torch.compiler.is_compiling() or x.numel() <= ROWS * x.shape[-1]
    if few or x.device.type != "cpu" or torch.is_grad_enabled():
        return function(x)
    if not (is_inference(x) and all(map(is_known, modules))):
        return function(x)
    out = torch.empty_like(x)
    for rows, y in zip(x.flatten(0, -2).split(ROWS), out.flatten(0, -2).split(ROWS)):
        y.copy_(function(rows))
    return out


def add(x: Tensor, h: Tensor, layer: Layer = None) -> Tensor:
    """x + h; where x has fewer rows they count for every group of h.

    In the memory of h, unless somebody may have kept what the layer, from which it comes, returned.
    """
    if layer is not None and may_be_kept(layer):
        h = h.clone()
    rows = x.shape[0]
    if torch.is_grad_enabled() or x.dtype != h.dtype:
        return (x + h.unflatten(0, (-1, rows))).flatten(0, 1)
    if rows == 1 or rows == h.shape[0]:
        return h.add_(x)
    h.unflatten(0, (-1, rows)).add_(x)
    return h  # not the view: its strides would hide channels_last


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """The whole batch of x group after group until it has `rows` rows; x itself if it has them."""
    # cat keeps the order of memory, Tensor.repeat would not keep channels_last
    return x if x.shape[0] == rows else torch.cat([x] * (rows // x.shape[0]))
