"""What all ways of drawing share: num_images, seed, latents, on_step, sizes and refusals mean the
same in each; what draws returns images, whatever the options."""

import dataclasses
from functools import partial

import numpy as np
import p2p_model
import pytest
import torch
from PIL import Image

import minisd
from minisd import Drawing, Recording
from minisd.drawing import Options, seeds

SOURCE, SWAP = "a cat on my mat", "a dog on my mat"
STEPS = 3
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("drawing"))[1]


@pytest.fixture(scope="module")
def recording(sd):
    return minisd.record(sd, SOURCE, steps=STEPS, seed=5, dtype=torch.float32, **QUIET)


def picture(seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask():
    white = np.zeros((32, 32), bool)
    white[4:28, 6:22] = True
    return white


# name -> (a call with the options that it shares, rows that are drawn of each image)
CALLS = {
    "txt2img": (lambda sd, _, **o: sd.txt2img(SOURCE, steps=STEPS, **o), 1),
    "ddim": (lambda sd, _, **o: sd.txt2img(SOURCE, steps=STEPS, sampler="ddim", **o), 1),
    "img2img": (lambda sd, _, **o: sd.img2img(picture(), SOURCE, 0.7, steps=STEPS, **o), 1),
    "blend": (lambda sd, _, **o: minisd.blend(sd, picture(), mask(), SOURCE, steps=STEPS, **o), 1),
    "erase, from noise": (
        lambda sd, _, **o: minisd.erase_concepts(sd, None, SOURCE, ["cat"], steps=STEPS, **o),
        1,
    ),
    "erase, an image": (
        lambda sd, _, **o: minisd.erase_concepts(
            sd, picture(), SOURCE, ["cat"], 0.7, steps=STEPS, **o
        ),
        1,
    ),
    "heatmap": (lambda sd, _, **o: minisd.heatmap(sd, SOURCE, steps=STEPS, **o)[0], 1),
    "edit_prompt": (lambda sd, _, **o: minisd.edit_prompt(sd, SOURCE, SWAP, steps=STEPS, **o), 2),
    "edit_prompt, all of it": (
        lambda sd, _, **o: minisd.edit_prompt(
            sd,
            SOURCE,
            SWAP,
            "a sad cat on my mat",
            steps=STEPS,
            cross_steps={"default": 0.7, "my": (0.3, 1)},
            reweight={"my": 2},
            local_blend=["cat", "dog", ("sad", "cat")],
            **o,
        ),
        3,
    ),
    "seed_baseline": (
        lambda sd, _, **o: minisd.seed_baseline(sd, SOURCE, SWAP, steps=STEPS, **o),
        2,
    ),
    "replay": (lambda sd, recording, **o: minisd.replay(sd, recording, SWAP, SOURCE, **o), 2),
}
every = pytest.mark.parametrize("call, rows", CALLS.values(), ids=CALLS)


@pytest.fixture
def drawn(sd, recording, monkeypatch):
    """draw(call, **options) -> (images, the latents that were decoded)."""
    decode = sd.decode

    def draw(call, **options):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(sd, "decode", lambda z: seen.append(z) or decode(z), raising=False)
            images = call(sd, recording, **QUIET, **options)
        [z] = seen
        return images, z

    return draw


def relative(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def levels(a, b):
    """The greatest difference of images, in 255ths."""
    pairs = zip(a, b, strict=True)
    return max(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() for x, y in pairs)


# num_images and seed


@every
def test_image_i_is_what_its_seed_draws_alone(drawn, call, rows):
    """Those of one prompt come first, and all prompts of an image have one seed."""
    images, z = drawn(call, num_images=2, seed=7)
    assert len(images) == len(z) == 2 * rows
    for i in range(2):
        alone, z_alone = drawn(call, seed=7 + i)
        assert len(alone) == rows and relative(z[i::2], z_alone) <= 1e-5
        assert levels(images[i::2], alone) <= 1
    assert relative(z[0::2], z[1::2]) > 0.01
    listed, z_listed = drawn(call, num_images=2, seed=[8, 7])
    assert relative(z_listed[0::2], z[1::2]) <= 1e-5 and relative(z_listed[1::2], z[0::2]) <= 1e-5


@every
def test_the_first_image_is_the_one_without_num_images(drawn, call, rows):
    """One image is one image, bit for bit, whether it is said or not."""
    (a, za), (b, zb) = drawn(call, num_images=1, seed=[7]), drawn(call, seed=7)
    assert torch.equal(za, zb) and levels(a, b) == 0


def test_images_of_several_prompts(sd, drawn):
    """Rows are prompt-major; without a shared noise the seeds go on from row to row."""
    prompts, negative = [SOURCE, SWAP], ["bad", "a hat"]
    options = dict(steps=STEPS, sampler="ddim")

    def several(sd, _, **o):
        return sd.txt2img(prompts, negative_prompt=negative, **options, **o)

    def redraws(sd, _, **o):
        return sd.img2img(
            [picture(1), picture(2)], prompts, 0.7, negative_prompt=negative, **options, **o
        )

    def blends(sd, _, **o):
        return minisd.blend(
            sd,
            [picture(1), picture(2)],
            [mask(), ~mask()],
            prompts,
            negative_prompt=negative,
            **options,
            **o,
        )

    def one(i):
        images = {"negative_prompt": negative[i], **options}
        return {
            several: lambda sd, _, **o: sd.txt2img(prompts[i], **images, **o),
            redraws: lambda sd, _, **o: sd.img2img(picture(1 + i), prompts[i], 0.7, **images, **o),
            blends: lambda sd, _, **o: minisd.blend(
                sd, picture(1 + i), mask() if i == 0 else ~mask(), prompts[i], **images, **o
            ),
        }

    for call in (several, redraws, blends):
        images, z = drawn(call, num_images=2, seed=3)
        assert len(images) == 4
        for row in range(4):
            alone, z_alone = drawn(one(row // 2)[call], seed=3 + row)
            assert relative(z[row : row + 1], z_alone) <= 1e-5
            assert levels(images[row : row + 1], alone) <= 1


@every
@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_images=0), "num_images is 0, expected a whole number, at least 1"),
        (dict(num_images=1.5), "num_images is 1.5"),
        (
            dict(num_images=2, seed=[1, 2, 3, 4, 5]),
            "got 5 seeds for 2 images, expected one for each",
        ),
        (dict(seed=[]), r"got seeds \[\]"),
        (dict(seed=0.5), "got seeds 0.5, expected a whole number or a list"),
        (dict(seed=b"1"), "got seeds b'1', expected a whole number or a list"),
        (dict(seed=True), "got seeds True, expected a whole number or a list"),
        (dict(seed=[False]), r"got seeds \[False\], expected a whole number or a list"),
        (dict(guidance=float("nan")), "guidance is nan, expected a number from -1000 to 1000"),
        (dict(sampler="euler"), "sampler is 'euler', expected one of 'dpm"),
        (dict(latents=[0.0]), "the latents are list, expected a tensor of floats"),
        (
            dict(latents=torch.zeros(7, 4, 8, 8)),
            r"the latents have shape \(7, 4, 8, 8\), expected \(1, ",
        ),
        (
            dict(latents=torch.zeros(1, 4, 8, 8).long()),
            r"the latents are torch.int64 \(1, 4, 8, 8\)",
        ),
        (
            dict(uncond=torch.zeros(1, 77, 24), negative_prompt="bad"),
            "got negative_prompt and uncond",
        ),
        (dict(uncond=[torch.zeros(1, 77, 24)] * (STEPS + 1)), "uncond is a list of 4 entries, exp"),
        (dict(uncond=()), "uncond is a list of 0 entries, expected one for each of 3 steps"),
        (dict(on_step=5), r"on_step is 5, expected a function \(x, step\)"),
        (dict(negative_prompt=["a", "b", "c", "d"]), "4 negative prompts, expected one for all"),
        (
            dict(on_step=lambda x, step: x[:0]),
            r"on_step returned \(0, 4, 8, 8\), expected None or latents",
        ),
    ],
)
def test_refusals_are_the_same_everywhere(sd, recording, call, rows, wrong, message):
    if "sampler" in wrong and call in (CALLS["ddim"][0],):
        return  # names its own
    with pytest.raises(ValueError, match=message):
        call(sd, recording, **QUIET, **wrong)


@every
def test_guidance_of_each_image(sd, drawn, call, rows):
    """Each row as in a batch of its scale; an edited row follows its source, of another one."""
    scales = [2.5, 7.3, 4.0, 1.0, 5.0, 6.0][: 2 * rows]
    _, z = drawn(call, num_images=2, seed=7, guidance=scales)
    edited = call in (CALLS["edit_prompt"][0], CALLS["edit_prompt, all of it"][0])
    for i in range(2 if edited else 2 * rows):
        _, alone = drawn(call, num_images=2, seed=7, guidance=scales[i])
        bar = 1e-5 if scales[i] == 1 else 0  # which a batch without guidance computes alone
        assert relative(z[i], alone[i]) <= bar, i
    assert relative(z[-1], drawn(call, num_images=2, seed=7, guidance=2.5)[1][-1]) > 0.01


@every
def test_a_scale_for_each_image_or_none(sd, recording, call, rows):
    with pytest.raises(ValueError, match=f"list of 9, expected one for each of {rows} images"):
        call(sd, recording, guidance=[3.0] * 9, **QUIET)
    with pytest.raises(ValueError, match="guidance is a list of 0, expected one for each image"):
        call(sd, recording, guidance=[], **QUIET)


@pytest.mark.parametrize("name", ["edit_prompt", "seed_baseline", "replay"])
def test_one_noise_for_all_prompts_of_a_seed(sd, drawn, name):
    """A list of seeds is a source and its targets for each of them."""
    call, rows = CALLS[name]
    images, z = drawn(call, seed=[3, 11])
    assert len(images) == 2 * rows
    for i, seed in enumerate((3, 11)):
        _, alone = drawn(call, seed=seed)
        assert relative(z[i::2], alone) <= 1e-5


# latents


@every
def test_latents_in_place_of_the_seed(sd, drawn, call, rows):
    """The noise (num_images, C, h, w), or for what has a noise for all its rows one for each."""
    _, z = drawn(call, num_images=2, seed=7)
    _, given = drawn(call, num_images=2, seed=7, latents=sd.noise(7, 2))
    assert torch.equal(given, z)
    _, other = drawn(call, num_images=2, seed=7, latents=sd.noise(70, 2))
    assert relative(other, z) > 0.01


@pytest.mark.parametrize("name", ["edit_prompt", "seed_baseline"])
def test_latents_of_each_row(sd, drawn, name):
    call, _ = CALLS[name]
    noise = sd.noise([1, 2, 3, 4])
    _, z = drawn(call, num_images=2, latents=noise)
    for i in range(2):
        _, pair = drawn(call, latents=noise[i::2])
        assert relative(z[i::2], pair) <= 1e-5


# on_step


@every
def test_on_step_sees_all_rows_after_each_step(drawn, call, rows):
    seen = []

    def on_step(x, step):
        seen.append((step.index, x.clone()))

    images, z = drawn(call, num_images=2, on_step=on_step)
    _, plain = drawn(call, num_images=2)
    assert torch.equal(z, plain)  # None changes nothing
    assert all(x.shape == (2 * rows, 4, 8, 8) for _, x in seen)
    assert seen[-1][0] == STEPS - 1
    indices = [index for index, _ in seen]
    assert indices == list(range(STEPS - len(indices), STEPS)) and len(indices) >= 2
    if call is CALLS["blend"][0]:  # its background is put back at last
        m = minisd.editing.blended.latent_mask(mask(), 8, 8)
        assert torch.equal(torch.where(m, z, 0), torch.where(m, seen[-1][1], 0))
    else:
        assert torch.equal(seen[-1][1], z)


@every
def test_what_on_step_returns_takes_the_latents_place(drawn, call, rows):
    _, z = drawn(call, num_images=2, on_step=lambda x, step: torch.full_like(x, 0.25))
    if call is CALLS["blend"][0]:
        m = minisd.editing.blended.latent_mask(mask(), 8, 8)
        z = torch.where(m, z, 0.25)
    assert z.eq(0.25).all() and len(z) == 2 * rows


# what comes back


@every
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_images=3, on_step=lambda x, step: None),
        dict(guidance=1, seed=[3]),
        dict(latents=torch.zeros(1, 4, 8, 8), negative_prompt="bad"),
        dict(uncond=[torch.zeros(1, 77, 24)] * STEPS),
    ],
)
def test_what_draws_returns_a_list_of_images(sd, recording, call, rows, options):
    images = call(sd, recording, **QUIET, **options)
    assert type(images) is list and len(images) == rows * options.get("num_images", 1)
    assert all(isinstance(image, Image.Image) and image.size == (32, 32) for image in images)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "replay"])
def test_a_size(sd, recording, name):
    images = CALLS[name][0](sd, recording, height=24, width=40, **QUIET)
    assert {image.size for image in images} == {(40, 24)}


def test_edict_and_redraw_return_images_too(sd):
    inversion = minisd.invert(sd, [picture(1), picture(2)], SOURCE, steps=2, **QUIET)
    for images in (
        minisd.redraw(sd, inversion, **QUIET),
        minisd.redraw(sd, inversion, SWAP, guidance=3.0, on_step=lambda x, step: None, **QUIET),
        minisd.edict(sd, [picture(1), picture(2)], SOURCE, SWAP, steps=2, **QUIET),
        minisd.edict(sd, [picture(1), picture(2)], SOURCE, SWAP, steps=2, strength=0, **QUIET),
    ):
        assert type(images) is list and len(images) == 2
        assert all(isinstance(image, Image.Image) for image in images)


def test_edict_takes_on_step_and_uncond(sd):
    def draw(**options):
        images = minisd.edict(sd, picture(1), SOURCE, SWAP, **{"steps": 5} | QUIET | options)
        return [image.tobytes() for image in images]

    seen = []
    plain = draw(on_step=lambda x, step: seen.append((x, step.index)))
    assert plain == draw() and [index for _, index in seen] == [1, 2, 3, 4]
    assert [image.tobytes() for image in sd.decode(seen[-1][0].float())] == plain
    assert draw(on_step=lambda x, step: 0 * x) == draw(on_step=lambda x, step: 0 * x, steps=6)
    bad = sd.encode_prompt(["bad"])
    assert draw(uncond=bad) == draw(negative_prompt="bad") != plain


def test_record_returns_a_recording_and_its_latent(sd, drawn):
    seen = []
    options = dict(steps=STEPS, seed=4, negative_prompt="bad", guidance=5.0, **QUIET)
    recording = minisd.record(sd, SOURCE, on_step=lambda x, step: seen.append(x), **options)
    assert type(recording) is Recording and recording.z.shape == (1, 4, 8, 8)
    assert recording.z.dtype == torch.float32 and torch.equal(seen[-1], recording.z)
    assert len(seen) == STEPS and recording.t.min() >= 0
    plain = sd.txt2img(SOURCE, sampler="ddim", **options)
    assert levels(sd.decode(recording.z), plain) <= 1
    given = minisd.record(sd, SOURCE, latents=sd.noise(4), **options | {"seed": 0})
    assert torch.equal(given.z, recording.z)
    with pytest.raises(ValueError, match=r"have shape \(2, 4, 8, 8\), expected \(1, "):
        minisd.record(sd, SOURCE, latents=sd.noise(4, 2), **options)


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_baseline_is_an_edit_without_effect(sd, num_images):
    options = dict(steps=STEPS, seed=3, num_images=num_images, **QUIET)
    baseline = minisd.seed_baseline(sd, SOURCE, SWAP, **options)
    edited = minisd.edit_prompt(sd, SOURCE, SWAP, cross_steps=0, self_steps=0, **options)
    assert levels(baseline, edited) == 0
    assert levels(baseline, minisd.edit_prompt(sd, SOURCE, SWAP, **options)) > 1


# options without effect, and unknown ones


HOW = {
    "negative_prompt": "bad",
    "uncond": torch.zeros(1, 77, 24),
    "steps": 2,
    "guidance": 2.0,
    "rule": partial(minisd.pag, sites=["up_blocks.1.attentions.0.transformer_blocks.0.attn1"]),
    "sampler": "ddim",
    "seed": 1,
    "num_images": 2,
    "height": 32,
    "width": 32,
    "latents": torch.zeros(1, 4, 8, 8),
    "on_step": lambda x, step: None,
    "progress": False,
}
WITHOUT = {
    "invert": (
        lambda sd, r, **o: minisd.invert(sd, picture(), SOURCE, **{"steps": 2} | QUIET | o),
        {
            *("negative_prompt", "uncond", "guidance", "rule"),
            *("sampler", "seed", "num_images", "latents"),
        },
    ),
    "redraw": (
        lambda sd, r, **o: minisd.redraw(
            sd, minisd.invert(sd, picture(), SOURCE, steps=2, **QUIET), **QUIET | o
        ),
        {"steps", "sampler", "seed", "num_images", "height", "width", "latents"},
    ),
    "edict": (
        lambda sd, r, **o: minisd.edict(sd, picture(), SOURCE, SWAP, **{"steps": 2} | QUIET | o),
        {"sampler", "seed", "num_images", "latents"},
    ),
    "record": (
        lambda sd, r, **o: minisd.record(sd, SOURCE, **{"steps": 2} | QUIET | o),
        {"num_images"},
    ),
    "replay": (
        lambda sd, r, **o: minisd.replay(sd, r, SWAP, **QUIET | o),
        {"steps", "height", "width"},
    ),
}


def test_the_options_are_the_fields():
    assert HOW.keys() == Options.__annotations__.keys()
    assert {field.name for field in dataclasses.fields(Drawing)} == HOW.keys()


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("method", WITHOUT)
def test_an_option_either_has_an_effect_or_is_refused(sd, recording, method, name):
    call, refused = WITHOUT[method]
    if name in refused:
        with pytest.raises(
            ValueError, match=f"{name} (has no effect here|is the recording's): got"
        ):
            call(sd, recording, **{name: HOW[name]})
    else:
        call(sd, recording, **{name: HOW[name]})


@every
@pytest.mark.parametrize(
    "name", ["stepz", "baseline", "visual_steps", "cross_step", "injection_ratio"]
)
def test_unknown_options_are_type_errors(sd, recording, call, rows, name):
    with pytest.raises(TypeError, match=name):
        call(sd, recording, **QUIET, **{name: 1})


@pytest.mark.parametrize("method", WITHOUT)
def test_unknown_options_are_type_errors_elsewhere(sd, recording, method):
    with pytest.raises(TypeError, match="stepz"):
        WITHOUT[method][0](sd, recording, stepz=1)


@pytest.mark.parametrize("name", ["cross_steps", "self_steps", "edit", "reweight", "local_blend"])
def test_a_baseline_takes_no_edit(sd, name):
    with pytest.raises(TypeError, match=name):
        minisd.seed_baseline(sd, SOURCE, SWAP, **{name: 0.5}, **QUIET)


def test_map_sites_without_maps(sd):
    for use in (
        lambda **o: minisd.PromptToPrompt(sd, SOURCE, SWAP, steps=2, **o),
        lambda **o: minisd.edit_prompt(sd, SOURCE, SWAP, steps=2, **QUIET, **o),
    ):
        with pytest.raises(ValueError, match="map_sites has no effect"):
            use(map_sites="up")


def test_options_are_checked_before_anything_is_drawn(sd, recording, monkeypatch):
    monkeypatch.setattr(type(sd.unet), "forward", None)
    for call, _ in CALLS.values():
        with pytest.raises(ValueError, match="guidance is 'x'"):
            call(sd, recording, guidance="x", **QUIET)


def test_an_unknown_option_is_named_beside_those_there_are(sd, recording):
    named = r"^got the option 'stepz', expected negative_prompt, .*, progress"
    with pytest.raises(TypeError, match=named + "$"):
        sd.txt2img(SOURCE, stepz=1)
    with pytest.raises(TypeError, match=named + ", cross_steps, .*, compat$"):
        minisd.edit_prompt(sd, SOURCE, SWAP, stepz=1)
    with pytest.raises(TypeError, match=named + ", cross_sites, self_sites, dtype, limit$"):
        minisd.record(sd, SOURCE, stepz=1)
    with pytest.raises(TypeError) as caught:
        minisd.invert(sd, picture(), SOURCE, stepz=1)
    assert "guidance" not in str(caught.value)  # which has no effect there


def test_unknown_arguments_of_a_local_blend(sd):
    for given, message in (
        ({"words": "cat", "start_blend": 1}, "'start_blend', expected words, subtract, threshold"),
        ({"start": 0.2}, "local_blend has no words: got start"),
    ):
        with pytest.raises(TypeError, match=message):
            minisd.edit_prompt(sd, SOURCE, SWAP, local_blend=given, steps=2, **QUIET)


def test_what_is_no_text_is_a_type_error(sd):
    for use, got in (
        (lambda: minisd.edit_prompt(sd, SOURCE, [SWAP], **QUIET), r"\['a dog on my mat'\]"),
        (lambda: minisd.PromptToPrompt(sd, SOURCE, 5, steps=2), "5"),
        (lambda: minisd.seed_baseline(sd, SOURCE, None, **QUIET), "None"),
        (lambda: sd.txt2img([SOURCE, 5], **QUIET), "5"),
        (lambda: sd.txt2img(SOURCE, negative_prompt=[b"bad"], **QUIET), "b'bad'"),
    ):
        with pytest.raises(TypeError, match=f"got {got} as one of the texts, expected a str"):
            use()


@every
def test_seeds_of_any_whole_number_and_any_sequence(drawn, call, rows):
    _, z = drawn(call, num_images=2, seed=[3, 4])
    for seed in (np.int64(3), range(3, 5), (np.int64(3), np.int64(4))):
        assert torch.equal(drawn(call, num_images=2, seed=seed)[1], z)


def test_a_list_of_redraw_has_the_inversion_s_steps(sd):
    inversion = minisd.invert(sd, picture(), SOURCE, steps=2, **QUIET)
    entry = torch.zeros(1, 77, 24)
    minisd.redraw(sd, inversion, guidance=2.0, uncond=[entry] * 2, **QUIET)
    with pytest.raises(ValueError, match="uncond is a list of 25 entries, expected one for each"):
        minisd.redraw(sd, inversion, guidance=2.0, uncond=[entry] * 25, **QUIET)


def test_maps_asked_for_twice_in_a_step(sd):
    """The step counts once, and what the steps before it have added stays."""
    maps = minisd.editing.maps.Maps(sd, [SOURCE], STEPS)
    for step in minisd.DDIM(sd.schedule, STEPS):
        maps(step)
        edits = maps(step)
        assert edits.keys() == maps.sums.keys() and maps.count == step.index + 1
        assert all(total.eq(step.index).all() for total in maps.sums.values())
        for total in maps.sums.values():
            total += 1


SEEDS = [0, 7, -1, 2**32 - 1, 2**63, 2**64 - 1, -(2**63)]


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32, np.uint8, np.int8])
def test_seeds_of_numpy_count_on_where_their_own_width_ends(kind):
    """255 of eight bits is followed by 256, not by 0."""
    top = int(np.iinfo(kind).max)
    rows = 2 if top < 2**64 - 1 else 1
    assert seeds(kind(top), rows) == list(range(top, top + rows))
    assert seeds([kind(top)]) == [top]


def test_what_is_no_seed_is_refused():
    odd = [True, False, [True], [0, False], np.bool_(True), np.array(3), np.array([3]), 1.0, "1"]
    odd += [2**64, -(2**63) - 1, [], [2**64], None, np.float64(3), torch.tensor(3), [np.array(1)]]
    for value in odd:
        with pytest.raises(ValueError, match="expected a whole number or a list of them"):
            seeds(value)
    with pytest.raises(ValueError, match="expected a whole number or a list of them"):
        seeds(2**64 - 1, 2)  # the second is none
    assert [seeds(seed) for seed in SEEDS] == [[seed] for seed in SEEDS]


def test_seeds_have_the_period_that_is_stated(sd):
    for seed in (0, 5, 2**31):
        noise = sd.noise(seed)
        assert torch.equal(noise, sd.noise(seed + 2**32))
        assert not torch.equal(noise, sd.noise(seed + 2**31))
