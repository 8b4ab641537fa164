"""docs/knobs.md: the options of its tables are the commands' options, with their defaults."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("command", ["edit", "invert", "blend", "erase"])
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
