"""Choosing sites, by place, by resolution or by name."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from numbers import Integral

from ..models.sites import MAPS, SiteKind, Size
from ..models.unet import UNet

Where = str | int | Sequence[str | int]  # sites, see `select_sites`


def coarsest(unet: UNet, size: Size | None = None) -> int:
    """The number of queries at the coarsest resolution of the down and up blocks.

    size: (h, w) of the latents. In Stable Diffusion v1 this is 1/16 of the latent's positions,
    16 x 16 for an image of 512 x 512: the published limit for injecting self-attention, and the
    maps that a local blend reads.
    """
    cross = unet.sites("cross")
    sites = [site for site in cross if not site.startswith("mid")] or cross
    return min(math.prod(unet.grid(site, size)) for site in sites)


def select_sites(
    unet: UNet,
    kind: SiteKind | Sequence[SiteKind],
    where: Where | None = None,
    size: Size | None = None,
) -> list[str]:
    """Names of the sites of a kind that any entry of `where` picks, in forward order; of several
    kinds, one after the other.

    where: None, all; "down", "mid" or "up", those blocks; a number, sites with at most that many
    queries; "16x16", sites with queries on such a grid (height x width); else a site name, in which
    * and ? stand for any characters. size: (h, w) of the latents, None: the model's own. ValueError
    for an entry that picks nothing; [] picks nothing.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    sites = [site for each in kinds for site in unet.sites(each)]
    if where is None:
        return sites
    grids = {site: "x".join(map(str, unet.grid(site, size))) for site in sites}
    picked: set[str] = set()
    for entry in where if isinstance(where, (list, tuple, set)) else [where]:
        new: set[str] = set()
        if isinstance(entry, str):
            pattern = f"{entry}_block*" if entry in ("down", "mid", "up") else entry
            new = {site for site in sites if fnmatchcase(site, pattern) or grids[site] == entry}
        elif isinstance(entry, Integral):
            new = {site for site in sites if math.prod(unet.grid(site, size)) <= int(entry)}
        if not new:
            known = ", ".join(dict.fromkeys(grids.values()))
            expected = f"down, mid, up, a number of queries, a grid ({known}) or a name"
            named = [f"{each}-attention" if each in MAPS else each for each in kinds]
            got = f"no {' or '.join(named)} site is picked by {entry!r}"
            raise ValueError(f"{got}; expected {expected} like {sites[0]}")
        picked |= new
    return [site for site in sites if site in picked]
