"""The whole pipeline against diffusers' pipelines, both reading the same files; then what minisd
adds or refuses."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import scheduling_ddpm
from PIL import Image

import minisd
from minisd import drawing
from minisd.sampling.ddpm import DDPM
from minisd.viewing.images import to_pil, to_rgb

SCHEDULERS = {
    "dpm++": lambda: DPMSolverMultistepScheduler.from_config(
        tiny.SCHEDULER, use_karras_sigmas=True
    ),
    "dpm++ linspace": lambda: DPMSolverMultistepScheduler.from_config(tiny.SCHEDULER),
    "ddim": lambda: DDIMScheduler.from_config(tiny.SCHEDULER),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline and minisd's, of the same folder."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.save(folder), minisd.load(folder, device="cpu")


@pytest.fixture(scope="module")
def sd(pair):
    return pair[1]


def picture(width=40, height=24, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def values(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def assert_same(latents, expected, images, expected_images, record_property):
    """Latents within 1e-4 of the largest, pictures equal on 99.9 % of the values and nowhere
    further apart than 1."""
    assert latents.shape == expected.shape
    error = ((latents - expected).abs().max() / expected.abs().max()).item()
    difference = np.abs(values(images) - values(expected_images))
    record_property("pipeline, latents", error)
    record_property("pipeline, share of 8-bit values that differ", (difference != 0).mean())
    assert error <= 1e-4 and difference.max() <= 1 and (difference != 0).mean() <= 0.001


def final(latents):
    """An on_step that keeps the last latents, and leaves them alone."""
    return lambda x, step: latents.update(x=x)


# parity


@pytest.mark.parametrize("guidance", [1, 3, 7.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_txt2img_equals_diffusers(pair, sampler, guidance, record_property):
    pipe, sd = pair
    prompts, negatives = ["a red circle", "two dogs, oil on canvas"], ["blurry", ""]
    x = sd.noise(7, batch=2, height=24, width=40)
    arguments = dict(num_inference_steps=8, guidance_scale=guidance, height=24, width=40)
    pipe.scheduler = SCHEDULERS[sampler]()
    expected = pipe(
        prompts, negative_prompt=negatives, latents=x, output_type="latent", **arguments
    ).images
    pictures = pipe(prompts, negative_prompt=negatives, latents=x, **arguments).images

    last = {}
    images = sd.txt2img(
        prompts,
        negative_prompt=negatives,
        steps=8,
        guidance=guidance,
        sampler=sampler,
        latents=x,
        on_step=final(last),
        progress=False,
    )
    assert_same(last["x"], expected, images, pictures, record_property)
    assert (
        images[0].size == (40, 24) and values(images).std() > 20
    )  # not a flat or saturated picture


@pytest.fixture(scope="module")
def v_pair(tmp_path_factory):
    """The same of a folder whose network predicts v, and whose first level is noise alone."""
    folder = tmp_path_factory.mktemp("v")
    pipe = tiny.save(folder)
    config = tiny.SCHEDULER | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    config |= {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return pipe, config, minisd.load(folder, device="cpu")


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_v_prediction_equals_diffusers(v_pair, sampler, record_property):
    pipe, config, sd = v_pair
    kind, karras = type(SCHEDULERS[sampler]()), {"use_karras_sigmas": sampler == "dpm++"}
    pipe.scheduler = kind.from_config(config, **(karras if sampler != "ddim" else {}))
    x, last = sd.noise(7, batch=2), {}
    how = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "latent"}
    expected = pipe(["a red circle", "b"], latents=x, **how).images
    how = {"steps": 6, "guidance": 5.0, "sampler": sampler, "progress": False}
    sd.txt2img(["a red circle", "b"], latents=x, on_step=final(last), **how)
    assert sd.schedule.alphas_cumprod[-1] == 0
    error = ((last["x"] - expected).abs().max() / expected.abs().max()).item()
    record_property("v-prediction, pipeline", error)
    assert error <= 1e-5


@pytest.mark.parametrize("guidance", [1, 3, 7.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_img2img_equals_diffusers(pair, sampler, guidance, monkeypatch, record_property):
    pipe, sd = pair
    # diffusers samples the posterior from the generator that then draws the noise; minisd takes the
    # mode.
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    reference = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    reference.scheduler = SCHEDULERS[sampler]()
    reference.set_progress_bar_config(disable=True)
    image = picture(45, 26)  # not multiples of the VAE's factor

    def run(output_type):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return reference(
            "a red circle",
            image,
            strength=0.6,
            num_inference_steps=10,
            guidance_scale=guidance,
            negative_prompt="bad",
            num_images_per_prompt=2,
            generator=generators,
            output_type=output_type,
        ).images

    last = {}
    images = sd.img2img(
        image,
        "a red circle",
        0.6,
        negative_prompt="bad",
        steps=10,
        guidance=guidance,
        sampler=sampler,
        seed=5,
        num_images=2,
        on_step=final(last),
        progress=False,
    )
    assert_same(last["x"], run("latent"), images, run("pil"), record_property)
    assert images[0].size == (44, 24)


def test_prompts_and_pictures_are_encoded_as_by_diffusers(pair):
    pipe, sd = pair
    texts = ["a red circle left of a small blue square", "", "Zürich, 雪 🎨" * 40]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last prompt is cut
        ours = sd.encode_prompt(texts)
        reference, _ = pipe.encode_prompt(texts, "cpu", 1, False)
    assert (
        ours.shape == (3, 77, 24) and (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
    )

    image = picture(45, 26)
    posterior = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist
    for ours, reference in (
        (sd.encode_image(image), posterior.mode()),
        (
            sd.encode_image(image, torch.Generator().manual_seed(3)),
            posterior.sample(torch.Generator().manual_seed(3)),
        ),
    ):
        reference = reference * 0.18215
        assert (
            ours.shape == (1, 4, 6, 11)
            and (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
        )


def test_the_parts_joined_by_hand_are_txt2img(sd):
    null, cond = sd.encode_prompt(["", "a red circle"]).split(1)
    z = minisd.denoise(
        sd.noise(seed=3), minisd.DPMpp2M(sd.schedule, 4), minisd.cfg(sd.unet, null, cond)
    )
    assert (
        values(sd.decode(z)) == values(sd.txt2img("a red circle", steps=4, seed=3, progress=False))
    ).all()


# rows, seeds and pictures


def test_the_same_seed_gives_the_same_bits(sd):
    first, second = (
        [*sd.txt2img("a", steps=5, seed=11, num_images=2, progress=False)] for _ in range(2)
    )
    assert (values(first) == values(second)).all()
    assert (values(first[:1]) != values(first[1:])).mean() > 0.5


def test_picture_i_is_drawn_with_seed_plus_i(sd):
    assert torch.equal(sd.noise(5, batch=3), torch.cat([sd.noise(5), sd.noise(6), sd.noise(7)]))
    assert torch.equal(sd.noise(5, batch=3), sd.noise([5, 6, 7])) and torch.equal(
        sd.noise([5], batch=1), sd.noise(5)
    )
    with pytest.raises(ValueError, match="got 2 seeds for 3 images, expected one for each"):
        sd.noise([1, 2], batch=3)
    for batch in (0, 1.0, "3"):
        with pytest.raises(ValueError, match="batch is .*, expected a whole number, at least 1"):
            sd.noise(0, batch=batch)
    assert torch.equal(sd.noise([5, 9]), torch.cat([sd.noise(5), sd.noise(9)]))
    assert torch.equal(
        sd.noise(5), torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    )

    drawn = {}
    sd.txt2img(
        ["a", "b"],
        negative_prompt=["c", "d"],
        steps=3,
        seed=5,
        num_images=2,
        progress=False,
        on_step=final(drawn),
    )
    alone = {}
    for i, (prompt, negative) in enumerate([("a", "c"), ("a", "c"), ("b", "d"), ("b", "d")]):
        how = {"steps": 3, "seed": 5 + i, "progress": False, "on_step": final(alone)}
        sd.txt2img(prompt, negative_prompt=negative, **how)
        assert (drawn["x"][i] - alone["x"][0]).abs().max() <= 1e-4 * alone["x"].abs().max()


def test_given_latents_stand_in_for_the_seed(sd):
    x = sd.noise(3, height=16, width=32)
    given = sd.txt2img("a", steps=3, seed=99, latents=x, progress=False)
    assert (
        values(given)
        == values(sd.txt2img("a", steps=3, seed=3, height=16, width=32, progress=False))
    ).all()
    image = picture(32, 16)
    given = sd.img2img(image, "a", steps=3, latents=x, progress=False)
    assert (values(given) == values(sd.img2img(image, "a", steps=3, seed=3, progress=False))).all()


def test_one_picture_for_each_prompt(sd):
    images = [picture(seed=1), picture(seed=2)]
    both, alone = {}, {}
    sd.img2img(images, ["a", "b"], steps=4, seed=5, progress=False, on_step=final(both))
    sd.img2img(images[1], "b", steps=4, seed=6, progress=False, on_step=final(alone))
    assert (both["x"][1] - alone["x"][0]).abs().max() <= 1e-4 * alone["x"].abs().max()


def test_guidance_1_computes_no_unconditional_half(sd):
    rows = []
    hook = sd.unet.conv_out.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    try:
        sd.txt2img("a", negative_prompt="b", steps=3, guidance=1, progress=False)
        sd.txt2img("a", negative_prompt="b", steps=3, guidance=1.5, progress=False)
    finally:
        hook.remove()
    assert rows == [1, 1, 1, 2, 2, 2]


def test_on_step_sees_each_step_and_may_replace_the_latents(sd):
    seen = []
    sd.txt2img(
        "a",
        steps=4,
        progress=False,
        on_step=lambda x, step: seen.append((step.index, tuple(x.shape))),
    )
    assert seen == [(i, (1, 4, 8, 8)) for i in range(4)]
    seen.clear()
    sd.img2img(
        picture(),
        "a",
        0.5,
        steps=4,
        progress=False,
        on_step=lambda x, step: seen.append(step.index),
    )
    assert seen == [2, 3]
    replaced = sd.txt2img(
        "a", steps=4, progress=False, on_step=lambda x, step: torch.full_like(x, 0.1)
    )
    assert (values(replaced) == values(sd.decode(torch.full((1, 4, 8, 8), 0.1)))).all()
    wide = sd.txt2img(
        "a", steps=4, progress=False, on_step=lambda x, step: torch.full_like(x, 0.1).double()
    )
    assert (values(wide) == values(replaced)).all()


def test_strength_0_returns_the_picture(sd):
    image = picture(45, 26)
    for strength, steps in ((0, 25), (0.09, 10)):  # of 10 steps, 0.09 leaves none to run
        images = sd.img2img(image, ["a", "b"], strength, steps=steps, num_images=2, progress=False)
        assert len(images) == 4 and all(each.tobytes() == image.tobytes() for each in images)
    pair = sd.img2img([image, picture(9, 10)], ["a", "b"], 0, num_images=2, progress=False)
    assert [each.size for each in pair] == [(45, 26)] * 2 + [(9, 10)] * 2
    [small] = sd.img2img(
        image, "a", 0, height=24, width=44, progress=False
    )  # with a size, resized to that
    assert small.tobytes() == image.resize((44, 24), Image.Resampling.LANCZOS).tobytes()


def test_progress_is_a_bar_on_stderr(sd, capsys):
    sd.txt2img("a", steps=3)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err
    sd.txt2img("a", steps=3, progress=False)
    assert capsys.readouterr() == ("", "")


# pictures, dtypes


def test_any_picture_becomes_rgb_as_a_viewer_shows_it():
    rgb = picture(6, 4)
    assert (np.asarray(to_rgb(rgb)) == np.asarray(rgb)).all()

    clear = np.zeros((2, 3, 4), np.uint8)  # black, but wholly transparent except for one red pixel
    clear[0, 0] = 255, 0, 0, 255
    for image in (Image.fromarray(clear), Image.fromarray(clear).quantize(4)):
        shown = np.asarray(to_rgb(image))
        assert tuple(shown[0, 0]) == (255, 0, 0) and (shown[1] == 255).all()

    deep = to_rgb(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)))
    assert deep.mode == "RGB" and np.asarray(deep)[0, :, 0].tolist() == [0, 100, 255]

    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6  # the camera was held upright
    turned.info["exif"] = turned.getexif().tobytes()
    assert to_rgb(turned).size == (4, 6)

    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "HSV"):
        assert to_rgb(rgb.convert(mode)).mode == "RGB"
    with pytest.raises(ValueError, match="mode F"):
        to_rgb(rgb.convert("F"))
    with pytest.raises(TypeError, match="got a str, expected a PIL image"):
        to_rgb("out.png")


def test_decode_gives_pictures_or_a_tensor_that_encode_takes(sd, monkeypatch):
    z = sd.encode_image(picture())
    tensor = sd.decode(z, as_tensor=True)
    assert tensor.shape == (1, 3, 24, 40) and tensor.abs().max() <= 1
    assert (values(to_pil(tensor)) == values(sd.decode(z))).all()
    assert sd.encode_image(tensor).shape == z.shape
    for bad in ("nan", "inf", "-inf"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ArithmeticError, match="NaN or infinite"),
        ):
            broken = torch.full((1, 3, 8, 8), float(bad))
            patch.setattr(sd.vae, "decode", lambda z, broken=broken: broken)
            sd.decode(z)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_much_the_same_picture(pair, dtype, tmp_path):
    tiny.save(tmp_path)
    half = minisd.load(tmp_path, device="cpu", dtype=dtype)
    assert half.dtype == getattr(torch, dtype) and half.noise(0).dtype == half.dtype
    ours, full = (values(sd.txt2img("a", steps=3, progress=False)) for sd in (half, pair[1]))
    assert np.abs(ours - full).mean() < 8
    assert half.to(dtype=torch.float32) is half and half.dtype == torch.float32


def test_the_models_are_for_inference(sd):
    for model in (sd.unet, sd.vae, sd.text_encoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    # The embeddings of a prompt are an ordinary tensor: null-text inversion optimises one.
    assert not sd.encode_prompt(["a"]).is_inference()


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=[]), "0 prompts"),
        (
            dict(prompt=["a", "b"], negative_prompt=["c", "d", "e"]),
            "2 prompts and 3 negative prompts",
        ),
        (dict(sampler="euler"), "'euler', expected one of 'dpm..', 'dpm.. linspace', 'ddim'"),
        (dict(steps=0), "steps is 0, expected a whole number, at least 1"),
        (dict(steps=1001), "steps is 1001, expected a whole number from 1 to 1000"),
        (dict(height=30), "32 x 30 pixels, expected positive multiples of 4"),
        (dict(width=0), "0 x 32 pixels"),
        (dict(guidance=float("nan")), "guidance is nan"),
        (dict(num_images=0), "num_images is 0"),
        (dict(seed=2**64), "from -2..63 to 2..64 - 1"),
        (dict(seed=None), "got seeds None, expected a whole number or a list"),
        (dict(seed=1.5), "got seeds 1.5"),
        (dict(seed=[1.7]), r"got seeds \[1.7\]"),
        (dict(seed=[]), r"got seeds \[\]"),
        (dict(height=32.0), "32 x 32.0 pixels"),
        (
            dict(height=20_000, width=4000),
            r"4000 x 20000 pixels, expected at most 4,194,304 in all: give a smaller size",
        ),
        (
            dict(latents=torch.zeros(1, 1).expand(1, 4, 2052 // 4, 2048 // 4)),
            "2048 x 2052 pixels, expected at most",
        ),
        (dict(num_images=2.0), "num_images is 2.0"),
        (dict(guidance="7"), "guidance is '7', expected a number from -1000 to 1000"),
        (dict(sampler=["ddim"]), r"sampler is \['ddim'\], expected one of"),
        (dict(latents=torch.zeros(1, 4, 8, 8, dtype=torch.int64)), "latents are torch.int64"),
        (dict(latents=np.zeros((1, 4, 8, 8))), "latents are ndarray, expected a tensor of floats"),
        (
            dict(on_step=lambda x, step: x[:, :2]),
            r"on_step returned \(1, 2, 8, 8\), expected None or .* \(1, 4, 8, 8\)",
        ),
        (dict(on_step=lambda x, step: 3), "on_step returned int"),
        (dict(seed=[1, 2]), "2 seeds for 1 images, expected one for each"),
        (dict(latents=torch.zeros(2, 4, 8, 8)), r"shape \(2, 4, 8, 8\), expected \(1, 4, 8, 8\)"),
        (dict(latents=torch.zeros(1, 4, 8, 8), height=16), r"expected \(1, 4, 4, 8\)"),
    ],
)
def test_txt2img_refuses(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.txt2img(**{"prompt": "a", "steps": 2, "progress": False} | arguments)


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (picture(), dict(strength=1.5), "strength is 1.5, expected a number from 0 to 1"),
        (picture(), dict(strength=-0.1), "strength is -0.1"),
        (picture(), dict(strength="0.5"), "strength is '0.5'"),
        (picture(), dict(steps="4"), "steps is '4', expected a whole number, at least 1"),
        ([], {}, "empty list, expected at least one image"),
        (torch.zeros(0, 3, 8, 8), {}, r"expected floats \(B, 3, H, W\)"),
        (
            [picture()] * 3,
            {},
            "1 prompts and 3 images, expected one for all or one for each of the prompts",
        ),
        (picture(3, 40), {}, "the image is 3 x 40 pixels, expected at least 4 x 4"),
        (picture(), dict(width=41), "41 x 24 pixels"),
        (
            Image.new("RGB", (4000, 3000)),
            {},
            "4000 x 3000 pixels, expected at most 4,194,304 in all",
        ),
        (
            torch.zeros(1, 1, 1).expand(1, 3, 4000, 3000),
            {},
            "3000 x 4000 pixels, expected at most 4,194,304 in all",
        ),
        (torch.zeros(1, 3, 8, 10), {}, "10 x 8 pixels"),
        (torch.zeros(1, 3, 8, 8), dict(height=16), "only PIL images are resized"),
        (torch.zeros(3, 8, 8), {}, r"expected floats \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, "torch.uint8 tensor"),
        (torch.full((1, 3, 8, 8), 255.0), {}, "values from 255 to 255"),
    ],
)
def test_img2img_refuses(sd, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.img2img(image, "a", **{"steps": 4, "progress": False} | arguments)


def test_a_large_picture_is_scaled_by_a_size(sd):
    [image] = sd.img2img(
        Image.new("RGB", (4000, 3000)), "a", steps=2, height=24, width=32, progress=False
    )
    assert image.size == (32, 24) and sd.latent_size(2048, 2048) == (512, 512)


def test_memory_that_is_not_there(sd, monkeypatch):
    """Torch's own error, of more bytes than there are addresses, where each model runs."""

    def greedy(*arguments, **options):
        return torch.empty(2**60)

    def fails(*arguments, **options):
        raise RuntimeError("another fault")

    z, size = (
        sd.noise(0, height=24, width=40),
        "not enough memory for images of 40 x 24: try a smaller size",
    )
    inversion = minisd.invert(sd, picture(), "a", steps=2, trajectory=True, progress=False)
    for part, name, run, message in (
        (
            sd.unet,
            "forward",
            lambda: minisd.invert(sd, picture(), "a", steps=2, progress=False),
            "memory for latents of",
        ),
        (
            sd.unet,
            "forward",
            lambda: minisd.redraw(sd, inversion, progress=False),
            "memory for latents of",
        ),
        (
            sd.unet,
            "forward",
            lambda: minisd.null_text(sd, inversion, progress=False),
            "memory for latents of",
        ),
        (sd.vae, "encode", lambda: sd.encode_image(picture()), size),
        (sd.vae, "decode", lambda: sd.decode(z), size),
        (
            sd.unet,
            "forward",
            lambda: sd.txt2img("a", latents=z, progress=False),
            "memory for latents of 10 x 6: try",
        ),
    ):
        with monkeypatch.context() as patch, pytest.raises(MemoryError, match=message):
            patch.setattr(part, name, greedy)
            run()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="another fault"):
            patch.setattr(part, name, fails)
            run()


def test_latents_have_a_batch_and_channels(sd):
    for shape in ((4, 8, 8), (1, 3, 8, 8)):
        with pytest.raises(
            ValueError, match=rf"latents: got \({shape[0]}, .*, expected a tensor \(B, 4, h, w\)"
        ):
            sd.decode(torch.zeros(shape))


def test_no_device_and_no_dtype_is_not_the_present_one(sd):
    with pytest.raises(ValueError, match="device 'meta' cannot be used here: it holds no values"):
        sd.to("meta")
    with pytest.raises(ValueError, match="device '' cannot be used here"):
        sd.to("")
    for dtype in ("", ["float32"]):
        with pytest.raises(ValueError, match="dtype is .*, expected one of"):
            sd.to(dtype=dtype)


@pytest.mark.parametrize(
    "texts", [dict(prompt=None), dict(prompt=3), dict(prompt="a", negative_prompt=None)]
)
def test_texts_are_strings(sd, texts):
    with pytest.raises(TypeError, match="got (None|3), expected a text or a list of texts"):
        sd.txt2img(**texts)


def test_a_model_without_a_size_of_its_own_wants_to_be_told(sd, monkeypatch):
    monkeypatch.setattr(sd.unet, "config", dataclasses.replace(sd.unet.config, sample_size=None))
    assert sd.txt2img("a", steps=1, height=16, width=24, progress=False)[0].size == (24, 16)
    with pytest.raises(ValueError, match="names no size .*: give height and width"):
        sd.txt2img("a", height=16)
    with pytest.raises(ValueError, match="give the latents' size"):
        sd.unet.sites(max_tokens=9)


def test_samplers_are_called_by_name():
    assert set(drawing.SAMPLERS) == {*SCHEDULERS, "ddpm"}


def test_ddpm_equals_diffusers(pair, monkeypatch, record_property):
    """With the noise of each image's seed, at every step."""
    pipe, sd = pair
    seeds = (7, 3)
    steps = list(DDPM(sd.schedule, 8, seed=seeds))
    x = sd.noise(seeds, 2, 24, 40)
    noises = iter([step.noise(x) for step in steps])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noises))
    pipe.scheduler = DDPMScheduler.from_config(tiny.SCHEDULER)
    prompts = ["a red circle", "two dogs"]
    expected = pipe(
        prompts, latents=x, num_inference_steps=8, height=24, width=40, output_type="latent"
    ).images
    last = {}
    how = dict(steps=8, sampler="ddpm", height=24, width=40, progress=False)
    sd.txt2img(prompts, seed=seeds, on_step=final(last), **how)
    error = ((last["x"] - expected).abs().max() / expected.abs().max()).item()
    record_property("pipeline, DDPM, latents", error)
    assert error <= 1e-4
    sd.txt2img(prompts[1], seed=3, on_step=final(alone := {}), **how)
    torch.testing.assert_close(alone["x"], last["x"][1:], rtol=0, atol=1e-4)


def test_ddpm_is_refused_where_no_noise_may_be(sd):
    for draw in (minisd.heatmap, minisd.record):
        with pytest.raises(ValueError, match="sampler is 'ddpm', expected one without noise here"):
            draw(sd, "a", sampler="ddpm", steps=2, progress=False)


def test_a_prompt_and_its_edit_have_the_same_noise(sd):
    how = dict(sampler="ddpm", steps=4, height=16, width=16, progress=False, num_images=2)
    images = values(minisd.edit_prompt(sd, "a cat", "a cat", **how))
    assert np.array_equal(images[:2], images[2:]) and not np.array_equal(images[0], images[1])
