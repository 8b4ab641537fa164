"""The engine on a card: a run replayed as CUDA graphs. No diffusers here, which a GPU machine need
not have."""

import pytest
import torch
from methods import as_tensor, methods

from minisd import edit_prompt, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in float32 and not in TF32, whose rounding makes a last bit a thousandth within
    a few steps."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_run_equals_the_plain_one(compile):
    """The same latents, plain and edited, compiled or not. Not to the bit: a graph's coefficients
    are tensors, and CUDA divides by a number in another way than by a tensor."""
    plain = load("shapes", device="cuda", dtype="float32", compile=compile)
    graphed = load("shapes", device="cuda", dtype="float32", compile=compile, graph=True)
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
    assert len(graphed.unet.replay.graphs) == 2


def test_every_method_draws_the_same_by_graphs():
    """In the mean to one level of 8 bits: where an edit's local blend ends may change with a last
    bit."""
    plain = load("shapes", device="cuda", dtype="float32")
    graphed = load("shapes", device="cuda", dtype="float32", graph=True)
    for (name, (theirs, _)), (ours, _) in zip(methods(plain).items(), methods(graphed).values()):
        assert (as_tensor(ours()) - as_tensor(theirs())).abs().mean() <= 2 / 255, name
        assert graphed.unet.replay.graphs and not getattr(plain.unet, "replay", None)


def test_projections_in_one_product():
    """`load` lays the weights of q, k and v together on CUDA; the latents are those of three
    products."""
    fused, apart = (load("shapes", device="cuda", dtype="float32") for _ in range(2))
    apart.unet.to("cpu")
    apart.unet.to("cuda")
    latents = []
    for sd, together in ((fused, True), (apart, False)):
        sites = [site for name, site in sd.unet.named_modules() if name.endswith("attn1")]
        assert sites and all((site.qkv_weight() is not None) == together for site in sites)
        sd.txt2img(
            "a red circle",
            steps=6,
            progress=False,
            on_step=lambda x, step: latents.append(x.clone()),
        )
    torch.testing.assert_close(latents[5], latents[-1], rtol=1e-3, atol=1e-3)
