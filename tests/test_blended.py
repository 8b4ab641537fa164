"""Blended latent diffusion: equal to the oracle, exact outside the mask, and what it does with
every kind of mask."""

import numpy as np
import oracle_real
import pytest
import tiny
import torch
from PIL import Image

import minisd
from minisd import Drawing
from minisd.editing import blended
from minisd.editing.blended import latent_mask, noises, paste, read_mask
from minisd.sampling.schedule import Level

QUIET = dict(steps=4, progress=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blended")
    return tiny.save(folder), minisd.load(folder, device="cpu")


@pytest.fixture(scope="module")
def sd(pair):
    return pair[1]


def picture(width=40, height=24, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def box(width=40, height=24, left=9, top=5, right=30, bottom=20):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def spy(sd, monkeypatch):
    """The latents that are decoded are put into the list returned."""
    seen, decode = [], sd.decode
    monkeypatch.setattr(sd, "decode", lambda z: seen.append(z) or decode(z), raising=False)
    return seen


# parity


@pytest.mark.parametrize("strength", [0.95, 0.5, 1.0])
@pytest.mark.parametrize("sampler", oracle_real.SCHEDULERS)
def test_equals_the_oracle(pair, sampler, strength, monkeypatch, record_property):
    """Final latents within 1e-4; half strength begins inside the schedule of a multistep
    sampler."""
    pipe, sd = pair
    image, mask = picture(), np.random.default_rng(3).random((24, 40)) < 0.5
    final = spy(sd, monkeypatch)
    minisd.blend(
        sd,
        image,
        mask,
        "a dog",
        strength,
        negative_prompt="bad",
        steps=8,
        guidance=5,
        sampler=sampler,
        seed=2,
        progress=False,
    )

    cond, uncond = pipe.encode_prompt(["a dog"], "cpu", 1, True, negative_prompt=["bad"])
    x0 = pipe.image_processor.preprocess(image)
    small = Image.fromarray((255 * mask).astype(np.uint8)).resize((10, 6), Image.Resampling.NEAREST)
    start, behind = noises(Drawing(seed=2, height=24, width=40), sd, 1)
    expected = oracle_real.blend(
        pipe.unet,
        pipe.vae,
        oracle_real.SCHEDULERS[sampler](tiny.SCHEDULER),
        x0,
        torch.from_numpy(np.asarray(small) > 0),
        uncond,
        cond,
        start,
        behind,
        8,
        strength,
        5,
    )
    difference = ((final[0] - expected).abs().max() / expected.abs().max()).item()
    record_property("blended diffusion, final latents", difference)
    assert difference <= 1e-4
    assert 0.2 < np.mean(np.asarray(small) > 0) < 0.8


def test_the_background_has_the_same_noise_at_every_step(sd):
    image, mask, seen = picture(), box(), []
    minisd.blend(
        sd,
        image,
        mask,
        "a",
        seed=5,
        on_step=lambda x, step: seen.append((x.clone(), step)),
        **QUIET,
    )
    start, behind = noises(Drawing(seed=5, height=24, width=40), sd, 1)
    assert torch.equal(start, sd.noise(5, 1, 24, 40)) and (start - behind).abs().mean() > 0.5
    outside = ~latent_mask(mask, 6, 10).expand(1, 4, 6, 10)
    z0 = sd.encode_image(image)
    assert len(seen) == 3 and [step.index for _, step in seen] == [
        1,
        2,
        3,
    ]  # strength 0.95 of 4 steps
    for x, step in seen:
        expected = step.next.alpha * z0 + step.next.sigma * behind
        assert torch.equal(x[outside], expected[outside]) and not torch.equal(
            x[~outside], expected[~outside]
        )


def test_after_the_last_step_the_latents_outside_are_the_pictures_own(sd, monkeypatch):
    final, mask = spy(sd, monkeypatch), box()
    minisd.blend(
        sd, picture(), mask, "a", sampler="ddim", **QUIET
    )  # ends at the level of timestep 0, not at 0
    outside, z0 = ~latent_mask(mask, 6, 10)[0, 0], sd.encode_image(picture())
    assert torch.equal(final[0][..., outside], z0[..., outside])
    assert blended.Background(z0, z0, torch.zeros(1, 1, 6, 10, dtype=bool))(
        z0, Level(1.0, 0.0)
    ).equal(z0)


def test_all_white_is_img2img(sd):
    image = picture()
    expected = sd.img2img(image, "a cat", 0.7, seed=3, **QUIET)
    for paste_back in (True, False):
        ours = minisd.blend(
            sd, image, np.ones((24, 40), bool), "a cat", 0.7, seed=3, paste_back=paste_back, **QUIET
        )
        assert (pixels(ours) == pixels(expected)).all()


# pixels


@pytest.mark.parametrize("feather", [0, 3])
@pytest.mark.parametrize("size", [(40, 24), (45, 27)])
def test_outside_the_mask_no_pixel_changes(sd, size, feather):
    """Bit for bit, also where the picture's sides are no multiples of the VAE's factor."""
    image, mask = picture(*size), box(*size)
    [ours] = minisd.blend(sd, image, mask, "a", feather=feather, **QUIET)
    [bare] = minisd.blend(sd, image, mask, "a", paste_back=False, **QUIET)
    changed = (pixels([ours]) != pixels([image]))[0].any(axis=-1)
    assert ours.size == size and not changed[~mask].any() and changed[mask].mean() > 0.9
    assert bare.size == (size[0] // 4 * 4, size[1] // 4 * 4)
    if size == (40, 24):
        assert (pixels([bare]) != pixels([image]))[0].any(axis=-1)[
            ~mask
        ].mean() > 0.9  # which is why it is pasted
        if feather == 0:
            assert (pixels([ours])[0][mask] == pixels([bare])[0][mask]).all()


def test_with_a_size_the_picture_is_resized_first(sd):
    image, mask = picture(80, 48), box(80, 48, 20, 10, 60, 40)
    [ours] = minisd.blend(sd, image, mask, "a", width=40, height=24, **QUIET)
    small = image.resize((40, 24), Image.Resampling.LANCZOS)
    outside = ~np.asarray(Image.fromarray(mask).resize((40, 24), Image.Resampling.NEAREST))
    assert (pixels([ours])[0][outside] == pixels([small])[0][outside]).all()
    tensor = sd.pixels(small)
    assert (pixels(minisd.blend(sd, tensor, mask, "a", **QUIET)) == pixels([ours])).all()


@pytest.mark.parametrize("strength, steps", [(0, 25), (0.09, 10), (0.0, 1)])
def test_without_a_step_to_run_the_picture_is_returned(sd, strength, steps):
    for paste_back in (True, False):
        [ours] = minisd.blend(
            sd, picture(45, 27), box(45, 27), "a", strength, steps=steps, paste_back=paste_back
        )
        assert (pixels([ours]) == pixels([picture(45, 27)])).all()


def test_feathering_by_hand():
    black, white = Image.new("RGB", (9, 7), "black"), Image.new("RGB", (9, 7), "white")
    mask = np.zeros((7, 9), bool)
    mask[1:, 2:8] = True  # down to the lower border of the picture, which is no edge of the mask
    share = np.asarray(paste(black, white, mask, feather=2))[..., 0] / 255
    across = [0, 0, 1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0]
    assert share[6] == pytest.approx(across, abs=0.002)
    assert share[:, 4] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1, 1], abs=0.002)
    assert ((np.asarray(paste(black, white, mask)) == 255).all(-1) == mask).all()


def test_feathering_ends_with_the_mask(monkeypatch):
    """It is the mean of all layers; 100000 of them are no more work than the mask is wide."""
    mask = np.random.default_rng(1).random((40, 60)) < 0.97
    layers = [torch.from_numpy(mask.astype(np.float64))[None]]
    for _ in range(5):
        layers.append(-torch.nn.functional.max_pool2d(-layers[-1], 3, stride=1, padding=1))
    share = torch.stack(layers).mean(0)[0, :, :, None].numpy()
    black, white = Image.new("RGB", (60, 40), "black"), Image.new("RGB", (60, 40), "white")
    assert (
        np.asarray(paste(black, white, mask, 5)) == (share * 255).round()
    ).all() and share.max() == 1
    pool, calls = torch.nn.functional.max_pool2d, []
    monkeypatch.setattr(
        torch.nn.functional, "max_pool2d", lambda *args, **kw: calls.append(1) or pool(*args, **kw)
    )
    faint = paste(black, white, box(60, 40, 9, 9, 50, 30), 100_000)
    assert np.asarray(faint).max() == 0 and len(calls) == 11
    faint = paste(black, white, box(60, 40, 9, 9, 50, 30), 100)
    assert np.asarray(faint).max() == round(255 * 11 / 101)
    calls.clear()
    assert (
        np.asarray(paste(black, white, np.ones((40, 60), bool), 10**5)) == 255
    ).all() and not calls  # no edge


# batches


def test_each_picture_its_mask_prompt_and_seed(sd, monkeypatch):
    final = spy(sd, monkeypatch)
    images, masks = [picture(seed=1), picture(seed=2)], [box(), box(left=0, right=8)]
    both = minisd.blend(sd, images, masks, ["a", "b"], seed=7, **QUIET)
    [alone] = minisd.blend(sd, images[1], masks[1], "b", seed=8, **QUIET)
    assert (final[0][1] - final[1][0]).abs().max() <= 1e-4 * final[1].abs().max()
    assert np.abs(pixels(both)[1] - pixels([alone])[0]).max() <= 1
    three = minisd.blend(sd, images[0], masks[0], ["a", "b", "a"], seed=[7, 7, 7], **QUIET)
    assert (
        np.abs(pixels(three)[0] - pixels(three)[2]).max() <= 1
        and (pixels(three)[0] != pixels(three)[1]).any()
    )


def test_several_of_each_picture_keep_its_own_pixels(sd):
    images, masks = [picture(seed=1), picture(seed=2)], [box(), box(left=0, right=8)]
    drawn = pixels(minisd.blend(sd, images, masks, "a", num_images=2, **QUIET))
    for i, own in enumerate([0, 0, 1, 1]):
        changed = (drawn[i] != pixels([images[own]])[0]).any(-1)
        assert not changed[~masks[own]].any() and changed[masks[own]].mean() > 0.5


def test_on_step_may_replace_the_latents(sd, monkeypatch):
    final = spy(sd, monkeypatch)
    minisd.blend(
        sd, picture(), box(), "a", on_step=lambda x, step: torch.full_like(x, 0.1), **QUIET
    )
    assert (final[0][..., latent_mask(box(), 6, 10)[0, 0]] == 0.1).all()


# masks


def test_every_kind_of_mask_is_the_same_mask(tmp_path):
    white = box()
    grey = Image.fromarray((255 * white).astype(np.uint8))
    grey.save(tmp_path / "mask.png")
    grey.convert("P").save(tmp_path / "palette.gif")
    soft = np.where(white, 128, 127).astype(np.uint8)
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown turned back
    turned.info["exif"] = turned.getexif().tobytes()
    kinds = [
        grey,
        *(grey.convert(mode) for mode in ("1", "RGB", "P", "RGBA", "LA", "CMYK")),
        Image.fromarray(soft),
        soft,
        Image.fromarray(np.where(white, 65535, 0).astype(np.uint16)),
        white,
        white.astype(np.float32),
        np.where(white, 0.5, 0.49),
        torch.from_numpy(white)[None, None],
        torch.from_numpy(white).float(),
        tmp_path / "mask.png",
        str(tmp_path / "palette.gif"),
        turned,
    ]
    for mask in kinds:
        assert (read_mask(mask) == white).all(), mask


def test_the_latent_mask_takes_the_nearest_pixel():
    mask = np.zeros((24, 40), bool)
    mask[6, 14] = mask[8:12, 20:24] = (
        True  # 4 x 4 pixels a position; (6, 14) is the middle one of position (1, 3)
    )
    m = latent_mask(mask, 6, 10)
    assert m.shape == (1, 1, 6, 10) and m.nonzero()[:, 2:].tolist() == [[1, 3], [2, 5]]


def test_a_mask_of_another_size_is_resized(sd):
    fine = np.kron(box(), np.ones((3, 3), bool))
    ours, expected = (minisd.blend(sd, picture(), mask, "a", **QUIET) for mask in (fine, box()))
    assert (pixels(ours) == pixels(expected)).all()


CLEAR = Image.new("RGBA", (40, 24), (255, 255, 255, 200))


@pytest.mark.parametrize(
    "mask, message",
    [
        (Image.new("L", (40, 24)), "the mask has no white, so nothing would be redrawn"),
        (np.zeros((24, 40)), "the mask has no white"),
        (CLEAR, "the mask is transparent in places"),
        (Image.new("F", (40, 24)), "mode F has no known white"),
        (
            box(24, 40, 2, 2, 9, 9),
            "the mask has 24 x 40 pixels, the image 40 x 24, expected the same proportions",
        ),
        (
            box(right=10),
            "nothing is left of it on the 10 x 6 grid of the latents; expected areas of 4 x 4 of",
        ),
        (
            box().astype(np.uint8),
            "uint8 from 0 to 1, expected bool, uint8 from 0 to 255, or floats from 0 to 1",
        ),
        (255.0 * box(), "float64 from 0.0 to 255.0, expected bool"),
        (np.full((24, 40), np.nan), "float64 from nan to nan"),
        (box().astype(int), "int64 from 0 to 1"),
        (np.ones((24, 40, 3), bool), r"shape \(24, 40, 3\), expected \(height, width\)"),
        (np.ones((0, 40), bool), r"shape \(0, 40\)"),
        (None, r"shape \(\), expected"),
        (__file__, "test_blended.py cannot be read as an image"),
    ],
)
def test_masks_that_are_refused(sd, mask, message):
    with pytest.raises(ValueError, match=message):
        minisd.blend(sd, picture(), mask, "a", **QUIET)


def test_files_of_masks_that_are_refused(sd, tmp_path):
    CLEAR.save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match="the mask is transparent in places"):
        minisd.blend(sd, picture(), tmp_path / "clear.png", "a", **QUIET)
    with pytest.raises(FileNotFoundError, match="none.png"):
        minisd.blend(sd, picture(), "none.png", "a", **QUIET)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(strength=1.5), "strength is 1.5, expected a number from 0 to 1"),
        (dict(feather=-1), "feather is -1, expected a whole number, at least 0"),
        (dict(feather=1.5), "feather is 1.5"),
        (dict(seed=[1, 2]), "2 seeds for 1 images"),
        (
            dict(mask=[box(), box()], prompt=["a", "b", "c"]),
            "1 images, 2 masks and 3 prompts, expected one for all",
        ),
        (
            dict(image=Image.new("RGB", (9000, 9000)), mask=box(90, 90)),
            "9000 x 9000 pixels, expected at most 4,194,304",
        ),
        (
            dict(image=[picture(), picture(80, 48)]),
            r"sizes \[\(40, 24\), \(80, 48\)\], expected one size",
        ),
        (dict(guidance=float("nan")), "guidance is nan, expected a number from -1000 to 1000"),
        (dict(sampler="euler"), "sampler is 'euler'"),
        (dict(prompt=[]), "0 prompts"),
    ],
)
def test_arguments_that_are_refused(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        minisd.blend(sd, **{"image": picture(), "mask": box(), "prompt": "a"} | QUIET | arguments)


@pytest.mark.parametrize("seed", [np.int64(3), [np.int64(3), np.int64(4)], range(3, 5)])
def test_backgrounds_of_any_seed(sd, seed):
    for mine, other in zip(
        noises(Drawing(seed=seed, height=24, width=40), sd, 2),
        noises(Drawing(seed=[3, 4], height=24, width=40), sd, 2),
        strict=True,
    ):
        assert torch.equal(mine, other)
