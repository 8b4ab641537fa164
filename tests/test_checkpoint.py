"""Loading: layouts, names, strictness, memory. Every checkpoint is tiny and written by the test."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import minisd
from minisd.checkpoints import load as checkpoint, sources
from minisd.checkpoints.names import (
    LDM_PREFIX,
    rename_diffusers,
    rename_ldm,
    to_ldm as written_name,
)
from minisd.cli import main as cli
from minisd.models.tokenizer import CLIPTokenizer as CLIP

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that the test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(source, device="cpu", **arguments):
    return minisd.load(source, device=device, **arguments)


def states(sd):
    return {part: getattr(sd, part).state_dict() for part in checkpoint.MODELS}


def assert_same_weights(sd, expected):
    for part, state in states(expected).items():
        got = getattr(sd, part).state_dict()
        assert got.keys() == state.keys() and all(
            torch.equal(got[name], state[name]) for name in state
        )


def rewrite(path, change):
    """Replace the tensors of a safetensors file by change(tensors)."""
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def refusal(source, **arguments):
    with pytest.raises(ValueError) as caught:
        load(source, **arguments)
    return str(caught.value)


# folders and their names


def test_every_tensor_of_the_folder_is_in_its_place(original):
    sd = load(original)
    for part, file in (("unet", UNET_FILE), ("vae", VAE_FILE), ("text_encoder", TEXT_FILE)):
        tensors = {
            rename_diffusers(part, name): tensor
            for name, tensor in load_file(original / file).items()
        }
        state = getattr(sd, part).state_dict()
        assert state.keys() == tensors.keys() and all(
            torch.equal(state[name], tensors[name]) for name in state
        )
        model = getattr(sd, part)
        assert not model.training and not any(
            parameter.requires_grad for parameter in model.parameters()
        )
    assert sd.unet.config.block_out_channels == (16, 32) and len(sd.schedule) == 1000


def test_old_vae_names_prefixed_text_encoder_and_position_ids(original, folder):
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def old_names(tensors):
        renamed = {
            re.sub(r"to_[qkv]\.|to_out\.0\.", lambda m: old[m[0]], name): t
            for name, t in tensors.items()
        }
        assert (
            sum("proj_attn" in name for name in renamed) == 4
        )  # weight and bias, encoder and decoder
        return renamed

    def prefixed(tensors):
        tensors = {
            "text_model." + name.removeprefix("text_model."): tensor
            for name, tensor in tensors.items()
        }
        return tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    rewrite(folder / VAE_FILE, old_names)
    rewrite(folder / TEXT_FILE, prefixed)
    assert_same_weights(load(folder), load(original))

    def bare(tensors):
        return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}

    rewrite(folder / TEXT_FILE, bare)
    assert_same_weights(load(folder), load(original))

    def whole_clip(tensors):
        others = [
            "vision_model.embeddings.position_ids",
            "vision_model.post_layernorm.bias",
            "logit_scale",
        ]
        others += ["visual_projection.weight", "text_projection.weight"]
        return prefixed(tensors) | {name: torch.ones(2, 3) for name in others}

    rewrite(folder / TEXT_FILE, whole_clip)
    assert_same_weights(load(folder), load(original))


def test_a_tokenizer_written_by_transformers_5(original, folder):
    shutil.rmtree(folder / "tokenizer")
    CLIPTokenizer.from_pretrained(str(tiny.tokenizer_files(folder / "files"))).save_pretrained(
        folder / "tokenizer"
    )
    assert not (folder / "tokenizer" / "vocab.json").exists()
    assert torch.equal(load(folder).tokenizer(["a Cat"]), load(original).tokenizer(["a Cat"]))

    path = (
        folder / "tokenizer" / "tokenizer.json"
    )  # tokenizers before 0.20 wrote a merge as one string
    saved = json.loads(path.read_text())
    saved["model"]["merges"], saved["model"]["vocab"]["ca"] = ["c a"], 514
    path.write_text(json.dumps(saved))
    assert CLIP.from_folder(path.parent).tokenize("cat") == ["ca", "t</w>"]


def test_variant_files(original, tmp_path):
    tiny.save(tmp_path, variant="fp16")
    assert_same_weights(load(tmp_path, variant="fp16"), load(original))
    message = refusal(tmp_path)
    assert "diffusion_pytorch_model.safetensors is missing" in message
    assert message.endswith("; variant fp16 takes diffusion_pytorch_model.fp16.safetensors")
    assert "diffusion_pytorch_model.fp16.safetensors is missing" in refusal(
        original, variant="fp16"
    )


def test_half_precision_files_and_dtypes(original, folder):
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        rewrite(
            folder / file, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}
        )
    full, half = load(original), load(folder)
    assert (
        full.dtype == half.dtype == torch.float32
    )  # the default on a CPU, whatever the file holds
    for part, state in states(full).items():
        for name, tensor in getattr(half, part).state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].half().float())
    for dtype in ("float16", torch.bfloat16, "float64"):
        assert {
            t.dtype for state in states(load(folder, dtype=dtype)).values() for t in state.values()
        } == {getattr(torch, dtype) if isinstance(dtype, str) else dtype}


def test_bundled_name(original, folder, monkeypatch):
    monkeypatch.setattr(sources, "files", lambda package: folder.parent)
    assert list(sources.bundled()) == ["model"]
    assert_same_weights(load("model"), load(original))
    assert "there is no model 'modell': it is neither bundled (model), nor a folder" in refusal(
        "modell"
    )
    assert "revision='main' is for Hub repos" in refusal("model", revision="main")


# strictness


def test_all_tensors_that_do_not_fit_are_one_error(folder):
    def damage(tensors):
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3]
        tensors["conv_extra.weight"] = torch.zeros(2, 3)
        tensors["conv_out.bias"] = torch.zeros(4, dtype=torch.int32)
        del tensors["time_embedding.linear_1.bias"], tensors["conv_norm_out.weight"]
        return tensors

    def damage_vae(tensors):
        name = "decoder.mid_block.attentions.0.to_q.weight"
        return tensors | {
            name.replace("to_q", "query"): tensors[name].clone(),
            "quant_conv.bias": torch.zeros(8, 1, 1),
        }

    rewrite(folder / UNET_FILE, damage)
    rewrite(folder / VAE_FILE, damage_vae)
    message = refusal(folder)
    head, unet, *lines = message.splitlines()
    assert head.startswith(f"unet, {folder / UNET_FILE}: ") and f"    {head}".endswith(
        "; in all 7 tensors do not fit the models"
    )
    first = head.split(": ", 1)[1].split(";")[0]
    assert unet == f"  unet, {folder / UNET_FILE}:" and f"    {first}" in lines
    assert sorted(lines[:5]) == [
        "    misshapen conv_in.weight, got (16, 3, 3, 3), expected (16, 4, 3, 3)",
        "    missing conv_norm_out.weight, expected shape (16,)",
        "    missing time_embedding.linear_1.bias, expected shape (64,)",
        "    unexpected conv_extra.weight, shape (2, 3)",
        "    unreadable conv_out.bias, got dtype I32, expected one of F64, F32, F16, BF16",
    ]
    attention = "decoder.mid_block.attentions.0"
    assert lines[5:] == [
        f"  vae, {folder / VAE_FILE}:",
        f"    twice {attention}.to_q.weight",
        "    misshapen quant_conv.bias, got (8, 1, 1), expected (8,)",
    ]


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_files_that_are_cut_off(folder, cut):
    path = folder / UNET_FILE
    path.write_bytes(path.read_bytes()[:cut])
    assert f"{path} cannot be read as safetensors" in refusal(folder)


def test_a_file_that_is_no_safetensors_file(folder):
    (folder / VAE_FILE).write_text("<!doctype html><p>404, as some downloads end")
    why = "cannot be read as safetensors: it is a web page: a server's answer in place of the file"
    assert refusal(folder) == f"{folder / VAE_FILE} {why}"


def test_pickles_are_refused_with_the_way_out(folder, tmp_path):
    (folder / UNET_FILE).rename(folder / "unet/diffusion_pytorch_model.bin")
    message = refusal(folder)
    beside = f"{folder / 'unet'} has diffusion_pytorch_model.bin; minisd does not read pickles: "
    assert message.startswith(f"{folder / UNET_FILE} is missing; {beside}reading one runs whatever")
    assert "shards" not in message and "variant" not in message
    for name in ("sd.ckpt", "sd.pt", "missing.bin"):
        if name != "missing.bin":
            (tmp_path / name).write_bytes(b"\x80\x02")
        message = refusal(tmp_path / name)
        assert message == (
            f"minisd does not read the pickle {tmp_path / name}: reading one runs whatever code "
            "its author put into it; take the .safetensors file of the same model"
        )


def test_configs_that_cannot_be_read(folder):
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"act_fn": "gelu"}))
    message = refusal(folder)
    assert str(config) in message and "act_fn: got 'gelu', supported is 'silu'" in message
    for text in ("{", "[1]"):
        config.write_text(text)
        assert str(config) in refusal(folder)
    config.write_text(json.dumps(values))
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert str(folder / "scheduler" / "scheduler_config.json") in refusal(folder)


def test_a_vocabulary_that_does_not_fit_the_text_encoder(folder):
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 78}')
    assert "makes 78 ids up to 513, the text encoder takes at most 77 ids below 514" in refusal(
        folder
    )
    (folder / "tokenizer" / "vocab.json").unlink()
    assert str(folder / "tokenizer") in refusal(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="gpu"), "device 'gpu' cannot be used here"),
        (dict(dtype="fp8"), "dtype is 'fp8', expected one of float16, bfloat16, float32, float64"),
        (dict(dtype=torch.int8), "dtype is torch.int8, expected"),
        (dict(attention="flash"), "attention is 'flash', expected auto, triton, sdpa, reference"),
        (dict(revision="main"), "revision='main' is for Hub repos"),
    ],
)
def test_arguments_that_are_refused_before_anything_is_read(original, arguments, message):
    assert message in refusal(original, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA")
def test_cuda_without_a_cuda_device_is_refused(original):
    with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
        minisd.load(original, device="cuda")


def test_attention_is_chosen_at_load(original):
    assert load(original).unet.attention == "sdpa"
    for choice in ("triton", "sdpa", "reference"):
        assert load(original, attention=choice).unet.attention == choice


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"layers_per_block": [1, 1]}, r"layers_per_block: got \(1, 1\), expected int"),
        (
            "unet",
            {"attention_head_dim": 3},
            "unet: its config makes no model: .* 3 heads do not divide 16 channels",
        ),
        (
            "unet",
            {"norm_num_groups": 5},
            "unet: its config makes no model: .* divisible by num_groups",
        ),
        (
            "unet",
            {"norm_num_groups": 0},
            "norm_num_groups: got 0, expected 1 to 1000000",
        ),
        ("vae", {"block_out_channels": None}, "vae/config.json"),
        ("text_encoder", {"num_attention_heads": 5}, "5 heads do not divide hidden_size 24"),
        ("text_encoder", {"text_config": {"hidden_act": "gelu"}}, "config of a whole CLIP"),
        ("tokenizer", {"model_max_length": 1e30}, r"max_length is 1e\+30, expected .* 2 to 100000"),
        ("tokenizer", {"model_max_length": 77.0}, r"max_length is 77.0, expected"),
        ("tokenizer", {"pad_token": "zzz"}, "has no 'zzz'"),
    ],
)
def test_configs_that_make_no_model(folder, part, change, message):
    path = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(checkpoint.CheckpointError, match=message):
        load(folder)


def test_vocabularies_that_cannot_be_read(folder):
    for name, text in (("tokenizer_config.json", "[]"), ("merges.txt", "#version: 0.2\nzz qq\n")):
        before = (folder / "tokenizer" / name).read_text()
        (folder / "tokenizer" / name).write_text(text)
        with pytest.raises(checkpoint.CheckpointError, match=re.escape(str(folder / "tokenizer"))):
            load(folder)
        (folder / "tokenizer" / name).write_text(before)
    load(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [-32, 0]},  # bytes of the header
        {"data_offsets": [0, 32]},  # bytes of another tensor
        {"data_offsets": [0.0, 32.0]},
        {"data_offsets": [0, 1, 2]},
        {"dtype": ["F32"]},
        {"shape": None},
    ],
)
def test_headers_that_do_not_describe_the_file(folder, entry):
    path = folder / VAE_FILE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["quant_conv.bias"] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    message = refusal(folder)
    assert (
        f"{path} cannot be read as safetensors" in message
        or "unreadable quant_conv.bias" in message
    )
    path.write_bytes(raw + b"more")
    assert "its tensors end at byte" in refusal(folder)


@pytest.mark.parametrize("source", [None, 3, "", ["shapes"]])
def test_sources_that_are_none(source):
    assert f"the model is {source!r}, expected a bundled name" in refusal(source)


# memory


@pytest.mark.parametrize("change", ["dtype", "device"])
def test_loading_does_not_depend_on_torchs_defaults(original, change):
    expected = load(original)
    if change == "dtype":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    try:
        sd = load(original)
        ids = sd.tokenizer(["a red circle"])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same_weights(sd, expected)
    for state in states(sd).values():
        assert {(x.dtype, x.device.type) for x in state.values()} == {(torch.float32, "cpu")}
    assert torch.equal(sd.schedule.alphas_cumprod, expected.schedule.alphas_cumprod)
    assert torch.equal(ids, expected.tokenizer(["a red circle"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the files' own, and another
def test_convolutions_are_in_channels_last_memory(original, dtype):
    dtype = getattr(torch, dtype)
    sd = checkpoint.load_parts(checkpoint.locate(original), torch.device("cpu"), dtype)
    assert_same_weights(sd, load(original).to(dtype=dtype))
    weights = [x for state in states(sd).values() for x in state.values() if x.ndim == 4]
    assert len(weights) > 30 and any(weight.shape[2] == 3 for weight in weights)
    for weight in weights:
        assert weight.is_contiguous(memory_format=torch.channels_last)


def write_unaligned(path, tensors):
    """A safetensors file whose data starts at an odd byte, as that of the published text encoder
    does."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert (8 + len(text)) % 2 == 1


def test_tensors_at_odd_places_of_the_file_are_aligned_in_memory(original, folder):
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        write_unaligned(folder / file, load_file(folder / file))
    sd = load(folder)
    assert_same_weights(sd, load(original))
    assert all(
        tensor.data_ptr() % 16 == 0 for state in states(sd).values() for tensor in state.values()
    )


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs Linux' list of mapped files"
)
def test_tensors_in_place_are_mapped_and_private(original, folder):
    files = {
        part: folder / name
        for part, name in (("unet", UNET_FILE), ("vae", VAE_FILE), ("text_encoder", TEXT_FILE))
    }
    before = {part: path.read_bytes() for part, path in files.items()}
    sd = load(folder)
    assert str(files["unet"]) in Path("/proc/self/maps").read_text()
    # One tensor is one storage, so that saving one saves no other; what is written into it does not
    # reach the file.
    assert all(
        t.untyped_storage().nbytes() == t.nbytes
        for state in states(sd).values()
        for t in state.values()
    )
    with torch.no_grad():
        for model in (sd.unet, sd.vae, sd.text_encoder):
            for weight in model.parameters():
                weight.zero_()
    assert {part: path.read_bytes() for part, path in files.items()} == before

    sd = load(folder)
    for (
        path
    ) in files.values():  # a file that takes the place of another leaves the mapped one as it was
        (folder / "new").write_bytes(bytes(path.stat().st_size))
        (folder / "new").replace(path)
    assert_same_weights(sd, load(original))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux' peak memory counters"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading(original, folder, dtype):
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"intermediate_size": 50_000, "num_hidden_layers": 24}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = minisd.CLIPTextModel(minisd.CLIPTextConfig.from_dict(config)).state_dict()
    save_file(
        {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, folder / TEXT_FILE
    )
    code = """
        import re, sys, minisd
        def status(key):
            return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        minisd.load(sys.argv[2], device="cpu")  # once before: allocator and imports are warm
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")
        sd = minisd.load(sys.argv[1], device="cpu", dtype=sys.argv[3])
        weights = sum(p.nbytes for m in (sd.unet, sd.vae, sd.text_encoder) for p in m.parameters())
        print((status("VmHWM") - before) / weights)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), folder, original, dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 < float(out.stdout) < 1.3


# CompVis' single file


def unet_to_ldm(name, layers):
    """`to_ldm` of the UNet, of two blocks with attention in the first alone."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    resnet |= {
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    plain = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    plain |= {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    plain |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
    }
    plain |= {"mid_block.resnets.1": "middle_block.2"}
    for new, old in plain.items():
        name = re.sub(rf"^{re.escape(new)}\.", f"{old}.", name)
    for block in range(2):
        for i in range(layers + 1):
            down, up = 1 + block * (layers + 1) + i, block * (layers + 1) + i
            name = name.replace(f"down_blocks.{block}.resnets.{i}.", f"input_blocks.{down}.0.")
            name = name.replace(f"down_blocks.{block}.attentions.{i}.", f"input_blocks.{down}.1.")
            name = name.replace(f"up_blocks.{block}.resnets.{i}.", f"output_blocks.{up}.0.")
            name = name.replace(f"up_blocks.{block}.attentions.{i}.", f"output_blocks.{up}.1.")
        name = name.replace(
            f"down_blocks.{block}.downsamplers.0.conv.", f"input_blocks.{down}.0.op."
        )
        entry = 2 if block == 1 else 1  # after the attention, where the stage has one
        name = name.replace(
            f"up_blocks.{block}.upsamplers.0.conv.", f"output_blocks.{up}.{entry}.conv."
        )
    for new, old in resnet.items():
        name = re.sub(
            rf"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.{new}\.", rf"\1.{old}.", name
        )
    return "model.diffusion_model." + name


def to_ldm(part, name, layers=1, depth=3):
    """diffusers' name -> CompVis', from the layout of ldm.modules; checked below against diffusers'
    converter."""
    if part == "text_encoder":
        return "cond_stage_model.transformer.text_model." + name
    if part == "unet":
        return unet_to_ldm(name, layers)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    for new, old in (
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ):
        name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{depth - 1 - int(m[1])}.block", name)
    name = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{depth - 1 - int(m[1])}.upsample", name
    )
    return "first_stage_model." + name


def ldm_tensors(sd):
    """The tiny model as one file in CompVis' layout, with what such files hold beside the three
    models."""
    tensors = {}
    for part, state in states(sd).items():
        for name, tensor in state.items():
            old = to_ldm(part, name)
            is_projection = "attn_1" in old and tensor.ndim == 2
            tensors[old] = tensor[:, :, None, None] if is_projection else tensor
    assert sum(t.shape[2:] == (1, 1) for name, t in tensors.items() if "attn_1" in name) == 8
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    tensors["model_ema.decay"], tensors["alphas_cumprod"] = torch.tensor(0.9999), torch.rand(1000)
    tensors["model_ema.diffusion_modelout2bias"] = torch.zeros(4)
    return tensors


def test_ldm_names_are_those_of_diffusers_converter(original):
    sd = load(original)
    tensors = ldm_tensors(sd)
    converted = {
        "unet": convert_ldm_unet_checkpoint(tensors, tiny.UNET),
        "vae": convert_ldm_vae_checkpoint(tensors, tiny.VAE),
    }
    for part, expected in converted.items():
        config = getattr(sd, part).config
        ours = {rename_ldm(part, name, config): tensor for name, tensor in tensors.items()}
        ours.pop(None)
        assert ours.keys() == expected.keys() == getattr(sd, part).state_dict().keys()
        # conv_attn_to_linear has reshaped its copies; every other tensor is the very same object.
        assert all(ours[name].flatten().equal(expected[name].flatten()) for name in ours)
        # And the way back, which export goes.
        for old, new in (
            (old, rename_ldm(part, old, config))
            for old in tensors
            if old.startswith(LDM_PREFIX[part])
        ):
            assert new is None or written_name(part, new, config) == old
    # Two layers a stage, as published: the places that depend on their number.
    config = minisd.UNetConfig()
    assert rename_ldm("unet", "model.diffusion_model.input_blocks.6.0.op.bias", config) == (
        "down_blocks.1.downsamplers.0.conv.bias"
    )
    assert rename_ldm("unet", "model.diffusion_model.output_blocks.8.2.conv.bias", config) == (
        "up_blocks.2.upsamplers.0.conv.bias"
    )


@pytest.fixture
def single_file(original, tmp_path, monkeypatch):
    """A single file of the tiny model, the configs' defaults being the tiny ones for the test."""
    sd = load(original)
    configs = {part: getattr(sd, part).config for part in checkpoint.MODELS}
    models = {
        part: (model, lambda part=part: configs[part])
        for part, (model, _) in checkpoint.MODELS.items()
    }
    path = tmp_path / "v1.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in ldm_tensors(sd).items()}, path)
    monkeypatch.setattr(checkpoint, "MODELS", models)
    return path


def test_single_file(original, single_file, monkeypatch, capsys):
    shutil.copytree(original / "tokenizer", single_file.parent / "tokenizer")
    sd = load(single_file)
    for part, state in states(sd).items():
        file = {"unet": UNET_FILE, "vae": VAE_FILE, "text_encoder": TEXT_FILE}[part]
        expected = {
            rename_diffusers(part, name): tensor
            for name, tensor in load_file(original / file).items()
        }
        assert state.keys() == expected.keys() and all(
            torch.equal(state[name], expected[name]) for name in state
        )
    reference = minisd.NoiseSchedule.from_dict(tiny.SCHEDULER)
    assert torch.equal(sd.schedule.alphas_cumprod, reference.alphas_cumprod)
    assert (sd.schedule.steps_offset, sd.schedule.set_alpha_to_one) == (1, False)
    assert "variant 'fp16' is for folders" in refusal(single_file, variant="fp16")
    shutil.move(single_file.parent / "tokenizer", single_file.parent / "elsewhere")
    elsewhere = str(single_file.parent / "elsewhere")
    assert cli.main(["info", str(single_file), "--tokenizer", elsewhere]) == 0
    assert "\ntokenizer: 514 pieces" in (with_it := capsys.readouterr().out)
    monkeypatch.setattr(sources, "CLIP", "owner/none")
    assert (
        cli.main(["info", str(single_file)]) == 0
    )  # the headers are shown without a vocabulary, too
    without = capsys.readouterr().out
    assert f"\ntokenizer: {single_file} has no vocabulary: put a folder tokenizer/ with" in without
    assert [line for line in without.splitlines() if "tokenizer:" not in line] == [
        line for line in with_it.splitlines() if "tokenizer:" not in line
    ]
    assert "has no vocabulary: put a folder tokenizer/" in refusal(
        single_file, local_files_only=True
    )
    assert cli.main(["info", str(single_file), "--tokenizer", "nowhere"]) == 2
    sd = load(single_file, tokenizer=elsewhere)
    assert sd.tokenizer.vocab == json.loads((original / "tokenizer" / "vocab.json").read_text())
    assert "nowhere" in refusal(single_file, tokenizer=single_file.parent / "nowhere")


def test_a_file_of_another_layout_is_refused(original):
    hint = "if it belongs to a folder in diffusers layout, give the folder"
    assert refusal(original / UNET_FILE) == f"{original / UNET_FILE} is a UNet alone: {hint}"
