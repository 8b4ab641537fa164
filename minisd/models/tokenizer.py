"""CLIP's byte-pair tokenizer: text -> the (B, 77) token ids that the text encoder reads.

    text -> NFC, lower case -> words (regex; whitespace only separates)
         -> bytes as printable characters
         -> merges inside each word, the last piece carrying "</w>" -> ids
         -> <bos> ids <eos> pad pad ...

Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), byte-level BPE of Radford et al. 2019 (GPT-2);
word pattern and normalisation are those of transformers' CLIPTokenizer 5.x (as there, ftfy is not
run over the text).
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Self

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor

Merge = tuple[str, str]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Encoding(NamedTuple):
    """A text's ids, their pieces, and where each begins and ends in the text."""

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]


def byte_pair_encoder(vocab: dict[str, int], merges: list[Merge]) -> Tokenizer:
    """Text -> pieces: normaliser, word pattern, bytes and merges; no special tokens, no padding."""
    for first, second in merges:  # `tokenizers` panics on some of these
        if unknown := [piece for piece in (first, second, first + second) if piece not in vocab]:
            raise ValueError(
                f"vocabulary and merges do not fit: no {shortened(unknown[0])}, needed by the "
                f"merge {shortened(f'{first} {second}')}"
            )
    unk = EOS if EOS in vocab else None
    try:
        model = models.BPE(
            vocab, merges, end_of_word_suffix=WORD_END, continuing_subword_prefix="", unk_token=unk
        )
    except Exception as error:  # `tokenizers` raises nothing more special
        raise ValueError(f"vocabulary and merges do not fit: {error}") from error
    bpe = Tokenizer(model)
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe


class CLIPTokenizer:
    """Prompts to padded token ids: `CLIPTokenizer.from_folder(path)(["a red circle"])` is (1, 77).

    vocab: piece -> id.  merges: pairs of pieces, in the order of merging.  max_length: ids per row,
    all included.  pad_token fills up to max_length: <|endoftext|> in SD 1.x, "!" in SD 2.x. Special
    tokens written out in a prompt become their single id, as in transformers: in lower case, as
    they stand in the vocabulary; those in `any_case` (their files mark them as "normalized") in
    capitals, too.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[Merge],
        max_length: int = 77,
        pad_token: str = EOS,
        any_case: Iterable[str] = (),
    ) -> None:
        check_vocabulary(vocab, merges, (BOS, EOS, pad_token))
        for token in (BOS, EOS, pad_token):
            if token not in vocab:
                raise ValueError(
                    f"the vocabulary ({len(vocab)} pieces) has no {token!r}, which a CLIP "
                    "tokenizer needs"
                )
        # transformers writes 1e30 where no limit is known
        if type(max_length) is not int or not 2 <= max_length <= 100_000:
            raise ValueError(
                f"max_length is {max_length!r}, expected the text encoder's positions, 2 to 100000"
            )
        self.vocab, self.merges = vocab, merges
        self.max_length, self.pad_token = max_length, pad_token
        self.any_case = frozenset(any_case)
        self.bos_id, self.eos_id, self.pad_id = vocab[BOS], vocab[EOS], vocab[pad_token]
        self.first_new = 1 + max(vocab.values())  # ids from here on are words that were added
        self.added: dict[str, int] = {}  # such a word -> how many ids it has
        self._bpe = byte_pair_encoder(vocab, merges)
        special = dict.fromkeys((BOS, EOS, pad_token))
        self._bpe.add_special_tokens(
            [AddedToken(t, normalized=t in self.any_case) for t in special]
        )

    @classmethod
    def from_files(
        cls,
        vocab_json: str | os.PathLike[str],
        merges_txt: str | os.PathLike[str],
        max_length: int = 77,
        pad_token: str = EOS,
        any_case: Iterable[str] = (),
    ) -> Self:
        """From the two files of a checkpoint's tokenizer folder, vocab.json and merges.txt."""
        vocab = _read_json(Path(vocab_json))
        # split("\n"), not splitlines(): pieces may hold characters that splitlines() takes for line
        # ends.
        lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
        if bad := [line for line in lines if line.count(" ") != 1]:
            raise ValueError(f"{merges_txt}: expected two pieces a line, got {bad[0]!r}")
        merges = [_pair(line) for line in lines]
        return cls(vocab, merges, max_length, pad_token, any_case)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], max_length: int | None = None) -> Self:
        """From a tokenizer/ folder: vocab.json and merges.txt, or transformers 5's tokenizer.json.

        Special tokens: what special_tokens_map.json says, else tokenizer_config.json, else
        <|endoftext|>, for all but the first (the order is that of transformers; SD 2.x needs it for
        pad_token). Of entries for one token the last says whether it is "normalized". max_length:
        model_max_length of tokenizer_config.json, else 77.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json")
        normalized: dict[str, bool] = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = special.get(key) or config.get(key) or (BOS if key == "bos_token" else EOS)
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise ValueError(f"{folder}: {key} is {token!r:.80}, expected a text")
            pad = content  # at last, pad_token's
            normalized[pad] = isinstance(token, dict) and token.get("normalized", True)
            if key != "pad_token" and pad != (own := BOS if key == "bos_token" else EOS):
                raise ValueError(f"{folder}: {key} is {pad!r:.80}, expected CLIP's {own!r}")
        any_case = [token for token, yes in normalized.items() if yes]
        _expect_no_more(folder, config, special, {BOS, EOS, *normalized})
        max_length = config.get("model_max_length", 77) if max_length is None else max_length
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return cls.from_files(
                folder / "vocab.json", folder / "merges.txt", max_length, pad, any_case
            )
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"{folder} has neither vocab.json and merges.txt nor tokenizer.json"
            )
        saved = _read_json(folder / "tokenizer.json")
        try:
            _expect_no_more(folder, {}, {}, {BOS, EOS, *normalized}, saved["added_tokens"])
            added = {token["content"]: token["id"] for token in saved["added_tokens"]}
            vocab = saved["model"]["vocab"] | added
            merges = [_pair(merge) for merge in saved["model"]["merges"]]
            any_case = [token["content"] for token in saved["added_tokens"] if token["normalized"]]
        except (KeyError, TypeError) as error:
            told = f"{type(error).__name__} {error!s:.80}"
            raise ValueError(f"tokenizer.json is not as transformers writes it: {told}") from error
        return cls(vocab, merges, max_length, pad, any_case)

    def add_token(self, token: str, count: int = 1) -> None:
        """Make a text a word of its own, with `count` ids (textual inversion).

        The first added word has the ids first_new, first_new + 1, ..., the next those that follow.
        It is found wherever the text stands, in any case. ValueError for a word that is there.
        """
        there = self._bpe.token_to_id(token) is not None
        if not token.strip() or token != token.strip() or there or count < 1:
            why = "the vocabulary has it" if there else "expected a word without blanks around it"
            raise ValueError(f"{shortened(token)} cannot be added to the vocabulary: {why}")
        self._bpe.add_tokens([AddedToken(token, normalized=True)])
        self.added[token] = count

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json.

        from_folder and transformers read them back.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        def entry(token: str) -> str | dict[str, object]:
            if token not in self.any_case:
                return token
            flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
            return {"__type": "AddedToken", "content": token, **flags}

        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "bos_token": entry(BOS),
            "eos_token": entry(EOS),
            "unk_token": entry(EOS),
            "pad_token": entry(self.pad_token),
            "do_lower_case": True,
        }
        merges = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
        vocab = json.dumps(self.vocab, ensure_ascii=False, indent=2)
        (folder / "vocab.json").write_text(vocab + "\n", encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids of each text, (B, max_length) int64, on the CPU: <bos>, the text's, <eos>, padding.

        A text that is longer is cut, and a UserWarning shows the part that was cut. A bare string
        is a TypeError.
        """
        if isinstance(texts, str):
            text = shortened(texts)
            raise TypeError(
                f"expected a list of prompts, got the single string {text}; write [{text}]"
            )
        ids = list(map(self._padded, texts))
        return torch.tensor(ids, dtype=torch.int64, device="cpu").reshape(-1, self.max_length)

    def _padded(self, text: str) -> list[int]:
        encoding = self._encode(text)
        ids, room = encoding.ids, self.max_length - 2
        if len(ids) > room:
            rest = shortened(text[encoding.offsets[room][0] :])
            warnings.warn(
                f"the prompt has {len(ids)} tokens and {room} fit; this part was cut: {rest}",
                stacklevel=3,
            )
        ids = [self.bos_id, *ids[:room], self.eos_id]
        return ids + [self.pad_id] * (self.max_length - len(ids))

    def _encode(self, text: str) -> Encoding:
        if not isinstance(text, str):
            raise TypeError(f"expected a prompt (str), got {type(text).__name__}: {text!r}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                f"expected a prompt of valid Unicode, got lone surrogates in {shortened(text)}"
            )
        encoding = self._bpe.encode(text, add_special_tokens=False)
        pieces = Encoding(encoding.ids, encoding.tokens, encoding.offsets)
        return self._with_added(pieces) if self.added else pieces

    def _with_added(self, pieces: Encoding) -> Encoding:
        """Each word that was added as its own ids, all at its place in the text."""
        first: dict[str, int] = {}
        start = self.first_new
        for word, count in self.added.items():
            first[word], start = start, start + count
        spread = Encoding([], [], [])
        known = {self._bpe.token_to_id(word): word for word in self.added}
        for i, piece, offset in zip(pieces.ids, pieces.tokens, pieces.offsets):
            token = known.get(i)
            count = 1 if token is None else self.added[token]
            if token is not None:
                i, piece = first[token], token + WORD_END
            for n in range(count):
                spread.ids.append(i + n)
                spread.tokens.append(piece if n == count - 1 else piece.removesuffix(WORD_END))
                spread.offsets.append(offset)
        return spread

    def encode(self, text: str) -> list[int]:
        """Ids of one text, uncut, without <bos>, <eos> and padding.

        Entry i stands at position i + 1 of a padded row.
        """
        return self._encode(text).ids

    def tokenize(self, text: str) -> list[str]:
        """Pieces of one text, aligned with encode(text); each word's last piece ends in "</w>"."""
        return self._encode(text).tokens

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the characters of each piece of one text, aligned with encode(text)."""
        return self._encode(text).offsets

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, a list or a 1-D tensor, without the special tokens.

        It is in lower case, with one space after each word.
        """
        text = self._bpe.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.replace(WORD_END, " ").strip()


def build_vocabulary(texts: Iterable[str], size: int = 49408) -> tuple[dict[str, int], list[Merge]]:
    """Learn a small vocabulary in CLIP's layout from texts -> CLIPTokenizer's vocab and merges.

    Ids: the 256 bytes, the 256 bytes + "</w>", one per merge, <|startoftext|>, <|endoftext|>.
    `size` caps their number, at least 514, by default 49408 as CLIP; below the cap merging goes on
    until each word of the texts is one piece.
    """
    smallest = 2 * 256 + 2
    if size < smallest:
        raise ValueError(
            f"size is {size}, expected at least {smallest}: 256 bytes, 256 with </w>, two special "
            "tokens"
        )
    # The bytes as printable characters, in CLIP's order: those that are printable themselves, then
    # the other 68.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    base = [*characters, *(c + WORD_END for c in characters)]
    bpe = byte_pair_encoder({}, [])
    # Among equally frequent pairs the trainer takes the smaller ids: naming the base pieces here
    # makes it reproducible.
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*base, BOS, EOS],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [_pair(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*base, *(a + b for a, b in merges), BOS, EOS])
    return {piece: i for i, piece in enumerate(pieces)}, merges


def shortened(text: str, most: int = 1000) -> str:
    """A text in quotes for a message, at most so many characters of it."""
    if len(text) <= most:
        return repr(text)
    return f"{text[:most]!r} and {len(text) - most} characters more"


def _pair(merge: str | list[str]) -> Merge:
    """A merge as a pair; of tokenizer.json it may be one already (tokenizers from 0.20 on)."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def check_vocabulary(vocab: dict[str, int], merges: list[Merge], special: Iterable[str]) -> None:
    """ValueError unless each piece has an id of its own, and is a character, special or made by a
    merge.

    Files that are cut, or of two vocabularies, would give wrong ids in silence.
    """
    if not isinstance(vocab, dict):
        raise ValueError(
            f"the vocabulary is a {type(vocab).__name__}, expected pieces and their ids"
        )
    if bad := [piece for piece, i in vocab.items() if type(i) is not int or i < 0]:
        got = f"{shortened(bad[0], 80)} has the id {vocab[bad[0]]!r:.80}"
        raise ValueError(f"the vocabulary's {got}, expected a whole number from 0 on")
    if len(pieces := {i: piece for piece, i in vocab.items()}) < len(vocab):
        twice = next(piece for piece, i in vocab.items() if pieces[i] != piece)
        got = f"{shortened(twice, 80)} and {shortened(pieces[vocab[twice]], 80)}"
        raise ValueError(f"the vocabulary has the id {vocab[twice]} for {got}")
    made = {first + second for first, second in merges}
    made |= {piece for piece in vocab if len(piece.removesuffix(WORD_END)) < 2} | set(special)
    if lost := vocab.keys() - made:
        got = f"{len(lost)} of {len(vocab)} pieces, {shortened(min(lost), 80)} among them"
        raise ValueError(f"vocabulary and merges do not fit: no merge makes {got}")


def _expect_no_more(
    folder: Path,
    config: dict[str, Any],
    special: dict[str, Any],
    known: set[str],
    saved: Iterable[dict[str, Any]] = (),
) -> None:
    """ValueError for words that a folder adds to CLIP's vocabulary, in any of the files in which
    transformers keeps such."""
    entries: list[Any] = [*_read_json(folder / "added_tokens.json"), *saved]
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        for given in (config.get(key), special.get(key)):
            if not isinstance(given, (list, dict, NoneType)):
                raise ValueError(f"{key} is {given!r:.80}, expected a list or an object")
            entries += given.values() if isinstance(given, dict) else given or ()
    words = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    if bad := [word for word in words if not isinstance(word, str)]:
        raise ValueError(f"{folder} adds {bad[0]!r:.80} to the vocabulary, expected a text")
    if more := sorted(set(map(str, words)) - known):
        raise ValueError(
            f"{folder} adds {more!r:.200} to the vocabulary, expected that of CLIP alone: words of "
            "textual inversions come from their own files"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file, {} if there is none; ValueError for a key that is there twice."""
    if not path.exists():
        return {}
    read = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    if not isinstance(read, dict):
        raise ValueError(f"{path.name} holds {read!r:.80}, expected an object")
    return read


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shortened(twice, 80)} is there twice")
    return values
