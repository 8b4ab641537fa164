"""What is in an image of the `shapes` world, read from its pixels alone, and whether a caption is
right about it.

The scorer knows the colour tables and the caption parser of `minisd.training.scenes`, nothing of
how images are drawn:

    background   median colour of the image's edge
    objects      pixels far from that colour (after a 3x3 median), joined into connected components
    colour       vote of the hues inside the object
    shape        ideal mask with the largest intersection over union, both stretched to the
                 object's bounding box
    size         larger side of the bounding box
    texture      does the brightness inside the object oscillate along one axis (striped), both
                 (dotted) or none (plain)

Thresholds are distances in RGB (0..1) and in 1/64 of the image's side, so that the size in pixels
does not matter.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from minisd.training.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Description,
    parse,
)

ATTRIBUTES = ("count", "colour", "shape", "size", "texture", "place", "background", "all")

# From the background's colour: not background. Noise of 0.05 a channel is below 0.1 by the median.
FAR = 0.18
# Of an object's own contrast: where its outline is drawn; dark parts on black have 0.45.
EDGE = 0.25
MIN_AREA = 40.0  # of an object, in (1/64)^2; the smallest drawn is a triangle of 128
THIN = 16.0  # area left after erosion, below which an object is read up to its outline
SMALL, BIG = (11.0, 22.0), (22.0, 33.0)  # sides that read as each size; drawn are 16-18 and 26-28
ARM = 0.38  # half width of a cross's arm, relative to half its side
MATCH = 0.65  # intersection over union with the best shape, below which there is no shape
VOTE = 0.6  # share of the hue votes, below which there is no colour
PERIOD, SWING = 6.25, 0.055  # of a texture, in 1/64; its least amplitude over the bright part
BACKGROUND_NEAR = 0.2  # to a named background; the nearest two, white and pink, are 0.34 apart
CENTER = 7.0  # largest offset from the image's middle, along both axes, that reads as its center


@dataclass(frozen=True, eq=False)
class Found:
    """One object: mask (height, width) bool, holes filled; centre and side of its box in 1/64;
    names or None."""

    mask: np.ndarray
    x: float
    y: float
    side: float
    colour: str | None
    shape: str | None
    size: str | None
    texture: str


@dataclass(frozen=True, eq=False)
class Reading:
    """All objects of an image, largest first, and the name of its background (None: no named
    colour is near)."""

    objects: list[Found]
    background: str | None


# ---- reading


def read(image) -> Reading:
    """Read a PIL image or an array (height, width, 3), uint8 or float in 0..1."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind not in "uf":
        raise ValueError(
            f"expected (height, width, 3) in uint8 or float 0..1, got {pixels.shape} {pixels.dtype}"
        )
    pixels = pixels / 255.0 if pixels.dtype.kind == "u" else pixels.astype(np.float64)
    unit = min(pixels.shape[:2]) / 64
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    behind = np.median(edge, axis=0)
    smooth = _median3(pixels)
    distance = np.linalg.norm(smooth - behind, axis=-1)

    masks = []
    for blob in components(distance > FAR):
        contrast = np.percentile(distance[blob], 90)
        masks += [fill_holes(part) for part in components(blob & (distance > EDGE * contrast))]
    masks = sorted((m for m in masks if m.sum() >= MIN_AREA * unit**2), key=np.sum, reverse=True)
    background = _nearest(behind, BACKGROUNDS, BACKGROUND_NEAR)
    return Reading([_found(mask, pixels, smooth, unit) for mask in masks], background)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected components of a (height, width) bool mask, each a mask of the same shape."""
    rest, parts = mask.copy(), []
    while rest.any():
        seed = np.zeros_like(mask)
        seed.flat[rest.argmax()] = True
        parts.append(_flood(seed, rest))
        rest &= ~parts[-1]
    return parts


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask and all that cannot reach the image's edge without crossing it."""
    outside = np.pad(~mask, 1, constant_values=True)
    seed = np.zeros_like(outside)
    seed[0, 0] = True
    return ~_flood(seed, outside)[1:-1, 1:-1]


def _flood(seed, mask):
    """All of mask that is connected to seed: grow by one pixel in four directions until nothing
    changes."""
    while True:
        grown = seed.copy()
        grown[1:] |= seed[:-1]
        grown[:-1] |= seed[1:]
        grown[:, 1:] |= seed[:, :-1]
        grown[:, :-1] |= seed[:, 1:]
        grown &= mask
        if (grown == seed).all():
            return seed
        seed = grown


def _erode(mask, times):
    """The mask less `times` layers of its outline."""
    for _ in range(times):
        m = np.pad(mask, 1)
        mask = m[1:-1, 1:-1] & m[2:, 1:-1] & m[:-2, 1:-1] & m[1:-1, 2:] & m[1:-1, :-2]
    return mask


def _median3(pixels):
    """3x3 median of each channel: takes the noise and leaves the edges where they are."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    h, w = pixels.shape[:2]
    return np.median([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def _nearest(rgb, table, within):
    """The name in the table (RGB 0..255) nearest to rgb (0..1), or None if none is `within`."""
    distance = {name: np.linalg.norm(rgb - np.array(value) / 255) for name, value in table.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] <= within else None


def _found(mask, pixels, smooth, unit):
    (top, bottom), (left, right) = _span(mask.sum(axis=1), unit), _span(mask.sum(axis=0), unit)
    side = max(bottom - top, right - left) / unit
    core = _erode(mask, round(2 * unit))  # free of what blur has mixed in from the background
    core = core if core.sum() >= THIN * unit**2 else mask
    return Found(
        mask=mask,
        x=float((left + right) / 2 / unit),
        y=float((top + bottom) / 2 / unit),
        side=float(side),
        colour=_colour(smooth[core]),
        shape=_shape(mask[top:bottom, left:right]),
        size="small"
        if SMALL[0] <= side < SMALL[1]
        else "big"
        if BIG[0] <= side <= BIG[1]
        else None,
        texture=_texture(pixels, core),
    )


def _span(counts, unit):
    """First and one past the last row (or column) with more than a few stray pixels, if there is
    any such."""
    used = np.flatnonzero(counts >= 3 * unit)
    used = used if len(used) else np.flatnonzero(counts)
    return used[0], used[-1] + 1


def _hue(rgb):
    """Hue in degrees (0 red, 120 green, 240 blue) and chroma (largest less smallest channel) of
    (..., 3) colours."""
    r, g, b = np.moveaxis(np.asarray(rgb, np.float64), -1, 0)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return hue, np.max(rgb, axis=-1) - np.min(rgb, axis=-1)


def _colour(rgb):
    """The named colour with the most votes: a pixel votes for the nearest hue, with the weight of
    its chroma."""
    names = list(COLOURS)
    hue, chroma = _hue(rgb)
    apart = np.abs((hue[:, None] - _hue(list(COLOURS.values()))[0] + 180) % 360 - 180)
    votes = np.bincount(apart.argmin(axis=1), weights=chroma, minlength=len(names))
    # A gray object has hues too, but hardly any chroma.
    return (
        names[votes.argmax()] if chroma.mean() > 0.15 and votes.max() > VOTE * votes.sum() else None
    )


def _shape(mask):
    """The shape whose ideal outline has the largest intersection over union with the mask, which
    spans its own box.

    A blurred object's mask is its outline moved outwards by some `grow`, so each shape is tried
    with a few: all points whose signed distance from the ideal of side (side - 2 grow) is at most
    `grow`. The triangle stands on the bottom.
    """
    bottom, side = mask.shape[0] / 2, max(mask.shape)
    mask = np.pad(
        mask, [(side - n, side - n) for n in mask.shape]
    )  # room for the ideal where the box is not square
    y, x = (np.arange(n) + 0.5 - n / 2 for n in mask.shape)
    y, x = y[:, None], np.abs(x)
    match = dict.fromkeys(SHAPES, 0.0)
    for grow in (0, 0.02 * side, 0.04 * side, 0.06 * side):
        r, base = side / 2 - grow, bottom - grow
        distance = {
            "circle": np.hypot(x, y) - r,
            "square": np.maximum(x, np.abs(y)) - r,
            "triangle": np.maximum(y - base, (2 * x - (y - base) - 2 * r) / 5**0.5),
            "cross": np.maximum(np.maximum(x, np.abs(y)) - r, np.minimum(x, np.abs(y)) - ARM * r),
        }
        for name, d in distance.items():
            match[name] = max(match[name], (mask & (d <= grow)).sum() / (mask | (d <= grow)).sum())
    name = max(match, key=match.get)
    return name if match[name] >= MATCH else None


def _texture(pixels, core):
    """plain, striped or dotted: does the brightness in an object's core rise and fall along no
    axis, one, or both?

    Least squares of   brightness = c0 + c1 cos(k y) + c2 sin(k y) + c3 cos(k x) + c4 sin(k x)
    with k = 2 pi / PERIOD.
    """
    ys, xs = np.nonzero(core)
    brightness = np.linalg.norm(pixels[core], axis=-1)
    k = 2 * np.pi / (PERIOD * min(core.shape) / 64)
    waves = np.stack(
        [np.ones(len(ys)), np.cos(k * ys), np.sin(k * ys), np.cos(k * xs), np.sin(k * xs)], axis=1
    )
    bright = max(np.percentile(brightness, 90), 0.1)  # a black object is plain, not divided by zero
    _, *c = np.linalg.lstsq(waves, brightness / bright, rcond=1e-3)[0]
    return ("plain", "striped", "dotted")[
        int(np.hypot(c[0], c[1]) > SWING) + int(np.hypot(c[2], c[3]) > SWING)
    ]


# ---- scoring


def score(image, caption: str | Description) -> dict[str, bool | None]:
    """Which attributes of the caption the image has: `judge(read(image), parse(caption))`."""
    return judge(read(image), parse(caption) if isinstance(caption, str) else caption)


def judge(reading: Reading, said: Description) -> dict[str, bool | None]:
    """Attribute -> right, wrong, or None where the caption does not say it; "all" is the
    conjunction of those it says.

    count       as many objects as things said
    colour, shape, size, texture   right for EVERY thing that says it (no texture word says plain);
                wrong for a thing that has no object
    place       the position in the image, or the relation of the two objects (dominant axis between
                the centres of their boxes)

    Which object stands for which thing: the assignment with the most right colours, shapes, sizes
    and textures in sum, and among equals one with the place right. So where attributes disagree
    about who is who, the majority wins.
    """
    missing = max(len(said.things) - len(reading.objects), 0)
    candidates = permutations([*reading.objects, *[None] * missing], len(said.things))
    attributes = max((_compare(objects, said) for objects in candidates), key=lambda pair: pair[0])[
        1
    ]
    result = {"count": len(reading.objects) == len(said.things), **attributes}
    result["background"] = (
        None if said.background is None else reading.background == said.background
    )
    result["all"] = all(right for right in result.values() if right is not None)
    return result


def _compare(objects, said):
    """((number of right attributes, place right), attribute -> bool | None) of one assignment of
    objects to things."""
    right, attributes = 0, {}
    for name in ("colour", "shape", "size", "texture"):
        wanted = [(getattr(thing, name), found) for thing, found in zip(said.things, objects)]
        verdicts = [
            found is not None and getattr(found, name) == want
            for want, found in wanted
            if want is not None
        ]
        right += sum(verdicts)
        attributes[name] = all(verdicts) if verdicts else None
    attributes["place"] = None
    if said.place is not None:
        attributes["place"] = None not in objects and _place(*objects) == said.place
    return (right, bool(attributes["place"])), attributes


def _place(first, second=None):
    """The position of one object, or the relation of the first to the second."""
    dx, dy = (first.x - second.x, first.y - second.y) if second else (first.x - 32, first.y - 32)
    if second is None and max(abs(dx), abs(dy)) < CENTER:
        return "in the center"
    direction = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    table = RELATIONS if second else POSITIONS
    return next((name for name, d in table.items() if d == direction), None)
