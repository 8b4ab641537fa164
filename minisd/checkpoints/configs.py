"""What the small files of a model say, its configs and its vocabulary: read, and refused where they
are damaged or absurd, under the file's name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..models.clip import CLIPTextConfig, CLIPTextModel
from ..models.dit_config import DiTConfig
from ..models.tokenizer import CLIPTokenizer
from ..models.unet import UNet, UNetConfig
from ..models.vae import AutoencoderKL, VAEConfig
from .kinds import kind_of_config
from .names import Config
from .sources import VOCABULARY_FILES, CheckpointError, Part, Source, fetch_clip

MODELS: dict[Part, tuple[type[nn.Module], type[Config]]] = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
}
# No published config comes near these; what a damaged or hostile one asks for would take all
# memory, or all day.
LIMITS = {
    "layers_per_block": 16,
    "num_hidden_layers": 100,
    "unet.sample_size": 512,
    "vae.sample_size": 4096,
    "transformer.sample_size": 512,
    "transformer.num_layers": 200,
    "transformer.patch_size": 64,
    "transformer.num_attention_heads": 256,
}
LIMIT, LONGEST = 1_000_000, 16  # of any other whole number; of a list
MAX_JSON, MAX_VOCABULARY = 1_000_000, 20_000_000  # bytes of a config, of a file of the vocabulary


T = TypeVar("T")


def from_clip(why: str, names: list[str], local_files_only: bool) -> Path:
    """The first of the named files of openai/clip-vit-large-patch14.

    why: what an error says first if they do not come.
    """
    try:
        return fetch_clip(names, local_files_only) / names[0]
    except CheckpointError as error:
        raise CheckpointError(f"{why} ({error})") from error


def read_tokenizer(
    given: Source | None, own: Path, why: str, local_files_only: bool
) -> CLIPTokenizer:
    """That of the folder that was given, or else of the model's own, or else CLIP's."""
    folder = own if given is None else Path(given)
    if given is None and not own.is_dir():
        folder = from_clip(why, ["vocab.json", "merges.txt"], local_files_only).parent
    return named(folder, vocabulary)


def named(path: Path, read: Callable[[Path], T]) -> T:
    """read(path); whatever is wrong with the file is told under its name."""
    try:
        return read(path)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _expect_size(path: Path, most: int) -> None:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    if path.stat().st_size > most:
        raise ValueError(f"the file has {path.stat().st_size} bytes, expected at most {most}")


def vocabulary(folder: Path) -> CLIPTokenizer:
    for path in folder.glob("*"):
        if path.name in (*VOCABULARY_FILES, "tokenizer.json", "added_tokens.json"):
            _expect_size(path, MAX_VOCABULARY)
    return CLIPTokenizer.from_folder(folder)


def read_json(path: Path) -> dict[str, Any]:
    _expect_size(path, MAX_JSON)
    if not isinstance(values := json.loads(path.read_text(encoding="utf-8")), dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values


def read_config(part: Part, path: Path) -> Config:
    """A part's config.json, refused where its numbers are absurd or it is another model's."""

    def read(values: dict[str, Any]) -> Config:
        if kind := kind_of_config(values):
            raise ValueError(f"it is of {kind}, which minisd does not draw with")
        return MODELS[part][1].from_dict(values)

    return _checked_config(part, path, read)


def dit_config(path: Path, compat: str = "published") -> DiTConfig:
    """The same of transformer/."""
    read = lambda values: DiTConfig.from_dict(values | {"compat": compat})
    return _checked_config("transformer", path, read)


def _checked_config(part: str, path: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    def checked(path: Path) -> Any:
        config = read(read_json(path))
        for name, value in dataclasses.asdict(config).items():
            values = value if type(value) is tuple else (value,)
            most = LIMITS.get(name, LIMITS.get(f"{part}.{name}", LIMIT))
            least = 0 if name == "freq_shift" else 1
            numbers = [number for number in values if type(number) in (int, float)]
            ok = all(  # NaN is not
                least <= n <= most if type(n) is int else 0 < n <= most for n in numbers
            )
            if not ok or len(values) > LONGEST:
                several = f"{LONGEST} numbers at most, each " if type(value) is tuple else ""
                bounds = f"{least} to {most}"
                if any(type(number) is float for number in numbers):
                    bounds = f"more than 0 and at most {most}"
                raise ValueError(f"{name}: got {value!r:.80}, expected {several}{bounds}")
        return config

    return named(path, checked)
