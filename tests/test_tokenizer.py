"""CLIPTokenizer against transformers' CLIPTokenizer, on a small vocabulary in CLIP's layout that is
learnt here."""

import json
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st

from minisd.models.tokenizer import BOS, EOS, CLIPTokenizer, build_vocabulary

TEXTS = [
    "a big red circle left of a small blue square on a white background",
    "a photograph of an astronaut riding a horse, 8k, highly detailed",
    "it's the cat's house and they're sure we've seen what I'm told you'll say he'd do",
    "the year 2023 had 365 days; 10% of 1,000 is 100 -- isn't it?!",
    "naïve café façade, Ærøskøbing, Straße, Łódź, piñata, übermäßig",
    "Съешь ещё этих мягких французских булок, да выпей чаю",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία ΟΔΥΣΣΕΥΣ",
    "一只坐在窗台上的红色的猫, 赤い猫が窓辺に座っている, 창가에 앉은 빨간 고양이",
    "قطة حمراء تجلس على حافة النافذة — खिड़की पर बैठी लाल बिल्ली แมวสีแดง",
    "😀 🚀✨ a rocket 👩‍🚀 ❤️ emoji 🇫🇷",
]

# Where CLIP tokenizers are known to differ from one another, and where byte-level ones trip.
AWKWARD = [
    "",
    " ",
    "\t\n a \r\n  red\u00a0circle\u3000 \u2003x\u2028y\u0085z ",
    "A BIG Red cIrClE",
    "it’s “quoted” ‘text’ … – —",
    "it's IT'S they'RE 's 't 're 've 'm 'll 'd 'x ''s",
    "ＡＢＣ１２３ ﬁ ﬂ ĳ Ǆ ﬀi",
    "&lt;b&gt; &amp;amp; &#39;",
    "schÃ¶n â€œmojibakeâ€\x9d",
    "a\x00b\x07c\x1bd\x7fe",
    "\ufeffstart \u200b mid\u200bdle \u00adsoft\u00adhyphen",
    "ΟΔΥΣΣΕΥΣ ὀδυσσεύς ΣΑΣ",
    "'ſ ſtrange longſ 'S",
    "İstanbul ı I i̇ DŽ ǅ ẞ ß",
    "é e\u0301 Å A\u030a \u212b ﷺ \u1e9b\u0323",
    "一二三 漢字かな交じり文 한국어 조합형\u1112\u1161\u11ab",
    "Привет, мир! مرحبا हिन्दी ไทย עברית",
    "😀👩‍👩‍👧‍👦 👍🏽 🇫🇷 ❤️ e\u20dd",
    "\ue000 private \U000f0000 use \U0010ffff",
    "under_score __dunder__ snake_case_1",
    "12345 3.14 1,000 x2 ½ ² ٣ Ⅳ ①",
    "<|startoftext|> <|endoftext|> x<|endoftext|>y",
    "<|ENDOFTEXT|> <|StartOfText|> <|endoftext| >",
    "<|endoftext|",
    "</w> a</w>b <w/> Ġ Ċ Ã",
    "(a:1.2) [b|c] {d} a_b-c+d=e/f\\g ~`@#$%^&*",
    "a" * 300,
    "red " * 75,
    "red " * 76,
    "word" * 60 + " tail",
]


@pytest.fixture(scope="module")
def vocabulary():
    return build_vocabulary(
        TEXTS, 900
    )  # smaller than the texts would fill, so that words fall into several pieces


@pytest.fixture(scope="module")
def ours(vocabulary):
    return CLIPTokenizer(*vocabulary)


@pytest.fixture(scope="module")
def theirs(vocabulary):
    vocab, merges = vocabulary
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


def quiet(tokenizer, texts):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the prompt has", UserWarning)
        return tokenizer(texts)


def padded(theirs, texts):
    return theirs(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


# ---- equal to transformers


@pytest.mark.parametrize("text", AWKWARD + TEXTS)
def test_awkward_strings(ours, theirs, text):
    ids = quiet(ours, [text])
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert torch.equal(ids, padded(theirs, [text]))
    assert ours.tokenize(text) == theirs.tokenize(text)


# Any Unicode at all, or pieces that mean something to the pattern and the merges, run together.
PIECES = ["a", "Red", "circle", "'s", "'LL", "12", "_", "é", "e\u0301", "ß", "Σ", "ﬁ", "猫", "😀"]
PIECES += [" ", "\t", "\u3000", EOS, BOS, "<|"]
UNICODE = st.one_of(
    st.text(max_size=120), st.lists(st.sampled_from(PIECES), max_size=90).map("".join)
)


@settings(max_examples=500, deadline=None)
@given(text=UNICODE)
def test_any_unicode(ours, theirs, text):
    assert torch.equal(quiet(ours, [text]), padded(theirs, [text]))


def test_a_batch_is_its_rows(ours, theirs):
    assert torch.equal(quiet(ours, AWKWARD), padded(theirs, AWKWARD))
    assert torch.equal(
        quiet(ours, tuple(AWKWARD)), torch.cat([quiet(ours, [text]) for text in AWKWARD])
    )
    assert ours([]).shape == (0, 77)


def test_decode_equals_transformers(ours, theirs):
    for text in AWKWARD + TEXTS:
        ids = quiet(ours, [text])[0]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ours(["A  Big RED circle, it's 12"])[0]) == "a big red circle , it 's 1 2"


# ---- layout and files


def test_vocabulary_has_the_layout_of_clip(vocabulary):
    vocab, merges = vocabulary
    pieces = sorted(vocab, key=vocab.get)
    assert len(vocab) == 900 and [vocab[p] for p in pieces] == list(range(900))
    assert (
        pieces[0] == "!"
        and pieces[93] == "~"
        and pieces[94] == "¡"
        and pieces[188] == "Ā"
        and pieces[255] == "Ń"
    )
    assert pieces[256:512] == [p + "</w>" for p in pieces[:256]]
    assert pieces[512:898] == [a + b for a, b in merges]
    assert pieces[898:] == [BOS, EOS]


def test_every_word_becomes_one_token():
    vocab, merges = build_vocabulary(TEXTS[:1] * 3)
    tokenizer = CLIPTokenizer(vocab, merges)
    assert tokenizer.tokenize(TEXTS[0]) == [word + "</w>" for word in TEXTS[0].split()]
    assert len(vocab) < 600


def test_vocabulary_is_reproducible(vocabulary):
    assert build_vocabulary(TEXTS, 900) == vocabulary
    assert (
        build_vocabulary([], 600) == build_vocabulary([""], 514)
        and len(build_vocabulary([])[0]) == 514
    )
    with pytest.raises(ValueError, match="size is 513, expected at least 514"):
        build_vocabulary(TEXTS, 513)


def write(folder, vocabulary, config=None, special=None):
    """The files of a published tokenizer folder."""
    vocab, merges = vocabulary
    shuffled = dict(
        sorted(vocab.items())
    )  # the published vocab.json is in the order of the text, not of the ids
    (folder / "vocab.json").write_text(json.dumps(shuffled, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    for name, value in [("tokenizer_config.json", config), ("special_tokens_map.json", special)]:
        if value is not None:
            (folder / name).write_text(json.dumps(value), encoding="utf-8")


def added(content, normalized=True):
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


SD14 = {
    "add_prefix_space": False,
    "bos_token": added(BOS),
    "eos_token": added(EOS),
    "unk_token": added(EOS),
    "pad_token": EOS,
    "do_lower_case": True,
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
}


def test_from_files_and_from_folder(tmp_path, vocabulary, ours):
    write(tmp_path, vocabulary, SD14)
    files = CLIPTokenizer.from_files(tmp_path / "vocab.json", str(tmp_path / "merges.txt"))
    folder = CLIPTokenizer.from_folder(tmp_path)
    assert torch.equal(quiet(files, AWKWARD), quiet(ours, AWKWARD))
    assert (folder.max_length, folder.bos_id, folder.eos_id, folder.pad_id) == (77, 898, 899, 899)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(quiet(folder, AWKWARD), padded(theirs, AWKWARD))


CAPITALS = ["a <|STARTOFTEXT|> b", "<|EndOfText|>", "x<|ENDOFTEXT|>y", "WOW!"]


@pytest.mark.parametrize(
    ("config", "special", "any_case"),
    [
        (
            {},
            {},
            {BOS},
        ),  # Stable Diffusion 1.x: of eos, unk and pad, which are one token, pad is no AddedToken
        ({"pad_token": added(EOS)}, {}, {BOS, EOS}),
        ({"pad_token": "!"}, {}, {BOS, EOS}),  # Stable Diffusion 2.x
        ({"bos_token": added(BOS, False)}, {}, set()),
        ({"bos_token": added(BOS, False)}, {"bos_token": added(BOS)}, {BOS}),
        ({}, {"bos_token": BOS}, set()),
        ({"pad_token": added("!")}, {"eos_token": EOS, "unk_token": EOS}, {BOS, "!"}),
    ],
)
def test_special_tokens_in_capitals(tmp_path, vocabulary, config, special, any_case):
    """The files say with "normalized" whether a special token is also found in capitals."""
    write(tmp_path, vocabulary, SD14 | config, special)
    ours, theirs = (
        CLIPTokenizer.from_folder(tmp_path),
        transformers.CLIPTokenizer.from_pretrained(tmp_path),
    )
    assert ours.any_case == any_case
    assert torch.equal(ours(CAPITALS), padded(theirs, CAPITALS))
    ours.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert CLIPTokenizer.from_folder(tmp_path / folder).any_case == any_case


def test_windows_line_ends(tmp_path, vocabulary, ours):
    write(tmp_path, vocabulary)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(quiet(CLIPTokenizer.from_folder(tmp_path), AWKWARD), quiet(ours, AWKWARD))


def test_save_round_trip_and_tokenizer_json(tmp_path, vocabulary, ours):
    ours.save(tmp_path / "ours")
    again = CLIPTokenizer.from_folder(tmp_path / "ours")
    assert (again.vocab, again.merges, again.max_length) == (ours.vocab, ours.merges, 77)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    assert torch.equal(quiet(again, AWKWARD), padded(theirs, AWKWARD))
    theirs.save_pretrained(
        tmp_path / "theirs"
    )  # transformers 5 writes tokenizer.json, no vocab.json
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    fourth = CLIPTokenizer.from_folder(tmp_path / "theirs")
    assert fourth.max_length == 77 and torch.equal(quiet(fourth, AWKWARD), quiet(ours, AWKWARD))


@pytest.mark.parametrize(
    ("config", "special", "pad"),
    [
        (EOS, "!", "!"),
        ("!", EOS, EOS),
        ("!", None, "!"),
        (None, "!", "!"),
        (None, None, EOS),
        (added("!"), None, "!"),
    ],
)
def test_pad_token(tmp_path, vocabulary, config, special, pad):
    """SD 2.x pads with "!" (id 0), which special_tokens_map.json says against
    tokenizer_config.json."""
    config = {k: v for k, v in SD14.items() if k != "pad_token"} | (
        {"pad_token": config} if config else {}
    )
    write(tmp_path, vocabulary, config, {"pad_token": special} if special else {})
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert (
        tokenizer.pad_token == theirs.pad_token == pad and tokenizer.pad_id == theirs.pad_token_id
    )
    texts = ["a red circle", "wow!! a ! b", ""]
    assert torch.equal(tokenizer(texts), padded(theirs, texts))


def test_max_length(tmp_path, vocabulary):
    write(tmp_path, vocabulary, SD14 | {"model_max_length": 12})
    assert CLIPTokenizer.from_folder(tmp_path)(["a red circle"]).shape == (1, 12)
    assert CLIPTokenizer.from_folder(tmp_path, max_length=20)(["a red circle"]).shape == (1, 20)
    write(tmp_path, vocabulary, {})
    assert CLIPTokenizer.from_folder(tmp_path).max_length == 77
    write(
        tmp_path, vocabulary, {"model_max_length": 10**30}
    )  # what transformers writes where it knows no limit
    with pytest.raises(ValueError, match="max_length is 1000.*, expected .* 2 to 100000"):
        CLIPTokenizer.from_folder(tmp_path)


# ---- truncation


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what(ours):
    text = "Red " * 74 + "Lazy Çat, tail"
    assert len(ours.encode("red")) == 1
    fits = 75 - 74
    with pytest.warns(UserWarning) as caught:
        ids = ours([text])[0]
    kept = ours.encode(text)[:75]
    assert ids.tolist() == [ours.bos_id, *kept, ours.eos_id] and len(ours.encode("Lazy")) > fits
    (warning,) = caught
    assert warning.filename == __file__
    words = str(warning.message)
    assert f"has {len(ours.encode(text))} tokens and 75 fit" in words
    assert words.endswith("Çat, tail'") and "Red" not in words


def test_the_cut_is_at_the_first_lost_token(ours):
    with pytest.warns(
        UserWarning, match=r"has 78 tokens and 75 fit; this part was cut: 'blue square white'"
    ):
        ours(["red  " * 75 + "blue square white"])


@pytest.mark.parametrize("n", [0, 1, 74, 75])
def test_a_prompt_that_fits_is_not_warned_about(ours, n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = ours(["red " * n])[0].tolist()
    assert ids == [ours.bos_id] + ours.encode("red") * n + [ours.eos_id] * (76 - n)


# ---- pieces of a prompt


def test_encode_and_tokenize_line_up_with_the_row(ours):
    text = "a striped Çat's 12 circles"
    row, ids, pieces = ours([text])[0], ours.encode(text), ours.tokenize(text)
    assert row[1 : 1 + len(ids)].tolist() == ids == [ours.vocab[p] for p in pieces]
    assert sum(p.endswith("</w>") for p in pieces) == len(
        ["a", "striped", "çat", "'s", "1", "2", "circles"]
    )


# ---- bad arguments


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (
            "a red circle",
            TypeError,
            r"a list of prompts, got the single string 'a red circle'; write \['a red",
        ),
        (["a", None], TypeError, r"expected a prompt \(str\), got NoneType: None"),
        ([["a"]], TypeError, r"expected a prompt \(str\), got list"),
        (["broken \ud800 text"], ValueError, "lone surrogates"),
    ],
)
def test_bad_texts(ours, texts, error, words):
    with pytest.raises(error, match=words):
        ours(texts)


def test_bad_files(tmp_path, vocabulary):
    vocab, merges = vocabulary
    with pytest.raises(
        FileNotFoundError, match="neither vocab.json and merges.txt nor tokenizer.json"
    ):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"has no '<\|endoftext\|>'"):
        CLIPTokenizer({k: v for k, v in vocab.items() if k != EOS}, merges)
    with pytest.raises(ValueError, match=r"has no '\[PAD\]'"):
        CLIPTokenizer(vocab, merges, pad_token="[PAD]")
    write(tmp_path, vocabulary)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match="merges.txt: expected two pieces a line, got 'a b c'"):
        CLIPTokenizer.from_folder(tmp_path)
