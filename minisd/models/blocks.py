"""The three convolution blocks that the UNet and the VAE share.

Module names are diffusers' (`ResnetBlock2D`, `Downsample2D`, `Upsample2D`); the architecture is
that of latent diffusion, Rombach et al. 2022, https://arxiv.org/abs/2112.10752.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..engine import bands


def repeat_rows(x, rows):
    """Repeat the whole batch of `x` group after group until it has `rows` rows; `x` itself if it
    has them already."""
    return x if x.shape[0] == rows else x.repeat(rows // x.shape[0], *[1] * (x.ndim - 1))


# Without gradients the next two write over a tensor that is not needed again: on a CPU, memory that
# is fresh from the system costs five times as much as the arithmetic.


def norm_silu(norm, x):
    """silu(norm(x))."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def norm_silu_conv(norm, conv, x, in_place=False):
    """conv(silu(norm(x))); in_place: x is not needed again."""
    return (
        bands.norm_silu_conv(norm, conv, x, in_place)
        if bands.is_large(x)
        else conv(norm_silu(norm, x))
    )


def add(x, h):
    """x + h, in the memory of h; where x has fewer rows they count for every group of h."""
    groups = h.unflatten(0, (-1, x.shape[0]))
    if torch.is_grad_enabled() or x.dtype != h.dtype:
        return (x + groups).flatten(0, 1)
    groups.add_(x)
    return h  # not a view of `groups`: its strides would hide channels_last


class ResnetBlock(nn.Module):
    """h = conv2(silu(norm2(conv1(silu(norm1(x))) + time))), out = h + shortcut(x).

    x: (B, in, h, w) -> (B, out, h, w). time: (1, out), or a row for each latent of a group of x,
    what `project` made of the time's embedding; None in a block that was built without
    `time_channels`. `name` is the block's own.
    """

    name = None

    def __init__(self, in_channels, out_channels, groups, eps, time_channels=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def project(self, emb):
        """(n, time_channels) -> (n, out), what each of n times adds per channel."""
        return self.time_emb_proj(F.silu(emb))

    def forward(self, x, time=None):
        h = norm_silu_conv(self.norm1, self.conv1, x)
        if time is not None:
            h = add(time[:, :, None, None], h)
        h = norm_silu_conv(self.norm2, self.conv2, h, in_place=True)
        if self.conv_shortcut is None:
            return add(x, h)
        return (
            bands.add_conv(self.conv_shortcut, x, h)
            if bands.is_large(x)
            else add(self.conv_shortcut(x), h)
        )


class Downsample(nn.Module):
    """3x3 convolution of stride 2. (B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2)).

    The UNet pads symmetrically by 1; the VAE encoder (`one_sided`) pads only the right and the
    bottom, and gives floor(h/2), floor(w/2).
    """

    def __init__(self, channels, one_sided=False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Nearest neighbour to `size` (default: twice), then a 3x3 convolution. (B, C, h, w) -> (B, C,
    *size)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        if bands.is_large(x, 2) and tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1]):
            return bands.upsample_conv(self.conv, x)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
