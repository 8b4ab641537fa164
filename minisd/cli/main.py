"""The `minisd` command: its parser, its errors and its exit codes.

    main -> the commands (draw, edit, invert, blend, methods, models, ...) -> output -> options

A command is a function of what argparse read and a `Call`; it turns them into requests (options.py)
and does the rest from these. torch is imported inside the commands, so that `minisd --help` and
`minisd info image.png` answer at once.
"""

import argparse
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from .. import __version__
from . import batch, blend, dit, draw, edit, info, invert, methods, models, toy
from .options import Call, Run


def main(
    argv: Sequence[str] | None = None, before_writing: Callable[[], object] = lambda: None
) -> int:
    """Run the command; the exit code is 0, 2 after an error (one line on stderr), 130 after Ctrl-C.

    128 + its number after another signal (KeyboardInterrupt carries it), 141 if nobody reads the
    output any more. before_writing is called before the first file is written.
    """
    argv = sys.argv[1:] if argv is None else argv
    # A name or prompt that the terminal cannot show is no error.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    # Pillow logs, which goes to stderr where nobody listens, errors that it raises, too.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    args = argparse.Namespace(debug=False)
    try:
        parser = build_parser()
        parser.parse_args(argv, args)
        given = typed(parser, args, argv)
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            args.run(args, Call(args.command, argv, given, before_writing))
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # after SIGHUP the terminal may be gone
            print("\nminisd: interrupted", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:
        drop_output()
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(f"minisd: error: {one_line(error)}", file=sys.stderr)
        drop_output()
        return 2
    return 0


def drop_output() -> None:
    """Drop what cannot be written to stdout, or Python complains of it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def typed(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str]
) -> frozenset[str]:
    """The names of the arguments that argv holds, be it with their default values.

    Parses argv, of which `parser` made `args`, a second time, now with a default that nothing typed
    is: an object of its own, and a list, which options that may be repeated append to a copy of.
    """
    untyped: list[object] = []
    args.parser.set_defaults(**dict.fromkeys(vars(args), untyped))
    again = vars(parser.parse_args(argv))
    return frozenset(name for name, value in again.items() if value is not untyped)


def one_line(error: Exception | Warning) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ({len(lines) - 1} more lines with --debug)"


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of warnings.showwarning: one line."""
    text = one_line(message) if isinstance(message, Warning) else message
    print(f"minisd: warning: {text}", file=sys.stderr)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are: not those of flags, nor of options whose help tells what
    happens without."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and options by their full names only.

    A line that draws an image again (output.line_again) leaves options out: it could not tell
    --sa, short for one of them in one command, from --sa, short for another in the next.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    what = "Stable Diffusion v1.x, written out so that each tensor can be followed"
    parser = Parser(prog="minisd", description=what)
    parser.add_argument("--version", action="version", version=f"minisd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    def command(name: str, run: Run, help: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=help, description=help, formatter_class=Help)
        sub.set_defaults(run=run, parser=sub, command=name)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    for group in (draw, info, edit, invert, blend, methods, models, toy, dit, batch):
        group.add_commands(command)
    return parser
