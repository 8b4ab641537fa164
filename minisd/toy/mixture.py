"""A mixture of Gaussians: data whose noised density, score and distribution are known at each
level.

    p(x)   = sum_k w_k N(x; m_k, s_k^2 I)
    q_t(x) = sum_k w_k N(x; alpha m_k, (alpha^2 s_k^2 + sigma^2) I),    x_t = alpha x + sigma eps
    score  = d/dx log q_t(x) = sum_k r_k(x) (alpha m_k - x) / (alpha^2 s_k^2 + sigma^2)

r_k(x), the share of component k in the density at x. Noise only moves and widens the components, so
the noised mixture is a mixture again: `data.at(level)`, and all that is asked of the data can be
asked of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import expect
from ..sampling.schedule import Level


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights: (K,), of sum 1. means: (K, D). stds: (K,), of all D directions. All float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def of(
        cls,
        weights: Sequence[float],
        means: Sequence[float] | Sequence[Sequence[float]],
        stds: Sequence[float],
    ) -> "Mixture":
        """From lists. weights are scaled to sum 1; means: K numbers, or K lists of D numbers."""
        w, m, s = (
            torch.tensor(values, dtype=torch.float64, device="cpu")
            for values in (weights, means, stds)
        )
        m = m[:, None] if m.ndim == 1 else m
        expect.shape("weights", w, "K")
        expect.shape("means", m, len(w), "D")
        expect.shape("stds", s, len(w))
        if not (w.min() > 0 and s.min() >= 0 and all(x.isfinite().all() for x in (w, m, s))):
            got = f"weights {list(weights)}, stds {list(stds)}"
            raise ValueError(f"got {got}, expected weights above 0 and stds from 0, all finite")
        return cls(w / w.sum(), m, s)

    @property
    def dimensions(self) -> int:
        """D."""
        return self.means.shape[1]

    def at(self, level: Level) -> "Mixture":
        """The density of alpha x + sigma eps, x of this one: q_t at the level of t."""
        alpha, sigma = level
        stds = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        return Mixture(self.weights, alpha * self.means, stds)

    def component(self, k: int) -> "Mixture":
        """Component k alone, as a mixture of one."""
        expect.whole_number("component", k, 0, len(self.weights) - 1)
        return Mixture(torch.ones_like(self.weights[:1]), self.means[[k]], self.stds[[k]])

    def log_parts(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """log w_k N(x; m_k, s_k^2 I) -> (B, K). x: (B, D).

        weights: other w, (K,) or one row of them for each x, (B, K); 0 leaves a component out.
        """
        expect.shape("x", x, "B", self.dimensions)
        w = (self.weights if weights is None else weights).to(x)
        means, variances = self.means.to(x), self.stds.to(x) ** 2
        squares = (x[:, None] - means).square().sum(-1)
        normal = -0.5 * (squares / variances + self.dimensions * (2 * math.pi * variances).log())
        return w.log() + normal

    def log_density(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """log p(x), (B,)."""
        return self.log_parts(x, weights).logsumexp(1)

    def shares(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """r_k(x) = w_k N(x; m_k, s_k^2 I) / p(x), (B, K): the probability that x is of component
        k."""
        return self.log_parts(x, weights).softmax(1)

    def score(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """d/dx log p(x) = sum_k r_k(x) (m_k - x) / s_k^2, (B, D)."""
        r = self.shares(x, weights) / self.stds.to(x) ** 2
        return r @ self.means.to(x) - r.sum(1, keepdim=True) * x

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x) of a mixture in one dimension, elementwise."""
        if self.dimensions != 1:
            raise ValueError(f"the mixture has {self.dimensions} dimensions, expected 1")
        parts = torch.special.ndtr((x[..., None] - self.means[:, 0].to(x)) / self.stds.to(x))
        return parts @ self.weights.to(x)

    def along(self, direction: Sequence[float]) -> "Mixture":
        """The mixture in one dimension that x . direction has, direction of any length above 0."""
        u = torch.tensor(direction, dtype=torch.float64, device="cpu")
        expect.shape("direction", u, self.dimensions)
        return Mixture(self.weights, (self.means @ u)[:, None], self.stds * u.norm())

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n points, (n, D) float64."""
        return self.labelled(n, seed)[0]

    def labelled(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n points (n, D), and the component that each is of, (n,)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        size = (n, self.dimensions)
        noise = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return self.means[labels] + self.stds[labels, None] * noise, labels


def kolmogorov(samples: Tensor, data: Mixture) -> float:
    """max over x of |share of the samples <= x - P(X <= x)|, in one dimension.

    samples: (n,) or (n, 1). Of n samples of the mixture itself it is below sqrt(ln(2 / p) / (2 n))
    with probability 1 - p or more (Massart 1990), 0.0085 for n = 1e5 and p = 1e-6.
    """
    F = data.cdf(samples.double().flatten().sort().values)
    ranks = torch.arange(len(F) + 1, dtype=torch.float64, device="cpu") / len(F)
    return torch.maximum(ranks[1:] - F, F - ranks[:-1]).max().item()
