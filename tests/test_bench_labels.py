"""The benchmark of the bundled DiT: which images are drawn and counted, which rows are kept. The
figures themselves are measured by running it."""

import json

import pytest

from bench import labels as bench
from bench.dit import captions

SHARES = {"count": 1.0, "colour": 0.75, "shape": 0.5, "all": 0.25}


@pytest.fixture
def drawn(monkeypatch):
    """What is asked of the networks, which draw nothing: images are the number of them."""
    asked = []

    def drawing(what):
        def draw(model, n, *options):
            asked.append((what, n, *options))
            return n

        return draw

    monkeypatch.setattr(bench, "draw", drawing("labels"))
    monkeypatch.setattr(bench, "draw_captions", drawing("captions"))
    monkeypatch.setattr(bench, "render_labels", lambda n, seed: asked.append(("rendered", n)) or n)
    monkeypatch.setattr(bench, "through", lambda sd, images: images)
    monkeypatch.setattr(bench, "right", lambda images, texts: SHARES | {"all": images / len(texts)})
    monkeypatch.setattr(bench.minisd, "load_dit", lambda *_, **__: None)
    monkeypatch.setattr(bench, "hashes", lambda folder: {"a": folder.name})
    return asked


def test_rows_are_measured_together_or_alone(drawn, tmp_path, capsys):
    path = tmp_path / "labels.json"
    line = ["--model", str(tmp_path / "m"), "--n", "48", "--json", str(path)]
    assert bench.main([*line, "--only", "UNet", "rendered"]) == 0
    assert drawn == [("captions", 48, 0), ("rendered", 48)]
    record = json.loads(path.read_text())
    assert list(record["right"]) == ["UNet", "rendered"] and "sha256" not in record
    assert "|" not in capsys.readouterr().out  # no table of half of them
    assert bench.main([*line, "--only", "shapes-dit", "--guidance", "2"]) == 0
    record = json.loads(path.read_text())
    assert drawn[-1] == ("labels", 48, 0, 2.0) and len(drawn) == 3
    assert list(record["right"]) == list(bench.ROWS) and record["sha256"] == {"a": "m"}
    assert "| shapes-dit | 100.0 % | 75.0 % | 50.0 % | 100.0 % |" in capsys.readouterr().out
    assert record["guidance"] == 2 and "guidance 2; the UNet's 7.5" in bench.table(record)
    for more, message in (
        (["--only", "UNet", "--seed", "1"], "has another --seed, 0"),
        (["--n", "23"], "--n is 23, expected an image of each of 24 labels"),
    ):
        with pytest.raises(SystemExit):
            bench.main([*line, *more])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--only", "UNet"])
    assert "--only needs --json" in capsys.readouterr().err and len(drawn) == 3
    assert len(captions(48)) == 48
