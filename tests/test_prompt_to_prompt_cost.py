"""What prompt-to-prompt costs: memory above the plain run, tensors that must not exist, compiled
graphs."""

import math
import weakref

import p2p_model
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisd import DDIM, LocalBlend, PromptToPrompt, cfg, denoise
from minisd.models.unet import UNet, UNetConfig

STEPS = 4
PROMPTS = ["a cat on my mat", "a dog on my mat", "a sad cat on my red mat"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """The tiny model with a UNet of more positions: attention over 32 x 24 and 16 x 12 of them,
    head dim 40."""
    sd = p2p_model.load(tmp_path_factory.mktemp("p2p"))[1]
    torch.manual_seed(0)
    types = dict(
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2
    )
    config = dict(
        block_out_channels=(80, 160),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
    )
    sd.unet = UNet(UNetConfig(sample_size=(32, 24), norm_num_groups=8, **types, **config)).eval()
    return sd


class Live(TorchDispatchMode):
    """Counts the bytes of live storages that ops return, their peak, and the shapes seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.shapes, self.seen = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x):
                self.shapes.add(tuple(x.shape))
                self.count(x.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def test_the_counter_counts():
    with Live() as live:
        a = torch.zeros(1000)
        (a.view(10, 100) + 1).sum()
        b = [a * i for i in range(5)]
        del a
        del b
    assert 4 * 6000 <= live.peak <= 4 * 7100 and live.now < 100 and (10, 100) in live.shapes


def peak(sd, edits, blend):
    """(peak bytes, shapes) of a run of all prompts."""
    cond, uncond = sd.encode_prompt(PROMPTS), sd.encode_prompt([""])
    x = sd.noise(3).expand(len(PROMPTS), -1, -1, -1)
    options = dict(cross_steps=0.5, self_steps=0.5, reweight={"my": 2})
    options |= {"steps": STEPS, "collect_maps": blend}
    p2p = PromptToPrompt(sd, *PROMPTS, **options) if edits else None
    after = LocalBlend(p2p.maps, ("cat", "dog")) if blend else None
    with Live() as live:
        denoise(x, DDIM(sd.schedule, STEPS), cfg(sd.unet, uncond, cond, 7.5, p2p), after)
    return live.peak, live.shapes


@pytest.mark.parametrize("blend", [False, True])
def test_memory_of_a_lockstep_edit(sd, blend):
    """At most 10 % above the plain run of the same batch."""
    plain, _ = peak(sd, False, False)
    edited, shapes = peak(sd, True, blend)
    assert plain > 3e6 and edited <= 1.1 * plain, (
        f"{edited / plain:.3f} of the plain run's {plain / 1e6:.1f} MB"
    )

    grids = [math.prod(sd.unet.grid(site)) for site in sd.unet.sites("self")]
    assert set(grids) == {768, 192}
    assert not [s for s in shapes if len(s) >= 2 and s[-1] == s[-2] and s[-1] in grids]  # no N x N
    maps = {s for s in shapes if len(s) == 4 and s[0] and s[-1] == 77 and s[-2] in grids}
    assert maps == (
        {(3, 4, 192, 77)} if blend else set()
    )  # where the blend reads, and nowhere else


def test_one_graph_for_all_steps(sd):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(sd.unet, backend=backend, fullgraph=True, dynamic=False)
    compiled.prepare = sd.unet.prepare
    cond, uncond = sd.encode_prompt(PROMPTS), sd.encode_prompt([""])
    x = sd.noise(3).expand(len(PROMPTS), -1, -1, -1)

    def run(unet, cross, own):
        p2p = PromptToPrompt(
            sd,
            *PROMPTS,
            steps=STEPS,
            cross_steps=cross,
            self_steps=own,
            reweight={"my": 2},
            collect_maps=True,
        )
        blend = LocalBlend(p2p.maps, ("cat", "dog"), start=0.5)
        return denoise(x, DDIM(sd.schedule, STEPS), cfg(unet, uncond, cond, 7.5, p2p), blend)

    first = {"default": (0.25, 0.75), "my": 1}
    for cross, own in (
        (first, 0.5),
        (0.25, (0.5, 1.0)),
    ):  # another edit with the same shapes is the same graph
        ours = run(compiled, cross, own)
        assert len(graphs) == 1
        torch.testing.assert_close(
            ours, run(sd.unet, cross, own), rtol=1e-4, atol=1e-4 * ours.abs().max().item()
        )
    torch._dynamo.reset()
