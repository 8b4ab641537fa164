"""DDIM inversion, its refinement, the two remedies that need no optimisation, EDICT: against the
eager oracle."""

import dataclasses
import json
import os

import oracle_invert
import p2p_model
import pytest
import tiny
import torch
from oracle_p2p import Target
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd import DDIM, Inversion, Trace, cfg, conditional, edit_prompt, invert, latent_rgb, redraw
from minisd.editing.edict import edict, edict_denoise, edict_invert
from minisd.editing.inversion import (
    FORMAT,
    direct_inversion,
    negative_prompt_inversion,
    redraw_latents,
)
from minisd.editing.prompt_to_prompt import PromptToPrompt

SOURCE, SWAP = "a cat on my mat", "a dog on my mat"
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("invert"))


@pytest.fixture(scope="module")
def sd(pair):
    return pair[1]


def picture(seed=0, batch=1, height=32, width=32):
    return (
        torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    )


def far(ours, reference):
    """max |difference| / max |reference|."""
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


# ---- DDIM inversion
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, skip, refine, per_row",
    [(7, 0, 0, False), (1, 0, 0, True), (6, 2, 3, True), (50, 44, 1, False)],
)
def test_inversion_and_the_way_back_equal_the_oracle(pair, steps, skip, refine, per_row):
    """per_row: the oracle's UNet takes one timestep for each row (1-d), ours a single one (0-d)."""
    reference, sd = pair
    prompts, image = [SOURCE, "a red bird"], picture(1, 2, 24, 40)
    options = dict(steps=steps, skip=skip, refine=refine)
    ours = invert(sd, image, prompts, trajectory=True, **options, **QUIET)
    cond, z = sd.encode_prompt(prompts), sd.encode_image(image)
    assert (
        (ours.z == z).all()
        and (ours.trajectory[-1] == z).all()
        and (ours.trajectory[0] == ours.latents).all()
    )
    theirs = oracle_invert.invert(reference, tiny.SCHEDULER, z, cond, steps, refine, skip, per_row)
    assert len(ours.trajectory) == len(theirs) == steps - skip + 1
    assert all(far(mine, other) <= 1e-4 for mine, other in zip(ours.trajectory, reversed(theirs)))

    null, targets = sd.encode_prompt([""]), ["a dog", "a blue bird"]
    for prompt, guidance in ((None, 1.0), (None, 7.5), (targets, 7.5)):
        c = cond if prompt is None else sd.encode_prompt(prompt)
        back = oracle_invert.sample(
            reference, tiny.SCHEDULER, theirs[-1], null, c, steps, guidance, skip
        )
        z = redraw_latents(sd, ours, prompt, guidance=guidance, **QUIET)
        assert far(z, back[-1]) <= 1e-4
        images = redraw(sd, ours, prompt, guidance=guidance, **QUIET)
        assert [im.tobytes() for im in images] == [im.tobytes() for im in sd.decode(z)]


def test_refinement_leads_back(sd):
    """Each iteration comes nearer to the solution of prev(x_t) = x_s, and the plain inversion is
    not near it."""
    errors = []
    for refine in (0, 1, 2, 20):
        inversion = invert(sd, picture(2), SOURCE, steps=50, skip=42, refine=refine, **QUIET)
        errors.append(far(redraw_latents(sd, inversion, **QUIET), inversion.z))
    assert errors[0] > 0.01 and errors[3] < 1e-4 and errors == sorted(errors, reverse=True)


def test_a_fixed_point_calls_each_step_again_from_where_it_started(sd):
    """x <- step(start, eps(x)), 1 + refine times with the same step; written out it is `invert`."""
    image, cond = picture(13), sd.encode_prompt([SOURCE])
    ours = invert(sd, image, SOURCE, steps=4, refine=2, trajectory=True, **QUIET)
    predict, x, state, path = conditional(sd.unet, cond), ours.z, None, [ours.z]
    with torch.no_grad():
        for step in list(DDIM(sd.schedule, 4, inverse=True)):
            start, guesses = x, []
            for _ in range(3):
                eps, state = predict(x, step, state)
                x, x0 = step(start, eps)
                again, x0_again = step(start, eps)
                assert torch.equal(x, again) and torch.equal(x0, x0_again)
                guesses.append(x)
            assert not torch.equal(guesses[0], guesses[1])
            path.append(x)
    assert torch.equal(torch.stack(path[::-1]), ours.trajectory)


def test_the_noise_of_eta_is_a_function_of_seed_and_index(sd):
    """Skipped steps shift none of it, and no run takes of another's."""
    predict = cfg(sd.unet, *sd.encode_prompt(["", SOURCE]).split(1), 3.0)
    sampler, path = DDIM(sd.schedule, 5, eta=0.7, seed=3), []
    x = minisd.denoise(sd.noise(1), sampler, predict, lambda x, step: path.append(x) or x)
    assert torch.equal(minisd.denoise(sd.noise(1), sampler, predict), x)  # iterated again
    later = DDIM(sd.schedule, 5, skip=2, eta=0.7, seed=3)
    assert torch.equal(minisd.denoise(path[1], later, predict), x)
    other = minisd.denoise(sd.noise(1), dataclasses.replace(sampler, seed=4), predict)
    assert far(other, x) > 0.01
    steps = list(sampler)
    for a, b in zip(steps, sampler):
        assert torch.equal(a.noise(x), b.noise(x)) and torch.equal(a.noise(x), a.noise(x))
    for a, b in zip(steps[2:], later, strict=True):
        assert torch.equal(a.noise(x), b.noise(x))
    drawn = torch.stack([step.noise(x) for step in steps]).flatten(1)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.3  # another for each step
    eps = torch.ones_like(x)
    assert torch.equal(steps[1](x, eps)[0], steps[1](x, eps)[0])


def test_a_trace_sees_the_steps_in_the_order_of_the_run(sd):
    trace, back = (Trace(sd, view=latent_rgb) for _ in range(2))
    options = dict(steps=6, skip=1, trajectory=True, on_step=trace)
    inversion = invert(sd, picture(3), SOURCE, **options, **QUIET)
    assert [step.index for step in trace.steps] == [5, 4, 3, 2, 1]
    assert torch.equal(torch.stack(trace.latents[::-1]), inversion.trajectory[:-1])
    z = redraw_latents(sd, inversion, on_step=back, **QUIET)
    assert [step.index for step in back.steps] == [1, 2, 3, 4, 5]
    assert torch.equal(back.latents[-1], z) and len(redraw(sd, inversion, **QUIET)) == 1
    first = next(iter(DDIM(sd.schedule, 6, skip=1)))
    t = torch.tensor(first.t)
    with torch.no_grad():
        x, _ = first(inversion.latents, sd.unet(inversion.latents, t, sd.encode_prompt([SOURCE])))
    assert (back.latents[0] - x).abs().max() < 1e-5
    assert invert(sd, picture(3), SOURCE, steps=2, **QUIET).trajectory is None
    for run in (
        lambda **o: invert(sd, picture(3), SOURCE, **o),
        lambda **o: redraw(sd, inversion, **o),
    ):
        with pytest.raises(TypeError, match="visual_steps"):
            run(visual_steps=[0], **QUIET)


def test_what_on_step_returns_takes_the_latent_s_place(sd):
    """In an inversion and on the way back, as everywhere."""
    inversion = invert(
        sd, picture(3), SOURCE, steps=2, trajectory=True, on_step=lambda x, step: x + 1, **QUIET
    )
    plain = invert(sd, picture(3), SOURCE, steps=2, trajectory=True, **QUIET)
    assert torch.equal(inversion.trajectory[1], plain.trajectory[1] + 1)
    assert torch.equal(inversion.latents, inversion.trajectory[0])
    z = redraw_latents(sd, plain, on_step=lambda x, step: torch.zeros_like(x), **QUIET)
    assert z.eq(0).all()
    for run in (redraw, lambda sd, _, **o: invert(sd, picture(3), SOURCE, steps=2, **o)):
        with pytest.raises(ValueError, match="on_step returned int, expected None or latents"):
            run(sd, plain, on_step=lambda x, step: 3, **QUIET)


def test_the_mode_is_inverted_whatever_the_seed_and_pictures_are_resized(sd):
    image = Image.effect_noise((50, 41), 80).convert("RGB")
    torch.manual_seed(1)
    first = invert(sd, image, SOURCE, steps=2, **QUIET)
    torch.manual_seed(2)
    again = invert(sd, [image, image], SOURCE, steps=2, **QUIET)
    assert first.z.shape == (1, 4, 10, 12) and far(again.z[:1], first.z) < 1e-5 and len(again) == 2
    assert again.prompts == (SOURCE, SOURCE) and far(again[-1].latents, first.latents) < 1e-4
    sized = invert(sd, image, SOURCE, steps=1, height=24, width=32, **QUIET)
    assert sized.z.shape == (1, 4, 6, 8)


def test_half_precision_keeps_float32_latents(tmp_path, sd):
    p2p_model.load(tmp_path)
    half = minisd.load(tmp_path, device="cpu", dtype="bfloat16")
    inversion = invert(half, picture(4), SOURCE, steps=4, **QUIET)
    z = redraw_latents(half, inversion, **QUIET)
    assert inversion.latents.dtype == inversion.z.dtype == z.dtype == torch.float32
    assert edit_prompt(
        half, SOURCE, SWAP, **negative_prompt_inversion(half, inversion).edit_options(half), **QUIET
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(steps=0), "steps is 0"),
        (dict(skip=5), "skip is 5 of 5 steps"),
        (dict(refine=-1), "refine is -1"),
        (dict(refine=True), "refine is True"),
        (dict(prompt=["a", "b"]), "got 1 images and 2 prompts"),
        (dict(prompt=[]), "1 images and 0 prompts"),
        (dict(height=30), "only PIL images are resized"),
    ],
)
def test_bad_arguments_of_invert(sd, arguments, message):
    arguments = dict(image=picture(), prompt=SOURCE, steps=5) | arguments
    with pytest.raises(ValueError, match=message):
        invert(sd, **arguments, **QUIET)


# ---- negative-prompt and direct inversion, and editing
# -------------------------------------------------------------


def test_negative_prompt_inversion_makes_guidance_harmless_to_the_source(sd):
    inversion = invert(sd, picture(5, 2), [SOURCE, SWAP], steps=50, skip=44, **QUIET)
    unguided = redraw_latents(sd, inversion, **QUIET)
    negative = negative_prompt_inversion(sd, inversion)
    assert far(redraw_latents(sd, inversion, guidance=7.5, **QUIET), unguided) > 0.5
    assert far(redraw_latents(sd, negative, guidance=7.5, **QUIET), unguided) < 1e-3
    assert far(negative.uncond, sd.encode_prompt([SOURCE, SWAP])) < 1e-5


@pytest.mark.parametrize("method", ["ddim", "negative-prompt", "direct"])
def test_editing_an_inverted_picture_equals_the_oracle(pair, method):
    """Prompt-to-prompt on a real picture through `edit_options`, source and target rows."""
    reference, sd = pair
    steps, image = 5, picture(6)
    inversion = invert(sd, image, SOURCE, steps=steps, trajectory=True, **QUIET)
    if method == "negative-prompt":
        inversion = negative_prompt_inversion(sd, inversion)
    if method == "direct":
        inversion = direct_inversion(inversion)
    options = inversion.edit_options(sd)
    latents = []
    chained = options.pop("after")

    def after(x, step):
        latents.append(x if chained is None else chained(x, step))
        return latents[-1]

    edit_prompt(sd, SOURCE, SWAP, **options, after=after, **QUIET)

    cond, z = sd.encode_prompt([SOURCE, SWAP]), sd.encode_image(image)
    uncond = cond[:1] if method == "negative-prompt" else sd.encode_prompt([""])
    path = oracle_invert.invert(reference, tiny.SCHEDULER, z, cond[:1], steps)[::-1]
    lengths = [[len(word) for word in prompt.split()] for prompt in (SOURCE, SWAP)]
    targets = [Target([0, 1, 2, 3, 4], {None: (0, 4)}, (0, 2))]
    theirs = oracle_invert.edit(
        reference,
        tiny.SCHEDULER,
        path[0],
        uncond,
        cond,
        lengths,
        targets,
        steps,
        7.5,
        16,
        path if method == "direct" else None,
    )
    assert far(latents[-1], theirs) <= 1e-4
    assert far(theirs[1:], theirs[:1]) > 0.01
    if method == "direct":
        assert (latents[-1][:1] == inversion.z).all()


def test_direct_inversion_of_several_sources_in_one_batch(sd):
    """`after` puts back the rows that it is told to, and no other."""
    inversion = direct_inversion(
        invert(sd, picture(7, 2), [SOURCE, SWAP], steps=4, trajectory=True, **QUIET)
    )
    after, x = inversion.after(slice(None, None, 2)), torch.randn(4, 4, 8, 8)
    for step in DDIM(sd.schedule, 4):
        y = after(x, step)
        assert (y[::2] == inversion.trajectory[step.index + 1]).all() and (y[1::2] == x[1::2]).all()
    assert (redraw_latents(sd, inversion, guidance=7.5, **QUIET) == inversion.z).all()
    options = dict(steps=4, skip=2, trajectory=True)
    later = direct_inversion(invert(sd, picture(7), SOURCE, **options, **QUIET))
    first = next(iter(DDIM(sd.schedule, 4, skip=2)))
    assert (later.after()(x[:1], first) == later.trajectory[1]).all()
    assert (redraw_latents(sd, later, **QUIET) == later.z).all()
    with pytest.raises(ValueError, match="source row"):
        redraw(sd, inversion, "a bird", **QUIET)
    with pytest.raises(ValueError, match="got 2 images"):
        inversion.edit_options(sd)


def test_what_does_not_fit_is_refused(pair, tmp_path):
    _, sd = pair
    inversion = invert(sd, picture(8), SOURCE, steps=3, **QUIET)
    with pytest.raises(ValueError, match="direct inversion needs trajectory"):
        direct_inversion(inversion)
    with pytest.raises(
        ValueError, match="1 images and 2 prompts, expected one for all or one for each of the"
    ):
        redraw(sd, inversion, ["a", "b"], **QUIET)
    with pytest.raises(ValueError, match="skip=0"):
        invert(sd, picture(8), SOURCE, steps=3, skip=1, **QUIET).edit_options(sd)
    other = minisd.StableDiffusion(sd.tokenizer, sd.text_encoder, sd.unet, sd.vae, sd.schedule)
    other.schedule = minisd.NoiseSchedule.from_dict(tiny.SCHEDULER | {"steps_offset": 0})
    short = torch.zeros(1, 5, sd.unet.config.cross_attention_dim)
    with pytest.raises(
        ValueError, match=r"the embeddings are \(5, 24\) for each text, the model's are \(77, 24\)"
    ):
        redraw(sd, dataclasses.replace(inversion, uncond=short), **QUIET)
    for use in (
        redraw,
        lambda sd, inversion: inversion.edit_options(sd),
        negative_prompt_inversion,
    ):
        with pytest.raises(ValueError, match="made with another model"):
            use(other, inversion)


# ---- files ----


@pytest.fixture
def saved(sd, tmp_path):
    prompts = [SOURCE, "ein Vöglein"]
    inversion = invert(sd, picture(9, 2), prompts, steps=3, trajectory=True, **QUIET)
    inversion = negative_prompt_inversion(sd, inversion)
    inversion.save(tmp_path / "new" / "a.safetensors")
    return inversion, tmp_path / "new" / "a.safetensors"


def test_a_file_brings_back_the_inversion(sd, saved):
    inversion, path = saved
    again = Inversion.load(path)
    for name in ("prompts", "steps", "skip", "timesteps", "method", "guidance"):
        assert getattr(again, name) == getattr(inversion, name)
    assert again.tensors().keys() == inversion.tensors().keys()
    assert again.tensors().keys() == {"latents", "z", "trajectory", "uncond"}
    assert all((x == again.tensors()[name]).all() for name, x in inversion.tensors().items())
    z = redraw_latents(sd, inversion, **QUIET)
    assert (redraw_latents(sd, again, **QUIET) == z).all()
    inversion[1].save(path)  # replaces it; a view of a larger tensor
    assert Inversion.load(path).prompts == ("ein Vöglein",)


def test_a_file_is_written_whole_or_not_at_all(saved, monkeypatch):
    inversion, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        inversion.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        Inversion.load(path)


def parts_of(path):
    """The tensors, not mapped, and the metadata."""
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    return tensors, safe_open(path, "pt").metadata()


def test_a_bad_file_is_refused(saved):
    _, path = saved
    data, (tensors, about) = path.read_bytes(), parts_of(path)
    for broken in (data[:-9], data[:40], b"", b"\x89PNG" + bytes(60)):
        path.write_bytes(broken)
        refused(path, "cannot be read as safetensors")
    save_file(tensors, path)
    refused(path, "a.safetensors holds no minisd_inversion that minisd has saved")
    changes = {
        "missing .'z'.": {"z": None},
        "unknown .'y'.": {"y": tensors["z"].clone()},
        r"of another dtype .'z: torch.int64'.": {"z": tensors["z"].long()},
        "not finite .'latents'.": {"latents": tensors["latents"] * torch.nan},
        r"trajectory: got \(3, .*, expected a tensor \(4, 2, 4, 8, 8\)": {
            "trajectory": tensors["trajectory"][1:].contiguous()
        },
        r"latents: got \(1, ": {"latents": tensors["latents"][:1].contiguous()},
        r"uncond: got \(1, .*, expected a tensor \(2, L, D\)": {
            "uncond": tensors["uncond"][:1].contiguous()
        },
        "needs uncond": {"uncond": None},
        r"uncond: got \(3, 2, 0, 24\), expected a tensor \(3, 2, L, D\)": {
            "uncond": torch.zeros(3, 2, 0, 24)
        },
        "of another dtype .'latents: torch.float8_e4m3fn'": {
            "latents": tensors["latents"].to(torch.float8_e4m3fn)
        },
        "not finite .'trajectory'": {"trajectory": tensors["trajectory"] / 0},
        "unknown .'snapshot.٣'": {"snapshot.٣": tensors["latents"].clone()},
    }
    for message, change in changes.items():
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, path, about)
        refused(path, rf"a.safetensors is no complete minisd_inversion: .*{message}")


def test_a_bad_file_is_refused_by_what_it_says(saved):
    _, path = saved
    tensors, about = parts_of(path)
    texts = {
        "prompts: got 5, expected a tuple of str": {"prompts": 5},
        "prompts: got 'ab', expected a tuple of str": {"prompts": "ab"},
        "steps is 3.0, expected a whole number, at least 1": {"steps": 3.0},
        "skip is 0.5, expected a whole number from 0 to 2": {"skip": 0.5},
        "timesteps: got .*, expected a tuple of int": {"timesteps": [0, 1.5, 2]},
        "got 1 timesteps, expected one for each of 3 steps": {"timesteps": [0]},
        "guidance is 'x', expected a number from -1000 to 1000": {"guidance": "x"},
        "guidance is nan": {"guidance": float("nan")},
        r"guidance is 1e\+300, expected a number from -1000 to 1000": {"guidance": 1e300},
        "guidance is 10000.*, expected a number from -1000": {"guidance": 10**400},
        "the method is .*, expected one of ddim": {"method": ["ddim"]},
        r"z: got \(2, 4, 8, 8\), expected a tensor \(3, C, h, w\)": {"prompts": ["a", "b", "c"]},
    }
    for message, change in texts.items():
        save_file(tensors, path, {FORMAT: json.dumps(json.loads(about[FORMAT]) | change)})
        refused(path, f"a.safetensors is no complete minisd_inversion: {message}")
    save_file(tensors, path, {FORMAT: "[" * 100_000})
    refused(path, "a.safetensors cannot be read as safetensors: .*recursion")
    with pytest.raises(FileNotFoundError):
        Inversion.load(path.parent / "nothing.safetensors")


# ---- EDICT ----


@pytest.mark.parametrize("steps, strength", [(10, 0.8), (5, 1.0), (4, 0.2), (1, 1.0)])
def test_edict_equals_the_oracle(pair, steps, strength, monkeypatch):
    reference, sd = pair
    image = picture(10, 2, 24, 32)
    null, source, target = sd.encode_prompt(["", SOURCE, SWAP]).split(1)
    seen, decode = [], sd.decode
    monkeypatch.setattr(sd, "decode", lambda z: seen.append(z) or decode(z), raising=False)
    images = edict(sd, image, SOURCE, SWAP, steps=steps, strength=strength, **QUIET)
    [ours] = seen
    assert [im.tobytes() for im in images] == [im.tobytes() for im in decode(ours)]
    z = sd.encode_image(image)
    _, theirs = oracle_invert.edict(
        reference, tiny.SCHEDULER, z, null, source, target, steps, 3.0, int(steps * strength), 0.93
    )
    assert far(ours, theirs[0].float()) <= 1e-4
    if int(steps * strength) == 0:
        assert (ours == z).all()
    else:
        assert far(ours, z) > 0.01


def test_edict_is_exact(sd):
    """Under guidance, after 50 steps, with attention edits: what inversion without coupling
    cannot."""
    p2p = PromptToPrompt(sd, SOURCE, SWAP, steps=50)
    null, source, target = sd.encode_prompt(["", SOURCE, SWAP]).split(1)
    z = sd.encode_image(picture(11)).repeat(2, 1, 1, 1).double()
    predict = cfg(sd.unet, null, torch.cat([source, target]), 3.0, p2p)
    sampler = DDIM(sd.schedule, 50, skip=10)
    noise = edict_invert((z, z), DDIM(sd.schedule, 50, skip=10, inverse=True), predict)
    x, y = edict_denoise(noise, sampler, predict)
    assert far(x, z) < 1e-5 and far(y, z) < 1e-5
    assert far(noise[0], z) > 0.1 and far(noise[0], noise[1]) > 1e-3
    plain = invert(sd, picture(11), SOURCE, steps=50, skip=10, **QUIET)
    assert far(redraw_latents(sd, plain, guidance=3.0, **QUIET), plain.z) > 0.1


def test_edict_runs_its_steps_again_with_the_same_result(sd):
    """Steps are data: a list of them serves every run, both ways, and none leaves a trace."""
    null, source = sd.encode_prompt(["", SOURCE]).split(1)
    z = sd.encode_image(picture(12)).double()
    predict = cfg(sd.unet, null, source, 3.0)
    back, forth = (list(DDIM(sd.schedule, 4, inverse=way)) for way in (True, False))
    noise = edict_invert((z, z), back, predict)
    image = edict_denoise(noise, forth, predict)
    again = edict_invert((z, z), back, predict)
    assert all(torch.equal(a, b) for a, b in zip(again, noise))
    assert all(torch.equal(a, b) for a, b in zip(edict_denoise(again, forth, predict), image))
    assert back == list(DDIM(sd.schedule, 4, inverse=True)) and forth == list(DDIM(sd.schedule, 4))


def test_edict_refuses_steps_that_draw_noise(sd):
    z, predict = torch.zeros(1, 4, 8, 8).double(), conditional(sd.unet, sd.encode_prompt([SOURCE]))
    with pytest.raises(ValueError, match="draw noise.*expected those of DDIM with eta 0"):
        edict_denoise((z, z), DDIM(sd.schedule, 4, eta=0.5), predict)


def test_edict_refuses_a_mixing_that_cannot_be_undone(sd):
    for p in (0.5, 0.0, 1.1):
        with pytest.raises(ValueError, match="p is"):
            edict(sd, picture(), SOURCE, SWAP, p=p, **QUIET)


def test_null_text_has_a_guidance_and_latents_are_float32(sd):
    inversion = invert(sd, picture(8), SOURCE, steps=3, trajectory=True, **QUIET)
    made = dict(uncond=torch.zeros(1, 77, 24), losses=torch.zeros(3, 1, 1))
    with pytest.raises(ValueError, match="null-text inversion needs guidance, which is missing"):
        dataclasses.replace(inversion, method="null-text", **made)
    dataclasses.replace(inversion, method="null-text", guidance=3.0, **made)
    for name in ("latents", "z", "trajectory"):
        for dtype in (torch.float16, torch.float64):
            with pytest.raises(ValueError, match=f"{name}: got {dtype}, expected torch.float32"):
                dataclasses.replace(inversion, **{name: getattr(inversion, name).to(dtype)})
    of_any_kind = dataclasses.replace(inversion, uncond=torch.zeros(1, 77, 24).half())
    assert of_any_kind.uncond.dtype == torch.float16
