"""minisd in a program: images in of every kind, threads, cancelling, logging and warnings."""

import io
import logging
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import minisd

HOW = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def sd(original):
    return minisd.load(original, device="cpu")


def image(height=24, width=40):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def as_bytes(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_images_go_in_as_whatever_there_is(sd, tmp_path):
    picture, path = image(), tmp_path / "in.png"
    picture.save(path)
    values = np.asarray(picture)
    expected = sd.encode_image(picture)
    tensor = 2 * torch.from_numpy(values.copy()).permute(2, 0, 1)[None].float() / 255 - 1
    kinds = [path, str(path), as_bytes(picture), values, values / 255, np.float32(values / 255)]
    for given in kinds:
        assert torch.equal(sd.encode_image(given), expected), type(given)
    assert torch.allclose(sd.encode_image(tensor), expected, atol=1e-5)
    assert torch.equal(sd.encode_image(kinds), expected.expand(len(kinds), -1, -1, -1))
    assert torch.equal(sd.encode_image(np.stack([values] * 2)), expected.expand(2, -1, -1, -1))
    grey = values[..., 0]
    assert torch.equal(sd.encode_image(grey), sd.encode_image(Image.fromarray(grey)))
    mask = np.zeros((24, 40), bool)
    mask[4:20, 8:32] = True
    drawn = [
        minisd.blend(sd, each, m, "a", **HOW)[0].tobytes()
        for each, m in ((picture, mask), (as_bytes(picture), as_bytes(Image.fromarray(mask))))
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"an array of uint8 \(8, 8, 4\)"),
        (np.full((8, 8, 3), 1.5), ValueError, "float64 .* 1.5 to 1.5, expected"),
        (np.full((8, 8, 3), np.nan), ValueError, "floats from 0 to 1"),
        (np.zeros((8, 8, 3), np.int64), ValueError, "an array of int64"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "an array of uint8"),
        (b"no image", ValueError, "an image of 8 bytes cannot be read"),
        ("none.png", FileNotFoundError, "none.png"),
        (7, TypeError, "got a int, expected a PIL image, a file's name or bytes"),
    ],
)
def test_what_is_no_image(sd, given, error, why):
    with pytest.raises(error, match=why):
        sd.img2img(given, "a", **HOW)


def test_threads_draw_what_each_draws_alone(sd):
    """Eight calls of four kinds at once, over one model."""
    calls = [
        lambda: sd.txt2img("a cat", seed=1, **HOW),
        lambda: sd.img2img(image(), "a dog", 0.7, **HOW),
        lambda: minisd.edit_prompt(sd, "a cat", "a dog", **HOW),
        lambda: sd.txt2img(["a", "b"], sampler="ddim", height=16, width=24, **HOW),
    ] * 2
    alone = [[each.tobytes() for each in call()] for call in calls]
    together, start = [None] * len(calls), threading.Barrier(len(calls))

    def run(i):
        start.wait()
        together[i] = [each.tobytes() for each in calls[i]()]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_what_on_step_raises_stops_the_drawing(sd):
    seen = []

    def stop(x, step):
        seen.append(step.index)
        if step.index == 1:
            raise minisd.Cancelled("enough")

    with pytest.raises(minisd.Cancelled, match="enough"):
        sd.txt2img("a", steps=50, on_step=stop, progress=False)
    assert seen == [0, 1]
    assert not issubclass(minisd.Cancelled, ValueError)
    assert issubclass(minisd.CheckpointError, ValueError)
    with pytest.raises(minisd.CheckpointError):
        minisd.load("nothing there")


def test_a_size_far_from_the_models_is_warned_of(sd):
    with pytest.warns(UserWarning, match=r"64 x 64 pixels are 4 times those .*\(32 x 32\)"):
        sd.txt2img("a", height=64, width=64, steps=1, progress=False)
    with pytest.warns(UserWarning, match="16 x 16 pixels are 0.25 times"):
        sd.txt2img("a", height=16, width=16, steps=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.txt2img("a", height=40, width=48, **HOW)


def test_the_logger_and_nothing_else(sd, original, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="minisd"):
        loaded = minisd.load(original, device="cpu")
        loaded.txt2img("a", num_images=2, **HOW)
    lines = [record.getMessage() for record in caplog.records if record.name == "minisd"]
    assert len(lines) == 2 and f"loaded {original} in " in lines[0]
    assert lines[1].startswith("3 steps of 2 latents of 8 x 8 in ")
    assert capsys.readouterr() == ("", "")
    sd.txt2img("a", steps=3)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err


def test_one_import_prints_nothing(original):
    program = f"""
import minisd
sd = minisd.load({str(original)!r}, device="cpu")
assert sd.txt2img("a", steps=1, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
