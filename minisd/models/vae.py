"""The autoencoder between images and latents (KL-regularised, no vector quantisation).

Architecture: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G; module names are
those of diffusers' AutoencoderKL, so its state dict loads strictly.
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from .. import expect
from . import ops
from .attention import Attention
from .blocks import Downsample, ResnetBlock, Upsample
from .config import read_config

NORM_EPS = 1e-6  # every GroupNorm of the VAE
# Where diffusers' defaults are others than Stable Diffusion v1's numbers.
ABSENT = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}


@dataclass(frozen=True)
class VAEConfig:
    """The numbers of an AutoencoderKL; the defaults are Stable Diffusion v1's.

    The image is `factor` = 2 ** (len(block_out_channels) - 1) times as wide and as high as its
    latent.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int | tuple[int, int] | None = 512

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Read the checkpoint's vae/config.json (a dict).

        ValueError for maths that this VAE does not have.
        """
        widths = values.get("block_out_channels", ABSENT["block_out_channels"])
        depth = len(cast(Sized, widths))
        neutral = {
            "act_fn": "silu",
            "down_block_types": ("DownEncoderBlock2D",) * depth,
            "up_block_types": ("UpDecoderBlock2D",) * depth,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        }
        return read_config(cls, values, neutral, ABSENT, harmless=("force_upcast",))

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialAttention(Attention):
    """x + Attention(GroupNorm(x)) over all h*w positions with one head. x: (B, C, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # an image, no tokens
        tokens = ops.group_norm(self.group_norm, x).flatten(2).transpose(1, 2)  # (B, h*w, C)
        return ops.add(x, super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:]))


class MidBlock(nn.Module):
    """resnet, attention, resnet, all at the coarsest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, groups, NORM_EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Block(nn.Module):
    """`layers` resnets, then the change of resolution, if any, under diffusers' name for it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        groups: int,
        down: Downsample | None = None,
        up: Upsample | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(
            ResnetBlock(i, o, groups, NORM_EPS) for i, o in zip(widths, widths[1:])
        )
        self.downsamplers = nn.ModuleList([] if down is None else [down])
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def layers(self) -> tuple[nn.Module, ...]:
        """In order."""
        return (*self.resnets, *self.downsamplers, *self.upsamplers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


def through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """x through the blocks, one after the other.

    Layer by layer where nobody watches or has replaced a block: a call of it would keep its input
    till its end, a fifth more memory for a decoded image.
    """
    for block in blocks:
        if torch.compiler.is_compiling() or ops.is_known(block):
            for layer in cast(Block, block).layers():
                x = layer(x)
        else:
            x = block(x)
    return x


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> what a latent is made of, (B, channels, h, w), before quant_conv."""

    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        groups, last = config.norm_num_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (ins, out) in enumerate(zip((widths[0], *widths), widths)):
            down = Downsample(out, one_sided=True) if i < last else None
            self.down_blocks.append(Block(ins, out, layers, groups, down=down))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = through(self.down_blocks, self.conv_in(x))
        return ops.norm_silu_conv(self.conv_norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """Latent (B, latent_channels, h, w), behind post_quant_conv, -> image (B, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, layers = config.block_out_channels[::-1], config.layers_per_block
        groups, last = config.norm_num_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, (ins, out) in enumerate(zip((widths[0], *widths), widths)):
            up = Upsample(out) if i < last else None
            # One resnet more than the encoder has.
            self.up_blocks.append(Block(ins, out, layers + 1, groups, up=up))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = through(self.up_blocks, self.mid_block(self.conv_in(z)))
        return ops.norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class AutoencoderKL(nn.Module):
    """q(z | x) = N(mean, exp(logvar)) by `encode`, x from z by `decode`.

    Latents here are unscaled: the diffusion model's are `config.scaling_factor * z`, and
    StableDiffusion multiplies.
    """

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.latent_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """How many times as wide and as high as its latent an image is."""
        return self.config.factor

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image in [-1, 1], (B, 3, H, W) -> mean, logvar.

        Each is (B, latent_channels, H // factor, W // factor); logvar is clamped to [-30, 20].
        """
        expect.shape("image", x, "B", self.config.in_channels, "H", "W")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent (B, latent_channels, h, w) -> image (B, 3, h * factor, w * factor).

        Its values are roughly in [-1, 1].
        """
        expect.shape("latents", z, "B", self.config.latent_channels, "h", "w")
        return self.decoder(self.post_quant_conv(z))
