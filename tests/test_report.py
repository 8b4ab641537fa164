"""The tables of the READMEs and of docs/ are what the JSON files in bench/results say."""

import json
import re

import pytest

from bench import fused, harness, report, summary

FILES = sorted({table.file for table in report.TABLES})


@pytest.mark.parametrize("file", FILES)
def test_the_tables_are_what_their_json_says(file):
    text = (harness.ROOT / file).read_text(encoding="utf-8")
    assert report.rewritten(text, file) == text, "run `python -m bench.report`"


@pytest.mark.parametrize("file", FILES)
def test_every_block_belongs_to_a_table(file):
    """A block that nothing writes would never be looked at again."""
    text = (harness.ROOT / file).read_text(encoding="utf-8")
    names = re.findall(r"<!-- (?!end)(.+?) -->", text)
    assert set(names) <= {table.name for table in report.TABLES if table.file == file}


def test_a_figure_that_was_changed_is_noticed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(
        report,
        "TABLES",
        [report.Table("README.md", "a", ("times",), lambda record: f"{record['ms']} ms")],
    )
    monkeypatch.setattr(report.rewritten, "__defaults__", (tmp_path,))
    for device, ms in (("cpu", 7), ("nvidia-h200", 5)):
        (tmp_path / device).mkdir()
        (tmp_path / device / "times.json").write_text(json.dumps({"ms": ms}))
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n<!-- a -->\n8 ms\n<!-- end of it -->\nAfter.\n")
    assert report.main(["--check"]) == 1 and "8 ms" in readme.read_text()
    assert report.main([]) == 0
    assert readme.read_text() == "Before.\n<!-- a -->\n7 ms\n\n5 ms\n<!-- end of it -->\nAfter.\n"
    assert report.main(["--check"]) == 0
    for device, ms in (("cpu", 6), ("a-card", 3)):  # shown where nothing else is
        (tmp_path / device).mkdir(exist_ok=True)
        (tmp_path / device / "times-quick.json").write_text(json.dumps({"ms": ms}))
    assert report.main([]) == 0 and "\n3 ms\n\n7 ms\n\n5 ms\n" in readme.read_text()


def test_the_table_of_the_fused_ops():
    """One line for each row that a card has timed, with the quicker of the two rivals over ours."""
    times = {"minisd": {"ms": 0.5}, "torch": {"ms": 2.0}, "torch.compile": {"ms": 0.8}}
    row = {
        "op": "geglu",
        "B": 2,
        "C": 320,
        "side": 64,
        "dtype": "float16",
        "error_over_budget": 0.25,
        "times": times,
    }
    on_cpu = {**row, "op": "layer_norm", "times": {"torch": {"ms": 7.0}}}
    record = {**harness.provenance("cpu"), "rows": [row, on_cpu]}
    made = fused.table(record)
    assert (
        "| geglu | 2 | 320 | 64 | float16 | 0.5000 | 2.0000 | 0.8000 | 1.60x | 0.25 |"
        in made.splitlines()
    )
    assert "layer_norm" not in made and f"triton {record['triton']}" in made


def test_a_table_of_several_files_needs_all_of_them(tmp_path):
    def put(device, name, value):
        (tmp_path / device).mkdir(exist_ok=True)
        (tmp_path / device / f"{name}.json").write_text(json.dumps(value))

    table = report.Table("README.md", "both", ("a", "b"), lambda a, b: f"{a} {b}")
    put("cpu", "a", 1)
    put("h200", "a", 3)
    assert report.made(table, tmp_path) == []
    put("cpu", "b", 2)
    assert report.made(table, tmp_path) == ["1 2"]
    put("h200", "b-quick", 4)
    assert report.made(table, tmp_path) == ["1 2", "3 4"]
    put("h200", "b", 5)  # the full run counts
    assert report.made(table, tmp_path) == ["1 2", "3 5"]


def test_the_summary_of_speed():
    """The first group at batch 1 that has both; a rival that was not measured has no row."""

    def t(ms, size):
        return {"ms": ms, "bytes": size, "above": size // 2}

    def group(batch, **ms):
        times = {f"{name} fp32": t(value, 2_000_000_000) for name, value in ms.items()}
        return {"batch": batch, "times": times}

    about = {"device": "cpu", "processor": "P", "threads": 2, "torch": "2", "commit": "c" * 40}
    groups = (
        group(1, minisd=1),
        group(2, minisd=1, diffusers=9),
        group(1, minisd=2000, diffusers=3000),
    )
    unet, no_images = about | {"rows": list(groups)}, {"rows": [], "commit": "d" * 40}
    edits = {"rows": [{"size": 512, "times": group(1, lockstep=1000, eager=4000)["times"]}]}
    first = {"rows": [{"what": "shapes: all", "times": t(2340, 0)}], "commit": "f" * 40}
    edits["commit"] = "e" * 40
    made = summary.speed(unet, no_images, edits, first)
    assert made.startswith("P, 2 threads, torch 2, commit cccccccccccc;")
    assert [line for line in made.splitlines() if line.startswith("| one")] == [
        "| one guided step, fp32 | 2 s, 2.00 GB | 3 s, 2.00 GB | 1.50 |",
        "| one guided step of prompt-to-prompt, two prompts, fp32 | 1 s, 1.00 GB | 4 s, 1.00 GB "
        "| 4.00 |",
    ]
    end = made.split("drawing the first image take ")[1]
    commits = f"images {'d' * 7}, prompt-to-prompt {'e' * 7}, the first image {'f' * 7}"
    assert end == f"2.3 s.\nMeasured at other commits: {commits}."


def test_markdown():
    rows = [("a", 1, ""), ("", "", 2)]
    expected = "| x | | y |\n|---|---|---|\n| a | 1 | |\n| | | 2 |"
    assert harness.markdown(("x", "", "y"), rows) == expected


def test_a_table_without_a_place_is_an_error():
    unclosed = "<!-- a -->\n<!-- b -->\ny\n<!-- end -->"  # b's block is not a's
    for text in (
        "no block",
        "<!-- a -->\n",
        unclosed,
        "<!-- a -->\nx\n<!-- end -->\n<!-- a -->\ny\n<!-- end -->",
    ):
        with pytest.raises(ValueError, match="expected one block from <!-- a -->"):
            harness.put(text, "a", "7 ms")
    assert (
        harness.put("<!-- a -->\n<!-- end -->", "a", r"\1 | \d")
        == "<!-- a -->\n\\1 | \\d\n<!-- end -->"
    )
