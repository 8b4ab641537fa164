"""Large images in bands of rows: the same function, and nothing as large as the image but what
a block hands on."""

import copy
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisd import AutoencoderKL, VAEConfig
from minisd.engine import bands
from minisd.models.blocks import ResnetBlock, Upsample
from minisd.models.ops import add, conv2d, double_conv, norm_silu_conv


@pytest.fixture
def in_bands(monkeypatch):
    def switch(elements):
        monkeypatch.setattr(bands, "LARGE", {"cpu": 0 if elements else 2**40, "cuda": 2**40})
        monkeypatch.setattr(bands, "BAND", elements)
        monkeypatch.setattr(bands, "PIECE", {"cpu": elements // 3})

    return switch


def vae(dtype, layout=torch.contiguous_format):
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4)
    model = AutoencoderKL(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0.3, 0.3) if parameter.ndim == 1 else parameter.mul_(2)
    return model.to(dtype, memory_format=layout)


def both(model, dtype):
    """A decoded image and the moments of another, ragged sizes."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 7, 5, generator=generator, dtype=torch.float64).to(dtype)
    image = torch.randn(1, 3, 36, 20, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return [model.decode(z), *model.encode(image)]


def far(got, expected):
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bands_have_no_seams(in_bands, layout):
    in_bands(0)
    expected = both(vae(torch.float64), torch.float64)
    model = vae(torch.float64, layout)
    for elements in (1, 500, 3000, 2**30):  # a row at a time, several, the whole image
        in_bands(elements)
        assert far(both(model, torch.float64), expected) <= 1e-12


def test_bands_in_other_dtypes(in_bands):
    exact = [x.float() for x in both(vae(torch.float64), torch.float64)]
    for dtype, bar in ((torch.float32, 1e-5), (torch.bfloat16, 0)):
        in_bands(0)
        plain = far([x.float() for x in both(vae(dtype), dtype)], exact)
        in_bands(1500)
        for layout in (torch.contiguous_format, torch.channels_last):  # the last by oneDNN
            model = vae(dtype, layout)
            assert far([x.float() for x in both(model, dtype)], exact) <= max(2 * plain, bar)


class Sizes(TorchDispatchMode):
    """The elements of what every operator makes, memory that is only set aside not counted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        new = isinstance(out, torch.Tensor) and not any(
            isinstance(x, torch.Tensor)
            and x.untyped_storage()._cdata == out.untyped_storage()._cdata
            for x in args
        )
        if new and "empty" not in str(function):
            self.largest = max(self.largest, out.numel())
        return out


def test_nothing_is_as_large_as_the_image_but_what_a_block_hands_on(in_bands):
    model, z, largest = vae(torch.float32), torch.randn(1, 4, 32, 32), {}
    for elements in (0, 8192):
        in_bands(elements)
        with torch.no_grad(), Sizes() as sizes:
            sizes.largest = 0
            model.decode(z)
        largest[elements] = sizes.largest
    assert largest[0] == 16 * 128 * 128  # the last upsampling
    assert largest[8192] <= 3 * 8192  # rows above and below, and the enlarged band


def test_a_stage_does_not_keep_its_input():
    model, seen = vae(torch.float32), []
    before, after = (
        model.decoder.up_blocks[-2].upsamplers[0],
        model.decoder.up_blocks[-1].resnets[1],
    )
    before.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    after.register_forward_pre_hook(lambda module, args: seen.append(seen[0]()))
    with torch.no_grad():
        model.decode(torch.randn(1, 4, 4, 4))
    assert len(seen) == 2 and seen[1] is None


def test_what_is_still_needed_is_not_written_over(in_bands):
    in_bands(100)
    x = torch.randn(1, 8, 9, 5)
    kept, norm, layer = x.clone(), torch.nn.GroupNorm(4, 8), torch.nn.Conv2d(8, 8, 3, padding=1)
    conv = partial(conv2d, layer)
    with torch.no_grad():
        out = bands.norm_silu_conv(norm, conv, x)
        bands.upsample_conv(partial(double_conv, layer), x)
        assert torch.equal(x, kept) and bands.is_large(x)
        inside = bands.norm_silu_conv(norm, conv, x, in_place=True)
    assert inside is x and torch.equal(inside, out)
    assert not bands.is_large(x)  # gradients


def test_the_norms_of_a_batch_are_those_of_each_image_and_of_deviations(in_bands):
    """Far from 0 a mean of squares would lose the variance; each image has its own."""
    in_bands(100)
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(2, 8, 9, 5, generator=generator)
        + torch.tensor([1000.0, -500.0])[:, None, None, None]
    )
    norm, layer = torch.nn.GroupNorm(4, 8), torch.nn.Conv2d(8, 8, 3, padding=1)
    exact = copy.deepcopy(norm).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        expected = exact[1](torch.nn.functional.silu(exact[0](x.double())))
        out = bands.norm_silu_conv(norm, partial(conv2d, layer), x)
        bands.norm_silu_conv(norm, partial(conv2d, layer), x, in_place=True)
    # the means are rounded to float32, of numbers whose deviations are 1
    assert (out - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps * 1000
    assert torch.equal(x, out)


def test_a_convolution_of_another_kind_is_computed_at_once(in_bands):
    in_bands(100)
    norm, x = torch.nn.GroupNorm(4, 8), torch.randn(1, 8, 9, 5)
    for options in ({"padding_mode": "reflect"}, {"dilation": 2}, {"stride": 2}):
        layer = torch.nn.Conv2d(8, 8, 3, padding=1, **options)
        with torch.no_grad():
            expected = layer(torch.nn.functional.silu(norm(x)))
            assert torch.allclose(norm_silu_conv(norm, layer, x.clone()), expected, atol=1e-6)


@torch.no_grad()
def test_sums_keep_the_memory_order():
    """Rows of x count for every group of h; a lost channels_last would cost a copy in each
    convolution after it."""
    for rows, of_h in ((1, 1), (1, 2), (2, 6)):
        x, h = (
            torch.randn(rows, 3, 5, 4),
            torch.randn(of_h, 3, 5, 4).to(memory_format=torch.channels_last),
        )
        expected, strides = x.repeat(of_h // rows, 1, 1, 1) + h, h.stride()
        out = add(x, h)
        assert (
            torch.equal(out, expected)
            and out.stride() == strides
            and out.data_ptr() == h.data_ptr()
        )
        with torch.enable_grad():
            assert torch.equal(
                add(x.requires_grad_(), expected), x.repeat(of_h // rows, 1, 1, 1) + expected
            )


def test_watched_and_wrapped_convolutions_are_not_cut(monkeypatch):
    """A hook fires once on the whole image, a wrapper is called as it is."""
    monkeypatch.setattr(bands, "LARGE", {"cpu": 1000, "cuda": 1000})
    monkeypatch.setattr(bands, "BAND", 4000)
    block, upsample = ResnetBlock(8, 16, 4, 1e-6), Upsample(16)
    x, shapes = torch.randn(1, 8, 32, 32), []
    with torch.no_grad():
        plain = upsample(block(x))
        for conv in (block.conv_shortcut, upsample.conv):
            conv.register_forward_hook(lambda module, args, out: shapes.append(out.shape[2:]))
        torch.testing.assert_close(upsample(block(x)), plain, atol=1e-5, rtol=1e-5)
        assert shapes == [(32, 32), (64, 64)]
        upsample.conv = torch.nn.Sequential(upsample.conv)
        torch.testing.assert_close(upsample(block(x)), plain, atol=1e-5, rtol=1e-5)
