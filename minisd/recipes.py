"""Recipes: images that know how they were drawn.

What draws puts into each image's `info` two texts: "recipe", a JSON object,

    {"version": "minisd 0.2.0", "dtype": "float32", "device": "cpu", "attention": "sdpa",
     "method": "txt2img", "arguments": {"prompt": "a cat", "steps": 20},
     "model": {"source": "shapes"}, "image": 0, "of": 1}

the call that drew it and which image of that call it is, and "parameters", the text that A1111's
web UI writes and many programs read. `save` writes both into a PNG; `minisd.from_recipe` draws the
image again. Images, masks and tensors that a call was given are not in the recipe but known by
their sha256: whoever draws it again hands them in again.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from . import __version__
from .drawing import Drawing, as_list, seeds
from .files import atomic_write, expect_file

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

# Arguments that change no image (on_step may: then it has to be handed in again).
FILES = ("image", "mask", "regions")  # arguments whose texts are names of files
NOT_TOLD = ("sd", "self", "progress", "on_step")
A1111_SAMPLERS = {
    "dpm++": "DPM++ 2M Karras",
    "dpm++ linspace": "DPM++ 2M",
    "ddim": "DDIM",
    "ddpm": "DDPM",
}


def tell(
    images: list[Image.Image],
    sd: "StableDiffusion",
    method: str,
    arguments: Mapping[str, Any],
    drawing: Drawing,
    prompts: Sequence[str],
    rows: int | None = None,
) -> list[Image.Image]:
    """Put the recipe of a call into the images that it drew -> the images.

    arguments: of the call, as locals() has them when it begins, with `options`. prompts: of the
    images, in their order. rows: how many have their own seed, where the others share them.
    """
    given = {**arguments, **arguments.get("options", {})}
    told = {
        key: encoded(as_path(value) if key in FILES else value)
        for key, value in given.items()
        if key not in (*NOT_TOLD, "options")
    }
    images = [image.copy() for image in images]  # one that is kept may be there several times
    each, rows = len(images) // len(prompts), rows or len(images)
    negatives = as_list(drawing.negative_prompt)
    for i, image in enumerate(images):
        recipe = {
            **circumstances(sd),
            "method": method,
            "arguments": told,
            "model": about(sd),
            "image": i,
            "of": len(images),
        }
        image.info["recipe"] = as_utf8(json.dumps(recipe, ensure_ascii=False))
        seed = None if drawing.latents is not None else seeds(drawing.seed, rows)[i % rows]
        both = prompts[i // each], negatives[i // each % len(negatives)]
        image.info["parameters"] = parameters(image, drawing, recipe, both, seed)
    return images


def about(sd: "StableDiffusion") -> dict[str, Any]:
    """Which model it is: what `load` was told, and what was put in since."""
    put_in: dict[str, Any] = {}
    if sd.adapters.merged:
        put_in["loras"] = [list(each) for each in sd.adapters.merged]
    if sd.adapters.words:
        put_in["embeddings"] = [list(each) for each in sd.adapters.words]
    return {**sd.loaded, **put_in}


def circumstances(sd: "StableDiffusion") -> dict[str, str]:
    """What the bits of an image depend on beside the call and the weights."""
    return {
        "version": f"minisd {__version__}",
        "dtype": str(sd.dtype).removeprefix("torch."),
        "device": sd.device.type,
        "attention": sd.unet.attention,
    }


def parameters(
    image: Image.Image,
    drawing: Drawing,
    recipe: Mapping[str, Any],
    texts: tuple[str, str],
    seed: int | None,
) -> str:
    """A1111's text: the prompt, with LoRAs as it names them, the negative one, and one line of
    settings. texts: both prompts."""
    prompt, negative = texts
    guidance = drawing.guidance
    if not isinstance(guidance, (int, float)):
        guidance = guidance[recipe["image"] % len(guidance)]
    loras = recipe["model"].get("loras", ())
    lines = [" ".join([prompt, *(f"<lora:{Path(file).stem}:{w:g}>" for file, _, w in loras)])]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    settings = {
        "Steps": drawing.steps,
        "Sampler": A1111_SAMPLERS[drawing.sampler],
        "CFG scale": guidance,
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Model": recipe["model"].get("source"),
        "Denoising strength": recipe["arguments"].get("strength"),
        "Version": recipe["version"],
    }
    told = [f"{key}: {quoted(value)}" for key, value in settings.items() if value is not None]
    return as_utf8("\n".join([*lines, ", ".join(told)]))


def as_utf8(text: str) -> str:
    """Bytes of a file's name that are no UTF-8, which a PNG does not hold, as escapes; JSON reads
    them back."""
    return text.encode("utf-8", "backslashreplace").decode()


def quoted(value: object) -> str:
    """A setting's value as A1111 writes it: in quotes where it holds what ends it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


# values as JSON


def encoded(value: Any) -> Any:
    """A value as JSON has it. A tuple is {"$tuple": [...]}, a public function of minisd {"$name":
    "sega"}, a file {"$file": its name, "$sha256": ...}, and what JSON cannot hold is
    {"$sha256": ...}, to be handed in again."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):  # NumPy's, too
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, tuple):
        return {"$tuple": [encoded(each) for each in value]}
    if isinstance(value, (list, range)):
        return [encoded(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encoded(each) for key, each in value.items()}
    if isinstance(value, partial):
        return {**encoded(value.func), "$with": encoded(value.keywords)}
    if isinstance(value, FunctionType) and value.__module__.startswith("minisd."):
        return {"$name": value.__name__}
    file = {"$file": os.fspath(value)} if isinstance(value, os.PathLike) else {}
    return {**file, "$sha256": fingerprint(value)}


def as_path(value: Any) -> Any:
    """Texts, of which each is the name of a file, as paths."""
    if isinstance(value, (list, tuple)):
        return [as_path(each) for each in value]
    if isinstance(value, Mapping):
        return {key: as_path(each) for key, each in value.items()}
    return Path(value) if isinstance(value, str) else value


def fingerprint(value: Any) -> str:
    """The sha256 of an image's, an array's or a tensor's kind and values; of a file's, or bytes."""
    if isinstance(value, Image.Image):
        kind, data = f"{value.mode} {value.size}", value.tobytes()
    elif isinstance(value, (np.ndarray, Tensor)):
        array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
        kind, data = f"{array.dtype} {array.shape}", np.ascontiguousarray(array).tobytes()
    elif isinstance(value, os.PathLike):
        expect_file(value)
        kind, data = "", Path(value).read_bytes()
    elif isinstance(value, (bytes, bytearray, memoryview)):
        kind, data = "", bytes(value)
    else:
        kind, data = type(value).__name__, b""
    return hashlib.sha256(kind.encode() + data).hexdigest()


# reading and writing


def recipe(image: Image.Image | str | os.PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """How an image was drawn, of an image that minisd returned or a PNG that it wrote (a file's
    name, or an open file).

    PIL's own methods (resize, crop) keep it: what they make says how that was drawn which it was
    made from. ValueError for an image that carries none: drawn by something else, or stripped on
    its way; or drawn from what no text can hold, an inversion (`redraw`), a recording (`replay`), a
    DiT's label (`LabelDiffusion.generate`), a loop of your own.
    """
    if not isinstance(image, Image.Image):
        if isinstance(image, (str, os.PathLike)):
            expect_file(image)
        try:
            with Image.open(image, formats=["PNG"]) as file:
                return recipe(file)
        except UnidentifiedImageError as error:
            raise ValueError("the image carries no recipe: it is no PNG") from error
    text = image.info.get("recipe")
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"method", "arguments", "model", "image"} <= set(found):
        why = "minisd did not draw it, or it was changed or stripped since"
        without = "redraw, replay, LabelDiffusion.generate and loops of your own write none"
        raise ValueError(f"the image carries no recipe: {why}; {without}")
    return found


def save(image: Image.Image, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write an image as a PNG with its recipe, all of it or nothing; or into a binary stream.

    `minisd info` and `minisd.recipe` read it, and programs that know A1111's "parameters" read
    that. ValueError for a name that does not end in .png.
    """
    text = PngInfo()
    for key, value in texts(image).items():
        text.add_text(key, value)
    if not isinstance(path, (str, os.PathLike)):
        image.save(path, format="PNG", pnginfo=text)
        return
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{os.fspath(path)}: expected a name that ends in .png")
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def texts(image: Image.Image) -> dict[str, str]:
    """The text chunks of an image that minisd returned; {} of another."""
    if not isinstance(image.info.get("recipe"), str):
        return {}
    keys = ("recipe", "parameters")
    own: dict[str, str] = {key: image.info[key] for key in keys if key in image.info}
    return {"version": f"minisd {__version__}", **own}
