"""Colour profiles (ICC) of images: their colours in sRGB, in which models are trained, and back.

Pillow's ImageCms does the work, by LittleCMS, with perceptual intent.
"""

import io
import warnings
from typing import cast

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # of a profile's colours


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours of an ICC profile in sRGB, without one; as they are, and with it, where the
    profile says sRGB anyway, within one step of 255.

    A profile that is damaged, or of another colour space than the image, says nothing: a warning,
    and the image without it.
    """
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = own.profile.xcolor_space.strip()
        mode = MODES.get(space, space)
        fits = image.mode == mode or (mode in ("RGB", "L") and image.mode != "CMYK")
        is_grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
        if not fits or (mode == "L" and not is_grey):
            raise ValueError(f"it is of {space}, the image of {image.mode}")
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and _says_srgb(transform):
            return image
        converted = _applied(transform, image.convert(mode))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        told = f"an image's colour profile cannot be used ({reason}): its colours are taken as sRGB"
        warnings.warn(told, stacklevel=2)
        converted = image.copy()
    converted.info.pop("icc_profile", None)
    return converted


def from_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB image of sRGB's colours in those of an RGB profile, with it; what the profile cannot
    show becomes the nearest that it can. ValueError for a profile that leads to no colours."""
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        says_srgb = _says_srgb(ImageCms.buildTransform(own, srgb, "RGB", "RGB"))
        back = ImageCms.buildTransform(srgb, own, "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"the colour profile leads to no colours: {error}") from error
    converted = image.copy() if says_srgb else _applied(back, image)
    converted.info["icc_profile"] = profile
    return converted


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    return cast(Image.Image, ImageCms.applyTransform(image, transform))


def _says_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform of RGB moves no colour by more than one step of 255."""
    steps = np.array(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), dtype=np.uint8)
    lattice = Image.fromarray(np.ascontiguousarray(steps.reshape(3, 27, 27).transpose(1, 2, 0)))
    moved = np.asarray(_applied(transform, lattice), dtype=int)
    return bool(np.abs(moved - np.asarray(lattice, dtype=int)).max() <= 1)
