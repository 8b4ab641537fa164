"""Samplers: each is the list of its steps, and the denoising loop is three lines.

    for step in sampler:
        x = step.update(x, predict(x, step))
        if after is not None: x = after(x, step)

Sources: DDIM, Song et al. 2020 (arXiv 2010.02502) eq. 12 and 16; DPM-Solver++ 2M, Lu et al. 2022
(arXiv 2211.01095) algorithm 2; Karras et al. 2022 (arXiv 2206.00364) eq. 5. Timesteps and levels
are those of diffusers' DDIMScheduler, DDIMInverseScheduler and DPMSolverMultistepScheduler built
from the same scheduler_config.json.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import expect
from .schedule import Level, NoiseSchedule


class Coefficients(NamedTuple):
    """The numbers of one step of `advance`; 0-d tensors in a CUDA graph, which so serves all
    steps."""

    alpha: float
    sigma: float
    c: float
    of_x: float
    of_D: float
    of_eps: float
    of_noise: float = 0.0


def advance(
    x: Tensor, eps: Tensor, x0_previous: Tensor | None, noise: Tensor | None, k: Coefficients
) -> tuple[Tensor, Tensor]:
    """One step of either sampler: x at the next level, in x's dtype, and x0; both computed in fp32
    or wider.

    x0     = (x - sigma eps) / alpha
    D      = x0 + c (x0 - x0_previous),          x0 itself without a previous one
    x_next = of_x x + of_D D + of_eps eps + of_noise noise
    """
    wide, eps = _wide(x), _wide(eps)
    x0 = (wide - k.sigma * eps) / k.alpha
    D = x0 + k.c * (x0 - (x0 if x0_previous is None else x0_previous))
    x_next = k.of_x * wide + k.of_D * D + k.of_eps * eps
    if noise is not None:
        x_next = x_next + k.of_noise * noise.to(x_next)
    return x_next.to(x.dtype), x0


class Step(NamedTuple):
    """One step of a sampler, from level `now` to level `next`, with the UNet evaluated at timestep
    `t`.

    index counts in the full schedule: skip does not shift it.  update(x, eps) -> x at level `next`,
    in x's dtype but computed in fp32 or wider; call it once per step, because it may advance the
    sampler's history or draw noise. coefficients: of the `advance` that update is. times: t of
    every step of the full schedule, so that what depends on t alone can be computed for all steps
    at once. draw(x): the noise of a step that has some, of x's shape.
    """

    index: int
    t: int
    now: Level
    next: Level
    update: Callable[[Tensor, Tensor], Tensor]
    coefficients: Coefficients | None = None
    times: tuple[int, ...] = ()
    draw: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Sampler:
    """What the samplers share. steps: length of the full schedule, 1..N. skip: steps left out at
    its noisy end."""

    schedule: NoiseSchedule
    steps: int
    skip: int = 0

    def __post_init__(self):
        expect.whole_number("steps", self.steps, 1, len(self.schedule))
        expect.whole_number("skip", self.skip, 0, self.steps)
        self.plan()

    def plan(self) -> list[tuple[int, Level, Level]]:
        """(t, now, next) of every step of the full schedule, from noise to image."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.steps - self.skip

    def start(self, x0: Tensor, noise: Tensor) -> Tensor:
        """A clean latent at the level of the first step, alpha x0 + sigma noise; x0 itself if all
        steps are skipped."""
        level = self.plan()[self.skip][1] if self.skip < self.steps else Level(1.0, 0.0)
        return (level.alpha * _wide(x0) + level.sigma * _wide(noise)).to(x0.dtype)


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM, deterministic (eta 0) to DDPM-like (eta 1); `inverse=True` runs the same steps
    backwards, image to noise.

        x0     = (x - sigma eps) / alpha
        x_next = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise,   s = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)

    The noise of eta > 0 is drawn on the CPU from `seed`, anew for each iteration over the sampler,
    so it is the same on every device. Give another seed than that of the initial latents: with the
    same one the first noise equals them. Inverse: the steps of DDIM(schedule, steps, skip) in
    reverse order with now and next exchanged, t and index kept, so the UNet is evaluated at the
    noisier end, as in diffusers' DDIMInverseScheduler. It starts from the clean latent.
    """

    eta: float = 0.0
    inverse: bool = False
    seed: int = 201002502

    def __post_init__(self):
        super().__post_init__()
        expect.number("eta", self.eta, 0, 1)
        expect.whole_number("seed", self.seed, -(2**63), 2**64 - 1)
        if self.inverse and self.eta:
            raise ValueError(
                f"eta is {self.eta!r} with inverse=True, expected 0: only eta 0 can be run backwards"
            )

    def plan(self):
        stride = len(self.schedule) // self.steps
        timesteps = self.schedule.timesteps(self.steps, self.schedule.timestep_spacing or "leading")
        level = self.schedule.level
        return [
            (t, level(t), level(t - stride) if t >= stride else self.schedule.clean)
            for t in timesteps
        ]

    def start(self, x0, noise):
        if self.inverse:
            raise ValueError(
                "DDIM inversion starts from the clean latent itself: pass it to the loop"
            )
        return super().start(x0, noise)

    def __iter__(self) -> Iterator[Step]:
        generator = torch.Generator().manual_seed(self.seed)
        plan = self.plan()
        times, steps = tuple(t for t, *_ in plan), list(enumerate(plan))[self.skip :]
        for index, (t, now, next) in reversed(steps) if self.inverse else steps:
            now, next = (next, now) if self.inverse else (now, next)
            s = (
                self.eta * (next.sigma / now.sigma) * math.sqrt(1 - (now.alpha / next.alpha) ** 2)
                if self.eta
                else 0.0
            )
            k = Coefficients(
                now.alpha, now.sigma, 0.0, 0.0, next.alpha, math.sqrt(next.sigma**2 - s**2), s
            )
            draw = partial(_randn_like, generator=generator) if self.eta else None
            yield Step(index, t, now, next, partial(_ddim_update, k=k, draw=draw), k, times, draw)


def _ddim_update(x, eps, k, draw):
    return advance(x, eps, None, draw and draw(x), k)[0]


def _randn_like(x, generator):
    return torch.randn(x.shape, generator=generator).to(x.device, non_blocking=True)


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++ 2M, with Karras sigmas or with the schedule's own; ends at alpha = 1, sigma = 0.

        x0     = (x - sigma eps) / alpha,      h = ln(ratio / ratio'),   ratio = sigma / alpha
        D      = x0 + c (x0 - x0_previous),    c = h / (2 h_previous)
        x_next = (sigma' / sigma) x + alpha' (1 - ratio' / ratio) D

    The first step that runs and the last step are first order: the same formula with c = 0.
    Karras: ratios evenly spaced in ratio^(1/7) between those of the last and the first training
    timestep; t is the timestep nearest to each, so neighbouring steps may share one (from 45 steps
    on), while their levels always differ.
    """

    karras: bool = True

    def plan(self):
        n, ratios = self.steps, self.schedule.ratios()
        if self.karras:
            ends = ratios[-1].item() ** (1 / 7), ratios[0].item() ** (1 / 7)
            run = np.linspace(*ends, n) ** 7
            timesteps = (
                np.interp(np.log(run), np.log(ratios), np.arange(len(ratios)))
                .round()
                .astype(int)
                .tolist()
            )
        else:
            # n + 1 timesteps, and the lowest is left out: the last step goes from the one above it
            # to sigma = 0.
            spacing = self.schedule.timestep_spacing or "linspace"
            timesteps = self.schedule.timesteps(n + (spacing != "trailing"), spacing)[:n]
            run = ratios[timesteps]
        levels = [Level.from_ratio(float(r)) for r in run.astype(np.float32)] + [Level(1.0, 0.0)]
        return list(zip(timesteps, levels, levels[1:]))

    def __iter__(self) -> Iterator[Step]:
        x0_previous = h_previous = None
        plan = self.plan()
        times = tuple(t for t, *_ in plan)
        for index, (t, now, next) in list(enumerate(plan))[self.skip :]:
            h = math.log(now.ratio / next.ratio) if next.sigma else math.inf
            c = h / (2 * h_previous) if h_previous and next.sigma else 0.0
            h_previous = h

            of_D = next.alpha * (1 - next.ratio / now.ratio)
            k = Coefficients(now.alpha, now.sigma, c, next.sigma / now.sigma, of_D, 0.0)

            def update(x, eps, k=k):
                nonlocal x0_previous
                x_next, x0_previous = advance(x, eps, x0_previous, None, k)
                return x_next

            yield Step(index, t, now, next, update, k, times)


@torch.no_grad()
def denoise(
    x: Tensor,
    sampler: Iterable[Step],
    predict: Callable[[Tensor, Step], Tensor],
    after: Callable[[Tensor, Step], Tensor] | None = None,
) -> Tensor:
    """Run the steps on x (B, C, h, w); predict(x, step) -> eps, after(x, step) -> x edits the
    latent after each step.

    Any iterable of steps will do (`tqdm(sampler)` shows progress). Without gradients: write the
    loop out to have them.
    """
    x = x.contiguous()  # as it is after the first step: other strides (`x.expand`) would cost a second compiled graph
    x0 = None
    for step in sampler:
        x, x0 = take(step, predict, x, x0)
        if after is not None:
            x = after(x, step)
    return x


def take(
    step: Step,
    predict: Callable[[Tensor, Step], Tensor],
    x: Tensor,
    x0_previous: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """step.update(start, predict(x, step)): `start` (None: x) at the next level, by the noise
    predicted at x.

    If the UNet was loaded with graph=True, one CUDA graph. That keeps no history: hand the x0 (B,
    C, h, w) of one step, the second of what is returned, to the next; it is None where update
    remembers it itself. x may be start in the network's dtype, or another latent that is a better
    guess of where the step ends (fixed-point inversion, EDICT).
    """
    start = x if start is None else start
    graph = getattr(predict, "graph", None)
    if graph is None or step.coefficients is None or torch.is_grad_enabled():
        return step.update(start, predict(x, step)), None
    k = torch.tensor(step.coefficients, dtype=torch.promote_types(start.dtype, torch.float32))
    k = k.to(x.device, non_blocking=True)  # the host does not wait for the step before
    x0_previous = torch.zeros_like(start, dtype=k.dtype) if x0_previous is None else x0_previous
    return graph(x, step, _advance_from, start, x0_previous, step.draw and step.draw(start), k)


def _advance_from(eps, x, x0_previous, noise, k):
    """`advance` as predict.graph calls it: eps first, the coefficients in one tensor."""
    return advance(x, eps, x0_previous, noise, Coefficients(*k.unbind()))


def _wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
