"""Drawing an image again, by its recipe (recipes.py): the call that drew it, on the same model."""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import IO, Any

from PIL import Image

from .checkpoints.sources import sha256
from .drawing import check_names
from .editing.attend_and_excite import attend_and_excite
from .editing.blended import blend
from .editing.diffedit import diffedit
from .editing.edict import edict
from .editing.erasure import erase_concepts
from .editing.inpainting import inpaint
from .editing.long_prompts import long_prompt
from .editing.masactrl import masactrl
from .editing.plug_and_play import plug_and_play
from .editing.prompt_to_prompt import edit_prompt, seed_baseline
from .editing.regional import regional
from .editing.style_aligned import style_aligned
from .pipeline import StableDiffusion, load
from .recipes import about, circumstances, fingerprint, recipe
from .viewing.visualize import heatmap

METHODS: dict[str, Callable[..., list[Image.Image]]] = {
    "txt2img": StableDiffusion.txt2img,
    "img2img": StableDiffusion.img2img,
    "edit_prompt": edit_prompt,
    "seed_baseline": seed_baseline,
    "blend": blend,
    "inpaint": inpaint,
    "erase_concepts": erase_concepts,
    "edict": edict,
    "diffedit": diffedit,
    "masactrl": masactrl,
    "plug_and_play": plug_and_play,
    "style_aligned": style_aligned,
    "attend_and_excite": attend_and_excite,
    "regional": regional,
    "long_prompt": long_prompt,
    "heatmap": lambda sd, prompt, **how: heatmap(sd, prompt, **how)[0],
}


def from_recipe(
    drawn: Image.Image | str | os.PathLike[str] | IO[bytes] | Mapping[str, Any],
    /,
    sd: StableDiffusion | None = None,
    **given: Any,
) -> Image.Image:
    """Draw an image again, by its recipe: on the same machine, with as many threads, the same bits.

    drawn: an image that carries a recipe, its PNG, or the recipe itself. sd: the model; without
    one the recipe's is loaded, with its LoRAs and its words, whose files have to be the same.
    given: the images, masks and tensors that the call was given, under their arguments' names; they
    have to be the same, too. on_step, progress may be given as well. The whole call is run, since
    an image's last bits depend on those drawn with it. ValueError for what does not fit, a warning
    where version, dtype, device or attention are others than they were.
    """
    told = dict(drawn) if isinstance(drawn, Mapping) else recipe(drawn)
    if told["method"] not in METHODS:
        expected = ", ".join(METHODS)
        raise ValueError(f"the method is {told['method']!r:.80}, expected one of {expected}")
    free = {name: given.pop(name) for name in ("on_step", "progress") if name in given}
    arguments = {
        name: decoded(name, value, given.pop(name, None))
        for name, value in told["arguments"].items()
    }
    check_names("argument", given, ("on_step", "progress", *arguments))
    sd = model_of(told) if sd is None else sd
    if (own := about(sd)) != told["model"] and own.get("source") is not None:
        raise ValueError(f"the model is {own!r:.300}, the recipe's {told['model']!r:.300}")
    now = circumstances(sd)
    others = [f"{k} {told.get(k)}, here {v}" for k, v in now.items() if told.get(k) != v]
    if others:
        warnings.warn(f"it was drawn with {'; '.join(others)}: bits may be others", stacklevel=2)
    method = METHODS[told["method"]]
    images = method(sd, *unnamed(method, arguments), **arguments, **free)
    return images[told["image"]]


def unnamed(method: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
    """Takes out of the arguments those that a call cannot name: *targets, and what is before."""
    kinds = {name: each.kind for name, each in inspect.signature(method).parameters.items()}
    rest = [name for name, kind in kinds.items() if kind is Parameter.VAR_POSITIONAL]
    if not rest:
        return []
    before = [name for name, kind in kinds.items() if kind is Parameter.POSITIONAL_OR_KEYWORD]
    found = [arguments.pop(name) for name in before if name != "sd"]
    return [*found, *arguments.pop(rest[0])]


def decoded(name: str, value: Any, given: Any) -> Any:
    """An argument from its JSON, see `recipes.encoded`; what is known by its sha256 is `given`."""
    if isinstance(value, list):
        listed = given if isinstance(given, (list, tuple)) else [given] * len(value)
        return [decoded(name, each, own) for each, own in zip(value, listed)]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decoded(name, value["$tuple"], given))
    if "$name" in value:
        own = value.get("$with", {})
        if callable(given) and any("$sha256" in str(each) for each in own.values()):
            return given  # with what a recipe cannot hold: a network, say
        function = getattr(import_module("minisd"), value["$name"])
        how = {key: decoded(name, each, None) for key, each in own.items()}
        return partial(function, **how) if how else function
    if "$sha256" in value:
        if isinstance(given, str) or (given is None and "$file" in value):
            given = Path(given or value["$file"])
        if given is None:
            raise ValueError(f"the recipe needs {name}, which it knows by its sha256: give it")
        if fingerprint(given) != value["$sha256"]:
            raise ValueError(f"{name} is not the one that was drawn with: its sha256 is another")
        return given
    own = given if isinstance(given, Mapping) else {}
    return {key: decoded(name, each, own.get(key)) for key, each in value.items()}


def model_of(told: Mapping[str, Any]) -> StableDiffusion:
    """The model of a recipe, loaded, with what was put into it."""
    model = dict(told["model"])
    if model.get("source") is None:
        raise ValueError("the recipe's model was not loaded from anywhere: give it as sd")
    loras, words = model.pop("loras", []), model.pop("embeddings", [])
    for path, sha, _ in (*loras, *words):
        file = Path(path) / "adapter_model.safetensors" if Path(path).is_dir() else Path(path)
        if not file.is_file() or sha256(file) != sha:
            raise ValueError(f"{path} is not there, or not the file that was drawn with")
    how = {"device": told["device"], "dtype": told["dtype"], "attention": told["attention"]}
    sd = load(model.pop("source"), **how, **model)
    sd.merge(*((path, weight) for path, _, weight in loras))
    for path, _, token in words:
        sd.add_embedding(path, token)
    return sd
