"""docs/knobs.md: the options of its tables are the commands' options, with their defaults."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import minisd
from minisd.cli.main import build_parser

PAGE = (Path(__file__).parent.parent / "docs/knobs.md").read_text(encoding="utf-8")


def options(command):
    """The options of a command: name -> default."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    return {
        name: action.default
        for action in commands.choices[command]._actions
        for name in action.option_strings
    }


@pytest.mark.parametrize("command", ["edit", "invert", "blend", "erase", "dit"])
def test_options_and_defaults(command):
    (section,) = re.findall(rf"^## [^\n]*`minisd {command}`.*?(?=^## |\Z)", PAGE, re.M | re.S)
    given, rows = options(command), re.findall(r"^\| `(--[\w-]+)`[^|]*\| ([^|]*) \|", section, re.M)
    assert len(rows) >= 3
    for name, told in rows:
        assert name in given, f"{command} has no {name}"
        number = re.match(r"-?[\d.]+", told)
        if isinstance(default := given[name], (int, float)) and not isinstance(default, bool):
            assert number and float(number[0]) == default, (
                f"{command} {name}: {told}, the command has {default}"
            )


def test_options_and_defaults_of_the_methods_on_attention():
    _, section = PAGE.split("\n## Methods on attention and features\n")
    rows = re.findall(r"^\| `minisd (\w+)`[^|]*\| `(--[\w-]+)`[^|]*\| ([^|]*) \|", section, re.M)
    assert len(rows) >= 10
    for command, name, told in rows:
        default, number = options(command)[name], re.match(r"-?[\d.]+", told)
        shown = isinstance(default, (int, float)) and not isinstance(default, bool)
        assert (float(number[0]) == default) if shown else number is None, (command, name, told)


def test_one_name_for_one_knob():
    """cross_steps, self_steps and guidance, in Python, in the command and on the page."""
    arguments = {
        name
        for function in (minisd.PromptToPrompt, minisd.invert, minisd.blend, minisd.erase_concepts)
        for name in inspect.signature(function).parameters
    } | {field.name for field in dataclasses.fields(minisd.Drawing)}
    for name in ("cross_steps", "self_steps"):
        assert name in arguments and f"| `--{name.replace('_', '-')}`, `{name}` |" in PAGE
        assert f"--{name.replace('_', '-')}" in options("edit")
    assert "guidance" in arguments
    assert all("--guidance" in options(command) for command in ("edit", "invert", "blend", "erase"))
    other = {"injection_ratio", "self_ratio", "guidance_scale", "cross_replace_steps"}
    assert not other & arguments and not any(name in PAGE for name in other)
    assert not re.search(r"`--(cross|self)`", PAGE)
