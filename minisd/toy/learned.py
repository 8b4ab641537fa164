"""A network that learns the noise of a mixture from its samples, in seconds.

    loss = |eps - eps_theta(alpha_t x + sigma_t eps, t, context)|^2,   t uniform

The objective of Ho et al. 2020 (eq. 14) on an MLP. A share of the samples is shown without its
label, so that one network answers with and without (Ho and Salimans 2022). It has seen samples
alone; how near it comes to the exact noise (exact.py) can be told at every point.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import expect
from ..sampling.schedule import NoiseSchedule
from .mixture import Mixture


class NoiseMLP(nn.Module):
    """eps(x, t, context) = sigma_t layers(x, time, context), a network for minisd's guidance.

    The noise is sigma times the score, up to the sign, and it is the score that stays of the same
    size at all t. Time enters as ln(sigma / alpha) / 2, and it and x with their sines and cosines:
    between two modes the score turns about, more sharply than layers alone learn in seconds.
    """

    alphas_cumprod: Tensor
    waves: Tensor

    def __init__(self, schedule: NoiseSchedule, dimensions: int, components: int, width: int = 64):
        super().__init__()
        where: Any = {"dtype": torch.float32, "device": "cpu"}
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.clone())
        waves = 2.0 ** torch.arange(3, **where)
        self.register_buffer("waves", waves)
        inputs = (dimensions + 1) * (1 + 2 * len(waves)) + components
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, width, **where), nn.SiLU()),
            *(nn.Linear(width, width, **where), nn.SiLU()),
            *(nn.Linear(width, width, **where), nn.SiLU()),
            nn.Linear(width, dimensions, **where),
        )

    def embed(self, x: Tensor) -> Tensor:
        """x and its sines and cosines: (B, n) -> (B, 7 n)."""
        angles = (x[..., None] * self.waves).flatten(1)
        return torch.cat([x, angles.sin(), angles.cos()], dim=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, edits: Any = None) -> Tensor:
        """x: (B, D); t: 0-d or (B,); context: (G B, 1, K) -> (G B, D), group after group."""
        if edits:
            raise ValueError(f"got edits of {', '.join(edits)}, expected none: no attention here")
        groups = len(context) // len(x)
        variance = 1 - self.alphas_cumprod[t].reshape(-1, 1)
        time = self.embed(0.25 * (variance / (1 - variance)).log()).expand(len(x), -1)
        inputs = torch.cat([self.embed(x.float()), time], dim=1).repeat(groups, 1)
        score = self.layers(torch.cat([inputs, context[:, 0].float()], dim=1))
        return (variance.sqrt().expand(len(x), 1).repeat(groups, 1) * score).to(x.dtype)


def train(
    data: Mixture,
    schedule: NoiseSchedule,
    steps: int = 2000,
    batch: int = 512,
    unlabelled: float = 0.3,
    seed: int = 0,
) -> NoiseMLP:
    """A NoiseMLP that has learned from 100,000 samples.

    steps: of Adam, its rate from 0.01 to 0 as half a cosine. unlabelled: share of the samples whose
    label is hidden.
    """
    expect.whole_number("steps", steps, 1)
    expect.whole_number("batch", batch, 1)
    expect.number("unlabelled", unlabelled, 0, 1)
    samples, labels = data.labelled(100_000, seed)
    contexts = torch.cat(
        [torch.eye(len(data.weights), dtype=torch.float64, device="cpu"), data.weights[None]]
    ).float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = NoiseMLP(schedule, data.dimensions, len(data.weights))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.99))
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(samples), (batch,), dtype=torch.int64, device="cpu")
            t = torch.randint(len(schedule), (batch,), dtype=torch.int64, device="cpu")
            hidden = torch.rand(batch, dtype=torch.float32, device="cpu") < unlabelled
            context = contexts[labels[rows].where(~hidden, len(data.weights))]
            x0 = samples[rows].float()
            eps = torch.randn(x0.shape, dtype=torch.float32, device="cpu")
            level = schedule.alphas_cumprod[t][:, None]
            x = level.sqrt() * x0 + (1 - level).sqrt() * eps
            loss = (eps - network(x, t, context[:, None])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return network.requires_grad_(False)
