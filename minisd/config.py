"""Reading a checkpoint's config.json into a dataclass, strictly."""

from dataclasses import fields


def read_config(cls, values, neutral, harmless=()):
    """Build dataclass `cls` from the JSON object `values`.

    A key that is a field of `cls` is taken (lists become tuples). A key in `neutral` names maths that the model does not
    have: it must hold the neutral value given there. `harmless` keys and those that start with `_` say nothing about the
    maths and are ignored. Any other key is unknown: it is ignored where it is null or false, which is off, and an error
    otherwise.

    Raises ValueError that lists every key at fault with what was got and what was expected.
    """
    names = {field.name for field in fields(cls)}
    taken, faults = {}, []
    for key, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in names:
            taken[key] = value
        elif key in neutral:
            if value != neutral[key]:
                faults.append(f"{key}: got {value!r}, supported is {neutral[key]!r}")
        elif not key.startswith("_") and key not in harmless and value is not None and value is not False:
            faults.append(f"{key}: got {value!r}, but this key is unknown")
    if faults:
        raise ValueError(f"{cls.__name__} cannot be built from this config: " + "; ".join(faults))
    return cls(**taken)
