"""Looking at attention: where in the image the words are, and what the self-attention holds
apart.

    heatmap          draw a prompt and keep its mean cross-attention maps, one per word
    word_sheet       the image under each word's map, the word below
    components       principal components of the self-attention, from recorded q and k
    contact_sheet    images side by side, a caption below each

Sources: Hertz et al. 2022 (arXiv 2208.01626), figure 4; Tang et al. 2022 (DAAM, arXiv 2210.04885)
for overlaid words.
"""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options
from ..editing.alignment import find_word
from ..editing.maps import Maps
from ..editing.recording import Recording
from ..editing.sites import Where
from ..recipes import tell
from .images import to_rgb

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

MARGIN, FONT_SIZE = 6, 13  # of contact sheets, in pixels


def heatmap(
    sd: "StableDiffusion",
    prompt: str,
    *,
    where: Where | None = None,
    until: float = 1.0,
    **options: Unpack[Options],
) -> tuple[list[Image.Image], Maps]:
    """Draw a prompt: num_images images and their `Maps`.

    maps.word(word, row, grid=...) is the mean map of a word in image `row`, (h, w). where: the
    cross-attention sites, see `select_sites`; None is all of them. until: maps of the first part of
    the steps only, 0.2 for the first fifth, in which the layout forms. options: see
    `minisd.drawing.Drawing`.
    """
    arguments, drawing = dict(locals()), Drawing.of(options)
    x = drawing.noise(sd, drawing.num_images)
    height, width = (side * sd.vae.factor for side in x.shape[2:])
    sites = sd.unet.sites("cross") if where is None else where
    maps = Maps(sd, [prompt] * len(x), drawing.steps, sites, height, width, until)
    predict = drawing.rule(sd.network, *drawing.embed(sd, [prompt]), drawing.guidance, maps)
    images = sd.decode(drawing.denoise(x, drawing.make_sampler(sd), predict))
    return tell(images, sd, "heatmap", arguments, drawing, [prompt]), maps


def word_sheet(
    image: Image.Image,
    maps: Maps,
    words: Sequence[str] | None = None,
    row: int = 0,
    grid: tuple[int, int] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """The image, and beside it one overlay for each word, with the word below.

    words: None: every word of the row's prompt, without those that were cut, with a warning. grid:
    only the maps of that resolution. Each map is shown between its own least and greatest value.
    """
    words = words_with_maps(maps, row) if words is None else list(words)
    overlays = [overlay(image, maps.word(word, row, grid)) for word in words]
    return contact_sheet([image, *overlays], ["", *words], columns)


def words_with_maps(maps: Maps, row: int = 0) -> list[str]:
    """The words of a row's prompt, each once; those that did not fit into the row have no map: a
    UserWarning names them."""
    prompt = maps.prompts[row]
    words = dict.fromkeys(prompt.split())
    there = [word for word in words if find_word(maps.tokenizer, prompt, word)]
    if cut := [word for word in words if word not in there]:
        named = ", ".join(map(repr, cut))
        warnings.warn(f"no map of what was cut from the prompt: {named:.200}", stacklevel=3)
    return there


def token_sheet(
    image: Image.Image,
    maps: Maps,
    row: int = 0,
    grid: tuple[int, int] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """One overlay for each token, <bos> and <eos> among them, on one scale: 0 to the greatest."""
    own = maps.tokenizer.tokenize(maps.prompts[row])[: maps.tokenizer.max_length - 2]
    tokens = ["<bos>", *own, "<eos>"]
    mean = maps.mean(grid)[row]
    top = mean[:, :, : len(tokens)].max().item()
    overlays = [overlay(image, mean[:, :, i], (0, top)) for i in range(len(tokens))]
    return contact_sheet(overlays, [token.removesuffix("</w>") for token in tokens], columns)


def components(
    sd: "StableDiffusion",
    recording: Recording,
    grid: tuple[int, int] | None = None,
    n: int = 3,
    until: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Principal components of the recorded self-attention, and their singular values.

    Returns (n, h, w), each scaled to 0..1, and (n,).

    A (N, N) = mean over steps, sites and heads of softmax(q k^T / sqrt(D)); the components are the
    first right singular vectors of A less the mean of each row. grid: the queries' grid, None the
    finest one recorded; until: first part of the steps. ValueError if no self-attention of that
    grid was recorded.
    """
    sites = [name.removesuffix(".q") for name in recording.maps if name.endswith(".q")]
    grids = {site: sd.unet.grid(site, recording.size) for site in sites}
    grid = max(grids.values(), default=None) if grid is None else grid
    sites = [site for site in sites if grids[site] == grid]
    if grid is None or not sites:
        known = sorted(set(grids.values()))
        raise ValueError(f"no self-attention of the grid {grid} was recorded, only of {known}")
    steps = max(1, int(until * recording.steps))
    A = torch.zeros((), dtype=torch.float32, device="cpu")
    for i in range(steps):
        for site in sites:
            q, k = (recording.maps[f"{site}.{part}"][i, 0].float() for part in "qk")
            A = A + torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1).mean(0)
    A = A / (len(sites) * steps)
    _, s, v = torch.linalg.svd(A - A.mean(dim=1, keepdim=True))
    v = v[:n]
    low, high = v.amin(1, keepdim=True), v.amax(1, keepdim=True)
    return ((v - low) / (high - low)).unflatten(1, grid), s[:n]


def overlay(
    image: Image.Image,
    heat: Tensor,
    limits: tuple[float, float] | None = None,
    strength: float = 0.65,
) -> Image.Image:
    """The image in grey under a map (h, w), from transparent black by red and yellow to white.

    limits: the values shown as least and greatest (None: the map's own).
    """
    values = heat.detach().float().cpu().numpy()
    low, high = (values.min(), values.max()) if limits is None else limits
    shares = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    grid = Image.fromarray((255 * shares).round().astype(np.uint8))
    image = to_rgb(image)
    level = np.asarray(grid.resize(image.size, Image.Resampling.BICUBIC), np.float64)[..., None]
    hot = np.clip(3 * level / 255 - np.arange(3), 0, 1)  # red rises first, then green, then blue
    grey = np.asarray(image.convert("L"), np.float64)[:, :, None] / 255
    mixed = (1 - strength) * grey + strength * hot
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Pictures of one size in rows of `columns` (None: all in one row, at most 8), each with its
    caption below.

    Pictures smaller than 128 pixels are shown in whole multiples of their size.
    """
    images = [to_rgb(image) for image in images]
    if not images or len({image.size for image in images}) != 1:
        raise ValueError(f"expected images of one size, got {[image.size for image in images]}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions for {len(images)} images")
    columns = min(len(images), 8) if columns is None else columns
    expect.whole_number("columns", columns, 1)
    zoom = math.ceil(128 / max(images[0].size))
    width, height = (side * zoom for side in images[0].size)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(text, font, width) for text in captions or [""] * len(images)]
    foot = max(len(lines) for lines in texts) * (FONT_SIZE + 3)
    rows = math.ceil(len(images) / columns)
    size = columns * (width + MARGIN) + MARGIN, rows * (height + foot + MARGIN) + MARGIN
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(zip(images, texts)):
        x, y = (
            MARGIN + i % columns * (width + MARGIN),
            MARGIN + i // columns * (height + foot + MARGIN),
        )
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + height), "\n".join(lines), "black", font, spacing=2)
    return page


def wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that are not wider than `width` pixels, unless a single letter is; what
    the font has no letter for is escaped, \\u96ea, and shows no empty box."""
    lines: list[str] = []
    for word in text.split():
        shown = "".join(c if has_letter(font, c) else ascii(c)[1:-1] for c in word)
        if lines and font.getlength(f"{lines[-1]} {shown}") <= width:
            lines[-1] += f" {shown}"
            continue
        lines.append("")
        for letter in shown:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def has_letter(font: Any, letter: str) -> bool:
    """Whether a font draws something of its own for a letter."""
    try:
        own, none = font.getmask(letter), font.getmask("\ufffe")  # which stands for no letter
    except UnicodeEncodeError:  # Pillow's font without FreeType
        return False
    return letter.isprintable() and (own.size, bytes(own)) != (none.size, bytes(none))
