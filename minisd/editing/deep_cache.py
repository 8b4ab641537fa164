"""DeepCache: most steps compute only the outermost layers of the UNet, on a deep feature of an
earlier step.

Every n-th step is computed in full, and saves the last feature that comes from below: the output
of the first layer of the last up block. The steps between inject it. What is left to compute is
conv_in, the first layers on the way down, and the layers of the last up block whose skips those are
(UNet.outermost). It is an approximation: docs/knobs.md says how many images it costs.

Source: Ma et al. 2023 (arXiv 2312.00858), the uniform schedule 1:N.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import expect
from ..models.features import FeatureEdit
from ..models.unet import UNet
from ..sampling.guidance import Embeddings, Guidance, Scales, StepEdits, cfg
from ..sampling.samplers import Step


@dataclass(frozen=True, eq=False)
class DeepCache:
    """predict(x, step, state) -> (eps, state), see `deep_cache`; the feature is in the state."""

    guidance: Guidance
    site: str
    channels: int
    every: int

    def __call__(self, x: Tensor, step: Step, state: Any = None) -> tuple[Tensor, Any]:
        inner, deep = (None, None) if state is None else state
        full = deep is None or step.index % self.every == 0
        if deep is None:
            rows = len(x) * len(self.guidance.groups)
            deep = torch.empty(rows, self.channels, *x.shape[2:], dtype=x.dtype, device=x.device)
        edit = FeatureEdit(save=deep) if full else FeatureEdit(inject=deep)
        eps, inner = replace(self.guidance, edits=lambda step: {self.site: edit})(x, step, inner)
        return eps, (inner, deep)


def deep_cache(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    scale: Scales = 7.5,
    edits: StepEdits | None = None,
    *,
    unet: UNet,
    every: int = 3,
) -> DeepCache:
    """`cfg` with the deep layers computed in every n-th step alone, n = every.

    unet: the one that the network computes; as a rule, rule=partial(deep_cache, unet=sd.unet).
    ValueError for edits, of which most would be left out.
    """
    expect.whole_number("every", every, 1)
    if edits is not None:
        raise ValueError("deep_cache takes no edits: the layers that they are in are left out")
    guidance = cfg(network, uncond, cond, scale)
    return DeepCache(guidance, unet.deep, unet.config.block_out_channels[0], every)
