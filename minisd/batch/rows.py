"""Rows of a JSON-lines file, each of which is one image: what is to be drawn, and its name.

    {"prompt": "a red circle", "seed": 3}
    {"method": "img2img", "image": "in.png", "prompt": "a blue circle", "strength": 0.6}
    {"method": "edit", "source": "a red circle", "target": "a blue circle", "self_steps": 0.6}

A row's id is the sha256 of its recipe: method, arguments, the contents of its image, the model. So
equal rows are one image, and a file that has the name is the image that the row asks for.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__, expect
from ..checkpoints.sources import sha256
from ..drawing import Drawing, Options, check_names
from ..editing.prompt_to_prompt import EditOptions

NEEDED = {"txt2img": ("prompt",), "img2img": ("image", "prompt"), "edit": ("source", "target")}
OWN = {
    "txt2img": ("prompt",),
    "img2img": ("image", "prompt", "strength"),
    "edit": ("source", "target", "local_blend", *EditOptions.__annotations__),
}
TEXTS = ("prompt", "image", "source", "target", "negative_prompt")
# Options of Drawing that one row of a file cannot have.
NOT_HERE = ("uncond", "latents", "on_step", "progress", "num_images", "rule")
OPTIONS = (*(name for name in Options.__annotations__ if name not in NOT_HERE), "pag")
INTERVALS = ("cross_steps", "self_steps")  # [0.2, 0.8] is the interval, not a list of two


@dataclass(frozen=True)
class Job:
    """One image: `id`.png is its name."""

    row: int
    id: str
    method: str
    arguments: Mapping[str, Any]

    @property
    def shape(self) -> tuple[Any, ...]:
        """What images that are drawn in one call have in common."""
        kept = {k: v for k, v in self.arguments.items() if k not in (*TEXTS, "seed")}
        return self.method, json.dumps(kept, sort_keys=True)


@dataclass(frozen=True)
class Failure:
    """A row that makes no job, or was not drawn."""

    row: int
    id: str
    error: str
    given: Any

    def as_json(self) -> str:
        return json.dumps({"row": self.row, "error": self.error, "given": self.given}, indent=2)


def read(path: Path, model: Mapping[str, Any]) -> Iterator[Job | Failure]:
    """The rows of a file, in their order; empty lines are none. model: what says which it is."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for row, line in enumerate(lines, 1):
            if line.strip():
                yield read_row(row, line.strip(), model)


def read_row(row: int, line: str, model: Mapping[str, Any]) -> Job | Failure:
    """A job, or what is wrong with the row."""
    try:
        given = json.loads(line)
        if not isinstance(given, dict):
            raise ValueError(f"got a {type(given).__name__}, expected an object, {{...}}")
        method, arguments = checked(given)
        told = {"method": method, "arguments": arguments, "model": model, "version": __version__}
        if method == "img2img":
            told["image"] = sha256(Path(arguments["image"]))
        return Job(row, digest(told), method, arguments)
    except (ValueError, TypeError, OSError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shown = line.encode("utf-8", "backslashreplace").decode()[:2000]
        return Failure(row, digest([line, row]), reason, shown)


def checked(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(method, arguments) of a row. ValueError or TypeError for what does not fit."""
    arguments = dict(given)
    method = arguments.pop("method", "txt2img")
    if not isinstance(method, str) or method not in NEEDED:
        raise ValueError(f"method is {method!r:.80}, expected one of {', '.join(NEEDED)}")
    check_names("argument", arguments, (*OWN[method], *OPTIONS))
    if missing := [name for name in NEEDED[method] if name not in arguments]:
        raise ValueError(f"there is no {missing[0]!r}, which {method} needs")
    for name in TEXTS:
        if name in arguments and not isinstance(arguments[name], str):
            raise ValueError(f"{name} is {arguments[name]!r:.80}, expected a text")
    for name in ("seed", "guidance"):
        if isinstance(arguments.get(name), list):
            raise ValueError(f"{name} is a list, expected one number: a row is one image")
    how: Any = {name: value for name, value in arguments.items() if name in OPTIONS}
    if (scale := how.pop("pag", None)) is not None:
        expect.number("pag", scale)
    Drawing.of(how)
    return method, arguments


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def pieces(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs in pieces that are drawn in one call each: at most `size` of equal shapes.

    They depend on the file alone, not on what is there already: an image's last bits depend on
    those drawn with it.
    """
    open_pieces: dict[Any, list[Job]] = {}
    found = []
    for job in jobs:
        piece = open_pieces.get(job.shape) if job.method == "txt2img" else None
        if piece is None or len(piece) == size:
            open_pieces[job.shape] = piece = []
            found.append(piece)
        piece.append(job)
    return found
