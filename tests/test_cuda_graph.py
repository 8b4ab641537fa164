"""The static buffers of CUDA graphs, without a GPU: what is replayed reads nothing but its own
buffers."""

import p2p_model
import pytest
import torch
from methods import PROMPTS, as_tensor, methods
from torch.utils._pytree import tree_leaves

import minisd
from minisd.engine import graphs as cuda_graph
from minisd.models.attention import AttentionEdit


class Mocked(cuda_graph.Replay):
    """Replay with the capture taken out: it calls the function again on the buffers that it was
    captured with, and writes into the same outputs. Like a graph it sees nothing of the later calls
    but what is copied into the buffers.
    """

    def __init__(self):
        super().__init__()
        self.captures = 0

    def record(self, run, device):
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
    assert replay.captures == len(expected) < cuda_graph.KEPT
    for n in range(cuda_graph.KEPT):  # the old ones are dropped
        replay("c", add, x, y, n)
    assert len(replay.graphs) == cuda_graph.KEPT


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


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("graph"))[1]


def test_every_method_draws_the_same_through_the_buffers(sd):
    """To 8 bits for pictures, 1e-5 for latents; and one graph, of the whole step, serves all steps
    of a run."""
    expected = {name: method() for name, (method, _) in methods(sd).items()}
    sd.unet.replay = Mocked()
    try:
        for name, (method, graphs) in methods(sd).items():
            before = sd.unet.replay.captures
            ours = method()
            bar = 1e-5 * ours.abs().max() if isinstance(ours, torch.Tensor) else 1 / 250
            assert (as_tensor(ours) - as_tensor(expected[name])).abs().max() <= bar, name
            assert sd.unet.replay.captures - before == graphs, name
            (_, what), *_ = next(reversed(sd.unet.replay.graphs))
            assert what != "unet", name  # it alone: without the guidance and the sampler's update
    finally:
        del sd.unet.replay


def test_inference_mode_inside_and_outside(sd):
    """Its tensors do not count their changes, and may not be changed outside of it."""
    expected, sd.unet.replay = as_tensor(sd.txt2img(PROMPTS, steps=4, progress=False)), Mocked()
    try:
        with torch.inference_mode():
            inside = [as_tensor(sd.txt2img(PROMPTS, steps=4, progress=False)) for _ in range(2)]
        outside = as_tensor(sd.txt2img(PROMPTS, steps=4, progress=False))
        assert (
            all(torch.equal(each, expected) for each in (*inside, outside))
            and sd.unet.replay.captures == 1
        )
    finally:
        del sd.unet.replay


def test_gradients_go_around_the_graph(sd):
    sd.unet.replay = Mocked()
    try:
        uncond = sd.encode_prompt([""]).requires_grad_()
        predict = minisd.cfg(sd.unet, uncond, sd.encode_prompt(PROMPTS[:1]), 3.0)
        x, step = sd.noise(0), next(iter(minisd.DDIM(sd.schedule, 4)))
        for function in (
            lambda: predict(x, step),
            lambda: minisd.sampling.samplers.take(step, predict, x)[0],
        ):
            uncond.grad = None
            function().sum().backward()
            assert uncond.grad.abs().max() > 0 and sd.unet.replay.captures == 0
    finally:
        del sd.unet.replay


def test_graph_needs_cuda():
    with pytest.raises(
        ValueError, match="graph=True replays CUDA graphs and needs a CUDA device, got cpu"
    ):
        minisd.load("shapes", device="cpu", graph=True)


def test_a_model_that_is_not_on_a_card_any_more_is_refused():
    with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device, got cpu"):
        cuda_graph.Replay()("a", torch.neg, torch.ones(2))


def test_a_graph_is_of_one_choice_of_attention_and_one_place_of_the_weights(sd):
    """What was captured before either changed is not replayed after it."""
    sd.unet.replay, before = Mocked(), sd.unet.attention
    weight = sd.unet.time_embedding.linear_1.weight

    def captures():
        sd.txt2img(PROMPTS, steps=2, progress=False)
        return sd.unet.replay.captures

    try:
        assert [captures(), captures()] == [1, 1]
        sd.unet.attention = "reference"
        assert [captures(), captures()] == [2, 2]
        sd.unet.attention = before
        weight.data = weight.data.clone()
        assert [captures(), captures()] == [3, 3]
    finally:
        sd.unet.attention = before
        del sd.unet.replay
