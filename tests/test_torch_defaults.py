"""torch's default dtype and device are the caller's: minisd draws the same bits under any."""

import ast
from pathlib import Path

import p2p_model
import pytest
import torch

import minisd
from minisd.viewing.images import to_tensor

ROOT = Path(__file__).parents[1]
PROMPTS = "a red circle", "a blue circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defaults")
    p2p_model.load(folder)
    return folder


def everything(folder):
    """Tensors on the CPU of what loading, drawing and editing give."""
    sd = minisd.load(folder, device="cpu")
    how = {"steps": 3, "progress": False}
    drawn = sd.txt2img(PROMPTS[0], seed=2, num_images=2, **how)
    edit = {"reweight": {"blue": 2.0}, "local_blend": ("red", "blue"), "self_steps": 0.5}
    edited = minisd.edit_prompt(sd, *PROMPTS, edit="replace", **edit, **how)
    refined = minisd.edit_prompt(sd, "a circle", PROMPTS[1], edit="refine", **how)
    inversion = minisd.invert(sd, drawn[0], PROMPTS[0], trajectory=True, **how)
    found = minisd.null_text(sd, inversion, inner_steps=1, progress=False)
    recording = minisd.record(sd, PROMPTS[0], **how)
    replayed = minisd.replay(sd, recording, PROMPTS[1], progress=False)
    erased = minisd.erase_concepts(
        sd, drawn[0], "a", "b", 0.7, guide=minisd.sega, **(how | {"steps": 15})
    )
    mask = torch.zeros(32, 32, dtype=torch.bool, device="cpu")
    mask[:, :16] = True
    blended = minisd.blend(sd, drawn[0], mask, "a", **how)
    ancestral = minisd.DDIM(sd.schedule, 3, eta=0.7)
    text = sd.encode_prompt(["a"])
    z = minisd.denoise(sd.noise(1), ancestral, minisd.conditional(sd.network, text))
    images = [*drawn, *edited, *refined, *replayed, *erased, *blended]
    _, maps = minisd.heatmap(sd, PROMPTS[0], **how)
    tensors = [sd.noise(0), sd.unet.conv_in.weight, sd.schedule.alphas_cumprod, z, maps.mean()]
    tensors += [inversion.latents, found.uncond, recording.z, *recording.maps.values()]
    size = images[0].height, images[0].width
    return [to_tensor([image], *size) for image in images] + tensors


@pytest.fixture(scope="module")
def expected(folder):
    return everything(folder)


def test_a_default_dtype_changes_no_bit(folder, expected):
    torch.set_default_dtype(torch.float64)
    try:
        got = everything(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), i


def test_a_default_device_changes_no_bit(folder, expected):
    """One that holds no values, so that a tensor which lands there cannot be used in silence."""
    torch.set_default_device("meta")
    try:
        got = everything(folder)
    finally:
        torch.set_default_device(None)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.device == theirs.device and torch.equal(ours, theirs), i


FACTORIES = "arange empty eye full linspace ones rand randint randn randperm tensor zeros".split()
# Modules' own parameters follow torch's defaults, as those of torch.nn do: `with
# torch.device("meta")` builds a model without memory.
BUILT = {"minisd/models/clip.py"}


def test_every_tensor_factory_names_dtype_and_device():
    """Or takes a dict of them, **where."""
    for path in sorted([*ROOT.glob("minisd/**/*.py"), *ROOT.glob("kernels/*.py")]):
        if str(path.relative_to(ROOT)) in BUILT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, owner = node.func.attr, node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES:
                named = {keyword.arg for keyword in node.keywords}
                whole = {"dtype", "device"} <= named or None in named
                assert whole, f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name} takes defaults"
