"""Random inputs for every reader, by seed: more of them, and faster, than hypothesis makes.

    run(inputs, seed) -> ({reader: how many were read, refused}, failures)

Each reader succeeds, keeps its promises, or raises one of its documented errors. Inputs are whole
files with a few bytes changed, or made of the right words in the wrong places. One that fails is
written to tests/corpus/READER/, and the tests read what is there first.
"""

import contextlib
import io
import json
import random
import struct
import tempfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from minisd.checkpoints import load as checkpoint, sources
from minisd.checkpoints.bundle import read_bundle
from minisd.checkpoints.header import read_header
from minisd.checkpoints.kinds import kind_of_bytes, kind_of_tensors
from minisd.cli import info, main as cli
from minisd.editing.blended import read_mask
from minisd.viewing.images import read_image

CORPUS = Path(__file__).parent / "corpus"
SHAPES = sources.bundled()["shapes"]
ODD = [None, True, False, 0, 1, -1, 2**31, 2**63, 1e400, float("nan"), 0.5, "", "a", [], {}, [[]]]
ODD += ["\ud800", "a" * 300, [1] * 40, {"a": {}}, "\0", 10**30, "-", "--", "\x1b[2J"]


def damaged(rng, data):
    """A few bytes changed, cut out or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1)
        what = rng.randrange(4)
        if what == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[place : place + rng.randint(1, 20)]
        elif what == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def changed(rng, values, keys=()):
    """A JSON object with some of its values, or of other keys', exchanged for odd ones."""
    values = dict(values)
    for _ in range(rng.randint(0, 3)):
        key = rng.choice([*values, *keys, "unknown", ""])
        if rng.random() < 0.2:
            values.pop(key, None)
        else:
            values[key] = rng.choice([*ODD, *values.values()])
    return values


def as_bytes(values):
    return json.dumps(values).encode("utf-8", "surrogatepass")


# readers: make(rng) -> bytes, or what is read; read(input, folder) raises REFUSED or returns

REFUSED = (ValueError, FileNotFoundError)  # CheckpointError is a ValueError


def make_header(rng):
    names = ["a", "b.weight", "__metadata__", "lora_up.weight", "\ud800", "a" * 300, ""]
    header, end = {}, 0
    for name in rng.sample(names, rng.randint(0, 4)):
        shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 3))]
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
        if rng.random() < 0.3:
            header[name] = changed(rng, header[name])
    text = as_bytes(header)
    whole = struct.pack("<Q", len(text)) + text + bytes(end)
    return damaged(rng, whole) if rng.random() < 0.5 else whole


def read_a_header(data, folder):
    (folder / "a.safetensors").write_bytes(data)
    kind_of_bytes(data[:64])
    entries = read_header(folder / "a.safetensors")
    kind_of_tensors({name: entry.shape for name, entry in entries.items()})
    total = sum(entry.stop - entry.start for entry in entries.values())
    assert 8 + int.from_bytes(data[:8], "little") + total == len(data)


PARTS = list(checkpoint.MODELS)
CONFIGS = {part: json.loads((SHAPES / part / "config.json").read_text()) for part in PARTS}


def make_config(rng):
    part = rng.choice(PARTS)
    fields = checkpoint.MODELS[part][1].__dataclass_fields__
    data = as_bytes(changed(rng, CONFIGS[part], fields))
    return part.encode() + b"\n" + (damaged(rng, data) if rng.random() < 0.3 else data)


def read_a_config(data, folder):
    part, _, text = data.partition(b"\n")
    (folder / "config.json").write_bytes(text)
    config = checkpoint._config(part.decode(), folder / "config.json")
    with torch.device("meta"):
        try:
            checkpoint.MODELS[part.decode()][0](config)
        except (
            RuntimeError,
            ZeroDivisionError,
        ) as error:  # build_models says of them what they are
            raise ValueError from error


SCHEDULER = json.loads((SHAPES / "scheduler" / "scheduler_config.json").read_text())
SCHEDULER_KEYS = ["trained_betas", "timestep_spacing", "prediction_type", "sigma_min", "beta_start"]
SCHEDULER_KEYS += ["rescale_betas_zero_snr", "num_train_timesteps", "_class_name", "steps_offset"]


def make_schedule(rng):
    values = changed(rng, SCHEDULER, SCHEDULER_KEYS)
    for key in ("beta_start", "beta_end"):
        if rng.random() < 0.3:
            values[key] = rng.random() ** rng.choice([1, 3, 9])
    return as_bytes(values)


def read_a_schedule(data, folder):
    from minisd.sampling.samplers import DDIM, DPMpp2M
    from minisd.sampling.schedule import NoiseSchedule

    (folder / "a.json").write_bytes(data)
    schedule = checkpoint._named(
        folder / "a.json", lambda path: NoiseSchedule.from_dict(checkpoint._json(path))
    )
    a = schedule.alphas_cumprod
    assert a.isfinite().all() and (a >= 0).all() and (a <= 1).all()
    for sampler in (DDIM, DPMpp2M):
        for step in sampler(schedule, 3):
            assert 0 <= float(step.t) < len(schedule)


PIECES = ["a", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>", "</w>", "", "é", "!", "ab"]
WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b</w>": 3, "ab</w>": 4, "!": 5}


def make_vocabulary(rng):
    files = {"vocab.json": as_bytes(changed(rng, WORDS, PIECES))}
    merges = [f"{rng.choice(PIECES)} {rng.choice(PIECES)}" for _ in range(rng.randint(0, 2))]
    files["merges.txt"] = "\n".join(["#version: 0.2", "a b</w>", *merges]).encode()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        keys = ["pad_token", "model_max_length", "bos_token", "additional_special_tokens"]
        if rng.random() < 0.4:
            files[name] = as_bytes(changed(rng, {}, [*keys, "added_tokens_decoder", "a"]))
    if rng.random() < 0.3:
        name = rng.choice(list(files))
        files[name] = damaged(rng, files[name])
    if rng.random() < 0.2:
        saved = {"model": {"vocab": WORDS, "merges": ["a b</w>"]}, "added_tokens": []}
        files = {"tokenizer.json": as_bytes(changed(rng, saved, ["added_tokens", "model"]))}
    return as_bytes({name: data.decode("latin-1") for name, data in files.items()})


def read_a_vocabulary(data, folder):
    for path in folder.iterdir():
        path.unlink()
    for name, text in json.loads(data).items():
        (folder / name).write_bytes(text.encode("latin-1"))
    tokenizer = checkpoint._named(folder, checkpoint._vocabulary)
    assert tokenizer(["ab ab"]).shape == (1, tokenizer.max_length)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


KEYS = [*info.OPTIONS, "version", "command", "prompt", "arguments", "image", "unknown"]
TEXTS = ["minisd 0", "a cat", "-1", "$'\\101'", "'", "edit 'a", "a\x1b[2J\0b", "\n", "7", "\xe9"]


def make_png(rng):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    texts = []
    for _ in range(rng.randint(0, 6)):
        key, text = rng.choice(KEYS).encode(), rng.choice(TEXTS).encode()
        kind, data = rng.choice(
            [
                (b"tEXt", key + b"\0" + text),
                (b"zTXt", key + b"\0\0" + zlib.compress(text)),
                (b"iTXt", key + b"\0\0\0\0\0" + text),
                (b"iTXt", key + b"\0\1\0\0\0" + zlib.compress(text)),
            ]
        )
        texts.append(chunk(kind, damaged(rng, data) if rng.random() < 0.3 else data))
    first = chunk(b"tEXt", b"version\0minisd 0") if rng.random() < 0.7 else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    whole = b"\x89PNG\r\n\x1a\n" + header + first + b"".join(texts) + pixels + chunk(b"IEND", b"")
    return damaged(rng, whole) if rng.random() < 0.3 else whole


def read_a_png(data, folder):
    (folder / "a.png").write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            info.print_image(str(folder / "a.png"))
        except OSError as error:  # Pillow's, of a file that is cut
            raise ValueError from error
    assert not set(map(chr, range(32))) - {"\n", "\t"} & set(out.getvalue())


def make_bundle(rng):
    about = {"a": [1, 2], "b": "text"}
    about = changed(rng, about) if rng.random() < 0.5 else about
    kinds = {"x": torch.float32, "z": torch.int64}
    for name in rng.sample(["y.0", "y.1", "other"], rng.choice([0, 0, 1, 2])):
        kinds[name] = rng.choice([torch.float32, torch.float16, torch.int64, torch.bool])
    sizes = [[rng.randint(0, 3) for _ in range(rng.randint(0, 3))] for _ in kinds]
    tensors = {name: torch.zeros(size).to(kind) for (name, kind), size in zip(kinds.items(), sizes)}
    whole = save(tensors, {rng.choice(["format"] * 5 + ["other"]): json.dumps(about)})
    return damaged(rng, whole) if rng.random() < 0.4 else whole


def read_a_bundle(data, folder):
    (folder / "a.safetensors").write_bytes(data)
    known = read_bundle(
        folder / "a.safetensors", "format", ["a", "b"], ["x"], r"y\.\d|z", integers=["z"]
    )
    assert set(known[0]) == {"a", "b"} and "x" in known[1]


def whole_images():
    files = []
    for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16"):
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"):
            buffer = io.BytesIO()
            one = 1 if mode in ("P", "L", "1", "I;16") else None
            with contextlib.suppress(OSError, KeyError, ValueError):  # no such mode in the format
                Image.new(mode, (9, 7), one).save(buffer, kind)
                files.append(buffer.getvalue())
            if mode == "L" and kind == "PNG":
                Image.new(mode, (9, 7), "white").save(white := io.BytesIO(), kind)
                files.append(white.getvalue())  # a mask
    return [data for data in files if data]


IMAGES = whole_images()


def make_image(rng):
    return damaged(rng, rng.choice(IMAGES))


def read_an_image(data, folder):
    (folder / "a").write_bytes(data)
    image = read_image(folder / "a")
    assert image.mode == "RGB" and 0 < image.width * image.height <= Image.MAX_IMAGE_PIXELS


def make_mask(rng):
    if rng.random() < 0.5:
        return make_image(rng)
    kinds = [np.uint8, np.float32, np.float64, bool, np.int64, np.float16]
    shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 4))]
    shape = rng.choice([shape, [3, 2]])
    values = np.full(shape, rng.choice([0, 1, 1, 0.5, 255, -1, 2]))
    if rng.random() < 0.2:
        values = values * float("nan")
    with np.errstate(invalid="ignore"):
        return values.astype(rng.choice(kinds))


def read_a_mask(mask, folder):
    if isinstance(mask, bytes):
        (folder / "a").write_bytes(mask)
        mask = folder / "a"
    white = read_mask(mask)
    assert white.dtype == bool and white.ndim == 2 and white.any()


def commands():
    [choices] = [a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict)]
    return choices


def make_line(rng):
    """A command with its arguments, options with values that fit, and odd words anywhere."""
    odd = ["a cat", "-1", "--", "", "1", "0.5", "nan", "2**64", "a=2", "0.2:0.6", "64x64", "x"]
    odd += ["1e400", "9" * 5000, "٣", "a,b", ",", "=", "../x", "\udcff", "-", "dpm++", "0,0.5,1"]
    name = rng.choice([*COMMANDS, "nothing"])
    line = [name]
    actions = ACTIONS.get(name, [])
    for action in rng.sample(actions, len(actions)):
        fits = [*(action.choices or ()), str(action.default), "1", "0.5", "64x64", "a=1"]
        value = rng.choice(odd if rng.random() < 0.1 else fits)
        if not action.option_strings:
            line.append(value)
        elif rng.random() < 0.1:
            option = rng.choice(action.option_strings)
            line += [option] if action.nargs == 0 else [option, value]
    if rng.random() < 0.3:
        line.insert(rng.randint(1, len(line)), rng.choice(odd))
    return as_bytes(line)


COMMANDS = commands()
ACTIONS = {
    name: [a for a in parser._actions if a.dest != "help"] for name, parser in COMMANDS.items()
}
PARSER = cli.build_parser()


def read_a_line(data, folder):
    line = json.loads(data)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            args = PARSER.parse_args(line)
        except OSError as error:  # of a folder's name, which main tells in one line
            raise ValueError from error
        except SystemExit as stop:
            assert stop.code == 2 and err.getvalue().count("\n") == 1
            raise ValueError from stop
    assert callable(args.run) and args.command == line[0]


READERS = {
    "header": (make_header, read_a_header),
    "config": (make_config, read_a_config),
    "scheduler": (make_schedule, read_a_schedule),
    "tokenizer": (make_vocabulary, read_a_vocabulary),
    "chunks": (make_png, read_a_png),
    "bundle": (make_bundle, read_a_bundle),
    "image": (make_image, read_an_image),
    "mask": (make_mask, read_a_mask),
    "line": (make_line, read_a_line),
}


def read_or_refused(name, data, folder):
    """Whether it was read; anything but REFUSED comes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name][1](data, folder)
    except REFUSED as error:
        assert len(str(error)) < 20_000, "an error of a page"
        return False
    return True


def run(inputs, seed, keep=True):
    figures, failures = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        for i in range(inputs):
            reader = list(READERS)[i % len(READERS)]
            data = READERS[reader][0](random.Random(f"{seed} {i}"))
            folder = Path(name) / reader
            folder.mkdir(exist_ok=True)
            try:
                was_read = read_or_refused(reader, data, folder)
                figures[f"{reader} {'read' if was_read else 'refused'}"] += 1
            except Exception as error:
                what = f"{type(error).__name__}: {str(error)[:200]}"
                failures.append(f"{reader}, seed {seed}, input {i}: {what}")
                if keep and isinstance(data, bytes):
                    (CORPUS / reader).mkdir(exist_ok=True)
                    (CORPUS / reader / f"found-{seed}-{i}").write_bytes(data)
    return dict(figures), failures
