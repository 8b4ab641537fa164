"""How well a model of the `shapes` world draws what captions say: the table in weights/README.md.

    python -m bench.shapes [--model shapes|FOLDER] [--n 200] [--json OUT] [--sheet OUT.png]

Draws n captions of each split that training never saw, and scores the pictures with bench.scorer:
`heldout` are captions of known colour-shape pairs, `composition` name a pair that training never
showed. Also n rendered scenes through the VAE and back: their PSNR, and their scores, the ceiling
that VAE and scorer leave to the diffusion model.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import minisd
from bench.scorer import ATTRIBUTES, score
from minisd.checkpoints.load import bundled
from minisd.training import scenes
from minisd.viewing.visualize import contact_sheet

BATCH = 25
ROWS = (*ATTRIBUTES, "all, one object", "all, two objects")
SEED = {
    "heldout": 1001,
    "composition": 1002,
    "reconstruction": 1003,
}  # of the captions, and of the scenes


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


def psnr(a, b) -> float:
    """-10 log10(mean squared difference) in dB of two 8-bit pictures, the peak taken as 1."""
    difference = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / 255
    return float(-10 * np.log10(np.maximum(np.mean(difference**2), 1e-10)))


def table(tallies: dict[str, dict]) -> str:
    """The tallies side by side as a Markdown table: share right, and of how many."""
    lines = ["| | " + " | ".join(tallies) + " |", "|---|" + "---|" * len(tallies)]
    for name in ROWS:
        cells = (t[name] for t in tallies.values())
        lines.append(
            f"| {name} | "
            + " | ".join(
                f"{100 * cell['right']:.1f} % of {cell['said']}" if cell["said"] else "-"
                for cell in cells
            )
            + " |"
        )
    return "\n".join(lines)


def sheet(images: list[Image.Image], texts: list[str], verdicts: list[dict]) -> Image.Image:
    """A contact sheet: each picture with its caption and, in brackets, what is wrong."""
    wrong = [
        ", ".join(name for name in ATTRIBUTES[:-1] if verdict[name] is False)
        for verdict in verdicts
    ]
    return contact_sheet(
        images, [f"{text} [{faults}]" if faults else text for text, faults in zip(texts, wrong)], 8
    )


def generate(sd, texts: list[str], steps: int, guidance: float) -> list[Image.Image]:
    """One picture for each caption, picture i with seed i, by DPM-Solver++ 2M with Karras
    sigmas."""
    images = []
    for i in tqdm(range(0, len(texts), BATCH), desc="drawing", file=sys.stderr):
        images += sd.txt2img(
            texts[i : i + BATCH],
            seed=i,
            steps=steps,
            guidance=guidance,
            sampler="dpm++",
            progress=False,
        )
    return images


def reconstruct(sd, n: int):
    """n rendered scenes, their pictures, and the pictures after the VAE's encoder and decoder."""
    rng, size = random.Random(SEED["reconstruction"]), sd.unet.config.sample_size * sd.vae.factor
    drawn = [scenes.sample(rng, "heldout") for _ in range(n)]
    pictures = [scenes.render(scene, size) for scene in drawn]
    decoded = []
    for i in range(0, n, BATCH):
        decoded += sd.decode(sd.encode_image(pictures[i : i + BATCH]))
    return [scenes.caption(scene) for scene in drawn], pictures, decoded


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default="shapes", help="a bundled model or a checkpoint folder (default: shapes)"
    )
    parser.add_argument("--n", type=int, default=200, help="captions of each split (default: 200)")
    parser.add_argument("--steps", type=int, default=25, help="DPM-Solver++ steps (default: 25)")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale (default: 7.5)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--sheet", type=Path, help="write a contact sheet of the held-out captions here (PNG)"
    )
    args = parser.parse_args(arguments)

    started, folder = time.time(), bundled().get(args.model, Path(args.model))
    sd = minisd.load(args.model)
    tallies = {}
    for split in ("heldout", "composition"):
        texts = captions(split, args.n)
        images = generate(sd, texts, args.steps, args.guidance)
        verdicts = [score(image, text) for image, text in zip(images, texts)]
        tallies[split] = tally(texts, verdicts)
        if args.sheet and split == "heldout":
            sheet(images[:64], texts[:64], verdicts[:64]).save(args.sheet)
    texts, pictures, decoded = reconstruct(sd, args.n)
    tallies["reconstruction"] = tally(
        texts, [score(image, text) for image, text in zip(decoded, texts)]
    )
    fidelity = float(np.mean([psnr(a, b) for a, b in zip(pictures, decoded)]))

    print(table(tallies))
    print(f"\nVAE reconstruction: {fidelity:.2f} dB, mean of {args.n} pictures")
    if args.json:
        versions = {
            "python": platform.python_version(),
            "minisd": minisd.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        record = {
            "command": " ".join(
                ["python -m bench.shapes", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            "versions": versions,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "device": str(sd.device),
            "dtype": str(sd.dtype),
            "seconds": round(time.time() - started, 1),
            "seeds": {"captions": SEED, "pictures": "0 to n - 1"},
            "n": args.n,
            "steps": args.steps,
            "guidance": args.guidance,
            "sampler": "dpm++",
            "psnr": fidelity,
            "scores": tallies,
            "sha256": hashes(folder),
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
