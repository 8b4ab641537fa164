"""What the commands that draw share of their work: the places of files, the model, the loop over
the images, traces, and PNGs that tell how they were drawn."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .lines import as_chunk
from .options import DrawRequest, ModelRequest, TraceRequest

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import OnStep, Options
    from ..pipeline import StableDiffusion

FREE = re.compile(r"minisd-\d{5,}\.png", re.ASCII)
AGAIN = "again.png"  # where the command that a PNG keeps draws it
# The options that change no image, and those of which each image has its own.
PLACES = (("--to",), ("-o", "--output"), ("--sheet",), ("--save",))
TRACES = (("--trace",), ("--trace-every",), ("--trace-format",))
OWN = (("-n", "--num-images"), ("--seed",))


# places


@dataclass(frozen=True)
class Places:
    """Where n images go, in their order.

    path    NAME.png, or, of several, NAME-0.png ...; or a folder
    names   of a folder: the names there from the first free one on, minisd-00000.png ...; which of
            them an image gets is known when it is written, for others may be drawing there, too
    """

    path: Path
    n: int
    names: Iterator[Path] | None

    def name(self, i: int) -> Path:
        path = self.path
        return path if self.n == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")

    def may_be(self, path: Path) -> bool:
        """Whether one of them is that file."""
        folder, name = self.path.parent, self.path.name
        if self.names is not None:
            folder, name = self.path, path.name if FREE.fullmatch(path.name) else ""
        elif self.n > 1:
            stem, suffix = re.escape(self.path.stem), re.escape(self.path.suffix)
            found = re.fullmatch(rf"{stem}-(0|[1-9]\d{{0,17}}){suffix}", path.name, re.ASCII)
            name = path.name if found and int(found[1]) < self.n else ""
        return path.name == name and os.path.realpath(path.parent) == os.path.realpath(folder)

    def write(self, i: int, image: Image.Image, chunks: Mapping[str, object]) -> Path:
        """Write image i -> its path."""
        from ..files import write_new

        if self.names is not None:
            return write_new(self.names, lambda temporary: save_png(temporary, image, chunks))
        write_png(self.name(i), image, chunks)
        return self.name(i)


def output_places(output: str, n: int, option: str = "-o") -> Places:
    """Where n images go; ValueError or OSError if they cannot."""
    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        check_place(option, path / "minisd-00000.png")
        return Places(path, n, free_names(path))
    if path.suffix.lower() != ".png":
        raise ValueError(f"{option} {output}: expected a name that ends in .png, or a folder")
    places = Places(path, n, None)
    check_place(option, places.name(n - 1))  # the longest
    if n == 1:
        check_file(option, path)
    return places


def check_apart(images: Places | None, sheets: Places | None, trace: TraceRequest | None) -> None:
    """ValueError where one image would be written over another of the same command."""
    if images and sheets:
        pairs = ((images, sheets), (sheets, images))
        if any(a.names is None and b.may_be(a.name(0)) for a, b in pairs):
            raise ValueError(f"--sheet {sheets.path}: that is a name of -o, expected another")
    for option, each in (("-o", images), ("--sheet", sheets)):
        if each and each.names is None and trace is not None:
            parents = Path(os.path.realpath(each.path)).parents
            if Path(os.path.realpath(trace.folder)) in parents:
                raise ValueError(f"{option} {each.path}: it is in the folder of --trace")


def free_names(folder: Path) -> Iterator[Path]:
    """minisd-00000.png ... from behind the last that is there when the first is asked for."""
    stems = [path.stem[7:] for path in folder.glob("minisd-*.png")]
    first = max((int(stem) for stem in stems if stem.isdecimal()), default=-1) + 1
    return (folder / f"minisd-{i:05}.png" for i in count(first))


def check_place(option: str, path: Path) -> None:
    """OSError if nothing can be written there; before the drawing, which may take minutes."""
    parents = Path(os.path.realpath(path)).parents
    existing = next(parent for parent in parents if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise PermissionError(f"{option} {path}: {existing} is not a folder that can be written to")
    try:
        path.lstat()
    except FileNotFoundError:
        pass  # and not, say, OSError: File name too long


def check_file(option: str, path: Path) -> None:
    """The same of a file, ValueError for a pipe or a device: there would be no image."""
    from ..files import expect_file

    check_place(option, path)
    if path.exists():
        expect_file(path)


# drawing


def check_seeds(request: DrawRequest) -> None:
    """ValueError for a seed that is none, before all others are drawn."""
    from ..drawing import seeds

    for each in (request.seeds[0], request.seeds[-1]):
        seeds(each)


def load_model(request: DrawRequest) -> StableDiffusion:
    check_seeds(request)
    sd = load_request(request.model, request.device, request.dtype)
    request.call.before_writing()
    return sd


def load_request(model: ModelRequest, device: str | None, dtype: str | None) -> StableDiffusion:
    """The model with what is put into it."""
    from ..pipeline import load

    sd = load(
        model.source,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # one of options.DTYPES
        variant=model.variant,
        revision=model.revision,
        local_files_only=model.local_files_only,
        tokenizer=model.tokenizer,
    )
    sd.merge(*model.loras)
    for path in model.embeddings:
        sd.add_embedding(path)
    return sd


def draw(
    request: DrawRequest,
    run: Callable[[Any, Options], Sequence[Image.Image]],
    told: Callable[[int], Mapping[str, object]],
    prompts: Sequence[str] = (),
    load: Callable[[DrawRequest], Any] = load_model,
) -> None:
    """Draw the images of each seed, run(sd, options), and write them when they are done.

    One seed at a time, not as a batch: each can be drawn again alone, bit for bit, by the command
    that `minisd info` prints. told: seed -> what its PNGs tell beside what all of them tell.
    prompts: one for each image of a seed, which its PNG tells, too; without them it is one image.
    load: what gives the model, sd.
    """
    each = max(len(prompts), 1)
    places = output_places(request.output, len(request.seeds) * each)
    check_apart(places, None, request.trace)
    sd = load(request)
    for i, seed in enumerate(request.seeds):
        own, written = told(seed), []
        with tracing(request, sd, seed) as on_step:
            images = run(sd, request.options_of(seed, on_step))
            for n, image in zip(range(each), images, strict=True):
                tells = {"prompt": prompts[n], **own} if prompts else own
                chunks = text_chunks(request, sd, seed, image, tells)
                written.append(places.write(i * each + n, image, chunks))
        for path in written:
            print(path)


@contextmanager
def tracing(request: DrawRequest, sd: StableDiffusion, seed: int) -> Iterator[OnStep | None]:
    """`with tracing(request, sd, seed) as on_step`: what a function that draws is to call after
    each step, or None.

    With --trace: its folder (with -n 2 its folders seed0, seed1) gets an image of each step as soon
    as it is done, then images.webp and latents.webp. If the drawing fails or is interrupted,
    nothing of that stays.
    """
    if (wanted := request.trace) is None:
        yield None
        return
    from ..files import new_folder
    from ..viewing.trace import Trace, animate, fit_preview, latent_rgb

    folder = wanted.folder / f"seed{seed}" if len(request.seeds) > 1 else wanted.folder
    images, latents = (folder / f"{name}.{wanted.format}" for name in ("images", "latents"))
    view = fit_preview(sd).__call__ if wanted.preview else None  # None: decoded
    trace = Trace(sd, wanted.every, folder, view)
    with new_folder(folder):
        written: list[Path] = []
        try:
            yield trace
            if trace.images:  # img2img --strength 0 takes no step
                for path, frames in ((images, trace.images), (latents, trace.render(latent_rgb))):
                    written.append(path)
                    animate(frames, path)
        except BaseException:
            for path in trace.files + written:
                path.unlink(missing_ok=True)
            raise


# what a PNG tells


def text_chunks(
    request: DrawRequest,
    sd: StableDiffusion,
    seed: int,
    image: Image.Image,
    told: Mapping[str, object],
) -> dict[str, object]:
    """What a PNG tells about how it was drawn; `told`, of one command, may say another size."""
    model, options = request.model, request.options
    return {
        "version": f"minisd {__version__}",
        "command": request.call.command,
        **told,
        "negative": options["negative_prompt"] or None,
        "model": model.source,
        "variant": model.variant,
        "revision": model.revision,
        "tokenizer": model.tokenizer,
        "lora": "\n".join(f"{path}:{weight}" for path, weight in model.loras) or None,
        "lora_sha256": "\n".join(sha for _, sha, _ in sd.adapters.merged) if model.loras else None,
        "embedding": "\n".join(model.embeddings) or None,
        "embedding_sha256": "\n".join(sha for _, sha, _ in sd.adapters.words)
        if model.embeddings
        else None,
        "seed": seed,
        "size": told.get("size", f"{image.width}x{image.height}"),
        "steps": options["steps"],
        "guidance": options["guidance"],
        "pag": request.pag,
        "sampler": options["sampler"],
        "dtype": str(sd.dtype).removeprefix("torch."),
        "device": sd.device,
    }


def file_chunks(**paths: str) -> dict[str, str]:
    """The files that a command read, by name and contents: {"image": ..., "image_sha256": ...}."""
    from ..checkpoints.sources import sha256

    return paths | {f"{name}_sha256": sha256(Path(path)) for name, path in paths.items()}


def line_again(argv: Sequence[str], seed: int | None, place: str = "-o") -> str:
    """The command line that draws an image again as again.png, for the PNGs of commands whose
    options are not all text chunks.

    Nothing else is written, and no other image but those of the same batch is drawn: of several
    seeds only this one (None: the image is drawn from noise of its own). place: the option that
    says where that image goes.
    """
    known = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for names in (*PLACES, *TRACES, *OWN):
        known.add_argument(*names)
    known.add_argument("--trace-preview", action="store_true")
    end = list(argv).index("--") if "--" in argv else len(argv)
    _, kept = known.parse_known_args(argv[:end])
    own = [] if seed is None else ["--seed", str(seed)]
    return shlex.join([*kept, *own, place, AGAIN, *argv[end:]])


def write_png(path: Path, image: Image.Image, chunks: Mapping[str, object]) -> None:
    """Write an image with its text chunks: all of it or nothing, under its name only when it is
    complete."""
    from ..files import atomic_write

    with atomic_write(path) as temporary:
        save_png(temporary, image, chunks)


def save_png(path: Path, image: Image.Image, chunks: Mapping[str, object]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from ..recipes import texts

    text = PngInfo()
    for key, value in {**texts(image), **chunks}.items():
        if value is not None:
            text.add_text(key, as_chunk(str(value)))
    image.save(path, format="PNG", pnginfo=text)
