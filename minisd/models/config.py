"""Reading a checkpoint's config.json into a dataclass, strictly."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from types import UnionType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def read_config(
    cls: type[C],
    values: Mapping[str, object],
    neutral: Mapping[str, object],
    absent: Mapping[str, object],
    harmless: Collection[str] = (),
) -> C:
    """Build dataclass `cls` from the JSON object `values`.

    A key that is a field of `cls` is taken (lists become tuples) and has to be of the annotated
    kind. Where it is not there, it has the value in `absent`, or else the field's default:
    together, what the library that wrote the file takes, for a file may leave out what is that
    library's default. A key in `neutral` names maths that the model does not have: it must hold the
    neutral value given there. `harmless` keys and those that start with `_` say nothing about the
    maths and are ignored. Any other key is unknown: it is ignored where it is null or false, which
    is off, and an error otherwise.

    Raises ValueError that lists every key at fault with what was got and what was expected.
    """
    kinds = {field.name: field.type for field in fields(cls)}
    known: dict[str, object] = {}
    faults = []
    for key, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in kinds:
            known[key] = value
            if not is_of(value, kinds[key]):
                faults.append(f"{key}: got {value!r:.200}, {_supported(kinds[key])}")
        elif key in neutral:
            if value != neutral[key]:
                faults.append(f"{key}: got {value!r:.200}, supported is {neutral[key]!r:.200}")
        elif key.startswith("_") or key in harmless or value is None or value is False:
            continue
        else:
            faults.append(f"{key:.200}: got {value!r:.200}, but this key is unknown")
    if faults:
        raise ValueError(f"{cls.__name__} cannot be built from this config: " + "; ".join(faults))
    return cls(**{**absent, **known})


def _supported(kind: object) -> str:
    if get_origin(kind) is Literal:
        return f"supported are {', '.join(map(str, get_args(kind)))}"
    return f"expected {kind.__name__ if isinstance(kind, type) else kind}"


def is_of(value: object, kind: object) -> bool:
    """Whether a value is of an annotated kind: a plain type, a tuple, a Literal or a union.

    An int passes for a float; a tuple[int, ...] has at least one entry.
    """
    if isinstance(kind, UnionType):
        return any(is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        first, second = get_args(kind)
        if not isinstance(value, tuple) or (not value if second is ... else len(value) != 2):
            return False
        return all(is_of(each, first) for each in value)
    return type(value) is kind or (kind is float and type(value) is int)
