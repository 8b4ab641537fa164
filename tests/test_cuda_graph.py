"""The static buffers of CUDA graphs, without a GPU: what is replayed reads nothing but its own
buffers."""

import dataclasses

import p2p_model
import pytest
import torch
from methods import PROMPTS, as_tensor, methods
from torch.utils._pytree import tree_leaves

import minisd
from minisd.engine import graphs
from minisd.engine.graphs import GraphedUNet
from minisd.models.attention import AttentionEdit


class Mocked(graphs.CUDAGraphs):
    """CUDAGraphs with the capture taken out: it calls the function again on the buffers that it was
    captured with, and writes into the same outputs. Like a graph it sees nothing of the later calls
    but what is copied into the buffers.
    """

    def __init__(self):
        super().__init__()
        self.captures = 0

    def capture_graph(self, run, device):
        self.captures += 1
        outputs = run()

        def replay():
            for old, new in zip(tree_leaves(outputs), tree_leaves(run())):
                with torch.inference_mode(old.is_inference()):  # a graph does not ask
                    old.copy_(new)

        return replay, outputs


def test_inputs_are_copied_and_outputs_are_new():
    replay, seen = Mocked(), []

    def function(x, options):
        seen.append((x, options["y"]))
        return x + options["y"], {"twice": 2 * x}

    x, y = torch.randn(3, 4).T, torch.randn(4, 3)
    first, _ = replay("a", function, x, {"y": y, "none": None})
    kept = first.clone()
    other = torch.randn(3, 4).T
    second, dictionary = replay("a", function, other, {"y": y, "none": None})
    assert torch.equal(first, kept) and torch.equal(first, x + y)  # not overwritten by the second
    assert torch.equal(second, other + y) and torch.equal(dictionary["twice"], 2 * other)
    y.mul_(2)  # in place: the buffer follows
    assert torch.equal(replay("a", function, other, {"y": y, "none": None})[0], other + y)
    assert replay.captures == 1
    buffers = {id(tensor) for tensor in seen[0]}
    assert all({id(tensor) for tensor in each} == buffers for each in seen) and id(x) not in buffers


def test_what_needs_a_graph_of_its_own():
    replay, x, y = Mocked(), torch.randn(2, 3), torch.randn(2, 3)

    def add(x, y, n=0):
        return x + y + n

    expected = [
        ("a", x, y, 0),
        ("b", x, y, 0),
        ("a", x[:1], y, 0),
        ("a", x.double(), y, 0),
        ("a", x, y, 1),
        ("a", x, x, 0),
        ("a", x.T.contiguous().T, y, 0),
    ]
    for key, *inputs in expected:
        assert torch.equal(replay(key, add, *inputs), add(*inputs))
    assert replay.captures == len(expected)
    for key, *inputs in expected:
        assert torch.equal(replay(key, add, *inputs), add(*inputs))
    assert replay.captures == len(expected) < graphs.KEPT
    for n in range(graphs.KEPT):  # the old ones are dropped
        replay("c", add, x, y, n)
    assert len(replay.graphs) == graphs.KEPT


def test_save_buffers_are_written_to_themselves_and_once_per_call():
    replay, total = Mocked(), torch.zeros(3)

    def function(x, edits):
        edits["site"].save_mean.add_(x)
        return x

    for i in range(1, 4):
        replay("a", function, torch.full((3,), float(i)), {"site": AttentionEdit(save_mean=total)})
    assert torch.equal(total, torch.full((3,), 6.0)) and replay.captures == 1
    other = torch.zeros(3)
    replay("a", function, torch.ones(3), {"site": AttentionEdit(save_mean=other)})
    assert (
        torch.equal(other, torch.ones(3)) and total[0] == 6 and replay.captures == 2
    )  # other memory, another graph


def test_a_map_that_was_written_by_pointer_is_not_stale():
    """As kernels and graphs write: no version counts it. The next step injects what was kept."""
    replay, kept, nothing = Mocked(), torch.zeros(2, 3), torch.zeros(2, 3)

    def keep(x, edits):
        edits["site"].save.numpy()[:] = x.numpy()
        return x

    def take(x, edits):
        return x + edits["site"].inject

    for i in range(1, 4):
        x, version = torch.full((2, 3), float(i)), kept._version
        replay("keep", keep, x, {"site": AttentionEdit(save=kept)})
        assert kept._version > version
        assert torch.equal(replay("take", take, nothing, {"site": AttentionEdit(inject=kept)}), x)
    version = kept._version
    kept.numpy()[:] = 7  # by somebody else
    taken = replay("take", take, nothing, {"site": AttentionEdit(inject=kept)})
    assert (taken == 7).all() and kept._version == version and replay.captures == 2


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("graph"))[1]


@pytest.fixture
def graphed(sd):
    """The same model by graphs, as `load(graph=True)` makes it on a card, whose captures are
    mocked."""
    other = dataclasses.replace(sd, graph=True)
    assert isinstance(other.network, GraphedUNet)
    other.network.replay = Mocked()
    return other


def captures(sd):
    return sd.network.replay.captures


def test_every_method_draws_the_same_through_the_buffers(sd, graphed):
    """To the bit; and one graph serves all steps of a run."""
    expected = {name: method() for name, (method, _) in methods(sd).items()}
    assert captures(graphed) == 0
    for name, (method, count) in methods(graphed).items():
        before = captures(graphed)
        ours = method()
        assert torch.equal(as_tensor(ours), as_tensor(expected[name])), name
        assert captures(graphed) - before == count, name


def test_a_graph_is_of_the_unet_alone(graphed, monkeypatch):
    """Guidance and update are outside: other scales, levels and samplers replay it."""
    calls, replayed = [], Mocked.__call__

    def counted(self, key, function, *inputs):
        calls.append(function)
        return replayed(self, key, function, *inputs)

    monkeypatch.setattr(Mocked, "__call__", counted)
    for how in ({}, {"guidance": 3.0}, {"sampler": "ddim"}, {"seed": 5, "steps": 2}):
        graphed.txt2img(PROMPTS, progress=False, **{"steps": 4} | how)
    assert calls == [graphed.unet] * (4 + 4 + 4 + 2) and captures(graphed) == 1


def test_inference_mode_inside_and_outside(sd, graphed):
    """Its tensors do not count their changes, and may not be changed outside of it."""
    expected = as_tensor(sd.txt2img(PROMPTS, steps=4, progress=False))
    with torch.inference_mode():
        inside = [as_tensor(graphed.txt2img(PROMPTS, steps=4, progress=False)) for _ in range(2)]
    outside = as_tensor(graphed.txt2img(PROMPTS, steps=4, progress=False))
    assert all(torch.equal(each, expected) for each in (*inside, outside))
    assert captures(graphed) == 1


def test_gradients_go_around_the_graph(graphed):
    uncond = graphed.encode_prompt([""]).requires_grad_()
    predict = minisd.cfg(graphed.network, uncond, graphed.encode_prompt(PROMPTS[:1]), 3.0)
    x, step = graphed.noise(0), next(iter(minisd.DDIM(graphed.schedule, 4)))
    for function in (lambda eps: eps, lambda eps: step(x, eps)[0]):
        uncond.grad = None
        function(predict(x, step)[0]).sum().backward()
        assert uncond.grad.abs().max() > 0 and captures(graphed) == 0


def test_graph_needs_cuda():
    with pytest.raises(
        ValueError, match="graph=True replays CUDA graphs and needs a CUDA device, got cpu"
    ):
        minisd.load("shapes", device="cpu", graph=True)


def test_compile_and_graph_are_one_or_the_other(sd):
    with pytest.raises(ValueError, match="got compile=True and graph=True, expected one of them"):
        _ = dataclasses.replace(sd, compile=True, graph=True).network


def test_a_model_that_is_not_on_a_card_any_more_is_refused(sd):
    with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device, got cpu"):
        graphs.CUDAGraphs()("a", torch.neg, torch.ones(2))
    with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device, got cpu"):
        dataclasses.replace(sd, graph=True).txt2img("a", steps=1, progress=False)


def test_a_graph_is_of_one_choice_of_attention_and_one_place_of_the_weights(graphed):
    """What was captured before either changed is not replayed after it."""
    before, weight = graphed.unet.attention, graphed.unet.time_embedding.linear_1.weight

    def captured():
        graphed.txt2img(PROMPTS, steps=2, progress=False)
        return captures(graphed)

    try:
        assert [captured(), captured()] == [1, 1]
        graphed.unet.attention = "reference"
        assert [captured(), captured()] == [2, 2]
        graphed.unet.attention = before
        weight.data = weight.data.clone()
        assert [captured(), captured()] == [3, 3]
    finally:
        graphed.unet.attention = before


def test_new_values_in_place_are_seen(sd, graphed):
    """The weights are read where they lie, and keys and values are of each run's weights."""
    layer = sd.unet.get_submodule(sd.unet.sites("cross")[0]).to_k
    graphed.txt2img("a", steps=2, progress=False)
    kept = layer.weight.clone()
    try:
        with torch.no_grad():
            layer.weight.mul_(-3)
        changed = as_tensor(graphed.txt2img("a", steps=2, progress=False))
        assert torch.equal(changed, as_tensor(sd.txt2img("a", steps=2, progress=False)))
        assert captures(graphed) == 1
    finally:
        layer.weight.data.copy_(kept)
    assert not torch.equal(changed, as_tensor(sd.txt2img("a", steps=2, progress=False)))


def test_hooks_and_modules_in_place_of_others_are_seen(sd, graphed):
    """A graph calls no Python: with a hook there is none, and other modules cost a new one."""
    run = lambda model: as_tensor(model.txt2img("a", steps=2, progress=False))
    site, plain = sd.unet.get_submodule(sd.unet.sites("self")[0]), run(graphed)
    layer, calls = site.to_q, []
    hook = layer.register_forward_hook(lambda module, args, out: calls.append(module) or 9 * out)
    hooked = run(graphed)
    hook.remove()
    assert len(calls) == 2 and not torch.equal(hooked, plain) and captures(graphed) == 1
    assert torch.equal(run(graphed), plain) and captures(graphed) == 1
    site.to_q = torch.nn.Sequential(layer, torch.nn.Hardtanh())  # the same parameters
    try:
        wrapped = run(graphed)
        assert torch.equal(wrapped, run(sd)) and captures(graphed) == 2
    finally:
        site.to_q = layer
    assert not torch.equal(wrapped, plain) and torch.equal(run(graphed), plain)
