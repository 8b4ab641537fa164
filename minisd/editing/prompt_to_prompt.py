"""Prompt-to-prompt: redraw a picture after a changed prompt and keep its layout, by the attention
maps of the source.

Source and targets are denoised side by side, as rows of one batch, from the same noise. In the
first part of the steps the target rows take the source row's maps, so no map is ever stored:

    cross-attention   P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own]
    self-attention    P' = P_source, at coarse resolutions

`token_map` (alignment.py) says which source token each target token takes its map from. When is a
table: row `step.index` of `blend`, `reweight` and `self_row`. The tensors have the same shapes at
every step, so one compiled graph serves all.

Source: Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control" (arXiv
2208.01626), algorithm 1, and google/prompt-to-prompt, whose slips `compat="google"` reproduces: see
`PromptToPrompt`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .. import expect
from ..models.attention import AttentionEdit
from ..pipeline import denoise_shown, make_sampler
from ..sampling.guidance import cfg
from .alignment import find_word, missing_word, token_map
from .local_blend import LocalBlend
from .maps import Maps
from .sites import coarsest, select_sites

Interval = (
    float | tuple[float, float]
)  # a fraction of the steps, from the first on, or (start, end) fractions


class PromptToPrompt:
    """Edits that make target prompts follow the source's layout: cfg(unet, uncond, cond,
    edits=PromptToPrompt(...)).

    The conditional rows are [source, *targets]; the source's is never changed. Each argument holds
    for all targets, or is a LIST with one entry per target, which makes sweeps: cross_steps=[0.0,
    0.5, 1.0] for three equal targets.

    steps        length of the sampler's schedule
    cross_steps  when cross-attention maps are the source's: a fraction of the steps, a (start, end)
    interval of
                 fractions, or one of these for each word of the target, {"default": 0.8, "square":
                 (0, 0.2)} (without "default": 1.0). Step s is in (start, end) if int(start * steps)
                 <= s < int(end * steps). {"default": 0, "cat": 1} keeps the object of one word and
                 lets the rest change.
    self_steps   the same for self-attention, without words
    edit         "replace" (words swapped one by one), "refine" (words added or removed), None: what the prompts suggest
    reweight     {word: factor}, scales the maps of words of the target, new ones too, while cross_steps lasts; factors
                 may be negative. Without targets it is the source prompt that is reweighted.
    cross_sites, self_sites, map_sites   where, see `select_sites`. None: all cross sites; the self sites up to the
                 coarsest resolution of the down and up blocks; for `maps` the cross sites of that
                 resolution
    height, width   of the picture in pixels, if not the model's own
    compat       "google": the published code's token maps (see alignment.py), and its cross_steps, which count
                 int(fraction * (steps + 1)) because its sampler calls the UNet so often

    ValueError: a word that is in no target (the message names those that are), steps or options
    that do not fit.
    """

    def __init__(
        self,
        sd,
        source: str,
        *targets: str,
        steps: int,
        cross_steps: Interval | dict[str, Interval] | list = 0.8,
        self_steps: Interval | list = 0.4,
        edit: str | list | None = None,
        reweight: Mapping[str, float] | list | None = None,
        cross_sites: str | int | Sequence[str | int] | None = None,
        self_sites: str | int | Sequence[str | int] | None = None,
        map_sites: str | int | Sequence[str | int] | None = None,
        height: int | None = None,
        width: int | None = None,
        compat: str | None = None,
    ):
        if compat not in (None, "google"):
            raise ValueError(f'compat is {compat!r}, expected None or "google"')
        expect.whole_number("steps", steps, 1)
        if not targets:
            if reweight is None:
                raise ValueError(
                    "expected at least one target prompt, or reweight for the source prompt itself"
                )
            targets = (source,) * (len(reweight) if isinstance(reweight, list) else 1)
        google, tokenizer, L = compat == "google", sd.tokenizer, sd.tokenizer.max_length
        rows = range(1, 1 + len(targets))
        self.sd, self.steps, self.prompts = sd, steps, [source, *targets]
        self.map_sites, self.height, self.width = map_sites, height, width

        def per_target(name, value):
            """(row, value of that target); a list has one value for each."""
            if isinstance(value, list) and len(value) != len(targets):
                raise ValueError(
                    f"{name} has {len(value)} entries, expected one for each of {len(targets)} targets"
                )
            return zip(rows, value if isinstance(value, list) else [value] * len(targets))

        def columns(row, given):
            """word -> its columns in that target; a word given for all targets has to be in one of
            them."""
            among = self.prompts[row : row + 1] if isinstance(given, list) else targets

            def of(word):
                if not any(find_word(tokenizer, prompt, word) for prompt in among):
                    raise missing_word(word, among)
                return find_word(tokenizer, self.prompts[row], word)

            return of

        M, has_source = (
            torch.eye(L).repeat(1 + len(targets), 1, 1),
            torch.zeros(1 + len(targets), L),
        )
        for row, kind in per_target("edit", edit):
            M[row], has_source[row] = token_map(tokenizer, source, self.prompts[row], kind, google)

        on = torch.zeros(steps, 1 + len(targets), L)  # 1 where a column is edited
        for row, schedule in per_target("cross_steps", cross_steps):
            on[:, row] = cross_table(schedule, steps, L, columns(row, cross_steps), google)
        factors = torch.ones(1 + len(targets), L)
        for row, words in per_target("reweight", reweight):
            if not (words is None or isinstance(words, Mapping)):
                raise ValueError(
                    f"reweight: got {words!r}, expected {{word: factor}}, or a list of these"
                )
            for word, factor in (words or {}).items():
                expect.number(f"reweight: the factor of {word!r}", factor)
                factors[row, columns(row, reweight)(word)] = factor
        self_row = torch.arange(1 + len(targets)).repeat(steps, 1)
        for row, schedule in per_target("self_steps", self_steps):
            start, end = interval("self_steps", schedule, steps)
            self_row[start:end, row] = 0

        self.source_row = torch.zeros(1 + len(targets), dtype=torch.long, device=sd.device)  # (S,)
        self.self_row = self_row.to(sd.device)  # (steps, S)
        self.token_map = M.to(sd.device)  # (S, L, L)
        self.blend = (on * has_source).to(sd.device)  # (steps, S, L)
        self.reweight = (
            None if reweight is None else torch.where(on > 0, factors, 1.0).to(sd.device)
        )  # (steps, S, L)

        size = sd.latent_size(height, width)
        self.cross_sites = select_sites(sd.unet, "cross", cross_sites, size)
        if self_sites is None:
            self_sites = coarsest(sd.unet, size)
        self.self_sites = select_sites(sd.unet, "self", self_sites, size)
        self.check_rows()

    def check_rows(self) -> None:
        """ValueError if a step takes the map of a row that is not there; reads values, so not in
        the loop."""
        for rows in (self.source_row, self.self_row):
            AttentionEdit(rows).check_rows()

    @cached_property
    def maps(self) -> Maps:
        """The mean maps of every row, as used. They are summed from the first time on that this is
        read."""
        return Maps(
            self.sd,
            self.prompts,
            self.steps,
            self.map_sites,
            self.height,
            self.width,
            source_row=self.source_row,
        )

    def __call__(self, step) -> dict[str, AttentionEdit]:
        """{site: AttentionEdit} of one step; ValueError if the sampler has more steps than the
        tables."""
        i = step.index
        if i >= self.steps:
            raise ValueError(
                f"the sampler is at step {i}, expected a sampler of steps={self.steps}, as given here"
            )
        factors = None if self.reweight is None else self.reweight[i]
        cross = AttentionEdit(
            self.source_row, token_map=self.token_map, blend=self.blend[i], reweight=factors
        )
        edits = dict.fromkeys(self.cross_sites, cross)
        edits |= dict.fromkeys(self.self_sites, AttentionEdit(self.self_row[i]))
        if "maps" in self.__dict__:  # somebody has read them
            for site, total in self.maps.open(step).items():
                edits[site] = edits.get(site, AttentionEdit())._replace(save_mean=total)
        return edits


def stack(*edits: PromptToPrompt) -> PromptToPrompt:
    """Several edits as one, for one batch of rows [source 1, *targets 1, source 2, *targets 2,
    ...].

    They must agree in steps and sites, and have all a reweight or none. ValueError otherwise, and
    for rows that an edit does not have.
    """
    for e in edits:
        e.check_rows()
    if len({(e.steps, *e.cross_sites, *e.self_sites, e.reweight is None) for e in edits}) != 1:
        raise ValueError(
            "expected edits with the same steps and sites, and either all with reweight or none"
        )
    first_rows = [0, *torch.tensor([len(e.prompts) for e in edits]).cumsum(0).tolist()]
    whole = copy.copy(edits[0])
    whole.__dict__.pop("maps", None)
    whole.prompts = [prompt for e in edits for prompt in e.prompts]
    whole.source_row = torch.cat([e.source_row + first for e, first in zip(edits, first_rows)])
    whole.self_row = torch.cat([e.self_row + first for e, first in zip(edits, first_rows)], dim=1)
    whole.token_map = torch.cat([e.token_map for e in edits])
    whole.blend = torch.cat([e.blend for e in edits], dim=1)
    whole.reweight = (
        None if whole.reweight is None else torch.cat([e.reweight for e in edits], dim=1)
    )
    return whole


def interval(name: str, value: Interval, steps: int) -> tuple[int, int]:
    """Steps [start, end) of a fraction or a (start, end) pair of fractions: int(fraction *
    steps)."""
    try:
        start, end = value if isinstance(value, (tuple, list)) else (0, value)
        ok = 0 <= start <= end <= 1
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise ValueError(
            f"{name}: got {value!r}, expected a fraction from 0 to 1, or (start, end) with start <= end"
        )
    return int(start * steps), int(end * steps)


def cross_table(
    schedule: Interval | Mapping[str, Interval],
    steps: int,
    length: int,
    columns: Callable[[str], list[int]],
    google: bool = False,
) -> Tensor:
    """(steps, length): 1 where a token's column is edited at a step. columns: word -> its
    positions.

    A word's own schedule replaces "default" in its columns. google: fractions are of steps + 1.
    """
    words = dict(schedule) if isinstance(schedule, Mapping) else {"default": schedule}
    table = torch.zeros(steps, length)
    start, end = interval("cross_steps", words.pop("default", 1.0), steps + google)
    table[start:end] = 1
    for word, value in words.items():
        start, end = interval(f"cross_steps of {word!r}", value, steps + google)
        table[:, columns(word)] = 0
        table[start:end, columns(word)] = 1
    return table


def edit_prompt(
    sd,
    source: str,
    *targets: str,
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str = "ddim",
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    latents: Tensor | None = None,
    uncond: Tensor | Sequence[Tensor] | None = None,
    negative_prompt: str = "",
    local_blend: Sequence | Mapping | None = None,
    after: Callable[[Tensor, object], Tensor] | None = None,
    on_step: Callable[[Tensor, object], Tensor | None] | None = None,
    baseline: bool = False,
    progress: bool = True,
    **edit,
):
    """Draw the source prompt and its edits to the targets: a list of PIL images, the source first.

    edit: the arguments of `PromptToPrompt` (cross_steps, self_steps, reweight, ...). local_blend:
    the words of a `LocalBlend`, or its arguments as a dict. baseline: also draw the targets from
    the same noise without an edit; the result is then (images, the same without edits). To edit a
    real picture: latents, x_T of its inversion (1, C, h, w), one for each row (S, C, h, w); uncond,
    the unconditional embedding (1, L, D) in place of negative_prompt's, or a list with one for each
    step; after(x, step) -> x, called after each step and before the blend (SpatialReplace of the
    published code is `x[:1].expand_as(x)` in the first steps, and x after them). on_step(x, step):
    called last, with all rows of the edited run; may return new latents. ValueError for what does
    not fit.
    """
    x = sd.starting_noise(None, seed, latents, height, width)
    height, width = (side * sd.vae.factor for side in x.shape[2:])
    p2p = PromptToPrompt(sd, source, *targets, steps=steps, height=height, width=width, **edit)
    if len(x) not in (1, len(p2p.prompts)):
        raise ValueError(
            f"got {len(x)} latents, expected 1 or one for each prompt, {len(p2p.prompts)}"
        )
    x = x.expand(len(p2p.prompts), -1, -1, -1)
    # One by one: in a batch, BLAS may give equal prompts embeddings that differ in the last bits.
    cond = torch.cat([sd.encode_prompt([prompt]) for prompt in p2p.prompts])
    uncond = sd.encode_prompt([negative_prompt]) if uncond is None else uncond

    blend = None
    if local_blend is not None:
        blend = LocalBlend(
            p2p.maps, **local_blend if isinstance(local_blend, Mapping) else {"words": local_blend}
        )
    steps_after = [each for each in (after, blend, on_step) if each is not None]

    def run(edits, afters):
        def after_step(x, step):
            for each in afters:
                new = each(x, step)
                x = x if new is None else new
            return x

        plan = make_sampler(sampler, sd.schedule, steps)
        predict = cfg(sd.unet, uncond, cond, guidance, edits)
        return sd.decode(denoise_shown(x, plan, predict, after_step if afters else None, progress))

    images = run(p2p, steps_after)
    return (images, run(None, [])) if baseline else images
