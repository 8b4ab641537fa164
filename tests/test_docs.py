"""Every code block of README.md and of docs/ runs against the bundled model, in the order of its
page, and each command makes the pictures and prints the text that the page shows."""

import contextlib
import io
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from minisd.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = (
    "python",
    "console",
)  # the languages of blocks that run; "text" is what the commands above it print
PICTURES = ROOT / "docs/commands"
GIVEN = ("picture.png", "mask.png")  # what a reader has
DRAWING = ("txt2img", "img2img", "edit", "heatmap", "invert", "blend", "erase")


def blocks(page):
    """(language, line number, code) of the page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield match[1], text.count("\n", 0, match.start(2)), match[2]


def test_each_block_says_what_it_is():
    assert len(PAGES) >= 5
    for page in PAGES:
        kinds = [kind for kind, _, _ in blocks(page)]
        assert set(kinds) <= {*RUNS, "text"} and page.read_text().count("```") == 2 * len(kinds), (
            page
        )
        assert set(kinds) & set(RUNS), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_the_page_runs(page, hub, repo, tmp_path, monkeypatch):
    hub.repos["CompVis/stable-diffusion-v1-4"] = repo  # for `minisd fetch`
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # the pages show what a CPU draws, in float32
    for name in GIVEN:
        shutil.copy(PICTURES / name, folder)
    names = {"__name__": "page"}
    gradients = torch.is_grad_enabled()
    try:
        for kind, line, code in blocks(page):
            start = time.monotonic()
            if kind == "python":
                # The line numbers of an error are those of the page.
                exec(compile("\n" * line + code, str(page), "exec"), names)
            elif kind == "console":
                printed = "".join(run(command, page) for command in code.splitlines())
            elif kind == "text":
                assert says(code, printed), (
                    f"{page.name}:{line + 1} shows\n{code}\nand the commands print\n{printed}"
                )
            print(f"{page.name}:{line + 1}: {time.monotonic() - start:.1f} s")
    finally:
        torch.set_grad_enabled(gradients)
    for name, path in shown(page).items():
        if path.parent == ROOT / "docs" and not (folder / name).exists():
            continue  # a measurement's picture, not the page's
        made, kept = frames(folder / name), frames(path)
        # Another processor rounds otherwise; another seed, prompt or option changes whole objects.
        assert made.shape == kept.shape, f"{page.name} shows another {name}"
        off = (np.abs(made - kept) > 16).mean()
        assert off < 0.002, (
            f"{page.name} shows another {name}: {off:.1%} of it; made was {folder / name}"
        )


def run(command, page):
    """Run a command of a page -> what it prints."""
    program, *argv = shlex.split(command, comments=True)
    assert program == "minisd", f"{page}: {command}"
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli.main(argv)
    assert code == 0, f"{command}\n{errors.getvalue()}"
    return out.getvalue()


def says(shown, printed):
    """Whether the page shows what was printed; its ... stands for anything within a line, tabs for
    any blanks."""
    expected, got = (
        [" ".join(line.split()) for line in text.splitlines()] for text in (shown, printed)
    )
    pattern = "\n".join(".*".join(map(re.escape, line.split("..."))) for line in expected)
    return re.fullmatch(pattern, "\n".join(got)) is not None


def shown(page):
    """The pictures that a page shows, name -> file; those of docs/commands under the name that a
    command gave them."""
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    paths = {page.parent / link for link in links} - {PICTURES / name for name in GIVEN}
    return {
        str(path.relative_to(PICTURES if PICTURES in path.parents else ROOT / "docs")): path
        for path in paths
    }


def frames(path):
    """The values of a picture, or of all pictures of an animation."""
    with Image.open(path) as image:
        return np.stack(
            [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)]
        )


def test_each_command_of_the_readme_has_its_output():
    """A picture for those that draw, a text for the others."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    commands = re.findall(r"^    (\w+) +\w", cli.build_parser().format_help(), re.M)
    assert set(DRAWING) < set(commands) and len(commands) == 12
    found = []
    all_blocks = [*blocks(readme), ("", 0, "")]
    for (kind, line, code), (following, _, _) in zip(all_blocks, all_blocks[1:]):
        for command in code.splitlines() if kind == "console" else ():
            _, name, *options = shlex.split(command, comments=True)
            found.append(name)
            if name not in DRAWING:
                assert following == "text", command
                continue
            options = dict(zip(options, options[1:]))
            target = (
                options.get("-o") or options.get("--sheet") or f"{options['--trace']}/images.webp"
            )
            after = text.split("\n", line)[-1].split("\n```console")[
                0
            ]  # as far as the next commands
            assert f"](docs/commands/{target})" in after, f"no picture below: {command}"
    assert set(found) == set(commands)
    kept = {path.relative_to(PICTURES).as_posix() for path in PICTURES.rglob("*") if path.is_file()}
    assert kept == {
        *GIVEN,
        *(name for name, path in shown(readme).items() if path.is_relative_to(PICTURES)),
    }
    assert sum((PICTURES / name).stat().st_size for name in kept) < 300_000


def test_readme_and_knobs_name_every_option():
    text = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/knobs.md")
    )
    [commands] = [
        action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)
    ]
    for name, parser in commands.items():
        options = {
            option for action in parser._actions for option in action.option_strings[-1:]
        } - {"--help"}
        missing = [option for option in options if not re.search(rf"`[^`]*{option}(?![\w-])", text)]
        assert len(options) >= 1 and not missing, f"{name}: neither page names {missing}"


def test_a_changed_picture_or_text_is_noticed():
    red = frames(PICTURES / "circle.png")
    assert (np.abs(red - frames(PICTURES / "redrawn.png")) > 16).mean() > 0.02
    assert says("a ... c\nd\n", "a\tb  c\nd\n")
    assert not says("a ... c\n", "a b c\nd\n") and not says("a ... c\n", "a b\nc\n")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_the_api_page_names_every_public_name():
    import minisd

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    missing = set(minisd.__all__) - {"__version__"} - named
    assert not missing, f"docs/api.md does not name {sorted(missing)}"
