"""Heat maps, overlays, contact sheets and self-attention components, on the tiny random model."""

import numpy as np
import p2p_model
import pytest
import torch
from PIL import Image

from minisd import DDIM, Recording, cfg, denoise, record
from minisd.viewing.visualize import (
    components,
    contact_sheet,
    heatmap,
    overlay,
    token_sheet,
    word_sheet,
)

PROMPT = "a cat on my mat"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("p2p"))[1]


def values(image):
    return np.asarray(image).astype(int)


def test_heatmap(sd):
    [image], maps = heatmap(sd, PROMPT, steps=4, seed=2, height=24, width=44, progress=False)
    (plain,) = sd.txt2img(PROMPT, steps=4, seed=2, height=24, width=44, progress=False)
    assert np.abs(values(image) - values(plain)).max() <= 1  # looking changes nothing
    assert set(maps.sums) == set(sd.unet.sites("cross")) and maps.count == 4
    assert maps.word("cat").shape == (6, 11) and maps.word("cat", grid=(3, 6)).shape == (3, 6)
    [given], early = heatmap(
        sd, PROMPT, steps=4, latents=sd.noise(2, 1, 24, 44), until=0.5, where="3x6", progress=False
    )
    assert np.abs(values(given) - values(plain)).max() <= 1
    assert early.count == 2 and set(early.grids.values()) == {(3, 6)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(until=1.5), "until is 1.5, expected a number from 0 to 1"),
        (dict(until=0.03), "until is 0.03 of 25 steps, expected at least the first of them"),
        (dict(steps="25"), "steps is '25', expected a whole number, at least 1"),
        (dict(guidance="7"), "guidance is '7', expected a number from -1000 to 1000"),
        (dict(height="32"), "32 x '32' pixels"),
        (
            dict(latents=torch.zeros(4, 8, 8)),
            r"latents are torch.float32 \(4, 8, 8\), expected a tensor of floats",
        ),
        (
            dict(latents=torch.zeros(2, 4, 8, 8)),
            r"latents have shape \(2, 4, 8, 8\), expected \(1, 4, 8, 8\)",
        ),
        (
            dict(latents=torch.zeros(1, 4, 8, 8), height=64),
            r"latents have shape .*, expected \(1, 4, 16, 8\)",
        ),
    ],
)
def test_heatmap_refuses(sd, wrong, message):
    with pytest.raises(ValueError, match=message):
        heatmap(sd, PROMPT, **wrong)


def test_sheets(sd):
    [image], maps = heatmap(sd, PROMPT, steps=2, progress=False)
    assert image.size == (32, 32)
    sheet = word_sheet(image, maps)  # the picture, a, cat, on, my, mat
    assert sheet.width == 6 * (128 + 6) + 6 and 128 < sheet.height < 170
    shown = values(sheet)[6 : 6 + 128, 6 : 6 + 128]
    assert (shown == values(image.resize((128, 128), Image.Resampling.NEAREST))).all()
    cat = values(overlay(image, maps.word("cat")).resize((128, 128), Image.Resampling.NEAREST))
    assert (values(sheet)[6 : 6 + 128, 6 + 2 * 134 : 6 + 2 * 134 + 128] == cat).all()
    assert word_sheet(image, maps, ["cat", "my mat"]).width == 3 * 134 + 6
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        word_sheet(image, maps, ["dog"])
    tokens = token_sheet(image, maps, columns=5)  # <bos>, 11 letters, <eos>
    assert tokens.width == 5 * 134 + 6 and tokens.height > 3 * 134


def test_words_that_were_cut_have_no_map(sd):
    prompt = "a cat on my mat " + "a " * 70 + "cat dog mat bird"
    with pytest.warns(UserWarning, match="part was cut"):
        [image], maps = heatmap(sd, prompt, steps=1, progress=False)
    with pytest.warns(UserWarning, match="no map of what was cut from the prompt: 'dog', 'bird'"):
        sheet = word_sheet(image, maps)
    assert sheet.width == 6 * 134 + 6  # the image, a, cat, on, my, mat
    assert (values(sheet) == values(word_sheet(image, maps, ["a", "cat", "on", "my", "mat"]))).all()
    there = "expected one of 'a', 'cat', 'on', 'my', 'mat'$"
    for word in ("bird", "mat bird"):
        with pytest.raises(ValueError, match=f"'{word}' was cut from the prompt, {there}"):
            maps.word(word)
    with pytest.raises(ValueError, match=f"'cow' is not in the prompt, {there}"):
        maps.word("cow")


def test_overlay_by_hand():
    image = Image.new("RGB", (64, 64), (100, 100, 100))
    heat = torch.zeros(4, 4)
    heat[:2] = 1
    out = values(overlay(image, heat, strength=0.5))
    assert out[2, 2].tolist() == [178, 178, 178] and out[61, 61].tolist() == [
        50,
        50,
        50,
    ]  # half white, half black
    red = values(overlay(image, torch.full((4, 4), 1 / 3), limits=(0, 1), strength=1.0))
    assert red[30, 30].tolist() == [255, 0, 0]
    yellow = values(overlay(image, torch.full((4, 4), 2 / 3), limits=(0, 1), strength=1.0))
    assert yellow[30, 30].tolist() == [255, 255, 0]
    assert (
        values(overlay(image, torch.ones(4, 4))) == values(overlay(image, torch.zeros(4, 4)))
    ).all()  # a flat map


def test_contact_sheet():
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    sheet = contact_sheet(pictures, ["a", "b " * 80, ""], columns=2)
    assert sheet.width == 2 * (160 + 6) + 6  # 40 x 4, the first multiple of 128 or more
    assert values(sheet)[10, 10].tolist() == [255, 0, 0] and values(sheet)[10, 180].tolist() == [
        0,
        128,
        0,
    ]
    assert (values(contact_sheet(pictures))[6 + 120 :] == 255).all()  # no captions
    big = contact_sheet([Image.new("RGB", (300, 200))])
    assert big.size == (312, 212)
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([pictures[0], Image.new("RGB", (1, 1))])
    with pytest.raises(ValueError, match="columns is 0, expected a whole number, at least 1"):
        contact_sheet([Image.new("RGB", (8, 8))], columns=0)
    with pytest.raises(ValueError, match="1 captions for 3 images"):
        contact_sheet(pictures, ["a"])


def test_components(sd):
    """Against the maps of every head, site and step, formed from hooks on the queries and keys."""
    what = dict(cross_sites=[], self_sites=64, dtype=torch.float32)
    recording = record(sd, PROMPT, steps=3, seed=1, progress=False, **what)
    kept = []
    hooks = []
    sites = [s for s in sd.unet.sites("self") if sd.unet.grid(s) == (8, 8)]
    for site in sites:
        for part in ("to_q", "to_k"):
            module = getattr(sd.unet.get_submodule(site), part)
            hooks.append(module.register_forward_hook(lambda m, i, o: kept.append(o[-1:])))
    predict = cfg(sd.unet, sd.encode_prompt([""]), sd.encode_prompt([PROMPT]), 7.5)
    denoise(sd.noise(1), DDIM(sd.schedule, 3), predict)
    for hook in hooks:
        hook.remove()
    assert len(kept) == 3 * len(sites) * 2
    A = 0
    for q, k in zip(kept[::2], kept[1::2]):
        q, k = (x.unflatten(-1, (2, -1)).transpose(1, 2)[0] for x in (q, k))
        A = A + (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(0) / (
            3 * len(sites)
        )
    A = A - A.mean(1, keepdim=True)
    found, s = components(sd, recording, (8, 8), n=2)
    assert (
        found.shape == (2, 8, 8)
        and found.amin((1, 2)).eq(0).all()
        and found.amax((1, 2)).eq(1).all()
    )
    values, vectors = torch.linalg.eigh(A.T @ A)
    torch.testing.assert_close(s, values.flip(0)[:2].clamp(min=0).sqrt(), rtol=1e-3, atol=1e-5)
    for row, vector in zip(found.flatten(1), vectors.T.flip(0)):
        assert abs(torch.corrcoef(torch.stack([row, vector]))[0, 1]) > 0.999
    assert components(sd, recording)[0].shape == (3, 8, 8)
    assert components(sd, recording, (4, 4), 1)[0].shape == (1, 4, 4)
    assert not torch.allclose(components(sd, recording, (8, 8), 2, until=0.4)[0], found, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"of the grid \(5, 5\) was recorded, only of \[\(4, 4\), \(8, 8\)\]"
    ):
        components(sd, recording, (5, 5))
    with pytest.raises(ValueError, match="grid None was recorded"):
        maps = {"a.p": torch.zeros(3, 1, 2, 64, 77)}
        components(sd, Recording(PROMPT, 3, (8, 8), recording.t, maps))
