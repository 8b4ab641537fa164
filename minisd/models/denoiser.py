"""What the networks that predict the noise share: their attention sites, and what is prepared once.

    network(x (B, C, h, w), t, context (R, L, D), edits) -> (R, out, h, w),     R = G * B

The G guidance groups see the same x and t, so a network computes them as one until the first site
where they can differ.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import expect
from . import ops
from .attention import Attention, AttentionEdit, Implementation, check_implementation

Context = Mapping[str, tuple[Tensor, Tensor]]  # cross site -> keys, values, (R, heads, L, head_dim)
Size = int | tuple[int, int]  # of latents, (h, w)


class Denoiser(nn.Module):
    """The attention sites of a network by name, and its text as keys and values.

    A subclass has a `config` with in_channels, sample_size and cross_attention_dim, a `grid`, and
    calls `find_sites` when its modules are there.
    """

    config: Any

    def __init__(self) -> None:
        super().__init__()
        self._attention: Implementation = "sdpa"

    def find_sites(self) -> None:
        """Name the attention sites: the modules that are exactly Attention."""
        names = {name: type(module) for name, module in self.named_modules()}
        self._sites = tuple(name for name, kind in names.items() if kind is Attention)

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
        kind: Literal["self", "cross"] | None = None,
        max_tokens: int | None = None,
        size: Size | None = None,
    ) -> list[str]:
        """Names of the attention sites in forward order.

        kind: "self", "cross" or None for both; max_tokens: only sites with at most that many
        queries (positions of the grid at the site's resolution) for latents of `size` (h, w), by
        default config.sample_size.
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

    def site(self, name: str) -> Attention:
        """The attention site of that name."""
        return cast(Attention, self.get_submodule(name))

    def grid(self, site: str, size: Size | None = None) -> tuple[int, int]:
        """(h, w) of the queries at `site` for latents of `size`, by default config.sample_size."""
        raise NotImplementedError

    def latent_size(self, size: Size | None) -> tuple[int, int]:
        """(h, w) of `size`, by default config.sample_size; ValueError if there is none."""
        size = self.config.sample_size if size is None else size
        if size is None:
            raise ValueError("the model's config has no sample_size: give the latents' size (h, w)")
        h, w = size if isinstance(size, (tuple, list)) else (size, size)
        return h, w

    def known(self, edits: Mapping[str, AttentionEdit] | None) -> Mapping[str, AttentionEdit]:
        """The edits, none if None; ValueError for a site that is not there."""
        edits = {} if edits is None else edits
        if unknown := [name for name in edits if name not in self._sites]:
            named = ", ".join(unknown)
            raise ValueError(f"no attention site is called {named}; sites() lists the names")
        return edits

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
        rows = next(iter(context.values()))[0].shape[0]
        self.check_rows(x, rows)
        return context

    def check_rows(self, x: Tensor, rows: int) -> None:
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
