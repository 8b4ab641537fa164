"""The world of the bundled model `shapes`: captions of a closed grammar, and images of them.

    CAPTION    = THING [POSITION | RELATION THING] [on a BACKGROUND background]
    THING      = a|an [small|big] [striped|dotted] COLOUR SHAPE
    POSITION   = on the left | on the right | at the top | at the bottom | in the center
    RELATION   = left of | right of | above | below

    a big striped red circle at the top on a gray background
    a big red circle left of a small blue square on a white background

A `Description` is what is said, a `Scene` is what is drawn: `draw` chooses the places, the exact
sides and whatever the caption leaves out, so one caption has many images. Lengths are in 1/64 of
the image's side, y points down.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from PIL import Image, ImageDraw

# name -> RGB of the plain surface; a texture adds DARK times the same RGB, so the hue is kept
COLOURS = {
    "red": (225, 35, 35),
    "orange": (250, 140, 0),
    "yellow": (250, 225, 20),
    "green": (30, 165, 55),
    "blue": (30, 80, 225),
    "purple": (150, 40, 200),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "pink": (250, 185, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "dotted")  # plain has no word
SIZES = {"small": 17.0, "big": 27.0}  # name -> mean side of the bounding box
POSITIONS = {  # name -> direction of the object's centre from the image's centre
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the center": (0, 0),
}
RELATIONS = {  # name -> direction of the first thing from the second
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
# Pairs that no training caption names.
HELD_OUT_PAIRS = (("purple", "triangle"), ("orange", "circle"), ("green", "cross"))
Split = Literal["train", "heldout", "composition"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "composition")

DARK = 0.45
SIDE = 64.0
# To the edge of the image, between two objects, of the bounding box's side.
BORDER, GAP, JITTER = 1.5, 3.0, 1.0
TILT = 0.4  # largest offset across a relation or position, as a share of the distance along it
STRIPE, DOT_PITCH, DOT_RADIUS = 3.0, 6.5, 1.75
SUPERSAMPLE = 4


Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One object as said.

    size: None where the caption does not say it. texture: "plain" where there is no word for it.
    """

    shape: str
    colour: str
    size: str | None = None
    texture: str = "plain"

    def __str__(self) -> str:
        said = (self.size, self.texture, self.colour, self.shape)
        words = [word for word in said if word is not None and word != "plain"]
        return " ".join([_article(words[0]), *words])


@dataclass(frozen=True)
class Description:
    """What a caption says: one thing and perhaps a position, or two and their relation.

    Perhaps a background, too. `str` of it is the caption.
    """

    things: tuple[Thing, ...]
    place: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        first, *second = map(str, self.things)
        phrases = [first, self.place, *second]
        if self.background:
            phrases.append(f"on {_article(self.background)} {self.background} background")
        return " ".join(phrase for phrase in phrases if phrase)


@dataclass(frozen=True)
class Box:
    """Where a thing is drawn: centre and side of its square bounding box, in 1/64 of the image."""

    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """One image: what is said of it, the box of each thing, and the background drawn."""

    said: Description
    boxes: tuple[Box, ...]
    background: str


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# captions


def caption(scene: Scene) -> str:
    """The caption of a scene: `str(scene.said)`."""
    return str(scene.said)


def words() -> list[str]:
    """Every word of the grammar, sorted: the text that a vocabulary for this world has to cover."""
    phrases = [
        *COLOURS,
        *SHAPES,
        *TEXTURES[1:],
        *SIZES,
        *POSITIONS,
        *RELATIONS,
        *BACKGROUNDS,
        "a an on background",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def parse(text: str) -> Description:
    """What a caption says, the inverse of `caption`.

    ValueError where a word does not fit names what was expected there.
    """
    rest = text.split()

    def read(what: str, options: Iterable[str]) -> str:
        if (option := read_if(options)) is not None:
            return option
        got = repr(rest[0]) if rest else "the end of the caption"
        raise ValueError(f"caption {text!r}: expected {what} ({', '.join(options)}), got {got}")

    def read_if(options: Iterable[str]) -> str | None:
        for option in options:
            n = len(option.split())
            if " ".join(rest[:n]) == option:
                del rest[:n]
                return option
        return None

    def thing() -> Thing:
        read("an article", ("a", "an"))
        size, texture = read_if(SIZES), read_if(TEXTURES[1:]) or "plain"
        # An optional word that did not fit shows up here, so the message lists all that could have
        # stood in this place.
        missing = [] if texture != "plain" else [*TEXTURES[1:]] if size else [*SIZES, *TEXTURES[1:]]
        colour = read("a size, texture or colour" if missing else "a colour", [*missing, *COLOURS])
        return Thing(read("a shape", SHAPES), colour, size, texture)

    things = [thing()]
    place = read_if([*POSITIONS, *RELATIONS])
    if place in RELATIONS:
        things.append(thing())
    background = None
    if rest:
        ends = ["on a", "on an"] if place else [*POSITIONS, *RELATIONS, "on a", "on an"]
        read("a background" if place else "a position, relation or background", ends)
        background = read("a background colour", BACKGROUNDS)
        read("the word", ("background",))
    if rest:
        raise ValueError(f"caption {text!r}: expected the end of the caption, got {rest[0]!r}")
    return Description(tuple(things), place, background)


def descriptions() -> Iterator[Description]:
    """Every description of the grammar, one after the other."""
    things = [Thing(*t) for t in product(SHAPES, COLOURS, (None, *SIZES), TEXTURES)]
    for thing, place, background in product(things, (None, *POSITIONS), (None, *BACKGROUNDS)):
        yield Description((thing,), place, background)
    for first, second, relation, background in product(
        things, things, RELATIONS, (None, *BACKGROUNDS)
    ):
        yield Description((first, second), relation, background)


def count_captions() -> int:
    """The number of distinct captions of the grammar (939 600)."""
    things = len(SHAPES) * len(COLOURS) * (1 + len(SIZES)) * len(TEXTURES)
    return (things * (1 + len(POSITIONS)) + things**2 * len(RELATIONS)) * (1 + len(BACKGROUNDS))


def split(text: str | Description) -> Split:
    """Where a caption belongs: not to training if it names a held-out pair or is of the 2 % kept.

    "composition" if it names a pair of HELD_OUT_PAIRS, else "heldout" (2 %, by SHA-256), else
    "train".
    """
    said = parse(text) if isinstance(text, str) else text
    if any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in said.things):
        return "composition"
    number = int.from_bytes(hashlib.sha256(str(said).encode()).digest()[:4])
    return "heldout" if number % 50 == 0 else "train"


# scenes


def describe(rng: random.Random) -> Description:
    """A random description.

    35 % have one thing; the size is left out 20 %, the background 10 %, the position 30 % of the
    time.
    """
    one = rng.random() < 0.35
    things = tuple(
        Thing(
            shape=rng.choice(SHAPES),
            colour=rng.choice(list(COLOURS)),
            size=None if rng.random() < 0.2 else rng.choice(list(SIZES)),
            texture=rng.choice(TEXTURES),
        )
        for _ in range(1 if one else 2)
    )
    place = None
    if not one:
        place = rng.choice(list(RELATIONS))
    elif rng.random() >= 0.3:
        place = rng.choice(list(POSITIONS))
    return Description(things, place, None if rng.random() < 0.1 else rng.choice(list(BACKGROUNDS)))


def draw(said: Description, rng: random.Random) -> Scene:
    """A random scene of the description: boxes in the image, GAP apart, the said axis dominant."""
    sides = [
        SIZES[t.size or rng.choice(list(SIZES))] + rng.uniform(-JITTER, JITTER) for t in said.things
    ]
    if len(sides) == 1:
        centres = [_alone(sides[0], said.place, rng)]
    else:
        assert said.place is not None  # two things have a relation
        centres = _pair(sides[0], sides[1], RELATIONS[said.place], rng)
    boxes = tuple(Box(x, y, side) for (x, y), side in zip(centres, sides))
    return Scene(said, boxes, said.background or rng.choice(list(BACKGROUNDS)))


def _alone(side: float, position: str | None, rng: random.Random) -> Point:
    low, high, middle = BORDER + side / 2, SIDE - BORDER - side / 2, SIDE / 2
    if position is None:
        return rng.uniform(low, high), rng.uniform(low, high)
    if position == "in the center":
        return middle + rng.uniform(-3, 3), middle + rng.uniform(-3, 3)
    along = rng.uniform(11.5, middle - low)  # distance from the middle
    across = rng.uniform(-TILT, TILT) * along
    dx, dy = POSITIONS[position]
    return (middle + dx * along, middle + across) if dx else (middle + across, middle + dy * along)


def _pair(first: float, second: float, direction: Point, rng: random.Random) -> list[Point]:
    if sum(direction) > 0:  # right of, below: the same layout with the two objects swapped
        return _pair(second, first, (-direction[0], -direction[1]), rng)[::-1]
    a, b = sorted(rng.uniform(0, SIDE - 2 * BORDER - GAP - first - second) for _ in range(2))
    along1, along2 = BORDER + a + first / 2, BORDER + first + GAP + b + second / 2
    reach = TILT * (along2 - along1)
    across1 = rng.uniform(BORDER + first / 2, SIDE - BORDER - first / 2)
    low, high = BORDER + second / 2, SIDE - BORDER - second / 2
    across2 = rng.uniform(max(low, across1 - reach), min(high, across1 + reach))
    pair = [(along1, across1), (along2, across2)]
    return pair if direction[0] else [(x, y) for y, x in pair]


def sample(rng: random.Random, split: Split = "train") -> Scene:
    """A random scene whose caption belongs to that split (see `split`)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    while _split(said := describe(rng)) != split:
        pass
    return draw(said, rng)


_split = split  # `sample` has an argument of this name


# images


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels.

    Each is the mean of SUPERSAMPLE x SUPERSAMPLE points.
    """
    unit = size * SUPERSAMPLE / SIDE  # points per 1/64 of the image
    canvas = Image.new("RGB", (size * SUPERSAMPLE,) * 2, BACKGROUNDS[scene.background])
    for thing, box in zip(scene.said.things, scene.boxes):
        side = round(box.side * unit)
        corner = round((box.x - box.side / 2) * unit), round((box.y - box.side / 2) * unit)
        canvas.paste(_surface(thing, side, unit), corner, _outline(thing.shape, side))
    return canvas.reduce(SUPERSAMPLE)


def _outline(shape: str, side: int) -> Image.Image:
    """(side, side) mask: 255 inside the shape, which touches all four edges of the square."""
    mask = Image.new("L", (side, side), 0)
    pen, end = ImageDraw.Draw(mask), side - 1
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, end, end), fill=255)
    elif shape == "triangle":
        pen.polygon(((0, end), (end / 2, 0), (end, end)), fill=255)
    elif shape == "cross":
        near, far = 0.31 * end, 0.69 * end
        pen.rectangle((near, 0, far, end), fill=255)
        pen.rectangle((0, near, end, far), fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")
    return mask


def _surface(thing: Thing, side: int, unit: float) -> Image.Image:
    """(side, side) image of the colour with the texture's dark stripes or dots.

    One of them is in the middle.
    """
    light = COLOURS[thing.colour]
    red, green, blue = light
    dark = round(DARK * red), round(DARK * green), round(DARK * blue)
    surface = Image.new("RGB", (side, side), light)
    pen, middle = ImageDraw.Draw(surface), side / 2
    if thing.texture == "striped":
        half = STRIPE * unit / 2
        for k in range(-4, 5):
            y = middle + k * 2 * STRIPE * unit
            pen.rectangle((0, y - half, side, y + half - 1), fill=dark)
    elif thing.texture == "dotted":
        r = DOT_RADIUS * unit
        for i, j in product(range(-3, 4), repeat=2):
            x, y = middle + i * DOT_PITCH * unit, middle + j * DOT_PITCH * unit
            pen.ellipse((x - r, y - r, x + r, y + r), fill=dark)
    elif thing.texture != "plain":
        raise ValueError(
            f"unknown texture {thing.texture!r}, expected one of {', '.join(TEXTURES)}"
        )
    return surface
