"""Samplers: each is the list of its steps, a step is data, and the loop is the method (loop.py).

    x0 = None
    for step in sampler:
        x, x0 = step(x, eps, x0)                    # eps predicted by the network at x and step.t

One formula serves all of them, `advance`. Sources: DDIM, Song et al. 2020 (arXiv 2010.02502) eq. 12
and 16; DPM-Solver++ 2M, Lu et al. 2022 (arXiv 2211.01095) algorithm 2; Karras et al. 2022 (arXiv
2206.00364) eq. 5. Timesteps and levels are those of diffusers' DDIMScheduler, DDIMInverseScheduler
and DPMSolverMultistepScheduler built from the same scheduler_config.json.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import expect
from .schedule import Level, NoiseSchedule, Prediction

Seed = int | tuple[int, ...]  # of all rows together, or one for each


class LearnedRange(NamedTuple):
    """Between which variances of a step the network chooses, by v, as logarithms.

        log s^2 = f log_most + (1 - f) log_least,      f = (v + 1) / 2

    Nichol and Dhariwal 2021 (arXiv 2102.09672) eq. 15.
    """

    log_most: float
    log_least: float

    def deviation(self, v: Tensor) -> Tensor:
        """s, of v's shape; v from -1, the least, to 1, the most."""
        f = (_wide(v) + 1) / 2
        return (0.5 * (f * self.log_most + (1 - f) * self.log_least)).exp()


class Coefficients(NamedTuple):
    """The numbers of one step of `advance`: all products of a tensor, none divided by."""

    x0_x: float
    x0_out: float
    eps_x: float
    eps_out: float
    c: float  # weight of the difference to the x0 before; 0: first order
    x_x: float
    x_D: float
    x_eps: float
    x_noise: float = 0.0

    @classmethod
    def of(cls, prediction: Prediction, now: Level, **others: float) -> "Coefficients":
        """Of a network that predicts this, at the level `now`."""
        return (cls.of_v if prediction == "v_prediction" else cls.of_eps)(now, **others)

    @classmethod
    def of_eps(cls, now: Level, **others: float) -> "Coefficients":
        """Of a network that predicts eps: x0 = (x - sigma eps) / alpha."""
        return cls(1 / now.alpha, -now.sigma / now.alpha, 0.0, 1.0, **others)

    @classmethod
    def of_v(cls, now: Level, **others: float) -> "Coefficients":
        """Of one that predicts v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512).

        x0 = alpha x - sigma v,      eps = sigma x + alpha v,      at alpha = 0, too
        """
        return cls(now.alpha, -now.sigma, now.sigma, now.alpha, **others)


def advance(
    x: Tensor, out: Tensor, x0_previous: Tensor | None, noise: Tensor | None, k: Coefficients
) -> tuple[Tensor, Tensor]:
    """One step of any sampler: x at the next level, in x's dtype, and x0, in float32 or wider.

        x0     = x0_x x + x0_out out,      eps = eps_x x + eps_out out
        D      = x0 + c (x0 - x0_previous),          x0 itself without a previous one
        x_next = x_x x + x_D D + x_eps eps + x_noise noise

    x, x0_previous, noise: (B, C, h, w), out: the same, what the network predicted. All is computed
    in float32, or in x's dtype if that is wider.
    """
    wide = _wide(x)
    out = out.to(torch.promote_types(out.dtype, wide.dtype))  # EDICT undoes a step in float64
    x0 = k.x0_x * wide + k.x0_out * out
    eps = k.eps_x * wide + k.eps_out * out
    D = x0 + k.c * (x0 - (x0 if x0_previous is None else x0_previous))
    x_next = k.x_x * wide + k.x_D * D + k.x_eps * eps
    if noise is not None:
        x_next = x_next + k.x_noise * noise.to(x_next)
    return x_next.to(x.dtype), x0


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from level `now` to level `next`, the network evaluated at `t`.

    index counts in the full schedule: skip does not shift it.  first: whether it is the first that
    runs.  times: t of every step of the full schedule, so that what depends on t alone can be
    computed for all steps at once.  k: the coefficients of `advance`.  seed: of the noise of a step
    that has some, None of one that has none.  learned: of a step whose variance the network chooses
    (DDPM).  Nothing in it changes: a step may be called as often as one likes, at other latents too
    (fixed-point inversion, EDICT).
    """

    index: int
    t: int
    now: Level
    next: Level
    k: Coefficients
    first: bool
    times: tuple[int, ...]
    seed: Seed | None = None
    learned: LearnedRange | None = None

    def __call__(
        self, x: Tensor, out: Tensor, x0_previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x at level `next`, x0): hand the x0 of one step to the next; see `advance`.

        out: the network's, (B, C, h, w), or (B, 2 C, h, w) of one that also predicts v, which says
        its variance: a step that is not `learned` needs no v.
        """
        out, v = _split(x, out)
        noise = self.noise(x)
        if self.learned is not None and noise is not None:
            if v is None:
                got = f"the network predicts {out.shape[1]} channels for {x.shape[1]}"
                raise ValueError(f"{got}, expected twice as many: the variance is to be learned")
            noise = self.learned.deviation(v) * noise
        return advance(x, out, x0_previous, noise, self.k)

    def noise(self, x: Tensor) -> Tensor | None:
        """The step's noise, of x's shape and on its device: a function of (seed, index) alone.

        Drawn on the CPU in float32, so that it is the same on every device. Of several seeds each
        row has its own; where there are more rows, their groups have the same noise (a prompt and
        its edits).
        """
        if self.seed is None:
            return None
        if not isinstance(self.seed, tuple):
            return self._normal(x.shape, self.seed).to(x.device, non_blocking=True)
        shape = (1, *x.shape[1:])
        rows = torch.cat([self._normal(shape, seed) for seed in self.seed])
        if len(x) % len(rows):
            raise ValueError(f"got {len(rows)} seeds for {len(x)} rows, expected one for each")
        return rows.repeat(len(x) // len(rows), 1, 1, 1).to(x.device, non_blocking=True)

    def _normal(self, shape: Sequence[int], seed: int) -> Tensor:
        mixed = np.random.SeedSequence([seed % 2**64, self.index]).generate_state(1, np.uint64)
        generator = torch.Generator("cpu").manual_seed(int(mixed[0]))
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Sampler:
    """What the samplers share: an iterable of Steps, from noise to image.

    steps: length of the full schedule, 1..N. skip: steps left out at its noisy end.
    """

    schedule: NoiseSchedule
    steps: int
    skip: int = 0

    def __post_init__(self) -> None:
        expect.whole_number("steps", self.steps, 1, len(self.schedule))
        expect.whole_number("skip", self.skip, 0, self.steps)
        self.plan()

    def plan(self) -> list[tuple[int, Level, Level]]:
        """(t, now, next) of every step of the full schedule, from noise to image."""
        raise NotImplementedError

    def coefficients(self, now: Level, next: Level, before: Level | None) -> Coefficients:
        """Of the step from `now` to `next`; before: where the step before began, None of the
        first."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.steps - self.skip

    def __iter__(self) -> Iterator[Step]:
        plan, before = self.plan(), None
        times = tuple(t for t, _, _ in plan)
        for index, (t, now, next) in list(enumerate(plan))[self.skip :]:
            k = self.coefficients(now, next, before)
            seed, learned = self.noise_seed(), self.learned(now, next)
            yield Step(index, t, now, next, k, index == self.skip, times, seed, learned)
            before = now

    def learned(self, now: Level, next: Level) -> LearnedRange | None:
        """Between what the network chooses the step's variance; None: it does not."""
        return None

    def noise_seed(self) -> Seed | None:
        """The seed of the steps' noise; None: they have none."""
        return None

    def start(self, x0: Tensor, noise: Tensor) -> Tensor:
        """A clean latent at the level of the first step that runs, alpha x0 + sigma noise.

        x0, noise: (B, C, h, w). x0 itself if all steps are skipped.
        """
        level = self.plan()[self.skip][1] if self.skip < self.steps else Level(1.0, 0.0)
        return (level.alpha * _wide(x0) + level.sigma * _wide(noise)).to(x0.dtype)


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM, deterministic (eta 0) to DDPM-like (eta 1); `inverse=True` runs from image to noise.

        x0     = (x - sigma eps) / alpha
        x_next = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise,
        s      = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)

    The noise of eta > 0 is a function of (seed, index of the step). Inverse: the steps of
    DDIM(schedule, steps, skip) in reverse order with now and next exchanged, t and index kept, so
    the network is evaluated at the noisier end, as in diffusers' DDIMInverseScheduler. It starts
    from the clean latent.
    """

    eta: float = 0.0
    inverse: bool = False
    seed: int = 201002502

    def __post_init__(self) -> None:
        super().__post_init__()
        expect.number("eta", self.eta, 0, 1)
        expect.whole_number("seed", self.seed, -(2**63), 2**64 - 1)
        if self.inverse and self.eta:
            got = f"eta is {self.eta!r} with inverse=True"
            raise ValueError(f"{got}, expected 0: only eta 0 can be run backwards")

    def plan(self) -> list[tuple[int, Level, Level]]:
        stride = len(self.schedule) // self.steps
        timesteps = self.schedule.timesteps(self.steps, self.schedule.timestep_spacing or "leading")
        level, clean = self.schedule.level, self.schedule.clean
        return [(t, level(t), level(t - stride) if t >= stride else clean) for t in timesteps]

    def coefficients(self, now: Level, next: Level, before: Level | None) -> Coefficients:
        s = 0.0
        if self.eta:
            s = self.eta * next.sigma / now.sigma * math.sqrt(1 - (now.alpha / next.alpha) ** 2)
        x_eps = math.sqrt(next.sigma**2 - s**2)
        others = {"c": 0.0, "x_x": 0.0, "x_D": next.alpha, "x_eps": x_eps, "x_noise": s}
        return Coefficients.of(self.schedule.prediction, now, **others)

    def noise_seed(self) -> Seed | None:
        return self.seed if self.eta else None

    def __iter__(self) -> Iterator[Step]:
        steps = super().__iter__()
        return self._reversed(list(steps)) if self.inverse else steps

    def _reversed(self, steps: list[Step]) -> Iterator[Step]:
        for i, step in enumerate(reversed(steps)):
            now, next = step.next, step.now
            k = self.coefficients(now, next, None)
            yield replace(step, now=now, next=next, k=k, first=i == 0)

    def start(self, x0: Tensor, noise: Tensor) -> Tensor:
        if self.inverse:
            raise ValueError("DDIM inversion starts from the clean latent: give that to the loop")
        return super().start(x0, noise)


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

    def plan(self) -> list[tuple[int, Level, Level]]:
        n, ratios = self.steps, self.schedule.ratios()
        if self.karras:
            ends = ratios[-1].item() ** (1 / 7), ratios[0].item() ** (1 / 7)
            run = np.linspace(*ends, n) ** 7
            nearest = np.interp(np.log(run), np.log(ratios), np.arange(len(ratios))).round()
            timesteps = nearest.astype(int).tolist()
        else:
            # n + 1 timesteps, and the lowest is left out: the last step goes from the one above it
            # to sigma = 0.
            spacing = self.schedule.timestep_spacing or "linspace"
            timesteps = self.schedule.timesteps(n + (spacing != "trailing"), spacing)[:n]
            run = ratios[timesteps]
        levels = [Level.from_ratio(float(r)) for r in run.astype(np.float32)] + [Level(1.0, 0.0)]
        return list(zip(timesteps, levels, levels[1:]))

    def coefficients(self, now: Level, next: Level, before: Level | None) -> Coefficients:
        c, h_previous = 0.0, 0.0 if before is None else math.log(before.ratio / now.ratio)
        if h_previous and next.sigma:  # 0 too where two timesteps are one (1000 steps, linspace)
            c = math.log(now.ratio / next.ratio) / (2 * h_previous)
        x_x, x_D = next.sigma / now.sigma, next.alpha * (1 - next.ratio / now.ratio)
        prediction = self.schedule.prediction
        return Coefficients.of(prediction, now, c=c, x_x=x_x, x_D=x_D, x_eps=0.0)


def _split(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the network predicted of x, and v where it says its variance, too."""
    C = x.shape[1]
    return (out[:, :C], out[:, C:]) if out.shape[1] == 2 * C else (out, None)


def _wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
