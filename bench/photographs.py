"""Photographs of 512 x 512 through a model of Stable Diffusion v1.4's size, with random weights.

    python -m bench.photographs [--steps 2] [--dtype bfloat16] [--only NAME ...] [--json FILE]

What the pixels mean is nothing to random weights; what is measured holds for any: there and back
through the autoencoder in two dtypes, inversion and the way back, a blend that leaves every pixel
outside its mask as it was, and heat maps whose rows sum to 1. The photographs are scikit-image's
(public domain or CC0); tests/test_photographs.py has the same through the bundled model.
"""

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import minisd
from bench import harness
from minisd.checkpoints.load import SD_V1_SCHEDULE
from minisd.editing.inversion import redraw_latents
from minisd.training.scenes import words

SIDE, SEED = 512, 0
PROMPT = "a red circle on a white background"


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image's, cut to the middle square; ModuleNotFoundError without it."""
    if (found := find_spec("skimage")) is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("the photographs are scikit-image's: pip install scikit-image")
    image = Image.open(Path(found.submodule_search_locations[0]) / "data" / name).convert("RGB")
    left, top = ((side - min(image.size)) // 2 for side in image.size)
    square = image.crop((left, top, left + min(image.size), top + min(image.size)))
    return square.resize((SIDE, SIDE))


def random_model(dtype: torch.dtype) -> minisd.StableDiffusion:
    """All three models at their full size, every parameter random, norms too."""
    from minisd.models.tokenizer import build_vocabulary

    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    models = minisd.CLIPTextModel(minisd.CLIPTextConfig()), minisd.UNet(minisd.UNetConfig())
    text, unet = models
    vae = minisd.AutoencoderKL(minisd.VAEConfig())
    torch.set_default_dtype(torch.float32)
    for model in (text, unet, vae):
        model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer = minisd.CLIPTokenizer(*build_vocabulary(words()))
    schedule = minisd.NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    return minisd.StableDiffusion(tokenizer, text, unet, vae, schedule)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|."""
    found, expected = found.float(), expected.float()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def there_and_back(sd, image: Image.Image) -> dict:
    """The autoencoder in this dtype against itself in float32."""
    z = sd.encode_image(image)
    back = sd.decode(z, as_tensor=True)
    dtype = sd.dtype
    sd.vae.float()
    exact_z = sd.vae.encode(sd.pixels(image).float())[0] * sd.vae.config.scaling_factor
    exact = sd.vae.decode(z.float() / sd.vae.config.scaling_factor)
    sd.vae.to(dtype)
    return {
        "latents": list(z.shape),
        "latents from float32": error(z, exact_z),
        "image from float32": error(back, exact.clamp(-1, 1)),
        "finite": bool(back.isfinite().all()),
    }


def way_back(sd, image: Image.Image, steps: int) -> dict:
    """Inversion without guidance, with one iteration, and its latents drawn again."""
    how = {"steps": steps, "progress": False}
    inversion = minisd.invert(sd, image, PROMPT, refine=1, **how)
    z = redraw_latents(sd, inversion, progress=False)
    return {"latents from the image's": error(z, inversion.z)}


def blended(sd, image: Image.Image, steps: int) -> dict:
    """Pixels outside the mask that changed, and the share of those inside that did."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[180:330, 200:401] = True
    [drawn] = minisd.blend(sd, image, mask, PROMPT, 1.0, steps=steps, progress=False)
    changed = (np.asarray(drawn) != np.asarray(image)).any(-1)
    return {"changed outside": int(changed[~mask].sum()), "inside": float(changed[mask].mean())}


def heat(sd, steps: int) -> dict:
    """Heat maps of the words, of 16 cross-attention sites: their rows sum to 1."""
    images, maps = minisd.heatmap(sd, PROMPT, steps=steps, sampler="ddim", progress=False)
    sums = [(mean.sum(-1) / maps.count - 1).abs().max().item() for mean in maps.sums.values()]
    word = maps.word("red")
    sheet = minisd.word_sheet(images[0], maps, ("red", "circle"))
    fine = bool(word.isfinite().all()) and sheet.width > images[0].width
    return {"sites": len(sums), "rows' sums from 1": max(sums), "fine": fine}


def table(record: dict) -> str:
    """A row for each of them: what was measured, and its seconds."""
    rows = []
    for name, own in record["rows"].items():
        told = {k: v for k, v in own["found"].items() if not isinstance(v, (bool, list))}
        figures = ", ".join(f"{k} {v:.2g}" for k, v in told.items())
        rows.append((name, figures, f"{own['seconds']:.0f} s"))
    head = (f"512 x 512, {record['dtype']}, {record['steps']} steps", "measured", "time")
    return f"{harness.origin(record)}\n\n{harness.markdown(head, rows)}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.photographs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--steps", type=int, default=2, help="of each (default: 2)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--only", nargs="+", metavar="NAME", help="the first words of what is measured")
    add("--json", type=Path, help="write all figures here, beside those that are there")
    args = parser.parse_args(arguments)
    rows = {}
    if args.json is not None and args.json.exists():
        there = json.loads(args.json.read_text(encoding="utf-8"))
        if (there["dtype"], there["steps"]) != (args.dtype, args.steps):
            parser.error(f"{args.json} is of {there['dtype']}, {there['steps']} steps")
        rows = there["rows"]
    sd = random_model(getattr(torch, args.dtype))
    print(sd)
    portrait, coffee = (photograph(name) for name in ("astronaut.png", "coffee.png"))
    trials = {
        "inversion and the way back": lambda: way_back(sd, portrait, args.steps),
        "blend with a mask": lambda: blended(sd, coffee, args.steps),
        "heat maps": lambda: heat(sd, args.steps),
        "there and back": lambda: there_and_back(sd, portrait),
    }
    for name, trial in trials.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        start = time.monotonic()
        rows[name] = {"found": trial(), "seconds": round(time.monotonic() - start, 1)}
        print(name, rows[name], flush=True)
        if args.json:  # after each: they take minutes
            about = harness.provenance(str(sd.device)) | {"dtype": args.dtype, "steps": args.steps}
            harness.write(args.json, about | {"seed": SEED, "rows": rows})


if __name__ == "__main__":
    main()
