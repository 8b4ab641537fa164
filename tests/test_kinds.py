"""Files and models that minisd does not draw with are refused when they are loaded, under their
name, in the first line."""

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minisd
from minisd.checkpoints import sources
from minisd.checkpoints.header import read_header
from minisd.checkpoints.kinds import kind_of_pipeline, kind_of_tensors
from minisd.cli import main as cli

SHAPES = sources.bundled()["shapes"]
UNET, VAE, TEXT = (sources.weights_file(part, None) for part in ("unet", "vae", "text_encoder"))


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SHAPES, tmp_path / "model"))


def refusal(source, **arguments):
    with pytest.raises(ValueError) as caught:
        minisd.load(source, device="cpu", **arguments)
    return str(caught.value).splitlines()[0]


# files, by the names that the programs give to their tensors

FILES = [
    ("a LoRA, an addition", ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"]),
    ("a LoRA, an addition", ["unet.down_blocks.0.attentions.0.attn1.to_k.lora_A.weight"]),
    (
        "a LoRA, an addition",
        ["unet.down_blocks.0.attn1.to_q.lora.up.weight"],
    ),
    ("a LoRA, an addition", ["unet.down_blocks.0.attn1.processor.to_q_lora.down.weight"]),
    ("a LoRA, an addition", ["lora_unet_mid_block_attentions_0.hada_w1_a"]),
    ("a LoRA, an addition", ["lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1"]),
    ("an IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
    ("a motion module", ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]),
    ("a ControlNet", ["control_model.input_blocks.0.0.weight"]),
    (
        "a ControlNet",
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.attn2.to_k.weight"],
    ),
    ("a textual inversion", ["emb_params"]),
    ("a textual inversion", ["<my-cat>"]),
    ("a model of the Flux kind", ["double_blocks.0.img_attn.proj.weight"]),
    ("a model of the Flux kind", ["model.diffusion_model.double_blocks.0.img_mod.lin.weight"]),
    ("a model of the Flux kind", ["single_transformer_blocks.0.attn.to_k.weight"]),
    ("a Stable Diffusion 3", ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]),
    (
        "a Stable Diffusion XL",
        [
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
            "model.diffusion_model.input_blocks.0.0.weight",
        ],
    ),
    (
        "a Stable Diffusion 2",
        [
            "cond_stage_model.model.ln_final.bias",
            "model.diffusion_model.input_blocks.0.0.weight",
            "first_stage_model.decoder.conv_in.weight",
        ],
    ),
    ("quantised by bitsandbytes", ["mid_block.attentions.0.proj_in.weight.absmax"]),
    ("a UNet alone: if it belongs to", ["down_blocks.0.attentions.0.attn2.to_k.weight"]),
    (
        "a VAE alone: if it belongs to",
        ["decoder.mid_block.resnets.0.norm1.weight", "quant_conv.bias"],
    ),
    ("a VAE alone: if it belongs to", ["encoder.down.0.block.0.norm1.weight", "quant_conv.bias"]),
    ("a text encoder alone: if it", ["text_model.encoder.layers.0.mlp.fc1.bias", "a"]),
]


@pytest.mark.parametrize("name", ["x.safetensors", "X.SAFETENSORS"])
def test_files_of_other_kinds_are_named(tmp_path, name):
    for kind, names in FILES:
        save_file({each: torch.zeros(2, 2) for each in names}, tmp_path / name)
        told = refusal(tmp_path / name)
        assert told.startswith(f"{tmp_path / name} is {kind}"), told


def test_the_parts_of_a_model_of_version_1_have_their_own_names():
    kinds = ("a UNet alone", "a VAE alone", "a text encoder alone")
    for file, kind in zip((UNET, VAE, TEXT), kinds):
        shapes = {name: entry.shape for name, entry in read_header(SHAPES / file).items()}
        assert kind_of_tensors(shapes) == kind


def foreign_files():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", "")
    return {
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a web page": b"\n  <!DOCTYPE html><html><title>404</title>",
        "a pickle (.ckpt, .bin or .pt) under": pickle.dumps({"state_dict": list(range(99))}, 2),
        "a pickle (.ckpt, .bin or .pt)": archive.getvalue(),
        "a GGUF file": b"GGUF\3\0\0\0" + bytes(40),
        "JSON text": b'{"error": "Repository not found"}',
        "zeros: its download did not finish": bytes(4096),
    }


def test_files_under_another_name_are_named(folder, tmp_path):
    for kind, contents in foreign_files().items():
        for path in (tmp_path / "a.safetensors", folder / VAE):
            path.write_bytes(contents)
            told = refusal(path if path.parent == tmp_path else folder)
            assert told.startswith(f"{path} cannot be read as safetensors: it ")
            assert kind in told


def test_a_part_that_is_another_file_is_named(folder):
    shutil.copy(folder / UNET, folder / VAE)
    assert f"vae, {folder / VAE}: it is a UNet alone" in refusal(folder)
    shutil.copy(SHAPES / VAE, folder / VAE)
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, folder / UNET)
    assert f"unet, {folder / UNET}: it is a LoRA, an addition" in refusal(folder)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_quantised_weights_are_named(folder, kind):
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
    dtype = kinds.get(kind, torch.uint8)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / VAE).items()}
    save_file(tensors, folder / VAE)
    told = refusal(folder)
    assert f"got dtype {kind} (quantised), expected one of F64, F32, F16, BF16; in all" in told


# models, by their configs and channels


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHANNELS = [
    ({"in_channels": 8}, {}, "an InstructPix2Pix model"),
    ({"in_channels": 7}, {}, "an upscaler"),
    ({"in_channels": 5}, {}, "a model of depth to image"),
    (
        {"in_channels": 4, "out_channels": 8},
        {},
        "a network that takes 4 and gives 8 channels beside",
    ),
    ({}, {"latent_channels": 16}, "a network that takes 4 and gives 4 channels beside a VAE with"),
]


def test_unets_of_other_inputs_are_refused_when_they_are_loaded(folder, capsys):
    for unet, vae, kind in CHANNELS:
        for part, values in (("unet", unet), ("vae", vae)):
            shutil.copy(SHAPES / part / "config.json", folder / part)
            change(folder / part / "config.json", **values)
        assert refusal(folder).startswith(f"{folder} is {kind}")
        assert refusal(folder).endswith("which minisd does not draw with")
        assert cli.main(["check", str(folder)]) == 2 and kind in capsys.readouterr().err


def test_stable_diffusion_2_is_refused_in_words(folder, capsys):
    """By its UNet's config, and by its text encoder's alone."""
    change(folder / "text_encoder/config.json", hidden_size=1024, hidden_act="gelu")
    for part in ("text_encoder", "unet"):
        told = refusal(folder)
        assert told.startswith(
            f"{folder / part / 'config.json'}: it is of a Stable Diffusion 2 model"
        )
        assert "another encoder (OpenCLIP's), which minisd does not draw with" in told
        assert cli.main(["check", str(folder)]) == 2 and "OpenCLIP" in capsys.readouterr().err
        shutil.copy(SHAPES / "text_encoder/config.json", folder / "text_encoder")
        change(folder / "unet/config.json", cross_attention_dim=1024, use_linear_projection=True)


def test_single_files_of_other_inputs_are_refused(tmp_path):
    names = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    }
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    assert refusal(path).startswith(f"{path} is an InstructPix2Pix model")


def test_pipelines_of_other_kinds_are_named(folder):
    for name, kind in [
        ("StableDiffusionXLPipeline", "a Stable Diffusion XL model"),
        ("StableDiffusion3Pipeline", "a Stable Diffusion 3 model"),
        ("FluxPipeline", "a model of the Flux kind"),
        ("StableDiffusionUpscalePipeline", "an upscaler"),
    ]:
        change(folder / "model_index.json", _class_name=name)
        assert refusal(folder) == f"{folder} is {kind}, which minisd does not draw with"
    for name in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", None, 5):
        assert kind_of_pipeline({"_class_name": name}) is None
    (folder / "model_index.json").unlink()
    minisd.load(folder, device="cpu")


# arguments that are nearly right


def test_parts_of_a_model_get_the_right_hint(folder):
    hint = f"is a part of a model: give the folder of all parts, {folder}"
    for name in ("model_index.json", "unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        assert refusal(folder / name) == f"{folder / name} {hint}"
    assert refusal(folder / "unet/config.json").endswith("is not a .safetensors file")
    (folder / UNET).rename(folder / UNET.replace("unet/", ""))
    shutil.rmtree(folder / "unet")
    told = refusal(folder)
    assert told.startswith(f"{folder / UNET} is missing; {folder} has diffusion_pytorch_model.safe")
    assert "shards" not in told and "pickle" not in told and "variant" not in told


@pytest.mark.parametrize("load", [minisd.load, minisd.load_dit])
def test_names_of_files_are_no_repos_and_odd_names_are_refused(tmp_path, monkeypatch, load):
    """None of them asks the Hub; load and load_dit say it in one way."""
    monkeypatch.chdir(tmp_path)

    def asked(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(sources, "_fetch", asked)
    for name in (
        "a/b.SAFETENSORS",
        "a/b.safetensors",
        "a/b.ckpt",
        "a/b.PT",
        "a/b.gguf",
        "a/b.json",
    ):
        with pytest.raises(sources.CheckpointError) as caught:
            load(name, device="cpu")
        is_pickle = name.lower().endswith((".ckpt", ".pt"))
        assert ("does not read the pickle" if is_pickle else "there is no ") in str(caught.value)
    os.mkfifo("pipe.safetensors")
    for source, arguments, message in (
        (None, {}, "the model is None, expected a bundled name"),
        ("", {}, "the model is '', expected"),
        ("a" * 3000, {}, "cannot be looked for: File name too long"),
        ("a", {"variant": "../fp16"}, "variant is '../fp16', expected a name such as fp16"),
        ("a", {"variant": 5}, "variant is 5"),
        ("a/b", {"revision": "../main"}, "revision is '../main', expected a name such as main"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load(source, device="cpu", **arguments)
    if load is minisd.load:
        assert "is a pipe or a device, expected a folder" in refusal("pipe.safetensors")


def test_a_variant_is_taken_part_by_part_and_said(folder):
    fp16 = UNET.replace(".safetensors", ".fp16.safetensors")
    hint = "variant fp16 takes diffusion_pytorch_model.fp16.safetensors"
    (folder / UNET).rename(folder / fp16)
    assert refusal(folder).endswith(f"has diffusion_pytorch_model.fp16.safetensors; {hint}")
    with pytest.warns(UserWarning) as caught:
        minisd.load(folder, device="cpu", variant="fp16")
    plain = [
        f"there is no variant fp16 of {folder / name}: that itself is taken" for name in (VAE, TEXT)
    ]
    assert [str(each.message) for each in caught] == plain
    assert "diffusion_pytorch_model.bf16.safetensors is missing" in refusal(folder, variant="bf16")


# files that change while they are in use


def test_a_copy_is_not_changed_by_what_is_written_into_its_files(folder):
    copied = minisd.load(folder, device="cpu", dtype="float16", copy=True)
    before = {name: x.clone() for name, x in copied.text_encoder.state_dict().items()}
    size = (folder / TEXT).stat().st_size
    with open(folder / TEXT, "r+b") as file:  # as cp and rsync --inplace write
        file.write(bytes(size))
    for name, x in copied.text_encoder.state_dict().items():
        assert torch.equal(x, before[name])
    with open(folder / TEXT, "r+b") as file:
        file.truncate(100)
    [image] = copied.txt2img("a red circle", steps=1, progress=False)
    assert image.size == (64, 64)
