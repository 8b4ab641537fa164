"""The `minisd` command: txt2img, img2img, info.

cli_edit.py adds edit and heatmap, cli_invert.py invert, cli_blend.py blend and erase, cli_models.py
what is about models.

torch is imported inside the commands, so that `minisd --help` and `minisd info picture.png` answer
at once.
"""

import argparse
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import __version__

SAMPLERS = ("dpm++", "dpm++ linspace", "ddim")  # the keys of pipeline.SAMPLERS
DTYPES = ("float16", "bfloat16", "float32", "auto")
ANIMATIONS = ("webp", "png", "gif", "mp4")  # trace.FORMATS
# The text chunks of a PNG that are options of the command, under the option's name.
OPTIONS = ("negative", "strength", "model", "variant", "revision", "tokenizer")
OPTIONS += ("seed", "size", "steps", "guidance", "sampler", "dtype", "device")


def main(argv: list[str] | None = None, before_writing: Callable[[], object] = lambda: None) -> int:
    """Run the command; the exit code is 0, 2 after an error (one line on stderr), 130 after Ctrl-C.

    141 if nobody reads the output any more. before_writing is called before the first file is
    written.
    """
    argv = sys.argv[1:] if argv is None else argv
    if (
        getattr(sys.stdout, "errors", None) == "strict"
    ):  # a name or prompt that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    args = argparse.Namespace(argv=argv, before_writing=before_writing, debug=False)
    try:
        build_parser().parse_args(argv, args)
        with warnings.catch_warnings():
            warnings.showwarning = lambda warning, *_: print(
                f"minisd: warning: {one_line(warning)}", file=sys.stderr
            )
            args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nminisd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains when it flushes at exit
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(f"minisd: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def one_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ({len(lines) - 1} more lines with --debug)"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are: not those of flags, nor of options whose help tells what
    happens without."""

    def _get_help_string(self, action):
        has_none = action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="minisd",
        description="Stable Diffusion v1.x, written out so that each tensor can be followed",
    )
    parser.add_argument("--version", action="version", version=f"minisd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help, formatter_class=Help)
        sub.set_defaults(run=run, parser=sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    text = command("txt2img", txt2img, "draw a picture of a text")
    text.add_argument("prompt", help="what to draw")
    add_drawing_options(text, size_help="size in pixels; without it the model's own")

    image = command("img2img", img2img, "redraw a picture after a text")
    image.add_argument("image", help="the picture to start from")
    image.add_argument("prompt", help="what to draw")
    image.add_argument(
        "--strength",
        type=number,
        default=0.75,
        help="how far from the picture, from 0 (itself) to 1 (not bound to it)",
    )
    add_drawing_options(
        image, size_help="resize the picture to that; without it, its own size, rounded down"
    )

    about = command("info", info, "how a picture was drawn, or what is in a model")
    about.add_argument(
        "target", help="a PNG that minisd drew, or a model (as for --model; nothing is downloaded)"
    )
    from . import blend as cli_blend, edit as cli_edit, invert as cli_invert, models as cli_models

    cli_models.add_source_options(about, local=False)
    cli_models.add_tokenizer_option(about)
    cli_edit.add_commands(command)
    cli_invert.add_commands(command)
    cli_blend.add_commands(command)
    cli_models.add_commands(command)
    return parser


def add_drawing_options(parser, size_help):
    add = parser.add_argument
    add(
        "--negative",
        metavar="TEXT",
        help="what guidance leads away from; without it, the empty text",
    )
    add("--model", default="sd-v1-4", help="bundled name, Hub repo id, folder or .safetensors file")
    add(
        "-n",
        type=positive,
        default=1,
        metavar="N",
        help="number of pictures; picture i is drawn with seed + i",
    )
    add("--seed", type=int, default=0, help="seed of the first picture")
    add("--size", type=size, metavar="WxH", help=size_help)
    add("--steps", type=positive, default=25, help="steps of the sampler, up to 1000")
    add("--guidance", type=number, default=7.5, help="guidance scale; 1 is none, and twice as fast")
    add(
        "--sampler",
        choices=SAMPLERS,
        default="dpm++",
        help="dpm++ is DPM-Solver++ 2M on Karras' noise levels",
    )
    add("--device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one")
    dtype = "without it, float16 on CUDA and float32 elsewhere; auto: bfloat16 on a CPU that computes in it"
    add("--dtype", choices=DTYPES, help=dtype)
    add("--variant", help="weight files of that variant, e.g. fp16")
    add("--revision", help="branch, tag or commit of a Hub repo")
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder with vocab.json and merges.txt, for a single file",
    )
    add("--local-files-only", action="store_true", help="do not ask the Hub, use its local cache")
    add(
        "-o",
        "--output",
        default=".",
        metavar="PATH",
        help="a .png file (-n 2: name-0.png, name-1.png), or a folder",
    )
    add(
        "--trace",
        metavar="DIR",
        type=new_folder,
        help="write a picture after each step there, and animations of them",
    )
    add("--trace-every", metavar="N", type=positive, help="only after each N-th step and the last")
    add(
        "--trace-preview",
        action="store_true",
        help="pictures by a linear map of the latents: coarse, but quick",
    )
    add(
        "--trace-format",
        choices=ANIMATIONS,
        help='of the animations; without it, webp; mp4 needs the extra "video"',
    )


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


def number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number")
    return value


def refuse(args, why: str, *names: str) -> None:
    """ValueError for the first of these options that is not at its default: beside the others it
    has no effect."""
    for name in names:
        if getattr(args, name) != args.parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def new_folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a new or an empty folder")
    return path


def size(text: str) -> tuple[int, int]:
    """ "640x448" -> (640, 448), width first."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WIDTHxHEIGHT, e.g. 640x448")
    return int(width), int(height)


# txt2img and img2img


def txt2img(args) -> None:
    draw(args, {}, lambda sd, **common: sd.txt2img(args.prompt, **common))


def img2img(args) -> None:
    from hashlib import sha256

    image = read_picture(args.image)  # before the model, which may take minutes
    settings = {
        "image": args.image,
        "image_sha256": sha256(Path(args.image).read_bytes()).hexdigest(),
    }
    settings["strength"] = args.strength
    draw(
        args, settings, lambda sd, **common: sd.img2img(image, args.prompt, args.strength, **common)
    )


def read_picture(path: str):
    from ..viewing.images import read_image

    return read_image(path)


def draw(args, settings: dict, run) -> None:
    """Draw args.n pictures and write each when it is done; run(sd, on_step=..., **drawing_options)
    -> [picture].

    One by one, not as a batch: each can be drawn again alone, bit for bit, by the command that
    `minisd info` prints.
    """
    paths = output_paths(args.output, args.n)
    sd = load_model(args)
    for seed, path in enumerate(paths, args.seed):
        with tracing(args, sd, seed) as on_step:
            [picture] = run(sd, on_step=on_step, **drawing_options(args, seed))
            write_png(
                path,
                picture,
                text_chunks(args, sd, seed, picture, {"prompt": args.prompt}, settings),
            )
        print(path)


@contextmanager
def tracing(args, sd, seed: int) -> Iterator:
    """`with tracing(args, sd, seed) as on_step`: what a function that draws is to call after each
    step, or None.

    With --trace: its folder (with -n 2 its folders seed0, seed1) gets a picture of each step as
    soon as it is done, then images.webp and latents.webp. If the drawing fails or is interrupted,
    nothing of that stays.
    """
    if args.trace is None:
        yield None
        return
    from ..files import new_folder
    from ..viewing.trace import Trace, animate, fit_preview, latent_rgb

    folder = args.trace / f"seed{seed}" if args.n > 1 else args.trace
    images, latents = (
        folder / f"{name}.{args.trace_format or 'webp'}" for name in ("images", "latents")
    )
    trace = Trace(
        sd, args.trace_every or 1, folder, fit_preview(sd) if args.trace_preview else None
    )
    with new_folder(folder):
        written = []
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


def check_options(args) -> None:
    """Refuse what has no effect or cannot be traced, before the model is loaded, which may take
    minutes."""
    from ..viewing.trace import check_animation

    if args.guidance == 1 and args.run.__name__ != "erase":  # there it has an effect all the same
        refuse(args, "it has no effect at --guidance 1", "negative")
    if args.trace is None:
        refuse(args, "expected --trace DIR with it", "trace_every", "trace_preview", "trace_format")
    if args.trace_format:
        check_animation(f"images.{args.trace_format}")


def load_model(args):
    from ..pipeline import load

    check_options(args)
    sd = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        variant=args.variant,
        revision=args.revision,
        local_files_only=args.local_files_only,
        tokenizer=args.tokenizer,
    )
    args.before_writing()
    return sd


def drawing_options(args, seed: int) -> dict:
    """What `add_drawing_options` reads, as arguments of the functions that draw."""
    width, height = args.size or (None, None)
    return {
        "negative_prompt": args.negative or "",
        "steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler,
        "seed": seed,
        "height": height,
        "width": width,
    }


def text_chunks(args, sd, seed: int, picture, prompt: dict, settings: dict) -> dict:
    """What a PNG tells about how it was drawn."""
    return {
        "version": f"minisd {__version__}",
        "command": args.run.__name__,
        **prompt,
        "negative": args.negative,
        **settings,
        "model": args.model,
        "variant": args.variant,
        "revision": args.revision,
        "tokenizer": args.tokenizer,
        "seed": seed,
        # Of img2img only if it was given: at strength 0 the picture keeps its own, which need not
        # be one to draw at.
        "size": f"{picture.width}x{picture.height}"
        if args.size or args.run is not img2img
        else None,
        "steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler,
        "dtype": str(sd.dtype).removeprefix("torch."),
        "device": sd.device,
    }


def whole_line(args) -> str:
    """The command line for the PNG of a command whose options are not all text chunks.

    Without --trace and its kin: the picture is the same, and a second time their folder would not
    be empty.
    """
    kept, rest = [], list(args.argv)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        if not word.startswith("--trace"):
            kept.append(word)
        elif "=" not in word and not word.startswith(
            "--trace-p"
        ):  # --trace-preview alone takes no value
            rest = rest[1:]
    return shlex.join(kept + rest)


def output_paths(output: str, n: int, option: str = "-o") -> list[Path]:
    """Where n pictures go: NAME.png, or NAME-0.png ...; in a folder, the next free minisd-00000.png
    ..."""
    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        taken = [int(p.stem[7:]) for p in path.glob("minisd-*.png") if p.stem[7:].isdecimal()]
        first = max(taken, default=-1) + 1
        paths = [path / f"minisd-{first + i:05}.png" for i in range(n)]
    elif path.suffix.lower() == ".png":
        paths = (
            [path]
            if n == 1
            else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(n)]
        )
    else:
        raise ValueError(f"{option} {output}: expected a name that ends in .png, or a folder")
    for path in paths:
        check_place(option, path)
    return paths


def check_place(option: str, path: Path) -> None:
    """OSError if nothing can be written there; before the drawing, which may take minutes."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise PermissionError(f"{option} {path}: {existing} is not a folder that can be written to")
    try:
        path.lstat()
    except FileNotFoundError:
        pass  # and not, say, OSError: File name too long


def write_png(path: Path, picture, chunks: dict) -> None:
    """Write a picture with its text chunks: all of it or nothing, under its name only when it is
    whole."""
    from PIL.PngImagePlugin import PngInfo

    from ..files import atomic_write

    text = PngInfo()
    for key, value in chunks.items():
        if value is not None:
            text.add_text(key, str(value))
    with atomic_write(path) as part:
        picture.save(part, format="PNG", pnginfo=text)


# info


def info(args) -> None:
    path = Path(args.target)
    if path.suffix.lower() == ".png" or (path.is_file() and path.suffix != ".safetensors"):
        print_picture(args.target)
    else:
        print_model(
            args.target, variant=args.variant, revision=args.revision, tokenizer=args.tokenizer
        )


def print_picture(path: str) -> None:
    """The settings that a PNG carries, and the command that draws it again.

    Whoever made the PNG wrote them: what would steer a terminal is escaped, and each argument is
    quoted for a shell.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            chunks = dict(getattr(image, "text", {}))
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} is neither a picture nor a .safetensors file") from error
    if not chunks.get("version", "").startswith("minisd "):
        raise ValueError(
            f"{path} carries no settings: minisd did not draw it, or they were stripped"
        )
    options = []
    for key in OPTIONS:
        if value := chunks.get(key):
            options += [f"--{key}={value}"] if value.startswith("-") else [f"--{key}", value]
    options += ["-o", "again.png"]
    texts = [chunks[key] for key in ("image", "prompt") if key in chunks]
    dashes = any(text.startswith("-") for text in texts)  # argparse would take them for options
    arguments = [*options, "--", *texts] if dashes else [*texts, *options]
    line = [chunks.get("command", "txt2img"), *arguments]
    if "arguments" in chunks:  # commands of several pictures keep their whole line
        line = shlex.split(chunks["arguments"])
    told = "\n".join(
        [
            *(f"{key + ':':16} {value}" for key, value in chunks.items()),
            "",
            shlex.join(["minisd", *line]),
        ]
    )
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda control: ascii(control[0])[1:-1], told))


def print_model(source: str, **options) -> None:
    """Configs, files and parameter counts of a model, from its headers; nothing is downloaded.
    options: of `locate`."""
    import dataclasses
    import math

    from ..checkpoints.load import MODELS, CheckpointError, locate, read_header

    found = locate(source, **options, local_files_only=True)
    total = 0
    for part in MODELS:
        entries = [
            entry
            for name, entry in read_header(found.files[part]).items()
            if found.rename(part, name)
        ]
        parameters = sum(math.prod(entry.shape) for entry in entries)
        total += parameters
        dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
        print(
            f"{part}: {parameters:,} parameters in {len(entries)} tensors ({dtypes}), {found.files[part]}"
        )
        for key, value in dataclasses.asdict(found.configs[part]).items():
            print(f"    {key}: {value}")
    try:
        print(
            f"tokenizer: {len(found.tokenizer.vocab):,} pieces, {found.tokenizer.max_length} ids per prompt"
        )
    except CheckpointError as error:  # a single file without a vocabulary, say
        if options["tokenizer"] is not None:
            raise
        print(f"tokenizer: {error}")
    schedule = found.schedule
    first, last = schedule.alphas_cumprod[0], schedule.alphas_cumprod[-1]
    print(f"schedule: {len(schedule)} timesteps, alphas_cumprod from {first:.6f} to {last:.6f}")
    print(f"total: {total:,} parameters")
