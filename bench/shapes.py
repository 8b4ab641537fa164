"""How well a model of the `shapes` world draws what captions say: the table in weights/README.md.

    python -m bench.shapes [--model shapes|FOLDER] [--n 200] [--json OUT] [--sheet OUT.png]
                           [--images DIR]

Draws n captions of each split that training never saw, and scores the images with bench.scorer:
`heldout` are captions of known colour-shape pairs, `composition` name a pair that training never
showed. Also n rendered scenes through the VAE and back: their PSNR, and their scores, the ceiling
that VAE and scorer leave to the diffusion model.
"""

import argparse
import hashlib
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import minisd
from bench import harness
from bench.metrics import psnr, values
from bench.scorer import ATTRIBUTES, score
from minisd.checkpoints.load import bundled
from minisd.training import scenes
from minisd.viewing.visualize import contact_sheet

BATCH = 25
ROWS = (*ATTRIBUTES, "all, one object", "all, two objects")
# of the captions, and of the scenes
SEED = {"heldout": 1001, "composition": 1002, "reconstruction": 1003}


def captions(split: str, n: int) -> list[str]:
    """The n captions of a split that the table is measured on, the same every time."""
    rng = random.Random(SEED[split])
    return [scenes.caption(scenes.sample(rng, split)) for _ in range(n)]


def tally(texts: list[str], verdicts: list[dict]) -> dict[str, dict]:
    """Row -> {"said": captions that say it, "right": share of them (None: no caption says it)}, for
    each of ROWS."""
    said, right = Counter(), Counter()
    for text, verdict in zip(texts, verdicts, strict=True):
        number = "one object" if len(scenes.parse(text).things) == 1 else "two objects"
        for name, value in {**verdict, f"all, {number}": verdict["all"]}.items():
            if value is not None:
                said[name] += 1
                right[name] += value
    return {
        name: {"said": said[name], "right": right[name] / said[name] if said[name] else None}
        for name in ROWS
    }


def table(tallies: dict[str, dict]) -> str:
    """The tallies side by side as a Markdown table: share right, and of how many."""
    lines = []
    for name in ROWS:
        cells = (tally[name] for tally in tallies.values())
        shares = (f"{100 * c['right']:.1f} % of {c['said']}" if c["said"] else "-" for c in cells)
        lines.append((name, *shares))
    return harness.markdown(("", *tallies), lines)


def report(record: dict) -> str:
    """The table of a result file."""
    return table(record["scores"])


def sheet(images: list[Image.Image], texts: list[str], verdicts: list[dict]) -> Image.Image:
    """A contact sheet: each image with its caption and, in brackets, what is wrong."""
    captions = []
    for text, verdict in zip(texts, verdicts):
        wrong = ", ".join(name for name in ATTRIBUTES[:-1] if verdict[name] is False)
        captions.append(f"{text} [{wrong}]" if wrong else text)
    return contact_sheet(images, captions, 8)


def generate(sd, texts: list[str], **options) -> list[Image.Image]:
    """One image for each caption, image i with seed i."""
    images = []
    for i in tqdm(range(0, len(texts), BATCH), desc="drawing", file=sys.stderr):
        images += sd.txt2img(texts[i : i + BATCH], seed=i, progress=False, **options)
    return images


def reconstruct(sd, n: int):
    """The captions of n scenes, their images, and these after the VAE's encoder and decoder."""
    rng, size = random.Random(SEED["reconstruction"]), sd.unet.config.sample_size * sd.vae.factor
    drawn = [scenes.sample(rng, "heldout") for _ in range(n)]
    images, decoded = [scenes.render(scene, size) for scene in drawn], []
    for i in range(0, n, BATCH):
        decoded += sd.decode(sd.encode_image(images[i : i + BATCH]))
    return [scenes.caption(scene) for scene in drawn], images, decoded


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def save(images: list[Image.Image], folder: Path | None) -> None:
    """As 000.png, 001.png, ... of a folder, for bench.distance."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            image.save(folder / f"{i:03}.png")


def measure(sd, n: int, options: dict, page: Path | None, folder: Path | None = None) -> dict:
    """{"scores": split -> tally, "psnr": of the VAE}; page: where a contact sheet goes; folder:
    where all images go, in folders of their own."""
    tallies = {}
    for split in ("heldout", "composition"):
        texts = captions(split, n)
        images = generate(sd, texts, **options)
        verdicts = [score(image, text) for image, text in zip(images, texts)]
        tallies[split] = tally(texts, verdicts)
        save(images, folder and folder / split)
        if page and split == "heldout":
            sheet(images[:64], texts[:64], verdicts[:64]).save(page)
    texts, images, decoded = reconstruct(sd, n)
    verdicts = [score(image, text) for image, text in zip(decoded, texts)]
    tallies["reconstruction"] = tally(texts, verdicts)
    save(images, folder and folder / "rendered")
    save(decoded, folder and folder / "decoded")
    fidelity = [psnr(values(a), values(b)) for a, b in zip(images, decoded)]
    return {"psnr": float(np.mean(fidelity)), "scores": tallies}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="shapes", help="a bundled model or a checkpoint folder")
    add("--n", type=int, default=200, help="captions of each split (default: 200)")
    add("--steps", type=int, default=25, help="DPM-Solver++ steps (default: 25)")
    add("--guidance", type=float, default=7.5, help="guidance scale (default: 7.5)")
    add("--json", type=Path, help="write all figures here")
    add("--sheet", type=Path, help="write a contact sheet of the held-out captions here (PNG)")
    add("--images", type=Path, help="write all images here: DIR/heldout/000.png, ...")
    args = parser.parse_args(arguments)

    started, folder = time.time(), bundled().get(args.model, Path(args.model))
    sd = minisd.load(args.model)
    options = {"steps": args.steps, "guidance": args.guidance, "sampler": "dpm++"}
    found = measure(sd, args.n, options, args.sheet, args.images)
    print(table(found["scores"]))
    print(f"\nVAE reconstruction: {found['psnr']:.2f} dB, mean of {args.n} images")
    if args.json:
        about = harness.provenance(str(sd.device)) | {"dtype": str(sd.dtype)}
        about |= {"seconds": round(time.time() - started, 1), "n": args.n}
        about |= {"seeds": {"captions": SEED, "images": "0 to n - 1"}}
        harness.write(args.json, about | options | found | {"sha256": hashes(folder)})


if __name__ == "__main__":
    main()
