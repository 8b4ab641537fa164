"""The README's code runs and does what it says."""

import re
from pathlib import Path

from PIL import Image, ImageChops

import minisd

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_ten_lines_draw_what_txt2img_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.+?)```", README, re.S).group(1), names)
    expected = names["sd"].txt2img(names["prompt"], progress=False)[0]
    assert ImageChops.difference(Image.open("out.png"), expected).getbbox() is None


def test_prompt_to_prompt_draws_what_edit_prompt_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"## Prompt-to-prompt\n.+?```python\n(.+?)```", README, re.S).group(1), names)
    assert Image.open("edit.png").width == 2 * (128 + 6) + 6
    expected = minisd.edit_prompt(
        names["sd"],
        names["source"],
        names["target"],
        steps=25,
        cross_steps={"default": 0.8, "green": 0.0},
        local_blend=("blue", "green", "square"),
        progress=False,
    )
    for mine, other in zip(
        names["images"], expected, strict=True
    ):  # embeddings of a batch, and one by one
        assert max(high for _, high in ImageChops.difference(mine, other).getextrema()) <= 2


def test_the_file_guide_names_every_module():
    guide = README[README.index("## Where things are") : README.index("## Equal to the reference")]
    named = set(re.findall(r"`(?:minisd/)?(\w+\.py)`", guide))
    modules = {path.name for path in Path(minisd.__file__).parent.glob("*.py")} - {
        "__init__.py",
        "__main__.py",
    }
    assert named >= modules, f"not in the guide: {sorted(modules - named)}"
