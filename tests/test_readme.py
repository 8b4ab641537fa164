"""The README's code does what it says, and so does that of docs/editing.md."""

import re
from pathlib import Path

from PIL import Image, ImageChops

import minisd

ROOT = Path(__file__).parents[1]


def run(page, pattern=r"```python\n(.+?)```"):
    """Run the page's first block of code that the pattern finds -> its names."""
    names = {}
    exec(re.search(pattern, (ROOT / page).read_text(encoding="utf-8"), re.S).group(1), names)
    return names


def test_the_ten_lines_draw_what_txt2img_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("README.md")
    expected = names["sd"].txt2img(names["prompt"], progress=False)[0]
    assert ImageChops.difference(Image.open("out.png"), expected).getbbox() is None


def test_prompt_to_prompt_draws_what_edit_prompt_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("docs/editing.md")
    assert Image.open("edit.png").width == 2 * (128 + 6) + 6
    # embeddings of a batch, and one by one
    for mine, other in zip(names["images"], names["again"], strict=True):
        assert max(high for _, high in ImageChops.difference(mine, other).getextrema()) <= 2
    plain = ImageChops.difference(names["images"][1], names["plain"])
    assert max(high for _, high in plain.getextrema()) > 50  # the edit has an effect


def test_the_guide_names_every_module():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    guide = guide[guide.index("## Where things are") : guide.index("## A form of a kernel")]
    named = set(re.findall(r"`(\w+\.py)`", guide))
    modules = {path.name for path in Path(minisd.__file__).parent.rglob("*.py")}
    modules -= {"__init__.py", "__main__.py"}
    assert named == modules, f"not in the guide or not there: {sorted(modules ^ named)}"


def test_the_tables_of_edits_have_all_fields():
    """In docs/extending.md, each field of both kinds of edit once, and nothing else."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    for edit in (minisd.AttentionEdit, minisd.FeatureEdit):
        table = page[page.index(f"| field of `{edit.__name__}`") :].split("\n\n")[0]
        assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == sorted(edit._fields)
