"""LoRA and textual inversion: against the formula as loops, diffusers' and PEFT's own merging, and
transformers' encoder with a longer table."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minisd
from minisd.checkpoints.adapters import spellings
from minisd.checkpoints.sources import CheckpointError

BAR = 1e-5  # relative to the largest value
ATTN = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_encoder.encoder.layers.1"
LAYERS = {  # module -> rank and alpha
    f"{ATTN}.attn1.to_q": (3, 3.0),
    f"{ATTN}.attn2.to_out.0": (2, 1.0),
    f"{ATTN}.ff.net.0.proj": (4, 2.0),
    "unet.down_blocks.0.attentions.0.proj_in": (2, 8.0),  # a 1x1 convolution
    "unet.down_blocks.0.resnets.0.conv1": (2, 0.5),  # a 3x3 one
    "unet.down_blocks.0.downsamplers.0.conv": (1, 1.0),
    "unet.down_blocks.0.resnets.0.time_emb_proj": (2, 1.0),
    f"{TEXT}.self_attn.v_proj": (3, 6.0),
    f"{TEXT}.mlp.fc1": (2, 1.0),
}


@pytest.fixture
def sd(original):
    return minisd.load(original, device="cpu")


def factors(sd, seed=0, layers=LAYERS):
    """{module: (B (out, r) or (out, r, 1, 1), A (r, in, ...), alpha)}."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rank, alpha) in layers.items():
        weight = sd.unet.get_submodule(name[5:]).weight if name[:5] == "unet." else text(sd, name)
        ones = (1,) * (weight.ndim - 2)
        up = torch.randn(len(weight), rank, *ones, generator=generator)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        found[name] = up, down, alpha
    return found


def text(sd, name):
    return sd.text_encoder.get_submodule(name.removeprefix("text_encoder.")).weight


def weights(sd):
    return {
        f"{part}.{name}": parameter
        for part, model in (("unet", sd.unet), ("text_encoder", sd.text_encoder))
        for name, parameter in model.named_parameters()
    }


def kohya(found):
    tensors = {}
    for name, (up, down, alpha) in found.items():
        name = name.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te_text_model_")
        name = name.replace(".", "_")
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(found, alphas=True):
    tensors = {}
    for name, (up, down, alpha) in found.items():
        name = name.replace("text_encoder.", "text_encoder.text_model.")
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def by_loops(before, found, weight=1.0):
    """{name: weights}: sum over the rank, one product after the other, in float64."""
    after = {name: x.detach().double().clone() for name, x in before.items()}
    for name, (up, down, alpha) in found.items():
        for r in range(len(down)):
            one = up[:, r].double().reshape(-1, *[1] * (down.ndim - 1)) * down[r].double()
            after[f"{name}.weight"] += weight * alpha / len(down) * one
    return after


def assert_close(ours, expected):
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        error = (ours[name].double() - x).abs().max() / x.abs().max()
        assert error <= BAR, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", [kohya, peft])
def test_lora_is_its_formula_and_comes_off_bit_for_bit(sd, tmp_path, layout):
    before = {name: x.detach().clone() for name, x in weights(sd).items()}
    parameters = dict(weights(sd))
    first, second = factors(sd, 1), factors(sd, 2, dict(list(LAYERS.items())[::2]))
    save_file(layout(first), tmp_path / "a.safetensors")
    save_file(layout(second), tmp_path / "b.safetensors")
    sd.merge(tmp_path / "a.safetensors", (tmp_path / "b.safetensors", -0.5))
    expected = by_loops(by_loops(before, first), second, -0.5)
    assert_close(weights(sd), expected)
    changed = [name for name, x in weights(sd).items() if not torch.equal(x, before[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in LAYERS)
    sd.merge((tmp_path / "b.safetensors", 2))  # once more
    sd.unmerge()
    for name, x in weights(sd).items():
        assert x is parameters[name] and torch.equal(x, before[name]), name
        assert x.stride() == parameters[name].stride()
    sd.unmerge()  # nothing to take back
    assert not sd.adapters.merged


def test_a_merged_model_is_an_ordinary_one(sd, tmp_path):
    """deepcopy and pickle keep what is needed to take the LoRA back; another dtype rounds once."""
    before = sd.unet.down_blocks[0].resnets[0].conv1.weight.clone()
    save_file(kohya(factors(sd)), tmp_path / "a.safetensors")
    sd.merge((tmp_path / "a.safetensors", 0.8))
    drawn = sd.txt2img("a", steps=2, progress=False)[0].tobytes()
    for other in (copy.deepcopy(sd), pickle.loads(pickle.dumps(sd))):
        assert other.txt2img("a", steps=2, progress=False)[0].tobytes() == drawn
        other.unmerge()
        assert torch.equal(other.unet.down_blocks[0].resnets[0].conv1.weight, before)
    assert sd.txt2img("a", steps=2, progress=False)[0].tobytes() == drawn  # the others were copies
    sd.to(dtype=torch.bfloat16).unmerge()
    assert torch.equal(sd.unet.down_blocks[0].resnets[0].conv1.weight, before.bfloat16())


@pytest.mark.parametrize("where", ["file", "folder"])
def test_the_alpha_that_pefts_config_says(sd, tmp_path, where):
    """lora_alpha for all, alpha_pattern for one, rank-stabilised: alpha / sqrt(rank)."""
    layers = {f"{ATTN}.attn1.to_q": (4, 8.0), f"{ATTN}.attn2.to_k": (4, 6.0)}
    found, before = factors(sd, layers=layers), dict(weights(sd).items())
    expected = {n: (up, down, alpha * 2) for n, (up, down, alpha) in found.items()}  # sqrt(4)
    expected = by_loops(before, expected)
    said = {"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 6}, "use_rslora": True, "r": 4}
    if where == "file":
        about = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in said.items()})}
        path = tmp_path / "a.safetensors"
        save_file(peft(found, alphas=False), path, about)
    else:
        path = tmp_path
        named = {n.replace("unet.", "base_model.model."): x for n, x in found.items()}
        save_file(peft(named, alphas=False), path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(said))
    sd.merge(path)
    assert_close(weights(sd), expected)


def test_without_an_alpha_the_scale_is_one(sd, tmp_path):
    found = {name: (up, down, len(down)) for name, (up, down, _) in factors(sd).items()}
    expected = by_loops(weights(sd), found)
    save_file(peft(found, alphas=False), tmp_path / "a.safetensors")
    sd.merge(tmp_path / "a.safetensors")
    assert_close(weights(sd), expected)


def test_the_names_of_older_diffusers(sd):
    q, out = f"{ATTN}.attn1.to_q", f"{ATTN}.attn2.to_out.0"
    older = ATTN.removeprefix("unet.")
    assert f"unet.{older}.attn1.processor.to_q" in spellings(q)
    assert f"{older}.attn2.processor.to_out" in spellings(out)
    v = "text_encoder.text_model.encoder.layers.1.self_attn.to_v"
    assert v in spellings(f"{TEXT}.self_attn.v_proj")


def test_no_two_layers_are_called_the_same(sd):
    from minisd.checkpoints.adapters import layers_of

    names = [spelled for layer in layers_of(sd) for spelled in spellings(layer)]
    assert len(names) == len(set(names))


def test_a_file_that_does_not_fit_changes_nothing(sd, tmp_path):
    before = {name: x.detach().clone() for name, x in weights(sd).items()}
    good, path = kohya(factors(sd)), tmp_path / "bad.safetensors"
    key = next(iter(good)).removesuffix(".lora_up.weight")
    save_file(good, tmp_path / "good.safetensors")
    for bad, why in (
        ({f"{key}.dora_scale": torch.ones(3)}, r"unexpected .*dora_scale"),
        ({f"{key}.hada_w1_a": torch.ones(3)}, "unexpected"),
        ({f"{key}.lora_up.weight": torch.ones(3, 3)}, r"has B \(3, 3\)"),
        ({"lora_unet_mid_block_x.lora_up.weight": torch.ones(3, 3)}, "unexpected lora_unet_mid"),
        (
            {f"{key}.lora_up.weight": torch.full_like(good[f"{key}.lora_up.weight"], torch.nan)},
            "NaN",
        ),
    ):
        save_file(good | bad, path)
        with pytest.raises(CheckpointError, match=why):
            sd.merge(tmp_path / "good.safetensors", path)
    del good[f"{key}.lora_up.weight"]
    save_file(good, path)
    with pytest.raises(CheckpointError, match=r"no up \(B\)"):
        sd.merge(path)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="it is empty"):
        sd.merge(path)
    with pytest.raises(CheckpointError, match="there is no LoRA file"):
        sd.merge(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="weight of a LoRA is 'much'"):
        sd.merge((tmp_path / "good.safetensors", "much"))
    save_file(kohya(factors(sd)), path, {"lora_adapter_metadata": '{"unet.use_dora": true}'})
    with pytest.raises(CheckpointError, match="use_dora"):
        sd.merge(path)
    assert all(torch.equal(x, before[name]) for name, x in weights(sd).items())
    assert not sd.adapters.originals and not sd.adapters.merged


# ---- diffusers and PEFT


@pytest.mark.parametrize("layout", [kohya, peft])
def test_lora_equals_diffusers(original, sd, tmp_path, layout, record_property):
    """What comes out after diffusers' fuse_lora of the same file.

    Of kohya's layout one alpha for all, and of the text encoder the MLP: diffusers 0.42 passes over
    alphas that differ, and over its text encoder's attention. Of PEFT's without alphas.
    """
    pytest.importorskip("peft", reason="diffusers reads LoRA files by peft")
    from diffusers import StableDiffusionPipeline

    pipe, kept = StableDiffusionPipeline.from_pretrained(original), LAYERS
    if layout is kohya:
        kept = {name: (rank, 2.0) for name, (rank, _) in LAYERS.items() if "attn.v" not in name}
    found = factors(sd, layers=kept)
    tensors = kohya(found) if layout is kohya else peft(found, alphas=False)
    save_file(tensors, tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    sd.merge((tmp_path / "a.safetensors", 0.7))
    assert_same_answers(sd, pipe.unet, pipe.text_encoder, "LoRA, diffusers", record_property)


def test_lora_equals_peft(original, sd, tmp_path, record_property):
    """PEFT's own layers around diffusers' and transformers' modules, each with rank and alpha."""
    peft_library = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    pipe, found = StableDiffusionPipeline.from_pretrained(original), factors(sd)
    for part in ("unet", "text_encoder"):
        own = {n.removeprefix(f"{part}."): x for n, x in found.items() if n.startswith(f"{part}.")}
        config = peft_library.LoraConfig(
            target_modules=list(own),
            rank_pattern={name: len(down) for name, (_, down, _) in own.items()},
            alpha_pattern={name: alpha for name, (_, _, alpha) in own.items()},
        )
        model = peft_library.inject_adapter_in_model(config, getattr(pipe, part))
        for name, (up, down, _) in own.items():
            layer = model.get_submodule(name)
            layer.lora_B["default"].weight.data = up
            layer.lora_A["default"].weight.data = down
    save_file(kohya(found), tmp_path / "a.safetensors")
    sd.merge(tmp_path / "a.safetensors")
    assert_same_answers(sd, pipe.unet, pipe.text_encoder, "LoRA, PEFT", record_property)


def assert_same_answers(sd, unet, text_encoder, what, record_property):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, 24, generator=generator)
    t, ids = torch.tensor(7), sd.tokenizer(["a cat", "b"])
    with torch.no_grad():
        ours = sd.unet(x, t, context), sd.text_encoder(ids)
        theirs = unet(x, t, context).sample, text_encoder(ids).last_hidden_state
    for a, b in zip(ours, theirs):
        error = ((a - b).abs().max() / b.abs().max()).item()
        record_property(what, error)
        assert error <= BAR


# ---- textual inversion


def saved(tmp_path, tensors, name="my-cat.safetensors"):
    save_file(tensors, tmp_path / name)
    return tmp_path / name


PROMPTS = ["a <cat> on a mat", "<cat><cat>", "no such word", "A <CAT>, a dog"]


@pytest.mark.parametrize("count", [1, 3])
def test_textual_inversion_equals_transformers(original, sd, tmp_path, count, record_property):
    """diffusers' way: more rows in the table, "<cat>" -> "<cat> <cat>_1 <cat>_2" in the prompt."""
    from diffusers import StableDiffusionPipeline

    vectors = torch.randn(count, 24)
    path = saved(tmp_path, {"<cat>": vectors if count > 1 else vectors[0]})
    pipe = StableDiffusionPipeline.from_pretrained(original)
    pipe.load_textual_inversion(str(tmp_path), weight_name=path.name)
    assert sd.add_embedding(path) == "<cat>"
    assert [sd.tokenizer.encode("<cat>")] == [list(range(514, 514 + count))]
    for text in PROMPTS[: 4 if count == 1 else 3]:  # diffusers spreads none in capitals
        theirs, _ = pipe.encode_prompt(text, "cpu", 1, False)
        ours = sd.encode_prompt([text])
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        record_property("textual inversion, diffusers", error)
        assert error <= BAR, text


def test_the_other_layout_and_a_second_word(sd, tmp_path):
    plain = sd.encode_prompt(["a cat"])
    first, second = torch.randn(2, 24), torch.randn(24)
    assert sd.add_embedding(saved(tmp_path, {"emb_params": first})) == "my-cat"
    path = saved(tmp_path, {"<x>": second}, "x.safetensors")
    assert sd.add_embedding(path, token="zzz") == "zzz"
    ids = sd.tokenizer.encode("zzz my-cat a")
    assert ids[:3] == [516, 514, 515]
    pieces = sd.tokenizer.tokenize("zzz my-cat a")
    assert pieces[:3] == ["zzz</w>", "my-cat", "my-cat</w>"] and len(pieces) == len(ids)
    table = sd.text_encoder.embeddings.token_embedding.weight
    row = sd.tokenizer(["zzz my-cat a"])[0]
    vectors = torch.cat([table, first, second[None]])[row]
    assert torch.equal(sd.encode_prompt(["zzz my-cat a"]), sd.text_encoder(vectors[None]))
    assert torch.equal(sd.encode_prompt(["a cat"]), plain)
    other = pickle.loads(pickle.dumps(sd))
    assert torch.equal(other.encode_prompt(["zzz"]), sd.encode_prompt(["zzz"]))
    from minisd.editing.alignment import find_word

    assert find_word(sd.tokenizer, "a my-cat", "my-cat") == [2, 3]


def test_the_encoder_takes_embeddings(sd):
    """Gradients reach them, with no hook."""
    ids = sd.tokenizer(["a red circle"])
    vectors = sd.text_encoder.embeddings.token_embedding(ids).detach().requires_grad_()
    out = sd.text_encoder(vectors)
    assert torch.equal(out, sd.text_encoder(ids))
    out.sum().backward()
    assert vectors.grad.abs().min() >= 0 and vectors.grad.abs().max() > 0
    with pytest.raises(ValueError, match="token embeddings: got .1, 77, 5., expected"):
        sd.text_encoder(torch.zeros(1, 77, 5))


def test_what_is_no_textual_inversion(sd, tmp_path):
    pickled = tmp_path / "a.pt"
    torch.save({}, pickled)
    table = sd.text_encoder.embeddings.token_embedding
    assert isinstance(table, nn.Embedding)
    for path, why in (
        (pickled, "reads no pickles"),
        (tmp_path / "none.safetensors", "there is no embedding file"),
        (saved(tmp_path, {"<a>": torch.zeros(5)}), "vectors of torch.float32 of 5 numbers"),
        (saved(tmp_path, {"<a>": torch.zeros(24), "<b>": torch.zeros(24)}, "2.safetensors"), "one"),
        (saved(tmp_path, {"<a>": torch.full((24,), torch.inf)}, "3.safetensors"), "infinite"),
    ):
        with pytest.raises(CheckpointError, match=why):
            sd.add_embedding(path)
    good = saved(tmp_path, {"<a>": torch.zeros(24)}, "4.SAFETENSORS")
    with pytest.raises(ValueError, match="the vocabulary has it"):
        sd.add_embedding(good, token="a")
    sd.add_embedding(good)
    with pytest.raises(ValueError, match="'<a>' cannot be added.*has it"):
        sd.add_embedding(good)
    assert len(sd.adapters.vectors) == len(sd.adapters.words) == 1
