"""Attend-and-Excite: move the latent until each of the chosen words has its place in the image.

Ahead of each step in the first half, x goes down the gradient of

    A    = mean cross-attention map of all heads and sites at the coarsest grid, conditional rows
    B    = softmax over the tokens of (100 A), without <bos> and the last token
    loss = max over words of  1 - max over positions of gauss(B_word)        (3 x 3, sigma 0.5)
    x   <- x - scale sqrt(1 -> 0.5 over all steps) grad loss

through the UNet; at the steps 0, 1/5 and 2/5 it is repeated until the greatest loss is below
0.95, 0.5 and 0.2, or 20 times. Each image has its own loss.

Source: Chefer et al. 2023 (arXiv 2301.13826) and its code: scale 20; 50 steps, 25 of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Unpack

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, as_list
from ..recipes import tell
from ..sampling.guidance import Predict, conditional
from ..sampling.samplers import Step
from .maps import Maps

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

REFINED = {0.0: 0.95, 0.2: 0.5, 0.4: 0.2}  # share of the steps -> the loss to reach there


def attend_and_excite(
    sd: "StableDiffusion",
    prompt: str,
    words: str | Sequence[str],
    *,
    scale: float = 20.0,
    until: float = 0.5,
    refinements: int = 20,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw a prompt so that each of the words is seen; num_images of it.

    words: of the prompt, each a word or a phrase. scale: of the first step's move. until: the part
    of the steps in which x is moved. refinements: at most so many at each of the three steps.
    options: see `minisd.drawing.Drawing` (here steps=50, sampler="ddim"). ValueError for a word
    that is not there.
    """
    arguments = dict(locals())
    drawing = Drawing.of(options, steps=50, sampler="ddim")
    expect.number("scale", scale)
    expect.number("until", until, 0, 1)
    expect.whole_number("refinements", refinements, 0)
    x = drawing.noise(sd, drawing.num_images)
    uncond, cond = drawing.embed(sd, [prompt])
    height, width = (side * sd.vae.factor for side in x.shape[2:])
    maps = Maps(sd, [prompt] * len(x), drawing.steps, height=height, width=width)
    columns = [maps.columns(word) for word in as_list(words) or [""]]  # none is no word of it
    impl = "reference" if sd.unet.attention == "reference" else "sdpa"  # which have gradients
    look = conditional(partial(sd.unet, attention=impl), cond, maps)
    plan = drawing.make_sampler(sd, rows=len(x))
    moved = list(plan)[: int(until * drawing.steps)]  # the steps ahead of which x is
    goals = {int(share * drawing.steps): goal for share, goal in REFINED.items()}

    def excite(x: Tensor, i: int) -> Tensor:
        """x moved ahead of step i."""
        if i >= len(moved):
            return x
        move = scale * (1 - 0.5 * i / max(drawing.steps - 1, 1)) ** 0.5
        for tried in range(refinements + 1):
            loss, gradient = loss_and_gradient(x, moved[i], look, maps, columns)
            above = loss > goals.get(i, 1.0)  # 1: no loss is
            if tried == refinements or not above.any():
                break
            x = torch.where(above[:, None, None, None], x - move * gradient, x)
        return x - move * gradient

    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)
    after = lambda x, step: excite(x, step.index + 1)
    images = sd.decode(drawing.denoise(excite(x, 0), plan, predict, after))
    return tell(images, sd, "attend_and_excite", arguments, drawing, [prompt])


@torch.enable_grad()
def loss_and_gradient(
    x: Tensor, step: Step, look: Predict, maps: Maps, columns: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The loss (B,) of latents x (B, C, h, w) at a step, and its gradient (B, C, h, w)."""
    x = x.detach().requires_grad_()
    maps.reset(maps.prompts)  # sums of this call alone, which carry gradients
    look(x, step)
    loss = excitation(maps.mean(), columns)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


def excitation(A: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """max over words of 1 - max over positions of the word's smoothed map, (B,).

    A: (B, h, w, L) maps; columns: the tokens of each word, whose maps are averaged.
    """
    B = (100 * A[..., 1:-1]).softmax(-1)
    words = torch.stack([B[..., [i - 1 for i in own]].mean(-1) for own in columns], 1)
    return (1 - smoothed(words).amax((2, 3))).amax(1)


def smoothed(x: Tensor) -> Tensor:
    """x (B, C, h, w) under 3 x 3 weights exp(-d^2 / (2 sigma^2)) of sum 1, sigma 0.5; the edge is
    reflected."""
    d = torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype, device=x.device)
    line = (-(d**2) / (2 * 0.5**2)).softmax(0)
    windows = F.pad(x, (1, 1, 1, 1), mode="reflect").unfold(2, 3, 1).unfold(3, 3, 1)
    return windows @ line @ line  # (B, C, h, w, 3, 3) -> (B, C, h, w)
