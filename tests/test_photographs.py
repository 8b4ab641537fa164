"""Real photographs, scikit-image's (public domain or CC0): there and back, inversion, blending,
heat maps. The bundled model has seen none such; nothing here says that it draws them."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from bench import photographs as bench

FOUND = find_spec("skimage")
pytestmark = pytest.mark.skipif(FOUND is None, reason="the photographs are scikit-image's")
# A cat and a cup of coffee (CC0), an astronaut (NASA), a rocket (SpaceX, CC0); read as files, since
# skimage itself would import scipy.
NAMES = ["chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"]


@pytest.fixture(scope="module")
def sd():
    return minisd.load("shapes", device="cpu")


def photograph(name):
    return Path(FOUND.submodule_search_locations[0]) / "data" / name


def values(image):
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_through_the_bundled_autoencoder(sd, name, record_property):
    """It was trained on flat shapes, and a photograph comes back as a rough likeness: measured 13
    to 17 dB. A bar against getting worse, no claim."""
    x = sd.pixels(photograph(name), 128, 128)
    back = sd.decode(sd.encode_image(x), as_tensor=True)
    psnr = -10 * ((back - x) / 2).square().mean().log10().item()
    record_property("autoencoder: lost of a photograph, 1 / PSNR in dB", 1 / psnr)
    assert psnr > 12
    inverted = -10 * ((back + x) / 2).square().mean().log10().item()  # of the negative
    assert psnr > inverted + 3


def test_inversion_leads_back(sd, record_property):
    """By steps without guidance; the rest is the autoencoder's."""
    prompt = "a photograph of a cat"
    how = {"steps": 25, "progress": False}
    inversion = minisd.invert(
        sd, photograph("chelsea.png"), prompt, refine=2, height=64, width=64, **how
    )
    noise = inversion.latents
    assert 0.8 < noise.std() < 1.4  # 1 of images that it knows
    predict = minisd.conditional(sd.network, sd.encode_prompt([prompt]))
    z = minisd.denoise(noise, minisd.DDIM(sd.schedule, 25), predict)
    error = ((z - inversion.z).abs().max() / inversion.z.abs().max()).item()
    record_property("inversion of a photograph, latents", error)
    assert error < 0.02


def test_blend_keeps_every_pixel_outside_the_mask(sd):
    with Image.open(photograph("coffee.png")) as file:
        image = file.convert("RGB").crop((150, 80, 283, 181))  # odd sides
    mask = np.zeros((101, 133), bool)
    mask[30:70, 40:95] = True
    [drawn] = minisd.blend(sd, image, mask, "a red circle", steps=2, progress=False)
    same = (values(drawn) == values(image)).all(-1)
    assert drawn.size == image.size and same[~mask].all() and same[mask].mean() < 0.2


def test_heat_maps_of_a_photograph(sd):
    prompt = "a red circle on a white background"
    how = {"steps": 4, "progress": False}
    inversion = minisd.invert(sd, photograph("rocket.jpg"), prompt, height=64, width=64, **how)
    latents = {"latents": inversion.latents, "sampler": "ddim", "guidance": 1}
    [image], maps = minisd.heatmap(sd, prompt, **latents, **how)
    red = maps.word("red")
    assert torch.isfinite(red).all() and red.min() >= 0 and red.std() > 0
    other = minisd.heatmap(sd, prompt, seed=1, sampler="ddim", guidance=1, **how)[1].word("red")
    assert (red - other).abs().max() > 0.01 * red.max()  # of this image, not of the prompt alone
    sheet = minisd.word_sheet(image, maps, ("red", "circle"))
    assert sheet.width > image.width


def test_the_table_of_the_full_size():
    """bench/photographs.py takes minutes and is run by hand; its photographs and its table."""
    image = bench.photograph("rocket.jpg")  # not square
    assert image.size == (512, 512) and values(image).std() > 10
    record = {"command": "python -m bench.photographs", "device": "cpu", "processor": "a CPU"}
    record |= {"threads": 1, "torch": "2.13", "triton": None, "commit": "abc", "python": "3.11"}
    record |= {"dtype": "bfloat16", "steps": 2}
    found = {"changed outside": 0, "inside": 0.98, "finite": True, "latents": [1, 4, 64, 64]}
    table = bench.table(record | {"rows": {"blend": {"found": found, "seconds": 12.3}}})
    assert "| 512 x 512, bfloat16, 2 steps | measured | time |" in table
    assert "| blend | changed outside 0, inside 0.98 | 12 s |" in table


def test_figures_of_other_runs_are_not_mixed(tmp_path, capsys):
    path = tmp_path / "photographs.json"
    path.write_text(json.dumps({"dtype": "bfloat16", "steps": 2, "rows": {}}))
    with pytest.raises(SystemExit):
        bench.main(["--steps", "3", "--json", str(path)])
    assert "photographs.json is of bfloat16, 2 steps" in capsys.readouterr().err
