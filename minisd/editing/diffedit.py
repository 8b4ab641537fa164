"""DiffEdit: find what a change of the prompt is about, and redraw only that.

The image, noised half of the way, is looked at by both prompts, with several noises:

    d    = mean over noises and channels of | e(x_t, target) - e(x_t, source) |
    mask = min(d, 3 mean(d)) > threshold * its maximum

Then the image is inverted by the source prompt and drawn again by the target's; outside the mask
each step's latent is the inverted one of that step:

    x <- m x + (1 - m) z*_t

Source: Couairon et al. 2022 (arXiv 2210.11427): 10 noises at half of the schedule, threshold 0.5,
inversion up to 0.8.
"""

from typing import TYPE_CHECKING, Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, embed
from ..pipeline import ImageInput, unchanged
from ..recipes import tell
from ..sampling.guidance import Guidance
from ..sampling.samplers import DDIM, Step
from .inversion import invert

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

WITHOUT = ("sampler", "num_images", "latents")


@torch.no_grad()
def difference_mask(
    sd: "StableDiffusion",
    z: Tensor,
    source: str,
    target: str,
    *,
    noises: int = 10,
    threshold: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """(B, 1, h, w) bool: where the two prompts disagree about the latents z (B, C, h, w) of
    images."""
    texts = zip(("source", "target"), embed(sd, [source, target]).split(1))
    apart = Guidance(sd.network, list(texts), lambda ours, theirs: theirs - ours)
    step = next(iter(DDIM(sd.schedule, 2)))  # from half of the schedule
    d = torch.zeros((), dtype=torch.float32, device=z.device)
    for noise in sd.noise(seed, noises, *(side * sd.vae.factor for side in z.shape[2:])):
        x = (step.now.alpha * z.float() + step.now.sigma * noise.float()).to(sd.dtype)
        d = d + apart(x, step)[0].float().abs().mean(1, keepdim=True)
    d = d.minimum(3 * d.mean((1, 2, 3), keepdim=True))
    return d > threshold * d.amax((1, 2, 3), keepdim=True)


def diffedit(
    sd: "StableDiffusion",
    image: ImageInput,
    source: str,
    target: str,
    *,
    strength: float = 0.8,
    noises: int = 10,
    threshold: float = 0.5,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Edit image(s), which the source prompt describes, to the target prompt, where they differ.

    strength: the image is inverted over the last int(steps * strength) steps; if there are none it
    is returned itself. noises, threshold: of the mask. options: see `minisd.drawing.Drawing` (here
    steps=50); seed is the mask's first. Costs noises calls of both prompts and int(steps *
    strength) of one beside the drawing.
    """
    arguments = dict(locals())
    drawing = Drawing.of(options, without=WITHOUT, steps=50, sampler="ddim")
    expect.whole_number("seed", drawing.seed, -(2**63), 2**64 - noises)
    expect.whole_number("noises", noises, 1)
    expect.number("threshold", threshold, 0, 1)
    plan = drawing.make_sampler(sd, strength)
    if len(plan) == 0:
        kept = unchanged(image, sd.pixels(image, drawing.height, drawing.width), drawing)
        return tell(kept, sd, "diffedit", arguments, drawing, [target], rows=1)
    size: Any = {"height": drawing.height, "width": drawing.width, "progress": drawing.progress}
    there = invert(sd, image, source, skip=plan.skip, trajectory=True, steps=drawing.steps, **size)
    path: Tensor = there.trajectory  # type: ignore[assignment]
    how: Any = {"noises": noises, "threshold": threshold, "seed": drawing.seed}
    mask = difference_mask(sd, there.z.to(sd.device), source, target, **how)

    def after(x: Tensor, step: Step) -> Tensor:
        return torch.where(mask, x, path[step.index + 1 - plan.skip].to(x))

    uncond, cond = drawing.embed(sd, [target])
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)
    x = there.latents.to(sd.device, sd.dtype)
    images = sd.decode(drawing.denoise(x, plan, predict, after))
    return tell(images, sd, "diffedit", arguments, drawing, [target], rows=1)
