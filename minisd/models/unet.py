"""The cross-attention UNet: predicts the noise in a latent, given the time and a text.

Architecture: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3; module names are
those of diffusers' UNet2DConditionModel, so its state dict loads strictly.

Edits enter as data: `edits` maps the name of a place (sites.py) to an AttentionEdit or a
FeatureEdit, and each layer looks its own up. The network knows nothing else of editing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as activation_checkpoint

from .. import expect
from . import ops
from .attention import Attention, Implementation, check_implementation
from .blocks import Downsample, ResnetBlock, Upsample
from .config import read_config
from .denoiser import Context, Denoiser, feature
from .sites import Edits, Size, sites_of

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
TRANSFORMER_NORM_EPS = 1e-6  # of the GroupNorm before a transformer; others: config.norm_eps

# Options of diffusers' UNet that Stable Diffusion v1 leaves alone, with the value that does.
NEUTRAL = {
    "act_fn": "silu",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
# Where diffusers' defaults are others than Stable Diffusion v1's numbers.
ABSENT = {"sample_size": None, "cross_attention_dim": 1280}
# Read by diffusers only where addition_embed_type, unknown here, is set.
HARMLESS = ("addition_embed_type_num_heads",)


@dataclass(frozen=True)
class UNetConfig:
    """The numbers of a UNet; the defaults are Stable Diffusion v1's.

    `attention_head_dim` is the number of heads, one for all blocks or one for each: the published
    name is a misnomer that every checkpoint carries.
    """

    sample_size: int | tuple[int, int] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN)
    up_block_types: tuple[str, ...] = (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self) -> None:
        depth = len(self.block_out_channels)
        down, up = (CROSS_DOWN, PLAIN_DOWN), (CROSS_UP, PLAIN_UP)
        for name, known in (("down_block_types", down), ("up_block_types", up)):
            got = getattr(self, name)
            if len(got) != depth or not set(got) <= set(known):
                expected = f"{depth} (one for each of block_out_channels) of {known}"
                raise ValueError(f"{name}: expected {expected}, got {got}")
        if len(self.heads) != depth:
            got = self.attention_head_dim
            raise ValueError(f"attention_head_dim: expected a number or {depth} of them, got {got}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNetConfig":
        """Read the checkpoint's unet/config.json. ValueError for maths that this UNet has not."""
        return read_config(cls, values, NEUTRAL, ABSENT, HARMLESS)

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of attention heads in each block."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)


def timestep_embedding(
    t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> Tensor:
    """Sinusoids of the time: cos and sin (in this order if flipped) of t * omega_i.

        omega_i = 10000 ** (-i / (dim / 2 - freq_shift)),   i = 0 .. dim / 2 - 1

    t: (n,) -> (n, dim), float32. Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * i / (half - freq_shift))
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(sinusoids)))."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return ops.linear(self.linear_2, F.silu(ops.linear(self.linear_1, sinusoids)))


class Conditioning(NamedTuple):
    """What one call of the UNet tells all of its blocks beside x."""

    times: Mapping[str, Tensor]  # resnet -> what the time adds, (1 or B, channels)
    context: Context  # cross site -> keys and values of the text
    edits: Edits  # site -> what is changed there
    attention: Implementation  # the code that computes attention
    recompute: bool  # under gradients, keep a layer's input only
    rows: int  # of the context, which x has too where the guidance groups differ

    def feature(self, site: str, x: Tensor) -> Tensor:
        """x, or what the edit at a feature site makes of all its rows."""
        return feature(x, site, self.edits, self.rows) if self.edits else x


class GEGLU(nn.Module):
    """h * gelu(gate), both linear in x, exact (erf) GELU. Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj, x)


class FeedForward(nn.Module):
    """Linear(first(x)), four times as wide inside. x: (..., channels)."""

    def __init__(self, channels: int, first: Callable[[int, int], nn.Module] = GEGLU):
        super().__init__()
        # nn.Identity holds the place of diffusers' dropout: the checkpoint calls the last net.2.
        last = nn.Linear(4 * channels, channels)
        self.net: Any = nn.Sequential(first(channels, 4 * channels), nn.Identity(), last)

    def forward(self, x: Tensor) -> Tensor:
        first, identity, last = self.net
        return ops.by_rows(lambda x: ops.linear(last, identity(first(x))), x, self.modules())


class TransformerBlock(nn.Module):
    """x + attn1(norm1 x), then x + attn2(norm2 x, text), then x + ff(norm3 x).

    x: (rows, h*w, channels). Its attention sites are called `name`.attn1 and `name`.attn2.
    """

    def __init__(self, channels: int, heads: int, context_channels: int, name: str):
        super().__init__()
        self.name = name
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, name=f"{name}.attn1")
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels, name=f"{name}.attn2")
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, c: Conditioning) -> Tensor:
        attn1, attn2, ff = self.attn1, self.attn2, self.ff
        # Before an edit, and before the text, the guidance groups are equal.
        if c.edits and any(site in c.edits for site in (attn1.name, *attn1.features)):
            x = ops.repeat_rows(x, c.rows)
        edit: Any = c.edits.get(attn1.name)
        h = attn1(ops.layer_norm(self.norm1, x), None, edit, c.attention, c.edits)
        x, h = ops.repeat_rows(x, c.rows), ops.repeat_rows(h, c.rows)
        x, h = ops.add_layer_norm(self.norm2, x, h, attn1)
        edit, kv = c.edits.get(attn2.name), c.context[attn2.name]
        h = attn2(h, kv, edit, c.attention, c.edits)
        x, h = ops.add_layer_norm(self.norm3, x, h, attn2)
        return ops.add(x, ff(h), ff)


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm x))) on the h*w positions as tokens.

    x: (rows, channels, h, w).
    """

    def __init__(self, channels: int, heads: int, context_channels: int, groups: int, name: str):
        super().__init__()
        if heads < 1 or channels % heads:
            got = f"{heads} heads do not divide {channels} channels"
            raise ValueError(f"attention_head_dim: {got}")
        self.name = name
        self.norm = nn.GroupNorm(groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, heads, context_channels, f"{name}.transformer_blocks.0")
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, c: Conditioning) -> Tensor:
        tokens = ops.conv2d(self.proj_in, ops.group_norm(self.norm, x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, c)  # (rows, h*w, channels)
        rows, _, channels = tokens.shape
        out = ops.conv2d(self.proj_out, tokens.transpose(1, 2).view(rows, channels, *x.shape[2:]))
        return c.feature(self.name, ops.add(x, out))


class Block(nn.Module):
    """The layers of one resolution: a resnet each, followed by a transformer in the first of them.

    widths: the input channels of each resnet. transformers: how many, each with `heads`.
    """

    def __init__(
        self,
        config: UNetConfig,
        widths: list[int],
        channels: int,
        heads: int,
        transformers: int,
        name: str,
    ):
        super().__init__()
        self.name = name
        groups, eps = config.norm_num_groups, config.norm_eps
        time_channels = 4 * config.block_out_channels[0]
        self.resnets: Any = nn.ModuleList(
            ResnetBlock(width, channels, groups, eps, time_channels, f"{name}.resnets.{i}")
            for i, width in enumerate(widths)
        )
        text = config.cross_attention_dim
        self.attentions: Any = nn.ModuleList(
            Transformer(channels, heads, text, groups, f"{name}.attentions.{i}")
            for i in range(transformers)
        )

    def layers(self) -> list[tuple[ResnetBlock, Transformer | None]]:
        """Each resnet, with the transformer that follows it if there is one."""
        return list(zip_longest(self.resnets, self.attentions))


def through(layer: tuple[ResnetBlock, Transformer | None], x: Tensor, c: Conditioning) -> Tensor:
    """x through one of the layers of a block."""
    resnet, transformer = layer
    x = c.feature(resnet.name, resnet(x, c.times[resnet.name]))
    return x if transformer is None else transformer(x, c)


def recomputed(layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """layer(*arguments), computed once more in the backward pass in place of kept activations."""
    keep = activation_checkpoint.checkpoint
    return keep(layer, *arguments, use_reentrant=False, preserve_rng_state=False)


class DownBlock(Block):
    """Layers, then half the resolution: -> x and the skips, the output of each of them."""

    def __init__(
        self,
        config: UNetConfig,
        widths: list[int],
        channels: int,
        heads: int,
        cross: bool,
        downsamples: bool,
        name: str,
    ):
        last = [Downsample(channels)] if downsamples else []  # first: so a seed gives its weights
        super().__init__(config, widths, channels, heads, len(widths) if cross else 0, name)
        self.downsamplers = nn.ModuleList(last)

    def forward(self, x: Tensor, c: Conditioning) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for layer in self.layers():
            x = recomputed(through, layer, x, c) if c.recompute else through(layer, x, c)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return c.feature(self.name, x), skips


class MidBlock(Block):
    """resnet, transformer, resnet, all at the coarsest resolution."""

    def __init__(self, config: UNetConfig, channels: int, heads: int, name: str):
        super().__init__(config, [channels, channels], channels, heads, 1, name)

    def forward(self, x: Tensor, c: Conditioning) -> Tensor:
        for layer in self.layers():
            x = through(layer, x, c)
        return c.feature(self.name, x)


class UpBlock(Block):
    """A skip joins before each layer from `first` on; then `size`, the next skip's resolution."""

    def __init__(
        self,
        config: UNetConfig,
        widths: list[int],
        channels: int,
        heads: int,
        cross: bool,
        upsamples: bool,
        name: str,
    ):
        last = [Upsample(channels)] if upsamples else []
        super().__init__(config, widths, channels, heads, len(widths) if cross else 0, name)
        self.upsamplers = nn.ModuleList(last)

    def forward(
        self, x: Tensor, skips: list[Tensor], size: torch.Size, c: Conditioning, first: int = 0
    ) -> Tensor:
        for layer in self.layers()[first:]:
            skip = ops.repeat_rows(skips.pop(0), x.shape[0])
            skip = c.feature(f"{layer[0].name}.skip", skip)
            x = torch.cat([x, skip], dim=1)
            x = recomputed(through, layer, x, c) if c.recompute else through(layer, x, c)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return c.feature(self.name, x)


class UNet(Denoiser):
    """eps(x, t, text), the noise in x = alpha x0 + sigma eps.

    See `forward` for shapes, `sites` for the places that can be edited, `attention` for the code
    that computes attention.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths, heads, layers = config.block_out_channels, config.heads, config.layers_per_block
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        self.down_blocks: Any = nn.ModuleList()
        skip_widths = [widths[0]]  # channels of the skips, in the order in which they are pushed
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types)):
            ins = [widths[max(i - 1, 0)]] + [width] * (layers - 1)
            cross, name = kind == CROSS_DOWN, f"down_blocks.{i}"
            down = DownBlock(config, ins, width, heads[i], cross, i < last, name)
            self.down_blocks.append(down)
            skip_widths += [width] * (layers + (i < last))

        self.mid_block = MidBlock(config, widths[-1], heads[-1], "mid_block")

        self.up_blocks: Any = nn.ModuleList()
        channels = widths[-1]
        for i, kind in enumerate(config.up_block_types):
            width = widths[last - i]
            ins = [(channels if j == 0 else width) + skip_widths.pop() for j in range(layers + 1)]
            cross, name = kind == CROSS_UP, f"up_blocks.{i}"
            up = UpBlock(config, ins, width, heads[last - i], cross, i < last, name)
            self.up_blocks.append(up)
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        self._sites = sites_of(self)
        layer = "attentions.0" if config.up_block_types[-1] == CROSS_UP else "resnets.0"
        self.deep = f"up_blocks.{last}.{layer}"  # the last feature that comes from below
        self._resnets = self.sites("resnet")
        self._time_widths = [self.resnet(name).conv1.out_channels for name in self._resnets]

    def grid(self, site: str, size: Size | None = None) -> tuple[int, int]:
        h, w = self.latent_size(size)
        for _ in range(self.place(site).halvings):
            h, w = (h + 1) // 2, (w + 1) // 2
        return h, w

    def prepare_times(self, t: Tensor) -> Tensor:
        """Project times to what they add at every resnet, for all steps at once.

        t: integers (n,) -> (n, T), the channels of all resnets side by side, of today's weights;
        `forward` takes rows of it in place of t. Where somebody watches or changes a layer that
        projects, it is t itself.
        """
        layers = [self.resnet(name).time_emb_proj for name in self._resnets]
        layers += [self.time_embedding.linear_1, self.time_embedding.linear_2]
        hooked = ops.is_hooked(self.time_embedding)
        plain = not hooked and all(ops.is_plain(layer, nn.Linear) for layer in layers)
        return self.time_table(t) if plain else t

    def time_table(self, t: Tensor) -> Tensor:
        """What the times t (n,) add at all resnets, side by side: (n, T)."""
        config, dtype = self.config, self.dtype
        channels, freq_shift = config.block_out_channels[0], config.freq_shift
        sinusoids = timestep_embedding(t, channels, config.flip_sin_to_cos, freq_shift)
        emb = self.time_embedding(sinusoids.to(dtype))  # (n, 4 * block_out_channels[0])
        return torch.cat([self.resnet(name).project(emb) for name in self._resnets], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Context,
        edits: Edits | None = None,
        *,
        attention: Implementation | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """eps for every row of the context.

        x: (B, in_channels, h, w); t: integer tensor, 0-d or (B,), or 1 or B rows of what
        `prepare_times` made of it; context: (R, L, cross_attention_dim) with R = G * B for G
        guidance groups, group-major (all B rows of a group stand together), or what `prepare` made
        of it; edits: {site: AttentionEdit or FeatureEdit}; attention: in place of self.attention in
        this call; recompute: under gradients a layer keeps its input only and computes the rest
        again in the backward pass. Returns (R, out_channels, h, w).

        The G groups see the same x and t, so they are one until the first site where they can
        differ, a cross site or one with an edit; from there on the rows are repeated. Where the
        only edit injects a stored feature in all rows at `self.deep`, nothing below it is computed
        (DeepCache). ValueError for an unknown site, for shapes that do not fit, and for a save with
        recompute.
        """
        impl = self.attention if attention is None else check_implementation(attention)
        recompute = recompute and torch.is_grad_enabled()
        edits = self.known(edits, recompute)
        times, texts = self.times(x, t), self.texts(x, context)
        rows = next(iter(texts.values()))[0].shape[0]
        c = Conditioning(times, texts, edits, impl, recompute, rows)

        x = ops.conv2d(self.conv_in, x)
        if self.is_shallow(c):
            x = self.outermost(x, c)
        else:
            skips = [x]
            for down in self.down_blocks:
                x, new = down(x, c)
                skips += new
            x = self.mid_block(x, c)
            for up in self.up_blocks:
                joining = [skips.pop() for _ in up.resnets]
                x = up(x, joining, skips[-1].shape[2:] if skips else x.shape[2:], c)
        return ops.norm_silu_conv(self.conv_norm_out, self.conv_out, x)

    def is_shallow(self, c: Conditioning) -> bool:
        """Whether nothing of what is below `self.deep` is used."""
        edit: Any = c.edits.get(self.deep)
        only = edit is not None and len(c.edits) == 1
        return only and edit.inject is not None and len(edit.inject) == c.rows

    def outermost(self, x: Tensor, c: Conditioning) -> Tensor:
        """What is left of all blocks: the layers whose skips join after `self.deep`."""
        down, up = self.down_blocks[0], self.up_blocks[-1]
        skips = [x]
        for layer in down.layers()[: len(up.resnets) - 2]:
            skips.append(through(layer, skips[-1], c))
        x = c.feature(self.deep, x)  # replaced by what is injected, of the same shape
        return up(x, skips[::-1], x.shape[2:], c, first=1)

    def resnet(self, name: str) -> ResnetBlock:
        return cast(ResnetBlock, self.get_submodule(name))

    def times(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """{resnet: what the time adds to its channels, (1 or B, channels)}."""
        if self.config.in_channels > 2 * self.config.out_channels:
            what = "x of an inpainting model (minisd.inpaint draws with it)"
            expect.shape(what, x, "B", self.config.in_channels, "h", "w")
        widths = self._time_widths
        self.check_inputs(x, t, sum(widths))
        table = self.time_table(t.reshape(-1)) if t.ndim < 2 else t
        return dict(zip(self._resnets, table.split(widths, dim=1)))
