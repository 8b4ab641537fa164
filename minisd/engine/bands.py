"""Convolutions of large images in bands of rows, so that no more of what they read exists at a
time than a band.

    y = conv(silu(norm(x)))     and     y = conv(upsample(x)),     conv 3x3

At 1024x1024 the decoder's activations have a gigabyte each, and without bands four of them are
alive at once. A band is convolved with the rows that lie above and below it, and the norm's mean
and variance are those of the whole image: the sums are the same as without bands, so there are no
seams and nothing to blend, unlike in a tiled decoding. models/ops.py asks `is_large`; smaller
images, and gradients, are computed at once. On a CPU the second is `upsampled` of
models/convolutions.py, which takes the bands of any image and one copy of x, with zeros around it.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.convolutions import Edges, in_parts

# A band (B, C, 1 + n + 1, w), with the rows above and below it, and how many rows of zeros stand in
# for these where the image ends, (1 or 0, 1 or 0) -> the n rows between.
Convolution = Callable[[Tensor, Edges], Tensor]

# Elements of an activation above which it is computed in bands: 32 channels of 512x512, 256
# channels of 512x512. On a CPU earlier: in float32 these are the 32 MB above which memory comes
# fresh from the system at every call, and torch's GroupNorm of channels_last is less exact.
LARGE = {"cpu": 2**23, "cuda": 2**26}
BAND = 2**22  # elements of a band
# Elements that mean and deviations are taken of at a time: on a CPU what stays in its cache for the
# second, in float32 a MB.
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

    But for the last, all have an even number of rows or one, as Winograd's form needs them.
    """
    height, elements = x.shape[2], BAND if elements is None else elements
    rows = elements * height * len(x) // (factor**2 * x.numel())
    rows = max(1, rows - rows % 2)
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def norm_silu_conv(
    norm: nn.GroupNorm, conv: Convolution, x: Tensor, in_place: bool = False
) -> Tensor:
    """conv(silu(norm(x))), a GroupNorm and a convolution that keeps the size, image by image;
    in_place: in the memory of x."""

    def of_image(image: Tensor) -> Tensor:
        mean, var, weight, bias = statistics(norm, image)

        def activated(band: Tensor) -> Tensor:
            # With mean and variance given, GroupNorm is BatchNorm.
            return F.silu(F.batch_norm(band, mean, var, weight, bias, eps=norm.eps), inplace=True)

        return _convolve(conv, image, 1, activated, image if in_place else None)

    if not in_place:
        return in_parts(of_image, x, 1)
    for image in x.split(1):
        of_image(image)
    return x


def upsample_conv(conv: Convolution, x: Tensor) -> Tensor:
    """conv(x), which repeats each pixel in a square of 2 x 2 and convolves that."""
    return _convolve(conv, x, 2)


def add_conv(conv: Callable[[Tensor], Tensor], x: Tensor, h: Tensor) -> Tensor:
    """conv(x) + h, in the memory of h, for a 1x1 convolution."""
    for rows in bands(x):
        h[:, :, rows] += conv(x[:, :, rows])
    return h


def statistics(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, var, weight, bias with norm(x) = (x - mean) / sqrt(var + eps) * weight + bias of one
    image x (1, C, h, w), each (C,) in float32 or wider.

        mean = sum n_i m_ic / n,     var = sum n_i (v_ic + (m_ic - mean)^2) / n

    over the channels c of a group and over pieces i of the image, with n_i numbers of each channel,
    whose means are m_ic and variances v_ic (Chan, Golub and LeVeque 1979): memory is read once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = bands(x, elements=PIECE.get(x.device.type, BAND))
    C, parts = x.shape[1], [x[:, :, rows] for rows in pieces]
    unused = x.new_zeros(C, dtype=wide), x.new_ones(C, dtype=wide)  # they tell it to sum in `wide`
    pairs = (torch.batch_norm_update_stats(part, *unused, 0.0) for part in parts)
    m, v = (torch.stack(y).unflatten(1, (norm.num_groups, -1)) for y in zip(*pairs))  # (P, G, C/G)
    n = torch.tensor([part.shape[2] for part in parts], dtype=wide, device=x.device)
    share = (n / (n.sum() * m.shape[2]))[:, None, None]
    mean = (share * m).sum((0, 2), keepdim=True)
    var = (share * (v + (m - mean).square())).sum((0, 2), keepdim=True)
    mean, var = (y.expand(1, *m.shape[1:]).flatten() for y in (mean, var))
    return mean, var, norm.weight.to(wide), norm.bias.to(wide)


def _convolve(
    conv: Convolution,
    x: Tensor,
    factor: int,
    before: Callable[[Tensor], Tensor] = lambda band: band,
    out: Tensor | None = None,
) -> Tensor:
    """conv(before(x)), which has `factor` times as many rows as x.

    out: x itself, or None for new memory. before: has to be in new memory where out is x.
    """
    place = y = None
    for rows in bands(x, factor):
        band = before(x[:, :, max(rows.start - 1, 0) : rows.stop + 1])
        if y is not None:  # not earlier: where out is x, this band has read the last row of `place`
            cast(Tensor, out)[:, :, place] = y
        y = conv(band, (int(rows.start == 0), int(rows.stop == x.shape[2])))
        place = slice(factor * rows.start, factor * rows.stop)
        if out is None:
            size = (len(x), y.shape[1], factor * x.shape[2], y.shape[3])
            order = torch.channels_last
            out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
    out, y = cast(Tensor, out), cast(Tensor, y)
    out[:, :, place] = y
    return out
