"""Blended diffusion and concept erasure on rendered scenes: parts of `python -m bench.editing
real`.

blend   In a rendered scene one thing is to become another: the mask is its box with a margin, the
        prompt the caption of what is wanted. Outside the mask no pixel may change; inside, the
        thing said has to be there. Beside it the same captions drawn by txt2img from the same
        noise: what the model can do without a mask.

erase   A rendered scene is redrawn by its own caption, which names a texture, at ERASE_STRENGTH: by
        guidance alone, and with two concepts, the textured thing at the weight w and the same thing
        without texture at -w. As a control, on the first CONTROL scenes, the same with the texture
        that is not there.
        present      images in which any object has the texture
        the rest     which attributes of the caption are right, with the thing said to be plain

Captions are those that training never saw (scenes.split "heldout"). Settings were chosen on other
scenes: TUNING.
"""

import random
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import minisd
from bench import harness
from bench.metrics import field
from bench.scorer import Reading, judge, read
from minisd.training import scenes
from minisd.viewing.visualize import contact_sheet

STEPS, GUIDANCE, STRENGTH = 16, 7.5, 0.95
MARGIN = 4.0  # of the mask around the thing's box, in 1/64 of the image
ERASE_STRENGTH, WEIGHT = 0.8, 7.5
CONTROL = 20  # scenes of the control
# of the scenes; TUNING is added for those that the settings are from
SEED, TUNING = {"blend": 3001, "erase": 3002}, 100_000
BATCH = 10
METHODS = {
    "guidance": "guidance alone",
    "erased": "erased",
    "control": "control: the other texture erased",
}
NAMES = ("colour", "shape", "size", "texture")
REST = ("count", "texture", "colour", "shape", "size", "place", "background")


@dataclass(frozen=True)
class Redraw:
    """A scene as rendered, what is wanted in it, and which of its things is to change."""

    scene: scenes.Scene
    wanted: scenes.Description
    edited: int

    @property
    def image(self) -> Image.Image:
        return scenes.render(self.scene)

    @property
    def mask(self) -> np.ndarray:
        """(64, 64) bool: the box of the thing that is to change, with a margin."""
        box = self.scene.boxes[self.edited]
        high = box.side / 2 + MARGIN
        across, down = (np.abs(np.arange(64) + 0.5 - centre) < high for centre in (box.x, box.y))
        return down[:, None] & across[None, :]


def redraws(n: int, seed: int) -> list[Redraw]:
    """n scenes whose captions training never saw, half of one thing, half of two, and what one
    thing is to become.

    The wanted caption, too, is held out. Its thing has another shape, colour and texture, and the
    size it had; in a scene of two, it differs in shape and colour from the other.
    """
    rng, found = random.Random(seed), []
    while len(found) < n:
        scene = scenes.sample(rng, "heldout")
        number = 1 + len(found) % 2
        said = scene.said
        if len(said.things) != number or said.background is None or said.place is None:
            continue
        edited = rng.randrange(number)
        old = said.things[edited]
        for _ in range(50):  # most captions belong to training
            new = replace(
                old,
                shape=rng.choice([s for s in scenes.SHAPES if s != old.shape]),
                colour=rng.choice([c for c in scenes.COLOURS if c != old.colour]),
                texture=rng.choice([t for t in scenes.TEXTURES if t != old.texture]),
            )
            wanted = replace(
                said, things=tuple(new if i == edited else t for i, t in enumerate(said.things))
            )
            distinct = number == 1 or all(
                getattr(wanted.things[0], name) != getattr(wanted.things[1], name)
                for name in ("shape", "colour")
            )
            if distinct and scenes.split(wanted) == "heldout":
                found.append(Redraw(scene, wanted, edited))
                break
    return found


def thing_right(image, thing: scenes.Thing) -> dict[str, bool | None]:
    """colour, shape, size, texture: right in the object that fits the thing best; all: each of
    them."""
    verdict = judge(read(image), scenes.Description((thing,)))
    found = {name: verdict[name] for name in NAMES}
    return found | {"all": all(value for value in found.values() if value is not None)}


def blend(sd, n: int) -> tuple[dict, Image.Image]:
    """The part `blend`: {"scenes": one dict each, ...} and a sheet of the first eight."""
    rows, shown = [], []
    for i in tqdm(range(0, n, BATCH), desc="blend", file=sys.stderr):
        cases = redraws(n, SEED["blend"])[i : i + BATCH]
        rows += (measured := blended(sd, cases, SEED["blend"] + i))[0]
        shown += zip(cases, *measured[1:])
    images, captions = [], []
    for case, blend_image, plain in shown[:8]:
        images += [case.image, Image.fromarray(case.mask).convert("RGB"), blend_image, plain]
        captions += [
            str(case.scene.said),
            "mask",
            f"blend: {case.wanted}",
            "txt2img: the same prompt and noise",
        ]
    settings = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "strength": STRENGTH,
        "sampler": "dpm++",
        "seed": SEED["blend"],
    }
    return settings | {"scenes": rows}, contact_sheet(images, captions, 8)


def blended(sd, cases: list[Redraw], seed: int):
    """(figures of each case, images of blend, images of txt2img)."""
    prompts = [str(case.wanted) for case in cases]
    options = {"steps": STEPS, "guidance": GUIDANCE, "seed": seed, "progress": False}
    given, masks = [case.image for case in cases], [case.mask for case in cases]
    images = minisd.blend(sd, given, masks, prompts, STRENGTH, **options)
    plain = sd.txt2img(prompts, **options)
    rows = []
    for case, source, mask, image, drawn in zip(cases, given, masks, images, plain):
        changed = (np.asarray(image) != np.asarray(source)).any(axis=-1)
        thing = case.wanted.things[case.edited]
        both = {"blend": image, "txt2img": drawn}
        figures = field(source, image, mask).items()
        row = {"scene": str(case.scene.said), "prompt": str(case.wanted), "edited": case.edited}
        row["changed outside"] = int(changed[~mask].sum())
        row["changed inside"] = int(changed[mask].sum())
        row |= {name: thing_right(each, thing) for name, each in both.items()}
        row["whole"] = {name: judge(read(each), case.wanted)["all"] for name, each in both.items()}
        row["field"] = {name: value and round(value, 6) for name, value in figures}
        rows.append(row)
    return rows, images, plain


def blend_table(record: dict) -> str:
    """The part `blend` as Markdown."""
    rows, lines = record["blend"]["scenes"], []
    for method in ("blend", "txt2img"):
        outside = sum(row["changed outside"] for row in rows) if method == "blend" else "-"
        cells = [share([row[method][name] for row in rows]) for name in (*NAMES, "all")]
        cells.append(share([row["whole"][method] for row in rows]))
        lines.append((method, outside, *cells))
    heads = ("", "pixels changed outside the mask", *NAMES, "all four", "whole caption")
    return harness.markdown(heads, lines)


def share(values: list[bool | None]) -> str:
    said = [value for value in values if value is not None]
    return "-" if not said else f"{100 * sum(said) / len(said):.0f} % of {len(said)}"


# ---- erasure


def textured(n: int, seed: int) -> list[scenes.Scene]:
    """n scenes with a texture on one thing; half of one thing, half of two that differ in shape and
    colour."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        scene = scenes.sample(rng, "heldout")
        things, number = scene.said.things, 1 + len(found) % 2
        distinct = (
            len({t.shape for t in things})
            == len({t.colour for t in things})
            == number
            == len(things)
        )
        if distinct and scene.said.background and sum(t.texture != "plain" for t in things) == 1:
            found.append(scene)
    return found


def guided(
    sd, drawn: list[scenes.Scene], concepts: list[list[str]], seed: int
) -> list[Image.Image]:
    """The scenes redrawn after their captions, in one batch, without concepts[0] and with
    concepts[1]; [] is cfg.

    concepts: two lists with a text for each scene.
    """
    plan = minisd.DPMpp2M(sd.schedule, STEPS, skip=STEPS - int(STEPS * ERASE_STRENGTH))
    z0 = sd.encode_image([scenes.render(scene) for scene in drawn])
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt([str(scene.said) for scene in drawn])
    predict = minisd.cfg(sd.network, uncond, cond, GUIDANCE)
    if concepts:
        both = torch.stack([sd.encode_prompt(texts) for texts in concepts])  # (2, B, L, D)
        predict = minisd.erase(sd.network, uncond, cond, both, GUIDANCE, [WEIGHT, -WEIGHT])
    return sd.decode(minisd.denoise(plan.start(z0, sd.noise(seed, len(drawn))), plan, predict))


def erased(sd, batch: list[scenes.Scene], seed: int, control: bool = True):
    """(figures of each scene, {method: images})."""
    said = [scene.said for scene in batch]
    things = [next(t for t in each.things if t.texture != "plain") for each in said]
    bare, other = (
        [str(replace(t, texture=name(t))) for t in things]
        for name in (lambda t: "plain", other_texture)
    )
    concepts = {"guidance": [], "erased": [[*map(str, things)], bare], "control": [other, bare]}
    images = {
        name: guided(sd, batch, concepts[name], seed)
        for name in list(concepts)[: 3 if control else 2]
    }
    rows = []
    for i, (each, thing) in enumerate(zip(said, things)):
        rest = replace(each, things=tuple(replace(t, texture="plain") for t in each.things))
        row = {"prompt": str(each), "concept": str(thing)}
        for name, drawn in images.items():
            reading = read(drawn[i])
            present = any(o.texture == thing.texture for o in reading.objects)
            row[name] = {"present": present} | right(reading, rest)
        rows.append(row)
    return rows, images


def other_texture(thing: scenes.Thing) -> str:
    return {"striped": "dotted", "dotted": "striped"}[thing.texture]


def right(reading: Reading, said: scenes.Description) -> dict[str, bool | None]:
    """Which attributes of a caption are right; None where it says nothing of them."""
    verdict = judge(reading, said)
    return {name: verdict[name] for name in REST}


def erase(sd, n: int) -> tuple[dict, Image.Image]:
    """The part `erase`: {"scenes": one dict each, ...} and a sheet of the first eight."""
    cases, rows, images, captions = textured(n, SEED["erase"]), [], [], []
    for i in tqdm(range(0, n, BATCH), desc="erase", file=sys.stderr):
        figures, drawn = erased(sd, cases[i : i + BATCH], SEED["erase"] + i, control=i < CONTROL)
        rows += figures
        for case, row, *pair in list(zip(cases, figures, drawn["guidance"], drawn["erased"]))[
            : 8 if i == 0 else 0
        ]:
            images += [scenes.render(case), *pair]
            captions += [row["prompt"], "redrawn by guidance alone", f"without: {row['concept']}"]
    settings = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "strength": ERASE_STRENGTH,
        "weight": WEIGHT,
        "sampler": "dpm++",
    }
    return settings | {"seed": SEED["erase"], "scenes": rows}, contact_sheet(images, captions, 6)


def erase_table(record: dict) -> str:
    """The part `erase` as Markdown."""
    lines = []
    for method, name in METHODS.items():
        rows = [row for row in record["erase"]["scenes"] if method in row]
        both = ([row[which]["present"] for row in rows] for which in ("guidance", method))
        before, present = map(sum, both)
        lower = "-" if method == "guidance" else f"{100 * (1 - present / before):.0f} %"
        cells = [share([row[method][attribute] for row in rows]) for attribute in REST]
        lines.append((name, f"{present} of {len(rows)}", lower, *cells))
    return harness.markdown(("", "present", "lower by", *REST), lines)
