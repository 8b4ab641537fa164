"""`minisd invert` and `minisd edit --image`: what they draw and write, and how they fail."""

import numpy as np
import pytest
from PIL import Image

import minisd

TINY = ["--model", "tiny", "--steps", "3", "--device", "cpu"]
SOURCE, SWAP = "a cat on my mat", "a dog on my mat"
NPI = ["--inversion", "negative-prompt"]
METHODS = ("ddim", "null-text", "negative-prompt", "direct")


@pytest.fixture
def command(minisd_command):
    return minisd_command


@pytest.fixture(autouse=True)
def photograph(here):
    photo().save(here / "photo.png")


def photo():
    rng = np.random.default_rng(0)
    return Image.fromarray(
        rng.integers(0, 256, (25, 34, 3), dtype=np.uint8)
    )  # 32 x 24 is what the VAE takes of it


def inverted(sd, method, images=1):
    inversion = minisd.invert(
        sd, [photo()] * images, SOURCE, steps=3, refine=1, trajectory=True, progress=False
    )
    if method == "null-text":
        return minisd.null_text(sd, inversion, 7.5, inner_steps=2, progress=False)
    if method == "negative-prompt":
        return minisd.negative_prompt_inversion(sd, inversion)
    return minisd.direct_inversion(inversion) if method == "direct" else inversion


def pixels(image):
    return np.asarray(Image.open(image) if isinstance(image, str) else image)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("tiny", "photo.png"))


@pytest.mark.parametrize("method", METHODS)
def test_a_photograph_is_edited_at_once_or_through_a_file(command, here, method):
    own = [
        "--inversion",
        method,
        "--refine",
        "1",
        *(["--inner", "2"] if method == "null-text" else []),
    ]
    code, out, err = command(
        "edit", SOURCE, SWAP, "--image", "photo.png", *own, *TINY, "-o", "e.png"
    )
    assert code == 0 and out.split() == ["e-0.png", "e-1.png"], err
    sd = minisd.load("tiny", device="cpu")
    inversion = inverted(sd, method)
    images = minisd.edit_prompt(sd, SOURCE, SWAP, **inversion.edit_options(sd), progress=False)
    assert images[0].size == (32, 24) and (pixels(images[0]) != pixels(images[1])).any()
    assert all((pixels(f"e-{i}.png") == pixels(image)).all() for i, image in enumerate(images))
    if method == "direct":
        assert (pixels("e-0.png") == pixels(sd.decode(inversion.z)[0])).all()

    code, out, err = command(
        "invert", "photo.png", SOURCE, *own, *TINY, "--save", "p.safetensors", "-o", "r.png"
    )
    assert code == 0 and out.split() == ["p.safetensors", "r.png"], err
    guidance = 1.0 if method == "ddim" else 7.5
    [expected] = minisd.redraw(sd, inversion, guidance=guidance, progress=False)
    assert (pixels("r.png") == pixels(expected)).all()
    assert Image.open("r.png").text["guidance"] == str(guidance)
    assert (
        command("edit", SOURCE, SWAP, "--image", "p.safetensors", *TINY[:2], "-o", "f.png")[0] == 0
    )
    assert (pixels("f-1.png") == pixels("e-1.png")).all() and Image.open("f-1.png").text[
        "steps"
    ] == "3"
    code, about, _ = command("info", "e-1.png")
    assert about.splitlines()[-1].startswith(
        f"minisd edit '{SOURCE}' '{SWAP}' --image photo.png --inversion {method}"
    )


def test_edit_by_the_prompt_alone_with_a_trace(command, here):
    command("invert", "photo.png", SOURCE, *TINY, "--save", "p.safetensors", "-o", "r.png")
    code, out, _ = command(
        "invert", "p.safetensors", SWAP, "--guidance", "3", "--trace", "t", *TINY, "-o", "s.png"
    )
    assert code == 0 and out == "s.png\n"
    sd = minisd.load("tiny", device="cpu")
    inversion = minisd.invert(sd, photo(), SOURCE, steps=3, progress=False)
    [expected] = minisd.redraw(sd, inversion, SWAP, guidance=3.0, progress=False)
    assert (pixels("s.png") == pixels(expected)).all()
    assert len(list((here / "t").glob("step_*.png"))) == 3
    assert (pixels(str(sorted((here / "t").glob("step_*.png"))[-1])) == pixels("s.png")).all()


def test_a_size_and_the_sheet(command, here):
    options = [
        "--image",
        "photo.png",
        "--size",
        "40x24",
        "--sheet",
        "s.png",
        "--local-blend",
        "cat,dog",
    ]
    code, out, _ = command("edit", SOURCE, SWAP, *options, *TINY, "-o", "e.png")
    assert code == 0 and names(here) == ["e-0.png", "e-1.png", "s.png"]
    assert Image.open("e-1.png").size == (40, 24)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["edit", SOURCE, SWAP, "--inversion", "direct"], "--inversion: expected --image with it"),
        (["edit", SOURCE, SWAP, "--image", "photo.png", "-n", "2"], "expected -n 1"),
        (
            ["edit", SOURCE, SWAP, "--image", "photo.png", "--sampler", "dpm++"],
            "expected -n 1 and --sampler ddim",
        ),
        (
            ["edit", SOURCE, SWAP, "--image", "nothing.png"],
            "No such file or directory: 'nothing.png'",
        ),
        (["edit", SOURCE, SWAP, "--image", "notes.txt"], "notes.txt cannot be read as "),
        (
            ["edit", SOURCE, SWAP, "--image", "notes.safetensors"],
            "notes.safetensors cannot be read as safetensors",
        ),
        (
            ["edit", SWAP, SOURCE, "--image", "p.safetensors"],
            "was inverted by 'a cat on my mat': give that as SOURCE",
        ),
        (
            ["edit", SOURCE, SWAP, "--image", "p.safetensors", "--refine", "2"],
            "p.safetensors is an inversion already",
        ),
        (
            ["invert", "photo.png", SOURCE, "--inversion", "null-text", "--guidance", "1"],
            "--guidance 1: null-text has",
        ),
        (["invert", "photo.png", SOURCE, "--save", "x.pt"], "that ends in .safetensors"),
        (
            ["invert", "photo.png", SOURCE, "--save", "notes.txt/x.safetensors"],
            "--save notes.txt/x.safetensors: ",
        ),
        (["invert", "photo.png", SOURCE, "--save", "d.safetensors"], "expected the name of a file"),
        (
            ["invert", "photo.png", SOURCE, "--seed", "5"],
            "--seed: an inverted image is drawn from its own noise",
        ),
        (
            ["invert", "photo.png", SOURCE, "--inner-steps", "3"],
            "--inner-steps: expected --inversion null-text with it",
        ),
        (
            ["invert", "photo.png", SOURCE, "--negative", "a"],
            "--negative-prompt: it has no effect at --guidance 1",
        ),
        (
            ["invert", "photo.png", SOURCE, *NPI, "--negative", "a"],
            "--negative-prompt: a negative-prompt inversion has",
        ),
        (
            ["invert", "p.safetensors", SOURCE, "--steps", "9"],
            "--steps: p.safetensors was inverted in 3 steps",
        ),
        (
            ["edit", SOURCE, SWAP, "--image", "p.safetensors", "--steps", "50"],  # the default
            "--steps: p.safetensors was inverted in 3 steps",
        ),
        (
            ["invert", "photo.png", SOURCE, "--seed", "0"],
            "--seed: an inverted image is drawn from its own noise",
        ),
        (
            ["invert", "direct.safetensors", SWAP],
            "by minisd edit --image direct.safetensors SOURCE TARGET",
        ),
        (
            ["invert", "direct.safetensors", SOURCE, "--guidance", "3"],
            "--guidance: a direct inversion comes back",
        ),
        (
            ["edit", SOURCE, SWAP, "--image", "null-text.safetensors", "--guidance", "3"],
            "was made for guidance 7.5",
        ),
        (
            ["edit", SOURCE, SWAP, "--image", "null-text.safetensors", "--negative", "a"],
            "--negative-prompt: a null-text inv",
        ),
        (
            ["edit", SOURCE, SWAP, "--image", "two.safetensors"],
            "two.safetensors holds 2 images, expected one",
        ),
        (["invert", "photo.png", SOURCE, "--refine", "-1"], "got -1, expected at least 0"),
        (["invert", "photo.png", SOURCE, "--inversion", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(command, here, arguments, message):
    (here / "notes.txt").write_text("no image")
    (here / "notes.safetensors").write_text("no tensors, but more than eight bytes of text")
    (here / "d.safetensors").mkdir()
    methods = {
        "p.safetensors": "ddim",
        "direct.safetensors": "direct",
        "null-text.safetensors": "null-text",
    }
    for name in methods.keys() & set(arguments):
        inverted(minisd.load("tiny", device="cpu"), methods[name]).save(name)
    if "two.safetensors" in arguments:
        inverted(minisd.load("tiny", device="cpu"), "ddim", images=2).save("two.safetensors")
    before = names(here)
    code, out, err = command(arguments[0], *TINY, "-o", "x.png", *arguments[1:])
    assert code == 2 and out == "" and message in err.splitlines()[-1], err
    assert names(here) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["edit", SOURCE, SWAP, "--cross-steps", "bird=1"], "the word 'bird' is not in the prompt"),
        (
            ["edit", SOURCE, SWAP, "--cross-steps", "1.5"],
            "cross_steps: got 1.5, expected a fraction from 0 to 1",
        ),
        (["edit", SOURCE, SWAP, "--local-blend", "bird"], "the word 'bird' is not in the prompt"),
        (
            ["edit", SOURCE, SWAP, "--sites", "32x32", "--size", "40x24"],
            "no cross-attention site is picked by '32x32'",
        ),
        (["edit", SOURCE], "expected at least one target prompt"),
        (
            ["edit", SOURCE, SWAP, "--inversion", "null-text", "--guidance", "nan"],
            "got nan, expected a finite number",
        ),
        (
            ["edit", SOURCE, SWAP, "--inversion", "null-text", "--guidance", "1"],
            "--guidance 1: null-text has no",
        ),
        (["edit", SOURCE, SWAP, "--sheet", "notes.png/s.png"], "--sheet notes.png/s.png: "),
    ],
)
def test_what_does_not_fit_is_refused_before_the_inversion(
    command, here, monkeypatch, arguments, message
):
    (here / "notes.png").write_text("no folder")
    monkeypatch.setattr(
        "minisd.editing.inversion.invert", lambda *_, **__: pytest.fail("it was inverted")
    )
    code, out, err = command(
        arguments[0], *TINY, "--image", "photo.png", "-o", "x.png", *arguments[1:]
    )
    assert code == 2 and out == "" and message in err.splitlines()[-1], err
    assert names(here) == ["notes.png"]


def test_a_guidance_of_0_that_is_stored_is_kept(command, here):
    inversion = minisd.invert(
        sd := minisd.load("tiny", device="cpu"), photo(), SOURCE, steps=3, trajectory=True
    )
    minisd.null_text(sd, inversion, 0.0, inner_steps=0).save("p.safetensors")
    assert command("invert", "p.safetensors", SOURCE, *TINY, "-o", "r.png")[0] == 0
    assert Image.open("r.png").text["guidance"] == "0.0"


def test_ctrl_c_leaves_nothing_behind(command, here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minisd.editing.null_text.Objective.gradient", interrupted)
    arguments = ["--inversion", "null-text", "--save", "new/p.safetensors", "-o", "new/r.png"]
    code, _, err = command("invert", "photo.png", SOURCE, *arguments, *TINY)
    assert code == 130 and "interrupted" in err and names(here) == []
