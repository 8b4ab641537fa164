"""The bundled model `shapes`: the files that were described and measured, and a model that
diffusers can run too."""

import json
import re
import warnings
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import minisd
from bench.shapes import hashes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "weights/shapes"


def test_the_readme_gives_the_sha256_of_each_file():
    readme = (ROOT / "weights/README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(.+?)` \| `([0-9a-f]{64})` \|$", readme, re.M)) == {
        f"shapes/{name}": sha for name, sha in hashes(FOLDER).items()
    }


def test_the_measured_weights_are_the_bundled_ones():
    record = json.loads((ROOT / "bench/results/cpu/shapes.json").read_text(encoding="utf-8"))
    assert record["sha256"] == hashes(FOLDER), (
        "run `python -m bench.shapes --json bench/results/cpu/shapes.json` again"
    )


def test_diffusers_draws_the_same(record_property):
    """The final latents of a caption, in diffusers and in minisd, from the same noise."""
    caption = "a big red circle left of a small blue square on a white background"
    sd = minisd.load("shapes", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True
    )
    pipe.set_progress_bar_config(disable=True)
    last = []
    sd.txt2img(caption, steps=3, seed=1, progress=False, on_step=lambda x, step: last.append(x))
    theirs = pipe(caption, num_inference_steps=3, latents=sd.noise(1), output_type="latent").images
    error = ((last[-1] - theirs).abs().max() / theirs.abs().max()).item()
    record_property("bundled model, latents", error)
    assert error <= 1e-4
