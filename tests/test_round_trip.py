"""One checkpoint in every layout, tiny and of Stable Diffusion v1.4's size, with random weights.

diffusers writes it; minisd reads it in the newest names (fp16), the oldest (fp32, prefixes,
position_ids) and as one file in CompVis' layout, the data of the last two starting at an odd byte;
minisd's exports are read by diffusers. Wherever it has been, it is bit for bit the same, and it
draws the latents that diffusers draws.
"""

import json
import struct
import warnings
from contextlib import contextmanager

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from oracle import difference
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import minisd
from minisd.checkpoints import export, load as checkpoint, tensor_file
from minisd.checkpoints.names import rename_diffusers, to_ldm
from minisd.checkpoints.sources import weights_file

OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


class Default:
    """Stands for a config class with other defaults: what single files are taken for."""

    def __init__(self, config):
        self.config, self.from_dict = config, type(config).from_dict

    def __call__(self):
        return self.config


def tiny_pipeline(folder, monkeypatch):
    """The tiny model in half precision; for the test, single files are of its size."""
    pipe = tiny.pipeline(folder / "vocabulary")
    configs = {
        "unet": minisd.UNetConfig.from_dict(dict(pipe.unet.config)),
        "vae": minisd.VAEConfig.from_dict(dict(pipe.vae.config)),
        "text_encoder": minisd.CLIPTextConfig.from_dict(pipe.text_encoder.config.to_dict()),
    }
    models = {
        part: (model, Default(configs[part])) for part, (model, _) in checkpoint.MODELS.items()
    }
    for module in (checkpoint, export):
        monkeypatch.setattr(module, "MODELS", models)
    return pipe.to(torch.float16)


def full_pipeline(folder, _):
    """SD v1.4's sizes. Built without memory; the values are stretches of one pool, small enough for
    half precision."""
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=512,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_attention_heads=12,
                    num_hidden_layers=12,
                )
            ),
        }
    pool = torch.randn(2_000_003, generator=torch.Generator().manual_seed(0)).half()
    for number, model in enumerate(parts.values()):
        state = {}
        for i, (name, tensor) in enumerate(model.state_dict().items()):
            start = 7919 * (i + 1000 * number) % 1_000_003
            values = (
                pool[start:]
                .repeat(tensor.numel() // (len(pool) - start) + 1)[: tensor.numel()]
                .clone()
            )
            scale = 0.2 if tensor.ndim == 1 else (tensor.numel() // len(tensor)) ** -0.5
            values = values.mul_(scale).add_(
                float("norm" in name and name.endswith("weight") and tensor.ndim == 1)
            )
            state[name] = values.view(tensor.shape)
        model.load_state_dict(state, strict=True, assign=True)
        for module in (
            model.modules()
        ):  # what the state dict does not hold, and the meta device left without values
            if getattr(module, "position_ids", None) is not None:
                module.register_buffer("position_ids", torch.arange(77)[None], persistent=False)
        model.eval()
    return StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(str(tiny.tokenizer_files(folder / "vocabulary"))),
        scheduler=DDIMScheduler.from_config(tiny.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_odd(path, tensors, dtype):
    """A safetensors file whose data starts at an odd byte, as that of the published text encoder
    does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    name_of = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    kinds = {
        name: dtype if tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * kinds[name].itemsize
        header[name] = {
            "dtype": name_of[kinds[name]],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            file.write(tensor.to(kinds[name]).contiguous().numpy())
    assert (8 + len(text)) % 2 == 1


def states(pipe):
    """part -> minisd's name -> diffusers' tensor."""
    found = {part: getattr(pipe, part).state_dict() for part in checkpoint.MODELS}
    return {
        part: {rename_diffusers(part, name): t for name, t in state.items()}
        for part, state in found.items()
    }


def assert_same(got, expected):
    for part, state in expected.items():
        own = got[part] if isinstance(got, dict) else getattr(got, part).state_dict()
        assert own.keys() == state.keys() and all(
            torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in state.items()
        )


def load_half(source, **arguments):
    return checkpoint.load_parts(
        checkpoint.locate(source, **arguments), torch.device("cpu"), torch.float16
    )


@contextmanager
def quietly():
    """Without the warnings of other libraries' pipelines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_names_of_2022(folder, new, expected, small):
    """The layout of the first diffusers: other names in VAE and text encoder, no variant."""
    for part, state in expected.items():
        if part == "vae":
            for now, then in OLD_VAE.items():
                state = {
                    name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t
                    for name, t in state.items()
                }
        if part == "text_encoder":
            state = {f"text_model.{name}": tensor for name, tensor in state.items()}
            state |= {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        if part == "unet" and not small:  # one copy of its 1.7 GB will do
            (folder / part).mkdir(parents=True)
            source = new / weights_file(part, "fp16")
            (folder / weights_file(part, None)).symlink_to(source)
        else:
            write_odd(folder / weights_file(part, None), state, torch.float32)
        (folder / part / "config.json").write_bytes((new / part / "config.json").read_bytes())
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny.SCHEDULER))


def compvis_names(pipe, expected):
    """The tensors as CompVis' single file calls them, which diffusers' converter turns back."""
    config = {part: model() for part, (_, model) in checkpoint.MODELS.items()}
    original = {}
    for part, state in expected.items():
        for name, tensor in state.items():
            convolution = part == "vae" and ".attentions." in name and tensor.ndim == 2
            shaped = tensor[:, :, None, None] if convolution else tensor
            original[to_ldm(part, name, config[part])] = shaped
    converted = convert_ldm_unet_checkpoint(dict(original), dict(pipe.unet.config))
    assert_same({"unet": converted}, {"unet": expected["unet"]})
    converted = convert_ldm_vae_checkpoint(dict(original), dict(pipe.vae.config))
    assert_same({"vae": converted}, {"vae": expected["vae"]})
    in_attention = [t for name, t in original.items() if "attn_1" in name]
    assert sum(tensor.shape[2:] == (1, 1) for tensor in in_attention) == 8
    return original


def exported_again(found, single):
    """The single file that minisd writes of it: the same header."""
    again = single.with_name("again.safetensors")
    export.export_single_file(found, again)
    header, written = (tensor_file.read_header(path) for path in (single, again))
    assert {name: entry[:2] for name, entry in header.items()} == {
        name: entry[:2] for name, entry in written.items()
    }
    return again


def latents_of_diffusers(folder, x, expected):
    """What diffusers draws of the exported folder, whose tensors are the expected ones.

    Empties `expected`: 2 GB of the full size.
    """
    with quietly():
        read = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    read.set_progress_bar_config(disable=True)
    assert_same(states(read), expected)
    expected.clear()
    read.to(torch.float32)
    side = 8 * read.vae_scale_factor
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "latent"}
    size = {"height": side, "width": side}
    return read("a red circle", latents=x.clone(), **size, **options).images


@pytest.mark.parametrize(
    "build", [tiny_pipeline, pytest.param(full_pipeline, marks=pytest.mark.full)]
)
def test_every_layout_there_and_back(build, tmp_path, monkeypatch, record_property):
    small = build is tiny_pipeline
    with quietly():
        pipe = build(tmp_path, monkeypatch)
    pipe.scheduler = DDIMScheduler.from_config(tiny.SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    expected, vocabulary = states(pipe), tmp_path / "vocabulary"

    new = tmp_path / "new"  # diffusers' own writing, in its variant fp16
    with quietly():
        pipe.save_pretrained(new, variant="fp16")
    assert_same(load_half(new, variant="fp16", tokenizer=vocabulary), expected)

    old = tmp_path / "old"
    write_names_of_2022(old, new, expected, small)
    assert_same(load_half(old, tokenizer=vocabulary), expected)

    single = tmp_path / "single.safetensors"
    write_odd(single, compvis_names(pipe, expected), torch.float16)
    found = checkpoint.locate(single, tokenizer=vocabulary)
    export.export(found, tmp_path / "exported")
    if small:
        single = exported_again(found, single)
    del pipe

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    kept = dict(expected) if small else None
    theirs = latents_of_diffusers(tmp_path / "exported", x, expected)
    sd = minisd.load(single, device="cpu", dtype="float32", tokenizer=vocabulary)
    if kept:
        assert_same(sd, kept)
    uncond, cond = sd.encode_prompt(["", "a red circle"]).split(1)
    with torch.no_grad():
        predict = minisd.cfg(sd.unet, uncond, cond, 7.5)
        ours = minisd.denoise(x, minisd.DDIM(sd.schedule, 2), predict)
    far = difference(ours, theirs)
    size = build.__name__.split("_")[0]
    record_property(f"round trip, {size} size, latents: max |difference| / max |ref|", far)
    assert far <= 1e-4
