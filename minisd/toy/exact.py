"""The network that has nothing left to learn: the exact noise of a mixture, for minisd's guidance.

    eps(x, t) = E[eps | x_t = x] = -sigma_t d/dx log q_t(x)              (Tweedie's formula)

That is the minimum of the training loss |eps - eps_theta(x_t, t)|^2, so a trained network tries to
be it. It is called as every network is, `network(x, t, context, edits)`, and samplers, guidance and
`denoise` run on it unchanged; a latent has D numbers here, (B, D), in place of (B, C, h, w).

The context stands for the text: a row of weights of the components. The mixture's own weights are
"no label", a single 1 is the label of that component, and anything between is a density, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import expect
from ..sampling.guidance import Predict, cfg, conditional
from ..sampling.schedule import NoiseSchedule
from .mixture import Mixture


@dataclass(frozen=True, eq=False)
class ExactNoise:
    """eps(x, t, context) = -sigma_t d/dx log sum_k context_k N(x; alpha_t m_k, ...)."""

    data: Mixture
    schedule: NoiseSchedule

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, edits: Any = None) -> Tensor:
        """x: (B, D), t: a 0-d tensor, context: (G B, 1, K) -> (G B, D), group after group."""
        if edits:
            raise ValueError(f"got edits of {', '.join(edits)}, expected none: no attention here")
        expect.shape("context", context, "B", 1, len(self.data.weights))
        level = self.schedule.level(int(t))
        x = x.repeat(len(context) // len(x), 1)
        return -level.sigma * self.data.at(level).score(x, context[:, 0])


def no_label(data: Mixture) -> Tensor:
    """The context without a label, (1, 1, K): the mixture's weights."""
    return data.weights[None, None]


def label(data: Mixture, k: int) -> Tensor:
    """The context of component k, (1, 1, K)."""
    expect.whole_number("label", k, 0, len(data.weights) - 1)
    return torch.eye(len(data.weights), dtype=torch.float64, device="cpu")[[k], None]


def guided(network: Any, data: Mixture, k: int | None = None, scale: float = 1.0) -> Predict:
    """minisd's own guidance: without a label, or eps = u + scale (c - u) with label k."""
    if k is None:
        expect.number("scale", scale, 1, 1)  # there is nothing to guide to
        return conditional(network, no_label(data))
    return cfg(network, no_label(data), label(data, k), scale)
