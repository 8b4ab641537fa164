"""A DiT end to end: a folder that diffusers wrote, its strict loading, and images of labels against
diffusers' pipeline and against the published loop."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from hub_server import COMMIT
from oracle_dit import Published, diffusers_pair
from PIL import Image
from safetensors.torch import load_file, save_file
from test_ddpm import DIT

import minisd
from minisd.checkpoints.sources import CheckpointError, bundled
from minisd.sampling.ddpm import DDPM

CONFIG = dict(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=12)
CONFIG |= dict(num_embeds_ada_norm=10, patch_size=2, out_channels=8)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
HOW = dict(progress=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline of a tiny random DiT, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("dit") / "tiny"
    transformer, _ = diffusers_pair(**CONFIG)
    vae = tiny.randomise(AutoencoderKL(**tiny.VAE), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiTPipeline(transformer, vae, DDIMScheduler.from_config(DIT))
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture
def folder(pair, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(pair[1], tmp_path / "dit")


def final(latents):
    return lambda x, step: latents.update(x=x)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_generate_equals_diffusers(pair, monkeypatch, record_property):
    """DDIM, guidance on all channels, v left out: with compat, diffusers' images."""
    pipe, folder = pair
    dit = minisd.load_dit(folder, device="cpu", compat="diffusers")
    x = dit.noise(3, 2)
    module = __import__("diffusers.pipelines.dit.pipeline_dit", fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: x)
    guide = pipe.transformer.forward  # the null label is 1000 in diffusers: here it is 10
    own = lambda *a, class_labels, **k: guide(*a, class_labels=class_labels.clamp(max=10), **k)
    monkeypatch.setattr(pipe.transformer, "forward", own)
    expected = pipe([3, 7], guidance_scale=4.0, num_inference_steps=6, output_type="pt").images
    last = {}
    options = dict(steps=6, sampler="ddim", latents=x, on_step=final(last), **HOW)
    dit.generate([3, 7], **options)
    images = dit.decode(last["x"], as_tensor=True) / 2 + 0.5
    error = relative(images, expected)
    record_property("DiT pipeline, images", error)
    assert error <= 1e-4


def test_generate_is_the_published_loop(pair, record_property):
    """gaussian_diffusion's p_sample with forward_with_cfg, written again, 25 of its timesteps."""
    dit = minisd.load_dit(pair[1], device="cpu")
    x = dit.noise(0, 2)
    last = {}
    dit.generate([3, 7], steps=25, seed=[4, 9], latents=x, on_step=final(last), **HOW)
    network = Published(dit.dit.state_dict(), dit.dit.config)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar_all = torch.cumprod(1 - betas, 0)
    times = [round(i * 999 / 24) for i in range(25)]
    abar = abar_all[times]
    abar_prev = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta = 1 - abar / abar_prev
    posterior = beta * (1 - abar_prev) / (1 - abar)
    log_least = torch.log(torch.cat([posterior[1:2], posterior[1:]]))
    noises = [step.noise(x) for step in DDPM(dit.schedule, 25, seed=(4, 9), spacing="linspace")]
    z = x.double()
    for i in reversed(range(25)):
        t = torch.tensor([times[i]] * 4)
        out = network(torch.cat([z, z]), t, torch.tensor([3, 7, 10, 10]))
        cond, uncond = out[:2], out[2:]
        eps = torch.cat([uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:4]], 1)
        f = (cond[:, 4:] + 1) / 2
        log_variance = f * torch.log(beta[i]) + (1 - f) * log_least[i]
        z0 = (z - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
        mean = abar_prev[i].sqrt() * beta[i] / (1 - abar[i]) * z0
        mean = mean + (1 - beta[i]).sqrt() * (1 - abar_prev[i]) / (1 - abar[i]) * z
        z = mean + (i > 0) * (0.5 * log_variance).exp() * noises[24 - i].double()
    error = relative(last["x"].double(), z)
    record_property("DiT, published loop, latents", error)
    assert error <= 1e-4


def test_a_label_is_drawn_alone_as_in_a_batch(pair):
    dit = minisd.load_dit(pair[1], device="cpu")
    how = dict(steps=4, **HOW)
    alone, together = {}, {}
    dit.generate(7, seed=6, on_step=final(alone), **how)
    images = dit.generate([3, 7], seed=5, on_step=final(together), **how)
    assert relative(together["x"][1:], alone["x"]) <= 1e-5
    assert len(images) == 2 and images[0].size == (32, 32)
    wide = dit.generate([1], height=16, width=40, num_images=2, sampler="dpm++", **how)
    assert [image.size for image in wide] == [(40, 16)] * 2


@pytest.fixture
def named(folder):
    """A DiT whose labels have names, two of them one in common."""
    names = {"0": "tench, Tinca tinca", "3": "crane, bird", "7": "crane, machine", "10": "nothing"}
    change(folder / "model_index.json", id2label=names)
    return folder


def test_labels_have_names(named):
    dit = minisd.load_dit(named, device="cpu")
    for name, label in (("tench", 0), ("Tinca tinca", 0), ("bird", 3), ("crane, machine", 7)):
        assert dit.label(name) == label
    assert dit.label("nothing") == 10 and dit.label(4) == 4
    numbers, names = {}, {}
    dit.generate([3, 7], steps=2, on_step=final(numbers), **HOW)
    dit.generate(["bird", 7], steps=2, on_step=final(names), **HOW)
    assert torch.equal(numbers["x"], names["x"])
    assert dit.generate("bird", steps=2, **HOW)[0].size == (32, 32)  # one, and not its letters
    with pytest.raises(ValueError, match="'crane' is the name of the labels 3 and 7: .* 0 to 9"):
        dit.generate("crane", **HOW)
    with pytest.raises(ValueError, match="no label is called 'cran'.* or a name: tench, Tinca"):
        dit.generate(["cran"], **HOW)


@pytest.mark.parametrize(
    "names", [{"11": "ten"}, {"-1": "x"}, {"3": 4}, {"9" * 5000: "x"}, ["tench"], "tench"]
)
def test_names_of_no_labels_are_refused(folder, names):
    change(folder / "model_index.json", id2label=names)
    assert "model_index.json: " in (told := refusal(folder)) and len(told) < 1000
    change(folder / "model_index.json", id2label=None)
    with pytest.raises(ValueError, match="no label is called 'x': expected a number from 0 to 9$"):
        minisd.load_dit(folder, device="cpu").generate("x", **HOW)


def test_what_is_refused(pair):
    dit = minisd.load_dit(pair[1], device="cpu")
    for labels, message in (
        ([11], "label is 11, expected a whole number from 0 to 10"),
        ([], "got no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            dit.generate(labels, **HOW)
    with pytest.raises(ValueError, match="negative_prompt has no effect here"):
        dit.generate([1], negative_prompt="blurry", **HOW)
    with pytest.raises(ValueError, match="the image is 36 x 32 pixels|latents of"):
        dit.generate([1], width=36, height=32, steps=1, **HOW)
    assert "LabelDiffusion(0 M parameters, float32 on cpu, sdpa attention)" == repr(dit)


# ---- the folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_embedders_that_differ_are_an_error(folder):
    state = load_file(folder / WEIGHTS)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name].clone()
    state[name][4, 0] += 1
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name} differs from transformer_blocks.0"):
        minisd.load_dit(folder)
    del state[name]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        minisd.load_dit(folder)


def test_loading_is_strict(folder):
    state = load_file(folder / WEIGHTS)
    del state["proj_out_2.bias"]
    state["extra"] = torch.zeros(3)
    state["proj_out_1.bias"] = torch.zeros(3)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        minisd.load_dit(folder)
    told = str(error.value).splitlines()
    assert told[0].startswith(f"transformer, {folder / WEIGHTS}: ")
    assert told[0].endswith("; in all 3 tensors do not fit the models")
    assert f"{told[2].strip()}; in all" in told[0]  # the first of them
    for line in (
        "missing proj_out_2.bias, expected shape (32,)",
        "unexpected extra, shape (3,)",
        "misshapen proj_out_1.bias, got (3,), expected (48,)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 10**9}, "num_layers: got 1000000000, expected 1 to 200"),
        ({"norm_type": "ada_norm"}, "norm_type"),
        ({"in_channels": 3, "out_channels": 6}, "its VAE has latents of 4 channels"),
        ({"num_embeds_ada_norm": None, "cross_attention_dim": 8}, "its DiT takes a text: minisd"),
    ],
)
def test_bad_configs_are_refused(folder, values, message):
    change(folder / "transformer" / "config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        minisd.load_dit(folder)


def test_pickles_are_refused_and_the_licence_is_said(tmp_path):
    with pytest.raises(CheckpointError) as error:
        minisd.load_dit(tmp_path / "DiT-XL-2-256x256.pt")
    assert "does not read the pickle" in str(error.value) and "CC-BY-NC" in str(error.value)
    with pytest.raises(CheckpointError, match="no folder .* CC-BY-NC"):
        minisd.load_dit(tmp_path / "nowhere")


def test_what_takes_texts_says_where_labels_go(folder):
    with pytest.raises(CheckpointError, match="its DiT takes labels: minisd.load_dit"):
        minisd.load(folder, device="cpu")


def refusal(source, load=minisd.load_dit, **arguments):
    with pytest.raises(CheckpointError) as error:
        load(source, device="cpu", **arguments)
    return str(error.value)


def test_missing_files_are_named(folder):
    (folder / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.bin")
    told = refusal(folder)
    assert told.startswith(f"{folder / WEIGHTS} is missing; {folder / 'transformer'} has diffusion")
    assert "minisd does not read pickles" in told
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert refusal(folder).endswith(
        "is missing: a DiT has transformer/, vae/ and scheduler/, with .safetensors files"
    )


def test_parts_and_other_models_get_the_right_hint(folder):
    for part in ("transformer", "vae", "model_index.json"):
        assert refusal(folder / part) == (
            f"{folder / part} is a part of a model: give the folder of all parts, {folder}"
        )
    for shapes in (bundled()["shapes"], "shapes"):
        assert "with its unet/, minisd.load and the other commands take it" in refusal(shapes)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert (
        refusal(folder) == f"{folder} is a model of the Flux kind, which minisd does not draw with"
    )


def test_another_file_in_its_place_is_named(folder):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    first = refusal(folder).splitlines()[0]
    assert first.startswith(
        f"transformer, {folder / WEIGHTS}: it is a LoRA, an addition to a model"
    )


@pytest.mark.parametrize("takes", ["labels", "a text"])
def test_a_variant_is_taken_part_by_part(folder, takes, text_folder):
    folder, load = (folder, minisd.load_dit) if takes == "labels" else (text_folder, minisd.load)
    half = folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    (folder / WEIGHTS).rename(half)
    assert "variant fp16 takes diffusion_pytorch_model.fp16.safetensors" in refusal(folder, load)
    with pytest.warns(UserWarning) as caught:
        load(folder, device="cpu", variant="fp16")
    told = [str(each.message) for each in caught]
    parts = ["vae"] if takes == "labels" else ["vae", "text_encoder"]
    assert len(told) == len(parts) and all(
        each.startswith(f"there is no variant fp16 of {folder / part}")
        for each, part in zip(told, parts)
    )
    assert "bf16.safetensors is missing" in refusal(folder, load, variant="bf16")


def test_a_variant_comes_from_the_hub_part_by_part(folder, hub):
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".safe", ".fp16.safe"))
    hub.repos["owner/dit"] = folder
    with pytest.warns(UserWarning, match="there is no variant fp16 of .*vae"):
        minisd.load_dit("owner/dit", device="cpu", variant="fp16")
    weights = [name for name in hub.asked() if name.endswith(".safetensors")]
    assert [name.partition("/")[0] for name in weights] == ["transformer", "vae"]
    assert f"{WEIGHTS} does not exist at revision" in refusal("owner/dit")


@pytest.fixture
def text_folder(tmp_path, original):
    """A tiny DiT of texts in a folder: transformer/ in the place of unet/."""
    folder = tmp_path / "text"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(original / part, folder / part)
    config = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2}
    config |= {"attention_head_dim": 12, "num_embeds_ada_norm": None, "cross_attention_dim": 24}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"out_channels": 8}))
    dit = minisd.DiT(minisd.DiTConfig(**config))
    save_file(tiny.randomise(dit, 0).state_dict(), folder / WEIGHTS)
    return folder


def test_a_dit_of_texts_that_does_not_go_with_its_other_parts(text_folder):
    minisd.load(text_folder, device="cpu")
    change(text_folder / "transformer" / "config.json", cross_attention_dim=32)
    assert "its network takes texts of width 32, its text encoder gives 24" in refusal(
        text_folder, minisd.load
    )
    change(text_folder / "transformer" / "config.json", in_channels=8, out_channels=16)
    assert "takes 8 and gives 8 channels beside a VAE with latents of 4" in refusal(
        text_folder, minisd.load
    )


def test_a_copy_is_not_changed_by_what_is_written_into_its_files(folder):
    copied = minisd.load_dit(folder, device="cpu", copy=True)
    before = {name: x.clone() for name, x in copied.dit.state_dict().items()}
    size = (folder / WEIGHTS).stat().st_size
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(bytes(size))
    for name, x in copied.dit.state_dict().items():
        assert torch.equal(x, before[name])


def test_moving_and_dtypes(pair):
    dit = minisd.load_dit(pair[1], device="cpu", dtype="bfloat16")
    assert dit.dtype == torch.bfloat16
    [image] = dit.generate([1], steps=2, **HOW)
    assert image.size == (32, 32) and dit.to(dtype="float32").dtype == torch.float32


def test_compiled_it_draws_the_same(pair):
    one, other = (minisd.load_dit(pair[1], device="cpu", compile=c) for c in (False, "eager"))
    last, compiled = {}, {}
    for dit, kept in ((one, last), (other, compiled)):
        dit.generate([3], steps=3, on_step=final(kept), **HOW)
    assert relative(compiled["x"], last["x"]) <= 1e-5


# ---- the Hub


@pytest.fixture
def dit_hub(hub, pair):
    """A Hub with owner/dit in the layout of facebook/DiT-XL-2-256: four folders, and what else such
    a repo has. -> the Hub, and what minisd needs of the repo."""
    hub.repos["owner/dit"] = hub.repos["facebook/DiT-XL-2-256"] = pair[1]
    needed = {"model_index.json", "scheduler/scheduler_config.json"}
    needed |= {f"{part}/config.json" for part in ("transformer", "vae")}
    return hub, needed | {WEIGHTS, WEIGHTS.replace("transformer", "vae")}


def test_a_repo_of_the_hub_is_loaded(dit_hub, pair):
    hub, needed = dit_hub
    dit = minisd.load_dit("owner/dit", device="cpu")
    own = minisd.load_dit(pair[1], device="cpu")
    for part in ("dit", "vae"):
        state, expected = (getattr(model, part).state_dict() for model in (dit, own))
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    asked = hub.asked()
    assert set(asked) == needed and len(asked) == len(needed)
    assert all(name.endswith(".safetensors") for name in asked[-2:])  # the large files last
    hub.log.clear()
    minisd.load_dit("owner/dit", device="cpu")
    assert not hub.asked()
    minisd.load_dit("owner/dit", device="cpu", local_files_only=True, revision=COMMIT)
    with pytest.raises(CheckpointError, match="the repo has no revision 'v9'"):
        minisd.load_dit("owner/dit", device="cpu", revision="v9")
    with pytest.raises(CheckpointError, match="fp16.safetensors does not exist at revision"):
        minisd.load_dit("owner/dit", device="cpu", variant="fp16")


def test_a_repo_is_fetched_and_the_licence_is_said(dit_hub, minisd_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub, needed = dit_hub
    code, out, err = minisd_command("fetch", "facebook/DiT-XL-2-256", "--to", "own")
    assert code == 0 and out == "own\n", err
    assert "it is a DiT, for `minisd dit --model own`" in err and "CC-BY-NC" in err
    files = {p.relative_to("own").as_posix() for p in Path("own").rglob("*") if p.is_file()}
    assert {name for name in files if not name.startswith(".cache")} == needed
    hub.log.clear()
    minisd.load_dit("own", device="cpu")
    code, out, err = minisd_command("fetch", "owner/dit")
    assert code == 0 and "minisd dit --model owner/dit" in err and "CC-BY-NC" not in err
    assert Path(out.strip()).name == COMMIT and not Path("own/owner").exists()
    line = ["dit", "--label", "3", "--model", "owner/dit", "--steps", "2", "--device", "cpu"]
    hub.log.clear()
    assert minisd_command(*line, "-o", "a.png")[0] == 0 and not hub.asked()


def test_a_damaged_file_is_not_kept(dit_hub, minisd_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit_hub[0].faults[WEIGHTS] = ["damaged"]
    code, out, err = minisd_command("fetch", "owner/dit", "--to", "own")
    assert code == 2 and not out and "the damaged file was removed, try again" in err
    assert not Path("own", WEIGHTS).exists()


def test_a_repo_of_pickles_is_refused_in_words(dit_hub, folder, minisd_command):
    """The form in which diffusers' older repos, and facebookresearch, have weights."""
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))
    dit_hub[0].repos["owner/old"] = folder
    why = r"transformer/.*safetensors does not exist .*minisd reads .safetensors, not .bin pickles"
    with pytest.raises(CheckpointError, match=why):
        minisd.load_dit("owner/old", device="cpu")
    code, out, err = minisd_command("fetch", "owner/old")
    assert code == 2 and not out and "not .bin pickles" in err
    with pytest.raises(CheckpointError, match="does not read the pickle .* CC-BY-NC 4.0"):
        minisd.load_dit("facebook/DiT-XL-2-256/DiT-XL-2-256x256.pt", device="cpu")


# ---- the command


def test_command(pair, minisd_command, draw_again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["dit", "--label", "3", "--model", str(pair[1]), "--steps", "3", "--device", "cpu"]
    code, out, err = minisd_command(
        *line, "-n", "2", "--size", "40x16", "--seed", "5", "-o", "a.png"
    )
    assert code == 0 and out.split() == ["a-0.png", "a-1.png"], err
    with Image.open("a-1.png") as image:
        told, drawn = image.text, image.copy()
    assert drawn.size == (40, 16)
    expected = {"label": "3", "seed": "6", "sampler": "ddpm", "guidance": "4.0", "steps": "3"}
    assert expected.items() <= told.items()
    assert draw_again("a-1.png") == ["again.png"]
    with Image.open("again.png") as image:
        assert image.tobytes() == drawn.tobytes()
    dit = minisd.load_dit(pair[1], device="cpu")
    [alone] = dit.generate(3, seed=6, steps=3, width=40, height=16, **HOW)
    assert alone.tobytes() == drawn.tobytes()


def test_command_takes_a_name(named, minisd_command, draw_again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["dit", "--model", str(named), "--steps", "2", "--device", "cpu", "--label"]
    for name, out in (("Tinca tinca", "a.png"), ("0", "b.png")):
        code, _, err = minisd_command(*line, name, "-o", out)
        assert code == 0, err
    assert draw_again("a.png") == ["again.png"]
    images = {}
    for path in ("a.png", "b.png", "again.png"):
        with Image.open(path) as image:
            images[path] = image.tobytes()
            assert image.text["label"] == ("0" if path == "b.png" else "Tinca tinca")
    assert images["a.png"] == images["b.png"] == images["again.png"]
    code, _, err = minisd_command(*line, "crane", "-o", "c.png")
    assert code == 2 and "'crane' is the name of the labels 3 and 7" in err
    assert not Path("c.png").exists()


def test_without_a_network_the_bundled_one_is_named(hub, minisd_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = minisd_command("dit", "--label", "3", "--local-files-only")
    assert code == 2 and "shapes-dit is the DiT that comes with minisd" in err
    with pytest.raises(CheckpointError) as error:
        minisd.load_dit("owner/none", device="cpu")
    assert "shapes-dit" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--negative-prompt", "blurry"], "--negative-prompt: a DiT takes a label and no text"),
        (["-n", "2", "--seed", str(2**64 - 1), "-o", "."], "got seeds [18446744073709551616]"),
        (["--lora", "a.safetensors:0.5"], "--lora: it is for a UNet and its text encoder"),
        (["--embedding", "a.safetensors"], "--embedding: it is for a UNet"),
        (["--label", "11"], "label is 11, expected a whole number from 0 to 10"),
        (["--label", "-1"], "got -1, expected at least 0"),
    ],
)
def test_command_refuses(pair, minisd_command, more, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["dit", "--label", "3", "--model", str(pair[1]), "--steps", "1", "--device", "cpu"]
    code, _, err = minisd_command(*line, *more)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


def test_the_steps_can_be_watched(pair, minisd_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["dit", "--label", "3", "--model", str(pair[1]), "--steps", "3", "--device", "cpu"]
    code, _, err = minisd_command(*line, "--trace", "steps", "--trace-preview", "-o", "a.png")
    assert code == 0, err
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names[:2] == ["images.webp", "latents.webp"] and len(names) == 5
