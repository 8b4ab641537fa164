"""CUDA graphs of a denoising step: launched once as a whole, in place of its some thousand kernels
one by one.

    x_next, x0 = advance(x, combine(unet(x, t, context, edits)), x0_previous, noise, coefficients)

A graph repeats the same kernels on the same memory, so what changes from step to step is copied
into static buffers: the latent, t, the sampler's coefficients (samplers.Coefficients) and noise,
the rows of an edit's tables, the momentum of sega. Edits are gated by value, so their tensors have
the same shapes at every step and one graph serves a whole run. minisd.load(graph=True) gives the
UNet a `Replay`, guidance.py calls it, and samplers.take asks for the whole step. A loop that is
written out with predict(x, step) has the UNet alone as a graph; null-text inversion, which
differentiates, has none while it does. https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_unflatten

KEPT = 8  # graphs; each holds its buffers, so the ones not used for longest are dropped
WARM_UP = 3  # calls before the capture: they compile kernels, fill caches and choose convolution algorithms


class Captured(NamedTuple):
    """A captured function: its inputs' buffers, what was last copied into them, how to replay it,
    and its outputs."""

    buffers: list[Tensor]
    last: list
    replay: Callable[[], None]
    outputs: object


class Replay:
    """Calls functions of tensors by replaying a CUDA graph of them.

        replay(key, function, *inputs) == function(*inputs)

    key: what the function does beyond its inputs (a scale that is a Python number). inputs:
    tensors, None, numbers and containers of them (AttentionEdit too). The function has to be pure
    in its tensors, except that it may write to the `save` fields of edits: those are not copied,
    their memory is part of the graph. Outputs are new tensors. A graph is captured at the first
    call for each key and set of shapes.
    """

    def __init__(self):
        self.graphs: dict[Hashable, Captured] = {}
        self.pool = None  # memory that all graphs share: one runs at a time, and its outputs are copied at once
        self.stream = None  # on which all are captured, as the pool wants it

    def __call__(self, key: Hashable, function: Callable, *inputs):
        paths, spec = tree_flatten_with_path(inputs)
        tensors, slots, rest = (
            [],
            [],
            [],
        )  # a tensor that is there twice has one buffer: slots says where it goes
        index, written = {}, []
        for path, leaf in paths:
            if isinstance(leaf, Tensor):
                saves = any(str(getattr(part, "name", "")).startswith("save") for part in path)
                if id(leaf) not in index:
                    index[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                    written.append(saves)
                slots.append(index[id(leaf)])
            else:
                slots.append(None)
                rest.append(leaf)
        signature = tuple(
            (tuple(x.shape), x.stride(), x.dtype, x.device, x.data_ptr() if saves else None)
            for x, saves in zip(tensors, written)
        )
        whole = (key, str(spec), tuple(slots), tuple(rest), signature)
        captured = self.graphs.pop(whole, None)
        if captured is None:
            captured = self.capture(function, spec, tensors, written, slots, rest)
            while len(self.graphs) >= KEPT:
                self.graphs.pop(next(iter(self.graphs)))
        self.graphs[whole] = captured  # the one used last is last
        for i, x in enumerate(tensors):
            last, version = captured.last[i]
            now = (
                -1 if x.is_inference() else x._version
            )  # tensors of inference_mode do not count their changes
            copied = last is x and version == now >= 0  # keys and values: once for all steps
            if not written[i] and not copied:
                captured.buffers[i].copy_(x)
                captured.last[i] = (x, now)
        captured.replay()
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, captured.outputs)

    def capture(self, function, spec, tensors, written, slots, rest) -> Captured:
        """Run the function on buffers that are its own, and record it."""
        with torch.inference_mode(False):  # later calls may be outside of it
            buffers = [x if saves else x.clone() for x, saves in zip(tensors, written)]
        others = iter(rest)
        arguments = tree_unflatten(
            [next(others) if slot is None else buffers[slot] for slot in slots], spec
        )
        before = [x.clone() if saves else None for x, saves in zip(tensors, written)]
        replay, outputs = self.record(lambda: function(*arguments), tensors[0].device)
        for x, old in zip(tensors, before):
            if old is not None:
                x.copy_(old)  # the warm-up has written there
        return Captured(buffers, [(None, 0)] * len(buffers), replay, outputs)

    def record(self, run: Callable, device: torch.device):
        """(a function that replays `run`, the tensors in which its results then are)."""
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a model on a CUDA device, got {device}; unet.replay = None goes without"
            )
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
