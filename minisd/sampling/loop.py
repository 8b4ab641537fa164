"""The loop: every method runs this one, or writes it out.

    x0 = state = None
    for step in sampler:
        eps, state = predict(x, step, state)
        x, x0 = step(x, eps, x0)
        if after is not None: x = after(x, step)

What is handed from step to step is in sight: the latent x, the clean latent x0 that the step before
estimated (DPM-Solver++ uses it, DDIM does not), and the predictor's state: the keys and values of
the text and the times, computed once, and the momentum of semantic guidance. So it belongs to one
run.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .guidance import Predict
from .samplers import Step


@torch.no_grad()
def denoise(
    x: Tensor,
    sampler: Iterable[Step],
    predict: Predict,
    after: Callable[[Tensor, Step], Tensor] | None = None,
) -> Tensor:
    """Run the steps on x (B, C, h, w); predict(x, step, state) -> (eps, state), see guidance.py.

    after(x, step) -> x edits the latent after each step. Any iterable of steps will do
    (`tqdm(sampler)` shows progress). Without gradients: write the loop out to have them.
    """
    # As it is after the first step: other strides (`x.expand`) would cost a second compiled graph.
    x = x.contiguous()
    x0: Tensor | None = None
    state: Any = None
    for step in sampler:
        eps, state = predict(x, step, state)
        x, x0 = step(x, eps, x0)
        if after is not None:
            x = after(x, step)
    return x
