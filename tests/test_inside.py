"""Captured maps and features are those of diffusers' UNet; patched runs, and what zeroing changes,
are what edits written by hand give."""

import math

import numpy as np
import p2p_model
import pytest
import torch
from methods import as_tensor
from oracle import difference, return_latents
from PIL import Image

import minisd
from minisd import AttentionEdit

SOURCE, TARGET = "a cat", "a dog"
HOW = {"steps": 3, "sampler": "ddim", "seed": 4, "guidance": 3.0, "progress": False}
OF = {name: value for name, value in HOW.items() if name != "steps"} | {"of_steps": 3}
BAR = 1e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("inside"))


def inside_of(reference, sd, x, t, prompt):
    """{attention site: (q, k) of the row} of diffusers' UNet."""
    seen, hooks = {}, []
    for site in sd.unet.sites():
        module = reference.get_submodule(site)
        for part in "qk":
            layer = module.get_submodule(f"to_{part}")
            keep = lambda m, args, out, key=(site, part), n=module.heads: seen.__setitem__(
                key, out[0].unflatten(-1, (n, -1)).transpose(0, 1)
            )
            hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        reference(x, t, sd.encode_prompt([prompt]))
    for hook in hooks:
        hook.remove()
    return {site: (seen[site, "q"], seen[site, "k"]) for site in sd.unet.sites()}


def test_captured_is_what_diffusers_computes(pair):
    reference, sd = pair
    latents = [sd.noise(4)]
    on_step = lambda x, step: latents.append(x)
    seen = minisd.capture(sd, SOURCE, on_step=on_step, **HOW)
    names = [*sd.unet.sites("cross"), *sd.unet.sites("self"), *sd.unet.sites("feature")]
    assert list(seen) == [(i, name) for i in range(3) for name in names] and len(seen) == len(
        list(seen)
    )
    assert torch.equal(
        as_tensor([seen.image]), as_tensor(sd.txt2img(SOURCE, **HOW))
    )  # reading changes nothing
    for i, t in seen.t.items():
        at = inside_of(reference, sd, latents[i], t, SOURCE)
        for site, (q, k) in at.items():
            P = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
            assert difference(seen[i, site], P) <= BAR
            assert difference(seen[i, f"{site}.q"], q) <= BAR
            assert difference(seen[i, f"{site}.k"], k) <= BAR
        for name in names:
            assert seen[i, name].shape == sd.unet.shape(name)
    site = sd.unet.sites("cross")[0]
    columns = [2, 3, 4]  # a letter is a token
    expected = seen[1, site][:, :, columns].mean((0, 2)).view(8, 8)
    assert torch.allclose(seen.word("cat", step=1, site=site), expected, atol=1e-7)
    assert seen.word("cat").shape == (8, 8)
    with pytest.raises(KeyError, match="was not captured: steps"):
        seen[3, site]
    with pytest.raises(KeyError, match="no cross-attention was captured at step 7"):
        seen.word("cat", step=7)
    with pytest.raises(ValueError, match="'cow'"):
        seen.word("cow")


def test_plots_show_the_map_over_the_image(pair):
    _, sd = pair
    seen = minisd.capture(sd, SOURCE, steps=[1], **OF)
    cross, own = sd.unet.sites("cross")[0], sd.unet.sites("self")[0]
    plots = [
        seen.plot(1, cross, "cat"),
        seen.plot(1, own, at=(0, 7)),
        seen.plot(1, own, at=(7, 0)),
        *(seen.plot(1, name) for name in ("mid_block", f"{own}.q", f"{own}.out")),
    ]
    assert {plot.size for plot in plots} == {seen.image.size}
    assert len({plot.tobytes() for plot in plots}) == len(plots)
    for wrong, match in (
        (lambda: seen.plot(1, cross), "expected a word whose map is shown"),
        (lambda: seen.plot(1, own), "at is None, expected a .row, column. of the .8, 8. grid"),
        (lambda: seen.plot(1, own, at=(8, 0)), "at is .8, 0., expected"),
        (lambda: seen.plot(1, f"{cross}.k"), "belongs to the text's tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


def test_what_it_would_take_is_said_before_it_is_drawn(pair, monkeypatch):
    _, sd = pair
    monkeypatch.setattr(sd, "encode_prompt", None)
    with pytest.raises(MemoryError, match=r"94 sites in 3 steps take .* GB, the limit is 1e-06 GB"):
        minisd.capture(sd, SOURCE, limit=1000, **HOW)
    with pytest.raises(ValueError, match="one of steps is 3, expected a whole number from 0 to 2"):
        minisd.capture(sd, SOURCE, steps=[9, 1, 3], **OF)
    with pytest.raises(ValueError, match="one of steps is None"):
        minisd.capture(sd, SOURCE, steps=[], **OF)
    with pytest.raises(ValueError, match="no skip or cross-attention site is picked by '3x3'"):
        minisd.capture(sd, SOURCE, sites="3x3", kinds=("skip", "cross"), **HOW)
    with pytest.raises(ValueError, match="rule has no effect"):
        minisd.capture(sd, SOURCE, rule=minisd.pag, **HOW)
    with pytest.raises(ValueError, match="of_steps=50 has no effect on all of 3 steps"):
        minisd.capture(sd, SOURCE, of_steps=50, **HOW)
    with pytest.raises(ValueError, match="num_images has no effect"):
        minisd.capture(sd, SOURCE, num_images=2)


def test_the_limit_is_what_is_kept(pair):
    _, sd = pair
    how = {"sites": ["4x4"], "kinds": ("cross", "skip"), "steps": [0, 2], **OF}
    seen = minisd.capture(sd, SOURCE, **how)
    size = sum(x.numel() * x.element_size() for pair in seen.kept.values() for x in pair)
    minisd.capture(sd, SOURCE, limit=size, **how)
    with pytest.raises(MemoryError):
        minisd.capture(sd, SOURCE, limit=size - 1, **how)


def test_patching_a_run_with_itself_changes_nothing(pair):
    _, sd = pair
    seen = minisd.capture(sd, SOURCE, **HOW)
    plain = as_tensor(sd.txt2img(SOURCE, **HOW))
    again = as_tensor(minisd.patch(sd, SOURCE, seen, **HOW))
    assert (again - plain).abs().max() <= 2.1 / 255


def test_patched_cross_attention_is_prompt_to_prompts(pair, monkeypatch):
    """All maps of another prompt: what `edit_prompt` does with a source row."""
    _, sd = pair
    seen = minisd.capture(sd, SOURCE, kinds=["cross"], **HOW)
    return_latents(sd, monkeypatch)
    patched = minisd.patch(sd, TARGET, seen, **HOW)
    expected = minisd.edit_prompt(sd, SOURCE, TARGET, cross_steps=1.0, self_steps=0.0, **HOW)[1:]
    assert difference(patched, expected) <= BAR
    plain = sd.txt2img(TARGET, **HOW)
    assert difference(plain, expected) > 100 * BAR
    first = [key for key in seen if key[0] == 0]
    some = minisd.patch(sd, TARGET, seen, first, **HOW)
    expected = minisd.edit_prompt(sd, SOURCE, TARGET, cross_steps=0.4, self_steps=0.0, **HOW)[1:]
    assert difference(some, expected) <= BAR
    two = minisd.patch(sd, TARGET, seen, first, num_images=2, **HOW)
    assert difference(two[:1], some) <= BAR


def test_patching_refuses_other_steps_and_keys(pair):
    _, sd = pair
    seen = minisd.capture(sd, SOURCE, kinds=["block"], steps=[0], **OF)
    with pytest.raises(
        ValueError, match="step 0 is at timestep .*, expected .* as in the captured"
    ):
        minisd.patch(sd, SOURCE, seen, **HOW | {"steps": 4})
    with pytest.raises(ValueError, match=r"\(1, 'mid_block'\) was not captured"):
        minisd.patch(sd, SOURCE, seen, [(1, "mid_block")], **HOW)
    with pytest.raises(ValueError, match=r"has the grid \(4, 8\), the captured run had \(4, 4\)"):
        minisd.patch(sd, SOURCE, seen, [(0, "mid_block")], width=64, **HOW)


# ---- attribution


def region():
    mask = np.zeros((32, 32), bool)
    mask[:16, :8] = True
    return mask


def test_an_effect_is_that_of_a_column_set_to_zero(pair):
    """Each part alone, by an edit written by hand; the sum over the pixels as a loop."""
    _, sd = pair
    site = sd.unet.sites("cross")[1]
    found = minisd.attribute(
        sd, SOURCE, region(), by=("step", "head", "token"), sites=site, steps=[1], batch=5, **OF
    )
    assert len(found.effects) == 2 * 6  # heads; <bos>, a, c, a, t, <eos>
    assert [e.inside for e in found.effects] == sorted(e.inside for e in found.effects)[::-1]
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt([SOURCE])
    plain = as_tensor(sd.txt2img(SOURCE, **HOW))
    assert torch.equal(as_tensor([found.image]), plain)
    for effect in found.effects[:3]:
        assert effect.step == 1 and effect.site is None
        table = torch.ones(1, 2, 77)
        table[0, effect.head, effect.token[0]] = 0
        on, off = AttentionEdit(reweight=table), AttentionEdit(reweight=torch.ones(1, 2, 77))
        edits = lambda step, on=on, off=off: {site: on if step.index == 1 else off}
        predict = minisd.cfg(sd.network, uncond, cond, 3.0, edits)
        z = minisd.denoise(sd.noise(4), minisd.DDIM(sd.schedule, 3), predict)
        apart = (as_tensor(sd.decode(z)) - plain).abs()[0] / 2
        total = sum(apart[c, y, x] for c in range(3) for y in range(16) for x in range(8))
        assert abs(effect.inside - float(total) / (3 * 16 * 8)) <= 1e-3
        assert effect.outside >= 0
    table = found.table(3).splitlines()
    assert len(table) == 4 and "step 1, head" in table[1] and "without" in table[0]
    assert len(found.without) == 7 and found.sheet().width > 8 * 32


def test_what_is_not_taken_apart_is_zeroed_together(pair):
    _, sd = pair
    found = minisd.attribute(sd, SOURCE, region(), by=("site",), **HOW)
    assert [e.name for e in found.effects] == [e.site for e in found.effects]
    assert {e.site for e in found.effects} == set(sd.unet.sites("cross"))
    [all_of_it] = minisd.attribute(sd, SOURCE, region(), by=(), **HOW).effects
    assert all_of_it.name == "all" and all_of_it.inside > 0
    assert Image.fromarray(region()).size == (32, 32)


def test_too_many_parts_are_counted_before_any_is_drawn(pair, monkeypatch):
    _, sd = pair
    monkeypatch.setattr(sd, "encode_prompt", None)
    axes = ("step", "site", "head", "token")
    with pytest.raises(
        ValueError, match="got 252 parts, each a drawing of 3 steps, expected 1 to 9"
    ):
        minisd.attribute(sd, SOURCE, region(), by=axes, most=9, **HOW)
    with pytest.raises(
        ValueError, match=r"the region is \(8, 8\), expected the image's \(32, 32\)"
    ):
        minisd.attribute(sd, SOURCE, np.ones((8, 8), bool), **HOW)
    with pytest.raises(ValueError, match="the region is the whole image"):
        minisd.attribute(sd, SOURCE, np.ones((32, 32), bool), **HOW)
    with pytest.raises(ValueError, match=r"by: got \['tokens'\], expected some of \('step'"):
        minisd.attribute(sd, SOURCE, region(), by=("tokens",), **HOW)
