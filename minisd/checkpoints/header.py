"""The header of a safetensors file, believed in nothing, and read without torch.

8 bytes length, a JSON header of that length, the tensors' data;
https://huggingface.co/docs/safetensors. A header that does not describe the file to its last byte
is an error before any tensor is read, and no claim of the file makes the reader allocate memory.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from .kinds import kind_of_bytes
from .sources import CheckpointError

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
BYTES |= {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER = 10_000_000  # bytes; Stable Diffusion's single file has a quarter of a million
MAX_AXES, MAX_SIDE = 8, 2**40


class Entry(NamedTuple):
    """One tensor of a file: the format's name of its dtype, its shape, the place of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """Names, shapes and places of the tensors of a safetensors file.

    CheckpointError unless the tensors fill the data one after the other to its last byte, as the
    format demands, each with the bytes of its shape and dtype.
    """
    try:
        if (size := path.stat().st_size) < 8:
            raise ValueError(f"it is {size} bytes long, expected at least 8")
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header would be {length} bytes long, the file is {size}")
            if length > MAX_HEADER:
                raise ValueError(
                    f"its header is {length} bytes long, expected at most {MAX_HEADER}"
                )
            header = json.loads(
                file.read(length).decode("utf-8"), object_pairs_hook=_without_repeats
            )
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, expected a JSON object")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            if entry.start != end or entry.stop < end:
                raise ValueError(
                    f"{name} is at bytes {entry.start} to {entry.stop}, expected to begin at {end}"
                )
            if entry.stop > size:
                raise ValueError(
                    f"it ends at byte {size}, inside or before {name}: the file is cut off"
                )
            end = entry.stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        why = _kind(path) or error
        raise CheckpointError(f"{path} cannot be read as safetensors: {why}") from error
    return entries


def _kind(path: Path) -> str | None:
    """What a file is that is no safetensors file, if that is known."""
    try:
        with open(path, "rb") as file:
            return kind_of_bytes(file.read(64))
    except OSError:
        return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is in the header twice")
    return values


def _entry(name: str, value: dict[str, Any], data: int) -> Entry:
    """One entry of the header, whose offsets count from the byte `data`."""
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if not name.isprintable() or type(dtype) is not str or not dtype.isprintable():
        raise ValueError(f"{name!r} of dtype {dtype!r}, expected printable names")
    sides_fit = type(shape) is list and all(type(n) is int and 0 <= n < MAX_SIDE for n in shape)
    if not sides_fit or len(shape) > MAX_AXES:
        raise ValueError(
            f"{name} has shape {shape!r:.80}, expected at most {MAX_AXES} whole numbers below 2**40"
        )
    if type(start) is not int or type(stop) is not int:
        raise ValueError(f"{name} has offsets {start!r} and {stop!r}, expected whole numbers")
    if dtype in BYTES and stop - start != (expected := math.prod(shape) * BYTES[dtype]):
        raise ValueError(
            f"{name} has {stop - start} bytes, expected {expected} for {dtype} {shape}"
        )
    return Entry(dtype, tuple(shape), data + start, data + stop)
