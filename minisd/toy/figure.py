"""Diffusion in one and two dimensions, drawn: trajectories, densities, the score field."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..sampling.samplers import Step
from ..sampling.schedule import Level, NoiseSchedule
from .mixture import Mixture

COLOURS = ((209, 73, 55), (46, 110, 181), (62, 146, 84), (150, 90, 170), (205, 140, 40))
FINE = 3  # drawn so many times as large and then scaled down, so that lines are smooth
FONT_SIZE = 12
TICKS = (-4, -2, 0, 2, 4)


@dataclass(frozen=True)
class Axes:
    """A rectangle of an image (left, top, right, bottom) and the values (x0, x1), (y0, y1) at its
    sides; y1 is above."""

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]

    def points(self, x: Tensor, y: Tensor) -> list[tuple[float, float]]:
        """The pixels of values."""
        left, top, right, bottom = (side * FINE for side in self.box)
        across = left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)
        down = bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top)
        return list(zip(across.tolist(), down.tolist()))

    def frame(self, pen: ImageDraw.ImageDraw, title: str, ticks: Sequence[int] = ()) -> None:
        """The rectangle's outline, a text above it, and values of x below it."""
        left, top, right, bottom = (side * FINE for side in self.box)
        font = ImageFont.load_default(FONT_SIZE * FINE)
        pen.rectangle((left, top, right, bottom), outline=(150, 150, 150), width=FINE)
        pen.text((left, top - 4 * FINE), title, "black", font, anchor="ls")
        x = torch.tensor(ticks, dtype=torch.float64, device="cpu")
        for tick, (across, _) in zip(ticks, self.points(x, x)):
            pen.line((across, bottom, across, bottom - 4 * FINE), (150, 150, 150), FINE)
            pen.text((across, bottom + 4 * FINE), str(tick), "black", font, anchor="mt")


class Paths:
    """Keeps the first rows of the latent after each step: `denoise(x, ..., after=Paths(x[:100]))`.

    x: (n, 1), where they start.
    """

    def __init__(self, x: Tensor):
        self.latents = [x.clone()]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        self.latents.append(x[: len(self.latents[0])].clone())
        return x

    def stacked(self) -> Tensor:
        """(steps + 1, n)."""
        return torch.stack(self.latents)[..., 0]


def figure(
    data: Mixture, plane: Mixture, schedule: NoiseSchedule, paths: Tensor, t: int
) -> Image.Image:
    """All three, 960 x 660.

    data: in one dimension; plane: in two. paths: (steps + 1, n), trajectories from timestep t to
    the data.
    """
    page = Image.new("RGB", (960 * FINE, 660 * FINE), "white")
    pen = ImageDraw.Draw(page)
    trajectories(pen, (30, 30, 930, 300), data, schedule, paths, t)
    densities(pen, (30, 350, 490, 630), data, schedule, (0, 50, 150, 300, 600, 999))
    field(
        page, (520, 350, 930, 630), plane, schedule.level(200), "the score of a mixture at t = 200"
    )
    # 128 colours: half the size as a file, and no eye tells
    return page.resize((960, 660), Image.Resampling.BOX).quantize(128)


def trajectories(
    pen: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    data: Mixture,
    schedule: NoiseSchedule,
    paths: Tensor,
    t: int,
) -> None:
    """x over the steps, each path in the colour of the component where it ends, and beside them the
    density at the first step and of the data."""
    left, top, right, bottom = box
    reach = 1.1 * paths.abs().max().item()
    title = f"{paths.shape[1]} trajectories from t = {t} to the data"
    axes = Axes((left + 90, top, right - 90, bottom), (0, len(paths) - 1), (-reach, reach))
    steps = torch.arange(len(paths), dtype=torch.float64, device="cpu")
    ends = data.shares(paths[-1, :, None]).argmax(1).tolist()
    for path, end in zip(paths.double().T, ends):
        pen.line(axes.points(steps, path), COLOURS[end % len(COLOURS)], FINE)
    y = torch.linspace(-reach, reach, 400, dtype=torch.float64, device="cpu")
    for sides, q in (((left, left + 90), data.at(schedule.level(t))), ((right - 90, right), data)):
        p = q.log_density(y[:, None]).exp()
        beside = Axes((sides[0], top, sides[1], bottom), (0, 1.1 * p.max().item()), (-reach, reach))
        pen.line(beside.points(p, y), "black", FINE)
        beside.frame(pen, "")
    axes.frame(pen, title)


def densities(
    pen: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    data: Mixture,
    schedule: NoiseSchedule,
    times: Sequence[int],
) -> None:
    """q_t at each of `times`, from dark (the data) to light."""
    x = torch.linspace(-4, 4, 500, dtype=torch.float64, device="cpu")
    curves = [data.at(schedule.level(t)).log_density(x[:, None]).exp() for t in times]
    top = 1.1 * max(curve.max().item() for curve in curves)
    axes = Axes(box, (-4.0, 4.0), (0.0, top))
    for i, curve in reversed(list(enumerate(curves))):
        shade = round(200 * i / max(len(times) - 1, 1))
        pen.line(axes.points(x, curve), (shade, shade, min(255, shade + 55)), FINE)
    axes.frame(pen, f"densities at t = {', '.join(map(str, times))}", TICKS)


def field(
    page: Image.Image,
    box: tuple[float, float, float, float],
    data: Mixture,
    level: Level,
    title: str,
) -> None:
    """The score as arrows, of length proportional to its square root, on the density."""
    q = data.at(level)
    left, top, right, bottom = (round(side) for side in box)
    reach = 4.0, 4.0 * (bottom - top) / (right - left)
    axes = Axes(box, (-reach[0], reach[0]), (-reach[1], reach[1]))
    across, down = (
        torch.linspace(-1, 1, n, dtype=torch.float64, device="cpu")
        for n in ((right - left) // 2, (bottom - top) // 2)
    )
    places = torch.cartesian_prod(-reach[1] * down, reach[0] * across).flip(1)
    p = q.log_density(places).exp().reshape(len(down), len(across))
    shade = (255 - 130 * (p / p.max())).round().to(torch.uint8)
    ground = Image.fromarray(shade.numpy()).convert("RGB")
    page.paste(
        ground.resize(((right - left) * FINE, (bottom - top) * FINE)), (left * FINE, top * FINE)
    )
    pen = ImageDraw.Draw(page)
    starts = torch.cartesian_prod(
        torch.linspace(-0.94, 0.94, 19, dtype=torch.float64, device="cpu") * reach[0],
        torch.linspace(-0.92, 0.92, 13, dtype=torch.float64, device="cpu") * reach[1],
    )
    score = q.score(starts)
    length = score.norm(dim=1, keepdim=True)
    ends = starts + 0.16 * score / length.sqrt().clamp(min=1e-9)
    for start, end in zip(axes.points(*starts.T), axes.points(*ends.T)):
        arrow(pen, start, end)
    axes.frame(pen, title, TICKS)


def arrow(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A line with a head at its end."""
    pen.line((start, end), COLOURS[1], FINE)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    for turn in (2.6, -2.6):
        side = (
            end[0] + 4 * FINE * math.cos(angle + turn),
            end[1] + 4 * FINE * math.sin(angle + turn),
        )
        pen.line((end, side), COLOURS[1], FINE)
