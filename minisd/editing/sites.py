"""Choosing attention sites, by place, by resolution or by name."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from numbers import Integral

from ..models.unet import UNet


def coarsest(unet: UNet, size=None) -> int:
    """The number of queries at the coarsest resolution of the down and up blocks, for latents of
    `size` (h, w).

    In Stable Diffusion v1 this is 1/16 of the latent's positions, 16 x 16 for a picture of 512 x
    512: the published limit for injecting self-attention, and the maps that a local blend reads.
    """
    sites = [site for site in unet.sites("cross") if not site.startswith("mid")] or unet.sites(
        "cross"
    )
    return min(math.prod(unet.grid(site, size)) for site in sites)


def select_sites(
    unet: UNet, kind: str, where: str | int | Sequence[str | int] | None = None, size=None
) -> list[str]:
    """Names of the "self" or "cross" sites that any entry of `where` picks, in forward order.

    where: None, all; "down", "mid" or "up", those blocks; a number, sites with at most that many
    queries; "16x16", sites with queries on such a grid (height x width); else a site name, in which
    * and ? stand for any characters. size: (h, w) of the latents, None: the model's own. ValueError
    for an entry that picks nothing; [] picks nothing.
    """
    sites = unet.sites(kind)
    if where is None:
        return sites
    picked = set()
    for entry in where if isinstance(where, (list, tuple, set)) else [where]:
        new = set()
        if isinstance(entry, str):
            pattern = f"{entry}_block*" if entry in ("down", "mid", "up") else entry
            new = {
                s
                for s in sites
                if fnmatchcase(s, pattern) or "x".join(map(str, unet.grid(s, size))) == entry
            }
        elif isinstance(entry, Integral):
            new = {site for site in sites if math.prod(unet.grid(site, size)) <= entry}
        if not new:
            grids = dict.fromkeys("{}x{}".format(*unet.grid(site, size)) for site in sites)
            raise ValueError(
                f"no {kind}-attention site is picked by {entry!r}; expected down, mid, up, a number of queries, a grid "
                f"({', '.join(grids)}) or a name like {sites[0]}"
            )
        picked |= new
    return [site for site in sites if site in picked]
