"""The emoji world: drawings that all sets have, what is held out, and a few steps of training up to
a model that loads. The sets here are three of flat squares, made on the spot."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import TINY

import minisd
from bench import emoji as bench, harness
from minisd.training import __main__ as training, emoji, loop
from minisd.training.__main__ import main
from minisd.training.recipes import RECIPES

COLOURS = {"noto": "#e01010", "twemoji": "#10e010", "fluent": "#1010e0"}
THINGS = [f"{size}-{what}" for size in ("red", "old", "wild") for what in ("apple", "cat", "rose")]


@pytest.fixture
def icons(tmp_path):
    """A folder as npm leaves it: each thing a square of the style's colour, of its own side."""
    for style, package in emoji.SETS.items():
        folder = tmp_path / "icons/node_modules/@iconify-json" / package
        folder.mkdir(parents=True)
        side = {name: 4 + i for i, name in enumerate(THINGS)}
        body = '<path fill="{}" d="M1 1h{}v{}H1z"/>'
        icons = {name: {"body": body.format(COLOURS[style], n, n)} for name, n in side.items()}
        icons |= {f"only-{style}": {"body": ""}, "flag": {"body": ""}}
        told = {"prefix": package, "icons": icons, "width": 32, "height": 32}
        (folder / "icons.json").write_text(json.dumps(told))
        some = {"Animals & Nature": THINGS[:5], "Food & Drink": [*THINGS[5:], "only-noto"]}
        (folder / "metadata.json").write_text(
            json.dumps({"categories": some | {"Flags": ["flag"]}})
        )
    return tmp_path / "icons"


def test_things_are_what_all_sets_draw(icons):
    drawings = emoji.read_drawings(icons)
    assert [each.thing for each in drawings[::3]] == sorted(THINGS)
    assert [each.style for each in drawings[:3]] == list(emoji.SETS)
    old = drawings[3]
    assert old.caption == "an old cat, noto style" and 'viewBox="0 0 32 32"' in old.svg
    assert drawings[-1].caption == "a wild rose, fluent style"
    (icons / "node_modules/@iconify-json/noto/metadata.json").write_text('{"categories": {}}')
    with pytest.raises(ValueError, match="no thing of Animals & Nature, Food & Drink in common"):
        emoji.read_drawings(icons)
    (icons / "node_modules/@iconify-json/twemoji/icons.json").unlink()
    with pytest.raises(FileNotFoundError, match="twemoji"):
        emoji.read_drawings(icons)


def test_a_third_of_the_things_lacks_a_style():
    """Evenly over the styles, and never two of one thing."""
    found = [emoji.held_out_style(f"thing {i}") for i in range(3000)]
    counts = [found.count(style) for style in (*emoji.SETS, None)]
    assert sum(counts) == 3000 and all(abs(n - 333) < 70 for n in counts[:3])
    drawing = emoji.Drawing("thing 0", found[0] or "noto", "")
    assert drawing.split == ("heldout" if found[0] else "train")


def test_each_word_is_one_token(icons):
    drawings = emoji.read_drawings(icons)
    tokenizer = emoji.make_tokenizer(drawings)
    for each in drawings:
        assert len(tokenizer.encode(each.caption)) == len(each.caption.split()) + 1  # the comma


def test_render(icons):
    pytest.importorskip("resvg_py", reason="resvg-py renders SVG")
    drawing = emoji.read_drawings(icons)[0]
    image = np.asarray(emoji.render(drawing, 64))
    assert image.shape == (64, 64, 3) and (image[-1] == 255).all()
    red = (image == (0xE0, 0x10, 0x10)).all(-1)
    side = 4 + THINGS.index(drawing.thing)
    assert red.sum() == (2 * side) ** 2 and red[2:4, 2:4].all()


def flat(drawing, size):
    """In resvg's place."""
    side = size // 4 + THINGS.index(drawing.thing)
    image = Image.new("RGB", (size, size), "white")
    image.paste(COLOURS[drawing.style], (1, 1, side, side))
    return image


def small(monkeypatch):
    """The stage with few steps, from a bundled model of few pixels."""
    recipe = replace(
        RECIPES["small"],
        image_size=16,
        layout_weight=0.0,
        **{
            name: replace(getattr(TINY, name), steps=3, batch=2)
            for name in ("autoencoder", "text_encoder", "diffusion")
        },
    )
    monkeypatch.setattr(training, "EMOJI", recipe)
    monkeypatch.setattr(emoji, "render", flat)
    monkeypatch.setattr(loop, "WARMUP", 1)


def test_training_makes_a_model_that_loads(icons, tmp_path, monkeypatch):
    small(monkeypatch)
    run, folder = tmp_path / "run", tmp_path / "model"
    line = ["emoji", "--icons", str(icons), "--run", str(run), "--to"]
    main([*line, str(folder), "--steps", "2"])
    shown = sum(each.split == "train" for each in emoji.read_drawings(icons))
    pool = torch.load(run / "pool.pt")
    assert len(pool["mean"]) == len(pool["ids"]) == shown < 27
    first = torch.load(run / "diffusion.pt")
    assert first["step"] == 2
    bundled = minisd.load("shapes", device="cpu").unet.state_dict()
    key = "conv_in.weight"  # two small steps from where it started
    assert 0 < (first["model"][f"unet.{key}"] - bundled[key]).abs().max() < 0.1
    main([*line, str(tmp_path / "more"), "--steps", "3"])  # goes on
    assert torch.load(run / "diffusion.pt")["step"] == 3
    sd = minisd.load(folder, device="cpu")
    assert sd.tokenizer(["a wild rose, fluent style"]).shape == (1, 77)
    [image] = sd.txt2img("a wild rose, fluent style", steps=1, progress=False)
    assert image.size == (64, 64)


def test_the_command_needs_icons(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["emoji", "--run", str(tmp_path)])
    assert "--icons goes with emoji, which needs it" in capsys.readouterr().err


# the scorer


def test_retrieval_finds_the_nearest(icons, monkeypatch):
    monkeypatch.setattr(bench, "AMONG", 5)
    drawings = emoji.read_drawings(icons)
    known = np.random.default_rng(0).normal(size=(len(drawings), 8))
    pairs = drawings[:9:3]
    candidates = bench.questions(pairs, drawings, random.Random(0))
    for pair, own in zip(pairs, candidates):
        assert drawings[own[0]] == pair and len(set(own)) == 5
        assert {drawings[i].style for i in own} == {pair.style}
    own = [each[0] for each in candidates]
    assert bench.retrieved(known[own] + 0.01, known, candidates) == 1
    wrong = known[[own[0], candidates[1][3], own[2]]]
    assert bench.retrieved(wrong, known, candidates) == pytest.approx(2 / 3)


def model_of(drawn):
    """What draws of a caption the drawing that `drawn` says; its autoencoder keeps all."""
    return SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=8)),
        vae=SimpleNamespace(factor=4),
        encode_image=lambda image: [image],
        decode=lambda z: z,
        txt2img=lambda captions, **how: [flat(drawn[caption], 32) for caption in captions],
    )


def seen(image):
    """In place of the network's features: the silhouette, and a little of the colour."""
    values = np.asarray(image, float)
    return np.append((values.min(-1) < 250).ravel(), values.mean((0, 1)) / 255)


def test_the_whole_scorer(icons, monkeypatch):
    """Of a model that draws what it is told, of one that draws another thing in another style, and
    of no model: the true drawing is found, and so is another style's of the thing."""
    monkeypatch.setattr(bench, "AMONG", len(THINGS))
    monkeypatch.setattr(bench, "render", flat)
    monkeypatch.setattr(bench, "features", lambda images, *_: np.stack([*map(seen, images)]))
    drawings = emoji.read_drawings(icons)
    right = {each.caption: each for each in drawings}
    wrong = {each.caption: drawings[i - 4] for i, each in enumerate(drawings)}
    held_out = sum(each.split == "heldout" for each in drawings)
    for drawn, share in ((right, 1), (wrong, 0)):
        found, pairs, images = bench.retrieval(model_of(drawn), drawings, 10, {})
        assert found["heldout"] == {"pairs": held_out, "right": share, "style": share}
        assert found["train"] == {"pairs": 10, "right": share, "style": share}
        assert found["autoencoder"] == {"pairs": held_out, "right": 1, "style": 1}
        assert found["another style"] == {"pairs": held_out, "right": 1, "style": 0}
        assert [flat(drawn[pair.caption], 32) for pair in pairs] == images
    table = bench.report(harness.provenance("cpu") | {"retrieval": found})
    assert f"| autoencoder | 100.0 % of {held_out} | 100.0 % |" in table and "swaps" not in table
    overlap = {"pairs": 3, "edited": 0.9, "baseline": 0.5, "drawings": 0.75}
    table = bench.table({"retrieval": found, "overlap": overlap})
    assert "| 3 style swaps: silhouettes of | overlap |" in table
    assert "| source and edit, prompt-to-prompt | 0.90 |" in table


def test_another_style_is_of_the_same_thing(icons):
    drawings = emoji.read_drawings(icons)
    for i, drawing in enumerate(drawings):
        other = drawings[bench.another(i)]
        assert other.thing == drawing.thing and other.style != drawing.style


def test_overlap():
    a, b = (Image.new("RGB", (8, 8), "white") for _ in range(2))
    assert bench.overlap(a, b) == 1
    a.paste("red", (0, 0, 4, 4))
    assert bench.overlap(a, b) == 0
    b.paste("blue", (2, 0, 4, 8))
    assert bench.overlap(a, b) == pytest.approx(8 / 24)
