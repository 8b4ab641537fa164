"""The real Stable Diffusion v1.4 weights, where they are at hand: pytest -m weights --model
PATH."""

import hashlib
import json

import numpy as np
import pytest
import torch

import minisd
from minisd.checkpoints import check, load as checkpoint, sources
from minisd.checkpoints.check import ACCEPTANCE, TOLERANCE, acceptance
from minisd.viewing.images import to_tensor


@pytest.mark.weights
def test_v1_4_draws_the_values_that_diffusers_publishes(request, record_property):
    model = request.config.getoption("--model")
    if model is None:
        pytest.skip("needs --model: sd-v1-4, or a folder or file with its weights")
    sd = minisd.load(model, dtype="float32")
    _, values = acceptance(sd)
    off = (values - torch.tensor(ACCEPTANCE)).abs().max().item()
    record_property("v1.4's acceptance values, max |difference|", off)
    assert off <= TOLERANCE[torch.float32]


def test_the_acceptance_picture_of_the_bundled_model():
    """Its nine values are those of the lower right corner, the last channel, row by row, of what
    cfg and DDIM draw."""
    sd = minisd.load("shapes", device="cpu")
    picture, values = acceptance(sd)
    assert picture.shape == (1, 3, 64, 64) and values.shape == (9,)
    for i, value in enumerate(values):
        assert value == picture[0, 2, 61 + i // 3, 61 + i % 3]
    assert 0 <= picture.min() and picture.max() <= 1
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 16, 16))).float()
    [drawn] = sd.txt2img(
        check.ASTRONAUT, steps=3, guidance=7.5, sampler="ddim", latents=x, progress=False
    )
    assert (to_tensor([drawn], 64, 64) / 2 + 0.5 - picture).abs().max() < 0.6 / 255
    wrong = [line for verdict, line in check.check_image(sd, is_v1_4=True) if verdict is False]
    assert (
        len(wrong) == 1 and "v1.4's acceptance values: off by" in wrong[0]
    )  # another model does not pass for it


def test_a_picture_of_one_colour_is_wrong():
    sd = minisd.load("shapes", device="cpu")
    for tensor in (sd.vae.decoder.conv_out.weight, sd.vae.decoder.conv_out.bias):
        tensor.zero_()
    assert [*check.check_image(sd, False)] == [
        (False, "an image in 3 steps: standard deviation 0.000")
    ]


def test_vocabularies_that_are_wrong(monkeypatch):
    tokenizer = checkpoint.locate("shapes").tokenizer
    assert [verdict for verdict, _ in check.check_vocabulary(tokenizer)] == [None, True, True]
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: "something else")
    assert [verdict for verdict, _ in check.check_vocabulary(tokenizer)] == [None, False, False]
    monkeypatch.undo()
    files = (
        json.dumps(tokenizer.vocab, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        "\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges)]) + "\n",
    )
    for name, text in zip(("CLIP_VOCABULARY", "CLIP_MERGES"), files, strict=True):
        monkeypatch.setattr(check, name, hashlib.sha256(text.encode()).hexdigest())
    # Were it CLIP's, the astronaut would have to have CLIP's ids.
    assert [verdict for verdict, _ in check.check_vocabulary(tokenizer)] == [True, False, True]


def test_what_is_taken_for_v1_4():
    unet, vae, text = ("145a07e0f05ec5bb", "4fbcf0ebe55a0984", "7b3a12df205cb3c7")
    full = {
        start: next(sha for sha in check.PUBLISHED if sha.startswith(start))
        for start in (unet, vae, text)
    }
    assert check.is_v1_4(full)
    not_ema = next(sha for sha in check.PUBLISHED if sha.startswith("ac3d1bff"))
    assert not check.is_v1_4(full | {unet: not_ema})
    assert not check.is_v1_4(full | {text: "0" * 64})
    parts = ("unet", "vae", "text_encoder")
    assert set(check.PUBLISHED.values()) >= {
        (sources.SHORT_NAMES["sd-v1-4"], part) for part in parts
    }
