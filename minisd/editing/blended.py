"""Blended latent diffusion: redraw the white part of a mask by a prompt, keep the rest of the
image.

Before the network sees the latent x, at every step, all of it outside the mask becomes the image's
own latent z0 at that step's noise level, with the same noise every time; after the last step, z0:

    x  <-  m x + (1 - m) (alpha z0 + sigma noise)
    m (B, 1, h, w) in {0, 1},  z0 the mode of the VAE's posterior

This keeps the latents outside the mask, not the pixels: the decoder's convolutions, and the
attention in its middle, mix all positions. So the decoded image is then pasted through the mask
into the image that was given.

Source: Avrahami et al. 2023, "Blended Latent Diffusion" (arXiv 2206.02779), algorithm 1. The paper,
too, goes back to pixels in the end, by fitting the decoder or by Poisson blending; pasting is
exact.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options, as_list, seeds
from ..pipeline import ImageInput, unchanged
from ..recipes import tell
from ..sampling.samplers import Step
from ..sampling.schedule import Level
from ..viewing.images import as_given, read_image, to_rgb
from ..viewing.profiles import from_srgb

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

Mask = np.ndarray[Any, Any]
MaskInput = Image.Image | Mask | Tensor | str | os.PathLike[str] | bytes  # see read_mask

BACKGROUND_SEED = 2206_02779  # added to the seed: the background has other noise than the start


def blend(
    sd: "StableDiffusion",
    image: ImageInput,
    mask: MaskInput | list[MaskInput] | tuple[MaskInput, ...],
    prompt: str | Sequence[str],
    strength: float = 0.95,
    *,
    feather: int = 0,
    paste_back: bool = True,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Redraw the white part of a mask; outside it the pixels are the input's, bit for bit.

    An RGB image keeps its colour profile, to whose colours what is drawn is converted; what is in
    another mode (CMYK, transparent, 16-bit) is pasted into as it shows in sRGB, see `to_rgb`.

    image, prompt: as in `sd.img2img`. mask: what `read_mask` takes, of the image's proportions;
    resized by taking the nearest. Of images, masks and prompts there may be one for all or one for
    each. strength: the last int(steps * strength) steps are run; if there are none, the image
    itself is returned. feather: inside the mask, the edge fades over that many pixels. paste_back:
    False returns what was decoded, in which no pixel is the input's. options: see
    `minisd.drawing.Drawing`; height, width: resize the image to that, without them the result has
    the image's own size, whatever it is; on_step sees the latent with its background. ValueError
    for what does not fit.
    """
    arguments = dict(locals())
    drawing = Drawing.of(options)
    plan = drawing.make_sampler(sd, strength)
    expect.whole_number("feather", feather, 0)
    given = Given.of(sd, image, mask, prompt, drawing)
    drawing = drawing.at(*given.pixels.shape[2:])
    start, behind = noises(drawing, sd, len(given.images))
    if len(plan) == 0:
        return tell(given.images, sd, "blend", arguments, drawing, given.prompts)

    h, w = start.shape[2:]
    m = torch.cat([latent_mask(each, h, w) for each in given.masks]).to(sd.device)
    z0 = drawing.per_image(sd.encode_image(given.pixels), len(given.prompts))
    background = Background(z0, behind, drawing.per_image(m, len(given.prompts)))
    predict = drawing.rule(sd.network, *drawing.embed(sd, given.prompts), drawing.guidance)
    x = background(plan.start(z0, start), next(iter(plan)).now)
    x = drawing.denoise(x, plan, predict, background.after)
    drawn = sd.decode(background(x, Level(1.0, 0.0)))
    if paste_back:
        drawn = given.pasted(drawn, feather)
    return tell(drawn, sd, "blend", arguments, drawing, given.prompts)


@dataclass(frozen=True, eq=False)
class Given:
    """The image, mask and prompt of a call, of which there may be one for all or one for each.

    prompts: one for each row. masks: one, or one for each. pixels: (1 or rows, 3, H, W). images:
    what is pasted into, num_images times for each row.
    """

    prompts: list[str]
    masks: list[Mask]
    pixels: Tensor
    images: list[Image.Image]

    @classmethod
    def of(
        cls,
        sd: "StableDiffusion",
        image: ImageInput,
        mask: MaskInput | list[MaskInput] | tuple[MaskInput, ...],
        prompt: str | Sequence[str],
        drawing: Drawing,
    ) -> "Given":
        """ValueError for masks of other proportions than the image's, and counts that differ."""
        prompts = as_list(prompt)
        masks = [read_mask(each) for each in (mask if isinstance(mask, (list, tuple)) else [mask])]
        pixels = sd.pixels(image, drawing.height, drawing.width)
        check_proportions([each.size for each in as_given(image)], masks)
        images = unchanged(image, pixels, drawing)
        rows = expect.rows(images=len(images), masks=len(masks), prompts=len(prompts))
        prompts, images = prompts * (rows // len(prompts)), images * (rows // len(images))
        return cls(prompts, masks, pixels, drawing.each(images))

    def pasted(self, drawn: list[Image.Image], feather: int) -> list[Image.Image]:
        """What was drawn, pasted through the masks into the images."""
        each = len(self.images) // len(self.masks)
        masks = [mask for mask in self.masks for _ in range(each)]
        return [paste(*three, feather) for three in zip(self.images, drawn, masks, strict=True)]


@dataclass(frozen=True)
class Background:
    """background(x, level): x where the mask is white, elsewhere z0 at that noise level, always
    with the same noise.

    x <- m x + (1 - m) (alpha z0 + sigma noise);  z0, noise: (1 or B, C, h, w), mask: (1 or B, 1, h,
    w) bool.
    """

    z0: Tensor
    noise: Tensor
    mask: Tensor

    def after(self, x: Tensor, step: Step) -> Tensor:
        """For denoise(..., after=background.after)."""
        return self(x, step.next)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        behind = level.alpha * self.z0.float() + level.sigma * self.noise.float()
        return torch.where(self.mask, x, behind.to(x.dtype))


def noises(drawing: Drawing, sd: "StableDiffusion", rows: int) -> tuple[Tensor, Tensor]:
    """The noise that the images start from, and the noise of their backgrounds."""
    start = drawing.noise(sd, rows)
    others = [(seed + BACKGROUND_SEED) % 2**63 for seed in seeds(drawing.seed, rows)]
    return start, sd.noise(others, rows, drawing.height, drawing.width)


def read_mask(mask: MaskInput) -> Mask:
    """A mask as (H, W) bool, True where it is white, of a file, its bytes, a PIL image, or an array
    or tensor.

    Images of any mode are made grey, and white is 128 of 255 or more; an array (H, W) is bool, or
    8-bit, or floats from 0 to 1 (white from 0.5). ValueError for a mask that cannot be understood
    or has no white.
    """
    if isinstance(mask, (str, os.PathLike, bytes)):
        read_image(mask)  # says what is wrong with a file
        with Image.open(io.BytesIO(mask) if isinstance(mask, bytes) else mask) as file:
            return read_mask(file)
    if isinstance(mask, Image.Image):
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
        if mask.has_transparency_data and alpha.min() < 255:
            expected = "black and white alone, without transparency"
            raise ValueError(f"the mask is transparent in places: expected {expected}")
        white = np.asarray(to_rgb(mask).convert("L")) >= 128
    else:
        white = read_array(
            mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        )
    if not white.any():
        why = "nothing would be redrawn: white is redrawn, black is kept"
        raise ValueError(f"the mask has no white, so {why}")
    return white


def read_array(values: Mask) -> Mask:
    """An array as a mask (H, W) bool; leading axes of length 1 are left out."""
    one = values.ndim >= 2 and math.prod(values.shape[:-2]) == 1
    if not (one and values.size):
        raise ValueError(f"the mask is an array of shape {values.shape}, expected (height, width)")
    height, width = values.shape[values.ndim - 2], values.shape[values.ndim - 1]
    values = values.reshape(height, width)
    if values.dtype == bool:
        return values
    top = {"u1": 255, "f4": 1, "f8": 1, "f2": 1}.get(values.dtype.str[1:])
    if (
        top is None
        or not (values.min() >= 0 and values.max() <= top)
        or (top == 255 and values.max() == 1)
    ):
        got = f"{values.dtype} from {values.min()} to {values.max()}"
        expected = "bool, uint8 from 0 to 255, or floats from 0 to 1"
        raise ValueError(f"the mask is an array of {got}, expected {expected}")
    return values >= (128 if top == 255 else 0.5)


def check_proportions(sizes: list[tuple[int, int]], masks: list[Mask]) -> None:
    """ValueError unless the images have one size, and each mask its proportions (to within a
    pixel of the mask)."""
    if len(set(sizes)) > 1:
        raise ValueError(f"got images of the sizes {sorted(set(sizes))}, expected one size")
    width, height = sizes[0]
    for h, w in (mask.shape for mask in masks):
        if abs(w * height - h * width) > max(width, height):
            got = f"the mask has {w} x {h} pixels, the image {width} x {height}"
            raise ValueError(f"{got}, expected the same proportions")


def resized(mask: Mask, height: int, width: int) -> Mask:
    """The mask with that many pixels, each the nearest of the given ones."""
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def latent_mask(mask: Mask, h: int, w: int) -> Tensor:
    """m (1, 1, h, w) bool. ValueError if the white is so thin that none is left."""
    m = torch.from_numpy(resized(mask, h, w).copy())
    if not m.any():
        grid = f"the {w} x {h} grid of the latents"
        expected = f"areas of {mask.shape[1] / w:.0f} x {mask.shape[0] / h:.0f} of its pixels"
        got = f"the mask's white is too thin: nothing is left of it on {grid}"
        raise ValueError(f"{got}; expected {expected} and more")
    return m[None, None]


def paste(image: Image.Image, drawn: Image.Image, mask: Mask, feather: int = 0) -> Image.Image:
    """The drawn image where the mask is white, the image's own pixels outside.

    At d pixels inside the mask's edge (1: the outermost) the share of the drawn image is
    min(1, d / (feather + 1)). Both are resized to the image, and the drawn one gets its colours.
    """
    width, height = image.size
    if drawn.size != image.size:
        drawn = drawn.resize(image.size, Image.Resampling.LANCZOS)
    if profile := image.info.get("icc_profile"):
        drawn = from_srgb(drawn, profile)
    inside = torch.from_numpy(resized(mask, height, width).astype(np.float32))[None]
    feather = 0 if inside.all() else feather  # no edge, no fading
    depth = inside.clone()  # d, feather + 1 at most
    for _ in range(feather):
        # One layer less; the image's border is no edge.
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)
        if not inside.any():
            break
        depth += inside
    share = depth[0, :, :, None].double().numpy() / (feather + 1)
    own = np.asarray(image, np.float64)
    mixed = own + share * (np.asarray(drawn, np.float64) - own)
    pasted = Image.fromarray(mixed.round().astype(np.uint8))
    if profile:
        pasted.info["icc_profile"] = profile
    return pasted
