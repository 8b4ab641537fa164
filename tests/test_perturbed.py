"""Perturbed-attention guidance against its formula on eager maps, and beside prompt-to-prompt."""

from functools import partial

import oracle_methods as oracle
import p2p_model
import pytest
import tiny
import torch
from oracle import difference
from PIL import Image

import minisd
from minisd import DDIM, AttentionEdit, cfg, denoise, pag
from minisd.editing.perturbed import MID

PROMPTS = ["a cat on my mat", "a dog on my mat"]
STEPS, QUIET = 5, {"progress": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("perturbed"))


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("impl", ["sdpa", pytest.param("reference", marks=pytest.mark.full)])
def test_pag_is_its_formula(pair, record_property, impl, scale):
    reference, sd = pair
    cond, uncond, x = sd.encode_prompt(PROMPTS), sd.encode_prompt([""]), sd.noise(3, 2)
    sd.unet.attention = impl
    ours = denoise(x, DDIM(sd.schedule, STEPS), pag(sd.network, uncond, cond, scale))

    def attend(step, site, q, k, v):
        P = oracle.softmax_map(q, k)
        if site == MID[0]:
            B = len(P) // 3
            for row in range(B, 2 * B):  # uncond, perturbed, cond
                P[row] = torch.eye(P.shape[-1])
        return P @ v

    def combine(u, p, c):
        return u + scale * (c - u) + 3.0 * (c - p)

    context = torch.cat([uncond.expand_as(cond), cond, cond])
    theirs = oracle.run(reference, tiny.SCHEDULER, x, context, STEPS, attend, combine)
    error = difference(ours, theirs)
    record_property("PAG against its formula, relative", error)
    assert error <= 1e-5
    plain = denoise(x, DDIM(sd.schedule, STEPS), cfg(sd.network, uncond, cond, scale))
    assert difference(plain, theirs) > 0.01


def test_without_guidance_there_are_two_groups(pair):
    _, sd = pair
    cond, uncond = sd.encode_prompt(PROMPTS[:1]), sd.encode_prompt([""])
    assert [name for name, _ in pag(sd.network, uncond, cond, 1.0).groups] == ["perturbed", "cond"]
    assert pag(sd.network, uncond, cond, pag_scale=0.0).groups[-1][0] == "cond"


def test_beside_prompt_to_prompt(pair):
    """Its self-attention sites hold the middle one, too: with scale 0 the images are the same."""
    _, sd = pair
    sd.unet.attention = "sdpa"
    plain = minisd.edit_prompt(sd, *PROMPTS, steps=4, self_steps=1.0, **QUIET)
    rules = [partial(pag, pag_scale=scale) for scale in (0.0, 3.0)]
    none, some = (
        minisd.edit_prompt(sd, *PROMPTS, steps=4, self_steps=1.0, rule=rule, **QUIET)
        for rule in rules
    )
    pixels = [sd.pixels(images) for images in (plain, none, some)]
    assert (pixels[0] - pixels[1]).abs().max() <= 2.1 / 255
    assert (pixels[0] - pixels[2]).abs().max() > 0.05


def test_refusals(pair):
    _, sd = pair
    cond, uncond, x = sd.encode_prompt(PROMPTS[:1]), sd.encode_prompt([""]), sd.noise(3)
    saving = AttentionEdit(save_mean=torch.zeros(1, 16, 16))
    predict = pag(sd.network, uncond, cond, edits=lambda step: {MID[0]: saving})
    with pytest.raises(ValueError, match=f"{MID[0]} is edited and disturbed"):
        denoise(x, DDIM(sd.schedule, 2), predict)
    with pytest.raises(ValueError, match="no site is called"):
        denoise(x, DDIM(sd.schedule, 2), pag(sd.network, uncond, cond, sites=["middle"]))
    with pytest.raises(ValueError, match="scale of the perturbed guidance is '3'"):
        pag(sd.network, uncond, cond, pag_scale="3")
    with pytest.raises(ValueError, match="rule is 'pag', expected a function like cfg"):
        sd.txt2img("a", rule="pag")
    with pytest.raises(ValueError, match="rule has no effect here"):
        minisd.erase_concepts(sd, None, "a", "b", rule=pag)


def test_the_command(minisd_command, here, draw_again):
    how = ["--model", "tiny", "--steps", "3", "--seed", "4", "--pag", "3", "-o", "x.png"]
    code, _, err = minisd_command("txt2img", "a cat", *how)
    assert code == 0, err
    sd = minisd.load("tiny", device="cpu")
    (expected,) = sd.txt2img("a cat", steps=3, seed=4, rule=pag, **QUIET)
    assert draw_again("x.png") == ["again.png"]
    for name in ("x.png", "again.png"):
        assert Image.open(name).tobytes() == expected.tobytes()
    for command in (["erase", "a", "b"], ["invert", "x.png", "a"], ["edit", "a", "b"]):
        code, _, err = minisd_command(*command, "--pag", "nan")
        assert code == 2 and "--pag" in err
    code, _, err = minisd_command("erase", "a", "b", *how)
    assert code == 2 and "--pag: erasure has a rule of guidance of its own" in err
