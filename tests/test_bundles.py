"""Files of recordings and inversions are read by one reader: a bundle is whole and fits, or one
ValueError names the file."""

import json
import random
import struct
import tempfile
from pathlib import Path

import p2p_model
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd import Inversion, Recording
from minisd.checkpoints import bundle
from minisd.editing import inversion, recording

PROMPT = "a cat on my mat"
KINDS = {"minisd_recording": Recording, "minisd_inversion": Inversion}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """format -> (a file, its fields, its tensors)."""
    folder = tmp_path_factory.mktemp("bundles")
    sd = p2p_model.load(folder / "model")[1]
    options = dict(steps=2, progress=False)
    minisd.record(sd, PROMPT, cross_sites="mid", self_sites="mid", **options).save(folder / "r")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = minisd.invert(sd, image, PROMPT, trajectory=True, **options)
    minisd.null_text(sd, found, 3.0, inner_steps=1, progress=False).save(folder / "i")
    made = {}
    for name, format in (("r", "minisd_recording"), ("i", "minisd_inversion")):
        with safe_open(folder / name, "pt") as file:
            fields = json.loads(file.metadata()[format])
        made[format] = folder / name, fields, load_file(folder / name)
    return made


def refused(kind, path):
    with pytest.raises(ValueError) as caught:
        kind.load(path)
    told = str(caught.value)
    assert str(path) in told and told.isprintable() and len(told) < 2000
    return told


@pytest.fixture
def written(files, tmp_path):
    """write(format, change of fields, change of tensors) -> path; None leaves one out."""

    def write(format, fields=None, tensors=None):
        _, own_fields, own_tensors = files[format]
        about = {n: v for n, v in (own_fields | (fields or {})).items() if v is not OUT}
        kept = {n: x for n, x in (own_tensors | (tensors or {})).items() if x is not None}
        path = tmp_path / "a.safetensors"
        save_file({n: x.clone() for n, x in kept.items()}, path, {format: json.dumps(about)})
        return path

    return write


OUT = object()
both = pytest.mark.parametrize("format", KINDS)


@both
def test_what_is_saved_comes_back(files, written, format):
    path, _, tensors = files[format]
    again = KINDS[format].load(path)
    again.save(written(format))
    assert {n: x.dtype for n, x in load_file(path).items()} == {
        n: x.dtype for n, x in tensors.items()
    }
    assert all(torch.equal(x, tensors[n]) or n == "losses" for n, x in load_file(path).items())


def test_both_load_by_the_one_reader(files, monkeypatch):
    assert inversion.read_bundle is recording.read_bundle is bundle.read_bundle
    assert inversion.write_bundle is recording.write_bundle is bundle.write_bundle
    for format, kind in KINDS.items():
        asked = []

        def read(path, name, *args, asked=asked, **options):
            asked.append(name)
            return bundle.read_bundle(path, name, *args, **options)

        for module in (inversion, recording):
            monkeypatch.setattr(module, "read_bundle", read)
        kind.load(files[format][0])
        assert asked == [format]


@both
def test_fields_that_are_missing_or_unknown(files, written, format):
    for name in files[format][1]:
        assert f"missing ['{name}']" in refused(KINDS[format], written(format, {name: OUT}))
    assert "unknown ['size of it']" in refused(KINDS[format], written(format, {"size of it": 1}))
    strange = {"no such": torch.ones(1)}
    told = refused(KINDS[format], written(format, {"steps": OUT, "b": 0}, strange))
    assert "missing ['steps']" in told and "unknown ['b', 'no such']" in told


@both
def test_another_format(files, written, format):
    [other] = set(KINDS) - {format}
    told = refused(KINDS[format], files[other][0])
    assert f"holds no {format} that minisd has saved" in told
    path = written(format)
    for metadata in (None, {}, {format: "5"}, {format: "[]"}, {format: "null"}):
        save_file(files[format][2], path, metadata)
        assert f"holds no {format}" in refused(KINDS[format], path)
    save_file(files[format][2], path, {format: "{"})
    assert "cannot be read as safetensors" in refused(KINDS[format], path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        KINDS[format].load(path.parent / "nothing")


@both
def test_tensors_that_are_missing_misshapen_or_no_numbers(files, written, format):
    kind, tensors = KINDS[format], files[format][2]
    needed = {"minisd_recording": ("t",), "minisd_inversion": ("latents", "z")}[format]
    for name, x in tensors.items():
        if name in needed:
            assert f"missing ['{name}']" in refused(kind, written(format, {}, {name: None}))
        wrong = [x.sum(), x[None], x[..., :0]]
        wrong += [x[:-1].contiguous()] if name not in ("losses", "uncond") else []
        if name not in ("t", "losses"):  # of losses, those that were not computed are NaN
            wrong += [x * float("nan"), x / 0 + 1e400, x.long(), x.bool(), x.to(torch.complex64)]
        wrong += [x.to(torch.float8_e4m3fn), x.to(torch.uint8)] if name != "t" else [x.float()]
        for each in wrong:
            told = refused(kind, written(format, {}, {name: each}))
            assert name in told


def test_fields_of_recordings_that_do_not_fit(written):
    for name, value, message in [
        ("prompt", 5, "prompt: got 5, expected a text"),
        ("prompt", ["a"], r"prompt: got ('a',), expected a text"),
        ("steps", 3, "t: got (2,), expected a tensor (3)"),
        ("steps", 2.0, "steps is 2.0, expected a whole number, at least 1"),
        ("steps", None, "steps is None"),
        ("steps", [2], "steps is (2,)"),
        ("size", 8, "size is 0, expected a whole number, at least 1"),
        ("size", [8], "size is 0"),
        ("size", [8, 8, 8], "size is 0"),
        ("size", [8, 8.0], "size is 8.0"),
        ("size", [8, [8]], "size is [8]"),
        ("size", {"h": 8}, "size is 0"),
        ("size", [8, 9], "z: got (1, 4, 8, 8), expected a tensor (1, C, 8, 9)"),
    ]:
        assert message in refused(Recording, written("minisd_recording", {name: value}))


def test_queries_come_with_their_keys(files, written):
    names = [name for name in files["minisd_recording"][2] if name[-2:] in (".q", ".k")]
    assert len(names) == 2
    for name in names:
        told = refused(Recording, written("minisd_recording", {}, {name: None}))
        [other] = set(names) - {name}
        assert f"{other} is there without its other half" in told
    q = files["minisd_recording"][2][names[0]]
    for other in (q[:, :, :1], q[..., :1], q[:, :, :, :1]):  # heads, head_dim, positions
        told = refused(Recording, written("minisd_recording", {}, {names[0]: other.contiguous()}))
        assert names[0].rsplit(".", 1)[0] in told and "the same shape" in told


@both
@pytest.mark.parametrize("part", ["start", "end", "middle"])
def test_damaged_files(files, tmp_path, format, part):
    """Cut off anywhere, or with a byte changed: refused, or read as something that fits."""
    contents = files[format][0].read_bytes()
    header = 8 + struct.unpack("<Q", contents[:8])[0]
    path, rng = tmp_path / "a.safetensors", random.Random(part)
    for _ in range(40):
        if part == "end":
            path.write_bytes(contents[: rng.randrange(len(contents))])
            assert "cannot be read as safetensors" in refused(KINDS[format], path)
            continue
        damaged = bytearray(contents)
        damaged[rng.randrange(8, header) if part == "start" else rng.randrange(len(contents))] = (
            rng.randrange(256)
        )
        path.write_bytes(damaged)
        try:
            KINDS[format].load(path)
        except ValueError as error:
            assert str(path) in str(error)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**30, 2**63, 0.5, float("nan"), "", "a", "ddim", "null-text", [8, 8]])
    | st.lists(st.integers(0, 9), max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
SHAPES = st.lists(st.integers(0, 2), max_size=5) | st.sampled_from(
    [[2, 1, 2, 16, 77], [2, 1, 2, 16, 8], [1, 4, 8, 8], [3, 1, 4, 8, 8], [2, 1, 77, 24], [2]]
)
DTYPES = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]
    + [torch.float8_e5m2, torch.complex64, torch.uint16]
)
NAMES = st.sampled_from(
    ["t", "z", "latents", "trajectory", "uncond", "losses"] + ["a", "a.p", "a.q", "a.k", ".q", "a."]
)


@both
@settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    fields=st.dictionaries(
        st.sampled_from(["prompt", "prompts", "steps", "skip", "size", "timesteps", "method"])
        | st.sampled_from(["guidance", "b"]),
        VALUES,
        max_size=3,
    ),
    tensors=st.dictionaries(NAMES, st.none() | st.tuples(SHAPES, DTYPES), max_size=3),
    left_out=st.sampled_from(["", "steps", "prompt", "method"]),
)
def test_anything_is_read_or_refused(files, format, fields, tensors, left_out):
    _, own_fields, own_tensors = files[format]
    about = {n: v for n, v in (own_fields | fields).items() if n != left_out}
    contents = dict(own_tensors)
    for name, what in tensors.items():
        contents.pop(name, None)
        if what is not None:
            contents[name] = torch.zeros(what[0], dtype=what[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file(contents, path, {format: json.dumps(about)})
        try:
            loaded = KINDS[format].load(path)
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
            return
        loaded.save(path)
        assert load_file(path).keys() == contents.keys()


@both
def test_a_folder_is_named(files, tmp_path, format):
    assert "cannot be read as safetensors" in refused(KINDS[format], tmp_path)


@both
def test_another_dtype_is_said(files, written, format):
    told = refused(KINDS[format], written(format, {}, {"z": files[format][2]["z"].int()}))
    assert "of another dtype ['z: torch.int32'], not finite []" in told
