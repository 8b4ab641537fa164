"""Edits of features as data: what flows between the UNet's layers, read, replaced or changed.

    x' = apply(scale * source + add),   source: x itself, the x of another row, or a stored tensor

As an AttentionEdit it is a value that reaches the network in `edits`, under the name of a feature
site (`UNet.sites("feature")`); it is the same formula at all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class FeatureEdit(NamedTuple):
    """What to change and what to save at one feature site in one step; None switches a part off.

        x' = apply(scale * source + add)

    In order: source, scale, add, apply, save. x is (R, C, h, w) at a resnet, a transformer, a block
    or a skip connection, (R, N, C) at an attention's output, and (R, H, N or L, D) at its q, k and
    v; `...` below stands for x.shape[1:]. Every tensor has S rows, S <= R, and addresses the last S
    of the R rows of the batch (guidance groups are group-major with the conditional group last).
    With `apply` alone these are all R rows.

    source_row  (S,) int: the x of this row, counted within the S rows (arange: own)
    inject      (S, ...) floats: or this stored x
    scale       (S, ...) or 1 in any place but the first: factors, {S, C, 1, 1} for channels
    add         the same: what is added
    apply       a pure function, (S, ...) -> (S, ...) of the same dtype: no writing to its argument,
                nothing kept. Make it once for a run: a graph is of one function, and reads the
                tensors that it closes over where they lie
    save        (S, ...) floats, out: x', as used; under gradients it carries them
    """

    source_row: Tensor | None = None
    inject: Tensor | None = None
    scale: Tensor | None = None
    add: Tensor | None = None
    apply: Callable[[Tensor], Tensor] | None = None
    save: Tensor | None = None

    def check_rows(self) -> "FeatureEdit":
        """Self, or ValueError if source_row, or a table (..., S) of it, names a row outside [0, S).

        It reads values, so it is called once, where an edit is built.
        """
        if self.source_row is not None:
            check_rows("source_row", self.source_row)
        return self


def check_rows(name: str, table: Tensor, axis: int = -1) -> None:
    """ValueError if a table of rows names one outside [0, S), S being its size along `axis`."""
    if table.ndim < -axis:
        shape = "(..., S)" if axis == -1 else "(..., S, M)"
        raise ValueError(f"{name}: expected {shape}, got {tuple(table.shape)}")
    S = table.shape[axis]
    wrong = table[(table < 0) | (table >= S)].tolist()
    if wrong:
        raise ValueError(f"{name}: expected values from 0 to {S - 1}, got {wrong}")


def edited(x: Tensor, edit: FeatureEdit | None, site: str) -> Tensor:
    """x (R, ...) with its last S rows edited, a new tensor; x itself where nothing is changed.

    ValueError for shapes, dtypes and devices that do not fit, named with the site.
    """
    if edit is None:
        return x
    first = len(x) - check(x, edit, site)
    y = own = x[first:]
    if edit.source_row is not None:
        y = y[edit.source_row]
    elif edit.inject is not None:
        y = edit.inject
    if edit.scale is not None:
        y = edit.scale * y
    if edit.add is not None:
        y = y + edit.add
    y = y.to(x.dtype)
    if edit.apply is not None:
        y = applied(edit.apply, y, site)
    if edit.save is not None:
        edit.save.copy_(y)
    # A copy of `inject` and of what `apply` returned: later layers may write over what they get.
    return x if y is own else torch.cat([x[:first], y])


def applied(apply: Callable[[Tensor], Tensor], x: Tensor, site: str) -> Tensor:
    """apply(x); ValueError unless it is a tensor like x."""
    y = apply(x)
    if not isinstance(y, Tensor):
        got, expected = type(y).__name__, f"a tensor {tuple(x.shape)}"
        raise ValueError(f"{site}: apply returned {got}, expected {expected}")
    if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        got, expected = (f"{tuple(z.shape)} {z.dtype} on {z.device}" for z in (y, x))
        raise ValueError(f"{site}: apply returned {got}, expected {expected}")
    return y


def check(x: Tensor, edit: FeatureEdit, site: str) -> int:
    """S; ValueError unless the edit fits x: shapes, dtypes and devices, never values."""
    tensors = {name: y for name, y in edit._asdict().items() if name != "apply" and y is not None}
    if not tensors:
        return len(x) if edit.apply is not None else 0
    if edit.source_row is not None and edit.inject is not None:
        raise ValueError(f"{site}: expected one source, got both source_row and inject")
    name, given = next(iter(tensors.items()))
    S = given.shape[0] if given.ndim else 0
    if not 1 <= S <= len(x):
        got = f"{name} {tuple(given.shape)}"
        raise ValueError(f"{site}: got {got}, expected 1 to {len(x)} rows")
    for name, y in tensors.items():
        whole, broadcasts = (S, *x.shape[1:]), name in ("scale", "add")
        fits = tuple(y.shape) == ((S,) if name == "source_row" else whole)
        if broadcasts and y.ndim == x.ndim and y.shape[0] == S:
            fits = all(n in (1, m) for n, m in zip(y.shape[1:], x.shape[1:]))
        if not fits:
            or_1 = ", or 1 in any place but the first" if broadcasts else ""
            expected = f"{(S,) if name == 'source_row' else whole}{or_1}"
            raise ValueError(f"{site}: {name} has shape {tuple(y.shape)}, expected {expected}")
        of_kind = is_integer(y) if name == "source_row" else y.is_floating_point()
        if not of_kind or y.device != x.device:
            kind = "integers" if name == "source_row" else "floats"
            got = f"{y.dtype} on {y.device}"
            raise ValueError(f"{site}: {name} is {got}, expected {kind} on {x.device}")
    return S


def is_integer(x: Tensor) -> bool:
    return x.dtype in (torch.int32, torch.int64)
