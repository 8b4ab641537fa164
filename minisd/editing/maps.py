"""Cross-attention maps of a run, summed as it goes: the mean over heads of each site, one (N, L)
map per row.

No map of a head or of a single step is kept. `save_mean` of an AttentionEdit adds to the sums
inside the network, so the maps are those that were used: where a row was edited, the edited ones.
Hertz et al. 2022, section 3 and figure 4.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import expect
from ..models.attention import AttentionEdit
from .alignment import find_word, missing_word
from .sites import coarsest, select_sites


class Maps:
    """Mean cross-attention maps of the prompts; called with a step, the edits that sum them:
    cfg(..., edits=maps).

    prompts      one for each row of the conditional group
    steps        length of the sampler's schedule, of which `until` is the fraction after which nothing is added
    where        which sites (see `select_sites`); None: the coarsest resolution of the down and up blocks
    height, width   of the picture in pixels, if not the model's own
    source_row   (S,) the row whose picture each row is an edit of (`LocalBlend` reads it), by default itself

    sums: {site: (S, N, L) float32}. A step whose index is not above that of the step before starts
    a new run: the sums are set to zero.
    """

    def __init__(
        self,
        sd,
        prompts: Sequence[str],
        steps: int,
        where: str | int | Sequence[str | int] | None = None,
        height: int | None = None,
        width: int | None = None,
        until: float = 1.0,
        source_row: Tensor | None = None,
    ):
        expect.whole_number("steps", steps, 1)
        expect.number("until", until, 0, 1)
        if int(until * steps) == 0:
            raise ValueError(
                f"until is {until} of {steps} steps, expected at least the first of them"
            )
        size = sd.latent_size(height, width)
        if where is None:
            most = coarsest(sd.unet, size)
            where = [
                s for s in sd.unet.sites("cross", most, size) if not s.startswith("mid")
            ] or "mid"
        self.prompts, self.tokenizer, self.steps, self.until = (
            list(prompts),
            sd.tokenizer,
            steps,
            until,
        )
        self.grids = {
            site: sd.unet.grid(site, size) for site in select_sites(sd.unet, "cross", where, size)
        }
        self.sums = {
            site: torch.zeros(len(self.prompts), h * w, sd.tokenizer.max_length, device=sd.device)
            for site, (h, w) in self.grids.items()
        }
        self.source_row = (
            torch.arange(len(self.prompts), device=sd.device) if source_row is None else source_row
        )
        self.count, self.last = 0, -1

    def __call__(self, step) -> Mapping[str, AttentionEdit]:
        return {site: AttentionEdit(save_mean=total) for site, total in self.open(step).items()}

    def open(self, step) -> Mapping[str, Tensor]:
        """The sums that this step adds to, zero at the first step of a run; none from `until`
        on."""
        if step.index <= self.last:
            self.count = 0
            for total in self.sums.values():
                total.zero_()
        self.last = step.index
        if step.index >= int(self.until * self.steps):
            return {}
        self.count += 1
        return self.sums

    def mean(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Mean over steps, heads and sites, (S, h, w, L), of the sites with that grid.

        None: of all sites, on the finest of their grids (bilinear). RuntimeError before the first
        step.
        """
        if not self.count:
            raise RuntimeError(
                "the maps are empty: no step has run with them (they sum from their first use on)"
            )
        grids = [g for g in self.grids.values() if grid in (None, g)]
        if not grids:
            raise ValueError(
                f"no saved site has the grid {grid}, expected one of {sorted(set(self.grids.values()))}"
            )
        finest, total = max(grids), 0
        for site, (h, w) in self.grids.items():
            if (h, w) in grids:
                maps = self.sums[site].mT.unflatten(2, (h, w))  # (S, L, h, w)
                total = total + (
                    maps if (h, w) == finest else F.interpolate(maps, finest, mode="bilinear")
                )
        return total.permute(0, 2, 3, 1) / (self.count * len(grids))

    def columns(self, word: str, row: int = 0) -> list[int]:
        """Positions of a word in a row's prompt; ValueError if it is not there."""
        positions = find_word(self.tokenizer, self.prompts[row], word)
        if not positions:
            raise missing_word(word, [self.prompts[row]])
        return positions

    def word(self, word: str, row: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
        """The mean map of a word of a row's prompt, (h, w): the mean over its tokens and
        occurrences."""
        return self.mean(grid)[row, :, :, self.columns(word, row)].mean(dim=-1)
