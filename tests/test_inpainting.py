"""Inpainting models: against diffusers' pipeline on a random model of 9 channels; what stays, what
is refused, and the same from a single file."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from test_pipeline import SCHEDULERS

import minisd
from minisd.checkpoints import load as checkpoint

HOW = {"steps": 5, "progress": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline and minisd's of one folder, whose UNet takes 9 channels."""
    folder = tmp_path_factory.mktemp("inpainting")
    pipe = tiny.save(folder)
    unet = tiny.randomise(UNet2DConditionModel(**tiny.UNET, in_channels=9), 9)
    unet.save_pretrained(folder / "unet")
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = StableDiffusionInpaintPipeline(
        **parts, **others, unet=unet, scheduler=SCHEDULERS["ddim"]()
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs, minisd.load(folder, device="cpu")


@pytest.fixture(scope="module")
def sd(pair):
    return pair[1]


def image(width=40, height=24, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask(width=40, height=24):
    """White in a ragged part: no edge lies on the grid of the latents."""
    white = np.zeros((height, width), np.uint8)
    white[3:17, 9:31] = 255
    white[11:22, 27:38] = 255
    return Image.fromarray(white)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_inpaint_equals_diffusers(pair, sampler, strength, monkeypatch, record_property):
    pipe, sd = pair
    monkeypatch.setattr(  # diffusers draws from the posterior, minisd takes its mode
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    pipe.scheduler, noise = SCHEDULERS[sampler](), sd.noise(3, 2, 24, 40)
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint.randn_tensor",
        lambda shape, **_: noise,
    )
    theirs = pipe(
        ["a dog", "a red cat"],
        image=image(),
        mask_image=mask(),
        height=24,
        width=40,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    ours = {}
    options = {"sampler": sampler, "guidance": 4.0, "latents": noise, **HOW}
    minisd.inpaint(
        *(sd, image(), mask(), ["a dog", "a red cat"], strength),
        on_step=lambda x, step: ours.update(x=x),
        **options,
    )
    error = ((ours["x"] - theirs).abs().max() / theirs.abs().max()).item()
    record_property("inpainting, diffusers", error)
    assert error <= 1e-5


def test_what_the_mask_does_not_cover_stays(sd):
    [out] = minisd.inpaint(sd, image(), mask(), "a dog", **HOW)
    white = np.asarray(mask()) >= 128
    assert (np.asarray(out)[~white] == np.asarray(image())[~white]).all()
    assert (np.asarray(out)[white] != np.asarray(image())[white]).any()
    [bare] = minisd.inpaint(sd, image(), mask(), "a dog", paste_back=False, **HOW)
    assert (np.asarray(bare)[~white] != np.asarray(image())[~white]).any()
    kept = minisd.inpaint(sd, image(), mask(), "a dog", 0.0, num_images=2, **HOW)
    assert len(kept) == 2 and all(each.tobytes() == image().tobytes() for each in kept)


def test_rows_are_what_they_are_alone(sd):
    images, masks = [image(), image(seed=1)], [mask(), mask().rotate(180)]
    both = minisd.inpaint(sd, images, masks, ["a dog", "a cat"], seed=[5, 6], **HOW)
    for i, (each, own, prompt) in enumerate(zip(images, masks, ["a dog", "a cat"])):
        [alone] = minisd.inpaint(sd, each, own, prompt, seed=5 + i, **HOW)
        assert np.abs(np.asarray(alone, int) - np.asarray(both[i], int)).max() <= 1


def test_other_models_and_other_methods_are_refused(sd, original):
    with pytest.raises(ValueError, match="takes 4 channels, an inpainting model's 9: expected"):
        minisd.inpaint(minisd.load(original, device="cpu"), image(), mask(), "a", **HOW)
    with pytest.raises(ValueError, match=r"minisd.inpaint draws with it.*got \(1, 4, 8, 8\)"):
        sd.txt2img("a", **HOW)


def test_a_single_file_shows_its_channels(tmp_path, monkeypatch):
    """The first convolution of such a file has 9 channels; the rest of its config is v1's."""
    from minisd.checkpoints.names import LDM_PREFIX
    from minisd.checkpoints.tensor_file import write_tensors

    for channels in (4, 9):
        shapes = {f"{prefix}x": (1,) for prefix in LDM_PREFIX.values()}
        shapes[f"{LDM_PREFIX['unet']}input_blocks.0.0.weight"] = (320, channels, 3, 3)
        path = tmp_path / f"{channels}.safetensors"
        write_tensors(path, shapes, "F32", [torch.zeros(shape) for shape in shapes.values()])
        assert checkpoint.locate(path).configs["unet"].in_channels == channels


def test_the_command(pair, here, minisd_command, draw_again):
    folder = here / "model"
    minisd_folder = pair[0]
    minisd_folder.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny.SCHEDULER))
    image().save("in.png")
    mask().save("mask.png")
    line = ["inpaint", "in.png", "mask.png", "a dog", "--model", folder, "--steps", 3]
    code, out, err = minisd_command(*line, "--device", "cpu", "-o", "out.png")
    assert code == 0, err
    sd = minisd.load(folder, device="cpu")
    [expected] = minisd.inpaint(sd, image(), mask(), "a dog", steps=3, progress=False)
    assert Image.open("out.png").tobytes() == expected.tobytes()
    assert draw_again("out.png") == ["again.png"]
    assert Image.open("again.png").tobytes() == expected.tobytes()
