"""Reading a checkpoint's config.json into a dataclass, strictly."""

from dataclasses import fields
from types import UnionType
from typing import get_args, get_origin


def read_config(cls, values, neutral, absent, harmless=()):
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
    taken, faults = {}, []
    for key, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in kinds:
            taken[key] = value
            if not fits(value, kinds[key]):
                kind = kinds[key].__name__ if isinstance(kinds[key], type) else kinds[key]
                faults.append(f"{key}: got {value!r:.200}, expected {kind}")
        elif key in neutral:
            if value != neutral[key]:
                faults.append(f"{key}: got {value!r:.200}, supported is {neutral[key]!r:.200}")
        elif (
            not key.startswith("_")
            and key not in harmless
            and value is not None
            and value is not False
        ):
            faults.append(f"{key:.200}: got {value!r:.200}, but this key is unknown")
    if faults:
        raise ValueError(f"{cls.__name__} cannot be built from this config: " + "; ".join(faults))
    return cls(**absent | taken)


def fits(value, kind):
    """Whether a value is of an annotated kind: a plain type (an int passes for a float), a tuple,
    or a union."""
    if isinstance(kind, UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        first, second = get_args(kind)
        length_fits = isinstance(value, tuple) and (
            len(value) > 0 if second is ... else len(value) == 2
        )
        return length_fits and all(fits(each, first) for each in value)
    return type(value) is kind or (kind is float and type(value) is int)
