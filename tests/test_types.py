"""Types are real: mypy --strict on a program that uses minisd, and what it sees in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minisd

CLIENT = Path(__file__).with_name("typed_client.py")
IMAGES, TENSOR = "list[PIL.Image.Image]", "torch._tensor.Tensor"
REVEALED = [
    "minisd.pipeline.StableDiffusion",
    "minisd.models.unet.UNet",
    IMAGES,  # txt2img
    IMAGES,  # img2img
    IMAGES,  # decode
    TENSOR,  # decode(as_tensor=True)
    TENSOR,  # encode_prompt
    IMAGES,  # edit_prompt
    IMAGES,  # seed_baseline
    TENSOR,  # maps.word
    "minisd.editing.inversion.Inversion",
    IMAGES,  # redraw
    f"{TENSOR} | None",  # recording.z
    IMAGES,  # replay
    f"tuple[{IMAGES}, minisd.editing.maps.Maps]",  # heatmap
    TENSOR,  # eps
    f"tuple[{TENSOR}, {TENSOR}]",  # step(x, eps)
    TENSOR,  # denoise
    TENSOR,  # the UNet
    "Literal['dpm++'] | Literal['dpm++ linspace'] | Literal['ddim'] | Literal['ddpm']",
    "str",  # add_embedding
    IMAGES,  # inpaint
    "minisd.drawing.Cancelled | minisd.checkpoints.sources.CheckpointError",
    "dict[str, Any]",  # recipe
    "PIL.Image.Image",  # from_recipe
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """[(line, "error" or "note", what mypy says of it)]. As a user has it: minisd is installed."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("types")
    client = folder / CLIENT.name  # alone in its folder, with no configuration
    client.write_text(CLIENT.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-color-output"]
    command += ["--follow-imports", "silent", "--cache-dir", str(folder / "cache"), client.name]
    env = os.environ | {"MYPYPATH": str(Path(minisd.__file__).absolute().parents[1])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    lines = re.findall(rf"^{CLIENT.name}:(\d+): (error|note): (.*)$", done.stdout, re.M)
    assert lines, done.stdout + done.stderr
    return [(int(line), kind, text) for line, kind, text in lines]


def test_values_have_the_right_types(said):
    notes = [text for _, _, text in said if text.startswith("Revealed type is")]
    revealed = [re.sub(r'^Revealed type is "(.*)"$', r"\1", text) for text in notes]
    assert revealed == REVEALED


def test_mistakes_and_nothing_else_are_errors(said):
    source = CLIENT.read_text(encoding="utf-8").splitlines()
    wrong = {i for i, line in enumerate(source, 1) if line.endswith("# WRONG")}
    assert len(wrong) == 16
    assert {line for line, kind, _ in said if kind == "error"} == wrong
