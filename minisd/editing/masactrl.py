"""MasaCtrl: draw a prompt by its own layout with what the source image shows.

From step `start` and self-attention site `first` on, a target asks with its own queries, and the
source's keys and values answer:

    out_target = softmax(q_target k_source^T / sqrt(D)) v_source

with the text and without it alike: the unconditional target row takes those of the unconditional
source row. Gated by value: in the other steps `kv_row` names each row itself.

Source: Cao et al. 2023 (arXiv 2304.08465), mutual self-attention: step 4 of 50, site 10 of Stable
Diffusion's 16, that is up_blocks.2 and .3.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, chain
from ..models.attention import AttentionEdit
from ..recipes import tell
from ..sampling.guidance import StepEdits, with_edits
from ..sampling.samplers import Step
from .prompt_to_prompt import shared_noise

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


def masactrl(
    sd: "StableDiffusion",
    source: str,
    *targets: str,
    start: int = 4,
    first: int | None = None,
    after: Callable[[Tensor, Step], Tensor] | None = None,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw the source prompt, and the targets with its contents; num_images of each, the source
    first.

    start: the first step. first: the first self-attention site, counted from 0 in forward order;
    None: five eighths of the way, Stable Diffusion's 10 of 16. after, latents: as in `edit_prompt`
    (`Inversion.edit_options` edits a given image). options: see `minisd.drawing.Drawing` (here
    steps=50, sampler="ddim").
    """
    arguments = dict(locals())
    drawing = Drawing.of(options, steps=50, sampler="ddim").for_each_seed()
    sites, prompts = sd.unet.sites("self"), [source, *targets]
    first = 5 * len(sites) // 8 if first is None else first
    expect.whole_number("start", start, 0, drawing.steps - 1)
    expect.whole_number("first", first, 0, len(sites) - 1)
    if not targets:
        raise ValueError("got no target, expected at least one prompt beside the source")
    x = shared_noise(drawing, sd, prompts)
    uncond, cond = drawing.embed(sd, prompts)
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)

    def edits(groups: Sequence[str]) -> StepEdits:
        own = torch.arange(len(groups) * len(x), dtype=torch.int64, device=x.device)
        source_row = own - own % len(x) + own % drawing.num_images  # of the same image and group
        at = [AttentionEdit(kv_row=rows[:, None]) for rows in (own, source_row)]
        return lambda step: dict.fromkeys(sites[first:], at[step.index >= start])

    z = drawing.denoise(
        x,
        drawing.make_sampler(sd, rows=drawing.num_images),
        with_edits(predict, edits),
        chain(after=after),
    )
    return tell(sd.decode(z), sd, "masactrl", arguments, drawing, prompts, drawing.num_images)
