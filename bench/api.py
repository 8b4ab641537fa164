"""The public names of minisd with their signatures and the first sentence of their docstrings: the
list in docs/api.md, which `python -m bench.report` writes.

Annotations are left out of a signature for its length; they are in the code, and type checkers see
them. Of a class the public methods and properties follow.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass

import minisd


def table() -> str:
    """Markdown: for each module its public names, in the order of minisd.__all__."""
    by_module: dict[str, list[str]] = {}
    for name in minisd.__all__:
        if name != "__version__":
            by_module.setdefault(getattr(minisd, name).__module__, []).append(name)
    parts = []
    for module, names in by_module.items():
        path = module.replace(".", "/") + ".py"
        lines = [line for name in names for line in entry(name, getattr(minisd, name))]
        parts.append("\n".join([f"[{path}](../{path})", "", *lines]))
    return "\n\n".join(parts)


def entry(name: str, thing: object) -> Iterator[str]:
    """The lines of one public name."""
    yield f"- `{name}{signature(thing)}`: {sentence(thing)}"
    for member, value in members(thing).items():
        shown = "" if isinstance(value, property) else signature(value)
        yield f"  - `.{member}{shown}`: {sentence(value)}"


def members(thing: object) -> dict[str, object]:
    """The public methods and properties of a class that minisd wrote and that have a docstring."""
    found: dict[str, object] = {}
    for base in reversed(inspect.getmro(thing)) if inspect.isclass(thing) else ():
        for name, value in vars(base).items() if base.__module__.startswith("minisd") else ():
            value = getattr(value, "__func__", value)  # of a classmethod or staticmethod
            is_member = inspect.isfunction(value) or isinstance(value, property)
            is_member &= name not in getattr(thing, "__dataclass_fields__", ())  # a default
            if is_member and not name.startswith("_") and value.__doc__:
                found[name] = value
    return found


class Default(str):
    """Shown for a default that would print all of its numbers, or its address."""

    def __repr__(self) -> str:
        return str(self)


def signature(thing: object) -> str:
    """(names and defaults), without self and annotations."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return "(message)"
    plain = []
    for name, p in inspect.signature(thing).parameters.items():
        if name not in ("self", "cls", "_cls"):
            default = p.default
            if inspect.isfunction(default):
                default = Default(default.__name__)
            elif is_dataclass(default) and not isinstance(default, type):
                default = Default(f"{type(default).__name__}()")
            plain.append(p.replace(annotation=p.empty, default=default))
    return str(inspect.Signature(plain))


def sentence(thing: object) -> str:
    """The first sentence of the docstring."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    if not text:
        raise ValueError(f"{thing} has no docstring")
    return re.split(r"(?<! al)\. (?=[A-Z])", text)[0].removesuffix(".") + "."
