"""What public functions expect of an argument: an error says what was got and what was expected."""

import math
import operator
import sys
from numbers import Real
from typing import SupportsIndex, cast

from torch import Tensor


def whole_number(name: str, value: object, low: int, high: float = math.inf) -> None:
    """low <= value <= high, an int or what stands for one (NumPy's), but no bool."""
    try:
        index = None if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    except TypeError:
        index = None
    if index is None or not low <= index <= high:
        raise ValueError(f"{name} is {value!r:.80}, expected a whole number{_bounds(low, high)}")


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """low <= value <= high and finite, an int or a float, but no bool."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    most = sys.float_info.max  # 10**400 is finite, and no float
    if not (is_number and low <= (x := cast(float, value)) <= high and abs(x) <= most):
        kind = "a finite number" if low == -math.inf else f"a number{_bounds(low, high)}"
        raise ValueError(f"{name} is {value!r:.80}, expected {kind}")


def rows(of: str | None = None, /, **counts: int) -> int:
    """How many rows things of these counts make, each given once for all rows or once for each.

    of: the thing of which there is one for each row, always; None: that of which there are most.
    """
    total = max(counts.values()) if of is None else counts[of]
    if total < 1 or not set(counts.values()) <= {1, total}:
        *first, last = (f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        each = "one for each" if of is None else f"one for each of the {of.replace('_', ' ')}"
        raise ValueError(
            f"got {', '.join(first)} and {last}, expected one for all or {each}, at least one"
        )
    return total


def shape(name: str, x: object, *sizes: int | str) -> None:
    """x is a tensor of these sizes; a letter stands for any size from 1 on.

    Reads no value, so no device waits.
    """
    if not (
        isinstance(x, Tensor)
        and x.ndim == len(sizes)
        and all(n == size or isinstance(size, str) and n > 0 for n, size in zip(x.shape, sizes))
    ):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got {got}, expected a tensor ({', '.join(map(str, sizes))})")


def _bounds(low: float, high: float) -> str:
    return f", at least {low}" if high == math.inf else f" from {low} to {high}"
