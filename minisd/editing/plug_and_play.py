"""Plug-and-play: targets take a deep feature and the self-attention of the source image.

In the first part of the steps, in the rows of a target, with the text and without it,

    x' = x_source at one resnet of the second up block        (feature_steps, 0.8 of the steps)
    P' = P_source at the self-attention sites from there on   (self_steps, 0.5 of the steps)

both of the source's conditional row. Gated by value: in the other steps each row takes its own.

Source: Tumanyan et al. 2022 (arXiv 2211.12572). Their code takes over what the resnet adds to its
input, before the shortcut; here it is the resnet's output, as the paper writes.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, chain
from ..models.attention import AttentionEdit
from ..models.features import FeatureEdit
from ..recipes import tell
from ..sampling.guidance import StepEdits, with_edits
from ..sampling.samplers import Step
from .prompt_to_prompt import shared_noise

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


def plug_and_play(
    sd: "StableDiffusion",
    source: str,
    *targets: str,
    feature_steps: float = 0.8,
    self_steps: float = 0.5,
    feature: str | None = None,
    after: Callable[[Tensor, Step], Tensor] | None = None,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw the source prompt and the targets in its layout; num_images of each, the source first.

    feature: the resnet; None: the second one of the third last up block, Stable Diffusion's
    up_blocks.1 (of the first, where there are fewer than three). after, latents: as in
    `edit_prompt` (`Inversion.edit_options` edits a given image). options: see
    `minisd.drawing.Drawing` (here steps=50, sampler="ddim").
    """
    arguments = dict(locals())
    drawing = Drawing.of(options, steps=50, sampler="ddim").for_each_seed()
    expect.number("feature_steps", feature_steps, 0, 1)
    expect.number("self_steps", self_steps, 0, 1)
    if not targets:
        raise ValueError("got no target, expected at least one prompt beside the source")
    if feature is None:
        feature = f"up_blocks.{max(len(sd.unet.up_blocks) - 3, 0)}.resnets.1"
    if feature not in (resnets := sd.unet.sites("resnet")):
        raise ValueError(f"feature is {feature!r}, expected a resnet: {', '.join(resnets)}")
    order = sd.unet.sites("feature")
    sites = [s for s in sd.unet.sites("self") if order.index(f"{s}.q") > order.index(feature)]
    prompts, n = [source, *targets], drawing.num_images
    x = shared_noise(drawing, sd, prompts)
    predict = drawing.rule(sd.network, *drawing.embed(sd, prompts), drawing.guidance)

    def edits(groups: Sequence[str]) -> StepEdits:
        own = torch.arange(len(groups) * len(x), dtype=torch.int64, device=x.device)
        sources = own % n + (len(groups) - 1) * len(x)  # of the same image, conditional
        rows = own, torch.where(own % len(x) < n, own, sources)
        # tensors of their own: a graph in which both were one would not serve the other steps
        features = [FeatureEdit(source_row=row.clone()) for row in rows]
        attention = [AttentionEdit(source_row=row) for row in rows]

        def of(step: Step) -> dict[str, AttentionEdit | FeatureEdit]:
            early = step.index < int(feature_steps * drawing.steps)
            earlier = step.index < int(self_steps * drawing.steps)
            return {feature: features[early], **dict.fromkeys(sites, attention[earlier])}

        return of

    plan = drawing.make_sampler(sd, rows=n)
    images = sd.decode(drawing.denoise(x, plan, with_edits(predict, edits), chain(after=after)))
    return tell(images, sd, "plug_and_play", arguments, drawing, prompts, n)
