"""Input that lies, is damaged or is absurd ends in one clear error: no crash, no hang, no memory
taken on its word.

Files are built from the bundled model; memory is what Python allocates (tracemalloc). The fuzz is
in test_fuzz.py.
"""

import json
import os
import shutil
import struct
import time
import tracemalloc
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import minisd
from minisd.checkpoints import load as checkpoint, sources
from minisd.checkpoints.header import MAX_HEADER, read_header
from minisd.checkpoints.names import LDM_PREFIX, rename_ldm
from minisd.cli import main as cli

SHAPES = sources.bundled()["shapes"]
UNET = sources.weights_file("unet", None)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SHAPES, tmp_path / "model"))


@contextmanager
def frugal(seconds=10.0, megabytes=20.0):
    """What happens inside takes seconds of the processor, not hours, and little memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
        assert time.process_time() - start < seconds
    finally:
        tracemalloc.stop()


def refused(source, message, **arguments):
    with pytest.raises(ValueError) as caught:
        minisd.load(source, device="cpu", **arguments)
    assert message in str(caught.value)
    return str(caught.value)


# safetensors


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def twice(name):
    return f'{{"{name}": {json.dumps(entry())}, "{name}": {json.dumps(entry())}}}'.encode()


LIES = {
    "nothing": (b"", "it is 0 bytes long, expected at least 8"),
    "half a length": (b"\1\2\3", "it is 3 bytes long, expected at least 8"),
    "a length beyond the file": (
        raw({}, length=2**63),
        "its header would be 9223372036854775808 bytes long, the file is 10",
    ),
    "one byte too long": (raw({}, length=3), "its header would be 3 bytes long, the file is 10"),
    "a length that is negative": (
        struct.pack("<q", -1) + b"{}",
        "its header would be 18446744073709551615 bytes long",
    ),
    "no JSON": (raw(b"{"), "Expecting property name"),
    "UTF-16": (raw("{}".encode("utf-16")), "can't decode byte"),
    "a list": (raw([]), "its header is a list, expected a JSON object"),
    "deep nesting": (raw(b"[" * 500_000), "recursion"),
    "a number of 5000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "integer string conversion"),
    "an entry that is none": (raw({"a": None}), "cannot be read as safetensors"),
    "an entry without dtype": (raw({"a": {"shape": [2]}}), "'dtype'"),
    "one offset": (raw({"a": entry() | {"data_offsets": [0]}}, bytes(8)), "not enough values"),
    "three offsets": (
        raw({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        "too many values",
    ),
    "offsets that are no numbers": (
        raw({"a": entry() | {"data_offsets": ["0", "8"]}}, bytes(8)),
        "cannot be read as",
    ),
    "fractions": (
        raw({"a": entry() | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
        "has offsets 0.0 and 8.0",
    ),
    "true": (
        raw({"a": entry() | {"data_offsets": [False, 8]}}, bytes(8)),
        "has offsets False and 8",
    ),
    "backwards": (raw({"a": entry(8, 0)}, bytes(8)), "a has -8 bytes, expected 8 for F32 [2]"),
    "before the data": (raw({"a": entry(-8, 0)}, bytes(8)), "expected to begin at"),
    "beyond the end": (
        raw({"a": entry(0, 2**62, (2**60,))}, bytes(8)),
        "expected at most 8 whole numbers below 2**40",
    ),
    "cut off": (raw({"a": entry()}, bytes(7)), "inside or before a: the file is cut off"),
    "more data": (raw({"a": entry()}, bytes(9)), "its tensors end at byte"),
    "overlap": (raw({"a": entry(), "b": entry(4, 12)}, bytes(12)), "b is at bytes"),
    "the same bytes": (raw({"a": entry(), "b": entry()}, bytes(8)), "expected to begin at"),
    "a hole": (raw({"a": entry(), "b": entry(12, 20)}, bytes(20)), "expected to begin at"),
    "another dtype": (
        raw({"a": entry(dtype="F16")}, bytes(8)),
        "a has 8 bytes, expected 4 for F16 [2]",
    ),
    "a dtype that is a list": (
        raw({"a": entry(dtype=["F32"])}, bytes(8)),
        "expected printable names",
    ),
    "a shape of another size": (
        raw({"a": entry(shape=(3,))}, bytes(8)),
        "a has 8 bytes, expected 12",
    ),
    "a negative shape": (raw({"a": entry(shape=(-1, -2))}, bytes(8)), "a has shape [-1, -2]"),
    "a shape of 100000 axes": (
        raw({"a": entry(shape=[2**39] * 10**5)}, bytes(8)),
        "expected at most 8 whole numbers",
    ),
    "a shape of true": (raw({"a": entry(shape=[True, 2])}, bytes(8)), "a has shape [True, 2]"),
    "a name twice": (raw(twice("a"), bytes(8)), "'a' is in the header twice"),
    "a key of an entry twice": (
        raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
        "'dtype' is in the header twice",
    ),
    "a name that steers terminals": (
        raw({"\x1b[2J": entry()}, bytes(8)),
        "'\\x1b[2J' of dtype 'F32', expected print",
    ),
    "a name with a surrogate": (
        raw(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        "'\\ud800'",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path, lie):
    contents, message = LIES[lie]
    path = tmp_path / "a.safetensors"
    path.write_bytes(contents)
    with frugal(), pytest.raises(checkpoint.CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(
        f"{path} cannot be read as safetensors: "
    ) and message in str(caught.value)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_header_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 10**9))
        file.truncate(2 * 10**9)  # a hole: it takes no space
    with (
        frugal(megabytes=1),
        pytest.raises(checkpoint.CheckpointError, match=f"expected at most {MAX_HEADER}"),
    ):
        read_header(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("I64", "unreadable conv_in.bias, got dtype I64, expected one of F64, F32, F16, BF16"),
        ("F8_E4M3", "unreadable conv_in.bias, got dtype F8_E4M3"),
        ("", "unreadable conv_in.bias, got dtype , expected"),
    ],
)
def test_weights_of_a_dtype_that_is_no_float(folder, kind, message):
    contents = (folder / UNET).read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header, data = json.loads(contents[8 : 8 + length]), contents[8 + length :]
    start, stop = header["conv_in.bias"]["data_offsets"]
    size = {"I64": 8}.get(kind)
    if (
        size is not None
    ):  # as many bytes as the lie needs: the tensor grows, and with it the offsets after it
        grow = 80 * size - (stop - start)
        data = data[:stop] + bytes(grow) + data[stop:]
        for name, each in header.items():
            if name != "__metadata__" and each["data_offsets"][0] >= stop:
                each["data_offsets"] = [offset + grow for offset in each["data_offsets"]]
        header["conv_in.bias"]["data_offsets"][1] = stop + grow
    header["conv_in.bias"]["dtype"] = kind
    (folder / UNET).write_bytes(raw(header, data))
    refused(folder, message)


NAMES = ["input_blocks." * 50_000, "decoder.up." + "9" * 5000 + ".block.0", "input_blocks.٣.0.bias"]
NAMES += ["", ".", "…", "conv_in"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_single_files_with_names_of_any_kind(part):
    config = checkpoint.MODELS[part][1]()
    with frugal(seconds=3):
        for name in NAMES:
            assert (
                rename_ldm(part, LDM_PREFIX[part] + name, config) == name
                and rename_ldm(part, name, config) is None
            )


def test_an_index_of_shards_is_not_followed(folder, tmp_path):
    (tmp_path / "outside.safetensors").write_bytes((folder / UNET).read_bytes())
    (folder / UNET).unlink()
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (folder / (UNET + ".index.json")).write_text(json.dumps(index))
    told = refused(
        folder,
        f"{folder / UNET} is missing; {folder / 'unet'} has diffusion_pytorch_model.safetensors"
        ".index.json; minisd does not read weights in shards",
    )
    assert "pickle" not in told


SOURCES = ["a" * 300, "a/" * 100_000, "a" * 10**6, "a\0b", "\ud800", "\x1b[2J", "..", "//"]
SOURCES += ["hf://owner/name", "a b/c", "owner/na/me"]


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_names_that_are_no_model(source):
    with frugal(), pytest.raises(checkpoint.CheckpointError) as caught:
        minisd.load(source, device="cpu")
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


# configs


ABSURD = [
    (
        "unet",
        {"layers_per_block": 10**9},
        "layers_per_block: got 1000000000, expected 1 to 16",
    ),
    ("unet", {"layers_per_block": 0}, "layers_per_block: got 0"),
    (
        "unet",
        {"block_out_channels": [10**18, 10**18]},
        "block_out_channels: got (1000000000000000000,",
    ),
    ("unet", {"block_out_channels": [8] * 100_000}, "down_block_types: expected 100000"),
    ("unet", {"block_out_channels": [-80, 160]}, "block_out_channels: got (-80, 160)"),
    ("unet", {"block_out_channels": []}, "block_out_channels: got (), expected tuple"),
    ("unet", {"sample_size": 513}, "sample_size: got 513, expected 1 to 512"),
    (
        "unet",
        {"sample_size": [16, 10**9]},
        "sample_size: got (16, 1000000000), expected 16 numbers at most, each 1 to 512",
    ),
    ("unet", {"attention_head_dim": 10**9}, "attention_head_dim: got 1000000000"),
    ("unet", {"norm_eps": float("nan")}, "norm_eps: got nan"),
    ("unet", {"norm_eps": float("inf")}, "norm_eps: got inf"),
    ("unet", {"freq_shift": 10**9}, "freq_shift: got 1000000000"),
    (
        "unet",
        {"cross_attention_dim": "128; rm"},
        "cross_attention_dim: got '128; rm', expected int",
    ),
    (
        "vae",
        {"scaling_factor": 0.0},
        "scaling_factor: got 0.0, expected more than 0 and at most 1000000",
    ),
    ("vae", {"scaling_factor": float("nan")}, "scaling_factor: got nan"),
    ("vae", {"scaling_factor": -1e400}, "scaling_factor: got -inf"),
    (
        "vae",
        {"block_out_channels": [32] * 100_000},
        "down_block_types: got ('DownEncoderBlock2D', ",
    ),
    (
        "vae",
        {
            "block_out_channels": [32] * 17,
            "down_block_types": ["DownEncoderBlock2D"] * 17,
            "up_block_types": ["UpDecoderBlock2D"] * 17,
        },
        "block_out_channels: got (32, 32",
    ),
    ("vae", {"latent_channels": 10**6}, "beside a VAE with latents of 1000000, which have to be"),
    ("vae", {"block_out_channels": [8, 8, 8]}, "tensors do not fit the models"),
    ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000"),
    ("text_encoder", {"vocab_size": 10**12}, "vocab_size: got 1000000000000"),
    ("text_encoder", {"hidden_size": 0}, "hidden_size: got 0"),
    (
        "text_encoder",
        {"hidden_size": 256, "num_attention_heads": 4},
        "its network takes texts of width 128, its text encoder gives 256, which have to be as",
    ),
    (
        "scheduler",
        {"num_train_timesteps": 10**12},
        "steps is 1000000000000, expected a whole number, 1 to 100000",
    ),
    ("scheduler", {"steps_offset": 10**30}, "steps_offset is 1000000000"),
    (
        "scheduler",
        {"beta_end": float("nan")},
        "betas are [0.00085, nan], expected numbers between 0 and 1",
    ),
    ("scheduler", {"beta_start": "0.1"}, "betas are ['0.1', 0.012]"),
    ("scheduler", {"trained_betas": 5}, "betas are 5, expected"),
    ("scheduler", {"trained_betas": [0.5] * 150_000}, "betas are [0.5, 0.5"),
    ("scheduler", {"trained_betas": [0.1] * 999}, "999 trained_betas for num_train_timesteps 1000"),
    ("scheduler", {"sigma_min": 0.03}, "sigma_min is 0.03, only None is supported"),
    (
        "scheduler",
        {"timestep_type": "continuous"},
        "timestep_type is 'continuous', only 'discrete'",
    ),
    (
        "scheduler",
        {"beta_end": True},
        "betas are [0.00085, True], expected numbers between 0 and 1",
    ),
    ("scheduler", {"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no', expected true or false"),
    (
        "scheduler",
        {"prediction_type": "sample"},
        "prediction_type is 'sample', expected epsilon, v_prediction",
    ),
]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    ABSURD,
    ids=[f"{part}-{message[:40]}" for part, _, message in ABSURD],
)
def test_configs_with_absurd_numbers(folder, part, change, message):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with frugal(megabytes=50):
        assert len(refused(folder, message)) < 3000 or "do not fit" in message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "{" * 200_000,
        '{"a": ' + "9" * 5000 + "}",
        "[]",
        "null",
        "\ud800",
        " " * 2_000_000,
    ],
)
def test_configs_that_are_no_config(folder, text):
    (folder / "vae" / "config.json").write_text(text, errors="surrogatepass")
    with frugal():
        refused(folder, f"{folder / 'vae' / 'config.json'}: ")


# vocabularies


VOCABULARIES = [
    ("merges.txt", "#version: 0.2\nunknown pieces\n", "vocabulary and merges do not fit"),
    ("merges.txt", "a b c\n", "expected two pieces a line, got 'a b c'"),
    ("merges.txt", "x" * 30_000_000, "the file has 30000000 bytes, expected at most 20000000"),
    ("merges.txt", b"\xff\xfe", "can't decode byte"),
    ("vocab.json", "[]", "tokenizer"),
    ("vocab.json", "{}", "has no '<|startoftext|>'"),
    ("vocab.json", '{"<|startoftext|>": "0", "<|endoftext|>": 1}', "tokenizer: "),
    ("vocab.json", '{"<|startoftext|>": -1, "<|endoftext|>": 1}', "tokenizer: "),
    ("vocab.json", '{"<|startoftext|>": 0.5, "<|endoftext|>": 1}', "tokenizer: "),
    ("vocab.json", '{"<|startoftext|>": 1e12, "<|endoftext|>": 1}', "tokenizer: "),
    ("vocab.json", "[" * 200_000, "tokenizer: "),
    ("vocab.json", '{"<|startoftext|>": true, "<|endoftext|>": 0}', "has the id True, expected a"),
    ("vocab.json", '{"<|startoftext|>": 1, "a": 1, "<|endoftext|>": 0}', "has the id 1 for "),
    ("vocab.json", '{"a": 1, "a": 2}', "'a' is there twice"),
    ("merges.txt", "#version: 0.2\n", "vocabulary and merges do not fit: no merge makes "),
    ("added_tokens.json", '{"<cat>": 616}', "adds ['<cat>'] to the vocabulary, expected that of"),
    ("special_tokens_map.json", '{"additional_special_tokens": ["<a>", "<b>"]}', "['<a>', '<b>']"),
    (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"616": {"content": "<cat>", "special": false}}}',
        "adds ['<cat>'] to the vocabulary",
    ),
    (
        "tokenizer_config.json",
        '{"additional_special_tokens": [{"content": "<cat>"}]}',
        "adds ['<cat>'] to the vocabulary",
    ),
    (
        "tokenizer_config.json",
        '{"bos_token": "a</w>"}',
        "bos_token is 'a</w>', expected CLIP's '<|",
    ),
    (
        "special_tokens_map.json",
        '{"eos_token": {"content": "!"}}',
        "eos_token is '!', expected CLI",
    ),
    ("tokenizer_config.json", '{"model_max_length": 1000000000}', "max_length is 1000000000"),
    ("tokenizer_config.json", '{"pad_token": 3}', "tokenizer: "),
    ("special_tokens_map.json", '{"pad_token": {"contents": 1}}', "tokenizer: "),
    ("special_tokens_map.json", "3", "tokenizer: "),
]


@pytest.mark.parametrize(("name", "text", "message"), VOCABULARIES, ids=range(len(VOCABULARIES)))
def test_vocabularies_that_lie(folder, name, text, message):
    contents = text if isinstance(text, bytes) else text.encode()
    (folder / "tokenizer" / name).write_bytes(contents)
    if name == "vocab.json":
        (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    if text == "#version: 0.2\n":
        lines = (SHAPES / "tokenizer" / name).read_text().splitlines()  # and cut in the middle
        (folder / "tokenizer" / name).write_text("\n".join(lines[: len(lines) // 2]))
        refused(folder, message)
        (folder / "tokenizer" / name).write_bytes(contents)
    with frugal(megabytes=50):
        refused(folder, message)


def test_added_words_in_a_tokenizer_json(folder):
    """As transformers 5 writes it; the special tokens themselves are no addition."""
    tokenizer = checkpoint.locate("shapes").tokenizer
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    added = [
        {"content": each, "id": tokenizer.vocab[each], "normalized": False}
        for each in ("<|startoftext|>", "<|endoftext|>")
    ]
    saved = {"model": {"vocab": tokenizer.vocab, "merges": tokenizer.merges}}
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(saved | {"added_tokens": added}))
    minisd.load(folder, device="cpu")
    more = {"content": "<cat>", "id": 616, "normalized": False}
    path.write_text(json.dumps(saved | {"added_tokens": [*added, more]}))
    refused(folder, "adds ['<cat>'] to the vocabulary")


def test_a_vocabulary_with_ids_that_the_text_encoder_does_not_have(folder):
    path = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    for number in (616, 2**31):
        path.write_text(json.dumps(vocabulary | {"<|endoftext|>": number}))
        with frugal(megabytes=50):
            refused(
                folder,
                f"makes 77 ids up to {number}, the text encoder takes at most 77 ids below 616",
            )


# prompts


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.locate("shapes").tokenizer


@pytest.mark.parametrize(
    "prompt",
    [
        "a" * 10**6,
        "a " * 200_000,
        "é̂" * 50_000,
        "🎨" * 50_000,
        "雪" * 50_000,
        "<|endoftext|>" * 80_000,
    ],
    ids=["one word", "many words", "combining", "emoji", "ideographs", "special tokens"],
)
def test_prompts_of_up_to_a_megabyte_are_cut_with_a_short_warning(tokenizer, prompt):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        ids = tokenizer([prompt])
        assert time.process_time() - start < 30
    assert ids.shape == (1, 77) and int(ids.max()) < len(tokenizer.vocab)
    [warning] = caught
    assert "fit; this part was cut" in str(warning.message) and len(str(warning.message)) < 20_000


@pytest.mark.parametrize("prompt", ["", " " * 10**6, "\n\t\u3000" * 100_000])
def test_prompts_of_nothing_are_the_empty_prompt(tokenizer, prompt):
    assert torch.equal(tokenizer([prompt]), tokenizer([""]))


@pytest.mark.parametrize(
    "prompt",
    ["a\0red\0circle", "\0", "مربع أحمر", "\u202ea red circle\u202c", "ﷺ", "\ufeff", "a\x1b[2Jb"],
)
def test_prompts_of_any_characters_are_drawn(tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids  # nothing is lost that the ids hold
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer([prompt]).shape == (1, 77)


@pytest.mark.parametrize("prompt", ["\ud800", "a\udfff", "\udc00" * 10**6])
def test_lone_surrogates_are_refused_in_a_short_message(tokenizer, prompt):
    with pytest.raises(
        ValueError, match="expected a prompt of valid Unicode, got lone surrogates in "
    ) as caught:
        tokenizer([prompt])
    assert len(str(caught.value)) < 20_000
    str(caught.value).encode("ascii")  # it can be printed anywhere


# what is written


def tree(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_nothing_is_written_beside_the_output(folder, tmp_path, monkeypatch, capsys):
    """A checkpoint whose texts are paths, exported: the files have the names that minisd gives
    them."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    escape = "../../../escape"
    scheduler.write_text(
        json.dumps(json.loads(scheduler.read_text()) | {"_class_name": escape, escape: escape})
    )
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert cli.main(["export", "--model", "model", "--to", "out/here"]) == 0
    new = tree(tmp_path) - before
    assert all(name == "out" or name.startswith("out/here") for name in new)
    assert {Path(name).name for name in new if (tmp_path / name).is_file()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
        "model_index.json",
        "scheduler_config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
    }
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")  # to a place that is not there
    before = tree(tmp_path)
    capsys.readouterr()
    for bad in (
        ["--to", "model"],
        ["--to", "model/unet/config.json"],
        ["--single-file", "--to", "a.ckpt"],
    ):
        assert cli.main(["export", "--model", "shapes", *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and tree(tmp_path) == before
