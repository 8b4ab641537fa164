"""Where the weights of a model are in a folder of diffusers' layout, and what an error says of a
folder that has others."""

import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from .sources import INDEX, CheckpointError, Source, with_variant

PARTS = {  # folders of a model, and a file that each of them has
    **dict.fromkeys(("unet", "transformer", "vae", "text_encoder"), "config.json"),
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
WHY_NO_PICKLES = (
    "reading one runs whatever code its author put into it; take the .safetensors file of the same "
    "model"
)
P = TypeVar("P", bound=str)


def expect_names(source: Source, variant: str | None, revision: str | None) -> None:
    """ValueError for what can be no source, no variant or no revision, CheckpointError for a source
    that cannot be looked for."""
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ValueError(
            f"the model is {source!r}, expected a bundled name, a Hub repo id, a folder or a file"
        )
    for name, value, pattern, example in (
        ("variant", variant, r"[\w-]+", "fp16"),
        ("revision", revision, r"\w[\w-]*([./]\w[\w-]*)*", "main"),
    ):
        if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
            raise ValueError(f"{name} is {value!r}, expected a name such as {example}")
    try:
        Path(source).exists()
    except OSError as error:  # too long a name, no right to look
        raise CheckpointError(
            f"the model {str(source)!r:.200} cannot be looked for: {error.strerror}"
        ) from error


def find_weights(
    folder: Path, plain: Mapping[P, str], variant: str | None, optional: Collection[P] = ()
) -> dict[P, Path]:
    """Each part's weights file; of a variant, and of parts without one, where others have it, the
    plain file, with a warning.

    plain: where they are without a variant. CheckpointError for a part without a file that is not
    optional.
    """
    paths = {part: folder / with_variant(name, variant) for part, name in plain.items()}
    if any(path.is_file() for path in paths.values()):
        for part in [part for part, path in paths.items() if not path.is_file()]:
            if (own := folder / plain[part]).is_file():
                told = f"there is no variant {variant} of {own}: that itself is taken"
                warnings.warn(told, stacklevel=3)
                paths[part] = own
    for part, path in paths.items():
        if not path.is_file() and part not in optional:
            raise CheckpointError(why_no_weights(folder, path))
    return paths


def why_no_weights(folder: Path, path: Path) -> str:
    """What to say of a weights file that a folder does not have."""
    if (part := why_a_part(folder)) is not None:
        return part
    place = path.parent if path.parent.is_dir() else folder
    beside = sorted(p.name for p in place.glob("*") if p.name != "config.json")
    told = f"{path} is missing; {place} has {', '.join(beside[:20]) or 'nothing'}"
    if any(name.endswith(".index.json") for name in beside):
        told += "; minisd does not read weights in shards"
    if any(name.endswith(PICKLES) for name in beside):
        told += f"; minisd does not read pickles: {WHY_NO_PICKLES}"
    variants = [name.split(".")[1] for name in beside if name.count(".") == 2]
    if name := next((each for each in variants if f"{path.stem}.{each}.safetensors" in beside), ""):
        told += f"; variant {name} takes {path.stem}.{name}.safetensors"
    return told


def why_a_part(path: Path) -> str | None:
    """What to say of a file or a folder inside a model that is given in place of all of it."""
    is_part = path.name in PARTS and (path / PARTS[path.name]).is_file()
    is_part = is_part and not (path / path.name).is_dir()
    if is_part or (path.name == INDEX and path.is_file()):
        return f"{path} is a part of a model: give the folder of all parts, {path.parent}"
    return None
