"""The cross-attention UNet: predicts the noise in a latent, given the time and a text.

Architecture: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3; module names are
those of diffusers' UNet2DConditionModel, so its state dict loads strictly.

Attention edits enter as data: `edits` maps a site's name, which is the dotted name of its module,
to an AttentionEdit, and each transformer block looks its two sites up. The network knows nothing
else of editing.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import expect
from .attention import IMPLEMENTATIONS, Attention
from .blocks import Downsample, ResnetBlock, Upsample, add, norm_silu_conv, repeat_rows
from .config import read_config

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
TRANSFORMER_NORM_EPS = (
    1e-6  # the GroupNorm in front of a transformer; the others take config.norm_eps
)

# Options of diffusers' UNet that Stable Diffusion v1 leaves alone, with the value that leaves them
# alone.
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
HARMLESS = (
    "addition_embed_type_num_heads",
)  # read by diffusers only where addition_embed_type, unknown here, is set


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

    def __post_init__(self):
        depth = len(self.block_out_channels)
        for name, known in (
            ("down_block_types", (CROSS_DOWN, PLAIN_DOWN)),
            ("up_block_types", (CROSS_UP, PLAIN_UP)),
        ):
            got = getattr(self, name)
            if len(got) != depth or not set(got) <= set(known):
                raise ValueError(
                    f"{name}: expected {depth} (one for each of block_out_channels) of {known}, got {got}"
                )
        if len(self.heads) != depth:
            raise ValueError(
                f"attention_head_dim: expected a number or {depth} of them, got {self.attention_head_dim}"
            )

    @classmethod
    def from_dict(cls, values):
        """Read the checkpoint's unet/config.json (a dict). ValueError for maths that this UNet does
        not have."""
        return read_config(cls, values, NEUTRAL, ABSENT, HARMLESS)

    @property
    def heads(self):
        """The number of attention heads in each block."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)


def timestep_embedding(t, dim, flip_sin_to_cos=True, freq_shift=0):
    """Sinusoids of the time: cos and sin (in this order if flipped) of t * 10000 ** (-i / (dim/2 -
    freq_shift)).

    t: (n,) -> (n, dim), float32. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section
    3.5.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * i / (half - freq_shift))
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(sinusoids)))."""

    def __init__(self, channels, time_channels):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, sinusoids):
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class GEGLU(nn.Module):
    """h * gelu(gate), both linear in x, with the exact (erf) GELU. Shazeer 2020,
    https://arxiv.org/abs/2002.05202."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(
            h
        )  # in place: at 64 x 64 a fresh tensor costs as much as the product


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        # nn.Identity holds the place of diffusers' dropout, because the checkpoint calls the last
        # layer net.2.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """x + attn1(norm1 x), then x + attn2(norm2 x, text), then x + ff(norm3 x). x: (rows, h*w,
    channels)."""

    def __init__(self, channels, heads, context_channels):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, context, edits):
        kv = context[self.attn2.name]
        rows = kv[0].shape[0]
        edit = edits.get(self.attn1.name)
        if edit is not None:  # without an edit the guidance groups are still equal here
            x = repeat_rows(x, rows)
        x = add(x, self.attn1(self.norm1(x), edit=edit))
        x = repeat_rows(x, rows)
        x = add(x, self.attn2(self.norm2(x), kv, edits.get(self.attn2.name)))
        return add(x, self.ff(self.norm3(x)))


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm x))) on the h*w positions as tokens. x: (rows, channels, h,
    w)."""

    def __init__(self, channels, heads, context_channels, groups):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"attention_head_dim: {heads} heads do not divide {channels} channels")
        self.norm = nn.GroupNorm(groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context_channels)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context, edits):
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (rows, h*w, channels)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, edits)
        out = self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
        return add(x, out)


class Stage(nn.Module):
    """The resnets of one resolution, each followed by its transformer if the stage has them.

    `widths` are the input channels of each resnet. Down stages return what the up stages will
    concatenate.
    """

    def __init__(self, widths, channels, cross, heads, config, down=None, up=None):
        super().__init__()
        self.recompute = False  # see UNet.recompute; were it the class's, setting it would cost compiled graphs again
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, config.norm_num_groups, config.norm_eps, time_channels)
            for width in widths
        )
        self.attentions = nn.ModuleList(
            Transformer(channels, heads, config.cross_attention_dim, config.norm_num_groups)
            for _ in widths
            if cross
        )
        self.downsamplers = nn.ModuleList([] if down is None else [down])
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def layer(self, *arguments):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self.compute, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        return self.compute(*arguments)

    def compute(self, i, x, times, context, edits):
        x = self.resnets[i](x, times[self.resnets[i].name])
        return self.attentions[i](x, context, edits) if self.attentions else x

    def down(self, x, times, context, edits):
        """-> x and the list of skips: the output of each layer and of the downsampler."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, times, context, edits)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips

    def up(self, x, skips, times, context, edits):
        """Takes one skip off the end of `skips` for each layer; upsamples to the size of the skip
        that comes next."""
        for i in range(len(self.resnets)):
            x = torch.cat([x, repeat_rows(skips.pop(), x.shape[0])], dim=1)
            x = self.layer(i, x, times, context, edits)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class MidBlock(nn.Module):
    """resnet, transformer, resnet, all at the coarsest resolution."""

    def __init__(self, channels, heads, config):
        super().__init__()
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, config.norm_num_groups, config.norm_eps, time_channels)
            for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [Transformer(channels, heads, config.cross_attention_dim, config.norm_num_groups)]
        )

    def forward(self, x, times, context, edits):
        first, second = self.resnets
        x = self.attentions[0](first(x, times[first.name]), context, edits)
        return second(x, times[second.name])


class UNet(nn.Module):
    """eps(x, t, text), the noise in x = alpha x0 + sigma eps.

    See `forward` for shapes, `sites` for the places where attention can be edited, `attention` for
    the code that computes attention.
    """

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        widths, heads, layers = config.block_out_channels, config.heads, config.layers_per_block
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]  # channels of the skips, in the order in which they are pushed
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types)):
            ins = [widths[max(i - 1, 0)]] + [width] * (layers - 1)
            down = Downsample(width) if i < last else None
            self.down_blocks.append(
                Stage(ins, width, kind == CROSS_DOWN, heads[i], config, down=down)
            )
            skip_widths += [width] * (layers + (down is not None))

        self.mid_block = MidBlock(widths[-1], heads[-1], config)

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for i, kind in enumerate(config.up_block_types):
            width = widths[last - i]
            ins = [(channels if j == 0 else width) + skip_widths.pop() for j in range(layers + 1)]
            up = Upsample(width) if i < last else None
            self.up_blocks.append(
                Stage(ins, width, kind == CROSS_UP, heads[last - i], config, up=up)
            )
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        self._sites = {
            name: module for name, module in self.named_modules() if isinstance(module, Attention)
        }
        self._resnets = {
            name: module for name, module in self.named_modules() if isinstance(module, ResnetBlock)
        }
        for name, module in (*self._sites.items(), *self._resnets.items()):
            module.name = name

    @property
    def attention(self):
        """The code that computes attention, "triton", "sdpa" or "reference"; set it to change it at
        every site."""
        return next(iter(self._sites.values())).impl

    @attention.setter
    def attention(self, impl):
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        for site in self._sites.values():
            site.impl = impl

    def fuse_qkv(self):
        """Let q, k and v be one product at every self-attention site; see Attention.fuse."""
        for name in self.sites("self"):
            self._sites[name].fuse()

    @property
    def recompute(self):
        """Whether, under gradients, a layer keeps its input only and computes the rest again in the
        backward pass."""
        return self.down_blocks[0].recompute

    @recompute.setter
    def recompute(self, value):
        for stage in (*self.down_blocks, *self.up_blocks):
            stage.recompute = value

    def sites(self, kind=None, max_tokens=None, size=None):
        """Names of the attention sites in forward order.

        kind: "self", "cross" or None for both; max_tokens: only sites with at most that many
        queries (positions of the latent grid at the site's resolution) for latents of `size` (h,
        w), by default config.sample_size.
        """
        if kind not in (None, "self", "cross"):
            raise ValueError(f'kind must be "self", "cross" or None, got {kind!r}')
        wanted = {None: ("attn1", "attn2"), "self": ("attn1",), "cross": ("attn2",)}[kind]
        return [
            name
            for name in self._sites
            if name.endswith(wanted)
            and (max_tokens is None or math.prod(self.grid(name, size)) <= max_tokens)
        ]

    def grid(self, site, size=None):
        """(h, w) of the queries at `site` for latents of `size` (h, w), by default
        config.sample_size."""
        size = self.config.sample_size if size is None else size
        if size is None:
            raise ValueError("the UNet's config has no sample_size: give the latents' size (h, w)")
        h, w = size if isinstance(size, (tuple, list)) else (size, size)
        last = len(self.config.block_out_channels) - 1
        block, index = site.split(".")[:2]
        halvings = (
            last
            if block == "mid_block"
            else int(index)
            if block == "down_blocks"
            else last - int(index)
        )
        for _ in range(halvings):
            h, w = (h + 1) // 2, (w + 1) // 2
        return h, w

    def prepare(self, context):
        """Project the text to keys and values of every cross site, once per prompt.

        context (R, L, cross_attention_dim) -> {site: (k, v)}, each (R, heads, L, head_dim);
        `forward` takes it in place of the context.
        """
        expect.shape("context", context, "R", "L", self.config.cross_attention_dim)
        return {name: self._sites[name].project(context) for name in self.sites("cross")}

    def prepare_times(self, t):
        """Project times to what they add at every resnet, for all steps at once.

        t: integers (n,) -> (n, T), the channels of all resnets side by side; `forward` takes rows
        of it in place of t.
        """
        config, dtype = self.config, self.time_embedding.linear_1.weight.dtype
        sinusoids = timestep_embedding(
            t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        emb = self.time_embedding(sinusoids.to(dtype))  # (n, 4 * block_out_channels[0])
        return torch.cat([resnet.project(emb) for resnet in self._resnets.values()], dim=1)

    def forward(self, x, t, context, edits=None):
        """eps for every row of the context.

        x: (B, in_channels, h, w); t: integer tensor, 0-d or (B,), or 1 or B rows of what
        `prepare_times` made of it; context: (R, L, cross_attention_dim) with R = G * B for G
        guidance groups, group-major (all B rows of a group stand together), or what `prepare` made
        of it; edits: {site: AttentionEdit}. Returns (R, out_channels, h, w).

        The G groups see the same x and t, so they are one until the first site where they can
        differ, a cross site or one with an edit; from there on the rows are repeated. ValueError
        for an unknown site and for shapes that do not fit.
        """
        expect.shape("x", x, "B", self.config.in_channels, "h", "w")
        widths = [resnet.conv1.out_channels for resnet in self._resnets.values()]
        shapes = ((), *((n, *row) for n in (1, len(x)) for row in ((), (sum(widths),))))
        if not (torch.is_tensor(t) and t.shape in shapes):
            got = tuple(t.shape) if torch.is_tensor(t) else f"{t!r:.80}"
            raise ValueError(
                f"t: got {got}, expected a tensor, 0-d or with one value for each latent, ({len(x)},)"
            )
        edits = {} if edits is None else edits
        unknown = [name for name in edits if name not in self._sites]
        if unknown:
            raise ValueError(
                f"no attention site is called {', '.join(unknown)}; unet.sites() lists the names"
            )
        if not isinstance(context, dict):
            context = self.prepare(context)
        rows = next(iter(context.values()))[0].shape[0]
        if rows % len(x):
            raise ValueError(
                f"context: got {rows} rows for {len(x)} latents, expected a multiple of the latents' rows"
            )
        if t.ndim < 2:
            t = self.prepare_times(t.reshape(-1))
        times = dict(zip(self._resnets, t.split(widths, dim=1)))  # resnet -> (1 or B, its channels)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, new = block.down(x, times, context, edits)
            skips += new
        x = self.mid_block(x, times, context, edits)
        for block in self.up_blocks:
            x = block.up(x, skips, times, context, edits)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)
