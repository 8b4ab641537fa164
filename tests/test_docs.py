"""Every code block of README.md, CONTRIBUTING.md and docs/ runs against the bundled model, in the
order of its page, and each command makes the images and prints the text that the page shows."""

import contextlib
import io
import logging
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from bench import api, harness
from minisd.cli import main as cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
# The languages of blocks that run; "text" is what the commands above it print.
RUNS = ("python", "console")
IMAGES = ROOT / "docs/commands"
GIVEN = ("image.png", "mask.png")  # what a reader has
DRAWING = ("txt2img", "img2img", "edit", "heatmap", "invert", "blend", "erase")


def blocks(page):
    """(language, line number, code) of the page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield match[1], text.count("\n", 0, match.start(2)), match[2]


RUNNING = [page for page in PAGES if {kind for kind, _, _ in blocks(page)} & set(RUNS)]


def test_each_block_says_what_it_is():
    assert len(RUNNING) >= 10 and README in RUNNING
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        kinds = [kind for kind, _, _ in blocks(page)]
        assert set(kinds) <= {*RUNS, "text"}, page
        assert page.read_text().count("```") == 2 * len(kinds), page


# Pages that take less than a few seconds, and the README, are in the first tier.
LONG = "editing looking-inside extending methods one-dimension watching img2img scale inversion dit"
TIERS = [
    pytest.param(page, marks=pytest.mark.full if page.stem in LONG.split() else (), id=page.name)
    for page in RUNNING
]


@pytest.fixture
def log_level():
    """A page that turns the log on leaves it on for no other test."""
    log = logging.getLogger("minisd")
    level = log.level
    yield
    log.setLevel(level)


@pytest.mark.parametrize("page", TIERS)
def test_the_code_of_the_page_runs(page, hub, repo, tmp_path, monkeypatch, log_level):
    hub.repos["CompVis/stable-diffusion-v1-4"] = repo  # for `minisd fetch`
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # The pages show what a CPU draws, in float32.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in GIVEN:
        shutil.copy(IMAGES / name, folder)
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
            continue  # a measurement's image, not the page's
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
    """The images that a page shows, name -> file; those of docs/commands under the name that a
    command gave them."""
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    paths = {page.parent / link for link in links} - {IMAGES / name for name in GIVEN}
    return {
        str(path.relative_to(IMAGES if IMAGES in path.parents else ROOT / "docs")): path
        for path in paths
    }


def frames(path):
    """The values of an image, or of all images of an animation."""
    with Image.open(path) as image:
        return np.stack(
            [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)]
        )


def commands_of(page):
    """(command, its name, its options, the block that follows it, the text as far as the next)."""
    text, found = page.read_text(encoding="utf-8"), [*blocks(page), ("", 0, "")]
    for (kind, line, code), (following, _, _) in zip(found, found[1:]):
        for command in code.splitlines() if kind == "console" else ():
            after = text.split("\n", line)[-1].split("\n```console")[0]
            _, name, *options = shlex.split(command, comments=True)
            yield command, name, dict(zip(options, options[1:])), following, after


def test_each_command_has_its_output():
    """An image below those that draw, on the README all of them; a text below the others."""
    commands = re.findall(r"^    (\w+) +\w", cli.build_parser().format_help(), re.M)
    assert set(DRAWING) < set(commands) and len(commands) == 22
    found = {page: set() for page in PAGES}
    for page in PAGES:
        for command, name, options, following, after in commands_of(page):
            found[page].add(name)
            traced = f"{options['--trace']}/images.webp" if "--trace" in options else None
            target = options.get("-o") or options.get("--sheet") or traced
            if name in DRAWING and following != "text":
                assert re.search(rf"\]\((docs/)?commands/{target}\)", after), command
            else:
                assert following == "text", command
    shown = set().union(*found.values())
    assert set(DRAWING) <= found[README] and shown == set(commands)


def test_every_image_of_a_command_is_shown():
    kept = {path.relative_to(IMAGES).as_posix() for path in IMAGES.rglob("*") if path.is_file()}
    paths = {name: path for page in PAGES for name, path in shown(page).items()}
    assert kept == {*GIVEN, *(n for n, path in paths.items() if path.is_relative_to(IMAGES))}
    assert sum((IMAGES / name).stat().st_size for name in kept) < 300_000


def test_the_pages_name_every_option():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    actions = cli.build_parser()._actions
    [commands] = [action.choices for action in actions if isinstance(action.choices, dict)]
    for name, parser in commands.items():
        options = {option for action in parser._actions for option in action.option_strings[-1:]}
        options -= {"--help"}
        missing = [option for option in options if not re.search(rf"`[^`]*{option}(?![\w-])", text)]
        assert len(options) >= 1 and not missing, f"{name}: no page names {missing}"


def test_a_changed_image_or_text_is_noticed():
    red = frames(IMAGES / "circle.png")
    assert (np.abs(red - frames(IMAGES / "redrawn.png")) > 16).mean() > 0.02
    assert says("a ... c\nd\n", "a\tb  c\nd\n")
    assert not says("a ... c\n", "a b c\nd\n") and not says("a ... c\n", "a b\nc\n")


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def anchors(page):
    """The anchors of the headings of a page, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_each_kind_of_user_has_a_page():
    """Of at most 150 lines; the index names all pages; the server is 40 lines."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((.+?)\)", index))
    assert {page.name for page in DOCS} - linked == {"README.md"}
    for name in ("README", "researchers", "kernels", "backend"):
        lines = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 150, name
    [server] = [code for _, _, code in blocks(ROOT / "docs/backend.md") if "class Draw" in code]
    assert len(server.splitlines()) <= 40


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            if target.startswith("https://"):
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}#{anchor}"


def test_the_api_page_is_what_the_code_says():
    """Every public name with its signature: the page's list is made again and compared."""
    import minisd

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `(\w+)\(", page, re.M)
    assert sorted(listed) == sorted(set(minisd.__all__) - {"__version__"})
    assert harness.put(page, "bench.api", api.table()) == page, "run `python -m bench.report`"
