"""How the UNet is computed: as it is, as one compiled graph, or replayed as a CUDA graph.

All are called as the UNet is and give the same results, so that nothing above knows which it has.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.denoiser import Denoiser
from .graphs import GraphedUNet

Network = Callable[..., Tensor]  # network(x, t, context, edits) -> eps, see UNet.forward


def network(unet: Denoiser, compile: bool | str = False, graph: bool = False) -> Network:
    """compile: True or the name of a torch.compile backend; graph: CUDA graphs. Not both."""
    if compile and graph:
        raise ValueError(f"got compile={compile!r} and graph=True, expected one of them")
    if graph:
        return GraphedUNet(unet)
    if not compile:
        return unet
    options: dict[str, Any] = {"backend": compile} if isinstance(compile, str) else {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in torch 2.10
        options["recompile_limit"] = 256  # sizes and methods have graphs of their own: 8 is too few
    return torch.compile(unet, fullgraph=True, dynamic=False, **options)
