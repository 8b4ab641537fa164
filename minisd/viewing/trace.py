"""Watching an image form: its latents after each step, decoded, in a quick preview, or in colours.

    trace = Trace(sd, every=5, folder="steps")                 # steps/step_0004_t0801.png ...
    sd.txt2img(prompt, on_step=trace)                          # or denoise(..., after=trace)
    animate(trace.images, "process.webp")
    animate(trace.render(latent_rgb), "latents.webp")

A view is a function z (B, C, h, w) -> B images: `sd.decode`, the linear map of `fit_preview(sd)`,
or `latent_rgb`.
"""

from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import expect
from ..files import atomic_write
from ..sampling.samplers import Step
from .images import to_pil

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

View = Callable[[Tensor], list[Image.Image]]
FORMATS: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "quality": 90},
    ".png": {"format": "PNG"},
    ".gif": {"format": "GIF"},
    ".mp4": {},  # not by Pillow
}


class Trace:
    """Keeps what the latents were after each `every`-th step: a callback that changes nothing.

    every: 5 for the 5th, 10th, ... step and the last, or the indices of steps, [0, 12, 24]. view:
    how latents are shown, None for `sd.decode`. folder: also write each image there at once, as
    step_INDEX_tTIMESTEP.png. steps: the `Step`s kept; latents: x (B, C, h, w) after each, on the
    CPU; images: an image of each, in which those of a batch stand side by side; files: what was
    written.
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        every: int | Collection[int] = 1,
        folder: str | Path | None = None,
        view: View | None = None,
    ):
        number = isinstance(every, Integral) and int(every) >= 1  # NumPy's, too
        if not number and (isinstance(every, (str, Integral)) or not isinstance(every, Collection)):
            expected = "a whole number, at least 1, or the indices of steps"
            raise ValueError(f"every is {every!r}, expected {expected}")
        self.sd, self.every, self.folder = sd, every, folder
        self.view: View = sd.decode if view is None else view
        self.steps: list[Step] = []
        self.latents: list[Tensor] = []
        self.images: list[Image.Image] = []
        self.files: list[Path] = []

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if self.wants(step):
            self.steps.append(step)
            self.latents.append(x.detach().to("cpu", copy=True))
            self.images.append(self.show(x, self.view))
            if self.folder is not None:
                self.files.append(Path(self.folder) / f"step_{step.index:04}_t{step.t:04}.png")
                with atomic_write(self.files[-1]) as temporary:
                    self.images[-1].save(temporary, format="PNG")
        return x

    def wants(self, step: Step) -> bool:
        if isinstance(self.every, Collection):
            return step.index in self.every
        last = step.next.sigma <= self.sd.schedule.clean.sigma
        return last or (step.index + 1) % self.every == 0

    def render(self, view: View) -> list[Image.Image]:
        """Another view of the latents that were kept."""
        return [self.show(x.to(self.sd.device), view) for x in self.latents]

    def show(self, x: Tensor, view: View) -> Image.Image:
        """The images of a batch side by side, each as large as decoded."""
        width, height = (side * self.sd.vae.factor for side in (x.shape[3], x.shape[2]))
        strip = Image.new("RGB", (len(x) * width, height))
        for i, image in enumerate(view(x)):
            strip.paste(image.resize((width, height), Image.Resampling.NEAREST), (i * width, 0))
        return strip


def latent_rgb(z: Tensor) -> list[Image.Image]:
    """The first three channels of latents as red, green and blue, -3 to 3 as 0 to 255: images of
    h x w pixels."""
    return to_pil(z[:, :3] / 3)


class Preview(NamedTuple):
    """A linear look at latents z (B, C, h, w): images of h x w pixels, rgb = conv3x3(z, weight) +
    bias in [-1, 1]."""

    weight: Tensor  # (3, C, 3, 3)
    bias: Tensor  # (3,)

    def __call__(self, z: Tensor) -> list[Image.Image]:
        return to_pil(
            F.conv2d(
                F.pad(z.to(self.weight), (1, 1, 1, 1), mode="replicate"), self.weight, self.bias
            )
        )


def fit_preview(sd: "StableDiffusion", images: Any = None) -> Preview:
    """The linear map that is nearest to a checkpoint's decoder, by least squares.

        min over weight, bias of sum |conv3x3(x, weight) + bias - rgb|^2
        x = z and (z + sqrt(3) noise) / 2,   z = encode(image)
        rgb = decode(x) averaged over factor x factor pixels

    The noisy half makes it fair to the first steps as well. images: images as for
    `sd.encode_image`; None: eight of random rectangles, 16 latents wide, whose coding and decoding
    costs about as much as decoding one 512 x 512 image. The fit is as good as the decoder is
    linear: test_trace.py has the correlations for the bundled model.
    """
    z = sd.encode_image(rectangles(8, 16 * sd.vae.factor) if images is None else images)
    where: Any = {"dtype": torch.float32, "device": "cpu"}
    noise = torch.randn(z.shape, generator=torch.Generator("cpu").manual_seed(0), **where).to(z)
    x = torch.cat([z, (z + 3**0.5 * noise) / 2])
    rgb = F.avg_pool2d(sd.decode(x, as_tensor=True).float(), sd.vae.factor)  # (B, 3, h, w)
    x, rgb = x.double().cpu(), rgb.double().cpu()
    around = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3)  # (B, C * 9, h * w)
    A = F.pad(around.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)  # (B * h * w, C * 9 + 1)
    solution = torch.linalg.lstsq(A, rgb.flatten(2).transpose(1, 2).flatten(0, 1)).solution.float()
    return Preview(solution[:-1].T.unflatten(1, (-1, 3, 3)).contiguous(), solution[-1])


def rectangles(n: int, side: int) -> Tensor:
    """(n, 3, side, side): on black, white or a pure colour, sixteen random rectangles of the
    others; -1 or 1."""
    where: Any = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    colours = 2 * torch.randint(2, (n, 17, 3, 1, 1), dtype=torch.float32, **where) - 1
    corners = torch.randint(side + 1, (n, 16, 2, 2), dtype=torch.int64, **where).sort(dim=2).values
    images = colours[:, 0].repeat(1, 1, side, side)
    for image, own, boxes in zip(images, colours[:, 1:], corners.tolist()):
        for colour, ((top, left), (bottom, right)) in zip(own, boxes):
            image[:, top:bottom, left:right] = colour
    return images


def animate(
    frames: Sequence[Image.Image], path: str | Path, fps: float = 10.0, hold: float = 1.0
) -> None:
    """Write images of one size as an animation: .webp, .png (animated) or .gif, shown endlessly,
    or .mp4.

    fps: images per second, 0.1 to 1000; hold: seconds that the last one is shown longer. .mp4
    needs the extra "video".
    """
    check_animation(path)
    expect.number("fps", fps, 0.1, 1000)
    expect.number("hold", hold, 0)
    if not frames or len({frame.size for frame in frames}) != 1:
        raise ValueError(f"expected images of one size, got {[frame.size for frame in frames]}")
    options = FORMATS[Path(path).suffix.lower()]
    with atomic_write(path) as temporary:
        if options:
            durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 / fps + 1000 * hold)]
            frames[0].save(
                temporary,
                **options,
                save_all=True,
                append_images=frames[1:],
                duration=durations,
                loop=0,
            )
        else:
            write_mp4([*frames, *[frames[-1]] * round(hold * fps)], temporary, fps)


def check_animation(path: str | Path) -> None:
    """ValueError if the name ends in none of FORMATS, ModuleNotFoundError if .mp4 cannot be written
    here."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    if suffix == ".mp4":
        load_ffmpeg()


def write_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """H.264; sides that are odd are enlarged by one pixel, which the format asks for."""
    writer = load_ffmpeg().write_frames(
        str(path),
        frames[0].size,
        fps=fps,
        macro_block_size=2,
        output_params=["-f", "mp4"],
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(frame.convert("RGB").tobytes())
    finally:
        writer.close()


def load_ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError:
        raise ModuleNotFoundError("mp4 needs imageio-ffmpeg: pip install 'minisd[video]'") from None
    return imageio_ffmpeg
