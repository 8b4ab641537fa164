"""Convolutions of large images in bands of rows, so that no more of what they read exists at a
time than a band.

    y = conv(silu(norm(x)))     and     y = conv(upsample(x)),     conv 3x3

At 1024x1024 the decoder's activations have a gigabyte each, and without bands four of them are
alive at once. A band is computed with one row more on either side, whose own results are dropped,
and the norm's mean and variance are those of the whole image: the sums are the same as without
bands, so there are no seams and nothing to blend, unlike in a tiled decoding. models/ops.py and
models/blocks.py ask `is_large`; smaller images, and gradients, are computed at once.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = Callable[[Tensor], Tensor]  # of a band

# Elements of an activation above which it is computed in bands: 64 channels of 512x512, 256
# channels of 512x512. On a CPU earlier, because it costs no time there, and because torch's
# GroupNorm of channels_last is less exact there.
LARGE = {"cpu": 2**24, "cuda": 2**26}
BAND = 2**22  # elements of a band
# Elements of what is computed number by number, several operations one after the other: in float32
# a MB, which stays in the cache of a CPU.
PIECE = {"cpu": 2**18, "cuda": BAND}


def is_large(x: Tensor, factor: int = 1) -> bool:
    """Whether x (B, C, h, w), with sides `factor` times as long, is to be computed in bands: by the
    size of one image on a CPU, so that it does not depend on its batch."""
    share = 1 / max(x.shape[0], 1) if x.is_cpu else 1
    return are_large(x, factor * factor * share)


def are_large(x: Tensor, factor: float = 1) -> bool:
    """Whether the batch has so many elements, times `factor`, that no copy of all should be."""
    most = LARGE["cpu" if x.is_cpu else "cuda"]
    return factor * x.numel() > most and not torch.is_grad_enabled()


def bands(x: Tensor, factor: int = 1, elements: int | None = None) -> list[slice]:
    """Slices that cover the rows of x (B, C, h, w), each about `elements` (BAND) of an image, or so
    many once enlarged by `factor`.

    The first has one row less than the others: with a row more above and below where there is one,
    all of an even number of rows are even, as Winograd's form of a convolution needs them.
    """
    height, elements = x.shape[2], BAND if elements is None else elements
    rows = elements * height * len(x) // (factor**2 * x.numel())
    rows = max(1, rows - rows % 2)
    edges = [0, *range(max(1, rows - 1), height, rows), height]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


def pieces(x: Tensor) -> list[slice]:
    return bands(x, elements=PIECE.get(x.device.type, BAND))


def norm_silu_conv(
    norm: nn.GroupNorm, conv: Convolution, x: Tensor, in_place: bool = False
) -> Tensor:
    """conv(silu(norm(x))), a GroupNorm and a convolution that keeps the size; in_place: in the
    memory of x."""
    scale, shift = affine(norm, x)

    def activated(band: Tensor) -> Tensor:
        out = torch.empty_like(band)
        for rows in pieces(band):
            y = band[:, :, rows].to(scale.dtype) * scale
            out[:, :, rows] = F.silu(y.add_(shift), inplace=True)
        return conv(out)

    return _convolve(activated, x, 1, x if in_place else None)


def upsample_conv(conv: Convolution, x: Tensor) -> Tensor:
    """conv(x), which repeats each pixel in a square of 2 x 2 and convolves that."""
    return _convolve(conv, x, 2)


def add_conv(conv: Convolution, x: Tensor, h: Tensor) -> Tensor:
    """conv(x) + h, in the memory of h, for a 1x1 convolution."""
    for rows in bands(x):
        h[:, :, rows] += conv(x[:, :, rows])
    return h


def affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """scale, shift with norm(x) = scale x + shift for a GroupNorm.

        scale = weight / sqrt(var + eps),   shift = bias - mean scale
        var   = mean over the group's channels c of v_c + (m_c - mean)^2

    each (B, C, 1, 1) in float32 or wider, with the means m_c and variances v_c of the channels,
    which are quicker to take than those of groups.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    count, parts = x.shape[2] * x.shape[3], pieces(x)

    def sums(function: Callable[[Tensor], Tensor]) -> Tensor:
        of_parts = (function(x[:, :, rows].to(wide)).sum((2, 3), keepdim=True) for rows in parts)
        return torch.stack(list(of_parts)).sum(0)

    m_c = sums(lambda piece: piece) / count
    v_c = sums(lambda piece: (piece - m_c).square_()) / count
    groups = (norm.num_groups, -1)
    m_c, v_c = m_c.unflatten(1, groups), v_c.unflatten(1, groups)  # (B, G, C / G, 1, 1)
    mean = m_c.mean(2, keepdim=True)
    var = (v_c + (m_c - mean).square()).mean(2, keepdim=True)
    scale = norm.weight.to(wide).view(*groups, 1, 1) * (var + norm.eps).rsqrt()
    shift = norm.bias.to(wide).view(*groups, 1, 1) - mean * scale
    return scale.flatten(1, 2), shift.flatten(1, 2)


def _convolve(conv: Convolution, x: Tensor, factor: int, out: Tensor | None = None) -> Tensor:
    """conv(x), which has `factor` times as many rows as x.

    out: x itself, or None for new memory.
    """
    above: Tensor | None = None
    for rows in bands(x, factor):
        band = x[:, :, rows.start : rows.stop + 1]
        band = band if above is None else torch.cat([above, band], dim=2)
        first = 0 if above is None else factor
        above = x[:, :, rows.stop - 1 : rows.stop].clone()  # as it is before it is written over
        y = conv(band)[:, :, first : first + factor * (rows.stop - rows.start)]
        if out is None:
            size = (len(x), y.shape[1], factor * x.shape[2], y.shape[3])
            order = torch.channels_last
            out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
        out[:, :, factor * rows.start : factor * rows.stop] = y
    return cast(Tensor, out)
