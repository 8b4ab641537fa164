"""FreeU against diffusers'; DeepCache, Plug-and-Play and SEG against their formulas, with hooks on
diffusers' UNet. The bar is 1e-4 of the latents."""

from functools import partial

import p2p_model
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from oracle import difference
from test_cuda_graph import Mocked

import minisd
from minisd import FeatureEdit
from minisd.engine.graphs import GraphedUNet

STEPS, GUIDANCE, BAR = 5, 3.0, 1e-4
B_S = dict(b1=1.5, b2=1.6, s1=0.9, s2=0.2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("freeu"))


def texts(sd):
    return sd.encode_prompt([""]), sd.encode_prompt(["a cat"])


def reference_run(reference, sd, x):
    """diffusers' UNet and DDIM, classifier-free guidance written out."""
    scheduler = DDIMScheduler.from_config({**tiny.SCHEDULER, "_class_name": "DDIMScheduler"})
    scheduler.set_timesteps(STEPS)
    context = torch.cat(texts(sd))
    for t in scheduler.timesteps:
        with torch.no_grad():
            u, c = reference(x.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
        x = scheduler.step(u + GUIDANCE * (c - u), t, x).prev_sample
    return x


def our_run(sd, x, rule, network=None):
    network = sd.network if network is None else network
    predict = rule(network, *texts(sd), GUIDANCE)
    return minisd.denoise(x, minisd.DDIM(sd.schedule, STEPS), predict)


@pytest.mark.parametrize("size", [(8, 8), (12, 10)])
def test_freeu_is_diffusers(pair, size, record_property):
    reference, sd = pair
    x = sd.noise(3, 1, *(4 * side for side in size))
    plain = reference_run(reference, sd, x)
    reference.enable_freeu(**B_S)
    try:
        expected = reference_run(reference, sd, x)
    finally:
        reference.disable_freeu()
    edits = minisd.freeu(sd.unet, b=(1.5, 1.6), s=(0.9, 0.2))
    ours = our_run(sd, x, partial(minisd.cfg, edits=edits))
    error = difference(ours, expected)
    record_property("FreeU against its formula, relative", error)
    assert error <= BAR
    assert difference(plain, expected) > 100 * BAR
    again = our_run(sd, x, partial(minisd.cfg, edits=minisd.freeu(sd.unet, b=(1, 1), s=(1, 1))))
    assert difference(again, plain) <= BAR


def test_freeu_refuses(pair):
    _, sd = pair
    for b, s in (((1.3,), (0.9, 0.2)), ((), ()), ((1,) * 3, (1,) * 3)):
        with pytest.raises(ValueError, match="expected as many of both, 1 to 2"):
            minisd.freeu(sd.unet, b, s)
    with pytest.raises(ValueError, match="s is '1', expected a finite number"):
        minisd.freeu(sd.unet, (1.0,), ("1",))


@torch.no_grad()
def test_deep_cache_is_a_feature_of_an_earlier_step(pair, record_property):
    """The whole UNet in every step, with what the last full step saved in place."""
    _, sd = pair
    x, (uncond, cond) = sd.noise(3, 2), texts(sd)
    context = torch.cat([uncond.expand(2, -1, -1), cond.expand(2, -1, -1)])
    expected, deep = x, torch.empty(4, *sd.unet.shape(sd.unet.deep))
    for step in minisd.DDIM(sd.schedule, STEPS):
        full = step.index % 2 == 0
        edit = FeatureEdit(save=deep) if full else FeatureEdit(inject=deep)
        # A second edit, so that nothing is left out.
        edits = {sd.unet.deep: edit, "mid_block": FeatureEdit()}
        u, c = sd.unet(expected, torch.tensor(step.t), context, edits).chunk(2)
        expected = step(expected, u + GUIDANCE * (c - u))[0]
    rule = partial(minisd.deep_cache, unet=sd.unet, every=2)
    calls = []
    hook = sd.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    ours = our_run(sd, x, rule)
    hook.remove()
    record_property("DeepCache against its formula, relative", difference(ours, expected))
    assert difference(ours, expected) <= BAR and len(calls) == 3  # of 5 steps
    plain = our_run(sd, x, minisd.cfg)
    assert difference(plain, expected) > 1e-3
    every = our_run(sd, x, partial(minisd.deep_cache, unet=sd.unet, every=1))
    assert difference(every, plain) <= 1e-5
    # Two graphs, one of the whole and one of the shallow path.
    graphed = GraphedUNet(sd.unet)
    graphed.replay = Mocked()
    assert difference(our_run(sd, x, rule, graphed), ours) <= 1e-6
    assert graphed.replay.captures == 2


def test_deep_cache_refuses(pair):
    _, sd = pair
    with pytest.raises(ValueError, match="every is 0, expected a whole number, at least 1"):
        minisd.deep_cache(sd.network, *texts(sd), unet=sd.unet, every=0)
    with pytest.raises(ValueError, match="deep_cache takes no edits"):
        edits = minisd.freeu(sd.unet)
        minisd.deep_cache(sd.network, *texts(sd), 3.0, edits, unet=sd.unet)
