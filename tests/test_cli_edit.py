"""`minisd edit` and `minisd heatmap`: what they draw and write, and how they fail."""

import numpy as np
import pytest
from PIL import Image

import minisd

TINY = ["--model", "tiny", "--steps", "3", "--device", "cpu", "--size", "40x24", "--seed", "4"]
SOURCE, SWAP, REFINED = "a cat on my mat", "a dog on my mat", "a sad cat on my mat"


pytestmark = pytest.mark.usefixtures("here")


def pixels(image):
    return np.asarray(Image.open(image) if isinstance(image, str) else image)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "tiny")


def test_edit_writes_the_sheet_and_the_images(minisd_command, here):
    options = [
        "--cross-steps",
        "0.7",
        "--cross-steps",
        "cat=0.2:0.5",
        "--self-steps",
        "0.3:1",
        "--reweight",
        "my=-2",
        "--sheet",
        "s.png",
    ]
    code, out, _ = minisd_command("edit", SOURCE, SWAP, REFINED, *options, "-o", "e.png", *TINY)
    assert code == 0 and out.split() == ["e-0.png", "e-1.png", "e-2.png", "s.png"]
    assert names(here) == ["e-0.png", "e-1.png", "e-2.png", "s.png"]
    sd = minisd.load("tiny", device="cpu")
    how = dict(steps=3, seed=4, height=24, width=40, progress=False)
    edited = dict(cross_steps={"default": 0.7, "cat": (0.2, 0.5)}, self_steps=(0.3, 1))
    images = minisd.edit_prompt(sd, SOURCE, SWAP, REFINED, reweight={"my": -2}, **edited, **how)
    baseline = minisd.seed_baseline(sd, SOURCE, SWAP, REFINED, **how)
    for i, image in enumerate(images):
        assert (pixels(f"e-{i}.png") == pixels(image)).all()
    sheet = minisd.contact_sheet(
        [images[0], baseline[1], images[1], images[0], baseline[2], images[2]],
        [
            SOURCE,
            f"without edit: {SWAP}",
            f"edit: {SWAP}",
            SOURCE,
            f"without edit: {REFINED}",
            f"edit: {REFINED}",
        ],
        3,
    )
    assert (pixels("s.png") == pixels(sheet)).all()


def test_edit_draws_again(minisd_command, draw_again, here):
    """`minisd info` prints the line that drew the image, and it draws the same."""
    options = ["--local-blend", "cat,dog", "--threshold", "0.9"]
    _, out, _ = minisd_command("edit", SOURCE, SWAP, *options, *TINY, "-n", "2")
    files = out.split()
    assert files == [f"minisd-0000{i}.png" for i in range(4)]
    assert not (pixels(files[0]) == pixels(files[2])).all()  # another seed
    code, about, _ = minisd_command("info", files[3])
    assert code == 0
    assert "prompt:          a dog on my mat" in about
    assert "source:          a cat on my mat" in about
    how = f"--local-blend cat,dog --threshold 0.9 {' '.join(TINY[:-2])} --seed 5 -o again.png"
    assert about.splitlines()[-1] == f"minisd edit '{SOURCE}' '{SWAP}' {how}"
    again = draw_again(files[3])
    assert again == ["again-0.png", "again-1.png"]
    assert all((pixels(p) == pixels(old)).all() for p, old in zip(again, files[2:]))


def test_a_sweep_of_the_steps(minisd_command, here):
    """The source, and the target with the source's maps in 0 to 100 % of the steps."""
    code, out, _ = minisd_command(
        "edit", SOURCE, SWAP, "--sweep", "0,0.5,1", "--sheet", "s.png", *TINY
    )
    assert code == 0 and out == "s.png\n"
    images = minisd.edit_prompt(
        minisd.load("tiny", device="cpu"),
        SOURCE,
        SWAP,
        SWAP,
        SWAP,
        steps=3,
        seed=4,
        height=24,
        width=40,
        cross_steps=[0, 0.5, 1],
        progress=False,
    )
    captions = [SOURCE, f"0%: {SWAP}", f"50%: {SWAP}", f"100%: {SWAP}"]
    assert (pixels("s.png") == pixels(minisd.contact_sheet(images, captions, 4))).all()


def test_only_the_sheet(minisd_command, here):
    code, out, _ = minisd_command(
        "edit", SOURCE, "--reweight", "cat=3", "--sheet", "new/s.png", *TINY
    )
    assert code == 0 and out == "new/s.png\n" and names(here) == ["new"]


def test_heatmap(minisd_command, here):
    assert (
        minisd_command(
            "heatmap", SOURCE, "--words", "cat,my mat", "--until", "0.5", "-o", "h.png", *TINY
        )[0]
        == 0
    )
    [image], maps = minisd.heatmap(
        minisd.load("tiny", device="cpu"),
        SOURCE,
        steps=3,
        seed=4,
        height=24,
        width=40,
        until=0.5,
        progress=False,
    )
    assert (pixels("h.png") == pixels(minisd.word_sheet(image, maps, ["cat", "my mat"]))).all()
    assert (
        minisd_command("heatmap", SOURCE, "--tokens", "--sites", "down,up", "-o", "t.png", *TINY)[0]
        == 0
    )
    assert pixels("t.png").shape[1] == 8 * (160 + 6) + 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["edit", SOURCE], "expected at least one target prompt"),
        (
            ["edit", SOURCE, SWAP, "--reweight", "bird=2"],
            "the word 'bird' is not in the prompt, expected one of 'a'",
        ),
        (["edit", SOURCE, SWAP, "--reweight", "dog"], "got 'dog', expected WORD=FACTOR"),
        (
            ["edit", SOURCE, SWAP, "--cross-steps", "dog=often"],
            "got 'often', expected a fraction of the steps or START:END",
        ),
        (
            ["edit", SOURCE, SWAP, "--cross-steps", "2"],
            "cross_steps: got 2.0, expected a fraction from 0 to 1",
        ),
        (["edit", SOURCE, SWAP, "--self-steps", "0:0.5:1"], "got '0:0.5:1'"),
        (["edit", SOURCE, REFINED, "--kind", "replace"], "same number of words, got 5 and 6"),
        (["edit", SOURCE, SWAP, "--subtract", "dog"], "--subtract: expected --local-blend"),
        (
            ["edit", SOURCE, SWAP, "--sweep", "0,half"],
            "got '0,half', expected fractions of the steps",
        ),
        (
            ["edit", SOURCE, SWAP, REFINED, "--sweep", "0,1"],
            "--sweep: expected one target and no --cross-steps, got 2",
        ),
        (
            ["edit", SOURCE, SWAP, "--threshold", "0.5"],
            "--threshold: expected --local-blend with it",
        ),
        (
            ["edit", SOURCE, SWAP, "--threshold", "0.3"],  # its default
            "--threshold: expected --local-blend with it",
        ),
        (
            ["edit", SOURCE, SWAP, "--local-blend", ""],
            "argument --local-blend: got '', expected at least one",
        ),
        (
            ["edit", SOURCE, SWAP, "--local-blend", " ,"],
            "argument --local-blend: got ' ,', expected at least one",
        ),
        (
            ["edit", SOURCE, SWAP, "--sites", ""],
            "argument --cross-sites/--sites: got '', expected at least one",
        ),
        (
            ["edit", SOURCE, SWAP, "--sheet", "x.jpg"],
            "--sheet x.jpg: expected a name that ends in .png",
        ),
        (
            ["edit", SOURCE, SWAP, "--sites", "32x32"],
            "no cross-attention site is picked by '32x32'",
        ),
        (
            ["heatmap", SOURCE, "--tokens", "--words", "cat"],
            "--words: not allowed with argument --tokens",
        ),
        (
            ["heatmap", SOURCE, "--until", "0.3"],
            "until is 0.3 of 3 steps, expected at least the first of them",
        ),
        (["heatmap", SOURCE, "--words", "dog"], "the word 'dog' is not in the prompt"),
    ],
)
def test_errors_are_one_line(minisd_command, here, arguments, message):
    code, out, err = minisd_command(*arguments, *TINY, "-o", "x.png")
    assert code == 2 and out == "" and message in err.splitlines()[-1]
    assert names(here) == []


def test_a_heat_map_of_a_prompt_that_is_cut(minisd_command, here):
    """Its words that were cut have none, which is no reason to lose the image."""
    code, out, err = minisd_command("heatmap", "a cat " * 40 + "and a dog", *TINY, "-o", "x.png")
    assert code == 0 and names(here) == ["x.png"]
    assert "minisd: warning: no map of what was cut from the prompt: 'and', 'dog'" in err
