"""Tiles that were quicker on a real card than the rule's (`TABLE` in tiles.py); `python -m
bench.tune` finds them.

tuned.json: {card, as torch names it: {"op head_dim itemsize": {"BLOCK_N": 64, "num_warps": 4,
...}}}. What is not there is as the rule says. An entry depends on nothing else, so that a row that
is not edited comes out the same beside edited ones, to the last bit.
"""

import json
from functools import cache
from pathlib import Path

import torch

FILE = Path(__file__).with_name("tuned.json")


@cache
def table() -> dict:
    """What tuned.json holds."""
    return json.loads(FILE.read_text(encoding="utf-8"))


@cache
def card(device: torch.device) -> str:
    """The name of the card; asked for once."""
    return torch.cuda.get_device_name(device)


def key(op: str, D: int, itemsize: int) -> str:
    return f"{op} {D} {itemsize}"


def tile(op: str, q: torch.Tensor) -> dict:
    """What replaces the rule's choice in a launch of `op` on q's card; {}: nothing."""
    return (
        table().get(card(q.device), {}).get(key(op, q.shape[3], q.element_size()), {})
        if q.is_cuda
        else {}
    )
