"""DAAM: where in the image each word is, from the maps of all heads, steps and sites.

    D = sum over heads, steps and cross-attention sites of bicubic(map, to the latent's size)

Enlarging is linear, so the sums that `Maps` keeps are enlarged once, after the run.

Source: Tang et al. 2022, "What the DAAM" (arXiv 2210.04885). Its code clamps each enlarged map at
0, where the cubic undershoots it; here the sum is.
"""

import copy

import torch
import torch.nn.functional as F

from .maps import Maps


def daam(maps: Maps) -> Maps:
    """The attribution maps of a run: Maps of one site as large as the latent, with
    daam(maps).word(word) (h, w).

    maps: of `heatmap`, or any `Maps` after its run; of all cross sites for DAAM's own. RuntimeError
    before the first step.
    """
    if not maps.count:
        raise RuntimeError("the maps are empty: no step has run with them")
    h, w = maps.size
    total = torch.zeros((), dtype=torch.float32, device=maps.device)
    for site, mean in maps.sums.items():
        each = maps.heads[site] * mean.mT.unflatten(2, maps.grids[site])  # (S, L, h', w')
        total = total + F.interpolate(each, (h, w), mode="bicubic")
    whole = copy.copy(maps)
    whole.sums = {"daam": total.clamp(min=0).flatten(2).mT}  # (S, h w, L)
    whole.grids, whole.count = {"daam": (h, w)}, 1
    return whole
