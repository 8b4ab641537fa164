"""Bundles: what minisd saves of a run, one safetensors file of checked tensors with JSON fields.

A bundle has a format's name, fields (the JSON) and tensors. `write_bundle` writes all or nothing;
`read_bundle` refuses what is another format, misses something, holds something unknown, another
dtype or a number that is not finite, in one ValueError, before anything is built from it.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write, expect_file

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_bundle(
    path: str | Path, format: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write one file, under its name only when it is complete."""
    owned = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(owned, temporary, {format: json.dumps(dict(fields))})
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error


def read_bundle(
    path: str | Path,
    format: str,
    fields: Collection[str],
    needed: Collection[str],
    known: str,
    may_be_nan: Collection[str] = (),
    integers: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) of a file that `write_bundle` wrote, on the CPU; JSON lists become tuples.

    fields: names that have to be there, and no others. needed: tensors that have to be there.
    known: a pattern that all other tensors' names match. may_be_nan: tensors that need not be
    finite. integers: tensors of int64; all others are floats. ValueError that names the file and
    everything at fault; FileNotFoundError if there is none.
    """
    try:
        expect_file(path)
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(format, "null"))
            # Copied, not mapped: the file may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise  # it names the path
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no {format} that minisd has saved")
    missing = sorted((set(fields) - set(about)) | (set(needed) - set(tensors)))
    strange = [name for name in tensors if name not in needed and not re.fullmatch(known, name)]
    unknown = sorted(set(about) - set(fields)) + strange
    kinds = {name: (torch.int64,) if name in integers else FLOATS for name in tensors}
    others = [f"{n}: {x.dtype}" for n, x in tensors.items() if x.dtype not in kinds[n]]
    infinite = [
        name
        for name, x in tensors.items()
        if x.dtype in kinds[name] and name not in may_be_nan and not x.isfinite().all()
    ]
    if missing or unknown or others or infinite:
        faults = f"missing {missing!r:.200}, unknown {unknown!r:.200}"
        faults += f", of another dtype {others!r:.200}, not finite {infinite!r:.200}"
        raise ValueError(f"{path} is no complete {format}: {faults}")
    return {n: tuple(v) if isinstance(v, list) else v for n, v in about.items()}, tensors
