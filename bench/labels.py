"""Does the bundled DiT draw its labels? Beside the UNet of `shapes`, to which they are captions.

    python -m bench.labels [--model shapes-dit|FOLDER] [--n 192] [--seed 0] [--guidance 3]
                           [--json OUT] [--only ROW ...] [--sheet OUT.png]

Labels 0, 1, ..., K - 1, 0, ... by `generate` in 25 steps of DPM-Solver++, and the same words by the
UNet in as many with guidance 7.5, image i with seed + i. right: images in which bench.scorer finds
one thing, of the label's colour, of its shape, and all three. "rendered" is what the renderer draws
of the labels, through the autoencoder and back: the ceiling. Guidance 3 was looked at beforehand
on other seeds, from 1000 on; it is not the best of several. --sheet: eight labels by both.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import minisd
from bench import harness
from bench.dit import STEPS, captions, label_sheet, right, through
from bench.shapes import hashes
from minisd.checkpoints.sources import bundled
from minisd.labels import LabelDiffusion
from minisd.training.labelled import LABELS, render_labels

BATCH = 16  # stays in a core's cache
HOW = {"steps": STEPS, "sampler": "dpm++", "progress": False}
UNET_GUIDANCE = 7.5
RENDERED = 2003  # seed of the scenes of the ceiling
ROWS = ("UNet", "shapes-dit", "rendered")
COLUMNS = ("count", "colour", "shape", "all")


def draw(model: LabelDiffusion, n: int, seed: int, guidance: float) -> list[Image.Image]:
    """Image i of label i with seed + i."""
    images, labels = [], [i % len(LABELS) for i in range(n)]
    for i in tqdm(range(0, n, BATCH), "labels", file=sys.stderr):
        own = {"seed": seed + i, "guidance": guidance}
        images += model.generate(labels[i : i + BATCH], **own, **HOW)
    return images


def draw_captions(sd, n: int, seed: int) -> list[Image.Image]:
    """Image i of label i as a caption, with seed + i."""
    images, texts = [], captions(n)
    for i in tqdm(range(0, n, BATCH), "captions", file=sys.stderr):
        own = {"seed": seed + i, "guidance": UNET_GUIDANCE}
        images += sd.txt2img(texts[i : i + BATCH], **own, **HOW)
    return images


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    rows = (
        (who, *(f"{100 * shares[name]:.1f} %" for name in COLUMNS))
        for who, shares in record["right"].items()
    )
    how = f"{record['n']} images each, {record['steps']} steps of {record['sampler']}"
    how += f", guidance {record['guidance']:g}; the UNet's {UNET_GUIDANCE:g}"
    return f"{how}\n\n{harness.markdown(('', *COLUMNS), rows)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.labels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="shapes-dit", help="a bundled DiT or a checkpoint folder")
    add("--n", type=int, default=192, help="images of each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first image (default: %(default)s)")
    add("--guidance", type=float, default=3.0, help="of the DiT (default: %(default)s)")
    add("--only", nargs="+", choices=ROWS, help="these rows anew, the others as in the JSON file")
    add("--json", type=Path, help="write all figures here")
    add("--sheet", type=Path, help="write eight labels by both here (PNG)")
    args = parser.parse_args(arguments)
    if args.n < len(LABELS):
        parser.error(f"--n is {args.n}, expected an image of each of {len(LABELS)} labels")
    own, old = {"n": args.n, "seed": args.seed}, {"right": {}}
    if args.only:
        if args.json is None:
            parser.error("--only needs --json, the file that has the other rows")
        old = json.loads(args.json.read_text("utf-8")) if args.json.exists() else old
        if differ := [name for name in own if old.get(name, own[name]) != own[name]]:
            parser.error(f"--only: {args.json} has another --{differ[0]}, {old[differ[0]]}")
    model, sd = minisd.load_dit(args.model, device="cpu"), minisd.load("shapes", device="cpu")
    sets: dict[str, Callable[[int], list[Image.Image]]] = {
        "UNet": lambda n: draw_captions(sd, n, args.seed),
        "shapes-dit": lambda n: draw(model, n, args.seed, args.guidance),
        "rendered": lambda n: through(sd, render_labels(n, RENDERED)),
    }
    shares = dict(old["right"])
    for name in args.only or ROWS:
        shares[name] = right(sets[name](args.n), captions(args.n))
    own["right"] = {name: shares[name] for name in ROWS if name in shares}
    if args.sheet:
        few = {name: sets[name](len(LABELS)) for name in ROWS[:2]}
        label_sheet(few).save(args.sheet)
    if "shapes-dit" in (args.only or ROWS):
        folder = bundled().get(args.model, Path(args.model))
        own |= {"guidance": args.guidance, "sha256": hashes(folder)}
    record = old | harness.provenance("cpu") | HOW | own
    if own["right"].keys() == set(ROWS):
        print(table(record))
    if args.json:
        harness.write(args.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
