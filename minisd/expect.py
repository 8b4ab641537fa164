"""What public functions expect of an argument: a ValueError says what was got and what was
expected."""

import math
import operator
from numbers import Real

from torch import Tensor


def whole_number(name: str, value, low: int, high: float = math.inf) -> None:
    """low <= value <= high, an int or what stands for one (NumPy's), but no bool."""
    try:
        fits = low <= operator.index(value) <= high and not isinstance(value, bool)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} is {value!r:.80}, expected a whole number{_bounds(low, high)}")


def number(name: str, value, low: float = -math.inf, high: float = math.inf) -> None:
    """low <= value <= high and finite, an int or a float, but no bool."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and low <= value <= high and -math.inf < value < math.inf):
        kind = "a finite number" if low == -math.inf else f"a number{_bounds(low, high)}"
        raise ValueError(f"{name} is {value!r:.80}, expected {kind}")


def rows(of: str | None = None, /, **counts: int) -> int:
    """How many rows things of these counts make, where there is one of each for all rows or one for
    each row.

    of: the thing of which there is one for each row, always; None: that of which there are most.
    """
    total = max(counts.values()) if of is None else counts[of]
    if total < 1 or not set(counts.values()) <= {1, total}:
        *first, last = (f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        each = "" if of is None else f" of the {of.replace('_', ' ')}"
        got = f"{', '.join(first)} and {last}"
        raise ValueError(f"got {got}, expected one for all or one for each{each}, at least one")
    return total


def shape(name: str, x, *sizes: int | str) -> None:
    """x is a tensor of these sizes; a letter stands for any size from 1 on. Reads no value, so no
    device waits."""
    fits = isinstance(x, Tensor) and x.ndim == len(sizes)
    if not (
        fits
        and all(n == size or isinstance(size, str) and n > 0 for n, size in zip(x.shape, sizes))
    ):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got {got}, expected a tensor ({', '.join(map(str, sizes))})")


def _bounds(low: float, high: float) -> str:
    return f", at least {low}" if high == math.inf else f" from {low} to {high}"
