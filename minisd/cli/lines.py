"""Command lines as text: how a shell reads an argument, and how a PNG keeps one."""

import re
import shlex
from collections.abc import Iterable

PRINTABLE = set(range(0x20, 0x7F)) - set(b"\\'")


def joined(arguments: Iterable[str]) -> str:
    """The line of these arguments, for a shell."""
    return " ".join(shlex.quote(a) if a.isprintable() else escaped(a) for a in arguments)


def escaped(text: str) -> str:
    """A text as bash, zsh and POSIX 2024 write it with escapes, $'a\\033b': nothing steers a
    terminal, and bytes that are no UTF-8 (Python's surrogates) are there as well."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no name has such surrogates
        data = text.encode("utf-8", "surrogatepass")
    return "$'" + "".join(chr(b) if b in PRINTABLE else f"\\{b:03o}" for b in data) + "'"


def as_chunk(text: str) -> str:
    """A text for a PNG, which holds UTF-8 alone: escaped where it is none; `of_chunk` is the
    inverse."""
    is_utf8 = not re.search("[\ud800-\udfff]", text)
    return text if is_utf8 and not text.startswith("$'") else escaped(text)


def of_chunk(text: str) -> str:
    if not (text.startswith("$'") and text.endswith("'") and text.isascii()):
        return text
    data = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 255]), text[2:-1].encode())
    return data.decode("utf-8", "surrogateescape")
