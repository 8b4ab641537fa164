"""Convolutions with fewer multiplications: the formula in float64, the weights of the moment, and
where they are chosen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minisd.models import convolutions, ops

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not ops.onednn_computes(dtype), reason=f"no oneDNN for {dtype} on this processor"
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
SIZES = [(1, 4, 6), (2, 16, 10), (3, 8, 8)]  # images, height, width


def layer_and_image(size, channels, out, dtype, bias=True):
    torch.manual_seed(0)
    B, h, w = size
    conv = nn.Conv2d(channels, out, 3, padding=1, bias=bias).requires_grad_(False)
    conv.to(dtype, memory_format=torch.channels_last)
    x = torch.randn(B, channels, h, w).to(dtype, memory_format=torch.channels_last)
    return conv, x


def exact(conv, x):
    """The nine products of every position, in float64."""
    padded = F.pad(x.double(), (1, 1, 1, 1))
    h, w = x.shape[2:]
    out = torch.zeros(len(x), conv.out_channels, h, w, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            taken = padded[:, :, i : i + h, j : j + w]
            out += torch.einsum("bchw,oc->bohw", taken, conv.weight[:, :, i, j].double())
    return out if conv.bias is None else out + conv.bias.double()[:, None, None]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_winograd(size, bias, monkeypatch):
    """In float32, within twice the error of PyTorch's convolution."""
    monkeypatch.setattr(convolutions, "CACHED", 0)  # 64 results at a time
    conv, x = layer_and_image(size, 160, 136, torch.float32, bias)
    want = exact(conv, x)
    got = convolutions.winograd(x, conv.weight, conv.bias)
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) <= 2 * error(conv(x), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("many", [0, 10**6], ids=["convolutions", "products"])
def test_upsampled(size, dtype, bias, many, monkeypatch):
    """The sums of weights are rounded once more: in bfloat16 within twice the error."""
    monkeypatch.setattr(convolutions, "CACHED", 0)  # 64 results at a time
    monkeypatch.setattr(convolutions, "MANY", many)
    conv, x = layer_and_image(size, 40, 72, dtype, bias)
    enlarged = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    want, rows = exact(conv, enlarged), size[1]
    got = convolutions.upsampled(x, conv.weight, conv.bias, [slice(0, rows)])
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) <= 2 * error(conv(enlarged), want)
    bands = [slice(0, 1), slice(1, 3), slice(3, rows)]
    got = convolutions.upsampled(x, conv.weight, conv.bias, bands)
    assert error(got, want) <= 2 * error(conv(enlarged), want)


def products(function, *arguments):
    """How many products of oneDNN a call makes."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(str(operator))
            return operator(*args, **(kwargs or {}))

    with Names():
        function(*arguments)
    return sum("_linear_pointwise" in name for name in names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_they_are_chosen(dtype, monkeypatch):
    """For values alone, of plain layers; and new weights are used at once."""
    wide = dtype == torch.float32
    conv, x = layer_and_image((2, 18, 16), ops.CHANNELS, 160, dtype)
    double = lambda conv, x: ops.upsample_conv(conv, x, (36, 32))
    odd = x[:, :, 1:].contiguous(memory_format=torch.channels_last)
    assert products(ops.conv2d, conv, x) == 16 * wide
    assert products(ops.conv2d, conv, odd) == 0
    assert products(double, conv, x) == 4
    narrow = layer_and_image((1, 18, 16), 8, 160, dtype)
    assert products(ops.conv2d, *narrow) == 0 and products(double, *narrow) == 4
    with monkeypatch.context() as patch:
        patch.setattr(convolutions, "MANY", 18 * 16)
        assert products(double, *narrow) == 0
    before = ops.conv2d(conv, x), double(conv, x)
    conv.weight.data += 0.1  # which no version counter sees
    tolerance = 1e-5 if wide else 2e-2
    enlarged = F.interpolate(x, scale_factor=2)
    for old, got, taken in zip(before, (ops.conv2d(conv, x), double(conv, x)), (x, enlarged)):
        assert error(got, exact(conv, taken)) <= tolerance < error(old, exact(conv, taken))
    conv.weight.requires_grad_()
    assert products(ops.conv2d, conv, x) == products(double, conv, x) == 0
    double(conv, x).sum().backward()
    assert conv.weight.grad.abs().max() > 0
    conv.requires_grad_(False).register_forward_hook(lambda layer, args, out: 2 * out)
    assert error(double(conv, x), 2 * exact(conv, enlarged)) <= tolerance
