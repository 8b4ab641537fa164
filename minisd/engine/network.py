"""How the UNet is computed: as it is, as one compiled graph, or replayed as a CUDA graph.

All are called as the UNet is and give the same results, so that nothing above knows which it has.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import ops
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
    return CompiledUNet(unet, {"backend": compile} if isinstance(compile, str) else {})


class CompiledUNet:
    """The UNet as one compiled graph, and the UNet itself while a module has hooks: torch.compile
    does not look again whether there are any, and a graph that was compiled without them would not
    call them."""

    def __init__(self, unet: Denoiser, options: dict[str, Any]):
        self.unet = unet
        self.prepare, self.prepare_times = unet.prepare, unet.prepare_times
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in torch 2.10
            # Sizes and methods have graphs of their own: 8 is too few.
            options = options | {"recompile_limit": 256}
        self.compiled: Network = torch.compile(unet, fullgraph=True, dynamic=False, **options)

    def __call__(
        self, x: Tensor, t: Tensor, context: Any, edits: Mapping[str, Any] | None = None
    ) -> Tensor:
        hooked = any(map(ops.is_hooked, self.unet.modules()))
        return (self.unet if hooked else self.compiled)(x, t, context, edits)
