"""EDICT: exact inversion by two coupled latents. Wallace et al. 2022 (arXiv 2211.12446).

Each of the pair is moved by the noise predicted at the other, so that every update can be undone
exactly, whatever the predictor, guidance and edits included. One step of denoising, from level
(alpha, sigma) to (alpha', sigma'), and, from the last line to the first, the same undone:

    x <- a x + b eps(y)         a = alpha' / alpha,   b = sigma' - a sigma: DDIM's own step
    y <- a y + b eps(x)
    x <- p x + (1 - p) y        p = 0.93: keeps the two together
    y <- p y + (1 - p) x

Every other step begins with y in place of x. Costs two calls of the UNet per step. The pair is
float64: undoing the mixing magnifies rounding errors by 1 / p^2 per step.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, as_list, chain, embed
from ..pipeline import ImageInput
from ..recipes import tell
from ..sampling.guidance import Predict
from ..sampling.samplers import DDIM, Step

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

Pair = tuple[Tensor, Tensor]  # 2 x (B, C, h, w) float64
WITHOUT = ("sampler", "seed", "num_images", "latents")  # the image is what is drawn from


@torch.no_grad()
def edict_denoise(
    pair: Pair,
    steps: Iterable[Step],
    predict: Predict,
    p: float = 0.93,
    dtype: torch.dtype = torch.float32,
    after: Callable[[Tensor, Step], Tensor] | None = None,
) -> Pair:
    """From noise to image.

    steps: of DDIM with eta 0. predict(x, step, state) -> (eps, state), of `cfg` or `conditional`,
    is given x (B, C, h, w) in `dtype`. after(x, step): the first of the pair after each step.
    """
    (x, y), state = pair, None
    for step in steps:
        x, y = (y, x) if step.index % 2 else (x, y)
        x, y, state = moved(x, y, step, predict, state, dtype)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        x, y = (y, x) if step.index % 2 else (x, y)
        x = x if after is None else after(x, step)
    return x, y


@torch.no_grad()
def edict_invert(
    pair: Pair,
    steps: Iterable[Step],
    predict: Predict,
    p: float = 0.93,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """From image to noise: `edict_denoise` undone. steps: of the same DDIM with inverse=True."""
    (x, y), state = pair, None
    for step in steps:
        x, y = (y, x) if step.index % 2 else (x, y)
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        # (y - b eps(x)) / a: the same line from the next level to now
        y, x, state = moved(y, x, step, predict, state, dtype)
        x, y = (y, x) if step.index % 2 else (x, y)
    return x, y


def moved(
    x: Tensor, y: Tensor, step: Step, predict: Predict, state: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any]:
    """x <- a x + b eps(y), then y <- a y + b eps(x): DDIM's step, by the noise at the other."""
    if step.seed is not None:
        expected = "those of DDIM with eta 0"
        raise ValueError(f"the steps draw noise, which cannot be undone; expected {expected}")
    eps, state = predict(y.to(dtype), step, state)
    x, _ = step(x, eps)
    eps, state = predict(x.to(dtype), step, state)
    y, _ = step(y, eps)
    return x, y, state


def edict(
    sd: "StableDiffusion",
    image: ImageInput,
    source: str,
    target: str,
    *,
    strength: float = 0.8,
    p: float = 0.93,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Edit image(s) by the change of prompt: invert by source, draw by target, both under guidance.

    The image comes back, but for rounding and the VAE, where target is source. The last
    int(steps * strength) steps are run, both ways. options: steps=50, guidance=3, negative_prompt,
    uncond, height, width, progress and on_step of `minisd.drawing.Drawing`; on_step sees the first
    of the pair, on the way to the target. ValueError for what does not fit.
    """
    arguments = dict(locals())
    drawing = Drawing.of(options, without=WITHOUT, steps=50, guidance=3.0)
    expect.number("p", p)
    if not 0.5 < p <= 1:
        expected = "above 0.5, where the mixing can be undone, to 1 (none)"
        raise ValueError(f"p is {p!r}, expected {expected}")
    expect.number("strength", strength, 0, 1)
    if sd.schedule.prediction != "epsilon":  # back from x' the same v is another line
        got = f"the model predicts {sd.schedule.prediction}"
        raise ValueError(f"{got}, expected epsilon: its steps are those that EDICT undoes")
    plan = DDIM(sd.schedule, drawing.steps, drawing.steps - int(drawing.steps * strength))
    z = sd.encode_image(image, None, drawing.height, drawing.width).double()
    uncond = drawing.uncond
    if uncond is None:
        uncond = embed(sd, as_list(drawing.negative_prompt))
    rows = embed(sd, [source, target]).split(1)
    rule = partial(drawing.rule, sd.network, uncond)
    back, forth = (rule(cond, drawing.guidance) for cond in rows)
    inverse = drawing.shown(replace(plan, inverse=True))
    pair = edict_invert((z, z), inverse, back, p, sd.dtype)
    after = chain(on_step=drawing.on_step)
    x, _ = edict_denoise(pair, drawing.shown(plan), forth, p, sd.dtype, after)
    return tell(sd.decode(x.float()), sd, "edict", arguments, drawing, [target])
