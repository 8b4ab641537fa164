"""Does a model trained on emoji draw what its captions say? The figures in weights/README.md.

    python -m bench.emoji --model FOLDER --icons ICONS --json bench/results/cpu/emoji.json
                          [--n 100] [--sheet OUT.png]

Retrieval: of each pair of a thing and a style the model draws the caption, and the nearest of 20
drawings in that style, the pair's own and 19 others, is looked up by the cosine of
EfficientNet-Lite0 features (bench/features.py). `heldout` are pairs that training never showed,
`train` pairs that it did. Beside them, what the scorer finds where no diffusion is: `autoencoder`,
the pair's own drawing there and back, and `another style`, the same thing as another set draws it,
which is what a model would draw that learned the thing and not the style. Chance is 5 %. Whether
the style is right is asked apart: which of the sets' drawings of the thing is nearest; chance is a
third.

Style swap: prompt-to-prompt from one style to another. The layout is kept as far as the silhouettes
of source and edit are the same, |A and B| / |A or B| of the pixels that are not white; beside it
the same prompts and seed drawn without prompt-to-prompt, and the sets' own drawings of both.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import minisd
from bench import harness
from bench.features import features
from minisd.training.emoji import SETS, Drawing, read_drawings, render
from minisd.viewing.visualize import contact_sheet

SEED, AMONG, BATCH = 5001, 20, 20
NOT_WHITE = 24  # of 255: how far from white a pixel of the silhouette is


def questions(
    pairs: Sequence[Drawing], drawings: Sequence[Drawing], rng: random.Random
) -> list[list[int]]:
    """For each pair AMONG numbers of drawings in its style, its own first."""
    found = []
    for pair in pairs:
        others = [
            i for i, d in enumerate(drawings) if d.style == pair.style and d.thing != pair.thing
        ]
        found.append([drawings.index(pair), *rng.sample(others, AMONG - 1)])
    return found


def retrieved(asked: np.ndarray, known: np.ndarray, candidates: list[list[int]]) -> float:
    """The share of rows of `asked` (n, d) whose nearest candidate of `known` (m, d) is the first.

    Near by the cosine, of features less the mean of all known ones.
    """
    asked, known = (x - known.mean(0) for x in (asked, known))
    asked, known = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, known))
    right = [np.argmax(known[own] @ x) == 0 for x, own in zip(asked, candidates, strict=True)]
    return float(np.mean(right))


def generate(sd, captions: Sequence[str], **options) -> list[Image.Image]:
    """One image for each caption, image i with seed i."""
    images = []
    for i in tqdm(range(0, len(captions), BATCH), desc="drawing", file=sys.stderr):
        images += sd.txt2img(captions[i : i + BATCH], seed=i, progress=False, **options)
    return images


def silhouette(image: Image.Image) -> np.ndarray:
    """(H, W) bool: the pixels that are not white."""
    return (255 - np.asarray(image.convert("RGB"), int)).max(-1) > NOT_WHITE


def overlap(a: Image.Image, b: Image.Image) -> float:
    """|A and B| / |A or B| of two silhouettes; 1 where both are empty."""
    a, b = silhouette(a), silhouette(b)
    return float((a & b).sum() / max((a | b).sum(), 1)) if (a | b).any() else 1.0


def retrieval(sd, drawings: Sequence[Drawing], n: int, how: dict) -> tuple[dict, list, list]:
    """{split: {"pairs": how many, "right", "style": shares}}, and the pairs of held-out captions
    and their images."""
    size = sd.unet.config.sample_size * sd.vae.factor
    real = [render(each, size) for each in drawings]
    known = features(real, len(real), "drawings")
    rng, found, kept = random.Random(SEED), {}, []
    for split in ("heldout", "train"):
        pairs = [each for each in drawings if each.split == split]
        pairs = rng.sample(pairs, min(n, len(pairs)))
        candidates = questions(pairs, drawings, rng)
        images = generate(sd, [pair.caption for pair in pairs], **how)
        own = [candidate[0] for candidate in candidates]
        tallies = {split: features(images, len(images), split)}
        if split == "heldout":
            kept = [pairs, images]
            decoded = [sd.decode(sd.encode_image(real[i]))[0] for i in own]
            tallies["autoencoder"] = features(decoded, len(decoded), "decoded")
            tallies["another style"] = known[[another(i) for i in own]]
        for name, asked in tallies.items():
            found[name] = {
                "pairs": len(pairs),
                "right": retrieved(asked, known, candidates),
                "style": retrieved(
                    asked, known, [[i, another(i), another(another(i))] for i in own]
                ),
            }
    return found, *kept


def another(i: int) -> int:
    """The number of the same thing in the next style: its styles stand side by side."""
    styles = len(SETS)
    return i // styles * styles + (i + 1) % styles


def swaps(sd, drawings: Sequence[Drawing], n: int, steps: int, guidance: float) -> dict:
    """The mean overlap of source and edit, with prompt-to-prompt and without, and in the sets."""
    rng, found = random.Random(SEED + 1), {"edited": [], "baseline": [], "drawings": []}
    size = sd.unet.config.sample_size * sd.vae.factor
    how = {"steps": steps, "guidance": guidance, "progress": False}
    for i, source in enumerate(tqdm(rng.sample(drawings, n), desc="style swap", file=sys.stderr)):
        target = drawings[another(drawings.index(source))]
        pair = source.caption, target.caption
        edited = minisd.edit_prompt(sd, *pair, seed=i, **how)
        baseline = minisd.seed_baseline(sd, *pair, seed=i, **how)
        found["edited"].append(overlap(*edited))
        found["baseline"].append(overlap(*baseline))
        found["drawings"].append(overlap(render(source, size), render(target, size)))
    return {"pairs": n} | {name: float(np.mean(values)) for name, values in found.items()}


def table(record: dict) -> str:
    """The shares, and below them the overlaps, as Markdown tables."""
    rows = [
        (name, f"{100 * own['right']:.1f} % of {own['pairs']}", f"{100 * own['style']:.1f} %")
        for name, own in record["retrieval"].items()
    ]
    parts = [harness.markdown(("drawn from", "right among 20", "style of 3"), rows)]
    if overlaps := dict(record.get("overlap", {})):
        head = f"{overlaps.pop('pairs')} style swaps: silhouettes of"
        names = {
            "edited": "source and edit, prompt-to-prompt",
            "baseline": "the same noise, no prompt-to-prompt",
            "drawings": "the sets' own drawings",
        }
        rows = [(names[name], f"{value:.2f}") for name, value in overlaps.items()]
        parts.append(harness.markdown((head, "overlap"), rows))
    return "\n\n".join(parts)


def report(record: dict) -> str:
    """The tables of a result file and where they come from."""
    return f"{harness.origin(record)}\n\n{table(record)}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.emoji", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", required=True, help="the folder that the training wrote")
    add("--icons", type=Path, required=True, help="the folder of npm install")
    add("--n", type=int, default=100, help="pairs of each kind, at most (default: 100)")
    add("--swaps", type=int, default=20, help="style swaps (default: 20)")
    add("--steps", type=int, default=25, help="DPM-Solver++ steps (default: 25)")
    add("--guidance", type=float, default=3.0, help="guidance scale (default: 3)")
    add("--json", type=Path, help="write all figures here")
    add("--sheet", type=Path, help="write a contact sheet of the held-out captions here (PNG)")
    args = parser.parse_args(arguments)

    started, sd = time.time(), minisd.load(args.model)
    torch.set_grad_enabled(False)
    drawings = read_drawings(args.icons)
    how = {"steps": args.steps, "guidance": args.guidance, "sampler": "dpm++"}
    found, pairs, images = retrieval(sd, drawings, args.n, how)
    record = {"retrieval": found}
    if args.swaps:
        record["overlap"] = swaps(sd, drawings, args.swaps, args.steps, args.guidance)
    print(table(record))
    if args.sheet:
        contact_sheet(images[:64], [pair.caption for pair in pairs[:64]], 8).save(args.sheet)
    if args.json:
        about = harness.provenance(str(sd.device)) | {"seconds": round(time.time() - started, 1)}
        harness.write(args.json, about | how | {"n": args.n, "seed": SEED} | record)


if __name__ == "__main__":
    main()
