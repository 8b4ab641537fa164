"""How a model is computed: dtype "auto", oneDNN, torch.compile; the images stay the same."""

import p2p_model
import pytest
import torch
from methods import PROMPTS, as_tensor, methods

import minisd
from minisd.models import ops
from minisd.pipeline import pick_dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    p2p_model.load(folder)
    return folder


def drawn(sd):
    """Latents of a run and images of an edit."""
    last = {}
    sd.txt2img(PROMPTS, steps=3, seed=1, progress=False, on_step=lambda x, step: last.update(x=x))
    how = {"reweight": {"square": 2.0}, "local_blend": ("circle", "square")}
    edited = minisd.edit_prompt(sd, *PROMPTS, steps=3, progress=False, **how)
    return torch.cat([last["x"], torch.cat([sd.encode_image(image) for image in edited])])


def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch):
    for has, dtype in (
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": 1}, torch.bfloat16),
    ):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": False} | has
        )
        assert pick_dtype("auto", torch.device("cpu")) == dtype
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert pick_dtype(None, torch.device("cpu")) == torch.float32


def test_the_choice_is_shown(folder):
    sd = minisd.load(folder, device="cpu", dtype="auto")
    assert str(sd.dtype).removeprefix("torch.") + " on cpu, sdpa attention" in repr(sd)
    assert sd.dtype == pick_dtype("auto", sd.device)


def test_a_run_embeds_its_times_and_its_text_once(folder):
    """The times of all steps in one call, whatever the method."""
    sd, rows, texts = minisd.load(folder, device="cpu"), [], []
    table, keys = sd.unet.time_table, sd.unet.keys_and_values
    sd.unet.time_table = lambda t: rows.append(len(t)) or table(t)
    sd.unet.keys_and_values = lambda context: texts.append(len(context)) or keys(context)
    for sampler in ("ddim", "dpm++"):
        sd.txt2img(PROMPTS, steps=5, sampler=sampler, progress=False)
    assert rows == [5, 5] and texts == [4, 4]
    minisd.edit_prompt(sd, *PROMPTS, steps=4, progress=False)
    assert rows == [5, 5, 4]
    predict, x = minisd.conditional(sd.unet, sd.encode_prompt(PROMPTS[:1])), sd.noise(0)
    inverse = minisd.denoise(x, minisd.DDIM(sd.schedule, 6, inverse=True), predict)
    assert rows == [5, 5, 4, 6]
    again = minisd.denoise(
        inverse, minisd.DDIM(sd.schedule, 3, skip=1), predict
    )  # other times: a second table
    assert rows == [5, 5, 4, 6, 3] and again.isfinite().all()


@pytest.mark.skipif(not ops.onednn_computes(torch.float32), reason="no oneDNN for this processor")
def test_loaded_models_are_computed_by_onednn(folder, monkeypatch):
    """Linear layers and 1x1 and 3x3 convolutions of few positions, chosen at the call."""
    sd, chosen, by_onednn = minisd.load(folder, device="cpu"), set(), ops.by_onednn

    def noted(layer, kind, x):
        chosen.update([layer] if (choice := by_onednn(layer, kind, x)) else [])
        return choice

    monkeypatch.setattr(ops, "by_onednn", noted)
    ours = drawn(sd)
    small = {sd.vae.quant_conv, sd.vae.post_quant_conv}  # of few channels, called as they are
    small |= {sd.vae.encoder.conv_in, sd.vae.decoder.conv_in}
    for model in (sd.text_encoder, sd.unet, sd.vae):
        layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        assert layers and set(layers) - small <= chosen
        assert {type(layer) for layer in layers} <= {torch.nn.Linear, torch.nn.Conv2d}
    monkeypatch.setattr(ops, "by_onednn", lambda layer, kind, x: False)
    plain = drawn(minisd.load(folder, device="cpu"))
    assert not torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


LEFT_OUT = "no guidance", "inverse", "uncond for each step"  # two latents; others have one
SHAPES = {  # those that no method before has had
    "dpm++": ["2 latents under guidance"],
    "img2img": ["1 latent under guidance"],
    "prompt-to-prompt": ["2 latents under guidance, edited"],
    "erase": ["2 latents, guidance of 3 groups"],
    "replay": ["1 latent under guidance, edited by stored maps"],
    "invert, redraw": ["1 latent without guidance"],  # redraw's are img2img's
    "freeu": ["2 latents under guidance, features edited"],
    "deep cache": ["the whole UNet, a feature saved", "its outermost layers"],
    "pag": ["2 latents, guidance of 3 groups, a group disturbed"],
    "seg": ["2 latents, guidance of 3 groups, its queries blurred"],
    "plug-and-play": ["2 latents under guidance, a feature and maps of other rows"],
    "style": ["2 latents under guidance, keys of two rows, q and k aligned"],
    "masactrl": ["2 latents under guidance, keys and values of other rows"],
    "regional": ["1 latent under guidance, two texts and a bias"],
    "long prompt": ["1 latent under guidance, a longer text"],
    "weights": ["1 latent under guidance, a bias in all rows"],
    "daam": ["1 latent under guidance, all sites' maps summed"],
    "null-text": [
        "1 latent under guidance, the text as it is"
    ],  # its own calls, as those of excite,
    # have gradients and are not compiled
}


@pytest.mark.full
def test_compile_is_one_graph_for_every_method(folder):
    """One for each set of shapes (SHAPES), the same at all steps and whenever it is called again.

    None has a break: `load` compiles with fullgraph=True, which makes that an error. There are more
    than torch's limit of 8. Images are the uncompiled model's to one level of 8 bits, latents to
    1e-4.
    """
    expected = {
        name: method() for name, (method, _) in methods(minisd.load(folder, device="cpu")).items()
    }
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        if (
            len(graphs) == 2
        ):  # of two latents: of one, aot_eager's group_norm refuses strides that inductor takes
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return graph.forward  # as it was traced, which is quicker

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, "counting")
    sd = minisd.load(folder, device="cpu", compile="counting")
    compiled = {name: method for name, (method, _) in methods(sd).items() if name not in LEFT_OUT}
    assert (
        len(graphs) == 1
    )  # of `record`, for the recording to replay: 1 latent under guidance, maps saved
    for name, method in compiled.items():
        before, ours = len(graphs), method()
        assert len(graphs) - before == len(SHAPES.get(name, [])), name
        bar = 1e-4 * expected[name].abs().max() if isinstance(ours, torch.Tensor) else 2.1 / 255
        assert (as_tensor(ours) - as_tensor(expected[name])).abs().max() <= bar, name
    count = len(graphs)
    for method in compiled.values():
        method()
    assert len(graphs) == count == 1 + sum(map(len, SHAPES.values()))
    torch._dynamo.reset()
