"""Concept erasure and semantic guidance: equal to the oracle, their limits, and what they
refuse."""

import inspect
from functools import partial

import numpy as np
import oracle_real
import pytest
import tiny
import torch
from PIL import Image

import minisd
from minisd.sampling.guidance import cfg, erase, sega
from minisd.sampling.loop import denoise
from minisd.sampling.samplers import DDIM, DPMpp2M

QUIET = dict(steps=4, progress=False)
CONCEPTS, WEIGHTS = ["a dog", "a red mat"], [2.5, -1.0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("erasure")
    return tiny.save(folder), minisd.load(folder, device="cpu")


@pytest.fixture(scope="module")
def sd(pair):
    return pair[1]


def picture(width=40, height=24, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def final(sd, monkeypatch, *arguments, **options):
    """The latents that erase_concepts decodes."""
    seen, decode = [], sd.decode
    with monkeypatch.context() as patch:
        patch.setattr(sd, "decode", lambda z: seen.append(z) or decode(z), raising=False)
        minisd.erase_concepts(sd, *arguments, progress=False, **options)
    return seen[0]


# parity


@pytest.mark.parametrize("guide", ["erase", "sega"])
@pytest.mark.parametrize("strength", [None, 0.6, 0.3])
@pytest.mark.parametrize("sampler", oracle_real.SCHEDULERS)
def test_equals_the_oracle(pair, sampler, strength, guide, monkeypatch, record_property):
    """Final latents within 1e-4, from noise (strength None) and from inside the schedule of a
    picture."""
    pipe, sd = pair
    options = (0.7, 6, 0.3, 0.6)
    names = ("threshold", "warmup", "momentum", "beta")
    ours = final(
        sd,
        monkeypatch,
        None if strength is None else picture(),
        "a cat",
        CONCEPTS,
        strength,
        WEIGHTS,
        seed=3,
        negative_prompt="bad",
        steps=10,
        guidance=4.0,
        sampler=sampler,
        height=24,
        width=40,
        guide=erase if guide == "erase" else partial(sega, **dict(zip(names, options))),
    )
    cond, uncond = pipe.encode_prompt(["a cat"], "cpu", 1, True, negative_prompt=["bad"])
    concepts = [pipe.encode_prompt([text], "cpu", 1, False)[0] for text in CONCEPTS]
    z0 = (
        None
        if strength is None
        else oracle_real.encode(pipe.vae, pipe.image_processor.preprocess(picture()))
    )
    run = partial(
        oracle_real.erase,
        pipe.unet,
        oracle_real.SCHEDULERS[sampler](tiny.SCHEDULER),
        z0,
        sd.noise(3, 1, 24, 40),
        uncond,
        cond,
        concepts,
        WEIGHTS,
        10,
        1.0 if strength is None else strength,
        4.0,
    )
    expected = run(None if guide == "erase" else options)
    difference = ((ours - expected).abs().max() / expected.abs().max()).item()
    record_property(f"{guide}, final latents", difference)
    assert difference <= 1e-4
    other = run(
        options if guide == "erase" else (0.7, 6, 0.0, 0.6)
    )  # the other guide, or no momentum
    assert (ours - other).abs().max() > 1e-3 * expected.abs().max()


def test_one_call_of_the_unet_with_two_rows_and_one_for_each_concept(sd):
    rows = []
    hook = sd.unet.conv_out.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    try:
        minisd.erase_concepts(sd, None, ["a", "b"], ["c", "d", "e"], **QUIET)
        minisd.erase_concepts(sd, picture(), "a", "c", 0.5, guide=partial(sega, warmup=0), **QUIET)
    finally:
        hook.remove()
    assert rows == [10] * 4 + [3] * 2


# limits


def test_nothing_erased_is_txt2img_and_img2img(sd):
    expected = sd.txt2img("a cat", seed=3, sampler="ddim", **QUIET)
    ours = minisd.erase_concepts(
        sd, None, "a cat", "a dog", erase_scale=0, seed=3, sampler="ddim", **QUIET
    )
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1
    expected = sd.img2img(picture(), ["a", "b"], 0.5, seed=3, **QUIET)
    ours = minisd.erase_concepts(sd, picture(), ["a", "b"], "a dog", 0.5, 0.0, seed=3, **QUIET)
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1
    erased = minisd.erase_concepts(sd, picture(), ["a", "b"], "a dog", 0.5, seed=3, **QUIET)
    assert np.abs(pixels(erased) - pixels(expected)).max() > 1


def test_without_a_step_to_run_the_picture_is_returned(sd):
    for strength, steps in ((0, 50), (0.09, 10)):
        images = minisd.erase_concepts(
            sd, picture(45, 27), ["a", "b"], "c", strength, steps=steps, progress=False
        )
        assert len(images) == 2 and all(
            image.tobytes() == picture(45, 27).tobytes() for image in images
        )
    [small] = minisd.erase_concepts(
        sd, picture(45, 27), "a", "c", 0, height=12, width=20, progress=False
    )
    assert small.size == (20, 12)


def test_strength_is_a_third_unless_it_is_given(sd):
    """0.3 of the steps, as published, with a picture; all of them without one."""
    seen = []
    minisd.erase_concepts(
        sd, picture(), "a", "b", steps=10, progress=False, on_step=lambda x, s: seen.append(s.index)
    )
    assert seen == [7, 8, 9]
    seen.clear()
    minisd.erase_concepts(
        sd, None, "a", "b", steps=3, progress=False, on_step=lambda x, s: seen.append(s.index)
    )
    assert seen == [0, 1, 2]


# semantic guidance


@pytest.fixture(scope="module")
def rows(sd):
    return sd.encode_prompt(["", "a cat", *CONCEPTS]).split([1, 1, 2])


def test_sega_without_its_extras_is_erase(sd, rows):
    x, plan = sd.noise(1, 2), DDIM(sd.schedule, 4)
    plain = denoise(x, plan, erase(sd.unet, *rows, 5.0, WEIGHTS))
    ours = denoise(x, plan, sega(sd.unet, *rows, 5.0, WEIGHTS, threshold=0, warmup=0, momentum=0))
    assert (plain - ours).abs().max() <= 1e-5 * plain.abs().max()


def test_the_weight_of_a_concept_is_one_whatever_the_guide():
    functions = (minisd.erase_concepts, erase, sega)
    assert {inspect.signature(each).parameters["erase_scale"].default for each in functions} == {
        10.0
    }


def test_sega_changes_only_the_largest_values_and_only_after_the_warmup(sd, rows):
    x, steps = sd.noise(1, 2), list(DDIM(sd.schedule, 4))
    predict = sega(sd.unet, *rows, 5.0, WEIGHTS[0], threshold=0.75, warmup=2, momentum=0)

    def eps(predict, step):
        return predict(x, step, None)[0]

    plain = cfg(sd.unet, *rows[:2], 5.0)
    changes = [(eps(predict, step) - eps(plain, step)).abs() > 1e-3 for step in steps]
    shares = [change.float().mean().item() for change in changes]
    assert shares[:2] == [0, 0] and all(
        0.25 <= share <= 0.5 for share in shares[2:]
    )  # a quarter for each concept
    one = sega(sd.unet, *rows[:2], rows[2][:1], 5.0, 2.5, threshold=0.75, warmup=0, momentum=0)
    change = (eps(one, steps[0]) - eps(plain, steps[0])).abs() > 1e-4
    assert (change.flatten(2).sum(dim=2) == 16).all()  # 16 of the 64 positions of every channel


def test_the_momentum_of_a_run_does_not_reach_the_next(sd, rows):
    predict = sega(sd.unet, *rows, 5.0, warmup=0, momentum=0.5)
    for plan in (DDIM(sd.schedule, 3), DPMpp2M(sd.schedule, 5, skip=2), DPMpp2M(sd.schedule, 1)):
        first, second = (denoise(sd.noise(1), plan, predict) for _ in range(2))
        assert torch.equal(first, second)


def test_two_runs_of_one_predictor_do_not_mix(sd, rows):
    """The momentum travels in the state of a run: drawn step by step in turn, two runs are what
    they are alone, and a state that is used twice gives the same twice."""
    predict = sega(sd.unet, *rows, 5.0, warmup=1, momentum=0.5)
    plan = DDIM(sd.schedule, 4)
    alone = [denoise(sd.noise(seed), plan, predict) for seed in (1, 2)]
    runs = [[sd.noise(seed), None, None] for seed in (1, 2)]  # x, x0, state
    mixed = [sd.noise(seed) for seed in (1, 2)]  # the same, with one state for both
    shared = None
    with torch.no_grad():
        for step in plan:
            for run in runs:
                x, x0, state = run
                eps, new = predict(x, step, state)
                again, _ = predict(x, step, state)
                assert torch.equal(eps, again)
                run[:] = (*step(x, eps, x0), new)
            for i, x in enumerate(mixed):
                eps, shared = predict(x, step, shared)
                mixed[i], _ = step(x, eps)
    assert all(torch.equal(run[0], x) for run, x in zip(runs, alone))
    assert (mixed[1] - alone[1]).abs().max() > 1e-3 * alone[1].abs().max()


def test_weights_lead_away_or_towards(sd, rows):
    x, step = sd.noise(1), list(DDIM(sd.schedule, 4))[1]
    plain, _ = cfg(sd.unet, *rows[:2], 5.0)(x, step, None)
    away, towards = (
        sega(sd.unet, *rows, 5.0, w, warmup=0, momentum=0)(x, step, None)[0] - plain
        for w in (3.0, -3.0)
    )
    assert (away + towards).abs().max() <= 1e-4 * away.abs().max() and away.abs().max() > 0.01


# refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(concepts=[]), r"got the concepts \[\], expected at least one text"),
        (
            dict(concepts=["a", " "]),
            r"got the concepts \['a', ' '\], expected at least one text, each",
        ),
        (dict(guide=partial(sega, warmup=4)), "warmup is 4, expected less than the 4 steps"),
        (dict(image=None, strength=0.5), "strength is 0.5, but there is no image"),
        (dict(strength=1.5), "strength is 1.5, expected a number from 0 to 1"),
        (
            dict(erase_scale=[1.0, 2.0]),
            r"erase_scale is \[1.0, 2.0\], expected one weight or one per concept \(1\)",
        ),
        (dict(erase_scale=float("nan")), "erase_scale is nan"),
        (dict(guidance=float("inf")), "guidance is inf, expected a number from -1000 to 1000"),
        (dict(guide=partial(sega, threshold=90)), "threshold is 90, expected a number from 0 to 1"),
        (
            dict(image=[picture()] * 2, prompt=["a"] * 3),
            "2 images and 3 prompts, expected one for all or one for each",
        ),
        (dict(prompt=[]), "0 prompts"),
        (dict(seed=[1, 2]), "2 seeds for 1 images"),
        (dict(image=[picture()] * 3, prompt=["a"] * 3, seed=[1, 2]), "2 seeds for 3 images"),
        (dict(image=None, seed=[1, 2]), "2 seeds for 1 images"),
        (dict(sampler="euler"), "sampler is 'euler'"),
    ],
)
def test_arguments_that_are_refused(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        minisd.erase_concepts(
            sd, **{"image": picture(), "prompt": "a", "concepts": "b"} | QUIET | arguments
        )


def test_concepts_are_texts(sd):
    with pytest.raises(TypeError, match="expected a text or a list of texts"):
        minisd.erase_concepts(sd, None, "a", None)
