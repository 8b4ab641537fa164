"""How the UNet is computed: as it is, as one compiled graph, or replayed as a CUDA graph; all
images at once, or one after the other.

All are called as the UNet is and give the same results, so that nothing above knows which it has.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..models import ops
from ..models.denoiser import Denoiser
from .graphs import GraphedUNet

Network = Callable[..., Tensor]  # network(x, t, context, edits) -> eps, see UNet.forward


def network(
    unet: Denoiser,
    compile: bool | str = False,
    graph: bool = False,
    batch_invariant: bool = False,
) -> Network:
    """compile: True or the name of a torch.compile backend; graph: CUDA graphs. Not both.
    batch_invariant: image by image."""
    if compile and graph:
        raise ValueError(f"got compile={compile!r} and graph=True, expected one of them")
    computed: Any = unet
    if graph:
        computed = GraphedUNet(unet)
    elif compile:
        computed = CompiledUNet(unet, {"backend": compile} if isinstance(compile, str) else {})
    return ImageByImage(unet, computed) if batch_invariant else computed


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


class ImageByImage:
    """A network that computes each image of a batch by itself, all its guidance groups in one call.

    cuBLAS and cuDNN choose by shapes in which order they sum. Here these are those of one image, so
    its bits do not depend on how many are drawn together. Rows that an edit joins (source_row,
    kv_row) stay in one call: their images are the same bits wherever as many of them are drawn.
    ValueError for several images under an edit that is a function (`apply`), which sees all rows.
    """

    def __init__(self, unet: Denoiser, network: Any):
        self.unet, self.network, self.prepare_times = unet, network, network.prepare_times

    def prepare(self, context: Tensor) -> Any:
        """As `Denoiser.prepare`, text by text."""
        rows = [self.network.prepare(row) for row in context.split(1)]
        if not isinstance(rows[0], Mapping):
            return context
        sites = {site: zip(*(row[site] for row in rows)) for site in rows[0]}
        return {site: tuple(map(torch.cat, pairs)) for site, pairs in sites.items()}

    def __call__(
        self, x: Tensor, t: Tensor, context: Any, edits: Mapping[str, Any] | None = None
    ) -> Tensor:
        B, edits = len(x), self.unet.known(edits, False)
        fields = {name for e in edits.values() for name, y in e._asdict().items() if y is not None}
        if B == 1 or fields & {"source_row", "kv_row"}:
            return self.network(x, t, context, edits)
        if "apply" in fields:
            got = f"{B} images under an edit that is a function of all rows"
            raise ValueError(f"{got}, expected one image, or a model without batch_invariant")
        each = [self.of_image(i, x, t, context, edits) for i in range(B)]
        return torch.stack(each, 1).flatten(0, 1)  # group-major

    def of_image(
        self, i: int, x: Tensor, t: Tensor, context: Any, edits: Mapping[str, Any]
    ) -> Tensor:
        """(G, C, h, w), the groups of image i."""
        B = len(x)
        own = partial(rows_of, i, B)
        texts = tree_map(lambda y: own(y).contiguous(), context)
        parts = {site: tree_map(own, edit) for site, edit in edits.items()}
        parts = {site: e for site, e in parts.items() if any(map(has_rows, tree_leaves(e)))}
        time = t[i : i + 1] if t.ndim and len(t) == B else t
        return self.network(x[i : i + 1], time, texts, parts)


def rows_of(i: int, B: int, y: Any) -> Any:
    """Of the last rows of a batch, which is groups of B images, those of image i; None is None."""
    return y[(i + len(y)) % B :: B] if isinstance(y, Tensor) else y


def has_rows(y: Any) -> bool:
    return isinstance(y, Tensor) and len(y) > 0
