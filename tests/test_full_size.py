"""Equality and memory at the full size of Stable Diffusion v1.4, with random weights: 860 M + 84 M
+ 123 M parameters.

The bar is max |difference| <= 2e-5 max |reference| in fp32. Ours and the reference share one copy
of the weights.
"""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import AutoencoderKL as ReferenceVAE, UNet2DConditionModel
from oracle import difference
from safetensors.torch import save_file
from transformers import CLIPTextConfig as ReferenceTextConfig, CLIPTextModel as ReferenceText

from minisd import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet, UNetConfig, VAEConfig

pytestmark = pytest.mark.full
BAR = 2e-5


def build_reference(name):
    """diffusers' or transformers' model of SD v1.4's size: fresh layers are random already, norms
    are made so."""
    torch.manual_seed(0)
    if name == "unet":
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    elif name == "vae":
        model = ReferenceVAE(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    else:
        model = ReferenceText(
            ReferenceTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def share(ours, reference):
    """Ours, built without memory, on the reference's own tensors."""
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    return ours.eval()


def assert_equal(name, ours, reference, record_property):
    far = difference(ours, reference)
    record_property(name, far)
    assert far <= BAR


def test_unet(record_property):
    reference = build_reference("unet")
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(dict(reference.config)))
    share(ours, reference)
    assert ours.config == UNetConfig() and len(ours.sites()) == 32
    for size, t in (((2, 4, 64, 64), 981), ((1, 4, 72, 40), 1)):
        x, context = torch.randn(size), torch.randn(size[0], 77, 768)
        with torch.no_grad():
            eps = reference(x, t, context).sample
            assert_equal(f"UNet {size}", ours(x, torch.tensor(t), context), eps, record_property)
    ours.to(memory_format=torch.channels_last)  # as `load` has it, for models/ops.py
    with torch.no_grad():
        by_windows = ours(x, torch.tensor(t), context)
        assert_equal(f"UNet {size} in channels_last", by_windows, eps, record_property)


def test_vae(record_property):
    reference = build_reference("vae")
    with torch.device("meta"):
        ours = AutoencoderKL(VAEConfig.from_dict(dict(reference.config)))
    share(ours, reference)
    assert ours.config == VAEConfig() and ours.factor == 8
    x, z = torch.rand(1, 3, 512, 512) * 2 - 1, torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        posterior = reference.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        assert_equal("VAE encode, mean", mean, posterior.mean, record_property)
        assert_equal("VAE encode, logvar", logvar, posterior.logvar, record_property)
        image = reference.decode(z).sample
        assert_equal("VAE decode", ours.decode(z), image, record_property)
        ours.to(memory_format=torch.channels_last)
        assert_equal("VAE decode in channels_last", ours.decode(z), image, record_property)


def test_text(record_property):
    reference = build_reference("text")
    with torch.device("meta"):
        ours = CLIPTextModel(CLIPTextConfig.from_dict(reference.config.to_dict()))
    share(ours, reference)
    assert ours.config == CLIPTextConfig()
    ids = torch.randint(0, 49406, (4, 77))
    ids[:, 0] = 49406
    for row, length in enumerate(
        (1, 8, 40, 76)
    ):  # the end token, and pads after it, as a tokenizer makes them
        ids[row, length:] = 49407
    with torch.no_grad():
        assert_equal("CLIP-L", ours(ids), reference(ids).last_hidden_state, record_property)


LOAD = """
import json, sys, minisd, minisd.pipeline

def memory(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key)]
    return 1024 * int(line.split()[1])

before = memory("VmRSS")
sd = minisd.load(sys.argv[1], device="cpu", dtype="float32")
weights = sum(p.nbytes for model in (sd.unet, sd.vae, sd.text_encoder) for p in model.parameters())
print(json.dumps({"weights": weights, "peak": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full-size checkpoint of fp16 files in diffusers' layout."""
    tmp_path = tmp_path_factory.mktemp("full")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        reference = build_reference(part.removesuffix("_encoder")).half()
        (tmp_path / part).mkdir()
        save_file(reference.state_dict(), tmp_path / part / f"{name}.safetensors")
        config = reference.config.to_dict() if part == "text_encoder" else dict(reference.config)
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny.SCHEDULER))
    tiny.tokenizer_files(tmp_path / "tokenizer")
    return tmp_path


def run(program, folder):
    """What a program of its own process prints, JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_loading_takes_little_more_than_the_weights(folder, record_property):
    """A folder of fp16 files, loaded as fp32 in a process of its own: peak resident memory < 1.3 x
    weights."""
    measured = run(LOAD, folder)
    assert measured["weights"] == 4 * (859_520_964 + 83_653_863 + 123_060_480)
    record_property("loading, peak memory over weights", measured["peak"] / measured["weights"])
    assert measured["peak"] < 1.3 * measured["weights"]


EDIT = """
import json, sys, torch, minisd
from minisd.editing.null_text import Objective, adam

def memory(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key)]
    return 1024 * int(line.split()[1])

sd = minisd.load(sys.argv[1], device="cpu", dtype="float32")
loaded = memory("VmRSS")
prompts = ["a cat on my mat", "a dog on my mat"]
null, cond = sd.encode_prompt([""]), sd.encode_prompt(prompts)
p2p = minisd.PromptToPrompt(sd, *prompts, steps=50)
x, eps_c, target = torch.randn(3, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
step = next(iter(minisd.DDIM(sd.schedule, 50)))

phi = null.clone()
objective = Objective(sd, step, x, eps_c, target, 7.5, recompute=False)
[(rows, loss)] = adam(objective, phi, inner_steps=1, lr=1e-2, stop=1e-5)
optimised = memory("VmHWM")
with torch.no_grad():
    pair = x.expand(2, -1, -1, -1)
    out, _ = step(pair, minisd.cfg(sd.network, phi, cond, 7.5, p2p)(pair, step)[0])
moved = (phi - null).abs()
print(json.dumps({
    "loaded": loaded, "optimised": optimised, "edited": memory("VmHWM"), "loss": loss.item(),
    "moved": [moved.max().item(), (moved > 0.009).float().mean().item()], "finite":
    out.isfinite().all().item(), "differ": (out[0] - out[1]).abs().max().item(),
}))
"""


def test_a_null_text_step_and_an_edit_step_fit_12_gb(folder, record_property):
    """One inner step of Adam on the unconditional embedding and one guided step of prompt-to-prompt
    at 512 x 512."""
    measured = run(EDIT, folder)
    for name in ("loaded", "optimised", "edited"):
        record_property(f"null-text and edit, GB resident, {name}", measured[name] / 1e9)
    assert measured["edited"] < 12e9
    assert measured["loss"] > 0 and measured["finite"] and measured["differ"] > 0
    biggest, share = measured["moved"]  # the first step of Adam is lr wherever there is a gradient
    assert 0.009 < biggest < 0.0101 and share > 0.9
