"""Cross-attention maps of a run, summed as it goes: the mean over heads of each site, one (N, L)
map per row.

No map of a head or of a single step is kept. `save_mean` of an AttentionEdit adds to the sums
inside the network, so the maps are those that were used: where a row was edited, the edited ones.
Hertz et al. 2022, section 3 and figure 4.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import expect
from ..models.attention import AttentionEdit
from ..sampling.samplers import Step
from .alignment import find_word, missing_word
from .sites import Where, coarsest, select_sites

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


class Maps:
    """Mean cross-attention maps of the prompts; called with a step, the edits that sum them.

    prompts       one for each row of the conditional group, cfg(..., edits=maps)
    steps         length of the sampler's schedule, of which `until` is the fraction after which
                  nothing is added
    where         which sites (see `select_sites`); None: the coarsest resolution of the down and up
                  blocks
    height, width of the image in pixels, if not the model's own
    source_row    (S,) the row whose image each row is an edit of (`LocalBlend` reads it), by
                  default itself

    sums: {site: (S, N, L) float32}, set to zero on the first step that runs, or where a step's
    index is below that of the step before. count: the steps that were added, each once however
    often its edits were asked for.
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        prompts: Sequence[str],
        steps: int,
        where: Where | None = None,
        height: int | None = None,
        width: int | None = None,
        until: float = 1.0,
        source_row: Tensor | None = None,
    ):
        expect.whole_number("steps", steps, 1)
        expect.number("until", until, 0, 1)
        if int(until * steps) == 0:
            got = f"until is {until} of {steps} steps"
            raise ValueError(f"{got}, expected at least the first of them")
        size = sd.latent_size(height, width)
        if where is None:
            most = coarsest(sd.unet, size)
            where = [s for s in sd.unet.sites("cross", most, size) if not s.startswith("mid")]
            where = where or "mid"
        self.steps, self.until = steps, until
        self.tokenizer, self.device = sd.tokenizer, sd.device
        sites = select_sites(sd.unet, "cross", where, size)
        self.grids = {site: sd.unet.grid(site, size) for site in sites}
        self.heads, self.size = {site: sd.unet.site(site).heads for site in sites}, size
        self.reset(prompts, source_row)

    def reset(self, prompts: Sequence[str], source_row: Tensor | None = None) -> None:
        """Empty sums for these rows."""
        self.prompts, L = list(prompts), self.tokenizer.max_length
        self.sums = {
            site: torch.zeros(len(self.prompts), h * w, L, dtype=torch.float32, device=self.device)
            for site, (h, w) in self.grids.items()
        }
        own = torch.arange(len(self.prompts), dtype=torch.int64, device=self.device)
        self.source_row = own if source_row is None else source_row
        self.count, self.last = 0, -1

    def of(self, prompts: Sequence[str], source_row: Tensor) -> "Maps":
        """Empty maps of the same sites and steps for other rows."""
        other = copy.copy(self)
        other.reset(prompts, source_row)
        return other

    def __call__(self, step: Step) -> dict[str, AttentionEdit]:
        return {site: AttentionEdit(save_mean=total) for site, total in self.open(step).items()}

    def open(self, step: Step) -> Mapping[str, Tensor]:
        """The sums that this step adds to, zero at the first step of a run; none from `until`
        on."""
        if step.first or step.index < self.last:
            self.count, self.last = 0, -1
            for total in self.sums.values():
                total.zero_()  # in their memory, which a CUDA graph writes to
        again, self.last = step.index == self.last, step.index
        if step.index >= int(self.until * self.steps):
            return {}
        self.count += not again
        return self.sums

    def mean(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Mean over steps, heads and sites, (S, h, w, L), of the sites with that grid.

        None: of all sites, on the finest of their grids (bilinear). RuntimeError before the first
        step.
        """
        if not self.count:
            raise RuntimeError("the maps are empty: no step has run with them")
        grids = [g for g in self.grids.values() if grid in (None, g)]
        if not grids:
            known = sorted(set(self.grids.values()))
            raise ValueError(f"no saved site has the grid {grid}, expected one of {known}")
        finest = max(grids)
        maps = [
            self.sums[site].mT.unflatten(2, (h, w))  # (S, L, h, w)
            for site, (h, w) in self.grids.items()
            if (h, w) in grids
        ]
        total = sum(
            (
                x if x.shape[2:] == finest else F.interpolate(x, finest, mode="bilinear")
                for x in maps
            ),
            torch.zeros((), dtype=torch.float32, device=self.device),
        )
        return total.permute(0, 2, 3, 1) / (self.count * len(grids))

    def columns(self, word: str, row: int = 0) -> list[int]:
        """Positions of a word in a row's prompt; ValueError if it is not there."""
        positions = find_word(self.tokenizer, self.prompts[row], word)
        if not positions:
            raise missing_word(self.tokenizer, word, [self.prompts[row]])
        return positions

    def word(self, word: str, row: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
        """The mean map of a word of a row's prompt, (h, w): the mean over its tokens and
        occurrences."""
        return self.mean(grid)[row, :, :, self.columns(word, row)].mean(dim=-1)
