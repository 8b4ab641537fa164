"""Does prompt-to-prompt edit? Held-out pairs of captions on the bundled model, scored from the pixels.

    python -m bench.editing [--n 100] [--json bench/results/cpu/editing.json] [--sheet PNG] [--readme README.md]
    python -m bench.editing real ...     inversion, blended diffusion and concept erasure, on pictures given
    python -m bench.editing speed ...    what edits cost

Four kinds of edit of one of two objects: its colour or shape is swapped, a texture is added, the texture's word is
weighted down. For each, n pairs of captions that training never saw, with seeds that draw the source caption right.
From one noise in one batch: the source, the edit, the edit with a local blend, and the seed-only baseline (the target
caption without an edit). Against the source:

    right       the attribute named is the target's, in both objects (bench.scorer)
    other IoU   intersection over union of the other object's mask and the object of the edited picture nearest to it
    PSNR        of the background: all pixels in neither picture's objects, with a margin of MARGIN
"""

import argparse
import importlib
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import minisd
from bench.scorer import judge, read
from minisd import scenes
from minisd.editing.local_blend import LocalBlend
from minisd.editing.prompt_to_prompt import PromptToPrompt, stack
from minisd.visualize import contact_sheet

STEPS, GUIDANCE = 25, 7.5
METHODS = ("prompt-to-prompt", "with local blend", "seed-only baseline")
BATCH = 5  # pairs at once, of 4 pictures each
MARGIN = 3  # pixels around an object that are not background
SEED = 2001
RESULTS = Path(__file__).parent / "results" / "cpu" / "editing.json"
PARTS = ("real", "speed")  # bench/editing_real.py: real pictures; bench/editing_speed.py: seconds and bytes
BEGIN, END = "<!-- prompt-to-prompt table: bench/editing.py -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Kind:
    """One kind of edit. change(thing, rng) -> the edited thing, or None if this thing cannot be edited so.

    attribute: what the scorer judges. options(old, new): the arguments of PromptToPrompt; with `reweight` among them
    the target prompt is the source prompt.
    """

    attribute: str
    change: Callable
    options: Callable = field(default=lambda old, new: {})


def other(values, value, rng):
    return rng.choice([v for v in values if v != value])


def plain(thing):
    return thing.texture == "plain"


KINDS = {
    "colour swap": Kind(
        "colour",
        lambda thing, rng: replace(thing, colour=other(scenes.COLOURS, thing.colour, rng)),
        lambda old, new: {"cross_steps": {"default": 0.8, new.colour: 0.2}, "self_steps": 0.4},
    ),
    "shape swap": Kind(
        "shape",
        lambda thing, rng: replace(thing, shape=other(scenes.SHAPES, thing.shape, rng)),
        lambda old, new: {"cross_steps": {"default": 0.4, new.shape: 0.0}, "self_steps": 0.0},
    ),
    "added texture": Kind(
        "texture",
        lambda thing, rng: replace(thing, texture=other(scenes.TEXTURES, "plain", rng)) if plain(thing) else None,
        lambda old, new: {"cross_steps": 0.8, "self_steps": 0.4},
    ),
    "reweighted word": Kind(
        "texture",
        lambda thing, rng: None if plain(thing) else replace(thing, texture="plain"),
        lambda old, new: {"reweight": {old.texture: -2.0}, "cross_steps": 1.0, "self_steps": 0.4},
    ),
}


@dataclass(frozen=True)
class Pair:
    """A source caption, the caption of what is wanted, which of the two things is edited, and the noise's seed."""

    kind: str
    source: scenes.Description
    target: scenes.Description
    edited: int
    seed: int


def candidates(kind: str):
    """Pairs of held-out captions with two things that differ in shape and colour before and after, without end."""
    rng = random.Random(f"{SEED} {kind}")
    seed = SEED
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
            distinct = all(
                a.shape != b.shape and a.colour != b.colour for a, b in (source.things, target.things)
            )
            if distinct and scenes.split(target) == "heldout":
                seed += 1
                yield Pair(kind, source, target, edited, seed)
                break


def prompt_to_prompt(sd, pair: Pair, steps: int) -> PromptToPrompt:
    """Rows: source, edit, edit (to be blended), target without an edit."""
    old, new = pair.source.things[pair.edited], pair.target.things[pair.edited]
    options = KINDS[pair.kind].options(old, new)
    target = str(pair.source if "reweight" in options else pair.target)
    targets = [target, target, str(pair.target)]
    each = {name: [value, value, 0 if name.endswith("_steps") else None] for name, value in options.items()}
    return PromptToPrompt(sd, str(pair.source), *targets, steps=steps, map_sites="16x16", **each)


def blend_words(pair: Pair) -> list[tuple[str, ...]]:
    """For each row the words that name the edited thing."""
    old, new = pair.source.things[pair.edited], pair.target.things[pair.edited]
    edited = old if "reweight" in KINDS[pair.kind].options(old, new) else new
    return [(old.colour, old.shape), *[(edited.colour, edited.shape)] * 2, (new.colour, new.shape)]


def draw(sd, pairs: list[Pair], steps: int = STEPS):
    """The four pictures of each pair: [source, edit, blended edit, baseline]."""
    p2p = stack(*(prompt_to_prompt(sd, pair, steps) for pair in pairs))
    blend = LocalBlend(p2p.maps, [words for pair in pairs for words in blend_words(pair)])
    cond, uncond = sd.encode_prompt(p2p.prompts), sd.encode_prompt([""])
    x = sd.noise([pair.seed for pair in pairs]).repeat_interleave(4, dim=0)

    def after(x, step):
        blended = x.clone()
        blended[2::4] = blend(x, step)[2::4]
        return blended

    sampler = minisd.DDIM(sd.schedule, steps)
    images = sd.decode(minisd.denoise(x, sampler, minisd.cfg(sd.unet, uncond, cond, GUIDANCE, p2p), after))
    return [images[i : i + 4] for i in range(0, len(images), 4)]


def sources(sd, pairs: list[Pair], steps: int = STEPS):
    """The pictures of the source captions alone."""
    cond, uncond = sd.encode_prompt([str(pair.source) for pair in pairs]), sd.encode_prompt([""])
    x, sampler = sd.noise([pair.seed for pair in pairs]), minisd.DDIM(sd.schedule, steps)
    return sd.decode(minisd.denoise(x, sampler, minisd.cfg(sd.unet, uncond, cond, GUIDANCE)))


def usable(sd, kind: str, n: int, steps: int = STEPS, progress: bool = True) -> tuple[list[Pair], int]:
    """The first n pairs whose source is drawn right, and how many were tried."""
    found, tried, stream = [], 0, candidates(kind)
    bar = tqdm(total=n, desc=f"{kind}: sources", file=sys.stderr, disable=not progress)
    while len(found) < n:
        pairs = [next(stream) for _ in range(4 * BATCH)]
        for pair, image in zip(pairs, sources(sd, pairs, steps)):
            if len(found) < n:
                tried += 1
                if judge(read(image), pair.source)["all"]:
                    found.append(pair)
                    bar.update()
    bar.close()
    return found, tried


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask and all pixels at most `by` steps away."""
    for _ in range(by):
        m = np.pad(mask, 1)
        mask = m[1:-1, 1:-1] | m[2:, 1:-1] | m[:-2, 1:-1] | m[1:-1, 2:] | m[1:-1, :-2]
    return mask


def measure(pair: Pair, source, image) -> dict[str, float]:
    """right, other IoU, edited IoU and background PSNR of an edited picture against its source."""
    before, after = read(source), read(image)
    thing = pair.source.things[1 - pair.edited]
    (rest,) = [o.mask for o in before.objects if (o.shape, o.colour) == (thing.shape, thing.colour)]
    (old,) = [o.mask for o in before.objects if (o.shape, o.colour) != (thing.shape, thing.colour)]
    behind = ~grown(np.any([o.mask for o in before.objects + after.objects], axis=0), MARGIN)
    difference = (np.asarray(source, float) - np.asarray(image, float))[behind] / 255
    return {
        "right": bool(judge(after, pair.target)[KINDS[pair.kind].attribute]),
        "other_iou": round(max((iou(rest, o.mask) for o in after.objects), default=0.0), 4),
        "edited_iou": round(max((iou(old, o.mask) for o in after.objects), default=0.0), 4),
        "psnr": round(float(-10 * np.log10(max(np.mean(difference**2), 1e-6))), 2) if behind.any() else None,
    }


def run(sd, kind: str, n: int, steps: int = STEPS, progress: bool = True):
    """({"tried", "pairs": [...]} of one kind, and the pictures)."""
    pairs, tried = usable(sd, kind, n, steps, progress)
    rows, pictures = [], []
    for i in tqdm(range(0, n, BATCH), desc=f"{kind}: edits", file=sys.stderr, disable=not progress):
        for pair, images in zip(pairs[i : i + BATCH], draw(sd, pairs[i : i + BATCH], steps)):
            scores = {name: measure(pair, images[0], image) for name, image in zip(METHODS, images[1:])}
            text = {"source": str(pair.source), "target": str(pair.target), "edited": pair.edited, "seed": pair.seed}
            rows.append(text | scores)
            pictures.append(images)
    return {"tried": tried, "pairs": rows}, pictures


def summary(pairs: list[dict], method: str) -> dict[str, float]:
    """Means over the pairs."""
    scores = [pair[method] for pair in pairs]
    return {name: float(np.mean([s[name] for s in scores if s[name] is not None])) for name in scores[0]}


def table(record: dict) -> str:
    """The results as a Markdown table, one row for each kind and method."""
    lines = [
        "| edit | method | attribute right | IoU of the other object | IoU of the edited object | background PSNR |",
        "|---|---|---|---|---|---|",
    ]
    for kind, result in record["prompt_to_prompt"].items():
        for method in METHODS:
            s = summary(result["pairs"], method)
            lines.append(
                f"| {kind} | {method} | {100 * s['right']:.0f} % of {len(result['pairs'])} | {s['other_iou']:.3f} | "
                f"{s['edited_iou']:.3f} | {s['psnr']:.1f} dB |"
            )
    return "\n".join(lines)


def insert(text: str, rows: str) -> str:
    """The text with the table put between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in PARTS:  # the other parts have their own files and options
        return importlib.import_module(f"bench.editing_{arguments[0]}").main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench.editing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shapes", help="a bundled model or a checkpoint folder (default: shapes)")
    parser.add_argument("--n", type=int, default=100, help="pairs of each kind (default: 100)")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="default: all")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"DDIM steps (default: {STEPS})")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--sheet", type=Path, help="write the first two pairs of each kind here (PNG)")
    parser.add_argument("--readme", type=Path, help="put the table between the markers of this file")
    args = parser.parse_args(arguments)

    started, sd, results, shown, captions = time.time(), minisd.load(args.model), {}, [], []
    for kind in args.kinds:
        results[kind], pictures = run(sd, kind, args.n, args.steps)
        for pair, images in list(zip(results[kind]["pairs"], pictures))[:2]:
            shown += images
            captions += [pair["source"], f"{kind}: {pair['target']}", METHODS[1], METHODS[2]]
    record = {
        "command": " ".join(["python -m bench.editing", *arguments]),
        "versions": {"python": platform.python_version(), "minisd": minisd.__version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": str(sd.device), "dtype": str(sd.dtype), "attention": sd.unet.attention,
        "seconds": round(time.time() - started), "sampler": "ddim", "steps": args.steps, "guidance": GUIDANCE,
        "prompt_to_prompt": results,
    }  # fmt: skip
    print(table(record))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(shown, captions, columns=8).save(args.sheet)
    if args.readme:
        args.readme.write_text(insert(args.readme.read_text(), table(record)))


if __name__ == "__main__":
    main()
