"""The tables of the READMEs are what the JSON files in bench/results say."""

import json
import re

import pytest

from bench import harness, report

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
        report, "TABLES", [report.Table("README.md", "a", "times", lambda record: f"{record['ms']} ms")]
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


def test_a_table_without_a_place_is_an_error():
    unclosed = "<!-- a -->\n<!-- b -->\ny\n<!-- end -->"  # b's block is not a's
    for text in ("no block", "<!-- a -->\n", unclosed, "<!-- a -->\nx\n<!-- end -->\n<!-- a -->\ny\n<!-- end -->"):
        with pytest.raises(ValueError, match="expected one block from <!-- a -->"):
            harness.put(text, "a", "7 ms")
    assert harness.put("<!-- a -->\n<!-- end -->", "a", r"\1 | \d") == "<!-- a -->\n\\1 | \\d\n<!-- end -->"
