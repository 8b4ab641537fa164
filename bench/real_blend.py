"""Blended diffusion and concept erasure on rendered scenes: parts of `python -m bench.editing real`.

blend   In a rendered scene one thing is to become another: the mask is its box with a margin, the prompt the caption of
        what is wanted. Outside the mask no pixel may change; inside, the thing said has to be there. Beside it the same
        captions drawn by txt2img from the same noise: what the model can do without a mask.

erase   texture      A rendered scene is redrawn after its own caption, which names a texture, at STRENGTH_TEXTURE. The
                     concept is the textured thing, at the weight w, and the same thing without texture at -w.
        background   A caption that leaves the background open is drawn from noise. The concept is the same caption on
                     the background that guidance alone had drawn; as a control, on one that it had not drawn.
        presence     pictures that show the texture, or that background, of those in which guidance alone shows it
        rest         which attributes of the caption are right; of the texture's, with the thing said to be plain

Captions are those that training never saw (scenes.split "heldout"). Settings were chosen on other scenes: TUNING.
"""

import random
import sys
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from tqdm import tqdm

import minisd
from bench.metrics import field
from bench.scorer import judge, read
from minisd import scenes
from minisd.visualize import contact_sheet

STEPS, GUIDANCE, STRENGTH = 20, 7.5, 0.95
MARGIN = 4.0  # of the mask around the thing's box, in 1/64 of the picture
STRENGTH_TEXTURE, WEIGHT = 0.8, {"texture": 7.5, "background": 4.0}
SEED, TUNING = {"blend": 3001, "erase": 3002}, 100_000  # of the scenes; TUNING is added for those the settings are from
BATCH = 10
METHODS = {"guidance": "guidance alone", "erased": "erased", "control erased": "another background erased"}
NAMES = ("colour", "shape", "size", "texture")
REST = ("count", "texture", "colour", "shape", "size", "place", "background")


@dataclass(frozen=True)
class Redraw:
    """A scene as rendered, what is wanted in it, and which of its things is to change."""

    scene: scenes.Scene
    wanted: scenes.Description
    edited: int

    @property
    def picture(self) -> Image.Image:
        return scenes.render(self.scene)

    @property
    def mask(self) -> np.ndarray:
        """(64, 64) bool: the box of the thing that is to change, with a margin."""
        box = self.scene.boxes[self.edited]
        low, high = -box.side / 2 - MARGIN, box.side / 2 + MARGIN
        across, down = (np.abs(np.arange(64) + 0.5 - centre) < high for centre in (box.x, box.y))
        return down[:, None] & across[None, :]


def redraws(n: int, seed: int) -> list[Redraw]:
    """n scenes whose captions training never saw, half of one thing, half of two, and what one thing is to become.

    The wanted caption, too, is held out. Its thing has another shape, colour and texture, and the size it had; in a
    scene of two, it differs in shape and colour from the other.
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
            wanted = replace(said, things=tuple(new if i == edited else t for i, t in enumerate(said.things)))
            distinct = number == 1 or all(
                getattr(wanted.things[0], name) != getattr(wanted.things[1], name) for name in ("shape", "colour")
            )
            if distinct and scenes.split(wanted) == "heldout":
                found.append(Redraw(scene, wanted, edited))
                break
    return found


def thing_right(image, thing: scenes.Thing) -> dict[str, bool | None]:
    """colour, shape, size, texture: right in the object that fits the thing best; all: each of them."""
    verdict = judge(read(image), scenes.Description((thing,)))
    found = {name: verdict[name] for name in NAMES}
    return found | {"all": all(value for value in found.values() if value is not None)}


def blend(sd, n: int) -> tuple[dict, Image.Image]:
    """The part `blend`: {"scenes": one dict each, ...} and a sheet of the first eight."""
    rows, shown = [], []
    for i in tqdm(range(0, n, BATCH), desc="blend", file=sys.stderr):
        cases = redraws(n, SEED["blend"])[i : i + BATCH]
        rows += (measured := blended(sd, cases, SEED["blend"] + i))[0]
        shown += list(zip(cases, *measured[1:]))[: 8 - len(shown)]
    images, captions = [], []
    for case, blend_image, plain in shown[:8]:
        images += [case.picture, Image.fromarray(case.mask).convert("RGB"), blend_image, plain]
        captions += [str(case.scene.said), "mask", f"blend: {case.wanted}", "txt2img: the same prompt and noise"]
    settings = {"steps": STEPS, "guidance": GUIDANCE, "strength": STRENGTH, "sampler": "dpm++", "seed": SEED["blend"]}
    return settings | {"scenes": rows}, contact_sheet(images, captions, 8)


def blended(sd, cases: list[Redraw], seed: int):
    """(figures of each case, pictures of blend, pictures of txt2img)."""
    prompts = [str(case.wanted) for case in cases]
    options = {"steps": STEPS, "guidance": GUIDANCE, "seed": seed, "progress": False}
    pictures, masks = [case.picture for case in cases], [case.mask for case in cases]
    images = minisd.blend(sd, pictures, masks, prompts, STRENGTH, **options)
    plain = sd.txt2img(prompts, **options)
    rows = []
    for case, picture, mask, image, drawn in zip(cases, pictures, masks, images, plain):
        changed = (np.asarray(image) != np.asarray(picture)).any(axis=-1)
        thing = case.wanted.things[case.edited]
        rows.append({
            "scene": str(case.scene.said), "prompt": str(case.wanted), "edited": case.edited,
            "changed outside": int(changed[~mask].sum()), "changed inside": int(changed[mask].sum()),
            "blend": thing_right(image, thing), "txt2img": thing_right(drawn, thing),
            "whole": {name: judge(read(i), case.wanted)["all"] for name, i in (("blend", image), ("txt2img", drawn))},
            "field": {name: value and round(value, 6) for name, value in field(picture, image, mask).items()},
        })  # fmt: skip
    return rows, images, plain


def blend_table(part: dict) -> str:
    """The part `blend` as Markdown."""
    rows = part["scenes"]
    lines = [
        "| | pixels changed outside the mask | colour | shape | size | texture | all four | whole caption |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in ("blend", "txt2img"):
        outside = str(sum(row["changed outside"] for row in rows)) if method == "blend" else "-"
        cells = [share([row[method][name] for row in rows]) for name in (*NAMES, "all")]
        cells.append(share([row["whole"][method] for row in rows]))
        lines.append(f"| {method} | {outside} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(values: list[bool | None]) -> str:
    said = [value for value in values if value is not None]
    return "-" if not said else f"{100 * sum(said) / len(said):.0f} % of {len(said)}"


# ---- erasure -------------------------------------------------------------------------------------------------------


def textured(n: int, seed: int) -> list[scenes.Scene]:
    """n scenes with a texture on one thing; half of one thing, half of two that differ in shape and colour."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        scene = scenes.sample(rng, "heldout")
        things, number = scene.said.things, 1 + len(found) % 2
        distinct = len({t.shape for t in things}) == len({t.colour for t in things}) == number == len(things)
        if distinct and scene.said.background and sum(t.texture != "plain" for t in things) == 1:
            found.append(scene)
    return found


def open_captions(n: int, seed: int) -> list[scenes.Description]:
    """n descriptions with a place and no background."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        said = scenes.sample(rng, "heldout").said
        if said.place and not said.background:
            found.append(said)
    return found


def guided(sd, said: list[scenes.Description], concepts: list[list[str]], weights, seed: int, pictures=None):
    """Pictures of the captions without the concepts (each a list, one text for each caption); all in one batch."""
    skip = 0 if pictures is None else STEPS - int(STEPS * STRENGTH_TEXTURE)
    plan, noise = minisd.DPMpp2M(sd.schedule, STEPS, skip), sd.noise(seed, len(said))
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt([str(each) for each in said])
    away = sd.encode_prompt(sum(concepts, [])).unflatten(0, (len(concepts), -1)) if concepts else None
    predict = minisd.cfg(sd.unet, uncond, cond, GUIDANCE)
    if concepts:
        predict = minisd.erase(sd.unet, uncond, cond, away, GUIDANCE, weights)
    x = noise if pictures is None else plan.start(sd.encode_image(pictures), noise)
    return sd.decode(minisd.denoise(x, plan, predict))


def erase_texture(sd, batch: list[scenes.Scene], seed: int):
    """(figures of each scene, pictures by guidance alone, pictures without the texture)."""
    pictures, said = [scenes.render(scene) for scene in batch], [scene.said for scene in batch]
    things = [next(t for t in each.things if t.texture != "plain") for each in said]
    bare = [replace(thing, texture="plain") for thing in things]
    concepts, w = [[str(t) for t in things], [str(t) for t in bare]], WEIGHT["texture"]
    alone = guided(sd, said, [], None, seed, pictures)
    without = guided(sd, said, concepts, [w, -w], seed, pictures)
    rows = []
    for each, thing, *images in zip(said, things, alone, without):
        rest = replace(each, things=tuple(replace(t, texture="plain") for t in each.things))
        rows.append({"prompt": str(each), "concept": str(thing)} | {
            name: {"present": any(o.texture == thing.texture for o in read(image).objects)} | right(image, rest)
            for name, image in zip(("guidance", "erased"), images)
        })  # fmt: skip
    return rows, alone, without


def erase_background(sd, batch: list[scenes.Description], seed: int):
    """(figures of each caption, pictures by guidance alone, pictures without the background)."""
    alone = guided(sd, batch, [], None, seed)
    drawn = [read(image).background or "white" for image in alone]
    names = list(scenes.BACKGROUNDS)
    others = [names[(names.index(name) + 1 + i % 3) % 4] for i, name in enumerate(drawn)]
    concepts = ([str(replace(d, background=b)) for d, b in zip(batch, each)] for each in (drawn, others))
    without, control = (guided(sd, batch, [texts], WEIGHT["background"], seed) for texts in concepts)
    rows = []
    for said, name, other, *images in zip(batch, drawn, others, alone, without, control):
        rows.append({"prompt": str(said), "concept": f"{name} background", "control": f"{other} background"} | {
            method: {"present": read(image).background == name} | right(image, said)
            for method, image in zip(("guidance", "erased", "control erased"), images)
        })  # fmt: skip
    return rows, alone, without


def right(image, said: scenes.Description) -> dict[str, bool | None]:
    """Which attributes of a caption are right; None where it says nothing of them."""
    verdict = judge(read(image), said)
    return {name: verdict[name] for name in REST}


def erase(sd, n: int) -> tuple[dict, Image.Image]:
    """The part `erase`: {"texture": [one dict each], "background": ..., ...} and a sheet of the first four of both."""
    record = {
        "steps": STEPS, "guidance": GUIDANCE, "sampler": "dpm++", "weights": WEIGHT, "seed": SEED["erase"],
        "strength": {"texture": STRENGTH_TEXTURE, "background": None}, "texture": [], "background": [],
    }  # fmt: skip
    images, captions = [], []
    for kind, cases, function in (
        ("texture", textured(n, SEED["erase"]), erase_texture),
        ("background", open_captions(n, SEED["erase"]), erase_background),
    ):
        for i in tqdm(range(0, n, BATCH), desc=f"erase: {kind}", file=sys.stderr):
            rows, alone, without = function(sd, cases[i : i + BATCH], SEED["erase"] + i)
            record[kind] += rows
            for row, *pair in list(zip(rows, alone, without))[: 4 if i == 0 else 0]:
                images += pair
                captions += [row["prompt"], f"without: {row['concept']}"]
    return record, contact_sheet(images, captions, 8)


def erase_table(part: dict) -> str:
    """The part `erase` as Markdown."""
    lines = [
        f"| concept | method | present | lower by | {' | '.join(REST)} |",
        "|---|---|---|---" + "|---" * len(REST) + "|",
    ]
    for kind in ("texture", "background"):
        rows = part[kind]
        before = sum(row["guidance"]["present"] for row in rows)
        for method in (name for name in ("guidance", "erased", "control erased") if name in rows[0]):
            present = sum(row[method]["present"] for row in rows)
            lower = "-" if method == "guidance" else f"{100 * (1 - present / before):.0f} %"
            cells = [share([row[method][name] for row in rows]) for name in REST]
            lines.append(f"| {kind} | {METHODS[method]} | {present} of {len(rows)} | {lower} | {' | '.join(cells)} |")
    return "\n".join(lines)
