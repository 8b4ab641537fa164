"""`minisd blend` and `minisd erase`: what they draw and write, and how they fail."""

import shlex
from functools import partial

import numpy as np
import pytest
from PIL import Image

import minisd

TINY = ["--model", "tiny", "--steps", "3", "--device", "cpu", "--seed", "4"]
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
MASK = np.zeros((24, 40), np.uint8)
MASK[4:20, 8:30] = 255


@pytest.fixture(autouse=True)
def files(here):
    Image.fromarray(IMAGE).save("in.png")
    Image.fromarray(MASK).save("mask.png")
    Image.new("L", (40, 24)).save("black.png")
    Image.new("L", (24, 40), "white").save("tall.png")
    (here / "cut.png").write_bytes((here / "in.png").read_bytes()[:500])


def pixels(image):
    return np.asarray(Image.open(image) if isinstance(image, str) else image)


def test_blend(minisd_command):
    given = ["blend", "in.png", "mask.png", "a cat"]
    assert minisd_command(*given, "--feather", "1", "-o", "b.png", *TINY)[:2] == (0, "b.png\n")
    sd, image = minisd.load("tiny", device="cpu"), Image.fromarray(IMAGE)
    [expected] = minisd.blend(
        sd, image, "mask.png", "a cat", steps=3, seed=4, feather=1, progress=False
    )
    assert (pixels("b.png") == pixels(expected)).all()
    assert (pixels("b.png")[MASK == 0] == IMAGE[MASK == 0]).all() and (
        pixels("b.png") != IMAGE
    ).any()
    code, about, _ = minisd_command("info", "b.png")
    line = f"minisd blend in.png mask.png 'a cat' --feather 1 {' '.join(TINY)} -o again.png"
    assert code == 0 and about.splitlines()[-1] == line
    assert (
        "mask:            mask.png" in about
        and "image_sha256:" in about
        and "mask_sha256:" in about
    )
    minisd_command(*given, "--no-paste-back", "--strength", "1", "-o", "bare.png", *TINY)
    assert (pixels("bare.png")[MASK == 0] != IMAGE[MASK == 0]).any(axis=-1).mean() > 0.9


def test_blend_with_traces(minisd_command, here):
    trace = ["--trace", "steps", "--trace-every=1", "--trace-format", "gif", "--trace-preview"]
    given = ["-o", "b.png", *TINY, "--", "in.png", "mask.png", "--trace"]
    assert minisd_command("blend", *trace, *given)[0] == 0
    names = sorted(path.name[:9] for path in (here / "steps").glob("step_*.png"))
    assert names == ["step_0001", "step_0002"]  # strength 0.95 of 3 steps
    line = minisd_command("info", "b.png")[1].splitlines()[-1]
    options, texts = [*TINY, "-o", "again.png"], given[given.index("--") :]
    # The folder of the trace is not empty any more.
    assert shlex.split(line) == ["minisd", "blend", *options, *texts]
    assert minisd_command(*shlex.split(line)[1:])[0] == 0


def test_erase(minisd_command):
    options = ["--image", "in.png", "--strength", "0.7", "--erase-scale", "4,-2", "--sega"]
    options += ["--warmup", "2", "--threshold", "0.6", "--momentum", "0.3"]
    assert minisd_command("erase", "a cat", "a hat", "a mat", *options, "-o", "e.png", *TINY)[
        :2
    ] == (0, "e.png\n")
    sd = minisd.load("tiny", device="cpu")
    run = partial(minisd.erase_concepts, sd, steps=3, seed=4, progress=False)
    guide = partial(minisd.sega, threshold=0.6, warmup=2, momentum=0.3)
    [expected] = run(Image.fromarray(IMAGE), "a cat", ["a hat", "a mat"], 0.7, [4, -2], guide=guide)
    assert (pixels("e.png") == pixels(expected)).all()
    code, about, _ = minisd_command("info", "e.png")
    assert code == 0 and "image:           in.png" in about
    assert about.splitlines()[-1].startswith(
        "minisd erase 'a cat' 'a hat' 'a mat' --image in.png --strength 0.7"
    )
    given = ["a cat", "a hat", "--size", "40x24", "--negative", "a", "--guidance", "1"]
    assert minisd_command("erase", *given, "-o", "n.png", *TINY)[0] == 0
    how = dict(height=24, width=40, negative_prompt="a", guidance=1)  # there it has an effect
    assert (pixels("n.png") == pixels(run(None, "a cat", "a hat", **how)[0])).all()
    assert (
        pixels("n.png") != pixels(run(None, "a cat", "a hat", **how | {"negative_prompt": ""})[0])
    ).any()


BLEND, ERASE = ["blend", "in.png", "mask.png", "a"], ["erase", "a", "b"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["blend", "in.png", "black.png", "a"], "the mask has no white"),
        (["blend", "in.png", "tall.png", "a"], "the mask has 24 x 40 pixels, the "),
        (["blend", "in.png", "none.png", "a"], "none.png"),
        (["blend", "cut.png", "mask.png", "a"], "cut.png cannot be read as "),
        (["blend", "in.png", "cut.png", "a"], "cut.png cannot be read as "),
        ([*BLEND, "--strength", "2"], "strength is 2.0, expected a number from 0 to 1"),
        ([*BLEND, "--feather", "-1"], "feather is -1"),
        ([*BLEND, "--no-paste-back", "--feather", "3"], "not allowed with argument --no-paste"),
        ([*BLEND, "--guidance", "1", "--negative", "b"], "--negative-prompt: it has no effect at"),
        (["erase", "a", ""], "got the concepts [''], expected at least one text, each saying"),
        ([*BLEND, "--no-paste-back", "--feather", "0"], "not allowed with argument --no-paste"),
        ([*ERASE, "--threshold", "0.5"], "--threshold: expected --sega with it"),
        ([*ERASE, "--threshold", "0.9"], "--threshold: expected --sega with it"),  # the default
        ([*ERASE, "--warmup", "10"], "--warmup: expected --sega with it"),
        ([*ERASE, "--sega"], "--warmup 10: expected less than --steps 3, or nothing is erased"),
        ([*ERASE, "--erase-scale", "1,inf"], "--erase-scale: got inf, expected a finite number"),
        (["erase", "a"], "the following arguments are required: concept"),
        ([*ERASE, "--strength", "0.5"], "--strength: expected --image with it"),
        ([*ERASE, "--erase-scale", "1,2"], "erase_scale is [1.0, 2.0], expected one weight or one"),
        ([*ERASE, "--erase-scale", "much"], "got much, expected a finite number"),
        ([*ERASE, "--image", "mask"], "mask"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(minisd_command, here, arguments, message):
    before = sorted(here.iterdir())
    code, out, err = minisd_command(*arguments, *TINY, "-o", "x.png")
    assert (
        code == 2 and out == "" and len(err.splitlines()) <= 2 and message in err.splitlines()[-1]
    )
    assert sorted(here.iterdir()) == before
