"""The diffusion transformer (DiT): a latent diffusion model whose network is a transformer.

    latent (B, 4, h, w) -> patches of p x p, a token each -> blocks -> (B, 8, h, w)

    (shift1, scale1, gate1, shift2, scale2, gate2) = W silu(time + label) + b
    x += gate1 attn(ln(x) (1 + scale1) + shift1)
    x += gate2 mlp (ln(x) (1 + scale2) + shift2)

W and b are zero at the start, so that every block begins as the identity (adaLN-Zero). What comes
out is the noise and where between its bounds the variance is. Source: Peebles and Xie 2022,
"Scalable Diffusion Models with Transformers", https://arxiv.org/abs/2212.09748, and its code;
module names are those of diffusers' DiTTransformer2DModel, except that its embedders, a copy of
which stands in every block, are here one.

Where the published code and diffusers differ, `compat` says who is followed: "published" (the
default) or "diffusers": the frequencies of the time, i / half and i / (half - 1), and the epsilon
of the norm before the MLP, 1e-6 and 1e-5. At sizes other than sample_size, which the published
code does not take, the positions are stretched to the range of sample_size, as in diffusers; here
each side by its own, so that latents need not be square.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .. import expect
from . import ops
from .attention import Attention, Implementation, check_implementation
from .denoiser import Context, Denoiser, feature
from .dit_config import DiTConfig
from .sites import Edits, Site, Size, inside_of
from .unet import FeedForward, TimestepEmbedding, recomputed, timestep_embedding

FREQUENCIES = 256  # of the time's sinusoids
NORM_EPS = 1e-6
# Of the norm before the MLP, and what is subtracted from the number of frequencies.
COMPAT = {"published": (1e-6, 0), "diffusers": (1e-5, 1)}


class Conditions(NamedTuple):
    """What one call of the DiT tells all of its blocks beside x."""

    vector: Tensor  # time + label, (1, B or R, d)
    context: Context  # cross site -> keys and values
    edits: Edits  # site -> what is changed there
    attention: Implementation  # the code that computes attention
    rows: int  # of the context, which x has too where the guidance groups differ


class GELU(nn.Module):
    """gelu(proj x), in the approximation with tanh."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(ops.linear(self.proj, x), approximate="tanh")


class AdaLayerNorm(nn.Module):
    """ln(x) (1 + scale) + shift, where `linear` makes shift and scale of the condition.

    `parts` counts what linear makes: more than two, the others are for the block. LayerNorm without
    parameters of its own.
    """

    def __init__(self, channels: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(channels, parts * channels)

    def make(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The parts, each (n, 1, channels), of a condition (n, channels)."""
        return ops.linear(self.linear, F.silu(vector))[:, None].chunk(self.parts, dim=-1)


def modulated(x: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    """ln(x) (1 + scale) + shift. x: (rows, N, d); shift, scale: see `fit`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + fit(scale, x)) + fit(shift, x)


def gated(x: Tensor, gate: Tensor | None, h: Tensor) -> Tensor:
    """x + gate h; without a gate x + h."""
    return x + h if gate is None else x + fit(gate, x) * h


def fit(part: Tensor, x: Tensor) -> Tensor:
    """part (n, 1, d) for every row of x, where n is 1 or the rows of x or of a group of them."""
    return part if len(part) == 1 else ops.repeat_rows(part, len(x))


class Block(nn.Module):
    """Self-attention, attention to a text or to the condition if there is some, and an MLP.

    How time and label enter (`conditioning`, figure 3 of the paper):
    adaln_zero       shift, scale and gate of both norms are made of them; begins as the identity
    adaln            shift and scale; no gates
    in_context       they are two more tokens of the image; plain norms
    cross_attention  each block attends to the two of them; plain norms
    x: (rows, N, d). Its attention sites are called `name`.attn1 and `name`.attn2.
    """

    def __init__(self, config: DiTConfig, name: str):
        super().__init__()
        d, heads, affine = config.width, config.num_attention_heads, not config.modulates
        self.name, self.eps = name, COMPAT[config.compat][0]
        self.gates = config.conditioning == "adaln_zero"
        parts = 6 if self.gates else 4
        self.norm1: Any = nn.LayerNorm(d, NORM_EPS) if affine else AdaLayerNorm(d, parts)
        self.attn1 = Attention(d, heads, qkv_bias=True, name=f"{name}.attn1")
        attended = d if config.conditioning == "cross_attention" else config.cross_attention_dim
        self.attends = attended is not None
        if attended is not None:
            self.norm2 = nn.LayerNorm(d, NORM_EPS, elementwise_affine=affine)
            self.attn2 = Attention(d, heads, attended, qkv_bias=True, name=f"{name}.attn2")
        self.norm3 = nn.LayerNorm(d, self.eps, elementwise_affine=affine)
        self.ff = FeedForward(d, GELU)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        # Before an edit, and before the text, the guidance groups are equal.
        if any(site in c.edits for site in (self.attn1.name, *self.attn1.features)):
            x = ops.repeat_rows(x, c.rows)
        edit: Any = c.edits.get(self.attn1.name)
        if not isinstance(self.norm1, AdaLayerNorm):
            h = self.attn1(self.norm1(x), None, edit, c.attention, c.edits)
            x = ops.add(x, h, self.attn1)
            x = self.attend(x, c)
            x = ops.add(x, self.ff(self.norm3(x)), self.ff)
            return feature(x, self.name, c.edits, c.rows)
        parts: list[Any] = list(self.norm1.make(c.vector))
        if not self.gates:
            parts = [*parts[:2], None, *parts[2:], None]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = modulated(x, NORM_EPS, shift1, scale1)
        x = gated(x, gate1, self.attn1(h, None, edit, c.attention, c.edits))
        x = self.attend(x, c)
        x = gated(x, gate2, self.ff(modulated(x, self.eps, shift2, scale2)))
        return feature(x, self.name, c.edits, c.rows)

    def attend(self, x: Tensor, c: Conditions) -> Tensor:
        """x + attn2(norm2 x, context) for every row of the context; x without one."""
        if not self.attends:
            return x
        x = ops.repeat_rows(x, c.rows)
        edit: Any = c.edits.get(self.attn2.name)
        kv = c.context[self.attn2.name]
        h = self.attn2(self.norm2(x), kv, edit, c.attention, c.edits)
        return ops.add(x, h, self.attn2)


class PatchEmbed(nn.Module):
    """Each patch of p x p positions as a token: (B, C, h, w) -> (B, h/p * w/p, d)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(self.proj, x).flatten(2).transpose(1, 2)


class ClassEmbedder(nn.Module):
    """A row for each label, and a last one for "no label"."""

    def __init__(self, labels: int, channels: int):
        super().__init__()
        self.embedding_table = nn.Embedding(labels + 1, channels)


class DiT(Denoiser):
    """The noise in x = alpha x0 + sigma eps, and v, which says the variance, given t and condition.

    The condition is a context (R, L, D): labels as `embed_labels` gives them, or a text of width
    config.cross_attention_dim. See `forward` for shapes, `sites` for the attention sites. New ones
    have the published initialisation: the network gives 0.
    """

    def __init__(self, config: DiTConfig = DiTConfig()):
        super().__init__()
        self.config = config
        d, outputs = config.width, config.patch_size**2 * config.out_channels
        self.pos_embed = PatchEmbed(config)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, d)
        if config.num_embeds_ada_norm is not None:
            self.class_embedder = ClassEmbedder(config.num_embeds_ada_norm, d)
        self.transformer_blocks: Any = nn.ModuleList(
            Block(config, f"transformer_blocks.{i}") for i in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(d, NORM_EPS, elementwise_affine=not config.modulates)
        if config.modulates:
            self.proj_out_1 = nn.Linear(d, 2 * d)
        self.proj_out_2 = nn.Linear(d, outputs)
        self._sites = self.find_sites()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published start: Xavier's uniform, embedders N(0, 0.02), zeros where blocks end."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        small: list[Any] = [self.timestep_embedder.linear_1, self.timestep_embedder.linear_2]
        for layer in small + ([self.class_embedder.embedding_table] if self.labels else []):
            nn.init.normal_(layer.weight, std=0.02)
        zero: list[Any] = [self.proj_out_2] + ([self.proj_out_1] if self.config.modulates else [])
        if self.config.conditioning == "adaln_zero":
            zero += [block.norm1.linear for block in self.transformer_blocks]
            zero += [self.site(name).to_out[0] for name in self.sites("cross")]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def labels(self) -> int:
        """K, the number of labels; label K is "no label". 0: it takes none."""
        return self.config.num_embeds_ada_norm or 0

    def embed_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """The context (B, 1, d) of labels from 0 to K, of which K is "no label"."""
        if not self.labels:
            raise ValueError("this DiT takes no labels (num_embeds_ada_norm is None)")
        if not isinstance(labels, Tensor):
            for label in labels:
                expect.whole_number("label", label, 0, self.labels)
            labels = torch.tensor(list(labels), dtype=torch.int64, device=self.device)
        expect.shape("labels", labels, "B")
        return self.class_embedder.embedding_table(labels)[:, None]

    def find_sites(self) -> dict[str, Site]:
        """{name: Site} of the attentions and the blocks, in forward order."""
        sites: dict[str, Site] = {}
        for block in self.transformer_blocks:
            sites |= dict(inside_of(block, 0, self.config.width))
            sites[block.name] = Site("block", 0, self.config.width)
        return sites

    def shape(
        self, site: str, size: Size | None = None, tokens: int | None = None
    ) -> tuple[int, ...]:
        """As in UNet.shape, but of a block (N, d), N tokens; tokens: of the text, None: 77, or the
        two of the condition that are attended to."""
        place, (h, w) = self.place(site), self.grid(site, size)
        N = h * w + 2 * (self.config.conditioning == "in_context")
        if tokens is None:
            tokens = 2 if self.config.conditioning == "cross_attention" else 77
        return (N, place.channels) if place.kind == "block" else place.shape((N, 1), tokens)

    def grid(self, site: str, size: Size | None = None) -> tuple[int, int]:
        """(h, w) of the tokens of the image, one for each patch, the same at all sites.

        size: of the latents, by default config.sample_size. (In-context, the two tokens of the
        condition come after them.)
        """
        self.place(site)
        return self.patches(size)

    def patches(self, size: Size | None = None) -> tuple[int, int]:
        """(h, w) of the patches of latents of `size`, by default config.sample_size."""
        h, w = self.latent_size(size)
        return h // self.config.patch_size, w // self.config.patch_size

    def prepare(self, context: Tensor) -> Context | Tensor:
        """A text as keys and values of every cross site, once per prompt; labels as they are."""
        return context if self.config.cross_attention_dim is None else super().prepare(context)

    def prepare_times(self, t: Tensor) -> Tensor:
        """The embeddings (n, d) of times (n,), of today's weights, which `forward` takes for t.

        t itself where somebody watches or changes the layers that make them.
        """
        embedder = self.timestep_embedder
        layers = [embedder.linear_1, embedder.linear_2]
        plain = all(ops.is_plain(layer, nn.Linear) for layer in layers)
        return self.embed_times(t) if plain and not ops.is_hooked(embedder) else t

    def embed_times(self, t: Tensor) -> Tensor:
        """(n,) -> (n, d)."""
        shift = COMPAT[self.config.compat][1]
        sinusoids = timestep_embedding(t, FREQUENCIES, freq_shift=shift)
        return self.timestep_embedder(sinusoids.to(self.dtype))

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
        """(eps, v) for every row of the context.

        x: (B, in_channels, h, w), sides that the patch divides; t: integer tensor, 0-d or (B,), or
        1 or B rows of what `prepare_times` made of it; context: (R, 1, d) of labels, R = G * B for
        G guidance groups, group-major, or (R, L, cross_attention_dim) of a text, or what `prepare`
        made of it; edits, attention, recompute: as in UNet.forward. Returns (R, out_channels, h,
        w), of which a learned variance v is the second half. ValueError for what does not fit.
        """
        self.check_inputs(x, t, self.config.width)
        p, (h, w) = self.config.patch_size, x.shape[2:]
        if h % p or w % p:
            raise ValueError(f"x: got latents of {h} x {w}, expected multiples of the patch, {p}")
        impl = self.attention if attention is None else check_implementation(attention)
        time = self.embed_times(t.reshape(-1)) if t.ndim < 2 else t  # (1 or B, d)
        tokens = self.pos_embed(x)
        tokens = tokens + self.positions(h // p, w // p).to(self.dtype)
        tokens, vector, cross = self.conditioned(x, tokens, time, context)
        recompute = recompute and torch.is_grad_enabled()
        rows = next(iter(cross.values()))[0].shape[0] if cross else len(tokens)
        c = Conditions(vector, cross, self.known(edits, recompute), impl, rows)
        for block in self.transformer_blocks:
            tokens = recomputed(block, tokens, c) if recompute else block(tokens, c)
        out = self.last(tokens[:, : h // p * (w // p)], vector)
        return out.unflatten(1, (h // p, w // p)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def conditioned(
        self, x: Tensor, tokens: Tensor, time: Tensor, context: Tensor | Context
    ) -> tuple[Tensor, Tensor, Context]:
        """(tokens, vector of the norms, keys and values) by what the config says."""
        if self.config.cross_attention_dim is not None:  # a text; its time is for all groups
            return tokens, time, self.texts(x, context)
        if not isinstance(context, Tensor):
            raise ValueError("context: got keys and values, expected what embed_labels gives")
        expect.shape("context", context, "R", 1, self.config.width)
        self.check_rows(x, len(context))
        label = context[:, 0].to(self.dtype)
        time = time.expand(len(label), -1) if len(time) == 1 else ops.repeat_rows(time, len(label))
        if self.config.conditioning == "cross_attention":
            pair = torch.stack([time, label], dim=1)
            return tokens, time, {s: self.site(s).project(pair) for s in self.sites("cross")}
        tokens = ops.repeat_rows(tokens, len(label))
        if self.config.conditioning == "in_context":
            return torch.cat([tokens, time[:, None], label[:, None]], dim=1), time, {}
        return tokens, time + label, {}

    def last(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """The output of each patch, (R, N, p, p, out_channels), p rows of p."""
        if self.config.modulates:
            shift, scale = ops.linear(self.proj_out_1, F.silu(vector))[:, None].chunk(2, dim=-1)
            tokens = modulated(tokens, NORM_EPS, shift, scale)
        else:
            tokens = self.norm_out(tokens)
        p = self.config.patch_size
        return ops.linear(self.proj_out_2, tokens).unflatten(-1, (p, p, -1))

    def positions(self, h: int, w: int) -> Tensor:
        """Fixed sinusoids of the place (h * w, d): of the column, then of the row; both sin, cos.

        A side of sample_size / patch_size places counts 0, 1, 2, ...; another is stretched to it.
        """
        d, device = self.config.width, self.device
        sides = (h, w) if self.config.sample_size is None else self.patches()
        i = torch.arange(d // 4, dtype=torch.float64, device=device)
        omega = 10000 ** (-i / (d // 4))
        rows, columns = (
            torch.arange(n, dtype=torch.float64, device=device) * (side / n)
            for n, side in zip((h, w), sides)
        )
        angles = [columns.repeat(h)[:, None] * omega, rows.repeat_interleave(w)[:, None] * omega]
        return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def drop_labels(labels: Tensor, null: int, share: float, generator: Generator) -> Tensor:
    """Labels (B,) of which that share became `null`, so that guidance can be used."""
    chance = torch.rand(labels.shape, generator=generator, dtype=torch.float32, device="cpu")
    return torch.where((chance < share).to(labels.device), null, labels)
