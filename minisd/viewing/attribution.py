"""Attribution by zeroing: which parts of cross-attention a region of the image depends on.

Each part, one (step, site, head, token) or several taken together, has its column of the map set to
0 in a run of its own, P'[:, token] = 0 in that head, at that site, in that step. Its effect is

    inside  = mean |image without it - image| over the region,    outside = the same elsewhere

over pixels and channels, of colours from 0 to 1. Zeroing is no derivative: what two parts do
together is not the sum of what each does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..editing.blended import MaskInput, read_mask
from ..editing.sites import Where, select_sites
from ..models.attention import AttentionEdit
from ..models.sites import Edits
from ..sampling.guidance import StepEdits, cfg
from ..sampling.samplers import Step
from .images import to_tensor
from .inside import Steps, chosen_steps, of_one_image
from .visualize import contact_sheet

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

Axis = Literal["step", "site", "head", "token"]
AXES = get_args(Axis)
TOKENS: tuple[Axis, ...] = ("token",)
SHOWN = 7  # images of the parts with the greatest effect that are kept


class Effect(NamedTuple):
    """Of one part; None: all of that axis together. token: its position and text."""

    step: int | None
    site: str | None
    head: int | None
    token: tuple[int, str] | None
    inside: float
    outside: float

    @property
    def name(self) -> str:
        """As it reads in a table."""
        names = [f"step {self.step}", str(self.site), f"head {self.head}"]
        named = [n for n, x in zip(names, self[:3]) if x is not None]
        return ", ".join([*named, *([repr(self.token[1])] if self.token else [])]) or "all"


@dataclass(frozen=True, eq=False)
class Attribution:
    """effects: of every part, the greatest in the region first. image: what was drawn; without:
    the images without the first few parts, in the same order."""

    effects: list[Effect]
    image: Image.Image
    without: list[Image.Image]

    def table(self, rows: int = 10) -> str:
        """The first rows as text."""
        lines = [f"{'inside':>8} {'outside':>8}  without"]
        lines += [f"{e.inside:8.4f} {e.outside:8.4f}  {e.name}" for e in self.effects[:rows]]
        return "\n".join(lines)

    def sheet(self) -> Image.Image:
        """The image, and beside it those without the parts that matter most in the region."""
        captions = [f"without {e.name}: {e.inside:.3f}" for e in self.effects[: len(self.without)]]
        return contact_sheet([self.image, *self.without], ["", *captions])


def attribute(
    sd: "StableDiffusion",
    prompt: str,
    region: MaskInput,
    *,
    by: Collection[Axis] = TOKENS,
    sites: Where | None = None,
    steps: Steps = 25,
    of_steps: int | None = None,
    batch: int = 8,
    most: int = 500,
    **options: Any,  # Options, but for steps
) -> Attribution:
    """Draw a prompt, and once more without each part of its cross-attention.

    region: a mask of the image's size, white inside, as `blend` takes it. by: what is taken apart,
    some of "step", "site", "head" and "token" (of <bos>, the prompt's own, and <eos>); what is not,
    is zeroed together. sites: where at all, see `select_sites`. steps: when: all of so many, or
    a list of some of `of_steps` (25). batch: parts of one call. most: parts, each of which costs a
    drawing; ValueError above it, before anything is drawn. options: see `minisd.drawing.Drawing`,
    for one image.
    """
    every: dict[str, Any]
    chosen, count = chosen_steps(steps, of_steps)
    drawing = of_one_image(options, count)
    expect.whole_number("batch", batch, 1)
    x = drawing.noise(sd, 1)
    size = (x.shape[2], x.shape[3])
    inside, whole = read_mask(region), tuple(side * sd.vae.factor for side in size)
    if inside.shape != whole:
        raise ValueError(f"the region is {inside.shape}, expected the image's {whole}")
    if inside.all():
        raise ValueError("the region is the whole image, expected a part of it")
    if unknown := sorted(set(by) - set(AXES)):
        raise ValueError(f"by: got {unknown}, expected some of {AXES}")
    every = {"step": chosen, "site": select_sites(sd.unet, "cross", sites, size)}
    every |= {"head": range(max(map(sd.unet.heads, every["site"]))), "token": tokens_of(sd, prompt)}
    parts = list(product(*(every[axis] if axis in by else [None] for axis in AXES)))
    if not 0 < len(parts) <= most:
        got = f"{len(parts)} parts, each a drawing of {count} steps"
        raise ValueError(f"got {got}, expected 1 to {most}: choose steps, sites, fewer axes")
    uncond, cond = drawing.embed(sd, [prompt])

    def draw(parts: Sequence[Any]) -> list[Image.Image]:
        edits = zeroing(sd, every, parts)
        predict = cfg(sd.network, uncond, cond, drawing.guidance, edits)
        rows = x.expand(len(parts), *x.shape[1:])
        return sd.decode(drawing.denoise(rows, drawing.make_sampler(sd), predict))

    [image] = draw([None])
    found: list[tuple[Effect, Image.Image]] = []
    for start in range(0, len(parts), batch):
        some = parts[start : start + batch]
        for part, other in zip(some, draw(some)):
            found.append((effect_of(part, image, other, inside), other))
        found.sort(key=lambda pair: -pair[0].inside)
        found[SHOWN:] = [(effect, image) for effect, _ in found[SHOWN:]]  # the others' are let go
    return Attribution([e for e, _ in found], image, [i for _, i in found[:SHOWN]])


def tokens_of(sd: "StableDiffusion", prompt: str) -> list[tuple[int, str]]:
    """(position, text) of <bos>, the prompt's tokens and <eos>."""
    own = sd.tokenizer.tokenize(prompt)[: sd.tokenizer.max_length - 2]
    names = ["<bos>", *(token.removesuffix("</w>") for token in own), "<eos>"]
    return list(enumerate(names))


def zeroing(sd: "StableDiffusion", every: Any, parts: Sequence[Any]) -> StepEdits:
    """step -> edits in which row i lacks part i, None lacking nothing: tables, gated by value."""
    L, device = sd.tokenizer.max_length, sd.device
    tables: dict[tuple[int, str], Tensor] = {
        (step, site): torch.ones(
            len(parts), sd.unet.heads(site), L, dtype=torch.float32, device=device
        )
        for step, site in product(every["step"], every["site"])
    }
    whole = {
        site: torch.ones(len(parts), sd.unet.heads(site), L, dtype=torch.float32, device=device)
        for site in every["site"]
    }
    for row, part in enumerate(parts):
        if part is None:
            continue
        step, site, head, token = part
        columns = [i for i, _ in every["token"]] if token is None else [token[0]]
        heads = slice(None) if head is None else slice(head, head + 1)
        for (at, where), table in tables.items():
            if step in (None, at) and site in (None, where):
                table[row, heads, columns] = 0

    def edits(step: Step) -> Edits:
        return {
            site: AttentionEdit(reweight=tables.get((step.index, site), whole[site]))
            for site in every["site"]
        }

    return edits


def effect_of(part: Any, image: Image.Image, other: Image.Image, inside: np.ndarray) -> Effect:
    """Mean |other - image| in the region and elsewhere, of colours from 0 to 1."""
    a, b = (to_tensor([i], i.height, i.width)[0].numpy() for i in (image, other))
    apart = np.abs(a - b).mean(0) / 2
    step, site, head, token = part
    within, elsewhere = apart[inside].mean().item(), apart[~inside].mean().item()
    return Effect(step, site, head, token, within, elsewhere)
