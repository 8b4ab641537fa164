"""The commands of the methods on attention: they draw what the functions draw, their images can be
drawn again, and what they can know is wrong they say before anything is drawn."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

import minisd
from minisd.editing.blended import read_mask
from minisd.viewing.visualize import word_sheet

TINY = ["--model", "tiny", "--seed", "4", "--steps", "3"]
HOW = {"seed": 4, "steps": 3, "progress": False}


@pytest.fixture
def sd(here):
    """The model tiny/; in the folder are image.png, left.png and right.png."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC).save("image.png")
    for name, side in (("left.png", slice(16)), ("right.png", slice(16, 32))):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, side] = 255
        Image.fromarray(mask).save(name)
    return minisd.load("tiny", device="cpu")


def regional(sd):
    regions = {"a cat": read_mask("left.png"), "a dog": read_mask("right.png")}
    return minisd.regional(sd, "on a mat", regions, **HOW)


def sheet(sd):
    [image], maps = minisd.heatmap(sd, "a cat", **HOW)
    return [word_sheet(image, minisd.daam(maps))]


REGIONS = ["--region", "a cat", "left.png", "--region", "a dog", "right.png"]
COMMANDS = {
    "masactrl": (
        ["masactrl", "a cat", "a dog", "--start", "1", "--first", "0"],
        lambda sd: minisd.masactrl(sd, "a cat", "a dog", start=1, first=0, **HOW),
    ),
    "plug-and-play": (
        ["pnp", "a cat", "a dog", "--self-steps", "0.4"],
        lambda sd: minisd.plug_and_play(sd, "a cat", "a dog", self_steps=0.4, **HOW),
    ),
    "freeu": (
        ["txt2img", "a cat", "--freeu", "1.5,0.5"],
        lambda sd: sd.txt2img(
            "a cat", rule=partial(minisd.cfg, edits=minisd.freeu(sd.unet, (1.5,), (0.5,))), **HOW
        ),
    ),
    "seg": (
        ["img2img", "image.png", "a cat", "--seg", "2"],
        lambda sd: sd.img2img(
            Image.open("image.png"), "a cat", rule=partial(minisd.seg, seg_scale=2), **HOW
        ),
    ),
    "deep cache": (
        ["txt2img", "a cat", "--deep-cache", "2"],
        lambda sd: sd.txt2img(
            "a cat", rule=partial(minisd.deep_cache, unet=sd.unet, every=2), **HOW
        ),
    ),
    "excite": (
        ["excite", "a cat", "cat", "--scale", "3", "--refinements", "1"],
        lambda sd: minisd.attend_and_excite(sd, "a cat", "cat", scale=3, refinements=1, **HOW),
    ),
    "regional": (["regional", "on a mat", *REGIONS], regional),
    "diffedit": (
        ["diffedit", "image.png", "a cat", "a dog", "--noises", "2", "--strength", "0.7"],
        lambda sd: minisd.diffedit(
            sd, Image.open("image.png"), "a cat", "a dog", noises=2, strength=0.7, **HOW
        ),
    ),
    "style": (
        ["style", "a cat", "a dog", "a mat"],
        lambda sd: minisd.style_aligned(sd, "a cat", "a dog", "a mat", **HOW),
    ),
    "weights": (
        ["txt2img", "a (cat:2)", "--weights", "bias"],
        lambda sd: minisd.long_prompt(sd, "a (cat:2)", "bias", **HOW),
    ),
    "daam": (["heatmap", "a cat", "--daam"], sheet),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_draw_what_the_functions_draw(sd, minisd_command, draw_again, name):
    arguments, function = COMMANDS[name]
    code, out, err = minisd_command(*arguments, *TINY, "-o", "x.png")
    assert code == 0, err
    expected, files = function(sd), out.splitlines()
    assert len(files) == len(expected)
    for file, image in zip(files, expected):
        assert Image.open(file).tobytes() == image.tobytes()
    again = draw_again(files[-1])
    assert len(again) == len(files) and "again" in again[-1]
    assert Image.open(again[-1]).tobytes() == expected[-1].tobytes()


def test_two_seeds_of_several_images(sd, minisd_command):
    arguments = ["masactrl", "a cat", "a dog", "--start", "1", "-n", "2", "-o", "x.png"]
    code, out, _ = minisd_command(*arguments, *TINY)
    assert code == 0 and out.split() == [f"x-{i}.png" for i in range(4)]
    expected = minisd.masactrl(sd, "a cat", "a dog", start=1, **HOW | {"seed": 5})
    assert [Image.open(f"x-{i}.png").tobytes() for i in (2, 3)] == [e.tobytes() for e in expected]
    assert Image.open("x-3.png").text["prompt"] == "a dog"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["masactrl", "a cat"], "the following arguments are required: target"),
        (["masactrl", "a", "b", "--start", "3"], "start is 3, expected a whole number from 0 to 2"),
        (["masactrl", "a", "b", "--start", "0", "--first", "9"], "first is 9, expected a whole"),
        (["txt2img", "a", "--seg", "2", "--pag", "3"], "--pag: it is a rule of its own, expected"),
        (["txt2img", "a", "--seg", "2", "--freeu", "1,1"], "not allowed with argument"),
        (["txt2img", "a", "--freeu", "1,2,3"], "got 1,2,3, expected as many factors of each"),
        (["txt2img", "a", "--freeu", "1,1,1,1,1,1"], "expected as many of both, 1 to 2"),
        (["pnp", "a", "b", "--self-steps", "2"], "self_steps is 2.0, expected a number"),
        (["excite", "a cat", "bird"], "the word 'bird' is not in the prompt"),
        (["excite", "a cat", "cat", "--until", "2"], "until is 2.0, expected a number from 0 to 1"),
        (["regional", "a"], "the following arguments are required: --region"),
        (["regional", "a", "--region", "b", "no.png"], "no.png"),
        (["regional", "a", *REGIONS[:3], *REGIONS[:3]], "--region: got a text twice"),
        (["diffedit", "image.png", "a", "b", "--threshold", "7"], "threshold is 7.0, expected"),
        (["diffedit", "image.png", "a", "b", "--sampler", "dpm++"], "DiffEdit inverts"),
        (["diffedit", "no.png", "a", "b"], "no.png"),
        (["txt2img", "a (cat:-1)", "--weights", "bias"], "a weight is -1, expected more than 0"),
    ],
)
def test_errors_come_before_the_drawing(sd, minisd_command, monkeypatch, arguments, message):
    from minisd.models.unet import UNet

    monkeypatch.setattr(UNet, "forward", None)
    code, out, err = minisd_command(*arguments, *TINY, "-o", "x.png")
    assert code == 2 and out == "" and message in err.splitlines()[-1]
