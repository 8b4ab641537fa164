"""The pure functions of the bundled model's benchmark; the model itself is measured by running
it."""

import json
import random
from types import SimpleNamespace

from PIL import Image

from bench import shapes
from bench.scorer import score
from minisd.training import scenes


def test_captions_are_fixed_and_were_not_in_training():
    for split in ("heldout", "composition"):
        texts = shapes.captions(split, 50)
        assert texts == shapes.captions(split, 60)[:50]
        assert {scenes.split(text) for text in texts} == {split}


def test_tally_counts_only_what_is_said():
    image = Image.new("RGB", (64, 64), "white")
    image.paste((225, 35, 35), (20, 20, 47, 47))
    texts = [
        "a red square on a white background",
        "a red circle",
        "a big red square above a blue square",
    ]
    result = shapes.tally(texts, [score(image, text) for text in texts])
    assert result["background"] == {"said": 1, "right": 1.0}
    assert result["count"] == {"said": 3, "right": 2 / 3}
    assert result["shape"] == {"said": 3, "right": 1 / 3}
    assert result["size"] == {"said": 1, "right": 1.0}
    assert result["all, one object"] == {"said": 2, "right": 0.5}
    assert result["all, two objects"] == {"said": 1, "right": 0.0}
    table = shapes.table({"heldout": result})
    assert "| shape | 33.3 % of 3 |" in table and "| all, one object | 50.0 % of 2 |" in table
    nothing = shapes.tally(texts[1:2], [score(image, texts[1])])
    assert nothing["background"] == {
        "said": 0,
        "right": None,
    } and "| background | - |" in shapes.table({"x": nothing})


def test_a_perfect_model_scores_full_marks(tmp_path, monkeypatch, capsys):
    """The whole report, with the renderer in the model's place."""

    def txt2img(texts, seed, **options):
        assert options == {"steps": 25, "guidance": 7.5, "sampler": "dpm++", "progress": False}
        return [
            scenes.render(scenes.draw(scenes.parse(t), random.Random(seed + i)))
            for i, t in enumerate(texts)
        ]

    fake = SimpleNamespace(
        txt2img=txt2img,
        encode_image=list,
        decode=list,
        device="cpu",
        dtype="float32",
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=16)),
        vae=SimpleNamespace(factor=4),
    )
    monkeypatch.setitem(vars(shapes.minisd), "load", lambda model: fake)  # the public name is lazy
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    out, page = tmp_path / "out.json", tmp_path / "sheet.png"
    shapes.main(["--model", str(model), "--n", "30", "--json", str(out), "--sheet", str(page)])
    record = json.loads(out.read_text())
    assert (
        record["psnr"] == 100
        and record["steps"] == 25
        and list(record["sha256"]) == ["config.json"]
        and record["n"] == 30
    )
    for split in ("heldout", "composition", "reconstruction"):
        assert record["scores"][split]["all"] == {"said": 30, "right": 1.0}
    assert "| all | 100.0 % of 30 | 100.0 % of 30 | 100.0 % of 30 |" in capsys.readouterr().out
    assert Image.open(page).size[0] > 8 * 128  # eight images side by side, twice as large
