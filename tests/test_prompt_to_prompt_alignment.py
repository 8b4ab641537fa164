"""Token alignment against brute force and by hand; words in prompts."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from minisd.editing.alignment import (
    align,
    find_word,
    kind_of_edit,
    refine_map,
    replace_map,
    split_words,
    token_map,
)
from minisd.models.tokenizer import CLIPTokenizer, build_vocabulary

TEXT = (
    "a burger on the table , photo of my cat's red lasagne with cheese pea soup and croutons . Cats"
)
WHOLE_WORDS = CLIPTokenizer(*build_vocabulary([TEXT] * 3))
VOCABULARY = build_vocabulary(["a burger on table"] * 3)
SYLLABLES = CLIPTokenizer(
    *VOCABULARY
)  # knows "a burger on table"; other words are spelled letter by letter
L = 77


def brute_force(source, target):
    """Of all order-keeping pairings of equal items, the largest; then the one that is least when
    read from the end."""
    best = None
    for columns in itertools.product([None, *range(len(source))], repeat=len(target)):
        used = [i for i in columns if i is not None]
        if used == sorted(set(used)) and all(
            i is None or source[i] == b for i, b in zip(columns, target)
        ):
            key = (-len(used), [-1 if i is None else i for i in reversed(columns)])
            if best is None or key < best[0]:
                best = key, list(columns)
    return best[1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=5), st.lists(st.integers(0, 3), max_size=5))
def test_align_equals_brute_force(source, target):
    assert align(source, target) == brute_force(source, target)


def test_align_by_hand():
    assert align("abc", "abc") == [0, 1, 2]
    assert align("abc", "xaxbxcx") == [None, 0, None, 1, None, 2, None]
    assert align("xaxbxcx", "abc") == [1, 3, 5]
    assert align("aa", "a") == [0] and align("a", "aa") == [0, None]
    assert align("", "a") == [None] and align("a", "") == []


# words


def test_words_are_found():
    prompt = "A cat, my Cat and a tomcat's (cat) cats"
    assert [len(w) for w in split_words(WHOLE_WORDS, "a burger , cat's")] == [1, 1, 1, 2]
    tokens = WHOLE_WORDS.tokenize(prompt)
    for word in ("cat", "CAT", "cat,", " cat."):
        found = find_word(WHOLE_WORDS, prompt, word)
        assert [tokens[i - 1] for i in found] == ["cat</w>"] * 3, word
        assert found[:2] == [2, 5]
    assert find_word(WHOLE_WORDS, prompt, "dog") == find_word(WHOLE_WORDS, prompt, "ca") == []
    assert find_word(WHOLE_WORDS, prompt, "") == find_word(WHOLE_WORDS, prompt, "at") == []
    assert find_word(WHOLE_WORDS, prompt, "my cat") == [4, 5]
    assert find_word(WHOLE_WORDS, prompt, ",") == [3]


@pytest.mark.parametrize(
    "prompt, word, pieces",
    [
        ("a sign with 'stop' on it", "stop", ["'s</w>", "top</w>"]),  # as CLIP cuts it
        ("a sign with 'stop' on it", "'STOP'", ["'s</w>", "top</w>"]),
        ("a sign with 'stop' on it", "top", []),
        ("a sign with 'stop", "stop", ["'s</w>", "top</w>"]),
        ("he's 'real' 'veal'", "real", ["'re</w>", "al</w>"]),
        ("he's 'real' 'veal'", "veal", ["'ve</w>", "al</w>"]),
        ("he's here", "he", ["he</w>"]),
        ('a "stop" sign', "stop sign", []),  # the quote is between them
        ("a stop  sign", "stop sign", ["stop</w>", "sign</w>"]),
        ("a Caf\u00e9", "cafe\u0301", ["caf\u00c3\u00a9</w>"]),  # one character or two
        ("numbers 12 and 2", "2", ["2</w>", "2</w>"]),
        ("a, b,, c", ",", [",</w>"]),
        ("a cat2", "cat", ["cat</w>"]),
        ("a\U0001f600 b", "\U0001f600", ["\u00f0\u0141\u013a\u0122</w>"]),
    ],
)
def test_words_are_found_by_their_characters(prompt, word, pieces):
    tokenizer = CLIPTokenizer(*build_vocabulary([prompt] * 3))
    tokens = tokenizer.tokenize(prompt)
    assert [tokens[i - 1] for i in find_word(tokenizer, prompt, word)] == pieces


def test_words_of_several_tokens():
    assert find_word(SYLLABLES, "a lasagne on a table", "lasagne") == [2, 3, 4, 5, 6, 7, 8]
    assert find_word(SYLLABLES, "a table on lasagne table", "table") == [2, 11]
    assert find_word(SYLLABLES, "a " * 74 + "table table", "table") == [
        75
    ]  # the last one is cut off


def test_a_prompt_that_does_not_fit():
    with pytest.raises(ValueError, match="76 tokens, expected at most 75"):
        split_words(WHOLE_WORDS, "a " * 76)
    assert len(split_words(WHOLE_WORDS, "a " * 75)) == 75


# the kind of edit


@pytest.mark.parametrize(
    "source, target, kind",
    [
        ("a red cat", "a red cat", "replace"),
        ("a red cat", "a red soup", "replace"),
        ("a red cat", "my red soup", "replace"),
        ("a burger", "a lasagne", "replace"),
        ("a red cat", "a red cat, photo", "refine"),
        (
            "a cat on the table",
            "a red cat on table",
            "refine",
        ),  # as many words, but not in the same places
        ("pea soup with croutons", "soup", "refine"),
    ],
)
def test_kind_of_edit(source, target, kind):
    assert kind_of_edit(split_words(WHOLE_WORDS, source), split_words(WHOLE_WORDS, target)) == kind


# replace


def test_replace_of_single_tokens_is_the_identity():
    for google in (False, True):
        M, mask = token_map(
            WHOLE_WORDS, "a red cat on the table", "a red soup on my table", "replace", google
        )
        assert torch.equal(M, torch.eye(L)) and torch.equal(mask, torch.ones(L))


def test_replace_by_a_longer_word():
    """a burger on table -> a las on table, 1 token -> 3 (EDITING B3)."""
    M, mask = token_map(SYLLABLES, "a burger on table", "a las on table")
    expected = torch.zeros(L, L)
    for source, target in {
        0: [0],
        1: [1],
        3: [5],
        4: [6],
        5: [7],
    }.items():  # <bos>, a, on, table, <eos>
        expected[source, target] = 1
    expected[2, 2:5] = 1 / 3
    for t in range(8, L):
        expected[t - 2, t] = 1
    assert torch.equal(M, expected) and torch.equal(mask, torch.ones(L))
    assert torch.equal(
        M.sum(1), torch.cat([torch.ones(L - 2), torch.zeros(2)])
    )  # mass is kept, but two pads fall off
    assert torch.allclose(M.sum(0)[2:5], torch.full((3,), 1 / 3)) and M.sum(0)[5:].eq(1).all()

    M, _ = token_map(SYLLABLES, "a burger on table", "a las on table", google=True)
    assert (
        M[3].sum() == M[4].sum() == 0 and M[5, 5] == M[6, 6] == 1
    )  # "on" gets <eos>, "table" gets padding
    assert torch.equal(M[:3, :5], expected[:3, :5]) and torch.equal(M[5:, 5:], torch.eye(L - 5))


def test_replace_by_a_shorter_word():
    M, _ = token_map(SYLLABLES, "a las on table", "a burger on table")
    assert M[2:5, 2].tolist() == [1, 1, 1] and M[5, 3] == M[6, 4] == M[7, 5] == 1
    assert M[L - 1, L - 3 :].tolist() == [1, 1, 1] and M.sum() == L + 2  # the last pad repeats
    assert M.sum(0).eq(1).sum() == L - 1 and M[:, 2].sum() == 3
    M, _ = token_map(SYLLABLES, "a las on table", "a burger on table", google=True)
    assert (
        M[3, 3] == M[4, 4] == 1 and M[:, L - 2 :].sum() == 0
    )  # the published loop ends with the source's row


def test_replace_of_words_with_as_many_tokens():
    M, _ = token_map(SYLLABLES, "a cat on cat", "a dog on dog")
    assert torch.equal(M, torch.eye(L))


def test_replace_needs_as_many_words():
    with pytest.raises(ValueError, match="same number of words, got 2 and 3"):
        token_map(WHOLE_WORDS, "a cat", "a red cat", "replace")
    with pytest.raises(ValueError, match="expected 'replace', 'refine' or None"):
        token_map(WHOLE_WORDS, "a cat", "a cat", "swap")


words = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_mass_is_kept(source, target):
    source, target = source[: len(target)], target[: len(source)]
    M, mask = replace_map(source, target, L)
    n, m = 1 + sum(map(len, source)), 1 + sum(map(len, target))  # <bos> and words
    assert M[:n].sum(1).allclose(torch.ones(n)) and mask.eq(1).all()
    assert M[:n, m:].sum() == M[n:, :m].sum() == 0  # words to words, padding to padding
    assert M[:, m:].sum(0).eq(1).all()


# refine


def test_refine_adds_words():
    M, mask = token_map(WHOLE_WORDS, "a cat on the table", "a red cat on the red table")
    expected = torch.zeros(L, L)
    sources = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4, 7: 5, 8: 6} | {
        j: j - 2 for j in range(9, L)
    }  # 2 and 6 are new
    for j, i in sources.items():
        expected[i, j] = 1
    assert torch.equal(M, expected)
    assert mask.tolist() == [float(j in sources) for j in range(L)]


def test_refine_removes_words():
    M, mask = token_map(WHOLE_WORDS, "pea soup with croutons", "soup")
    assert mask.eq(1).all()
    sources = [M[:, j].argmax().item() for j in range(L)]
    assert sources[:3] == [0, 2, 5] and sources[3:] == [min(j + 3, L - 1) for j in range(3, L)]
    M, _ = token_map(WHOLE_WORDS, "pea soup with croutons", "soup", google=True)
    assert [M[:, j].argmax().item() for j in range(L)] == [
        0,
        2,
        5,
        *range(3, L),
    ]  # pads get "with" and "croutons"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=6), st.lists(st.integers(1, 9), max_size=6), st.booleans()
)
def test_refine_columns(source, target, google):
    M, mask = refine_map([0, *source, 10], [0, *target, 10], L, google)
    assert torch.equal(M.sum(0), mask) and set(M.unique().tolist()) <= {0, 1}
    assert M[0, 0] == 1 and M[len(source) + 1, len(target) + 1] == 1
