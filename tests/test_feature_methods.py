"""FreeU against diffusers'; DeepCache, Plug-and-Play and SEG against their formulas, with hooks on
diffusers' UNet. The bar is 1e-4 of the latents."""

from functools import partial

import p2p_model
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from oracle import difference, return_latents
from test_cuda_graph import Mocked
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# ---- Plug-and-Play


def replaced(reference, names, change):
    """Hooks that put change(rows of the output) in place of each module's output."""
    return [
        reference.get_submodule(name).register_forward_hook(lambda m, args, out: change(out))
        for name in names
    ]


def test_plug_and_play_takes_the_sources_feature_and_map(pair, record_property, monkeypatch):
    """Rows: source, target without the text; source, target with it, which the target's take."""
    reference, sd = pair
    return_latents(sd, monkeypatch)
    how = {"steps": STEPS, "sampler": "ddim", "seed": 3, "guidance": GUIDANCE, "progress": False}
    prompts = ["a cat", "a dog"]
    parts = {"feature_steps": 0.8, "self_steps": 0.4, "feature": "up_blocks.1.resnets.1"}
    ours = minisd.plug_and_play(sd, *prompts, **parts, **how)
    scheduler = DDIMScheduler.from_config({**tiny.SCHEDULER, "_class_name": "DDIMScheduler"})
    scheduler.set_timesteps(STEPS)
    x, cond = sd.noise(3).repeat(2, 1, 1, 1), sd.encode_prompt(prompts)
    context = torch.cat([sd.encode_prompt([""]).expand_as(cond), cond])
    take = lambda out: out[[0, 2, 2, 2]]
    own = [f"up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_{part}" for part in "qk"]
    plain = x
    for i, t in enumerate(scheduler.timesteps):
        hooks = replaced(reference, ["up_blocks.1.resnets.1"] if i < 4 else [], take)
        hooks += replaced(reference, own if i < 2 else [], take)
        with torch.no_grad():
            u, c = reference(x.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
        for hook in hooks:
            hook.remove()
        x = scheduler.step(u + GUIDANCE * (c - u), t, x).prev_sample
    error = difference(ours, x)
    record_property("Plug-and-Play against its formula, relative", error)
    assert error <= BAR
    plain = minisd.seed_baseline(sd, *prompts, **how)
    assert difference(plain[1:], x[1:]) > 100 * BAR and difference(plain[:1], x[:1]) <= BAR
    two = minisd.plug_and_play(sd, *prompts, **parts, **how | {"num_images": 2})
    assert difference(two[::2], ours) <= 1e-5
    for wrong, match in (
        (dict(feature="mid_block"), "feature is 'mid_block', expected a resnet: down_blocks.0"),
        (dict(self_steps=2), "self_steps is 2, expected a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            minisd.plug_and_play(sd, *prompts, **wrong)
    with pytest.raises(ValueError, match="got no target"):
        minisd.plug_and_play(sd, "a cat")
    first = minisd.plug_and_play(sd, *prompts, feature="up_blocks.0.resnets.1", **how)
    assert torch.equal(minisd.plug_and_play(sd, *prompts, **how), first)  # of two up blocks


# ---- smoothed-energy guidance


def blurred(q, h, w, sigma):
    """q (N, C) of an h x w grid, every position a sum over all, as loops."""
    out = torch.zeros_like(q)
    for y in range(h):
        for x in range(w):
            total = 0.0
            for v in range(h):
                for u in range(w):
                    weight = torch.exp(torch.tensor(-((y - v) ** 2 + (x - u) ** 2) / 2 / sigma**2))
                    out[y * w + x] += weight * q[v * w + u]
                    total += weight
            out[y * w + x] /= total
    return out


@pytest.mark.parametrize("sigma", [float("inf"), 0.7])
def test_seg_leads_away_from_blurred_queries(pair, sigma, record_property):
    reference, sd = pair
    x, (uncond, cond) = sd.noise(3, 1, 24, 40), texts(sd)
    rule = partial(minisd.seg, seg_scale=2.0, sigma=sigma)
    ours = our_run(sd, x, rule)
    scheduler = DDIMScheduler.from_config({**tiny.SCHEDULER, "_class_name": "DDIMScheduler"})
    scheduler.set_timesteps(STEPS)
    expected, site = x, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

    def change(out):
        mean = out.mean(1, keepdim=True).expand_as(out)
        return mean if sigma == float("inf") else blurred(out[0], 3, 5, sigma)[None]

    for t in scheduler.timesteps:
        with torch.no_grad():
            u, c = (reference(expected, t, text).sample for text in (uncond, cond))
            [hook] = replaced(reference, [site], change)
            p = reference(expected, t, cond).sample
            hook.remove()
        eps = u + GUIDANCE * (c - u) + 2.0 * (c - p)
        expected = scheduler.step(eps, t, expected).prev_sample
    error = difference(ours, expected)
    record_property("SEG against its formula, relative", error)
    assert error <= BAR
    assert difference(our_run(sd, x, minisd.cfg), expected) > 100 * BAR
    graphed = GraphedUNet(sd.unet)
    graphed.replay = Mocked()
    with torch.no_grad():
        assert difference(our_run(sd, x, rule, graphed), ours) <= 1e-6
    assert graphed.replay.captures == 1
    with pytest.raises(ValueError, match="sigma is 0, expected a number above 0"):
        minisd.seg(sd.network, uncond, cond, sigma=0)


def test_seg_refuses_an_edit_where_it_blurs(pair):
    """It would be dropped; elsewhere it has its effect."""
    _, sd = pair
    x, q = sd.noise(3), "mid_block.attentions.0.transformer_blocks.0.attn1.q"
    none = minisd.FeatureEdit(scale=torch.zeros(1, 1, 1, 1))
    rule = partial(minisd.seg, edits=lambda step: {q: none})
    with pytest.raises(ValueError, match=f"{q} is edited and blurred, expected one of them"):
        our_run(sd, x, rule)
    elsewhere = partial(minisd.seg, edits=lambda step: {"mid_block": none})
    assert difference(our_run(sd, x, elsewhere), our_run(sd, x, minisd.seg)) > 1e-3


# ---- cost


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


@torch.no_grad()
@pytest.mark.parametrize("method", ["FreeU", "DeepCache", "SEG", "Plug-and-Play", "capture"])
def test_no_map_of_4096_positions_is_formed(pair, method, monkeypatch):
    """At 4096 positions a map of one head has 2 ** 24 numbers; the largest tensor has fewer."""
    _, sd = pair
    return_latents(sd, monkeypatch)
    how = {"height": 256, "width": 256, "steps": 2, "sampler": "ddim", "progress": False}
    rules = {
        "FreeU": partial(minisd.cfg, edits=minisd.freeu(sd.unet)),
        "DeepCache": partial(minisd.deep_cache, unet=sd.unet, every=2),
        "SEG": partial(minisd.seg, sigma=2.0, sites=sd.unet.sites("self")[:1]),
    }
    with Largest() as seen:
        if method == "Plug-and-Play":
            minisd.plug_and_play(sd, "a", "b", **how)
        elif method == "capture":
            minisd.capture(sd, "a", kinds=["self", "feature"], sites="64x64", **how)
        else:
            sd.txt2img("a", rule=rules[method], **how)
    assert 2**18 < seen.most < 2**24
