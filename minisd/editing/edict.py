"""EDICT: exact inversion by two coupled latents. Wallace et al. 2022 (arXiv 2211.12446).

Each of the pair is moved by the noise predicted at the other, so that every update can be undone
exactly, whatever the predictor, guidance and edits included. One step of denoising, from level
(alpha, sigma) to (alpha', sigma'), and, from the last line to the first, the same undone:

    x <- a x + b eps(y)               a = alpha' / alpha,   b = sigma' - a sigma: DDIM's step (samplers.advance)
    y <- a y + b eps(x)
    x <- p x + (1 - p) y              p = 0.93: keeps the two together
    y <- p y + (1 - p) x

Every other step begins with y in place of x. Costs two calls of the UNet per step. The pair is
float64: undoing the mixing magnifies rounding errors by 1 / p^2 per step.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from .. import expect
from ..pipeline import make_sampler
from ..sampling.guidance import cfg
from ..sampling.samplers import Step, take
from .inversion import embed

Pair = tuple[Tensor, Tensor]  # 2 x (B, C, h, w) float64
Predict = Callable[[Tensor, Step], Tensor]


@torch.no_grad()
def edict_denoise(
    pair: Pair, steps: Iterable[Step], predict: Predict, p: float = 0.93, dtype=torch.float32
) -> Pair:
    """From noise to picture. steps: of DDIM with eta 0. predict(x, step) -> eps, of `cfg` or
    `conditional`, is given x (B, C, h, w) in `dtype`."""
    x, y = pair
    for step in steps:
        x, y = (y, x) if step.index % 2 else (x, y)
        x, y = moved(x, y, step, predict, dtype)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        x, y = (y, x) if step.index % 2 else (x, y)
    return x, y


@torch.no_grad()
def edict_invert(
    pair: Pair, steps: Iterable[Step], predict: Predict, p: float = 0.93, dtype=torch.float32
) -> Pair:
    """From picture to noise: `edict_denoise` undone. steps: of the same DDIM with inverse=True."""
    x, y = pair
    for step in steps:
        x, y = (y, x) if step.index % 2 else (x, y)
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y, x = moved(
            y, x, step, predict, dtype
        )  # (y - b eps(x)) / a: the same line from the next level to now
        x, y = (y, x) if step.index % 2 else (x, y)
    return x, y


def moved(x: Tensor, y: Tensor, step: Step, predict: Predict, dtype: torch.dtype) -> Pair:
    """x <- a x + b eps(y), then y <- a y + b eps(x): the step of DDIM, each by the noise predicted
    at the other."""
    if step.draw is not None:
        raise ValueError(
            "the steps draw noise, which cannot be undone; expected those of DDIM with eta 0"
        )
    x, _ = take(step, predict, y.to(dtype), start=x)
    y, _ = take(step, predict, x.to(dtype), start=y)
    return x, y


def edict(
    sd,
    image,
    source: str,
    target: str,
    *,
    steps: int = 50,
    strength: float = 0.8,
    guidance: float = 3.0,
    negative_prompt: str = "",
    p: float = 0.93,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Edit picture(s) by the change of prompt: invert after source, draw after target, both under
    guidance.

    Returns latents z (B, C, h, w) for sd.decode; the picture's own, but for rounding, where target
    is source. The last int(steps * strength) steps are run, both ways. image, height, width: what
    `sd.encode_image` takes.
    """
    expect.number("p", p)
    if not 0.5 < p <= 1:
        raise ValueError(
            f"p is {p!r}, expected above 0.5, where the mixing can be undone, to 1 (none)"
        )
    sampler = make_sampler("ddim", sd.schedule, steps, strength)
    z = sd.encode_image(image, None, height, width).double()
    uncond, pair = sd.encode_prompt([negative_prompt]), (z, z)
    runs = (source, edict_invert, replace(sampler, inverse=True)), (target, edict_denoise, sampler)
    for prompt, run, way in runs:
        predict = cfg(sd.unet, uncond, embed(sd, [prompt]), guidance)
        pair = run(pair, tqdm(way, disable=not progress), predict, p, sd.dtype)
    return pair[0].float()
