"""Figure 6 of Peebles and Xie 2022 in miniature: how far the images of four small DiTs are from
held-out renderings, against the cost of the network.

    python -m minisd.training miniature --run RUN --to DIR
    python -m bench.dit DIR [--n 480] [--samples 100] [--only ROW ...] [--sheet OUT.png]

Each draws its labels in 25 steps of DPM-Solver++ Karras without guidance, as in the paper's figure,
from the same noises. The distance is Frechet's in EfficientNet-Lite0 features, of as many images as
renderings (bench.distance: no FID, and too large for so few images). "other renderings" have what
sets of this size have without a difference, "autoencoder" what these lose there and back. right:
images in which bench.scorer finds one thing of the label's colour and shape. GFLOPs:
multiply-adds of one call for one image. --sheet: eight labels by the UNet of `shapes`, to which
they are captions (guidance 7.5), and by each DiT with guidance 4; and how many of such images are
right. Writes bench/results/cpu/dit.json, with --only these rows of it anew, and the plot,
docs/dit.png; --plot draws it of that file.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import minisd
from bench import features, harness
from bench.distance import feature_distance
from bench.scorer import score
from minisd.labels import LabelDiffusion
from minisd.models.dit import DiT
from minisd.toy.figure import COLOURS, FINE, FONT_SIZE, Axes
from minisd.training.labelled import LABELS, render_labels
from minisd.training.recipes import MINIATURE
from minisd.viewing.visualize import contact_sheet

JSON, PLOT = harness.ROOT / "bench/results/cpu/dit.json", harness.ROOT / "docs/dit.png"
BATCH, STEPS, GUIDANCE = 48, 25, 4.0
SEEDS = {"renderings": 2001, "other renderings": 2002, "images": 0}
ROWS = ("other renderings", "autoencoder", *MINIATURE.dits)
SHOWN = (0, 1, 8, 9, 12, 17, 20, 23)  # labels on the sheet: two of each shape, all colours


def captions(n: int) -> list[str]:
    """What n images of labels 0, 1, ..., K - 1, 0, ... show: "a red circle"."""
    return [str(LABELS[i % len(LABELS)]) for i in range(n)]


def draw(model: LabelDiffusion, labels: list[int], guidance: float = 1.0) -> list[Image.Image]:
    """Image i of label i with seed i."""
    images, dit, sampler = [], model.dit, minisd.DPMpp2M(model.schedule, STEPS)
    null, channels = dit.embed_labels([dit.labels]), dit.config.in_channels
    for i in tqdm(range(0, len(labels), BATCH), "drawing", file=sys.stderr):
        cond = dit.embed_labels(labels[i : i + BATCH])
        x = model.noise(SEEDS["images"] + i, len(cond))
        predict = minisd.cfg(dit, null, cond, guidance, channels=channels)
        with torch.no_grad():
            images += model.decode(minisd.denoise(x, sampler, predict))
    return images


def right(images: list[Image.Image], texts: list[str]) -> dict[str, float]:
    """Shares of the images that have one thing, of the colour, of the shape, and all three."""
    verdicts = [score(image, text) for image, text in zip(images, texts, strict=True)]
    names = ("count", "colour", "shape", "all")
    return {name: sum(v[name] for v in verdicts) / len(verdicts) for name in names}


def gflops(dit: DiT) -> float:
    """Multiply-adds of one call, in 1e9; torch counts two for each."""
    x, context = torch.zeros(1, 4, *dit.latent_size(None)), dit.embed_labels([0])
    with FlopCounterMode(display=False) as counter:
        dit(x, torch.tensor([0]), context, attention="reference")
    return counter.get_total_flops() / 2e9


def about(dit: DiT) -> dict:
    """The numbers of a network."""
    c, (h, w) = dit.config, dit.patches()
    numbers = {"layers": c.num_layers, "width": c.width, "patch": c.patch_size, "tokens": h * w}
    return numbers | {"parameters": sum(p.numel() for p in dit.parameters()), "gflops": gflops(dit)}


def measure(
    models: dict[str, LabelDiffusion], vae, n: int, samples: int, only: Sequence[str] = ()
) -> dict[str, dict]:
    """name -> what is in its row of the table. only: of these rows; without any, of all."""
    texts, labels = captions(n), [i % len(LABELS) for i in range(n)]
    others = render_labels(n, SEEDS["other renderings"])
    sets = {"other renderings": lambda: others, "autoencoder": lambda: through(vae, others)}
    sets |= {name: lambda m=model: draw(m, labels) for name, model in models.items()}
    held_out = render_labels(n, SEEDS["renderings"])
    true = features.features(held_out, n, "renderings")
    rows = {}
    for name in only or sets:
        images = sets[name]()
        found = features.features(images, n, name)
        row = {"frechet": feature_distance(true, found, samples), "right": right(images, texts)}
        rows[name] = row | (about(models[name].dit) if name in models else {})
    return rows


def through(sd, images: list[Image.Image]) -> list[Image.Image]:
    """Through the autoencoder and back."""
    parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    return [image for some in parts for image in sd.decode(sd.encode_image(some))]


def label_sheet(sets: dict[str, list[Image.Image]]) -> Image.Image:
    """Eight labels, a row for each set of images of labels 0, 1, ..."""
    shown = [(name, k) for name in sets for k in SHOWN]
    named = [f"{name}: {LABELS[k]}" for name, k in shown]
    return contact_sheet([sets[name][k] for name, k in shown], named, 8).quantize(128)


def beside(models: dict[str, LabelDiffusion], sd, n: int, page: Path) -> dict[str, dict]:
    """The sheet of eight labels; name -> shares that are right with guidance, of n images."""
    own = {"UNet": [], **{name: [] for name in models}}
    for i in range(0, n, BATCH):
        texts = captions(n)[i : i + BATCH]
        own["UNet"] += sd.txt2img(texts, seed=i, steps=STEPS, guidance=7.5, progress=False)
    for name, model in models.items():
        own[name] = draw(model, [i % len(LABELS) for i in range(n)], GUIDANCE)
    label_sheet(own).save(page)
    return {name: right(images, captions(n)) for name, images in own.items()}


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = []
    for name, row in record["rows"].items():
        f, size = row["frechet"], ["-"] * 4
        if "gflops" in row:
            size = [
                f"{row['layers']} x {row['width']}",
                f"{row['tokens']} of {row['patch']} x {row['patch']}",
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['gflops']:.4f}",
            ]
        distance = f"{f['value']:.1f} ({f['low']:.1f} to {f['high']:.1f})"
        shares = (f"{100 * row['right'][what]:.0f} %" for what in ("colour", "all"))
        lines.append((name, *size, distance, *shares))
    heads = (
        "|layers x width|tokens|parameters|GFLOPs|Frechet distance (95 %)|colour right|all right"
    )
    steps = {row["trained_steps"] for row in record["rows"].values() if "trained_steps" in row}
    how = f"{record['n']} images each, after {' or '.join(map(str, sorted(steps)))} steps"
    return f"{harness.machine(record)}; {how}\n\n{harness.markdown(heads.split('|'), lines)}"


def guided_table(record: dict) -> str:
    """What UNet and DiTs have right with guidance."""
    names = ("count", "colour", "shape", "all")
    rows = (
        (who, *(f"{100 * r[name]:.1f} %" for name in names)) for who, r in record["guided"].items()
    )
    return harness.markdown((f"{record['guided_n']} images", *names), rows)


def plot(record: dict) -> Image.Image:
    """The distances against GFLOPs, both on logarithmic scales; a line for each size."""
    page = Image.new("RGB", (640 * FINE, 400 * FINE), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE * FINE)
    rows = {name: row for name, row in record["rows"].items() if "gflops" in row}
    floor = record["rows"]["autoencoder"]["frechet"]["value"]
    cost = [math.log10(row["gflops"]) for row in rows.values()]
    far = [math.log10(row["frechet"]["high"]) for row in rows.values()]
    sides = (min(cost) - 0.2, max(cost) + 0.35), (math.log10(floor) - 0.1, max(far) + 0.15)
    axes = Axes((60, 30, 620, 350), *sides)

    def at(gflops: float, distance: float) -> tuple[float, float]:
        where = (
            torch.tensor([math.log10(x)], dtype=torch.float64, device="cpu")
            for x in (gflops, distance)
        )
        return axes.points(*where)[0]

    axes.frame(pen, "Frechet distance in EfficientNet-Lite0 features against GFLOPs of the network")
    for x, y in [(g, 10 ** sides[1][0]) for g in (0.003, 0.01, 0.03, 0.1)]:
        pen.text(at(x, y), f"\n{x:g}", "black", font, anchor="ma")
    for y in (5, 10, 20, 50, 100, 200, 500):
        if sides[1][0] < math.log10(y) < sides[1][1]:
            across, down = at(10 ** sides[0][0], y)
            pen.text((across - 6 * FINE, down), f"{y}", "black", font, anchor="rm")
    ends = at(10 ** sides[0][0], floor), at(10 ** sides[0][1], floor)
    pen.line(ends, (150, 150, 150), FINE)
    pen.text(ends[0], "  renderings through the autoencoder", (110, 110, 110), font, anchor="lb")
    sizes = dict.fromkeys(name.split("-")[0] for name in rows)
    for colour, size, side in zip(COLOURS, sizes, (1, -1, 1, -1)):  # names below, above, ...
        own = {name: row for name, row in rows.items() if name.startswith(size)}
        points = [at(row["gflops"], row["frechet"]["value"]) for row in own.values()]
        pen.line(points, colour, 2 * FINE)
        for (name, row), (x, y) in zip(own.items(), points):
            low, high = (at(row["gflops"], row["frechet"][end])[1] for end in ("low", "high"))
            pen.line((x, low, x, high), colour, FINE)
            pen.ellipse((x - 4 * FINE, y - 4 * FINE, x + 4 * FINE, y + 4 * FINE), colour)
            anchor, place = "rt" if side > 0 else "lb", (x - side * 5 * FINE, y + side * 5 * FINE)
            pen.text(place, name, colour, font, anchor=anchor)
    return page.resize((640, 400), Image.Resampling.BOX).quantize(64)


def result(args: argparse.Namespace, old: dict) -> dict:
    """What the JSON file holds; old: what it held, if only some rows are made anew."""
    every = not args.only or args.sheet is not None
    names = [name for name in MINIATURE.dits if every or name in args.only]
    models = {name: minisd.load_dit(args.folder / name, device="cpu") for name in names}
    sd = minisd.load("shapes", device="cpu")
    rows = old.get("rows", {}) | measure(models, sd, args.n, args.samples, args.only)
    for name in names:
        index = json.loads((args.folder / name / "model_index.json").read_text(encoding="utf-8"))
        if name in rows:
            rows[name]["trained_steps"] = index["trained_steps"]
    record = old | harness.provenance("cpu")
    record |= {"n": args.n, "samples": args.samples, "seeds": SEEDS}
    record["rows"] = {name: rows[name] for name in ROWS if name in rows}
    if args.sheet is not None:
        few = 4 * len(LABELS)
        record |= {"guided_n": few, "guided": beside(models, sd, few, args.sheet)}
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="DIR", help="of the four models")
    add("--n", type=int, default=480, help="images of each model (default: %(default)s)")
    add("--samples", type=int, default=100, help="bootstraps (default: %(default)s)")
    add("--only", nargs="+", choices=ROWS, default=(), help="these rows anew, the others kept")
    add("--sheet", type=Path, help="where the sheet of eight labels goes (PNG)")
    add("--plot", action="store_true", help="measure nothing, draw the plot anew")
    args = parser.parse_args(arguments)
    if args.plot != (args.folder is None):
        parser.error("expected either DIR or --plot")
    if args.folder is not None:
        old = json.loads(JSON.read_text("utf-8")) if args.only and JSON.exists() else {}
        if (other := old.get("n", args.n)) != args.n:
            parser.error(f"--only: the rows at hand are of {other} images, got --n {args.n}")
        record = result(args, old)
        print(f"wrote {harness.write(JSON, record)}")
        print(table(record))
    record = json.loads(JSON.read_text("utf-8"))
    if record["rows"].keys() >= set(ROWS):
        plot(record).save(PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
