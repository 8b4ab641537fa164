"""The toy's data and schedule, and where its samples start."""

from torch import Tensor

from ..sampling.samplers import Sampler
from ..sampling.schedule import NoiseSchedule
from .mixture import Mixture

LINE = Mixture.of([0.3, 0.5, 0.2], [-2.0, 0.0, 2.0], [0.3, 0.5, 0.3])
PLANE = Mixture.of([0.3, 0.4, 0.3], [[-2.2, -0.8], [0.0, 1.1], [2.2, -0.6]], [0.5, 0.4, 0.6])


def ho_schedule() -> NoiseSchedule:
    """Ho et al. 2020: 1000 timesteps, beta from 1e-4 to 0.02, linearly; at the end hardly anything
    but noise."""
    return NoiseSchedule.from_dict(
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    )


def start(data: Mixture, sampler: Sampler, n: int, seed: int = 0) -> Tensor:
    """n samples of q_t at the sampler's first level, (n, D) float64: not N(0, 1), which is near.

    So what is wrong with the samples in the end is the sampler's alone.
    """
    first = next(iter(sampler))
    return data.at(first.now).sample(n, seed)
