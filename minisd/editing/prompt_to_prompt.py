"""Prompt-to-prompt: draw an image again by another prompt and keep its layout, by its attention
maps.

Source and targets are denoised side by side, as rows of one batch, from the same noise. In the
first part of the steps the target rows take the source row's maps, so no map is ever stored:

    cross-attention   P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own]
    self-attention    P' = P_source, at coarse resolutions

V stays each row's own: the target draws its own things, in the source's places. With guidance, one
source and one target the network computes four rows, of which the last two are edited; `source_row`
counts among those:

    row      0            1            2           3
    text     "" (source)  "" (target)  source      target        "": uncond, or a negative prompt
    edited   -            -            0: itself   0: takes the map of the source, row 2

`token_map` (alignment.py) says which source token each target token takes its map from. When is a
table (tables.py), row `step.index` of it. Cross-attention is gated by `blend` and `reweight`, which
are 0 and 1 outside their steps; self-attention has no gate: outside its steps `self_row` says that
a row takes its own map. So the tensors have the same shapes at every step, and one graph serves
all.

Source: Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control" (arXiv
2208.01626), algorithm 1, and google/prompt-to-prompt, whose slips `compat="google"` reproduces: see
`PromptToPrompt`.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, as_list, chain, check_names
from ..models.attention import AttentionEdit
from ..recipes import tell
from ..sampling.samplers import Step
from .alignment import KindOfEdit
from .local_blend import LocalBlend, is_of_rows
from .maps import Maps
from .sites import Where, coarsest, select_sites
from .tables import Interval, WordIntervals, cross_tables, self_rows, token_maps, word_factors

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


class EditOptions(TypedDict, total=False):
    """The arguments of `PromptToPrompt` that say what is edited."""

    cross_steps: WordIntervals | list[WordIntervals]
    self_steps: Interval | list[Interval]
    edit: KindOfEdit | None | list[KindOfEdit | None]
    reweight: Mapping[str, float] | list[Mapping[str, float] | None] | None
    cross_sites: Where | None
    self_sites: Where | None
    map_sites: Where | None
    compat: Literal["google"] | None


class EditedOptions(Options, EditOptions, total=False):
    """What `edit_prompt` takes: how it is drawn, and what is edited."""


class PromptToPrompt:
    """Edits that make target prompts follow the source's layout, for cfg(..., edits=...).

    The conditional rows are [source, *targets]; the source's is never changed. Each argument holds
    for all targets, or is a LIST with one entry per target, which makes sweeps: cross_steps=[0.0,
    0.5, 1.0] for three equal targets.

    steps         length of the sampler's schedule
    cross_steps   when cross-attention maps are the source's: a fraction of the steps, a (start,
                  end) interval of fractions, or one of these for each word of the target,
                  {"default": 0.8, "square": (0, 0.2)} (without "default": 1.0). Step s is in
                  (start, end) if int(start * steps) <= s < int(end * steps). {"default": 0, "cat":
                  1} keeps the object of one word and lets the rest change.
    self_steps    the same for self-attention, without words
    edit          "replace" (words swapped one by one), "refine" (words added or removed), None:
                  what the prompts suggest
    reweight      {word: factor}, scales the maps of words of the target, new ones too, while
                  cross_steps lasts; factors may be negative. Without targets it is the source
                  prompt that is reweighted.
    cross_sites, self_sites, map_sites
                  where, see `select_sites`. None: all cross sites; the self sites up to the
                  coarsest resolution of the down and up blocks; for `maps` the cross sites of that
                  resolution
    collect_maps  sum the mean maps of all rows, as used, into `maps` (LocalBlend reads them)
    height, width of the image in pixels, if not the model's own
    compat        "google": the published code's token maps (see alignment.py), and its cross_steps,
                  which count int(fraction * (steps + 1)) because its sampler calls the UNet so
                  often

    Its tables: source_row (S,), self_row (steps, S), token_map (S, L, L), blend (steps, S, L) and
    reweight (the same, or None). ValueError: a word that is in no target (the message names those
    that are), steps or options that do not fit.
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        source: str,
        *targets: str,
        steps: int,
        cross_steps: WordIntervals | list[WordIntervals] = 0.8,
        self_steps: Interval | list[Interval] = 0.4,
        edit: KindOfEdit | None | list[KindOfEdit | None] = None,
        reweight: Mapping[str, float] | list[Mapping[str, float] | None] | None = None,
        cross_sites: Where | None = None,
        self_sites: Where | None = None,
        map_sites: Where | None = None,
        collect_maps: bool = False,
        height: int | None = None,
        width: int | None = None,
        compat: Literal["google"] | None = None,
    ):
        if compat not in (None, "google"):
            raise ValueError(f'compat is {compat!r}, expected None or "google"')
        expect.whole_number("steps", steps, 1)
        if map_sites is not None and not collect_maps:
            raise ValueError(f"map_sites has no effect without collect_maps: got {map_sites!r:.80}")
        prompts = all_prompts(source, targets, reweight)
        google, device = compat == "google", sd.device
        self.sd, self.steps, self.prompts = sd, steps, prompts

        M, has_source = token_maps(sd.tokenizer, prompts, edit, google)
        on = cross_tables(sd.tokenizer, prompts, steps, cross_steps, google)
        factors = word_factors(sd.tokenizer, prompts, reweight)
        self.source_row = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self.self_row = self_rows(prompts, steps, self_steps).to(device)
        self.token_map = M.to(device)
        self.blend = (on * has_source).to(device)
        reweighted = None if reweight is None else torch.where(on > 0, factors, 1.0)
        self.reweight = None if reweighted is None else reweighted.to(device)

        size = sd.latent_size(height, width)
        self.cross_sites = select_sites(sd.unet, "cross", cross_sites, size)
        coarse = coarsest(sd.unet, size) if self_sites is None else self_sites
        self.self_sites = select_sites(sd.unet, "self", coarse, size)
        self.check_rows()
        self._maps: Maps | None = None
        if collect_maps:
            rows = self.source_row
            self._maps = Maps(sd, prompts, steps, map_sites, height, width, source_row=rows)

    def check_rows(self) -> None:
        """ValueError if a step takes the map of a row that is not there; not for the loop."""
        for rows in (self.source_row, self.self_row):
            AttentionEdit(rows).check_rows()

    @property
    def maps(self) -> Maps:
        """The mean maps of every row, as used; AttributeError without collect_maps=True."""
        if self._maps is None:
            how = "PromptToPrompt(..., collect_maps=True)"
            raise AttributeError(f"maps are not collected; expected {how}")
        return self._maps

    def __call__(self, step: Step) -> dict[str, AttentionEdit]:
        """{site: AttentionEdit} of one step; ValueError if the tables have fewer steps."""
        i = step.index
        if i >= self.steps:
            expected = f"a sampler of steps={self.steps}, as given here"
            raise ValueError(f"the sampler is at step {i}, expected {expected}")
        factors = None if self.reweight is None else self.reweight[i]
        cross = AttentionEdit(
            self.source_row, token_map=self.token_map, blend=self.blend[i], reweight=factors
        )
        edits = dict.fromkeys(self.cross_sites, cross)
        edits |= dict.fromkeys(self.self_sites, AttentionEdit(self.self_row[i]))
        if self._maps is not None:
            for site, total in self._maps.open(step).items():
                edits[site] = edits.get(site, AttentionEdit())._replace(save_mean=total)
        return edits

    def repeated(self, n: int) -> "PromptToPrompt":
        """The same for n images of each prompt, rows [source] * n, [target 1] * n, ..."""
        image = torch.arange(n, dtype=torch.int64, device=self.source_row.device)
        several = copy.copy(self)
        several.prompts = [prompt for prompt in self.prompts for _ in range(n)]
        several.source_row = (self.source_row[:, None] * n + image).flatten()
        several.self_row = (self.self_row[:, :, None] * n + image).flatten(1)
        several.token_map = self.token_map.repeat_interleave(n, 0)
        several.blend = self.blend.repeat_interleave(n, 1)
        if self.reweight is not None:
            several.reweight = self.reweight.repeat_interleave(n, 1)
        if self._maps is not None:
            several._maps = self._maps.of(several.prompts, several.source_row)
        return several


def all_prompts(source: str, targets: Sequence[str], reweight: Any) -> list[str]:
    """[source, *targets]; without targets the source is its own, once for each of a list."""
    if not targets:
        if reweight is None:
            expected = "at least one target prompt, or reweight for the source prompt itself"
            raise ValueError(f"got no target, expected {expected}")
        targets = [source] * (len(reweight) if isinstance(reweight, list) else 1)
    return as_list([source, *targets])


def stack(*edits: PromptToPrompt) -> PromptToPrompt:
    """Several edits as one, for one batch of rows [source 1, *targets 1, source 2, *targets 2,
    ...].

    They must agree in steps and sites, and have all a reweight or none, and collect all maps or
    none (those of the first one's sites). ValueError otherwise, and for rows that an edit does not
    have.
    """
    for e in edits:
        e.check_rows()
    kinds = {
        (e.steps, *e.cross_sites, *e.self_sites, e.reweight is None, e._maps is None) for e in edits
    }
    if len(kinds) != 1:
        expected = "the same steps and sites, and either all with reweight and maps or none"
        raise ValueError(f"expected edits with {expected}")
    first_rows = [0, *accumulate(len(e.prompts) for e in edits)]
    placed = list(zip(edits, first_rows))
    stacked = copy.copy(edits[0])
    stacked.prompts = [prompt for e in edits for prompt in e.prompts]
    stacked.source_row = torch.cat([e.source_row + first for e, first in placed])
    stacked.self_row = torch.cat([e.self_row + first for e, first in placed], dim=1)
    stacked.token_map = torch.cat([e.token_map for e in edits])
    stacked.blend = torch.cat([e.blend for e in edits], dim=1)
    factors = [e.reweight for e in edits if e.reweight is not None]
    stacked.reweight = torch.cat(factors, dim=1) if factors else None
    if stacked._maps is not None:
        stacked._maps = stacked._maps.of(stacked.prompts, stacked.source_row)
    return stacked


def edit_prompt(
    sd: "StableDiffusion",
    source: str,
    *targets: str,
    local_blend: Sequence[str] | Mapping[str, Any] | None = None,
    after: Callable[[Tensor, Step], Tensor] | None = None,
    **options: Unpack[EditedOptions],
) -> list[Image.Image]:
    """Draw the source prompt and its edits to the targets, num_images of each, the source first.

    local_blend: the words of a `LocalBlend`, or its arguments as a dict. after(x, step) -> x:
    called after each step and before the blend (SpatialReplace of the published code is
    `x[:1].expand_as(x)` in the first steps, and x after them). options: the arguments of
    `PromptToPrompt`, and of `minisd.drawing.Drawing` (here steps=50, sampler="ddim"); on_step sees
    all rows. All prompts of an image are drawn from one noise, or each from its own row of
    `latents`; a list of seeds draws all prompts once with each. To edit a given image: see
    `Inversion.edit_options`. ValueError for what does not fit.
    """
    arguments = dict(locals())
    drawing, edit = split(options)
    drawing = drawing.for_each_seed()
    prompts = all_prompts(source, targets, edit.get("reweight"))
    x = shared_noise(drawing, sd, prompts)
    # The size may be that of given latents.
    drawing = drawing.at(*(side * sd.vae.factor for side in x.shape[2:]))
    edit |= {"steps": drawing.steps, "height": drawing.height, "width": drawing.width}
    p2p = PromptToPrompt(sd, source, *targets, collect_maps=bool(local_blend), **edit)
    p2p = p2p.repeated(drawing.num_images)
    blend = None
    if local_blend:
        blend = LocalBlend(p2p.maps, **blend_arguments(local_blend, drawing))
    uncond, cond = drawing.embed(sd, prompts)
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance, p2p)
    both = chain(after=after, local_blend=blend)
    sampler = drawing.make_sampler(sd, rows=drawing.num_images)
    images = sd.decode(drawing.denoise(x, sampler, predict, both))
    return tell(images, sd, "edit_prompt", arguments, drawing, prompts, drawing.num_images)


def blend_arguments(given: Sequence[str] | Mapping[str, Any], drawing: Drawing) -> dict[str, Any]:
    """The arguments of LocalBlend; words of each prompt as those of each image."""
    named = dict(given) if isinstance(given, Mapping) else {"words": given}
    _, *known = inspect.signature(LocalBlend).parameters  # all but the maps
    check_names("argument of local_blend", named, known)
    if "words" not in named:
        raise TypeError(f"local_blend has no words: got {', '.join(named)}")
    for name in named.keys() & {"words", "subtract"}:
        if is_of_rows(named[name]):
            named[name] = drawing.each(named[name])
    return named


def seed_baseline(
    sd: "StableDiffusion", source: str, *targets: str, **options: Unpack[Options]
) -> list[Image.Image]:
    """The seed-only baseline of `edit_prompt`: all prompts from the same noise, without an edit."""
    arguments = dict(locals())
    drawing = Drawing.of(options, steps=50, sampler="ddim").for_each_seed()
    prompts = [source, *targets]
    x = shared_noise(drawing, sd, prompts)
    uncond, cond = drawing.embed(sd, prompts)
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)
    sampler = drawing.make_sampler(sd, rows=drawing.num_images)
    images = sd.decode(drawing.denoise(x, sampler, predict))
    return tell(images, sd, "seed_baseline", arguments, drawing, prompts, drawing.num_images)


def split(options: Mapping[str, Any]) -> tuple[Drawing, dict[str, Any]]:
    """How it is drawn, and what is edited."""
    known = EditOptions.__annotations__
    edit = {name: value for name, value in options.items() if name in known}
    how: Any = {name: value for name, value in options.items() if name not in edit}
    return Drawing.of(how, beside=known, steps=50, sampler="ddim"), edit


def shared_noise(drawing: Drawing, sd: "StableDiffusion", prompts: Sequence[str]) -> Tensor:
    """x_T for num_images of each prompt: one noise for all prompts of an image."""
    n, all_rows = drawing.num_images, drawing.num_images * len(prompts)
    given = drawing.latents
    if isinstance(given, Tensor) and given.ndim == 4 and len(given) == all_rows:
        return drawing.noise(sd, all_rows)
    return drawing.noise(sd, n).repeat(len(prompts), 1, 1, 1)
