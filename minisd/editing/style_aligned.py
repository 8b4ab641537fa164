"""StyleAligned: draw prompts in the manner of the first.

In every self-attention each image sees the reference beside itself, and its queries and keys are
moved to the reference's mean and deviation over the positions, of each head and channel:

    out = softmax(q' [k_reference, k']^T / sqrt(D)) [v_reference, v]
    x'  = deviation(x_reference) (x - mean(x)) / deviation(x) + mean(x_reference)       x = q, k

with the text and without it alike. The reference sees itself twice, which changes nothing. Each
image has noise of its own. There are twice as many keys, so self-attention takes twice as long.

Source: Hertz et al. 2024 (arXiv 2312.02133) and its code: shared attention with AdaIN of q and k.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from ..drawing import Drawing, Options
from ..models.attention import AttentionEdit
from ..models.features import FeatureEdit
from ..recipes import tell
from ..sampling.guidance import StepEdits, with_edits

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


def style_aligned(
    sd: "StableDiffusion", reference: str, *prompts: str, **options: Unpack[Options]
) -> list[Image.Image]:
    """Draw the reference prompt, and the others in its manner; num_images of each, the reference
    first.

    Image i of a prompt follows image i of the reference. options: see `minisd.drawing.Drawing`
    (here steps=50, sampler="ddim").
    """
    arguments = dict(locals())
    drawing = Drawing.of(options, steps=50, sampler="ddim")
    if not prompts:
        raise ValueError("got no prompt beside the reference, expected at least one")
    uncond, cond = drawing.embed(sd, [reference, *prompts])
    x = drawing.noise(sd, len(cond))
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)

    def edits(groups: Sequence[str]) -> StepEdits:
        own = torch.arange(len(groups) * len(x), dtype=torch.int64, device=x.device)
        row = references(own, len(x), drawing.num_images)
        shared = AttentionEdit(kv_row=torch.stack([row, own], 1))
        moved = FeatureEdit(apply=aligning(len(x), drawing.num_images))
        at: dict[str, Any] = {}
        for site in sd.unet.sites("self"):
            at |= {site: shared, f"{site}.q": moved, f"{site}.k": moved}
        return lambda step: at

    plan = drawing.make_sampler(sd, rows=len(x))
    images = sd.decode(drawing.denoise(x, plan, with_edits(predict, edits)))
    return tell(images, sd, "style_aligned", arguments, drawing, [reference, *prompts])


def references(own: Tensor, B: int, n: int) -> Tensor:
    """The reference's row of each row, in its own group of B; of a group the first n are its."""
    return own - own % B + own % n


@functools.cache  # one function for all runs: a graph is of one
def aligning(B: int, n: int) -> Callable[[Tensor], Tensor]:
    """x (R, H, N, D) -> x with the mean and deviation over N of the reference's rows."""

    def apply(x: Tensor) -> Tensor:
        row = references(torch.arange(len(x), dtype=torch.int64, device=x.device), B, n)
        wide = x.float()
        mean, deviation = wide.mean(2, keepdim=True), (wide.var(2, keepdim=True) + 1e-5).sqrt()
        return (deviation[row] * (wide - mean) / deviation + mean[row]).to(x)

    return apply
