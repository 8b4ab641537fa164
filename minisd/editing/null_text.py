"""Null-text inversion: optimise the unconditional embedding of each step for guidance.

The trajectory of DDIM inversion without guidance, z*_T ... z*_0, is the pivot. From x = z*_T on, at
step i

    minimise over phi_i   | next(x, eps_u + w (eps_c - eps_u)) - z*_next |^2  (mean)
    eps_u = e(phi_i),     eps_c = e(cond)

by a few steps of Adam from phi_(i-1), the first from the embedding of ""; then x <- next(x, ...)
with what was found. Everything else is frozen. Gradients run through the one unconditional call of
the UNet alone, from the first cross-attention on; eps_c is computed once per step, without. Mokady
et al. 2022 (arXiv 2211.09794) and its published code:

    learning rate 0.01 (1 - i / 100),  up to 10 inner steps
    stop when the loss before an update < 1e-5 + 2e-5 i

which count in a schedule of 50 steps; with more than 50, i runs to the same ends: 50 i / steps
stands in its place.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import expect
from ..drawing import OnStep, chain, embed, memory_for
from ..models.attention import Implementation
from ..sampling.guidance import MOST
from ..sampling.samplers import DDIM, Step
from .inversion import Inversion

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

BETA1, BETA2, TINY = 0.9, 0.999, 1e-8  # Adam's


@torch.no_grad()
def null_text(
    sd: "StableDiffusion",
    inversion: Inversion,
    guidance: float = 7.5,
    *,
    inner_steps: int = 10,
    lr: float = 1e-2,
    early_stop: float = 1e-5,
    recompute: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Inversion:
    """The inversion with an unconditional embedding for each image and step, and its losses.

    inversion: of `invert(..., trajectory=True)`. guidance: the scale of the edits to come, not 1,
    at which nothing is unconditional. inner_steps: 0 leaves the embedding of "". recompute: keep
    one activation per layer and compute the others again in the backward pass; takes a third more
    time, for large images. on_step: as of `minisd.drawing.Drawing`, called after each step; what it
    raises stops all. Attention is computed by "sdpa", which has a backward pass, or by "reference"
    where that was chosen. The images are independent rows: each has its own Adam and stops by
    itself. ValueError for what does not fit.
    """
    inversion.check(sd)
    if inversion.trajectory is None:
        raise ValueError("null-text needs the trajectory: invert(..., trajectory=True)")
    expect.number("guidance", guidance, -MOST, MOST)
    if guidance == 1:
        why = "at which the unconditional embedding has no effect"
        raise ValueError(f"guidance is 1, {why}: expected another scale")
    expect.whole_number("inner_steps", inner_steps, 0)
    expect.number("lr", lr, 0)
    expect.number("early_stop", early_stop, 0)
    path, steps, skip = inversion.trajectory.to(sd.device), inversion.steps, inversion.skip
    cond = embed(sd, inversion.prompts)
    phi = sd.encode_prompt([""]).float().repeat(len(cond), 1, 1)
    uncond = phi.repeat(steps, 1, 1, 1)  # (steps, B, L, D)
    losses = torch.full(
        (steps, max(inner_steps, 1), len(cond)), torch.nan, dtype=torch.float32, device="cpu"
    )

    x, after = path[0], chain(on_step=on_step)
    with memory_for("latents", x):
        for step in tqdm(DDIM(sd.schedule, steps, skip), disable=not progress):
            i = step.index * 50 / max(steps, 50)
            pivot = path[step.index + 1 - skip]
            eps_c = predicted(sd, x, step, cond, recompute)
            objective = Objective(sd, step, x, eps_c, pivot, guidance, recompute)
            taken = adam(objective, phi, inner_steps, lr * (1 - i / 100), early_stop + 2e-5 * i)
            for inner, (rows, loss) in enumerate(taken):
                losses[step.index, inner, rows.cpu()] = loss.cpu()
            uncond[step.index] = phi
            x = objective.next(phi)
            if after is not None:
                x = after(x, step)
    return replace(
        inversion, method="null-text", guidance=float(guidance), uncond=uncond, losses=losses
    )


class Objective(NamedTuple):
    """How far a step under guidance, with phi as the unconditional embedding, ends from the pivot.

    x, eps_c, pivot: (B, C, h, w), where the step starts, e(cond) there, and where it is to end.
    """

    sd: "StableDiffusion"
    step: Step
    x: Tensor
    eps_c: Tensor
    pivot: Tensor
    guidance: float
    recompute: bool

    def next(self, phi: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """next(x, eps_u + w (eps_c - eps_u)) of these rows, eps_u = e(phi)."""
        x, eps_c = self.x[rows], self.eps_c[rows]
        eps_u = predicted(self.sd, x, self.step, phi, self.recompute)
        return self.step(x, eps_u + self.guidance * (eps_c - eps_u))[0]

    @torch.enable_grad()
    def gradient(self, phi: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each of these rows, (B,), and its gradient with respect to phi, (B, L, D)."""
        phi = phi.detach().requires_grad_()
        square = (self.next(phi, rows) - self.pivot[rows]).square().flatten(1)  # (B, C h w)
        # Of the sum, and divided afterwards: the mean's gradient is too small for float16 inside
        # the network.
        (g,) = torch.autograd.grad(square.sum(), phi)
        return square.mean(1).detach(), g / square.shape[1]


def adam(
    objective: Objective, phi: Tensor, inner_steps: int, lr: float, stop: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps of Adam on phi (B, L, D), in place; yields (rows, loss of each before the step).

    A row takes no more steps once its loss was below `stop`.
    """
    m, v = torch.zeros_like(phi), torch.zeros_like(phi)
    rows = torch.arange(len(phi), dtype=torch.int64, device=phi.device)
    for n in range(1, inner_steps + 1):
        loss, g = objective.gradient(phi[rows], rows)
        m[rows] = BETA1 * m[rows] + (1 - BETA1) * g
        v[rows] = BETA2 * v[rows] + (1 - BETA2) * g**2
        phi[rows] -= lr * (m[rows] / (1 - BETA1**n)) / ((v[rows] / (1 - BETA2**n)).sqrt() + TINY)
        yield rows, loss
        rows = rows[loss >= stop]
        if not len(rows):
            return


def predicted(
    sd: "StableDiffusion", x: Tensor, step: Step, context: Tensor, recompute: bool
) -> Tensor:
    """eps (B, C, h, w) float32, the UNet in its own dtype, by attention that differentiates."""
    t = torch.full((), step.t, dtype=torch.int64, device=x.device)
    impl: Implementation = "reference" if sd.unet.attention == "reference" else "sdpa"
    context = context.to(sd.dtype)
    eps = sd.unet(x.to(sd.dtype), t, context, attention=impl, recompute=recompute)
    return eps.float()
