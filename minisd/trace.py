"""Watching a picture form: its latents after each step, decoded, as a fast preview, or three of their channels.

    trace = Trace(sd, every=5, folder="steps")                 # steps/step_0004_t0801.png ...
    sd.txt2img(prompt, on_step=trace)                          # or denoise(x, sampler, predict, after=trace)
    animate(trace.images, "process.webp")
    animate(trace.render(latent_rgb), "latents.webp")

A view is a function z (B, C, h, w) -> B pictures: `sd.decode`, the linear map of `fit_preview(sd)`, or `latent_rgb`.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .images import to_pil, whole
from .samplers import Step

View = Callable[[Tensor], list[Image.Image]]
FORMATS = {
    ".webp": {"format": "WEBP", "quality": 90},
    ".png": {"format": "PNG"},
    ".gif": {"format": "GIF"},
    ".mp4": {},  # not by Pillow
}


class Trace:
    """Keeps what the latents were after each `every`-th step: a callback that changes nothing.

    every: 5 for the 5th, 10th, ... step and the last, or the indices of steps, [0, 12, 24]. view: how latents are shown,
    None for `sd.decode`. folder: also write each picture there at once, as step_INDEX_tTIMESTEP.png.
    steps: the `Step`s kept; latents: x (B, C, h, w) after each, on the CPU; images: a picture of each, in which those of
    a batch stand side by side.
    """

    def __init__(self, sd, every: int | Collection[int] = 1, folder: str | Path | None = None, view: View | None = None):
        if isinstance(every, int) and every < 1:
            raise ValueError(f"every is {every}, expected at least 1, or the indices of steps")
        self.sd, self.every, self.folder, self.view = sd, every, folder, sd.decode if view is None else view
        self.steps: list[Step] = []
        self.latents: list[Tensor] = []
        self.images: list[Image.Image] = []

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if self.wants(step):
            self.steps.append(step._replace(update=None))  # it holds the sampler's history
            self.latents.append(x.detach().to("cpu", copy=True))
            self.images.append(self.show(x, self.view))
            if self.folder is not None:
                with whole(Path(self.folder) / f"step_{step.index:04}_t{step.t:04}.png") as part:
                    self.images[-1].save(part, format="PNG")
        return x

    def wants(self, step: Step) -> bool:
        if not isinstance(self.every, int):
            return step.index in self.every
        return (step.index + 1) % self.every == 0 or step.next.sigma <= self.sd.schedule.clean.sigma

    def render(self, view: View) -> list[Image.Image]:
        """Another view of the latents that were kept."""
        return [self.show(x.to(self.sd.device), view) for x in self.latents]

    def show(self, x: Tensor, view: View) -> Image.Image:
        """The pictures of a batch side by side, each as large as decoded."""
        width, height = (side * self.sd.vae.factor for side in (x.shape[3], x.shape[2]))
        strip = Image.new("RGB", (len(x) * width, height))
        for i, image in enumerate(view(x)):
            strip.paste(image.resize((width, height), Image.Resampling.NEAREST), (i * width, 0))
        return strip


def latent_rgb(z: Tensor) -> list[Image.Image]:
    """The first three channels of latents as red, green and blue, -3 to 3 as 0 to 255: pictures of h x w pixels."""
    return to_pil(z[:, :3] / 3)


class Preview(NamedTuple):
    """A picture of h x w pixels of latents z (B, C, h, w): rgb = z @ weight + bias at each position, in [-1, 1]."""

    weight: Tensor  # (C, 3)
    bias: Tensor  # (3,)

    def __call__(self, z: Tensor) -> list[Image.Image]:
        return to_pil(torch.einsum("bchw,cd->bdhw", z.to(self.weight), self.weight) + self.bias[:, None, None])


def fit_preview(sd, images=None) -> Preview:
    """The linear map from a checkpoint's latents to colours: least squares over the positions of encoded pictures.

        min_{weight, bias} sum |z @ weight + bias - rgb|^2,    z = encode(picture), rgb = means of its factor x factor pixels

    images: pictures of your own, as for `sd.encode_image`; None: eight of random rectangles in random colours. The
    cost is that of encoding them, once; a preview then costs nothing beside a step.
    """
    pictures = rectangles(8, min(256, 32 * sd.vae.factor)) if images is None else images
    pictures = sd.pixels(pictures)
    z = sd.encode_image(pictures).float().permute(0, 2, 3, 1).flatten(0, 2)  # (positions, C)
    rgb = F.avg_pool2d(pictures.float(), sd.vae.factor).permute(0, 2, 3, 1).flatten(0, 2)  # (positions, 3)
    solution = torch.linalg.lstsq(F.pad(z, (0, 1), value=1.0), rgb).solution
    return Preview(solution[:-1], solution[-1])


def rectangles(n: int, side: int) -> Tensor:
    """(n, 3, side, side) in [-1, 1]: on a random colour, sixteen random rectangles of others."""
    generator = torch.Generator().manual_seed(0)
    colours = 2 * torch.rand(n, 17, 3, 1, 1, generator=generator) - 1
    corners = torch.rand(n, 16, 2, 2, generator=generator).mul(side + 1).long().sort(dim=2).values
    pictures = colours[:, 0].repeat(1, 1, side, side)
    for picture, own, boxes in zip(pictures, colours, corners):
        for colour, ((top, left), (bottom, right)) in zip(own[1:], boxes.tolist()):
            picture[:, top:bottom, left:right] = colour
    return pictures


def animate(frames: Sequence[Image.Image], path: str | Path, fps: float = 10.0, hold: float = 1.0) -> None:
    """Write pictures of one size as an animation: .webp, .png (animated) or .gif, shown endlessly, or .mp4.

    fps: pictures per second; hold: seconds that the last one is shown longer. .mp4 needs the extra "video".
    """
    check_animation(path)
    if not frames or len({frame.size for frame in frames}) != 1:
        raise ValueError(f"expected pictures of one size, got {[frame.size for frame in frames]}")
    options = FORMATS[Path(path).suffix.lower()]
    with whole(path) as part:
        if options:
            durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 / fps + 1000 * hold)]
            frames[0].save(part, **options, save_all=True, append_images=frames[1:], duration=durations, loop=0)
        else:
            write_mp4([*frames, *[frames[-1]] * round(hold * fps)], part, fps)


def check_animation(path: str | Path) -> None:
    """ValueError if the name ends in none of FORMATS, ModuleNotFoundError if .mp4 cannot be written here."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    if suffix == ".mp4":
        load_ffmpeg()


def write_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """H.264; sides that are odd are enlarged by one pixel, which the format asks for."""
    writer = load_ffmpeg().write_frames(
        str(path), frames[0].size, fps=fps, macro_block_size=2, output_params=["-f", "mp4"], ffmpeg_log_level="error"
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(frame.convert("RGB").tobytes())
    finally:
        writer.close()


def load_ffmpeg():
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError:
        raise ModuleNotFoundError("mp4 needs imageio-ffmpeg: pip install 'minisd[video]'") from None
    return imageio_ffmpeg
