"""The scorer of the bundled model: right on rendered scenes, at chance on shuffled captions, strict
on others."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bench.scorer import ATTRIBUTES, components, fill_holes, judge, read, score
from minisd.training.scenes import (
    COLOURS,
    SPLITS,
    Box,
    Description,
    Scene,
    Thing,
    caption,
    parse,
    render,
    sample,
)


def scenes(n, seed):
    rng = random.Random(seed)
    return [sample(rng, SPLITS[i % 3]) for i in range(n)]


def spoil(image, blur, noise, seed):
    """What a small decoder does to a picture: blur (sd in 1/64 of the side) and noise (sd of each
    channel)."""
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(blur * image.width / 64))) / 255
    return np.clip(soft + noise * np.random.default_rng(seed).standard_normal(soft.shape), 0, 1)


def shares(verdicts):
    said, right = Counter(), Counter()
    for verdict in verdicts:
        for name, value in verdict.items():
            if value is not None:
                said[name] += 1
                right[name] += value
    return {name: right[name] / said[name] for name in ATTRIBUTES}


@pytest.fixture(scope="module")
def clean():
    return [(scene, read(render(scene))) for scene in scenes(1000, seed=21)]


def test_right_on_rendered_scenes(clean):
    for name, share in shares(judge(reading, scene.said) for scene, reading in clean).items():
        assert share >= 0.99, (name, share)


@pytest.mark.parametrize("size, n", [(64, 400), (128, 120)])
def test_right_after_blur_and_noise(size, n):
    verdicts = [
        score(spoil(render(s, size), 0.7, 0.05, i), caption(s))
        for i, s in enumerate(scenes(n, seed=22))
    ]
    for name, share in shares(verdicts).items():
        assert share >= 0.99, (name, share)


def test_right_on_rendered_scenes_at_other_sizes():
    for size in (96, 128):
        verdicts = [score(render(s, size), caption(s)) for s in scenes(100, seed=23)]
        assert shares(verdicts)["all"] >= 0.99


def test_wrong_colours_and_low_contrast_are_still_read():
    verdicts = []
    for i, s in enumerate(scenes(200, seed=24)):
        tint = 1 + np.random.default_rng(i).uniform(-0.06, 0.06, 3)
        verdicts.append(
            score(np.clip(0.04 + 0.9 * tint * np.asarray(render(s)) / 255, 0, 1), caption(s))
        )
    for name, share in shares(verdicts).items():
        assert share >= 0.97, (name, share)


def test_at_chance_on_shuffled_captions(clean):
    one, two = ([(s.said, r) for s, r in clean if len(s.said.things) == n] for n in (1, 2))

    def shuffled(pairs):
        n = len(pairs)
        return shares(
            judge(pairs[i][1], pairs[(i + k) % n][0]) for k in range(1, 21) for i in range(n)
        )

    chance = shuffled(one)
    # One of 6 colours, 4 shapes, 2 sizes, 3 textures, 4 backgrounds; the positions are 5, and an
    # unsaid one is random.
    rates = {"colour": 1 / 6, "shape": 1 / 4, "size": 1 / 2, "texture": 1 / 3, "background": 1 / 4}
    for name, expected in rates.items():
        assert abs(chance[name] - expected) < 0.05, (name, chance[name])
    assert abs(chance["place"] - 0.2) < 0.05 and chance["all"] < 0.02 and chance["count"] == 1
    # Two objects may be assigned either way round: 1/36 to twice that for colour, 1/4 to 1/2 for
    # the relation.
    chance = shuffled(two)
    assert 1 / 36 < chance["colour"] < 2 / 36 + 0.01 and 1 / 16 < chance["shape"] < 2 / 16 + 0.02
    assert (
        0.2 < chance["place"] < 0.5
        and abs(chance["background"] - 1 / 4) < 0.05
        and chance["all"] < 0.002
    )


def test_masks_are_the_objects(clean):
    for scene, reading in clean[:100]:
        for thing, box in zip(scene.said.things, scene.boxes):
            alone = Scene(Description((Thing(thing.shape, "red"),)), (box,), "black")
            truth = np.asarray(render(alone))[..., 0] > COLOURS["red"][0] / 2
            ious = [(truth & o.mask).sum() / (truth | o.mask).sum() for o in reading.objects]
            assert max(ious) > 0.75
            found = reading.objects[int(np.argmax(ious))]
            assert (
                abs(found.x - box.x) < 1.5
                and abs(found.y - box.y) < 2
                and abs(found.side - box.side) < 3.5
            )


def picture(*things, background="white"):
    """Things given as (text, x, y, side), drawn without a caption that fits them."""
    said = tuple(parse(text).things[0] for text, *_ in things)
    return render(Scene(Description(said), tuple(Box(*box) for _, *box in things), background))


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a big red circle left of a small striped blue square on a white background", set()),
        ("a small striped blue square right of a big red circle", set()),
        ("a big red circle above a small striped blue square", {"place"}),
        ("a small striped blue square left of a big red circle", {"place"}),
        ("a big blue circle left of a small striped red square", {"colour"}),
        ("a big red square left of a small striped blue circle", {"shape"}),
        ("a small red circle left of a big striped blue square", {"size"}),
        ("a big striped red circle left of a small blue square", {"texture"}),
        (
            "a red circle left of a dotted blue square on a pink background",
            {"texture", "background"},
        ),
        (
            "a red circle left of a striped green square on a gray background",
            {"colour", "background"},
        ),
        ("a big red circle", {"count"}),
        ("a small striped blue square on the left", {"count", "place"}),
    ],
)
def test_each_attribute_is_judged_alone(text, wrong):
    image = picture(("a red circle", 18, 30, 27), ("a striped blue square", 46, 34, 17))
    verdict = score(image, text)
    assert {name for name in ATTRIBUTES[:-1] if verdict[name] is False} == wrong
    assert verdict["all"] == (not wrong)
    assert verdict["size"] is None or "big" in text or "small" in text
    assert (verdict["background"] is None) == ("background" not in text)


def test_missing_and_extra_objects():
    one = picture(("a red circle", 32, 32, 27))
    verdict = score(one, "a red circle left of a blue square")
    assert not any(
        verdict[name] for name in ("count", "colour", "shape", "texture", "place", "all")
    )
    three = picture(
        ("a red circle", 14, 14, 17), ("a blue square", 46, 14, 17), ("a green cross", 32, 46, 17)
    )
    verdict = score(three, "a red circle left of a blue square")
    assert not verdict["count"] and not verdict["all"]
    assert all(verdict[name] for name in ("colour", "shape", "texture", "place"))


def test_what_is_not_of_this_world_has_no_name():
    blank = np.full((64, 64, 3), 255, np.uint8)
    assert read(blank).objects == [] and read(blank).background == "white"
    assert score(blank, "a red circle at the top")["all"] is False
    assert read(np.full((64, 64, 3), (60, 200, 90), np.uint8)).background is None
    gray, halves, bar, black = (blank.copy() for _ in range(4))
    gray[20:44, 20:44] = 120
    halves[20:44, 20:32], halves[20:44, 32:44] = COLOURS["red"], COLOURS["blue"]
    bar[30:34, 8:56] = COLOURS["red"]
    black[20:44, 20:44] = 0
    (gray,), (halves,), (bar,), (black,) = (read(p).objects for p in (gray, halves, bar, black))
    assert gray.colour is None and gray.shape == "square" and gray.texture == "plain"
    assert halves.colour is None
    assert bar.shape is None and bar.size is None
    assert black.colour is None and black.texture == "plain"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert score(noise, "a red circle")["all"] is False


def test_uint8_float_and_pil_are_the_same_picture():
    image = picture(("a dotted purple triangle", 20, 40, 26), background="pink")
    pixels = np.asarray(image)
    readings = [read(p) for p in (image, pixels, pixels / 255, (pixels / 255).astype(np.float32))]
    for r in readings:
        (found,) = r.objects
        assert (found.colour, found.shape, found.size, found.texture, r.background) == (
            "purple",
            "triangle",
            "big",
            "dotted",
            "pink",
        )
    for bad in (pixels[..., 0], pixels.astype(int), np.asarray(image.convert("RGBA"))):
        with pytest.raises(ValueError, match=r"expected \(height, width, 3\)"):
            read(bad)
    with pytest.raises(ValueError, match=r"expected \(height, width, 3\)"):
        read(Image.new("L", (64, 64)))


def test_components_and_holes():
    mask = np.array(
        [[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 0]], bool
    )
    parts = components(mask)
    assert [int(p.sum()) for p in parts] == [3, 12] and (
        sum(parts) == mask
    ).all()  # the corner contact does not join
    filled = fill_holes(mask)
    assert (filled ^ mask).sum() == 1 and filled[3, 2]
