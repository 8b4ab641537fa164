"""The tables of prompt-to-prompt: what is edited at each step, in each row and token, as values.

Row 0 is the source, which nothing edits, then one row for each target. All functions count tokens
as alignment.py does, in the padded row of L ids.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import expect
from ..models.tokenizer import CLIPTokenizer
from .alignment import find_word, missing_word, token_map

Interval = float | tuple[float, float]  # a fraction of the steps from the first on, or (start, end)
WordIntervals = Interval | Mapping[str, Interval]  # one for all words, or one for each


def token_maps(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], edit: Any, google: bool
) -> tuple[Tensor, Tensor]:
    """M (S, L, L), source tokens -> own tokens, and (S, L), 1 where a token has a source."""
    L = tokenizer.max_length
    M = torch.eye(L, dtype=torch.float32, device="cpu").repeat(len(prompts), 1, 1)
    has_source = torch.zeros(len(prompts), L, dtype=torch.float32, device="cpu")
    for row, kind in per_target("edit", edit, prompts):
        M[row], has_source[row] = token_map(tokenizer, prompts[0], prompts[row], kind, google)
    return M, has_source


def cross_tables(
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    steps: int,
    cross_steps: WordIntervals | list,
    google: bool,
) -> Tensor:
    """(steps, S, L): 1 where a column of the cross-attention map is edited."""
    L = tokenizer.max_length
    table = torch.zeros(steps, len(prompts), L, dtype=torch.float32, device="cpu")
    for row, schedule in per_target("cross_steps", cross_steps, prompts):
        columns = columns_of(tokenizer, prompts, row, cross_steps)
        table[:, row] = cross_table(schedule, steps, L, columns, google)
    return table


def cross_table(
    schedule: WordIntervals,
    steps: int,
    length: int,
    columns: Callable[[str], list[int]],
    google: bool = False,
) -> Tensor:
    """(steps, length): 1 where a token's column is edited at a step. columns: word -> its
    positions.

    A word's own schedule replaces "default" in its columns. google: fractions are of steps + 1.
    """
    words = dict(schedule) if isinstance(schedule, Mapping) else {"default": schedule}
    table = torch.zeros(steps, length, dtype=torch.float32, device="cpu")
    start, end = interval("cross_steps", words.pop("default", 1.0), steps + google)
    table[start:end] = 1
    for word, value in words.items():
        start, end = interval(f"cross_steps of {word!r}", value, steps + google)
        table[:, columns(word)] = 0
        table[start:end, columns(word)] = 1
    return table


def self_rows(prompts: Sequence[str], steps: int, self_steps: Interval | list) -> Tensor:
    """(steps, S): the row whose self-attention map a row takes, the source's 0 or its own."""
    rows = torch.arange(len(prompts), dtype=torch.int64, device="cpu").repeat(steps, 1)
    for row, schedule in per_target("self_steps", self_steps, prompts):
        start, end = interval("self_steps", schedule, steps)
        rows[start:end, row] = 0
    return rows


def word_factors(
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    reweight: Mapping[str, float] | list | None,
) -> Tensor:
    """(S, L): what the maps of a word are multiplied with, 1 where nothing is said."""
    L = tokenizer.max_length
    factors = torch.ones(len(prompts), L, dtype=torch.float32, device="cpu")
    for row, words in per_target("reweight", reweight, prompts):
        if not (words is None or isinstance(words, Mapping)):
            expected = "{word: factor}, or a list of these"
            raise ValueError(f"reweight: got {words!r}, expected {expected}")
        for word, factor in (words or {}).items():
            expect.number(f"reweight: the factor of {word!r}", factor)
            factors[row, columns_of(tokenizer, prompts, row, reweight)(word)] = factor
    return factors


def per_target(name: str, value: Any, prompts: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(row, the value of that target); a list has one value for each, others hold for all."""
    targets = len(prompts) - 1
    if isinstance(value, list) and len(value) != targets:
        got = f"{name} has {len(value)} entries"
        raise ValueError(f"{got}, expected one for each of {targets} targets")
    yield from enumerate(value if isinstance(value, list) else [value] * targets, 1)


def columns_of(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], row: int, given: Any
) -> Callable[[str], list[int]]:
    """word -> its columns in a row; one that was given for all targets has to be in one of them."""
    among = prompts[row : row + 1] if isinstance(given, list) else prompts[1:]

    def columns(word: str) -> list[int]:
        if not any(find_word(tokenizer, prompt, word) for prompt in among):
            raise missing_word(tokenizer, word, among)
        return find_word(tokenizer, prompts[row], word)

    return columns


def interval(name: str, value: Interval, steps: int) -> tuple[int, int]:
    """Steps [start, end) of a fraction or a (start, end) pair of fractions: int(fraction *
    steps)."""
    try:
        start, end = value if isinstance(value, (tuple, list)) else (0, value)
        fits = 0 <= start <= end <= 1
    except (TypeError, ValueError):
        fits = False
    if not fits:
        expected = "a fraction from 0 to 1, or (start, end) with start <= end"
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return int(start * steps), int(end * steps)
