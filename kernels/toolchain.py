"""Which ptxas assembles the kernels for sm_90, chosen at the first launch.

ptxas 12.8, which Triton 3.6.0 and 3.7.1 bundle, makes wrong code for sm_90 of products that are
cut into tiles of two widths: the second product's descriptor is computed from a register that
nothing has written. The kernels here have no such product, and none of their compiled forms that
were looked at (bench/sass.py) has the fault. All the same a newer ptxas is taken where there is
one: each of these Triton packages holds a second, `ptxas-blackwell`, which it uses for sm_100
(Triton 3.9.0 for sm_90, too). ptxas 13 writes code for drivers of CUDA 13, so it is taken only
where torch was built for CUDA 13 or later; without it 12.8 stays.

A ptxas that the user has chosen, by TRITON_PTXAS_PATH or by triton.knobs.nvidia.ptxas, stays.
torch.compile sets that variable, too, to the ptxas of torch's own wheel. The choice is the whole
process's.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
import triton

OLDEST = (12, 8)  # older ones have not been looked at
MENDED = (12, 9)  # the first without the fault


class Tool(NamedTuple):
    """A program and its version, as "12.8"."""

    path: str
    version: str


def number(version: str) -> tuple[int, ...]:
    """ "12.8" -> (12, 8)."""
    return tuple(map(int, version.split(".")[:2]))


def pick(own: Tool | None, bundled: Tool, newer: Tool | None, cuda: str | None) -> Tool:
    """The ptxas to use.

    own: the user's choice, which is never replaced; bundled: Triton's for sm_90; newer: its
    ptxas-blackwell, if there is one; cuda: torch.version.cuda. RuntimeError if what is left is
    older than any that was looked at.
    """
    candidates = [own] if own else [bundled]
    if own is None and newer and number(bundled.version) < MENDED:
        if number(newer.version) < (13,) or number(cuda or "0") >= (13,):
            candidates = [newer, bundled]
    found = max(candidates, key=lambda tool: number(tool.version))
    if number(found.version) < OLDEST:
        raise RuntimeError(
            f"the Triton kernels for sm_90 need ptxas {'.'.join(map(str, OLDEST))} or newer, "
            f"got {found.version} "
            f"({found.path}); set TRITON_PTXAS_PATH to the ptxas of a newer CUDA toolkit "
            f"before the first launch"
        )
    return found


def asked_for(nvidia) -> list[str | None]:
    """The paths that somebody has set, by Triton's knobs or their environment variables; they may
    be those of the bundled programs."""
    knobs = [vars(type(nvidia))[name] for name in ("ptxas", "ptxas_blackwell")]
    return [vars(nvidia).get(knob.name, os.environ.get(knob.key)) for knob in knobs]


@cache
def choose(arch: int) -> None:
    """Set Triton's knob to what `pick` says, on sm_90; once in a process, and never at import."""
    if arch // 10 != 9:
        return
    from triton.backends.nvidia import compiler

    nvidia = triton.knobs.nvidia
    current, newer = (
        Tool(tool.path, tool.version) for tool in (compiler.get_ptxas(arch), nvidia.ptxas_blackwell)
    )
    own = current if current.path in asked_for(nvidia) else None
    found = pick(own, current, newer, torch.version.cuda)
    if found != current:
        nvidia.ptxas = found.path
        # part of the key of Triton's cache of compiled kernels
        compiler.get_ptxas_version.cache_clear()
