"""The engine on a card: a run replayed as CUDA graphs. No diffusers here, which a GPU machine need
not have."""

import pytest
import torch
from methods import as_tensor, methods

from minisd import edit_prompt, load, load_dit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in float32 and not in TF32, whose rounding makes a last bit a thousandth within
    a few steps."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_a_captured_run_equals_the_plain_one():
    """The same latents, drawn and edited."""
    plain = load("shapes", device="cuda", dtype="float32")
    graphed = load("shapes", device="cuda", dtype="float32", graph=True)
    latents = []
    for sd in (plain, graphed):
        options = {
            "steps": 6,
            "progress": False,
            "on_step": lambda x, step: latents.append(x.clone()),
        }
        for prompt in ("a red circle", "a blue square"):
            sd.txt2img(prompt, **options)
        edit_prompt(sd, "a red circle", "a blue circle", **options)
    half = len(latents) // 2
    assert half == 18
    for ours, theirs in zip(latents[half:], latents[:half]):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert len(graphed.network.replay.graphs) == 2


def test_every_method_draws_the_same_by_graphs():
    """In the mean to one level of 8 bits: where an edit's local blend ends may change with a last
    bit."""
    plain = load("shapes", device="cuda", dtype="float32")
    graphed = load("shapes", device="cuda", dtype="float32", graph=True)
    for (name, (theirs, _)), (ours, _) in zip(methods(plain).items(), methods(graphed).values()):
        assert (as_tensor(ours()) - as_tensor(theirs())).abs().mean() <= 2 / 255, name
        assert graphed.network.replay.graphs and plain.network is plain.unet


@torch.no_grad()
@pytest.mark.parametrize("graph", [False, True])
def test_adapters_and_hooks_on_projections_have_effect(graph):
    """On CUDA, too, q, k and v are computed by the modules that are there, whenever they came."""
    sd = load("shapes", device="cuda", dtype="float32", graph=graph)

    def latents():
        last = []
        sd.txt2img("a red circle", steps=3, progress=False, on_step=lambda x, step: last.append(x))
        return last[-1]

    plain = latents()
    for name in ("to_q", "to_k", "to_v"):
        site = sd.unet.get_submodule(sd.unet.sites("self")[0])
        layer, calls = getattr(site, name), []
        hook = layer.register_forward_hook(
            lambda m, a, out, calls=calls: calls.append(m) or 2 * out
        )
        assert (latents() - plain).abs().max() > 1e-3 and len(calls) == 3
        hook.remove()
        torch.testing.assert_close(latents(), plain)
        setattr(site, name, torch.nn.Sequential(layer, torch.nn.Hardtanh(-0.1, 0.1)))
        assert (latents() - plain).abs().max() > 1e-3
        setattr(site, name, layer)
        torch.testing.assert_close(latents(), plain)


def test_a_dit_draws_its_labels_the_same_by_graphs():
    plain, graphed = (
        load_dit("shapes-dit", device="cuda", dtype="float32", graph=graph)
        for graph in (False, True)
    )
    latents = []
    for dit in (plain, graphed):
        for label in ("a red circle", "a blue square"):
            keep = lambda x, step: latents.append(x.clone())
            dit.generate(label, steps=6, sampler="dpm++", on_step=keep, progress=False)
    for theirs, ours in zip(latents[:12], latents[12:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert graphed.network.replay.graphs and plain.network is plain.dit
