"""DDPM: ancestral sampling, every step a draw from the posterior of the diffusion.

    mu     = sqrt(abar') beta / (1 - abar) x0 + sqrt(a) (1 - abar') / (1 - abar) x
    x_next = mu + s noise,           a = abar / abar',   beta = 1 - a

abar = alpha^2 of the level now, abar' of the next, which need not be neighbours: the steps may be
any of the schedule's timesteps. Sources: Ho et al. 2020 (arXiv 2006.11239) eq. 7 and 15 and section
3.2; Nichol and Dhariwal 2021 (arXiv 2102.09672) for the learned variance and fewer steps. DDIM at
eta 1 is the same step with s^2 = beta~.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .. import expect
from .samplers import Coefficients, LearnedRange, Sampler, Seed
from .schedule import SPACINGS, Level

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
VARIANCES = get_args(Variance)


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling; it ends at alpha = 1 and adds no noise there.

    variance: s^2. "fixed_small": beta~ = beta (1 - abar') / (1 - abar), "fixed_large": beta,
    "learned_range": between the two, as the network says, which has to predict twice as many
    channels. spacing: of the timesteps, see `NoiseSchedule.timesteps`; None is the schedule's own,
    or else "leading". The published DiT takes 250 steps with "learned_range" and "linspace". seed:
    of the noise of all steps; a tuple gives each row its own. Names as in diffusers' DDPMScheduler,
    which, unlike this, takes a step to end N // steps timesteps further, whatever the spacing.
    """

    variance: Variance = "fixed_small"
    spacing: str | None = None
    seed: Seed = 200611239

    def __post_init__(self) -> None:
        for name, value, known in (
            ("variance", self.variance, VARIANCES),
            ("spacing", self.spacing, (None, *SPACINGS)),
        ):
            if value not in known:
                expected = ", ".join(map(str, known))
                raise ValueError(f"{name} is {value!r}, expected one of {expected}")
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            expect.whole_number("seed", seed, -(2**63), 2**64 - 1)
        super().__post_init__()

    def plan(self) -> list[tuple[int, Level, Level]]:
        spacing = self.spacing or self.schedule.timestep_spacing or "leading"
        timesteps = self.schedule.timesteps(self.steps, spacing)
        levels = [*map(self.schedule.level, timesteps), Level(1.0, 0.0)]
        return list(zip(timesteps, levels, levels[1:]))

    def coefficients(self, now: Level, next: Level, before: Level | None) -> Coefficients:
        large, small = variances(now, next)
        s = {"fixed_small": math.sqrt(small), "fixed_large": math.sqrt(large), "learned_range": 1.0}
        x_D = next.alpha * large / now.sigma**2
        x_x = now.alpha / next.alpha * (next.sigma / now.sigma) ** 2
        x_noise = s[self.variance] if next.sigma else 0.0  # the last step ends at the mean
        others = {"c": 0.0, "x_x": x_x, "x_D": x_D, "x_eps": 0.0, "x_noise": x_noise}
        return Coefficients.of(self.schedule.prediction, now, **others)

    def learned(self, now: Level, next: Level) -> LearnedRange | None:
        if self.variance != "learned_range":
            return None
        large, small = variances(now, next)
        # beta~ of the last step is 0. What stands for it has no effect, nor has that step's noise.
        return LearnedRange(math.log(large), math.log(small or large))

    def noise_seed(self) -> Seed | None:
        return self.seed


def variances(now: Level, next: Level) -> tuple[float, float]:
    """(beta, beta~) of the step from `now` to `next`."""
    beta = 1 - (now.alpha / next.alpha) ** 2
    return beta, beta * (next.sigma / now.sigma) ** 2
