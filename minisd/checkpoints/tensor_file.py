"""The tensors of safetensors files, read as header.py says where they are, and written."""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .header import BYTES, Entry, read_header as read_header
from .sources import CheckpointError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensors(
    path: Path,
    entries: dict[str, Entry],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    copy: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, in the order of their bytes.

    device: None is the CPU. dtype: None is the file's own. memory_format: of the tensors with four
    axes. copy: none of them stays mapped.

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
        stays = entry.start % kind.itemsize == 0 and not copy
        aligned = mapped if stays else mapped.clone()
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
