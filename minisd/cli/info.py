"""The command `minisd info`: how an image was drawn, or what is in a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from .lines import joined, of_chunk
from .options import AddCommand, Call, ModelRequest, add_model_options
from .output import AGAIN

# The text chunks of a PNG that are options of the command, under the option's name.
OPTIONS = (
    *("weights", "negative", "strength", "model", "variant", "revision", "tokenizer"),
    *("lora", "embedding"),
    *("seed", "size", "steps", "guidance", "pag", "freeu", "seg", "deep-cache"),
    *("sampler", "dtype", "device"),
)
REPEATED = ("lora", "embedding")  # one in each line


def add_commands(command: AddCommand) -> None:
    parser = command("info", info, "how an image was drawn, or what is in a model")
    what = "a PNG that minisd drew, or a model (as for --model; nothing is downloaded)"
    parser.add_argument("target", help=what)
    add_model_options(parser, local=False)


def info(args: Namespace, call: Call) -> None:
    path = Path(args.target)
    if path.suffix.lower() == ".png" or (path.is_file() and path.suffix.lower() != ".safetensors"):
        call.refuse("it is for models", "variant", "revision", "tokenizer")
        print_image(args.target)
    else:
        print_model(ModelRequest.of(args, args.target, local_files_only=True))


def print_image(path: str) -> None:
    """The settings that a PNG carries, and the command that draws it again.

    Whoever made the PNG wrote them: what would steer a terminal is escaped, and each argument is
    quoted for a shell.
    """
    from PIL import Image, UnidentifiedImageError

    from ..files import expect_file

    expect_file(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            chunks: dict[str, str] = dict(getattr(image, "text", {}))
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} is neither a PNG image nor a .safetensors file") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # it is cut, or a bomb
        raise ValueError(f"{path} cannot be read as a PNG image: {error}") from error
    if not chunks.get("version", "").startswith("minisd "):
        why = "minisd did not draw it, or they were stripped"
        raise ValueError(f"{path} carries no settings: {why}")
    told: Mapping[str, object]
    if "recipe" not in chunks or "command" in chunks:
        again = joined(["minisd", *command_of(chunks)])
        own = {key: value for key, value in chunks.items() if key not in ("recipe", "parameters")}
        told = {key: of_chunk(value) for key, value in own.items()}
    else:  # drawn from Python
        again = f"minisd.save(minisd.from_recipe({path!r}), {AGAIN!r})"
        told = settings_of(chunks)
    more = "\n" + 17 * " "  # a text of several lines cannot be taken for the line below
    settings = [
        f"{key + ':':16} {str(value).replace(chr(10), more)}" for key, value in told.items()
    ]
    text = "\n".join([*settings, "", again])
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda control: ascii(control[0])[1:-1], text))


def settings_of(chunks: Mapping[str, str]) -> dict[str, object]:
    """What a recipe says, one setting a line."""
    try:
        recipe = json.loads(chunks["recipe"])
        is_one = isinstance(recipe, dict)
        if not (
            is_one and all(isinstance(recipe.get(key), dict) for key in ("arguments", "model"))
        ):
            raise ValueError("expected an object with arguments and model")
    except (RecursionError, ValueError) as error:
        raise ValueError(f"its recipe cannot be read: {error}") from error
    told = {**recipe, **recipe["arguments"], **recipe["model"]}
    return {key: value for key, value in told.items() if key not in ("arguments", "model")}


def command_of(chunks: Mapping[str, str]) -> list[str]:
    """The command that draws an image again: the line that its PNG keeps, or one made of its
    settings."""
    chunks = {key: of_chunk(text) for key, text in chunks.items()}
    if "arguments" in chunks:
        try:
            return shlex.split(chunks["arguments"])
        except ValueError as error:
            raise ValueError(f"its arguments cannot be read: {error}") from error
    options = []
    for key in OPTIONS:
        value = chunks.get(key, "")
        for each in value.split("\n") if value and key in REPEATED else [value] * bool(value):
            options += [f"--{key}={each}"] if each.startswith("-") else [f"--{key}", each]
    options += ["-o", AGAIN]
    texts = [chunks[key] for key in ("image", "prompt") if key in chunks]
    dashes = any(text.startswith("-") for text in texts)  # argparse would take them for options
    arguments = [*options, "--", *texts] if dashes else [*texts, *options]
    return [chunks.get("command", "txt2img"), *arguments]


def print_model(request: ModelRequest) -> None:
    """Configs, files and parameter counts of a model, from its headers; nothing is downloaded."""
    from ..checkpoints.header import read_header
    from ..checkpoints.load import MODELS
    from ..checkpoints.sources import CheckpointError

    checkpoint = request.locate()
    total = 0
    for part in MODELS:
        header = read_header(checkpoint.files[part])
        entries = [entry for name, entry in header.items() if checkpoint.rename(part, name)]
        parameters = sum(math.prod(entry.shape) for entry in entries)
        total += parameters
        dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
        tensors = f"{len(entries)} tensors ({dtypes})"
        print(f"{part}: {parameters:,} parameters in {tensors}, {checkpoint.files[part]}")
        for key, value in dataclasses.asdict(checkpoint.configs[part]).items():
            print(f"    {key}: {value}")
    try:
        tokenizer = checkpoint.tokenizer
    except CheckpointError as error:  # a single file without a vocabulary, say
        if request.tokenizer is not None:
            raise
        print(f"tokenizer: {error}")
    else:
        per_prompt = f"{tokenizer.max_length} ids per prompt"
        print(f"tokenizer: {len(tokenizer.vocab):,} pieces, {per_prompt}")
    schedule = checkpoint.schedule
    first, last = schedule.alphas_cumprod[0], schedule.alphas_cumprod[-1]
    print(f"schedule: {len(schedule)} timesteps, alphas_cumprod from {first:.6f} to {last:.6f}")
    print(f"total: {total:,} parameters")
