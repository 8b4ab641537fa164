"""Smoothed-energy guidance (SEG): away from what the network predicts with blurred queries.

    eps = u + w (c - u) + s (c - p),    p: for the same text, at a few self-attention sites
    q'  = K_h q K_w^T,                  K_ij = exp(-(i - j)^2 / (2 sigma^2)) / sum_j of the same

over the h x w grid of the queries, so the curvature of attention's energy is smoothed; sigma to
infinity gives each position the mean query. K has h^2 and w^2 entries: no map is formed. At an edge
the weights inside are normalised, where the published code reflects the queries.

Source: Hong 2024 (arXiv 2408.00760): the mid block, s = 3, sigma infinite.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.features import FeatureEdit
from ..sampling.guidance import Embeddings, Guidance, Scales, StepEdits
from ..sampling.samplers import Step
from .perturbed import MID, perturbed


@dataclass(frozen=True, eq=False)
class Smoothed(Guidance):
    """See `seg`. groups: ..., perturbed, conditional."""

    sigma: float = math.inf
    sites: Sequence[str] = MID

    def edits_of(self, x: Tensor, step: Step) -> Mapping[str, Any]:
        blur = FeatureEdit(apply=smoothing(self.sigma, tuple(x.shape[2:]), len(x)))
        mine, own = {f"{site}.q": blur for site in self.sites}, super().edits_of(x, step)
        if both := sorted(mine.keys() & own.keys()):
            raise ValueError(f"{both[0]} is edited and blurred, expected one of them: other sites")
        return {**own, **mine}


def seg(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    scale: Scales = 7.5,
    edits: StepEdits | None = None,
    *,
    seg_scale: float = 3.0,
    sigma: float = math.inf,
    sites: Sequence[str] = MID,
) -> Smoothed:
    """eps = u + scale (c - u) + seg_scale (c - p), p with queries blurred at the self `sites`.

    sigma: in positions of the site's grid, above 0. The other arguments are those of `cfg`.
    """
    if not (isinstance(sigma, (int, float)) and sigma > 0):
        raise ValueError(f"sigma is {sigma!r:.80}, expected a number above 0")
    g = perturbed(
        network, uncond, cond, scale, edits, perturbed_scale=seg_scale, disturb=lambda rows: {}
    )
    return Smoothed(g.network, g.groups, g.combine, g.edits, sigma, sites)


@functools.cache  # one function for all steps: a graph is of one
def smoothing(sigma: float, size: tuple[int, int], B: int) -> Callable[[Tensor], Tensor]:
    """q (R, H, N, D) of latents (B, C, *size), the rows -2 B to -B of it blurred."""

    def apply(q: Tensor) -> Tensor:
        h, w = grid_of(q.shape[2], size)
        rows = q[-2 * B : -B].unflatten(2, (h, w))
        K_h, K_w = (kernel(n, sigma, q) for n in (h, w))
        blurred = torch.einsum("ij,rhjkd,lk->rhild", K_h, rows, K_w).flatten(2, 3)
        return torch.cat([q[: -2 * B], blurred, q[-B:]])

    return apply


def grid_of(N: int, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) with h w = N, the latent's size halved as often as it takes."""
    h, w = size
    while h * w > N:
        h, w = (h + 1) // 2, (w + 1) // 2
    return h, w


def kernel(n: int, sigma: float, like: Tensor) -> Tensor:
    """K (n, n), in the dtype of the queries."""
    i = torch.arange(n, dtype=torch.float32, device=like.device)
    return torch.softmax(-((i[:, None] - i) ** 2) / (2 * sigma**2), dim=1).to(like.dtype)
