"""Every code block of README.md and of docs/ runs against the bundled model, in the order of its page."""

import contextlib
import io
import re
import shlex
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from minisd import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = ("python", "console")  # the languages of blocks that run; "text" is for what is not code


def blocks(page):
    """(language, line number, code) of the page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield match[1], text.count("\n", 0, match.start(2)), match[2]


def test_each_block_says_what_it_is():
    assert len(PAGES) >= 5
    for page in PAGES:
        kinds = [kind for kind, _, _ in blocks(page)]
        assert set(kinds) <= {*RUNS, "text"} and page.read_text().count("```") == 2 * len(kinds), page
        assert set(kinds) & set(RUNS), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (64, 64), "white")  # what a reader has: a picture, and a mask for it
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill="red")
    picture.save("picture.png")
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((8, 8, 56, 56), fill=255)
    mask.save("mask.png")
    names = {"__name__": "page"}
    gradients = torch.is_grad_enabled()
    try:
        for kind, line, code in blocks(page):
            start = time.monotonic()
            if kind == "python":
                # The line numbers of an error are those of the page.
                exec(compile("\n" * line + code, str(page), "exec"), names)
            for command in code.splitlines() if kind == "console" else ():
                run(command, page)
            print(f"{page.name}:{line + 1}: {time.monotonic() - start:.1f} s")
    finally:
        torch.set_grad_enabled(gradients)


def run(command, page):
    program, *argv = shlex.split(command, comments=True)
    assert program == "minisd", f"{page}: {command}"
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.main(argv)
    assert code == 0, f"{command}\n{errors.getvalue()}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_api_page_names_every_public_name():
    import minisd

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    missing = set(minisd.__all__) - {"__version__"} - named
    assert not missing, f"docs/api.md does not name {sorted(missing)}"
