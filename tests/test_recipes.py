"""Recipes: what draws says how in the image; minisd.from_recipe draws the same bits, from the
image, from its PNG, and from the JSON."""

import json
import os
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import minisd

HOW = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def sd(original):
    return minisd.load(original, device="cpu")


def image(seed=0, width=40, height=24):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask():
    white = np.zeros((24, 40), np.uint8)
    white[5:20, 8:30] = 255
    return Image.fromarray(white)


def equal(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


CALLS = {
    "txt2img": lambda sd: sd.txt2img(["a cat", "a dog"], num_images=2, seed=np.int64(7), **HOW),
    "given noise": lambda sd: sd.txt2img("a", latents=sd.noise(5), sampler="ddim", **HOW),
    "seeds": lambda sd: sd.txt2img(["a", "b"], seed=(3, 9), negative_prompt=["x", "y"], **HOW),
    "img2img": lambda sd: sd.img2img(image(), "a dog", 0.7, **HOW),
    "nothing to do": lambda sd: sd.img2img(image(), "a dog", 0.0, num_images=2, **HOW),
    "edit": lambda sd: minisd.edit_prompt(
        sd, "a cat", "a dog", "a cow", cross_steps=(0.2, 0.8), reweight={"dog": 2}, **HOW
    ),
    "baseline": lambda sd: minisd.seed_baseline(sd, "a cat", "a dog", num_images=2, **HOW),
    "blend": lambda sd: minisd.blend(sd, image(), mask(), "a dog", feather=2, **HOW),
    "erase": lambda sd: minisd.erase_concepts(sd, None, "a dog", ["a cat"], **HOW),
    "sega": lambda sd: minisd.erase_concepts(
        sd, image(), "a", "b", guide=partial(minisd.sega, warmup=1), strength=1, **HOW
    ),
    "edict": lambda sd: minisd.edict(sd, image(), "a cat", "a dog", **HOW),
    "diffedit": lambda sd: minisd.diffedit(sd, image(), "a cat", "a dog", noises=2, **HOW),
    "masactrl": lambda sd: minisd.masactrl(sd, "a", "b", "c", start=1, num_images=2, **HOW),
    "plug and play": lambda sd: minisd.plug_and_play(
        sd, "a cat", "a dog", feature_steps=0.7, **HOW
    ),
    "style": lambda sd: minisd.style_aligned(sd, "a cat", "a dog", "a cow", seed=[5, 6, 7], **HOW),
    "excite": lambda sd: minisd.attend_and_excite(sd, "a cat", ["a", "cat"], refinements=1, **HOW),
    "regional": lambda sd: minisd.regional(sd, "a", {"a cat": mask()}, width=40, height=24, **HOW),
    "long": lambda sd: minisd.long_prompt(sd, ["(a:1.3) cat", "dog " * 90], weights="bias", **HOW),
    "heat map": lambda sd: minisd.heatmap(sd, "a cat", until=0.5, num_images=2, **HOW)[0],
}
GIVEN = {"img2img", "nothing to do", "blend", "sega", "edict", "diffedit"}  # an image


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_again(sd, tmp_path, name):
    images = CALLS[name](sd)
    given = {"image": image()} if name in GIVEN else {}
    given |= {"mask": mask()} if name == "blend" else {}
    given |= {"latents": sd.noise(5)} if name == "given noise" else {}
    given |= {"regions": {"a cat": mask()}} if name == "regional" else {}
    last = images[-1]
    assert [minisd.recipe(each)["image"] for each in images] == list(range(len(images)))
    told = minisd.recipe(last)
    assert told["of"] == len(images) and told["version"] == f"minisd {minisd.__version__}"
    assert told == json.loads(json.dumps(told))
    minisd.save(last, tmp_path / "last.png")
    assert minisd.recipe(tmp_path / "last.png") == told
    for source in (last, tmp_path / "last.png", told):
        again = minisd.from_recipe(source, sd, progress=False, **given)
        assert equal(again, last)
        assert minisd.recipe(again) == told
    if given:
        with pytest.raises(ValueError, match="the recipe needs .*: give it"):
            minisd.from_recipe(last, sd)
        for key in given:
            others = {"latents": torch.zeros(1, 4, 8, 8), "regions": {"a cat": image(1)}}
            other = {key: others.get(key, image(1))}
            with pytest.raises(ValueError, match=f"{key} is not the one that was drawn with"):
                minisd.from_recipe(last, sd, **given | other)


def test_the_model_is_loaded_with_what_was_put_in(original, tmp_path):
    sd = minisd.load(original, device="cpu", dtype="bfloat16", attention="reference")
    lora = {"lora_unet_conv_in.lora_up.weight": torch.ones(16, 1, 1, 1)}
    lora["lora_unet_conv_in.lora_down.weight"] = torch.ones(1, 4, 3, 3)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({"<x>": torch.randn(2, 24)}, tmp_path / "x.safetensors")
    sd.merge((tmp_path / "lora.safetensors", 0.5))
    sd.add_embedding(tmp_path / "x.safetensors", "<y>")
    [drawn] = sd.txt2img("a <y>", **HOW)
    assert equal(minisd.from_recipe(drawn, progress=False), drawn)
    with pytest.raises(ValueError, match="the model is .*, the recipe's"):
        minisd.from_recipe(drawn, minisd.load(original, device="cpu"))
    save_file({"<x>": torch.randn(2, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors is not there, or not the file"):
        minisd.from_recipe(drawn)


def test_files_are_read_again_and_compared(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image().save("in.png")
    [drawn] = sd.img2img("in.png", "a dog", **HOW)
    assert minisd.recipe(drawn)["arguments"]["image"]["$file"] == "in.png"
    assert equal(minisd.from_recipe(drawn, sd, progress=False), drawn)
    (tmp_path / "in.png").rename("moved.png")
    assert equal(minisd.from_recipe(drawn, sd, progress=False, image="moved.png"), drawn)
    image(1).save("in.png")
    with pytest.raises(ValueError, match="image is not the one"):
        minisd.from_recipe(drawn, sd)


def test_what_other_programs_read(sd):
    images = sd.txt2img("a cat", seed=4, num_images=2, negative_prompt="a dog", **HOW)
    text = images[1].info["parameters"].splitlines()
    assert text[:2] == ["a cat", "Negative prompt: a dog"]
    expected = "Steps: 3, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 5, Size: 32x32, Model: "
    assert text[2].startswith(expected) and text[2].endswith(
        f"Version: minisd {minisd.__version__}"
    )
    images = sd.txt2img(["a", "b"], negative_prompt=["x", "y"], num_images=2, **HOW)
    second = [each.info["parameters"].splitlines()[1] for each in images]
    assert second == [f"Negative prompt: {text}" for text in "xxyy"]
    [redrawn] = sd.img2img(image(), "two\nlines", 0.7, sampler="ddim", **HOW)
    text = redrawn.info["parameters"].splitlines()
    assert text[:2] == ["two", "lines"]
    assert "Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 40x24" in text[2]
    assert "Denoising strength: 0.7" in text[2]


def test_what_ends_a_setting_is_quoted(original, tmp_path):
    """As A1111's reader splits it: `key: value` or `key: "value"`, and a comma."""
    folder = tmp_path / "a, b: c"
    folder.symlink_to(original)
    sd = minisd.load(folder, device="cpu")
    lora = {"lora_unet_conv_in.lora_up.weight": torch.ones(16, 1, 1, 1)}
    lora["lora_unet_conv_in.lora_down.weight"] = torch.ones(1, 4, 3, 3)
    save_file(lora, tmp_path / "hat.safetensors")
    sd.merge((tmp_path / "hat.safetensors", 0.5), tmp_path / "hat.safetensors")
    text = sd.txt2img("a cat, red", **HOW)[0].info["parameters"].splitlines()
    assert text[0] == "a cat, red <lora:hat:0.5> <lora:hat:1>"
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'  # A1111's re_param_code
    found = dict(re.findall(pattern, text[1]))
    assert json.loads(found["Model"]) == str(folder) and found["Steps"] == "3"
    assert found["Version"] == f"minisd {minisd.__version__}" and len(found) == 7


def test_a_models_name_may_be_no_utf8(original, tmp_path):
    folder = os.fsencode(tmp_path) + b"/m\xff"
    os.symlink(original, folder)
    [drawn] = minisd.load(os.fsdecode(folder), device="cpu").txt2img("é", **HOW)
    minisd.save(drawn, tmp_path / "a.png")
    told = minisd.recipe(tmp_path / "a.png")
    assert told["model"]["source"] == os.fsdecode(folder) and told["arguments"]["prompt"] == "é"
    assert equal(minisd.from_recipe(tmp_path / "a.png", progress=False), drawn)
    del drawn.info["parameters"]
    minisd.save(drawn, tmp_path / "b.png")
    assert minisd.recipe(tmp_path / "b.png") == told


def test_other_circumstances_are_warned_of(sd, original):
    [drawn] = sd.txt2img("a", **HOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(minisd.from_recipe(drawn, sd, progress=False), drawn)
    other = minisd.load(original, device="cpu", dtype="bfloat16")
    with pytest.warns(UserWarning, match="drawn with dtype float32, here bfloat16: bits may be"):
        minisd.from_recipe(drawn, other, progress=False)
    with pytest.warns(UserWarning, match="drawn with version minisd 0.0.1, here minisd"):
        minisd.from_recipe(minisd.recipe(drawn) | {"version": "minisd 0.0.1"}, sd, progress=False)


def test_info_reads_what_python_wrote(sd, tmp_path, minisd_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    minisd.save(sd.txt2img("a cat\x1b[2J", seed=[3], **HOW)[0], "python.png")
    code, out, err = minisd_command("info", "python.png")
    assert code == 0, err
    assert "prompt:          a cat\\x1b[2J\n" in out and "seed:            [3]\n" in out
    assert out.endswith("minisd.save(minisd.from_recipe('python.png'), 'again.png')\n")


def test_the_command_writes_recipes_too(here, minisd_command):
    line = ["txt2img", "a cat", "--model", "tiny", "--steps", "2", "--device", "cpu", "-o", "c.png"]
    assert minisd_command(*line)[0] == 0
    with Image.open("c.png") as drawn:
        assert equal(minisd.from_recipe("c.png", progress=False), drawn)
    assert minisd_command(*line[:2], "--trace", "t", *line[2:])[0] == 0
    assert "recipe" not in minisd_command("info", "c.png")[1]


def test_what_writes_no_recipe_is_named(sd):
    inversion = minisd.invert(sd, image(), "a cat", **HOW)
    [drawn] = minisd.redraw(sd, inversion, progress=False)
    with pytest.raises(ValueError, match="carries no recipe: .*; redraw, replay, .* write none"):
        minisd.recipe(drawn)


def test_images_without_a_recipe(sd, tmp_path):
    minisd.save(image(), tmp_path / "plain.png")
    for plain in (image(), tmp_path / "plain.png", image().resize((8, 8))):
        with pytest.raises(ValueError, match="carries no recipe"):
            minisd.recipe(plain)
    strange = image()
    strange.info["recipe"] = "[]"
    with pytest.raises(ValueError, match="carries no recipe"):
        minisd.recipe(strange)
    with pytest.raises(ValueError, match="expected a name that ends in .png"):
        minisd.save(image(), tmp_path / "a.jpg")
    [drawn] = sd.txt2img("a", **HOW)
    told = minisd.recipe(drawn)
    with pytest.raises(ValueError, match="the method is 'system', expected one of txt2img"):
        minisd.from_recipe(told | {"method": "system"}, sd)
    with pytest.raises(TypeError, match="got the argument 'imagee'"):
        minisd.from_recipe(drawn, sd, imagee=image())
    with pytest.raises(ValueError, match="was not loaded from anywhere"):
        minisd.from_recipe(told | {"model": {}})
