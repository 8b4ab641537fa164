"""Does prompt-to-prompt edit? Held-out pairs of captions on the bundled model, scored by pixels.

    python -m bench.editing [--n 100] [--json bench/results/cpu/editing.json]
    python -m bench.editing real ...     inversion, blended diffusion, concept erasure, on images
    python -m bench.editing speed ...    what edits cost

Four kinds of edit of one of two objects: its colour or shape is swapped, a texture is added, the
colour's word is weighted below zero. Pairs of captions that training never saw; from one noise, in
one batch: the source, the edit, and the seed-only baseline, which is the target caption (of the
reweighted word: the caption without it) without an edit. Against the source:

    right   the edited object, told from the other by its colour (where that changes: by its shape),
            has its new value (of the reweighted word: any but the old one)
    IoU     intersection over union of an object's mask and the edited image's object that covers it
            best: of the other object, which must stay as it is, and of the edited one (its place; a
            shape swap changes it)
    PSNR    of all pixels but the edited object's in either image, and those within MARGIN of them

The model does not draw every caption as it says. So there are figures of all pairs, and of those
whose source is drawn right in every attribute (bench.scorer): an edit keeps what the source shows,
its mistakes too.
"""

import argparse
import hashlib
import importlib
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import minisd
from bench import harness, metrics
from bench.scorer import judge, read
from minisd.checkpoints.sources import bundled
from minisd.editing.local_blend import LocalBlend
from minisd.editing.maps import Maps
from minisd.editing.prompt_to_prompt import PromptToPrompt, stack
from minisd.models.attention import AttentionEdit
from minisd.training import scenes
from minisd.viewing.visualize import contact_sheet

STEPS, GUIDANCE = 12, 7.5
METHODS = ("prompt-to-prompt", "seed-only baseline")
BATCH = 8  # pairs at once, of 3 images each
MARGIN = 3  # pixels around an object that are not background
SEED = 2001  # of the pairs that are measured; the settings in KINDS were chosen on others,
TUNING, TRIED = 3001, 8  # the first TRIED of this seed
PARTS = ("real", "speed")  # bench/editing_real.py: given images; editing_speed.py: time and memory


@dataclass(frozen=True)
class Kind:
    """One kind of edit. change(thing, rng) -> the edited thing, or None if this thing cannot be
    edited so.

    attribute: what changes, to None where any other value will do. told_by: the attribute that
    tells the edited object from the other, before and after. options(old, new): the arguments of
    PromptToPrompt; with `reweight` among them the target prompt is the source's.
    """

    attribute: str
    told_by: str
    change: Callable
    options: Callable


def other(values, value, rng):
    return rng.choice([v for v in values if v != value])


def textured(thing):
    return thing.texture != "plain"


KINDS = {
    "colour swap": Kind(
        "colour",
        "shape",
        lambda thing, rng: replace(thing, colour=other(scenes.COLOURS, thing.colour, rng)),
        lambda old, new: {"cross_steps": {"default": 0.8, new.colour: 0.2}, "self_steps": 0.4},
    ),
    "shape swap": Kind(
        "shape",
        "colour",
        lambda thing, rng: replace(thing, shape=other(scenes.SHAPES, thing.shape, rng)),
        lambda old, new: {"cross_steps": {"default": 0.8, new.shape: 0.0}, "self_steps": 0.0},
    ),
    "added texture": Kind(
        "texture",
        "colour",
        lambda thing, rng: (
            None
            if textured(thing)
            else replace(thing, texture=other(scenes.TEXTURES, "plain", rng))
        ),
        lambda old, new: {"cross_steps": 0.8, "self_steps": 0.4},
    ),
    "reweighted word": Kind(
        "colour",
        "shape",
        lambda thing, rng: replace(thing, colour=None),
        lambda old, new: {
            "reweight": {old.colour: -1.0},
            "cross_steps": (0.2, 1.0),
            "self_steps": 0.4,
        },
    ),
}
THRESHOLD = 0.5  # of the local blend


@dataclass(frozen=True)
class Pair:
    """A source caption, the caption of what is wanted, which of the two things is edited, and the
    noise's seed."""

    kind: str
    source: scenes.Description
    target: scenes.Description
    edited: int
    seed: int


def candidates(kind: str, seed: int = SEED):
    """Pairs of held-out captions with two things that differ in shape and colour before and after,
    without end."""
    rng = random.Random(f"{seed} {kind}")
    while True:
        source = scenes.describe(rng)
        if len(source.things) != 2 or scenes.split(source) != "heldout":
            continue
        edited = rng.randrange(2)
        for _ in range(50):  # most targets are training captions
            thing = KINDS[kind].change(source.things[edited], rng)
            things = list(source.things)
            things[edited] = thing
            if thing is None:
                break
            target = replace(source, things=tuple(things))
            both = source.things, target.things
            distinct = all(a.shape != b.shape and a.colour != b.colour for a, b in both)
            unnamed = thing.colour is None  # which is not in the grammar
            if distinct and (unnamed or scenes.split(target) == "heldout"):
                seed += 1
                yield Pair(kind, source, target, edited, seed)
                break


def measured(kind: str):
    """The candidates, less those with the captions that the settings were tried on."""
    some = itertools.islice(candidates(kind, TUNING), TRIED)
    tried = {(pair.source, pair.target) for pair in some}
    return (pair for pair in candidates(kind) if (pair.source, pair.target) not in tried)


def prompt_to_prompt(sd, pair: Pair, steps: int) -> PromptToPrompt:
    """Rows: source, edit, target without an edit."""
    old, new = pair.source.things[pair.edited], pair.target.things[pair.edited]
    options = KINDS[pair.kind].options(old, new)
    edited = pair.source if "reweight" in options else pair.target
    each = {n: [value, 0 if n.endswith("_steps") else None] for n, value in options.items()}
    return PromptToPrompt(sd, str(pair.source), str(edited), str(pair.target), steps=steps, **each)


def blend_words(pair: Pair) -> list[tuple[str, ...]]:
    """For each row the words that name the edited thing; none for the row without an edit."""
    old, new = pair.source.things[pair.edited], pair.target.things[pair.edited]
    edited = old if "reweight" in KINDS[pair.kind].options(old, new) else new
    return [(old.colour, old.shape), (edited.colour, edited.shape), ()]


def draw(sd, pairs: list[Pair], steps: int = STEPS):
    """The three images of each pair, pairs of one kind: [source, edit, baseline]."""
    p2p = stack(*(prompt_to_prompt(sd, pair, steps) for pair in pairs))
    maps = Maps(sd, p2p.prompts, steps, source_row=p2p.source_row)
    words = [words for pair in pairs for words in blend_words(pair)]
    blend = LocalBlend(maps, words, threshold=THRESHOLD)
    cond, uncond = sd.encode_prompt(p2p.prompts), sd.encode_prompt([""])
    x = sd.noise([pair.seed for pair in pairs]).repeat_interleave(3, dim=0)

    def edits(step):
        found = p2p(step)
        for site, total in maps.open(step).items():
            found[site] = found.get(site, AttentionEdit())._replace(save_mean=total)
        return found

    def after(x, step):
        blended = x.clone()
        blended[1::3] = blend(x, step)[1::3]
        return blended

    predict = minisd.cfg(sd.network, uncond, cond, GUIDANCE, edits)
    images = sd.decode(minisd.denoise(x, minisd.DDIM(sd.schedule, steps), predict, after))
    return [images[i : i + 3] for i in range(0, len(images), 3)]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask and all pixels at most `by` steps away."""
    for _ in range(by):
        m = np.pad(mask, 1)
        mask = m[1:-1, 1:-1] | m[2:, 1:-1] | m[:-2, 1:-1] | m[1:-1, 2:] | m[1:-1, :-2]
    return mask


def alike(reading, thing, *attributes):
    """The objects of an image that have these attributes of a thing."""
    return [
        found
        for found in reading.objects
        if all(getattr(found, a) == getattr(thing, a) for a in attributes)
    ]


def covered(found: list, reading) -> float | None:
    """IoU of the first object found in the source and the object of an edited image that covers
    it best."""
    return (
        round(max((iou(found[0].mask, o.mask) for o in reading.objects), default=0.0), 4)
        if found
        else None
    )


def measure(pair: Pair, source, image) -> dict[str, float]:
    """The figures of an edited image against its source; None: the source has no such object to
    compare with."""
    kind, before, after = KINDS[pair.kind], read(source), read(image)
    old, rest = pair.source.things[pair.edited], pair.source.things[1 - pair.edited]
    new = pair.target.things[pair.edited]
    was = alike(before, old, "colour", "shape") or alike(before, old, kind.told_by)
    now = alike(after, new, kind.told_by)
    value, values = getattr(new, kind.attribute), [getattr(found, kind.attribute) for found in now]
    a, b = metrics.values(source), metrics.values(image)
    elsewhere = ~grown(
        np.any([np.zeros(a.shape[:2], bool), *(o.mask for o in was + now)], axis=0), MARGIN
    )
    return {
        "right": value in values
        if value
        else any(v != getattr(old, kind.attribute) for v in values),
        "other_iou": covered(
            alike(before, rest, "colour", "shape") or alike(before, rest, "colour"), after
        ),
        "edited_iou": covered(was, after),
        "psnr": round(metrics.psnr(a[elsewhere], b[elsewhere]), 2) if elsewhere.any() else None,
    }


def score(pair: Pair, images) -> dict:
    """The figures of one pair, as they stand in the JSON."""
    said = {
        "source": str(pair.source),
        "target": str(pair.target),
        "edited": pair.edited,
        "seed": pair.seed,
    }
    scores = {
        method: measure(pair, images[0], image)
        for method, image in zip(METHODS, images[1:], strict=True)
    }
    return {
        "kind": pair.kind,
        **said,
        "source_right": judge(read(images[0]), pair.source)["all"],
        **scores,
    }


def run(sd, kind: str, n: int, steps: int) -> list[dict]:
    """The scores of pair after pair, until n have a source that is right."""
    stream, rows = measured(kind), []
    with tqdm(total=n, desc=kind, file=sys.stderr) as bar:
        while bar.n < n:
            pairs = [next(stream) for _ in range(BATCH)]
            for pair, images in zip(pairs, draw(sd, pairs, steps)):
                if bar.n < n:
                    rows.append(score(pair, images))
                    bar.update(rows[-1]["source_right"])
    return rows


def summary(pairs: list[dict], method: str) -> dict[str, float]:
    """Means over the pairs that have the figure."""
    scores = [pair[method] for pair in pairs]
    return {
        name: float(np.mean([s[name] for s in scores if s[name] is not None])) for name in scores[0]
    }


def table(record: dict) -> str:
    """A row for each kind and method, in brackets the same over all pairs."""
    lines = []
    for kind, pairs in record["prompt_to_prompt"].items():
        chosen = [pair for pair in pairs if pair["source_right"]]
        for method in METHODS:
            s, whole = summary(chosen, method), summary(pairs, method)
            right, everywhere = (f"{100 * each['right']:.0f} % of" for each in (s, whole))
            cells = [f"{right} {len(chosen)} ({everywhere} {len(pairs)})"]
            cells += [f"{s[key]:.2f} ({whole[key]:.2f})" for key in ("other_iou", "edited_iou")]
            lines.append((kind, method, *cells, f"{s['psnr']:.1f} dB ({whole['psnr']:.1f})"))
    ious = "IoU of the other object", "IoU of the edited object"
    return harness.markdown(("edit", "", "attribute right", *ious, "PSNR elsewhere"), lines)


def sheet(sd, rows: dict[str, list[dict]], steps: int, each: int = 2):
    """Of each kind the first pairs whose source is right, as source, baseline and edit."""
    shown, captions = [], []
    for kind, scores in rows.items():
        pairs = [pair for pair, row in zip(measured(kind), scores) if row["source_right"]][:each]
        for pair, (source, edit, baseline) in zip(pairs, draw(sd, pairs, steps)):
            shown += [source, baseline, edit]
            captions += [str(pair.source), f"without edit: {pair.target}", f"edit: {kind}"]
    return contact_sheet(shown, captions, columns=3 * each)


def fingerprint(model: str) -> str:
    """SHA-256 of the model's UNet."""
    (weights,) = Path(bundled().get(model, model)).glob("unet/*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in PARTS:  # the other parts have their own files and options
        return importlib.import_module(f"bench.editing_{arguments[0]}").main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m bench.editing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="shapes", help="a bundled model or a checkpoint folder")
    add("--n", type=int, default=100, help="pairs of each kind whose source is right (100)")
    add("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="default: all")
    add("--steps", type=int, default=STEPS, help=f"DDIM steps (default: {STEPS})")
    add("--json", type=Path, help="write all figures here")
    add("--sheet", type=Path, help="write a contact sheet here (PNG)")
    args = parser.parse_args(arguments)

    sd = minisd.load(args.model, device="cpu")
    rows = {kind: run(sd, kind, args.n, args.steps) for kind in args.kinds}
    settings = {"sampler": "ddim", "steps": args.steps, "guidance": GUIDANCE, "n": args.n}
    settings |= {"threshold": THRESHOLD, "seed": SEED, "unet_sha256": fingerprint(args.model)}
    settings |= {"dtype": str(sd.dtype), "attention": sd.unet.attention}
    record = {**harness.provenance("cpu"), **settings, "prompt_to_prompt": rows}
    print(table(record))
    if args.json:
        harness.write(args.json, record)
    if args.sheet:
        sheet(sd, rows, args.steps).save(args.sheet)


if __name__ == "__main__":
    main()
