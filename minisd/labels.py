"""Images of labels: a DiT end to end, as `pipeline` is Stable Diffusion.

    dit = minisd.load_dit("shapes-dit")                  # bundled
    dit.generate(labels="a red circle")
    dit = minisd.load_dit("facebook/DiT-XL-2-256")
    dit.generate(labels=[207, "otter"])                  # 207: a golden retriever

Peebles and Xie 2022, https://arxiv.org/abs/2212.09748; 250 steps of DDPM with a learned variance,
guidance 4 on three of the four channels, as in its sample.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, Unpack, cast

import torch
from PIL import Image

from .checkpoints.dit import load_dit_parts, locate_dit
from .checkpoints.sources import Source
from .drawing import Drawing, Options
from .latents import Latents
from .models.attention import Implementation
from .models.dit import DiT
from .models.vae import AutoencoderKL
from .pipeline import DtypeName, pick, pick_device, pick_dtype
from .sampling.ddpm import DDPM, Variance
from .sampling.guidance import cfg
from .sampling.samplers import Sampler
from .sampling.schedule import NoiseSchedule

WITHOUT = ("negative_prompt", "uncond", "rule")  # options that are of texts
PUBLISHED_CHANNELS = 3  # that are guided; diffusers guides all


@dataclass(repr=False)
class LabelDiffusion(Latents):
    """DiT, autoencoder and schedule, and what joins them.

    compile, graph: see `minisd.load`. names: of labels, of one several between commas.
    """

    dit: DiT
    vae: AutoencoderKL
    schedule: NoiseSchedule
    compile: bool | str = False
    graph: bool = False
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> DiT:
        return self.dit

    def __repr__(self) -> str:
        size = sum(p.numel() for model in (self.dit, self.vae) for p in model.parameters())
        what = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return (
            f"LabelDiffusion({size / 1e6:.0f} M parameters, {what}, {self.dit.attention} attention)"
        )

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | DtypeName | None = None,
    ) -> "LabelDiffusion":
        """Move both models in place."""
        device = pick_device(self.device if device is None else device)
        dtype = pick_dtype(self.dtype if dtype is None else dtype, device)
        for model in (self.dit, self.vae):
            model.to(device, dtype)
        return self

    @torch.no_grad()
    def generate(
        self, labels: int | str | Sequence[int | str], **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Draw label(s), num_images of each: a number from 0 to K - 1, or a name; K: "no label".

        options: see `minisd.drawing.Drawing`, here steps=250, guidance=4, sampler="ddpm"; those of
        texts have no effect and are refused. ValueError for what does not fit.
        """
        one = isinstance(labels, (Integral, str))
        named: list[Any] = [labels] if one else list(cast(Any, labels))
        if not named:
            raise ValueError("got no labels, expected at least one")
        drawing = Drawing.of(options, without=WITHOUT, steps=250, guidance=4.0, sampler="ddpm")
        numbers = [self.label(each) for each in named]
        cond = drawing.per_image(self.dit.embed_labels(numbers), len(numbers))
        null = self.dit.embed_labels([self.dit.labels])
        sampler = self.make_sampler(drawing, len(cond))
        x = drawing.noise(self, len(cond))
        published = self.dit.config.compat == "published"
        channels = PUBLISHED_CHANNELS if published else self.channels
        predict = cfg(self.network, null, cond, drawing.guidance, channels=channels)
        return self.decode(drawing.denoise(x, sampler, predict))

    def label(self, named: int | str) -> int:
        """The label of a name; a number as it is. ValueError for a name that not one label has."""
        if not isinstance(named, str):
            return named
        found = [
            label
            for label, names in self.names.items()
            if named in (names, *map(str.strip, names.split(",")))
        ]
        if len(found) == 1:
            return found[0]
        expected = f"expected a number from 0 to {self.dit.labels - 1}"
        if found:
            of = " and ".join(map(str, found))
            raise ValueError(f"{named!r:.80} is the name of the labels {of}: {expected}")
        if self.names:
            expected += f", or a name: {'; '.join([*self.names.values()][:3])}; ..."
        raise ValueError(f"no label is called {named!r:.80}: {expected}")

    def make_sampler(self, drawing: Drawing, rows: int) -> Sampler:
        """The drawing's; of DDPM, timesteps as published, and the variance that the DiT learned."""
        sampler = drawing.make_sampler(self, rows=rows)
        if not isinstance(sampler, DDPM):
            return sampler
        variance: Variance = "learned_range" if self.dit.config.learns_variance else "fixed_small"
        return replace(sampler, variance=variance, spacing="linspace")


def load_dit(
    source: Source,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | DtypeName | None = None,
    attention: Implementation | Literal["auto"] = "auto",
    compat: Literal["published", "diffusers"] = "published",
    compile: bool | str = False,
    graph: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    copy: bool = False,
) -> LabelDiffusion:
    """Load a DiT for labels: "shapes-dit" (bundled), a folder in diffusers layout, or a Hub repo,
    facebook/DiT-XL-2-256.

    compat: whose formulas are followed where the published code and diffusers differ, see
    `minisd.models.dit`; "diffusers" also guides all channels. The others: see `minisd.load`. The
    published weights are under CC-BY-NC 4.0. CheckpointError for what is missing or does not fit,
    and for the published .pt files, which are pickles.
    """
    where, kind, implementation = pick(device, dtype, attention, graph)
    checkpoint = locate_dit(
        source,
        compat=compat,
        variant=variant,
        revision=revision,
        local_files_only=local_files_only,
    )
    parts = load_dit_parts(checkpoint, where, kind, copy)
    dit = LabelDiffusion(*parts, compile=compile, graph=graph, names=checkpoint.names)
    dit.dit.attention = implementation
    return dit
