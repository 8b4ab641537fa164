"""The vector-quantised autoencoder, latent diffusion's other first stage.

    z = quant_conv(encoder(x));    z_q = the row of the codebook nearest to z, at each position
    x = decoder(post_quant_conv(z_q))

The KL autoencoder's encoder and decoder with a codebook between them. A diffusion model is trained
on z, before quantisation, which is then part of the decoder. Sources: van den Oord et al. 2017,
https://arxiv.org/abs/1711.00937; Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section
3.1; module names are those of diffusers' VQModel, so its state dict loads strictly.
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from .. import expect
from .config import read_config
from .vae import Decoder, Encoder, VAEConfig

# What diffusers takes where the file says nothing.
ABSENT = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "sample_size": 32,
    "num_vq_embeddings": 256,
}


@dataclass(frozen=True)
class VQConfig(VAEConfig):
    """The numbers of a VQModel; the defaults are latent diffusion's vq-f4.

    num_vq_embeddings: rows of the codebook, of vq_embed_dim numbers, None for latent_channels.
    """

    latent_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512)
    num_vq_embeddings: int = 8192
    vq_embed_dim: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Read the checkpoint's config.json. ValueError for maths that this model does not have."""
        widths = values.get("block_out_channels", ABSENT["block_out_channels"])
        depth = len(cast(Sized, widths))
        neutral = {
            "act_fn": "silu",
            "norm_type": "group",
            "down_block_types": ("DownEncoderBlock2D",) * depth,
            "up_block_types": ("UpDecoderBlock2D",) * depth,
            "mid_block_add_attention": True,
        }
        return read_config(cls, values, neutral, ABSENT, harmless=("force_upcast",))

    @property
    def dim(self) -> int:
        """Of a row of the codebook, and of a latent."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim


class Codebook(nn.Module):
    """The rows that stand for latents."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        nn.init.uniform_(self.embedding.weight, -1 / rows, 1 / rows)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, D, h, w) -> z_q of its shape, and the numbers of the rows, (B, h, w).

        z_q carries no gradient to z: see `straight_through`.
        """
        table = self.embedding.weight
        # One image after the other: the distances are h * w times all rows.
        flat = [row.detach().flatten(1).T for row in z]
        ids = torch.stack([torch.cdist(row, table.detach()).argmin(1) for row in flat])
        ids = ids.unflatten(1, z.shape[2:])
        return self.embedding(ids).permute(0, 3, 1, 2), ids


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q, whose gradient goes to z as if nothing had been rounded: z + (z_q - z).detach()."""
    return z + (z_q - z).detach()


def perplexity(ids: Tensor, rows: int) -> Tensor:
    """exp(H) of the use of a codebook: 1 if one row is used, `rows` if all are, equally often."""
    share = torch.bincount(ids.flatten(), minlength=rows).double() / ids.numel()
    return torch.special.entr(share).sum().exp()


class VQModel(nn.Module):
    """z from x by `encode`, x from z by `decode`, which rounds z to the codebook first.

    Latents here are unscaled: a diffusion model's are `config.scaling_factor * z`.
    """

    def __init__(self, config: VQConfig = VQConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.dim, 1)
        self.quantize = Codebook(config.num_vq_embeddings, config.dim)
        self.post_quant_conv = nn.Conv2d(config.dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """How many times as wide and as high as its latent an image is."""
        return self.config.factor

    def encode(self, x: Tensor) -> Tensor:
        """Image in [-1, 1], (B, 3, H, W) -> z (B, dim, H // factor, W // factor), not rounded."""
        expect.shape("image", x, "B", self.config.in_channels, "H", "W")
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, quantise: bool = True) -> Tensor:
        """Unscaled latent (B, dim, h, w) -> image (B, 3, h * factor, w * factor), about [-1, 1].

        quantise: False for a z that is of the codebook already. Gradients go straight through.
        """
        expect.shape("latents", z, "B", self.config.dim, "h", "w")
        if quantise:
            z_q, _ = self.quantize(z)
            z = straight_through(z, z_q)
        return self.decoder(self.post_quant_conv(z))
