"""EDICT: exact inversion by two coupled latents. Wallace et al. 2022 (arXiv 2211.12446).

Each of the pair is moved by the noise predicted at the other, so that every update can be undone exactly, whatever the
predictor, guidance and edits included. One step of denoising, from level (alpha, sigma) to (alpha', sigma'), and, from
the last line to the first, the same undone:

    x <- a x + b eps(y)               a = alpha' / alpha,   b = sigma' - a sigma: DDIM's step (samplers.advance)
    y <- a y + b eps(x)
    x <- p x + (1 - p) y              p = 0.93: keeps the two together
    y <- p y + (1 - p) x

Every other step begins with y in place of x. Costs two calls of the UNet per step. The pair is float64: undoing the
mixing magnifies rounding errors by 1 / p^2 per step.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from .. import expect
from ..guidance import cfg
from ..pipeline import make_sampler
from ..samplers import DDIM, Step, take
from .inversion import embed

Pair = tuple[Tensor, Tensor]  # 2 x (B, C, h, w) float64
Predict = Callable[[Tensor, Step], Tensor]


@torch.no_grad()
def edict_denoise(
    pair: Pair,
    sampler: DDIM,
    predict: Predict,
    p: float = 0.93,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Pair:
    """From noise to picture. predict(x, step) -> eps, of `cfg` or `conditional`, is given x in `dtype`."""
    if sampler.eta:
        raise ValueError(f"eta is {sampler.eta!r}, expected 0: what draws noise cannot be undone")
    x, y = pair
    for step in tqdm(sampler, disable=not progress):
        x, y = (y, x) if step.index % 2 else (x, y)
        x, _ = take(step, predict, y.to(dtype), start=x)  # a x + b eps(y)
        y, _ = take(step, predict, x.to(dtype), start=y)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        x, y = (y, x) if step.index % 2 else (x, y)
    return x, y


@torch.no_grad()
def edict_invert(
    pair: Pair,
    sampler: DDIM,
    predict: Predict,
    p: float = 0.93,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Pair:
    """From picture to noise: `edict_denoise` undone. sampler: the same one, not its inverse."""
    x, y = pair
    for step in tqdm(replace(sampler, inverse=True), disable=not progress):
        x, y = (y, x) if step.index % 2 else (x, y)
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y, _ = take(step, predict, x.to(dtype), start=y)  # (y - b eps(x)) / a: the same line from the next level to now
        x, _ = take(step, predict, y.to(dtype), start=x)
        x, y = (y, x) if step.index % 2 else (x, y)
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
    """Edit picture(s) by the change of prompt: invert after source, draw after target, both under guidance.

    Returns latents z (B, C, h, w) for sd.decode; the picture's own, but for rounding, where target is source. The
    last int(steps * strength) steps are run, both ways. image, height, width: what `sd.encode_image` takes.
    """
    expect.number("p", p)
    if not 0.5 < p <= 1:
        raise ValueError(f"p is {p!r}, expected above 0.5, where the mixing can be undone, to 1 (none)")
    sampler = make_sampler("ddim", sd.schedule, steps, strength)
    z = sd.encode_image(image, None, height, width).double()
    uncond, pair = sd.encode_prompt([negative_prompt]), (z, z)
    for prompt, run in ((source, edict_invert), (target, edict_denoise)):
        predict = cfg(sd.unet, uncond, embed(sd, [prompt]), guidance)
        pair = run(pair, sampler, predict, p, sd.dtype, progress)
    return pair[0].float()
