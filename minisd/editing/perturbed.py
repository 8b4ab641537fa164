"""Perturbed guidance: also away from what the network predicts when part of it is disturbed.

    eps = u + w (c - u) + s (c - p)

p is its prediction for the same text with self-attention disturbed at a few sites, so that objects
lose their structure. `pag` takes the identity for the map there, out = V: every position sees
itself alone. The disturbed rows stand beside the conditional ones, whose group is the last, and one
edit addresses both: S = 2 B rows. With w = 1 there is no u to compute.

Source: Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance"
(arXiv 2403.17377): the mid block, s = 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import expect
from ..models.attention import AttentionEdit
from ..sampling.guidance import Embeddings, Guidance, Scales, StepEdits, cfg
from ..sampling.samplers import Step

MID = ("mid_block.attentions.0.transformer_blocks.0.attn1",)
# (2 B,) bool, True in the disturbed rows -> {site: what disturbs them}
Disturb = Callable[[Tensor], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Perturbed(Guidance):
    """See `perturbed`. The edits that disturb stand beside those of the conditional rows."""

    disturb: Disturb = lambda rows: {}

    def edits_of(self, x: Tensor, step: Step) -> Mapping[str, Any]:
        B = len(x)
        rows = torch.arange(2 * B, dtype=torch.int64, device=x.device)
        mine, own = dict(self.disturb(rows < B)), dict(super().edits_of(x, step))
        for site in mine.keys() & own.keys():
            own_rows = own[site].source_row
            if own_rows is None or any(x is not None for x in own[site][1:]):
                raise ValueError(
                    f"{site} is edited and disturbed, expected one of them: other sites"
                )
            wide = torch.cat([rows[:B], own_rows + B])  # of the conditional rows among all 2 B
            mine[site] = mine[site]._replace(source_row=wide)
        return own | mine


def pag(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    scale: Scales = 7.5,
    edits: StepEdits | None = None,
    *,
    pag_scale: float = 3.0,
    sites: Sequence[str] = MID,
) -> Perturbed:
    """Perturbed-attention guidance, eps = u + scale (c - u) + pag_scale (c - p).

    p: the map of the self-attention `sites` is the identity, out = V. The other arguments are
    those of `cfg`.
    """

    def disturb(rows: Tensor) -> Mapping[str, AttentionEdit]:
        return dict.fromkeys(sites, AttentionEdit(own_value=rows))

    return perturbed(
        network, uncond, cond, scale, edits, perturbed_scale=pag_scale, disturb=disturb
    )


def perturbed(
    network: Callable[..., Tensor],
    uncond: Embeddings,
    cond: Tensor,
    scale: Scales = 7.5,
    edits: StepEdits | None = None,
    *,
    perturbed_scale: float,
    disturb: Disturb,
) -> Perturbed:
    """eps = u + scale (c - u) + perturbed_scale (c - p), p being disturbed by what `disturb`
    says."""
    expect.number("the scale of the perturbed guidance", perturbed_scale)
    plain = cfg(network, uncond, cond, scale, edits)
    *before, (name, texts) = plain.groups
    groups = [*before, ("perturbed", texts), (name, texts)]

    def combine(*eps: Tensor) -> Tensor:
        *u, p, c = eps
        return plain.combine(*u, c) + perturbed_scale * (c - p)

    return Perturbed(network, groups, combine, edits, disturb)
