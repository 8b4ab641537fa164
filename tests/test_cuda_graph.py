"""The static buffers of CUDA graphs, without a GPU: what is replayed reads nothing but its own buffers."""

import p2p_model
import pytest
import torch
from torch.utils._pytree import tree_leaves

import minisd
import minisd.images
from minisd import cuda_graph
from minisd.attention import AttentionEdit

PROMPTS = ["a cat on my mat", "a dog on my mat"]


class Mocked(cuda_graph.Replay):
    """Replay with the capture taken out: it calls the function again on the buffers that it was captured with, and
    writes into the same outputs. Like a graph it sees nothing of the later calls but what is copied into the buffers.
    """

    def __init__(self):
        super().__init__()
        self.captures = 0

    def record(self, run):
        self.captures += 1
        outputs = run()

        def replay():
            for old, new in zip(tree_leaves(outputs), tree_leaves(run())):
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
        ("a", x, y, 0), ("b", x, y, 0), ("a", x[:1], y, 0), ("a", x.double(), y, 0), ("a", x, y, 1), ("a", x, x, 0),
        ("a", x.T.contiguous().T, y, 0),
    ]  # fmt: skip
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
    assert torch.equal(other, torch.ones(3)) and total[0] == 6 and replay.captures == 2  # other memory, another graph


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("graph"))[1]


def methods(sd):
    """name -> (drawing or editing, the graphs it captures; 0: it finds one of those before)."""
    options = dict(steps=4, progress=False)
    image = minisd.images.to_pil(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))[0]
    cond, uncond, x = sd.encode_prompt(PROMPTS), sd.encode_prompt([""]), sd.noise(3, batch=2)

    def loop(sampler, predict):
        return lambda: minisd.denoise(x, sampler, predict)

    def there_and_back(refine=0):
        inversion = minisd.invert(sd, image, PROMPTS[0], 4, refine=refine, progress=False)
        return minisd.redraw(sd, inversion, PROMPTS[1], 3, progress=False)

    _, recording = minisd.record(sd, PROMPTS[0], **options)
    mask = torch.zeros(32, 32).index_fill(1, torch.arange(16), 1.0)
    each = [uncond * (1 + 0.1 * i) for i in range(4)]
    ddim = minisd.DDIM(sd.schedule, 4)
    return {
        "dpm++": (lambda: sd.txt2img(PROMPTS, **options), 1),
        "no guidance": (lambda: sd.txt2img(PROMPTS, guidance=1, sampler="ddim", **options), 1),
        "img2img": (lambda: sd.img2img(image, PROMPTS[0], **options), 1),
        "on_step": (lambda: sd.txt2img(PROMPTS[0], on_step=lambda x, step: 0.9 * x, **options), 0),
        "prompt-to-prompt": (
            lambda: minisd.edit_prompt(sd, *PROMPTS, reweight={"dog": 2.0}, local_blend=("cat", "dog"), **options), 1),
        "record": (lambda: minisd.record(sd, PROMPTS[0], **options)[0], 1),
        "eta": (loop(minisd.DDIM(sd.schedule, 4, eta=0.7), minisd.cfg(sd.unet, uncond, cond, 3.0)), 1),
        "inverse": (loop(minisd.DDIM(sd.schedule, 4, inverse=True), minisd.conditional(sd.unet, cond)), 0),
        "erase": (loop(ddim, minisd.erase(sd.unet, uncond, cond, cond[:1])), 1),
        "uncond for each step": (loop(ddim, minisd.cfg(sd.unet, each, cond, 3.0)), 1),
        "replay": (lambda: minisd.replay(sd, recording, PROMPTS[1], progress=False), 1),
        "blend": (lambda: minisd.blend(sd, image, mask, PROMPTS[0], **options), 0),
        "sega": (loop(ddim, minisd.sega(sd.unet, uncond, cond, cond[:1], warmup=1)), 1),
        "invert, redraw": (there_and_back, 2),
        "fixed-point inversion": (lambda: there_and_back(refine=1), 1),  # its second guess starts elsewhere
        "edict": (lambda: minisd.edict(sd, image, *PROMPTS, steps=4, progress=False), 1),
    }  # fmt: skip


def as_tensor(result):
    if isinstance(result, torch.Tensor):
        return result
    return minisd.images.to_tensor(result if isinstance(result, list) else [result], 32, 32)


def test_every_method_draws_the_same_through_the_buffers(sd):
    """To 8 bits for pictures, 1e-5 for latents; and one graph, of the whole step, serves all steps of a run."""
    expected = {name: as_tensor(method()) for name, (method, _) in methods(sd).items()}
    sd.unet.replay = Mocked()
    try:
        for name, (method, graphs) in methods(sd).items():
            before = sd.unet.replay.captures
            ours = as_tensor(method())
            assert (ours - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1 / 250, name
            assert sd.unet.replay.captures - before == graphs, name
            (_, what), *_ = next(reversed(sd.unet.replay.graphs))
            assert what != "unet", name  # it alone: without the guidance and the sampler's update
    finally:
        del sd.unet.replay


def test_gradients_go_around_the_graph(sd):
    sd.unet.replay = Mocked()
    try:
        uncond = sd.encode_prompt([""]).requires_grad_()
        predict = minisd.cfg(sd.unet, uncond, sd.encode_prompt(PROMPTS[:1]), 3.0)
        x, step = sd.noise(0), next(iter(minisd.DDIM(sd.schedule, 4)))
        for function in (lambda: predict(x, step), lambda: minisd.samplers.take(step, predict, x)[0]):
            uncond.grad = None
            function().sum().backward()
            assert uncond.grad.abs().max() > 0 and sd.unet.replay.captures == 0
    finally:
        del sd.unet.replay


def test_graph_needs_cuda():
    with pytest.raises(ValueError, match="graph=True replays CUDA graphs and needs a CUDA device, got cpu"):
        minisd.load("shapes", device="cpu", graph=True)


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
