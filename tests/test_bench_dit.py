"""The figure of the four small DiTs: what is drawn, counted and shown. The figures themselves are
measured by running it."""

import json

import numpy as np
import pytest
import torch
from oracle_dit import multiply_adds
from PIL import Image

import minisd
from bench import dit as bench, features
from minisd.models.dit import DiT
from minisd.training.labelled import LABELS, write_dit
from minisd.training.recipes import MINIATURE, small_dit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A DiT of random weights, with every parameter random, through its folder."""
    torch.manual_seed(0)
    dit = DiT(small_dit(1, 1, 4))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("dit") / "small-4"
    write_dit(dit.config, dit.state_dict(), 0, folder)
    loaded = minisd.load_dit(folder, device="cpu")
    for name, value in loaded.dit.state_dict().items():
        assert torch.equal(value, dit.state_dict()[name].half().float())
    return loaded


def test_images_are_those_of_generate(model):
    """Image i has label i and seed i, whatever the batch."""
    labels = [i % 24 for i in range(bench.BATCH + 2)]
    images = bench.draw(model, labels)
    how = dict(steps=25, guidance=1.0, sampler="dpm++", progress=False)
    for i in (0, 7, bench.BATCH + 1):
        [alone] = model.generate(labels[i], seed=bench.SEEDS["images"] + i, **how)
        off = np.abs(np.asarray(alone, int) - np.asarray(images[i], int))
        assert off.max() <= 1
    guided = bench.draw(model, labels[:2], 4.0)
    assert guided[0].tobytes() != images[0].tobytes()


@pytest.mark.parametrize("name", MINIATURE.dits)
def test_gflops_are_the_formulas(name):
    config = MINIATURE.dits[name]
    row = bench.about(DiT(config))
    assert row["gflops"] == multiply_adds(config, 16, 16) / 1e9
    assert row["tokens"] == (16 // config.patch_size) ** 2


def test_right_is_counted_by_the_pixels():
    images = [Image.new("RGB", (64, 64), "white") for _ in range(3)]
    images[0].paste((225, 35, 35), (20, 20, 47, 47))
    images[1].paste((30, 80, 225), (20, 20, 47, 47))
    found = bench.right(images, ["a red square"] * 3)
    assert found == {"count": 2 / 3, "colour": 1 / 3, "shape": 2 / 3, "all": 1 / 3}


def test_rows_have_what_they_say(model, monkeypatch):
    """Renderings of other places are right and near, a random network's images wrong and far."""
    small = lambda images, count, name: np.stack(
        [np.asarray(image.resize((4, 4)), float).ravel() for image in images]
    )
    monkeypatch.setattr(features, "features", small)
    rows = bench.measure({"small-4": model}, minisd.load("shapes", device="cpu"), 24, 5)
    assert list(rows) == ["other renderings", "autoencoder", "small-4"]
    near, through, far = (row["frechet"]["value"] for row in rows.values())
    assert near < far and through < far and near != through
    others = rows["other renderings"]["right"]["all"], rows["autoencoder"]["right"]["all"]
    assert min(others) > 0.9 and rows["small-4"]["right"]["all"] < 0.2
    assert "gflops" not in rows["autoencoder"] and rows["small-4"]["width"] == 32


def record():
    row = lambda gflops, value: {
        "layers": 4,
        "width": 64,
        "patch": 2,
        "tokens": 64,
        "parameters": 1_234_567,
        "gflops": gflops,
        "frechet": {"value": value, "low": 0.9 * value, "high": 1.1 * value},
        "right": {"colour": 0.75, "all": 0.5},
        "trained_steps": 500,
    }
    rows = {
        "autoencoder": {"frechet": row(1, 12.0)["frechet"], "right": {"colour": 1.0, "all": 1.0}}
    }
    rows |= {"small-4": row(0.004, 90.0), "small-2": row(0.016, 60.0)}
    rows |= {"large-4": row(0.02, 50.0), "large-2": row(0.08, 30.0)}
    origin = {"processor": "one", "threads": 1, "torch": "2", "command": "x", "device": "cpu"}
    return {**origin, "commit": "0" * 40, "n": 480, "rows": rows}


def test_the_table_and_the_plot_show_the_figures():
    lines = bench.table(record()).splitlines()
    assert lines[0].endswith("commit 000000000000; 480 images each, after 500 steps")
    assert (
        "| small-2 | 4 x 64 | 64 of 2 x 2 | 1.23 M | 0.0160 | 60.0 (54.0 to 66.0) | 75 % | 50 % |"
        in lines
    )
    assert "| autoencoder | - | - | - | - | 12.0 (10.8 to 13.2) | 100 % | 100 % |" in lines
    changed = record()
    changed["rows"]["large-2"]["frechet"]["value"] = 40.0
    one, other = (np.asarray(bench.plot(r).convert("RGB"), int) for r in (record(), changed))
    assert one.shape == (400, 640, 3)
    moved = np.argwhere(np.abs(one - other).sum(2) > 60)
    assert len(moved) and moved[:, 1].min() > 300  # the dearest is on the right


def test_the_plot_in_the_docs_is_of_the_figures_at_hand():
    told = json.loads(bench.JSON.read_text(encoding="utf-8"))
    with Image.open(bench.PLOT) as image:
        shown = np.asarray(image.convert("RGB"), int)
    expected = np.asarray(bench.plot(told).convert("RGB"), int)
    assert np.abs(shown - expected).mean() < 1
    assert len(LABELS) == 24 and set(MINIATURE.dits) <= told["rows"].keys()


def test_the_command_takes_a_folder_or_draws_anew(capsys):
    for line in ([], ["somewhere", "--plot"]):
        with pytest.raises(SystemExit):
            bench.main(line)
        assert "expected either DIR or --plot" in capsys.readouterr().err
