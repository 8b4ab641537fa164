"""The safetensors file format: 8 bytes length, a JSON header of that length, the tensors' data.

https://huggingface.co/docs/safetensors. The reader believes nothing: a header that does not
describe the file to its last byte is an error before any tensor is read, and no claim of the file
makes it allocate memory.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sources import CheckpointError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
BYTES |= {name: dtype.itemsize for name, dtype in FLOATS.items()}
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
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    return entries


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


def read_tensors(
    path: Path,
    entries: dict[str, Entry],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, in the order of their bytes.

    device: None is the CPU. dtype: None is the file's own. memory_format: of the tensors with four
    axes.

    The file is mapped into memory, privately: a tensor that stays what it is in the file is not
    copied, its pages are read when they are first used, and what is written into it stays here. A
    tensor that changes its dtype, device or memory format is copied, and so is one that does not
    begin at a multiple of its item size, as in the published float32 files of the UNet and the text
    encoder; the pages behind a copy go back at once. The file may be replaced or removed while its
    tensors are in use; who writes into it, writes into them.
    """
    device = torch.device("cpu") if device is None else device
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # lives on in the tensors
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        size, kind = entry.stop - entry.start, FLOATS[entry.dtype]
        if entry.stop > len(data):
            raise CheckpointError(f"{path} ended inside {name} while it was read")
        if size:
            mapped = torch.frombuffer(data, dtype=torch.uint8, offset=entry.start, count=size)
        else:
            mapped = torch.empty(0, dtype=torch.uint8, device="cpu")
        aligned = mapped if entry.start % kind.itemsize == 0 else mapped.clone()
        tensor = aligned.view(kind).view(entry.shape)
        order = memory_format if len(entry.shape) == 4 else torch.contiguous_format
        tensor = tensor.to(device, dtype or kind, memory_format=order)
        if tensor.data_ptr() != mapped.data_ptr():
            _give_back(data, entry.start, entry.stop)
        yield name, tensor


def _give_back(data: mmap.mmap, start: int, stop: int) -> None:
    """Drop the whole pages between two bytes of a mapped file from memory, where the system can."""
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start and hasattr(data, "madvise"):
        data.madvise(mmap.MADV_DONTNEED, start, stop - start)


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, tensors: Iterable[Tensor]
) -> None:
    """Write a file of one dtype, tensor by tensor, so that only one of them is in memory at a time.

    shapes: name -> shape; tensors: in the same order, axes of length 1 aside. The header says
    {"format": "pt"}, which diffusers asks for.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.numel() != math.prod(shape):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
            raw = tensor.to(FLOATS[dtype]).contiguous().view(-1).view(torch.uint8)
            file.write(raw.numpy().data)
