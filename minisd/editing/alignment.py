"""Which token of the source prompt gives its attention map to which token of the target prompt.

    replace  words are paired in order; a word of n tokens that becomes one of m spreads its maps
    evenly:  M = 1/m
    refine   tokens are aligned as texts are (longest common subsequence); new tokens have no source

Both give a token map M (L, L), source tokens x target tokens, for P_source @ M, and a mask (L,) of
the target tokens that have a source. Positions count in the padded row of L ids: 0 is <bos>, then
the text, <eos>, padding.

Sources: Hertz et al. 2022 (arXiv 2208.01626), section 3.2; Needleman and Wunsch 1970. `google=True`
reproduces two slips of the published code: padding (and in replace every word after the last that
differs) keeps its position even where the two prompts differ in length.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.tokenizer import CLIPTokenizer

FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are

KindOfEdit = Literal["replace", "refine"]
Words = list[tuple[int, ...]]  # the token ids of each word


def split_words(tokenizer: CLIPTokenizer, prompt: str) -> Words:
    """Token ids of each word of the prompt, words being what white space separates.

    ValueError if they do not fit into a row: a token that is cut off has no map to edit.
    """
    words = [tuple(tokenizer.encode(word)) for word in prompt.split()]
    count, room = sum(map(len, words)), tokenizer.max_length - 2
    if count > room:
        raise ValueError(
            f"the prompt has {count} tokens, expected at most {room} to edit it: {prompt!r}"
        )
    return words


def find_word(tokenizer: CLIPTokenizer, prompt: str, word: str) -> list[int]:
    """Positions in the padded row of the tokens of every occurrence of a word (or phrase), in
    order; [] if there is none that fits into the row whole.

    Case and the punctuation around it do not matter: "cat" finds "Cat," and "'cat'", but not "cats"
    or "tomcat". Tokens are found by their characters: CLIP cuts "'stop'" into "'s", "top" and "'",
    of which "stop" is the first two.
    """
    room = tokenizer.max_length - 2
    found = occurrences(tokenizer, prompt, word)
    return [1 + i for own in found if own[-1] < room for i in own]


def occurrences(tokenizer: CLIPTokenizer, prompt: str, word: str) -> list[list[int]]:
    """The tokens of each occurrence of a word as `find_word` finds it, counted from 0 without
    <bos>, those that do not fit into the row as well."""
    text, wanted = (unicodedata.normalize("NFC", each) for each in (prompt, word))
    if word not in tokenizer.added:  # "<my-cat>" as it is
        wanted = wanted.strip(string.punctuation + string.whitespace) or wanted
    parts = wanted.split()
    if not parts:
        return []
    phrase = r"\s+".join(map(re.escape, parts))
    pattern = re.compile(f"(?=({phrase}))", re.IGNORECASE)  # ahead, so that matches may overlap
    spans = tokenizer.spans(text)
    found = []
    for start, end in (match.span(1) for match in pattern.finditer(text)):
        own = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
        if own and is_edge(text, start) and is_edge(text, end):
            found.append(own)
    return found


def is_edge(text: str, i: int) -> bool:
    """Whether a word can end before text[i], where another can begin.

    Not inside a run of letters, nor of signs; each digit is a token of its own.
    """
    if i in (0, len(text)):
        return True
    letters, others = (
        [kind(c) for c in text[i - 1 : i + 1]]
        for kind in (str.isalpha, lambda c: not (c.isalnum() or c.isspace()))
    )
    return not (all(letters) or all(others))


def missing_word(tokenizer: CLIPTokenizer, word: str, prompts: Sequence[str]) -> ValueError:
    """The error for a word that no prompt has, or none in the part that fits into the row: it names
    the words that are there."""
    there = dict.fromkeys(
        w.strip(string.punctuation) or w
        for prompt in prompts
        for w in prompt.split()
        if find_word(tokenizer, prompt, w)
    )
    cut = any(occurrences(tokenizer, prompt, word) for prompt in prompts)
    got = "was cut from the prompt" if cut else "is not in the prompt"
    return ValueError(f"the word {word!r} {got}, expected one of {', '.join(map(repr, there))}")


def align(source: Sequence, target: Sequence) -> list[int | None]:
    """For each target item the index of the equal source item it is aligned with, or None; indices
    only ever grow.

    As many pairs as possible (gap 0, match +1, and a mismatch, at -1, is never better than two
    gaps). Among equally good alignments: the last target items are left without a pair, and those
    with one take the first source item.
    """
    best = [
        [0] * (len(target) + 1) for _ in range(len(source) + 1)
    ]  # pairs among the first i and first j items
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            best[i][j] = max(
                best[i][j - 1], best[i - 1][j], best[i - 1][j - 1] + (1 if a == b else -1)
            )
    pairs: list[int | None] = [None] * len(target)
    i, j = len(source), len(target)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs[j] = i
    return pairs


def kind_of_edit(source: Words, target: Words) -> KindOfEdit:
    """ "replace" if the prompts have the same number of words and pairing them in order keeps all
    that they share."""
    in_order = sum(a == b for a, b in zip(source, target))
    shared = sum(i is not None for i in align(source, target))
    return "replace" if len(source) == len(target) and in_order == shared else "refine"


def replace_map(
    source: Words, target: Words, length: int, google: bool = False
) -> tuple[Tensor, Tensor]:
    """M (length, length) and ones (length,) for a swap of words; ValueError if the prompts differ
    in their word count.

    A row of M sums to 1 (its token's map is moved, or spread evenly over the n tokens of the new
    word), except at the padding, where rows are dropped or repeated to fill the columns.
    """
    if len(source) != len(target):
        got = f"got {len(source)} and {len(target)}"
        hint = 'edit="refine" aligns prompts of different length'
        raise ValueError(f"replace: expected prompts with the same number of words, {got}; {hint}")
    M = torch.zeros(length, length, **FLOATS)
    M[0, 0] = 1
    i = j = 1
    last = max((k for k in range(len(source)) if source[k] != target[k]), default=-1)
    for k, (s, t) in enumerate(zip(source, target)):
        if google and k > last:
            break
        block = (
            torch.eye(len(s), **FLOATS)
            if len(s) == len(t)
            else torch.full((len(s), len(t)), 1 / max(len(t), 1), **FLOATS)
        )
        M[i : i + len(s), j : j + len(t)] = block
        i, j = i + len(s), j + len(t)
    if google:
        rest = torch.arange(j, j + length - max(i, j), dtype=torch.int64, device="cpu")
        M[rest, rest] = 1
    else:
        # <eos> and the padding
        rest = torch.arange(length - j, dtype=torch.int64, device="cpu")
        M[(i + rest).clamp(max=length - 1), j + rest] = 1
    return M, torch.ones(length, **FLOATS)


def refine_map(
    source: list[int], target: list[int], length: int, google: bool = False
) -> tuple[Tensor, Tensor]:
    """M (length, length) and the mask (length,) of target tokens that have a source; ids with <bos>
    and <eos>.

    A column of M has one 1, at the token's source, or none.
    """
    m = align(source, target)
    m += [
        j if google else min(j - len(target) + len(source), length - 1)
        for j in range(len(target), length)
    ]
    M, mask = torch.zeros(length, length, **FLOATS), torch.zeros(length, **FLOATS)
    for j, i in enumerate(m):
        if i is not None:
            M[i, j] = mask[j] = 1
    return M, mask


def token_map(
    tokenizer: CLIPTokenizer,
    source: str,
    target: str,
    edit: KindOfEdit | None = None,
    google: bool = False,
) -> tuple[Tensor, Tensor]:
    """M and mask from one prompt to another.

    edit: "replace", "refine", or None for `kind_of_edit`.
    """
    words = split_words(tokenizer, source), split_words(tokenizer, target)
    edit = kind_of_edit(*words) if edit is None else edit
    if edit == "replace":
        return replace_map(*words, tokenizer.max_length, google)
    if edit == "refine":
        own, other = (
            [tokenizer.bos_id, *(i for word in side for i in word), tokenizer.eos_id]
            for side in words
        )
        return refine_map(own, other, tokenizer.max_length, google)
    expected = "'replace', 'refine' or None (chosen from the prompts)"
    raise ValueError(f"edit is {edit!r}, expected {expected}")
