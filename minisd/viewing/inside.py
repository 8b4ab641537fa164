"""Looking inside: what a run's maps and features were, and a run with those of another in place.

    capture    draw a prompt and keep what is at chosen sites in chosen steps
    patch      draw a prompt with some of it put in

One image and its conditional row. Self-attention is kept as q and k, from which its map is computed
when it is asked for; all is on the CPU, in the model's dtype. The size is worked out first.

Sources: Hertz et al. 2022 (arXiv 2208.01626) for maps of words; activation patching, Meng et al.
2022 (arXiv 2202.05262).
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options
from ..editing.alignment import find_word, missing_word
from ..editing.sites import Where, select_sites
from ..models.attention import AttentionEdit
from ..models.features import FeatureEdit
from ..models.sites import Edits, SiteKind
from ..models.tokenizer import CLIPTokenizer
from ..sampling.guidance import cfg
from ..sampling.samplers import Step
from .visualize import overlay

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

GB = 1e9
ALL: tuple[SiteKind, ...] = ("cross", "self", "feature")
Key = tuple[int, str]  # step, site
Steps = int | Collection[int]  # so many, or which


@dataclass(frozen=True, eq=False)
class Capture(Mapping[Key, Tensor]):
    """{(step, site): tensor} of one run, without the dimension of the batch, see `UNet.shape`.

    image: what was drawn. t: step -> its timestep. kinds, grids: site -> its kind, (h, w).
    """

    prompt: str
    tokenizer: CLIPTokenizer
    kinds: Mapping[str, str]
    grids: Mapping[str, tuple[int, int]]
    kept: dict[Key, tuple[Tensor, ...]] = field(default_factory=dict)
    t: dict[int, int] = field(default_factory=dict)
    image: Image.Image | None = None

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self.kept:
            steps, sites = sorted(self.t), list(self.kinds)
            raise KeyError(f"{key!r:.200} was not captured: steps {steps}, sites {sites}")
        q, *k = self.kept[key]
        return torch.softmax(q.float() @ k[0].float().mT * q.shape[-1] ** -0.5, -1) if k else q

    def __iter__(self) -> Iterator[Key]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def word(self, word: str, step: int | None = None, site: str | None = None) -> Tensor:
        """The map (h, w) of a word: the mean over its tokens, heads, and the steps and sites.

        step, site: None, all that were captured; sites of several grids on the finest, bilinear.
        ValueError for a word that is not in the prompt; KeyError where nothing was captured.
        """
        columns = find_word(self.tokenizer, self.prompt, word)
        if not columns:
            raise missing_word(self.tokenizer, word, [self.prompt])
        keys = [
            key
            for key in self
            if self.kinds[key[1]] == "cross" and step in (None, key[0]) and site in (None, key[1])
        ]
        if not keys:
            raise KeyError(f"no cross-attention was captured at step {step}, site {site}")
        finest = max(self.grids[site] for _, site in keys)
        maps = []
        for key in keys:
            mean = self[key][:, :, columns].float().mean((0, 2)).unflatten(0, self.grids[key[1]])
            maps.append(F.interpolate(mean[None, None], finest, mode="bilinear")[0, 0])
        return torch.stack(maps).mean(0)

    def plot(
        self, step: int, site: str, word: str | None = None, at: tuple[int, int] | None = None
    ) -> Image.Image:
        """The image, grey, under what was there: of cross-attention the map of a word, of self-
        attention that of the position `at` (row, column) of its grid, of a feature its size.

        The mean over heads; the size of a feature is the root of the mean square over channels.
        """
        x, kind, grid = self[step, site].float(), self.kinds[site], self.grids[site]
        if self.image is None:
            raise ValueError("the run has no image yet, expected one that has ended")
        if kind == "cross":
            if word is None:
                raise ValueError(f"{site} is cross-attention: expected a word whose map is shown")
            return overlay(self.image, self.word(word, step, site))
        if kind == "self":
            if at is None or not (0 <= at[0] < grid[0] and 0 <= at[1] < grid[1]):
                got = f"at is {at}"
                raise ValueError(f"{got}, expected a (row, column) of the {grid} grid of {site}")
            return overlay(self.image, x.mean(0)[at[0] * grid[1] + at[1]].unflatten(0, grid))
        if x.ndim == 3 and kind in ("q", "k", "v"):
            x = x.transpose(0, 1).flatten(1)  # (H, N, D) -> (N, H D)
        x = x.T if x.ndim == 2 else x.flatten(1)  # (C, N)
        if x.shape[1] != math.prod(grid):
            raise ValueError(f"{site} belongs to the text's tokens, which are in no place")
        return overlay(self.image, x.square().mean(0).sqrt().unflatten(0, grid))


def capture(
    sd: "StableDiffusion",
    prompt: str,
    *,
    sites: Where | None = None,
    steps: Steps = 25,
    of_steps: int | None = None,
    kinds: Sequence[SiteKind] = ALL,
    limit: float = 4 * GB,
    **options: Any,  # Options, but for steps
) -> Capture:
    """Draw a prompt and keep what is at the sites in the steps.

    sites: of those kinds, see `select_sites`; None, all. steps: how many are run, of which all are
    kept, or a list of those that are kept, of `of_steps` (25). kinds: "cross", "self" or kinds of
    features (`UNet.sites`). limit: bytes that it may take: MemoryError above it, before anything is
    drawn. options: see `minisd.drawing.Drawing`, for one image.
    """
    chosen, count = chosen_steps(steps, of_steps)
    drawing = of_one_image(options, count)
    plan, x = drawing.make_sampler(sd), drawing.noise(sd, 1)
    size = (x.shape[2], x.shape[3])
    names = select_sites(sd.unet, kinds, sites, size)
    buffers = {name: empty_buffers(sd, name, size) for name in names}
    each = sum(b.numel() * b.element_size() for pair in buffers.values() for b in pair)
    if (takes := len(chosen) * each) > limit:
        got = f"{len(names)} sites in {len(chosen)} steps take {takes / GB:.3g} GB"
        hint = "choose sites, steps or kinds, or raise the limit"
        raise MemoryError(f"{got}, the limit is {limit / GB:.3g} GB: {hint}")
    kind_of = {name: sd.unet.place(name).kind for name in names}
    grids = {name: sd.unet.grid(name, size) for name in names}
    kept: dict[Key, tuple[Tensor, ...]] = {}
    t: dict[int, int] = {}

    def edits(step: Step) -> Edits:
        return saving(buffers, kind_of) if step.index in chosen else {}

    def store(x: Tensor, step: Step) -> Tensor:
        if step.index in chosen:
            t[step.index] = step.t
            for name, pair in buffers.items():
                kept[step.index, name] = tuple(b[0].to("cpu", copy=True) for b in pair)
        return x

    predict = cfg(sd.network, *drawing.embed(sd, [prompt]), drawing.guidance, edits)
    [image] = sd.decode(drawing.denoise(x, plan, predict, store))
    return Capture(prompt, sd.tokenizer, kind_of, grids, kept, t, image)


def of_one_image(options: Any, steps: int) -> Drawing:
    """The drawing of these options, which say neither num_images nor rule."""
    given = Drawing.of(cast(Options, options), without=("num_images", "rule"))
    return replace(given, steps=steps)


def chosen_steps(steps: Steps, of_steps: int | None) -> tuple[list[int], int]:
    """(which steps, of how many), counted from 0, of a number (all of so many) or a list of some of
    `of_steps` (None: of 25)."""
    if isinstance(steps, Integral) and not isinstance(steps, bool):
        if of_steps is not None:
            got = f"of_steps={of_steps!r:.80} has no effect on all of {steps} steps"
            raise ValueError(f"{got}: it goes with a list of some")
        return list(range(int(steps))), int(steps)
    of_steps = 25 if of_steps is None else of_steps
    expect.whole_number("of_steps", of_steps, 1)
    listed: Any = sorted(set(steps)) if isinstance(steps, Iterable) else [None]
    for step in listed or [None]:
        expect.whole_number("one of steps", step, 0, of_steps - 1)
    return listed, of_steps


def empty_buffers(sd: "StableDiffusion", site: str, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """What the network writes at a site in one step: a tensor, or q and k of self-attention."""
    shapes = [sd.unet.shape(site, size, sd.tokenizer.max_length)]
    if sd.unet.place(site).kind == "self":
        shapes = [sd.unet.shape(f"{site}.{part}", size) for part in "qk"]
    return tuple(torch.empty(1, *shape, dtype=sd.dtype, device=sd.device) for shape in shapes)


def saving(buffers: Mapping[str, tuple[Tensor, ...]], kinds: Mapping[str, str]) -> Edits:
    """The edits that write to these buffers."""
    made: dict[str, Any] = {
        "cross": lambda pair: AttentionEdit(save=pair[0]),
        "self": lambda pair: AttentionEdit(save_qk=pair),
    }
    feature = lambda pair: FeatureEdit(save=pair[0])
    return {name: made.get(kinds[name], feature)(pair) for name, pair in buffers.items()}


def patch(
    sd: "StableDiffusion",
    prompt: str,
    captured: Capture,
    keys: Collection[Key] | None = None,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw a prompt; where (step, site) is one of the keys, with what was captured there in place.

    It is put into the conditional rows. keys: None, all that was captured. options: as in
    `capture`; steps and sampler have to be the same. ValueError for a key that was not captured, or
    another step.
    """
    drawing = Drawing.of(options, without=("rule",))
    x = drawing.noise(sd, drawing.num_images)
    keys = list(captured if keys is None else keys)
    if unknown := [key for key in keys if key not in captured.kept]:
        raise ValueError(f"{unknown[0]} was not captured, expected keys of it")
    plan = drawing.make_sampler(sd)
    times = {step.index: step.t for step in plan}
    for index in {step for step, _ in keys}:
        if times.get(index) != captured.t[index]:
            got = f"step {index} is at timestep {times.get(index)}"
            raise ValueError(f"{got}, expected {captured.t[index]} as in the captured run")
    size = (x.shape[2], x.shape[3])
    for site in {site for _, site in keys}:
        if sd.unet.grid(site, size) != captured.grids[site]:
            got = f"{site} has the grid {sd.unet.grid(site, size)}"
            raise ValueError(f"{got}, the captured run had {captured.grids[site]}")

    def edits(step: Step) -> Edits:
        at = [site for index, site in keys if index == step.index]
        return {site: injecting(captured, (step.index, site), x) for site in at}

    predict = cfg(sd.network, *drawing.embed(sd, [prompt]), drawing.guidance, edits)
    return sd.decode(drawing.denoise(x, plan, predict))


def injecting(captured: Capture, key: Key, x: Tensor) -> AttentionEdit | FeatureEdit:
    """The edit that puts in what was captured, in all rows of latents x."""
    kind = captured.kinds[key[1]]
    first, *rest = (y.to(x).expand(len(x), *y.shape) for y in captured.kept[key])
    if kind == "self":
        return AttentionEdit(inject_qk=(first, rest[0]))
    return AttentionEdit(inject=first) if kind == "cross" else FeatureEdit(inject=first)
