"""Images: files, PIL images and tensors (B, 3, H, W) in [-1, 1].

The conversions are those of diffusers' VaeImageProcessor.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..files import expect_file
from .profiles import from_srgb, to_srgb

OneImage = Image.Image | str | os.PathLike[str] | bytes | np.ndarray[Any, Any]
ImageInput = OneImage | Sequence[OneImage] | Tensor
# Of Pillow's formats those in which people keep images, none of which runs another program, as EPS
# does Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "JPEG2000", "AVIF")


def read_image(file: str | os.PathLike[str] | bytes) -> Image.Image:
    """A file, or its bytes, as a viewer shows it, in RGB (see `to_rgb`); of an animation the first
    frame.

    FileNotFoundError, or ValueError: the file is cut, no image, none of FORMATS, or so large (89
    megapixels) that it is no photograph.
    """
    with open_image(file) as image:
        return to_rgb(image)


def read_as_it_is(file: str | os.PathLike[str] | bytes) -> Image.Image:
    """A file, or its bytes, in its own mode and colours, which what keeps pixels has to know;
    errors as of `read_image`."""
    with open_image(file) as image:
        to_rgb(image)  # what is wrong with it is said now
        return image


@contextmanager
def open_image(file: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """`with open_image(file) as image`: as it is in the file; errors as of `read_image`, also for
    what is found out inside."""
    path = f"an image of {len(file)} bytes" if isinstance(file, bytes) else os.fspath(file)
    try:
        if not isinstance(file, bytes):
            expect_file(file)
        source = io.BytesIO(file) if isinstance(file, bytes) else file
        Image.init()  # all formats, of which one may be missing here
        known = [name for name in FORMATS if name in Image.OPEN]
        with Image.open(source, formats=known) as image:
            # Pillow only warns of these; to catch a warning would change the whole process's.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except FileNotFoundError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ValueError(
            f"{path} is too large: expected at most {limit:,} pixels; make it smaller first"
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):
            reason += f", expected one of {', '.join(FORMATS)}"
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def to_tensor(images: list[Image.Image], height: int, width: int) -> Tensor:
    """x = 2 (value / 255) - 1 of RGB images, resized (Lanczos) -> (B, 3, height, width), fp32."""
    images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    x = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]))
    return 2 * (x / 255).permute(0, 3, 1, 2) - 1


def to_pil(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> 8-bit images, round(255 (x / 2 + 1/2)).

    ArithmeticError where a value is not finite.
    """
    if not image.isfinite().all():
        raise ArithmeticError(
            f"the image has NaN or infinite values in {image.dtype}; try another dtype"
        )
    values = (255 * (image.float() / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8)
    return [Image.fromarray(each) for each in values.permute(0, 2, 3, 1).cpu().numpy()]


def as_given(image: ImageInput) -> list[Image.Image]:
    """One image or more as a list of RGB images, each of its own size.

    A tensor is (B, 3, H, W) in [-1, 1]. All others, one or a list of them: a PIL image, a file's
    name, a file's bytes, or an array (H, W, 3) or (H, W), 8-bit or floats in [0, 1]; an array (B,
    H, W, 3) is B of them.
    """
    return [to_rgb(each) for each in opened(image)]


def as_kept(image: ImageInput) -> list[Image.Image]:
    """The same for what keeps pixels: of an opaque RGB image whose profile is not sRGB's they are
    its own, upright, with the profile. `profiles.from_srgb` makes colours to go with them."""
    return [kept(each) for each in opened(image)]


def kept(image: Image.Image) -> Image.Image:
    rgb = to_rgb(image)
    profile = image.info.get("icc_profile")
    was_converted = "icc_profile" not in rgb.info
    opaque = image.mode == "RGB" and not image.has_transparency_data
    if isinstance(profile, bytes) and was_converted and opaque:
        try:
            from_srgb(Image.new("RGB", (1, 1)), profile)
        except ValueError:  # it leads from its colours alone, as a scanner's
            return rgb
        return ImageOps.exif_transpose(image)
    return rgb


def opened(image: ImageInput) -> list[Image.Image]:
    """One image or more of any kind, in their own modes and colours."""
    if isinstance(image, Tensor):
        return to_pil(image)
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)
    images = image if isinstance(image, (list, tuple)) else [image]
    return [opened_one(each) for each in images]


def opened_one(image: Any) -> Image.Image:
    """One image of any kind but a tensor. TypeError or ValueError for what is none."""
    if isinstance(image, (str, os.PathLike)):
        return read_as_it_is(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_as_it_is(bytes(image))
    if isinstance(image, np.ndarray):
        return from_array(image)
    if not isinstance(image, Image.Image):
        got = type(image).__name__
        kinds = "a PIL image, a file's name or bytes, an array (H, W, 3)"
        raise TypeError(f"got a {got}, expected {kinds} or a tensor (B, 3, H, W) in [-1, 1]")
    return image


def from_array(values: np.ndarray[Any, Any]) -> Image.Image:
    """An array (H, W, 3) or (H, W), uint8 or floats from 0 to 1, as an RGB image."""
    fits = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)
    floats = values.dtype.kind == "f"
    if fits and values.size and (values.dtype == np.uint8 or floats):
        if floats and values.min() >= 0 and values.max() <= 1:  # NaN is not
            values, floats = (255 * values).round().astype(np.uint8), False
        if not floats:
            return Image.fromarray(values).convert("RGB")
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    got = f"an array of {values.dtype} {values.shape}, {low} to {high}"
    raise ValueError(f"got {got}, expected (H, W, 3) or (H, W) of uint8, or of floats from 0 to 1")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it, in RGB.

    It is turned upright (EXIF), 16-bit grey is scaled to 8, colours of an embedded profile become
    sRGB's, transparency is laid on white.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"got a {type(image).__name__}, expected a PIL image")
    sixteen = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(
            f"an image of mode {image.mode} has no known white; convert it to 8 bits or I;16"
        )
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if sixteen:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    clear = image.has_transparency_data
    alpha = image.convert("RGBA").getchannel("A") if clear else None
    if profile:
        image = to_srgb(image, profile)
    if alpha is not None:
        image = image.convert("RGBA")
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
