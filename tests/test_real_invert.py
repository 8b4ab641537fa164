"""The benchmark of inversion: its scenes and tables, a small run of it, and a few of its figures
again."""

import json
import re

import numpy as np
import pytest

import minisd
from bench import harness, real_invert
from bench.metrics import psnr, values
from minisd.training import scenes

RESULTS = harness.ROOT / "bench/results/cpu/editing_real.json"


@pytest.fixture(scope="module")
def sd():
    return minisd.load("shapes", device="cpu", dtype="float32")


def test_the_mask_holds_all_that_the_edit_should_change():
    found = real_invert.cases(10)
    assert found[:4] == real_invert.cases(4) and {
        len(case.scene.said.things) for case in found
    } == {1, 2}
    for case in found:
        assert scenes.split(case.caption) == "heldout" and len(set(case.prompts)) == 2
        for said in map(
            scenes.parse, case.prompts
        ):  # all is said, and as it was where the caption had said it
            assert said.background == case.scene.background and None not in [
                thing.size for thing in said.things
            ]
            assert [box.side < 22 for box in case.scene.boxes] == [
                thing.size == "small" for thing in said.things
            ]
        assert set(case.caption.split()) <= set(case.prompts[0].split())
        truth = scenes.render(scenes.Scene(case.wanted, case.scene.boxes, case.scene.background))
        change = (values(truth) != values(scenes.render(case.scene))).any(axis=2)
        mask = case.mask(64)
        assert change.any() and not (change & ~mask).any() and mask.mean() < 0.4


def test_a_small_run(sd, monkeypatch):
    """Every figure is there and of as many scenes as said; the direct source row is the VAE's
    image."""
    for name, value in {
        "STEPS": 2,
        "GUIDED_STEPS": 2,
        "NULL_TEXT": 1,
        "EDICT": 1,
        "BATCH": 1,
        "ROWS": 1,
    }.items():
        monkeypatch.setattr(real_invert, name, value)
    record, page = real_invert.invert(sd, 2)
    record = {"invert": json.loads(json.dumps(record))}
    ways, edits = record["invert"]["way_back"], record["invert"]["edits"]
    assert {name: len(rows) for name, rows in edits.items()} == {
        **dict.fromkeys(("ddim", "negative-prompt", "negative-prompt low", "direct"), 2),
        **dict.fromkeys(("null-text", "null-text low"), 1),
    }
    assert (
        ways.keys() == real_invert.WAYS.keys()
        and len(ways["vae"]) == 2
        and len(ways["null-text guided"]) == 1
    )
    assert ways["edict"][0] == pytest.approx(ways["vae"][0], abs=0.1)
    assert all(np.isfinite(list(row.values())).all() for rows in edits.values() for row in rows)
    lines = real_invert.table(record).splitlines()
    assert lines[2].startswith("| VAE alone | - | - | 2 |") and lines[2].endswith("| 0.00 dB |")
    assert sum(line.startswith("| ") for line in lines) == 2 + len(real_invert.WAYS) + len(
        real_invert.EDITS
    )
    assert page.width == 9 * (128 + 6) + 6


@pytest.mark.full
@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet")
def test_the_first_scenes_come_back_as_recorded(sd):
    part = json.loads(RESULTS.read_text())["invert"]
    some = real_invert.cases(2)
    given = [scenes.render(case.scene, 64) for case in some]
    prompts = [case.prompts[0] for case in some]
    for name, refine in (("ddim", 0), ("refined", part["refine"])):
        inversion = minisd.invert(
            sd, given, prompts, steps=part["steps"], refine=refine, progress=False
        )
        images = minisd.redraw(sd, inversion, progress=False)
        measured = [psnr(values(source), values(image)) for source, image in zip(given, images)]
        assert measured == pytest.approx(part["way_back"][name][:2], abs=0.1)


def test_the_example_of_the_page(tmp_path, monkeypatch):
    """Its lines run, at three steps; with direct inversion the source comes back as the VAE's
    image of it."""
    page = (harness.ROOT / "docs/inversion.md").read_text(encoding="utf-8")
    [block] = [code for code in re.findall(r"```python\n(.+?)```", page, re.S) if "invert(" in code]
    monkeypatch.chdir(tmp_path)
    scenes.render(real_invert.cases(1)[0].scene).save("image.png")
    names = {}
    exec(block.replace("steps=25", "steps=3"), names)
    sd, inversion = names["sd"], names["inversion"]
    assert (np.asarray(names["same"]) == np.asarray(sd.decode(inversion.z)[0])).all()
    assert {path.name for path in tmp_path.iterdir()} == {
        "image.png",
        "back.png",
        "photo.safetensors",
        "edited.png",
    }
    assert (minisd.Inversion.load("photo.safetensors").trajectory == inversion.trajectory).all()
