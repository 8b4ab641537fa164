"""What the networks that predict the noise share: their sites, and what is prepared once.

    network(x (B, C, h, w), t, context (R, L, D), edits) -> (R, out, h, w),     R = G * B

The G guidance groups see the same x and t, so a network computes them as one until the first site
where they can differ.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import expect
from . import ops
from .attention import NONE, Attention, AttentionEdit, Implementation, check_implementation
from .features import FeatureEdit, edited
from .sites import KINDS, MAPS, Edits, Site, SiteKind, Size

Context = Mapping[str, tuple[Tensor, Tensor]]  # cross site -> keys, values, (R, heads, L, head_dim)


def feature(x: Tensor, site: str, edits: Edits, rows: int) -> Tensor:
    """x, or what the edit at a feature site makes of all its rows."""
    edit: Any = edits.get(site)
    return x if edit is None else edited(ops.repeat_rows(x, rows), edit, site)


class Denoiser(nn.Module):
    """The sites of a network by name, its choice of attention, its text as keys and values.

    A subclass has a `config` with in_channels, sample_size and cross_attention_dim, fills `_sites`
    when its modules are there, and says the `grid` of each.
    """

    config: Any
    _sites: Mapping[str, Site]

    def __init__(self) -> None:
        super().__init__()
        self._attention: Implementation = "sdpa"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def attention(self) -> Implementation:
        """The code that computes attention, "triton", "sdpa" or "reference"; may be set."""
        return self._attention

    @attention.setter
    def attention(self, impl: Implementation) -> None:
        self._attention = check_implementation(impl)

    def sites(
        self,
        kind: SiteKind | None = None,
        max_tokens: int | None = None,
        size: Size | None = None,
    ) -> list[str]:
        """Names of the sites that edits can address, in forward order.

        kind: attention sites, "self", "cross" or None for both; or "feature" for all feature sites,
        or those of one kind, "resnet", "transformer", "block", "skip", "q", "k", "v" or "out".
        max_tokens: only sites with at most that many positions of the latent grid at their
        resolution (of an attention: queries) for latents of `size` (h, w), by default
        config.sample_size.
        """
        if kind not in KINDS:
            expected = ", ".join(map(repr, KINDS))
            raise ValueError(f"kind is {kind!r}, expected one of {expected}")
        names = [name for name, site in self._sites.items() if site.kind in KINDS[kind]]
        if max_tokens is None:
            return names
        return [name for name in names if math.prod(self.grid(name, size)) <= max_tokens]

    def grid(self, site: str, size: Size | None = None) -> tuple[int, int]:
        """(h, w) of the positions at a site (of an attention: its queries).

        size: of the latents, by default config.sample_size. ValueError for an unknown site.
        """
        raise NotImplementedError

    def latent_size(self, size: Size | None) -> tuple[int, int]:
        """(h, w) of `size`, by default config.sample_size; ValueError if there is none."""
        size = self.config.sample_size if size is None else size
        if size is None:
            raise ValueError("the model's config has no sample_size: give the latents' size (h, w)")
        h, w = size if isinstance(size, (tuple, list)) else (size, size)
        return h, w

    def heads(self, site: str) -> int:
        """The heads of an attention site, and of its q, k, v and out; ValueError for others."""
        if (heads := self.place(site).heads) == 0:
            raise ValueError(f"{site} is no attention and has no heads")
        return heads

    def shape(self, site: str, size: Size | None = None, tokens: int = 77) -> tuple[int, ...]:
        """Of one row of what is at a site: (C, h, w); of an attention (heads, queries, keys), its
        q, k and v (heads, queries or keys, head_dim), its output (queries, C).

        size: of the latents, by default config.sample_size. tokens: the keys of cross-attention.
        """
        return self.place(site).shape(self.grid(site, size), tokens)

    def place(self, site: str) -> Site:
        """What is known of a site; ValueError if it is not there."""
        if site not in self._sites:
            listed = 'unet.sites() and unet.sites("feature") list the names'
            raise ValueError(f"no site is called {site!r:.200}; {listed}")
        return self._sites[site]

    def site(self, name: str) -> Attention:
        """The attention site of that name."""
        return cast(Attention, self.get_submodule(name))

    def known(self, edits: Edits | None, recompute: bool) -> Edits:
        """The edits, none if None; ValueError for a site that is not there or of the other kind."""
        for name, edit in (edits or NONE).items():
            expected = AttentionEdit if self.place(name).kind in MAPS else FeatureEdit
            if type(edit) is not expected:
                got = type(edit).__name__
                raise ValueError(f"{name}: got {got} as the edit, expected {expected.__name__}")
            saves = [field for field in edit._fields if field.startswith("save")]
            if recompute and any(getattr(edit, field) is not None for field in saves):
                raise ValueError(f"{name}: recompute=True would save twice, expected no save there")
        return edits or NONE

    def prepare(self, context: Tensor) -> Context | Tensor:
        """Project the text to keys and values of every cross site, once per prompt.

        context (R, L, cross_attention_dim) -> {site: (k, v)}, each (R, heads, L, head_dim), of
        today's weights; `forward` takes it in place of the context. Where somebody watches or
        changes a layer that projects (hooks, LoRA), it is the context itself: every call projects.
        """
        sites = [self.site(name) for name in self.sites("cross")]
        layers = [layer for site in sites for layer in (site.to_k, site.to_v)]
        plain = all(ops.is_plain(layer, nn.Linear) for layer in layers)
        return self.keys_and_values(context) if plain else context

    def keys_and_values(self, context: Tensor) -> Context:
        """{cross site: (k, v)} of a context (R, L, cross_attention_dim)."""
        expect.shape("context", context, "R", "L", self.config.cross_attention_dim)
        context = context.to(self.dtype)
        return {name: self.site(name).project(context) for name in self.sites("cross")}

    def texts(self, x: Tensor, context: Tensor | Context) -> Context:
        """{cross site: (keys, values)}, prepared if they are not."""
        if not isinstance(context, Mapping):
            context = self.keys_and_values(context)
        self.check_rows(x, next(iter(context.values()))[0].shape[0])
        return context

    def check_rows(self, x: Tensor, rows: int) -> None:
        """ValueError unless a context of that many rows is one or more groups of x."""
        if rows % len(x):
            got = f"{rows} rows for {len(x)} latents"
            raise ValueError(f"context: got {got}, expected a multiple of the latents' rows")

    def check_inputs(self, x: Tensor, t: Tensor, width: int) -> None:
        """ValueError unless x are latents, and t times or rows of `width` that were prepared."""
        expect.shape("x", x, "B", self.config.in_channels, "h", "w")
        shapes = ((), *((n, *row) for n in (1, len(x)) for row in ((), (width,))))
        if not (torch.is_tensor(t) and t.shape in shapes):
            got = tuple(t.shape) if torch.is_tensor(t) else f"{t!r:.80}"
            expected = f"a tensor, 0-d or with one value for each latent, ({len(x)},)"
            raise ValueError(f"t: got {got}, expected {expected}")
