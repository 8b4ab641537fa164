"""The figures that the editing literature reports, of a source image and its edit: PIE-Bench's,
from their formulas.

    MSE         mean((a - b)^2), values in 0..1
    PSNR        -10 log10(MSE) in dB; equal images count as 100 dB
    SSIM        mean over pixels and channels of
                (2 ma mb + C1)(2 vab + C2) / ((ma^2 + mb^2 + C1)(va + vb + C2)), means m and
                (co)variances v under an 11 x 11 Gaussian of sd 1.5, where it fits into the image
    structure   mean((S(a) - S(b))^2), S the cosine similarities of all pairs of an image's cells

Sources: Ju et al. 2023 (PnP inversion, arXiv 2310.01506) for the protocol: of the background, both
images are multiplied by 1 - mask and compared over the WHOLE image; Wang et al. 2004 (SSIM);
Tumanyan et al. 2022 (arXiv 2201.00424) for the distance of self-similarities. Theirs compares keys
of DINO; the feature here is the project's own, a histogram of edge directions, so `structure`
orders methods on one set and is not to be compared with published ones.
"""

import numpy as np
from PIL import Image

WINDOW, SD = 11, 1.5  # of SSIM's Gaussian, in pixels
C1, C2 = 0.01**2, 0.03**2
CELLS, CELL, BINS, FLAT = (
    16,
    4,
    8,
    0.25,
)  # cells a side, pixels a side of each, directions, and see `cells`


def values(image) -> np.ndarray:
    """(H, W, 3) float64 in 0..1 of a PIL image or an 8-bit array."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"expected 8-bit RGB (height, width, 3), got {pixels.dtype} {pixels.shape}"
        )
    return pixels / 255.0


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of two images (H, W, 3) in 0..1."""
    return float(np.mean((a - b) ** 2))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(mse(a, b), 1e-10)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two images (H, W, 3) in 0..1, 1 where they are equal."""
    if min(a.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} x {WINDOW} pixels, got {a.shape[1]} x {a.shape[0]}")
    down, across = _gaussian(a.shape[0]), _gaussian(a.shape[1])

    def mean(x):
        return np.einsum("ih,hwc,jw->ijc", down, x, across, optimize=True)

    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float(
        np.mean((2 * ma * mb + C1) * (2 * vab + C2) / ((ma**2 + mb**2 + C1) * (va + vb + C2)))
    )


def _gaussian(n: int) -> np.ndarray:
    """(n - WINDOW + 1, n): row i holds the window's weights at i."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SD) ** 2)
    rows = np.zeros((n - WINDOW + 1, n))
    for i, row in enumerate(rows):
        row[i : i + WINDOW] = weights / weights.sum()
    return rows


def cells(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) -> one descriptor for each of 16 x 16 cells, (256, BINS + 1).

    Per cell, the sum of the gradient's length over its pixels (of the image at 64 x 64, in grey)
    by direction, 0 to 180 degrees in BINS, and a constant FLAT * CELL^2, so that cells without
    edges are alike and unlike those with.
    """
    side = CELLS * CELL
    grey = Image.fromarray(np.float32(image.mean(axis=2))).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    dy, dx = np.gradient(np.asarray(grey, np.float64))
    length, direction = np.hypot(dx, dy), np.arctan2(dy, dx) % np.pi
    bins = np.minimum((direction / np.pi * BINS).astype(int), BINS - 1)
    split = length[..., None] * (bins[..., None] == np.arange(BINS))
    histogram = split.reshape(CELLS, CELL, CELLS, CELL, BINS).sum(axis=(1, 3)).reshape(-1, BINS)
    return np.concatenate([histogram, np.full((len(histogram), 1), FLAT * CELL**2)], axis=1)


def structure(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the layouts of two images (H, W, 3) in 0..1; 0 where they are equal."""

    def similarity(image):
        x = cells(image)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return x @ x.T

    return float(np.mean((similarity(a) - similarity(b)) ** 2))


def field(source, edited, mask=None) -> dict[str, float | None]:
    """PSNR, MSE and SSIM of the background, and the structure distance, of two 8-bit images of
    one size.

    mask: (H, W) bool, True where the edit belongs; None compares whole images. If it is True
    everywhere there is no background, and its figures are None.
    """
    a, b = values(source), values(edited)
    mask = np.zeros(a.shape[:2], bool) if mask is None else np.asarray(mask)
    if a.shape != b.shape or mask.shape != a.shape[:2] or mask.dtype != bool:
        got = f"images {a.shape} and {b.shape} with a mask {mask.shape} {mask.dtype}"
        raise ValueError(f"{got}, expected one size, bool")
    figures = {"psnr": None, "mse": None, "ssim": None, "structure": structure(a, b)}
    if not mask.all():
        keep = ~mask[..., None]
        figures |= {
            "psnr": psnr(a * keep, b * keep),
            "mse": mse(a * keep, b * keep),
            "ssim": ssim(a * keep, b * keep),
        }
    return figures
