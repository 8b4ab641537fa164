"""The editing metrics against hand values and against their formulas written as loops."""

import math

import numpy as np
import pytest
from PIL import Image

from bench.metrics import C1, C2, cells, field, mse, psnr, ssim, structure
from minisd.training import scenes


def noise(shape=(13, 17, 3), seed=0):
    return np.random.default_rng(seed).random(shape)


def test_mse_and_psnr_by_hand():
    a = np.zeros((4, 4, 3))
    b = a.copy()
    b[0, 0] = 0.5, 0.5, 0.0
    assert mse(a, b) == pytest.approx(0.5 / 48) and psnr(a, b) == pytest.approx(10 * math.log10(96))
    assert psnr(a, a + 0.1) == pytest.approx(20) and psnr(a, a) == 100


def test_ssim_is_its_formula():
    """Window by window, weights from the Gaussian's formula; the bottom right window among them."""
    a, b = noise(), 0.7 * noise() + 0.3 * noise(seed=1)
    offsets = range(-5, 6)
    weights = np.array(
        [[math.exp(-(i**2 + j**2) / (2 * 1.5**2)) for j in offsets] for i in offsets]
    )
    weights /= weights.sum()
    found = []
    for y in range(3):
        for x in range(7):
            for c in range(3):
                p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
                m, n = (weights * p).sum(), (weights * q).sum()
                v, w = (weights * (p - m) ** 2).sum(), (weights * (q - n) ** 2).sum()
                vw = (weights * (p - m) * (q - n)).sum()
                found.append(
                    (2 * m * n + C1) * (2 * vw + C2) / ((m * m + n * n + C1) * (v + w + C2))
                )
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-12) and 0.3 < ssim(a, b) < 0.95


def test_ssim_by_hand():
    a = np.full((11, 11, 3), 0.5)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, a + 0.1) == pytest.approx(
        (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    )  # no variance
    with pytest.raises(ValueError, match="needs 11 x 11 pixels, got 17 x 10"):
        ssim(noise()[:10], noise()[:10])


def test_structure_by_hand():
    """One vertical edge through the middle of a column of cells: 16 of 256 cells are of another
    kind."""
    flat, edge = np.zeros((64, 64, 3)), np.zeros((64, 64, 3))
    edge[:, 34:] = 1
    x = cells(edge)
    assert x.shape == (256, 9) and (cells(flat)[:, :8] == 0).all()
    column = x.reshape(16, 16, 9)[:, 8]
    assert (
        column[:, 0] == pytest.approx(4) and (column[:, 1:8] == 0).all()
    )  # the gradient is 1/2 in 2 pixels of 4 rows
    assert (np.delete(x.reshape(16, 16, 9), 8, axis=1)[..., :8] == 0).all()
    cosine = 4 / math.hypot(4, 4)  # FLAT * CELL^2 = 4: with a cell without edges
    assert structure(flat, edge) == pytest.approx(2 * 16 * 240 * (1 - cosine) ** 2 / 256**2)


def test_structure_sees_the_layout_and_not_the_colour():
    def picture(text, x=32.0):
        said = scenes.parse(text)
        scene = scenes.Scene(said, (scenes.Box(x, 32.0, 27.0),), "white")
        return np.asarray(scenes.render(scene)) / 255

    red, blue = picture("a red circle"), picture("a blue circle")
    moved, square = picture("a red circle", 22.0), picture("a red square")
    assert structure(red, red) == 0
    assert structure(red, blue) < 0.2 * structure(red, square) < 0.2 * structure(red, moved)


def test_the_background_is_compared_over_the_whole_picture():
    """MSE outside the mask, divided by all pixels: PIE-Bench's definition."""
    source = Image.fromarray((255 * noise((16, 20, 3))).astype(np.uint8))
    pixels = np.asarray(source).copy()
    mask = np.zeros((16, 20), bool)
    mask[2:9, 3:12] = True
    pixels[mask] = 255 - pixels[mask]
    inside = field(source, pixels, mask)
    assert inside["mse"] == 0 and inside["psnr"] == 100 and inside["ssim"] == pytest.approx(1)
    assert inside["structure"] > 0
    pixels[15, 0] = np.where(np.asarray(source)[15, 0] > 127, 0, 255)
    change = (pixels[15, 0].astype(float) - np.asarray(source)[15, 0]) / 255
    assert field(source, pixels, mask)["mse"] == pytest.approx((change**2).sum() / (16 * 20 * 3))
    whole = field(source, pixels)
    assert whole["mse"] > 0.05 and whole["ssim"] < 0.9
    assert whole["psnr"] == pytest.approx(-10 * math.log10(whole["mse"]))
    full = field(source, pixels, np.ones((16, 20), bool))
    assert (
        full["psnr"] is full["mse"] is full["ssim"] is None
        and full["structure"] == whole["structure"]
    )


@pytest.mark.parametrize(
    "mask", [np.zeros((20, 16), bool), np.zeros((16, 20)), np.zeros((16, 20, 1), bool)]
)
def test_refuses_masks_and_pictures_that_do_not_fit(mask):
    picture = (255 * noise((16, 20, 3))).astype(np.uint8)
    with pytest.raises(ValueError, match="expected one size, bool"):
        field(picture, picture, mask)
    with pytest.raises(ValueError, match="expected 8-bit RGB"):
        field(picture / 255, picture)
