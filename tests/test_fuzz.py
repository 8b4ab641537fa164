"""A fuzz of what reads foreign data: safetensors headers, configs, schedules, vocabularies,
prompts, pictures.

Each target either succeeds with a result that holds its promises, or raises its one documented
error. What once broke it is kept in tests/corpus/<target>/ and is replayed first; FUZZ_SECONDS=600
fuzzes each target that long.
"""

import io
import json
import os
import struct
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import save_file

from minisd.checkpoints import configs, load as checkpoint, sources
from minisd.checkpoints.header import read_header
from minisd.editing.inversion import FORMAT, METHODS, TENSORS, Inversion
from minisd.models.clip import CLIPTextConfig
from minisd.models.tokenizer import CLIPTokenizer
from minisd.models.unet import UNetConfig
from minisd.models.vae import VAEConfig
from minisd.sampling.samplers import DDIM, DPMpp2M
from minisd.sampling.schedule import NoiseSchedule
from minisd.viewing.images import read_image, to_tensor

CORPUS = Path(__file__).parent / "corpus"
SECONDS = float(os.environ.get("FUZZ_SECONDS", 2.5))  # of each target
EXAMPLES = 300  # at a time: hypothesis would draw the others also when the time is over
SHAPES = sources.bundled()["shapes"]


def fuzz(**strategies):
    """Run a test on drawn values until its time is over, EXAMPLES at least unless that takes
    longer."""

    def decorate(test):
        end = 0.0

        def timed(**values):
            nonlocal end
            if time.monotonic() < end:
                try:
                    test(**values)
                except BaseException:
                    end = float("inf")  # hypothesis now looks for the smallest example
                    raise

        health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        run = settings(
            max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=health
        )(timed)
        # What pytest calls takes no fixtures: the values come from hypothesis.
        inner = given(**strategies)(run)

        def outer():
            nonlocal end
            end = time.monotonic() + SECONDS
            inner()
            while SECONDS >= 10 and time.monotonic() < end:
                inner()

        outer.__name__, outer.__doc__ = test.__name__, test.__doc__
        return outer

    return decorate


def corpus(target):
    paths = sorted((CORPUS / target).iterdir())
    assert paths, f"the corpus of {target} is empty"
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**63, 1e400]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


# safetensors


def header_is_read_or_refused(contents, folder):
    path = folder / "a.safetensors"
    path.write_bytes(contents)
    try:
        entries = read_header(path)
    except checkpoint.CheckpointError:
        return
    total = sum(entry.stop - entry.start for entry in entries.values())
    assert 8 + int.from_bytes(contents[:8], "little") + total == len(contents)
    assert all(8 <= entry.start <= entry.stop <= len(contents) for entry in entries.values())


OFFSETS = st.tuples(st.integers(-4, 40), st.integers(-4, 40)).map(list) | st.just([0, 8]) | JSON
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "", "f32"]) | JSON,
        "shape": st.lists(st.integers(-2, 8) | st.sampled_from([2**31, 2**63]), max_size=4) | JSON,
        "data_offsets": OFFSETS,
    },
)
HEADERS = (
    st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)
    | JSON
)


@fuzz(
    header=HEADERS,
    data=st.binary(max_size=40),
    lie=st.integers(-3, 3) | st.integers(0, 2**64 - 1) | st.just(0),
)
def test_headers(header, data, lie):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        header_is_read_or_refused(
            struct.pack("<Q", (len(text) + lie) % 2**64) + text + data, Path(folder)
        )


def damaged(contents, places):
    """Some bytes replaced, some cut out or put in."""
    contents = bytearray(contents)
    for kind, place, value in places:
        place = int(place * len(contents))
        if kind == 0:
            contents[place : place + 1] = bytes([value])
        elif kind == 1:
            del contents[place : place + value]
        else:
            contents[place:place] = bytes([value]) * value
    return bytes(contents)


PLACES = st.lists(
    st.tuples(st.integers(0, 2), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)
SMALL = json.dumps(
    {"__metadata__": {"format": "pt"}}
    | {
        f"layer.{i}": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8 * i, 8 * i + 8]}
        for i in range(4)
    }
).encode()
SMALL = struct.pack("<Q", len(SMALL)) + SMALL + bytes(32)


@fuzz(places=PLACES)
def test_damaged_headers(places):
    with tempfile.TemporaryDirectory() as folder:
        header_is_read_or_refused(damaged(SMALL, places), Path(folder))


@corpus("header")
def test_headers_that_once_broke_it(path, tmp_path):
    header_is_read_or_refused(path.read_bytes(), tmp_path)


# configs and schedules


def like(cls):
    """Configs with the keys of a dataclass and values of any kind."""
    keys = st.sampled_from(
        [*cls.__dataclass_fields__, "act_fn", "unknown", "text_config", "down_block_types"]
    )
    numbers = st.integers(-2, 9) | st.lists(st.integers(-1, 99), max_size=4)
    return st.dictionaries(keys, numbers | JSON, max_size=6)


def config_is_read_or_refused(part, values, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    try:
        config = configs.read_config(part, path)
        with torch.device("meta"):
            checkpoint.MODELS[part][0](config)
    except checkpoint.CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 20_000
    except (ValueError, RuntimeError, ZeroDivisionError):
        pass  # what `fit` tells as "its config makes no model"


@fuzz(
    part=st.sampled_from(["unet", "vae", "text_encoder"]),
    changes=st.tuples(like(UNetConfig), like(VAEConfig), like(CLIPTextConfig)),
)
def test_configs(part, changes):
    own = json.loads((SHAPES / part / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about layers without weights
        config_is_read_or_refused(
            part, own | changes[list(checkpoint.MODELS).index(part)], Path(folder)
        )


@corpus("config")
def test_configs_that_once_broke_it(path, tmp_path):
    config_is_read_or_refused(path.name.split("-")[0], json.loads(path.read_text()), tmp_path)


SCHEDULES = st.fixed_dictionaries(
    {},
    optional={
        "_class_name": st.just("DDIMScheduler"),
        "beta_start": st.floats(0, 1) | JSON,
        "beta_end": st.floats(0, 1) | JSON,
        "beta_schedule": st.sampled_from(["linear", "scaled_linear"]) | JSON,
        "num_train_timesteps": st.integers(-1, 2000) | JSON,
        "trained_betas": st.none() | st.lists(st.floats(0, 1) | JSON, max_size=30) | JSON,
        "steps_offset": st.integers(-1, 5) | JSON,
        "set_alpha_to_one": st.booleans() | JSON,
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]) | JSON,
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]) | JSON,
        "rescale_betas_zero_snr": st.booleans() | JSON,
    },
)


def schedule_is_built_or_refused(config, steps, skip):
    try:
        schedule = NoiseSchedule.from_dict(config)
    except ValueError:
        return
    a = schedule.alphas_cumprod
    assert a.isfinite().all() and (a >= 0).all() and (a <= 1).all()
    for make in (
        DDIM,
        lambda *args: DDIM(*args, inverse=True),
        DPMpp2M,
        lambda *args: DPMpp2M(*args, karras=False),
    ):
        try:
            plan = list(make(schedule, steps, skip))
        except ValueError:
            continue
        assert len(plan) == steps - skip
        for step in plan:
            assert 0 <= float(step.t) < len(schedule)
            assert all(0 <= value <= 1 for level in (step.now, step.next) for value in level)


@fuzz(config=SCHEDULES, steps=st.integers(1, 40), skip=st.integers(0, 40))
def test_schedules(config, steps, skip):
    schedule_is_built_or_refused(config, steps, min(skip, steps))


@corpus("schedule")
def test_schedules_that_once_broke_it(path):
    schedule_is_built_or_refused(**json.loads(path.read_text()))


# vocabularies and prompts

TOKENIZER = CLIPTokenizer.from_folder(SHAPES / "tokenizer")
PIECES = st.text(max_size=3) | st.sampled_from(
    ["a", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>", "</w>", ""]
)


def vocabulary_is_read_or_refused(vocab, merges, folder):
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8", errors="surrogatepass")
    (folder / "merges.txt").write_text(merges, encoding="utf-8", errors="surrogatepass")
    try:
        tokenizer = configs.named(folder, configs.vocabulary)
    except checkpoint.CheckpointError:
        return
    assert tokenizer(["ab ab"]).shape == (1, 77)


@fuzz(
    vocab=st.dictionaries(PIECES, st.integers(0, 9) | JSON, max_size=8) | JSON,
    merges=st.lists(st.tuples(PIECES, PIECES).map(" ".join), max_size=4).map("\n".join)
    | st.text(max_size=20),
    whole=st.booleans(),
)
def test_vocabularies(vocab, merges, whole):
    if whole and isinstance(vocab, dict):
        vocab = {
            "<|startoftext|>": 100,
            "<|endoftext|>": 101,
            "a": 1,
            "b</w>": 2,
            "ab</w>": 3,
        } | vocab
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_is_read_or_refused(vocab, merges, Path(folder))


@corpus("vocabulary")
def test_vocabularies_that_once_broke_it(path, tmp_path):
    vocabulary_is_read_or_refused(**json.loads(path.read_text()), folder=tmp_path)


def prompt_is_encoded_or_refused(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ids = TOKENIZER([text])
        except ValueError:
            assert any("\ud800" <= c <= "\udfff" for c in text)
            return
    assert (
        ids.shape == (1, 77)
        and ids[0, 0] == TOKENIZER.bos_id
        and TOKENIZER.eos_id in ids[0].tolist()
    )
    own = TOKENIZER.encode(text)
    assert all(0 <= i < len(TOKENIZER.vocab) for i in own) and len(TOKENIZER.tokenize(text)) == len(
        own
    )
    TOKENIZER.decode(own)


@fuzz(
    text=st.text(st.characters(), max_size=300)
    | st.lists(st.sampled_from(["a red", "<|endoftext|>", "\0", " ", "é", "🎨"])).map("".join)
)
def test_prompts(text):
    prompt_is_encoded_or_refused(text)


@corpus("prompt")
def test_prompts_that_once_broke_it(path):
    prompt_is_encoded_or_refused(json.loads(path.read_text()))


# saved inversions

ABOUT = {
    "prompts": ["a"],
    "steps": 2,
    "skip": 0,
    "timesteps": [1, 501],
    "method": "ddim",
    "guidance": None,
}
SIDES = st.lists(st.integers(0, 2), max_size=4) | st.sampled_from(
    [[1, 4, 2, 2], [2, 1, 3, 5], [3, 1, 4, 2, 2], [2, 4, 1]]
)
KINDS = st.sampled_from(
    [torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
)


@fuzz(
    about=st.dictionaries(
        st.sampled_from([*ABOUT, "a"]), JSON | st.sampled_from(METHODS), max_size=3
    )
    | JSON,
    tensors=st.dictionaries(
        st.sampled_from([*TENSORS, "snapshot.0", "a"]),
        st.tuples(SIDES, KINDS),
        max_size=3,
    ),
)
def test_inversions(about, tensors):
    about = ABOUT | about if isinstance(about, dict) else about
    whole = {"latents": ([1, 4, 2, 2], torch.float32), "z": ([1, 4, 2, 2], torch.float32)} | tensors
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        contents = {name: torch.zeros(shape).to(kind) for name, (shape, kind) in whole.items()}
        save_file(contents, path, {FORMAT: json.dumps(about)})
        try:
            inversion = Inversion.load(path)
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            return
        assert inversion[0].tensors().keys() == whole.keys()
        inversion.save(path)
        assert Inversion.load(path).timesteps == inversion.timesteps


# pictures


def picture_is_read_or_refused(contents, folder):
    path = folder / "a.png"
    path.write_bytes(contents)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = read_image(path)
    except ValueError:
        return
    assert image.mode == "RGB" and image.width * image.height <= Image.MAX_IMAGE_PIXELS
    x = to_tensor([image], 8, 8)
    assert x.shape == (1, 3, 8, 8) and x.min() >= -1 and x.max() <= 1


def pictures():
    """One small file of each format and a few modes."""
    files = {}
    for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16"):
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"):
            buffer = io.BytesIO()
            try:
                Image.new(mode, (9, 7), 1 if mode in ("P", "L", "1", "I;16") else None).save(
                    buffer, kind
                )
            except (OSError, KeyError, ValueError):
                continue  # the format has no such mode
            files[f"{kind} {mode}"] = buffer.getvalue()
    return files


PICTURES = pictures()


@fuzz(kind=st.sampled_from(sorted(PICTURES)), places=PLACES)
def test_pictures(kind, places):
    with tempfile.TemporaryDirectory() as folder:
        picture_is_read_or_refused(damaged(PICTURES[kind], places), Path(folder))


@pytest.mark.parametrize("kind", sorted(PICTURES))
def test_whole_pictures_are_read(kind, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(PICTURES[kind])
    assert read_image(path).size == (9, 7)


@corpus("picture")
def test_pictures_that_once_broke_it(path, tmp_path):
    picture_is_read_or_refused(path.read_bytes(), tmp_path)
