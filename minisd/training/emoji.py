"""A world of real drawings: emoji of three sets, and the stage that trains a model on them.

    CAPTION = a|an THING, STYLE style                    a red apple, noto style

The drawings are npm packages of SVG, and are not bundled:

    npm install --prefix ICONS @iconify-json/{noto,twemoji,fluent-emoji-flat}

Noto Emoji (Google, Apache-2.0), Twemoji (Twitter, CC-BY-4.0), Fluent Emoji Flat (Microsoft, MIT). A
thing is what all three draw under one name, of the categories in THINGS. Of every third thing one
style is held out: whether a model draws it tells whether thing and style were learned apart.

    python -m minisd.training emoji --icons ICONS --run RUN --to FOLDER
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoints.load import load_parts, locate
from ..files import atomic_write
from ..models.tokenizer import CLIPTokenizer, build_vocabulary
from ..models.vae import AutoencoderKL
from .data import encode
from .export import export
from .recipes import RECIPES, Hyperparameters, Recipe
from .stages import Trained, fit_autoencoder, fit_diffusion, fit_text

SETS = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}  # style -> package
THINGS = ("Animals & Nature", "Food & Drink")  # categories of noto's metadata
HELD_OUT = 3  # of the things one in so many lacks a style

SMALL = RECIPES["small"]
# The networks of `shapes`, from whose weights autoencoder and UNet start, at half its side, so that
# a CPU core has something to show in an hour. The pool is all drawings.
EMOJI = replace(
    SMALL,
    image_size=32,
    vae=replace(SMALL.vae, sample_size=32),
    unet=replace(SMALL.unet, sample_size=8),
    autoencoder=Hyperparameters(steps=500, batch=16, lr=2e-3, pool=0, ema=0.98),
    text_encoder=Hyperparameters(steps=300, batch=8, lr=2e-3, pool=0, ema=0.98),
    diffusion=Hyperparameters(steps=6000, batch=16, lr=1e-3, pool=0, ema=0.998),
    layout_weight=0.0,
    summary_weight=0.0,
    faint_share=0.0,
)


@dataclass(frozen=True)
class Drawing:
    """One drawing of one thing: its SVG, 64 x 64 or any other size."""

    thing: str
    style: str
    svg: str

    @property
    def caption(self) -> str:
        article = "an" if self.thing[0] in "aeiou" else "a"
        return f"{article} {self.thing.replace('-', ' ')}, {self.style} style"

    @property
    def split(self) -> str:
        return "heldout" if self.style == held_out_style(self.thing) else "train"


def held_out_style(thing: str) -> str | None:
    """The style of a thing that training never shows, by a hash of its name; None: it shows all."""
    digest = int.from_bytes(hashlib.sha256(thing.encode()).digest()[:8])
    styles = tuple(SETS)
    return styles[digest // HELD_OUT % len(styles)] if digest % HELD_OUT == 0 else None


def read_drawings(icons: Path) -> list[Drawing]:
    """The drawings of all things, a thing's styles side by side; icons: the folder of npm.

    FileNotFoundError without a package, ValueError for a set that has none of the things.
    """
    folders = {style: icons / "node_modules/@iconify-json" / name for style, name in SETS.items()}
    sets = {style: read_json(folder / "icons.json") for style, folder in folders.items()}
    categories = read_json(folders["noto"] / "metadata.json")["categories"]
    named = {name for category in THINGS for name in categories.get(category, ())}
    things = sorted(named.intersection(*(each["icons"] for each in sets.values())))
    if not things:
        raise ValueError(f"{icons}: the sets have no thing of {', '.join(THINGS)} in common")
    return [Drawing(thing, style, svg(sets[style], thing)) for thing in things for style in SETS]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def svg(icons: dict[str, Any], name: str) -> str:
    """An icon of a set as an SVG file: iconify has its body, and its box apart."""
    icon = icons["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}  # iconify's
    box = (icon.get(key, icons.get(key, value)) for key, value in defaults.items())
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    square = 'width="1" height="1"'  # in which a box of other sides is centred
    return f'<svg {space} {square} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'


def render(drawing: Drawing, size: int) -> Image.Image:
    """RGB on white, size x size pixels, by resvg; ModuleNotFoundError without the package."""
    try:
        resvg: Any = import_module("resvg_py")
    except ModuleNotFoundError as error:
        package = "expected the package resvg-py, which renders SVG: pip install resvg-py"
        raise ModuleNotFoundError(package) from error
    png = resvg.svg_to_bytes(svg_string=drawing.svg, width=size, height=size, background="white")
    return Image.open(BytesIO(bytes(png))).convert("RGB")


def words(drawings: list[Drawing]) -> Iterator[str]:
    """Every word of the captions, and the comma."""
    found = {word for each in drawings for word in re.findall(r"\w+|[^\w\s]", each.caption)}
    yield from sorted(found)


def make_tokenizer(drawings: list[Drawing]) -> CLIPTokenizer:
    """The tokenizer of this world: CLIP's layout, one token for each word of the captions."""
    return CLIPTokenizer(*build_vocabulary(words(drawings)))


def train_emoji(recipe: Recipe, icons: Path, run: Path, seed: int, device: torch.device) -> None:
    """Autoencoder, text and diffusion, one after the other, each from where it stopped.

    The losses are those of the scenes. Autoencoder and UNet start from the bundled `shapes`, where
    the recipe has its sizes, and the text encoder from nothing: its words are others.
    """
    drawings = read_drawings(icons)
    tokenizer = make_tokenizer(drawings)
    shown = [each for each in drawings if each.split == "train"]
    arrays = [np.asarray(render(each, recipe.image_size)) for each in shown]
    images, captions = torch.from_numpy(np.stack(arrays)), [each.caption for each in shown]
    shapes = load_parts(locate("shapes"), torch.device("cpu"), torch.float32)

    vae = AutoencoderKL(recipe.vae)
    vae.load_state_dict(shapes.vae.state_dict())
    fit_autoencoder(vae, images, recipe, run, seed, device)
    fit_text(captions, tokenizer, recipe, run, seed, device)
    path = run / "pool.pt"
    if not path.exists():
        vae.load_state_dict(torch.load(run / "autoencoder.pt", map_location=device)["average"])
        boxes = torch.zeros(len(images), 2, 3, dtype=torch.float32, device="cpu")
        pool = encode(vae, images, tokenizer(captions), boxes, device)
        with atomic_write(path) as temporary:
            torch.save(pool, temporary)
    model = Trained(recipe, tokenizer, seed)
    model.unet.load_state_dict(shapes.unet.state_dict())
    pool = torch.load(path, map_location="cpu")
    fit_diffusion(model, pool, tokenizer, recipe, run, seed, device)


def export_emoji(recipe: Recipe, icons: Path, run: Path, folder: Path) -> None:
    """What the run has learned as a folder that `minisd.load` takes; see `export`."""
    export(recipe, run, folder, make_tokenizer(read_drawings(icons)))
