"""CUDA graphs: the UNet launched once as a whole, in place of its some thousand kernels one by one.

A graph repeats the same kernels on the same memory, so what changes from step to step is copied
into static buffers: the latent, the time, the rows of an edit's tables. Edits are gated by value,
so their tensors have the same shapes at every step and one graph serves a whole run. What remains
outside is guidance and the sampler's update, about a dozen operations on one latent.
https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_unflatten

from ..models import ops
from ..models.denoiser import Denoiser

KEPT = 8  # graphs; each holds its buffers, so the ones not used for longest are dropped
WARM_UP = 3  # calls before the capture: they compile kernels, fill caches, choose algorithms


class GraphedUNet:
    """The UNet by CUDA graphs: called as the UNet is, with the same results.

    Under gradients it is the UNet itself, and where a module has hooks, a forward of its own or a
    class that is neither torch's nor minisd's (LoRA), as a graph calls no Python. A graph is of
    one choice of attention, of the modules, and of the place of weights and buffers: new values in
    place are seen, new tensors and modules cost a new graph.
    """

    def __init__(self, unet: Denoiser):
        self.unet = unet
        self.prepare, self.prepare_times = unet.prepare, unet.prepare_times
        self.replay = CUDAGraphs()

    def __call__(
        self, x: Tensor, t: Tensor, context: Any, edits: Mapping[str, Any] | None = None
    ) -> Tensor:
        modules = tuple(self.unet.modules())
        if torch.is_grad_enabled() or not all(map(ops.is_known, modules)):
            return self.unet(x, t, context, edits)
        tensors = *self.unet.parameters(), *self.unet.buffers()
        places = tuple(x.data_ptr() for x in tensors)
        key = (self.unet.attention, modules, places)
        return self.replay(key, self.unet, x, t, context, edits)


class Captured(NamedTuple):
    """A captured function: its inputs' buffers, how to replay it, and its outputs."""

    buffers: list[Tensor]
    replay: Callable[[], None]
    outputs: Any


class Inputs(NamedTuple):
    """The inputs of a call, taken apart: each tensor once, what is written to, and the rest."""

    tensors: list[Tensor]
    saves: list[bool]  # which of them the function writes to: the `save` fields of edits
    slots: list[int | None]  # of each leaf its tensor; None: the next of `rest`
    rest: list[Any]
    spec: Any

    @classmethod
    def of(cls, inputs: tuple[Any, ...]) -> "Inputs":
        paths, spec = tree_flatten_with_path(inputs)
        index: dict[int, int] = {}  # a tensor that is there twice has one buffer
        parts = cls([], [], [], [], spec)
        for path, leaf in paths:
            if not isinstance(leaf, Tensor):
                parts.slots.append(None)
                parts.rest.append(leaf)
                continue
            if id(leaf) not in index:
                index[id(leaf)] = len(parts.tensors)
                names = [str(getattr(part, "name", "")) for part in path]
                parts.tensors.append(leaf)
                parts.saves.append(any(name.startswith("save") for name in names))
            parts.slots.append(index[id(leaf)])
        return parts

    def signature(self) -> Hashable:
        """What a graph is captured for: shapes, places, and memory that is written to."""
        places = tuple(
            (tuple(x.shape), x.stride(), x.dtype, x.device, x.data_ptr() if saves else None)
            for x, saves in zip(self.tensors, self.saves)
        )
        return str(self.spec), tuple(self.slots), tuple(self.rest), places

    def with_tensors(self, tensors: list[Tensor]) -> Any:
        """The inputs with these tensors in place of their own."""
        rest = iter(self.rest)
        leaves = [next(rest) if slot is None else tensors[slot] for slot in self.slots]
        return tree_unflatten(leaves, self.spec)


class CUDAGraphs:
    """Calls functions of tensors by replaying a CUDA graph of them.

        replay(key, function, *inputs) == function(*inputs)

    key: what the function does beyond its inputs. inputs: tensors, None, numbers and containers of
    them (AttentionEdit too). The function has to be pure in its tensors, except that it may write
    to the `save` fields of edits: those are not copied, their memory is part of the graph. Outputs
    are new tensors. A graph is captured at the first call for each key and set of shapes.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, Captured] = {}
        self.pool: Any = (
            None  # memory that all graphs share: one runs at a time, outputs are copied
        )
        self.stream: torch.cuda.Stream | None = None  # on which all are captured, as the pool wants

    def __call__(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        inputs = Inputs.of(arguments)
        place = key, inputs.signature()
        captured = self.graphs.pop(place, None)
        if captured is None:
            captured = self.capture(function, inputs)
            while len(self.graphs) >= KEPT:
                self.graphs.pop(next(iter(self.graphs)))
        self.graphs[place] = captured  # the one used last is last
        own = [i for i, saves in enumerate(inputs.saves) if not saves]
        # At every call, in few launches: no version number tells of every change of values.
        torch._foreach_copy_([captured.buffers[i] for i in own], [inputs.tensors[i] for i in own])
        captured.replay()
        for x, saves in zip(inputs.tensors, inputs.saves):
            if saves and not x.is_inference():
                torch.autograd.graph.increment_version(x)  # a graph writes past autograd's count
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, captured.outputs)

    def capture(self, function: Callable[..., Any], inputs: Inputs) -> Captured:
        """Run the function on buffers that are its own, and record it."""
        pairs = list(zip(inputs.tensors, inputs.saves))
        with torch.inference_mode(False):  # later calls may be outside of it
            buffers = [x if saves else x.clone() for x, saves in pairs]
        arguments = inputs.with_tensors(buffers)
        before = [x.clone() if saves else None for x, saves in pairs]
        replay, outputs = self.capture_graph(lambda: function(*arguments), inputs.tensors[0].device)
        for (x, _), old in zip(pairs, before):
            if old is not None:
                x.copy_(old)  # the warm-up has written there
        return Captured(buffers, replay, outputs)

    def capture_graph(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        """(a function that replays `run`, the tensors in which its results then are)."""
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a model on a CUDA device, got {device}")
        with torch.cuda.device(device):
            if self.stream is None or self.stream.device != device:
                self.stream, self.pool = torch.cuda.Stream(), None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                outputs = run()
        self.pool = graph.pool()
        return graph.replay, outputs
