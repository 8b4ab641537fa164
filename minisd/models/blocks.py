"""The three convolution blocks that the UNet and the VAE share.

Module names are diffusers' (`ResnetBlock2D`, `Downsample2D`, `Upsample2D`); the architecture is
that of latent diffusion, Rombach et al. 2022, https://arxiv.org/abs/2112.10752.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops


class ResnetBlock(nn.Module):
    """h = conv2(silu(norm2(conv1(silu(norm1(x))) + time))), out = h + shortcut(x).

    x: (B, in, h, w) -> (B, out, h, w). time: (1, out), or a row for each latent of a group of x,
    what `project` made of the time's embedding; None in a block without `time_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        name: str = "",
    ):
        super().__init__()
        self.name = name  # its own, dotted, within the UNet
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        widens = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if widens else None

    def project(self, emb: Tensor) -> Tensor:
        """(n, time_channels) -> (n, out), what each of n times adds per channel."""
        return ops.linear(self.time_emb_proj, F.silu(emb))

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = ops.norm_silu_conv(self.norm1, self.conv1, x)
        h = ops.norm_silu_conv(self.norm2, self.conv2, h, in_place=True, shift=time)
        shortcut = self.conv_shortcut
        return ops.add(x, h) if shortcut is None else ops.add_conv(shortcut, x, h)


class Downsample(nn.Module):
    """3x3 convolution of stride 2. (B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2)).

    The UNet pads symmetrically by 1; the VAE encoder (`one_sided`) pads only the right and the
    bottom, and gives floor(h/2), floor(w/2).
    """

    def __init__(self, channels: int, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(self.conv, F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Nearest neighbour to `size` (default: twice), then a 3x3 convolution. -> (B, C, *size)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[-2], 2 * x.shape[-1]) if size is None else size
        return ops.upsample_conv(self.conv, x, size)
