"""The bundled models, `shapes` and `shapes-dit`: the files that were described and measured, and
models that diffusers can run too."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from oracle import difference
from oracle_dit import Published

import minisd
from bench import dit as bench
from bench.labels import HOW
from bench.shapes import hashes
from minisd.training.labelled import LABELS
from minisd.training.recipes import SHAPES_DIT

ROOT = Path(__file__).parents[1]
FOLDER, LABELLED = ROOT / "weights/shapes", ROOT / "weights/shapes-dit"


def test_the_readme_gives_the_sha256_of_each_file():
    readme = (ROOT / "weights/README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(.+?)` \| `([0-9a-f]{64})` \|$", readme, re.M))
    assert told == {
        f"{model.name}/{name}": sha
        for model in (FOLDER, LABELLED)
        for name, sha in hashes(model).items()
    }


@pytest.mark.parametrize(
    ("folder", "bench"), [(FOLDER, "shapes"), (LABELLED, "labels")], ids=["shapes", "shapes-dit"]
)
def test_the_measured_weights_are_the_bundled_ones(folder, bench):
    record = json.loads((ROOT / f"bench/results/cpu/{bench}.json").read_text(encoding="utf-8"))
    assert record["sha256"] == hashes(folder), (
        f"run `python -m bench.{bench} --json bench/results/cpu/{bench}.json` again"
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


# ---- shapes-dit


@pytest.fixture(scope="module")
def labelled():
    return minisd.load_dit("shapes-dit", device="cpu")


def test_the_dit_is_the_recipes_on_the_autoencoder_of_shapes(labelled):
    index = json.loads((LABELLED / "model_index.json").read_text(encoding="utf-8"))
    assert labelled.dit.config == SHAPES_DIT.dits["shapes-dit"]
    assert index["trained_steps"] == SHAPES_DIT.how.steps
    assert [*labelled.names.values()] == [str(label) for label in LABELS]
    for part in ("vae", "scheduler"):
        assert hashes(LABELLED / part) == hashes(FOLDER / part)


@torch.no_grad()
def test_the_dit_is_computed_as_published_and_as_diffusers_does(labelled, record_property):
    """Its trained weights in the published formulas and, with compat, in diffusers' model."""
    x, t = labelled.noise(2, 3), torch.tensor([999, 0, 500])
    labels = [3, 24, 17]
    found = labelled.dit(x, t, labelled.dit.embed_labels(labels))
    expected = Published(labelled.dit.state_dict(), labelled.dit.config)(x, t, labels)
    error = difference(found, expected)
    record_property("shapes-dit, published", error)
    assert error <= 2e-6
    theirs = DiTTransformer2DModel.from_pretrained(LABELLED / "transformer").eval()
    other = minisd.load_dit("shapes-dit", device="cpu", compat="diffusers").dit
    expected = theirs(x, timestep=t, class_labels=torch.tensor(labels)).sample
    error = difference(other(x, t, other.embed_labels(labels)), expected)
    record_property("shapes-dit, compat diffusers", error)
    assert error <= 2e-6


def test_the_dit_draws_its_labels(labelled):
    """One image of each; chance is 1 in 24, and less."""
    images = labelled.generate([*range(24)], seed=3000, guidance=3.0, **HOW)
    right = bench.right(images, bench.captions(24))
    assert min(right[what] for what in ("count", "colour", "shape")) >= 0.8
    moved = bench.right(images, [*bench.captions(24)[9:], *bench.captions(24)[:9]])
    assert moved["all"] <= 0.1


def test_the_dit_is_no_model_for_texts_and_shapes_none_for_labels():
    with pytest.raises(ValueError, match="its DiT takes labels: minisd.load_dit and `minisd dit`"):
        minisd.load("shapes-dit", device="cpu")
    with pytest.raises(ValueError, match="with its unet/, minisd.load"):
        minisd.load_dit("shapes", device="cpu")


def test_loading_imports_no_compiler():
    """sympy and torch._dynamo take longer to import than the weights to be read."""
    code = "import sys, minisd; minisd.load('shapes'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sympy", "torch._dynamo"} & set(done.stdout.split())
