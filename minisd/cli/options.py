"""What the commands share of their options: the types, the groups of options, and the requests that
argparse's answer is turned into before anything else looks at it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

if TYPE_CHECKING:
    from ..checkpoints.load import Checkpoint
    from ..drawing import OnStep, Options
    from ..editing.tables import Interval

SAMPLERS = ("dpm++", "dpm++ linspace", "ddim", "ddpm")  # drawing.SAMPLERS
DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")  # pipeline.DTYPES and auto
ANIMATIONS = ("webp", "png", "gif", "mp4")  # trace.FORMATS
SOURCE = "bundled name, Hub repo id or sd-v1-4 or sd-v1-5, folder or .safetensors file"


@dataclass(frozen=True)
class Call:
    """What is known of this run of the command beside the values of its options.

    given            names of the arguments that were typed, be it with their default values
    before_writing   called before the first file is written
    """

    command: str
    argv: Sequence[str]
    given: frozenset[str]
    before_writing: Callable[[], object]

    def refuse(self, why: str, *names: str) -> None:
        """ValueError for the first of these options that is given: beside the others it has no
        effect."""
        for name in names:
            if name in self.given:
                raise ValueError(f"--{name.replace('_', '-')}: {why}")


Run = Callable[[argparse.Namespace, Call], None]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]  # (name, run, help) -> its parser


# which model


def add_model_options(
    parser: argparse.ArgumentParser, local: bool = True, tokenizer: bool = True
) -> None:
    add = parser.add_argument
    add("--variant", help="weight files of that variant, e.g. fp16")
    add("--revision", help="branch, tag or commit of a Hub repo")
    if tokenizer:
        where = "folder with vocab.json and merges.txt, for a single file"
        add("--tokenizer", metavar="DIR", help=where)
    if local:
        only = "do not ask the Hub, use its local cache"
        add("--local-files-only", action="store_true", help=only)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    merged = "add a LoRA to the weights, e.g. style.safetensors:0.8 (repeat)"
    add("--lora", metavar="FILE[:WEIGHT]", type=lora, action="append", help=merged)
    word = "a textual inversion: a new word for prompts, the file's name or the one in it (repeat)"
    add("--embedding", metavar="FILE", action="append", help=word)


@dataclass(frozen=True)
class ModelRequest:
    """A model: the arguments of `minisd.load` that say which files."""

    source: str
    variant: str | None
    revision: str | None
    tokenizer: str | None
    local_files_only: bool
    loras: tuple[tuple[str, float], ...] = ()  # and what is put into it: files with their weights
    embeddings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, args: argparse.Namespace, source: str, local_files_only: bool | None = None
    ) -> ModelRequest:
        local = args.local_files_only if local_files_only is None else local_files_only
        put_in = tuple(getattr(args, "lora", ()) or ()), tuple(getattr(args, "embedding", ()) or ())
        return cls(source, args.variant, args.revision, args.tokenizer, local, *put_in)

    def told(self) -> dict[str, object]:
        """What says which model it is, adapters by their contents."""
        from ..checkpoints.adapters import lora_file
        from ..checkpoints.sources import sha256

        loras = [[sha256(lora_file(path)), weight] for path, weight in self.loras]
        words = [[Path(path).stem, sha256(Path(path))] for path in self.embeddings]
        files = {"source": self.source, "variant": self.variant, "revision": self.revision}
        return {**files, "tokenizer": self.tokenizer, "loras": loras, "embeddings": words}

    def locate(self) -> Checkpoint:
        from ..checkpoints.load import locate

        return locate(
            self.source,
            variant=self.variant,
            revision=self.revision,
            local_files_only=self.local_files_only,
            tokenizer=self.tokenizer,
        )


# how it is drawn


def add_drawing_options(parser: argparse.ArgumentParser, size_help: str) -> None:
    add = parser.add_argument
    away = "what guidance leads away from; without it, the empty text"
    add("--negative-prompt", "--negative", metavar="TEXT", help=away)
    add("--model", default="sd-v1-4", help=SOURCE)
    number_of = "number of images; image i is drawn with seed + i"
    add("-n", "--num-images", type=positive, default=1, metavar="N", help=number_of)
    add(
        "--seed",
        type=whole,
        default=0,
        help="seed of the first image, of 32 bits: 0 and 2**32 are one",
    )
    add("--size", type=size, metavar="WxH", help=size_help)
    add("--steps", type=positive, default=25, help="steps of the sampler, up to 1000, ddim 999")
    add("--guidance", type=number, default=7.5, help="guidance scale; 1 is none, and twice as fast")
    pag = "perturbed-attention guidance at that scale beside --guidance; 3 is usual"
    add("--pag", type=number, metavar="SCALE", help=pag)
    dpm = "dpm++ is DPM-Solver++ 2M on Karras' noise levels, ddpm has noise at every step"
    add("--sampler", choices=SAMPLERS, default="dpm++", help=dpm)
    add("--device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one")
    dtype = "without it, float16 on CUDA and float32 elsewhere"
    add("--dtype", choices=DTYPES, help=f"{dtype}; auto: bfloat16 on a CPU that computes in it")
    add_model_options(parser)
    add_adapter_options(parser)
    where = "a .png file (-n 2: name-0.png, name-1.png), or a folder"
    add("-o", "--output", default=".", metavar="PATH", help=where)
    each = "write an image after each step there, and animations of them"
    add("--trace", metavar="DIR", type=new_folder, help=each)
    add("--trace-every", metavar="N", type=positive, help="only after each N-th step and the last")
    preview = "images by a linear map of the latents: coarse, but quick"
    add("--trace-preview", action="store_true", help=preview)
    kind = 'of the animations; without it, webp; mp4 needs the extra "video"'
    add("--trace-format", choices=ANIMATIONS, help=kind)


@dataclass(frozen=True)
class TraceRequest:
    """--trace: an image after each `every`-th step, and animations of them."""

    folder: Path
    every: int
    preview: bool
    format: str

    @classmethod
    def of(cls, args: argparse.Namespace, call: Call) -> TraceRequest | None:
        if args.trace is None:
            rest = ("trace_every", "trace_preview", "trace_format")
            call.refuse("expected --trace DIR with it", *rest)
            return None
        from ..viewing.trace import check_animation

        kind = args.trace_format or "webp"
        check_animation(f"images.{kind}")
        return cls(args.trace, args.trace_every or 1, args.trace_preview, kind)


@dataclass(frozen=True)
class DrawRequest:
    """What all commands that draw share.

    options   of `minisd.drawing.Drawing`, without the seed of an image, which is one of `seeds`
    pag       the scale of perturbed-attention guidance, which is the rule in `options`
    output    a .png file or a folder
    """

    call: Call
    model: ModelRequest
    device: str | None
    dtype: str | None
    options: Options
    pag: float | None
    seeds: range
    output: str
    trace: TraceRequest | None

    @classmethod
    def of(
        cls,
        args: argparse.Namespace,
        call: Call,
        *,
        negative_at_1: bool = False,
        **resolved: Unpack[Options],
    ) -> DrawRequest:
        """From what `add_drawing_options` reads. ValueError for options that have no effect.

        negative_at_1: whether --negative-prompt has an effect at --guidance 1. resolved: what an
        inverted image says in place of the options.
        """
        width, height = args.size or (None, None)
        options: Options = {
            "negative_prompt": args.negative_prompt or "",
            "steps": args.steps,
            "guidance": args.guidance,
            "sampler": args.sampler,
            "height": height,
            "width": width,
            **resolved,
        }
        if args.pag is not None:
            from ..editing.perturbed import pag

            options["rule"] = partial(pag, pag_scale=args.pag)
        if options["guidance"] == 1 and not negative_at_1:
            call.refuse("it has no effect at --guidance 1", "negative_prompt")
        model, seeds = (
            ModelRequest.of(args, args.model),
            range(args.seed, args.seed + args.num_images),
        )
        trace = TraceRequest.of(args, call)
        return cls(
            call, model, args.device, args.dtype, options, args.pag, seeds, args.output, trace
        )

    def options_of(self, seed: int, on_step: OnStep | None) -> Options:
        """The options of one image."""
        return {**self.options, "seed": seed, "on_step": on_step}


# types of options


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # 5000 digits are none, either
        raise argparse.ArgumentTypeError(f"got {text:.80}, expected a whole number") from None


def positive(text: str) -> int:
    if (value := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text:.80}, expected at least 1")
    return value


def count(text: str) -> int:
    if (value := whole(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text:.80}, expected at least 0")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text:.80}, expected a finite number")
    return value


def lora(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> ("style.safetensors", 0.8); without a weight it is 1."""
    path, colon, weight = text.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return text, 1.0  # the colon is of the name
    return (path, number(weight)) if colon and path else (text, 1.0)


def weights(text: str) -> float | list[float]:
    """ "10" -> 10.0, "10,5" -> [10.0, 5.0]."""
    values = [number(value) for value in text.split(",")]
    return values[0] if len(values) == 1 else values


def numbers(text: str) -> list[float]:
    """ "1.3,0.9" -> [1.3, 0.9], an even count."""
    values = [number(value) for value in text.split(",")]
    if len(values) % 2:
        raise argparse.ArgumentTypeError(f"got {text}, expected as many factors of each, e.g. 1,1")
    return values


def new_folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a new or an empty folder")
    return path


def size(text: str) -> tuple[int, int]:
    """ "640x448" -> (640, 448), width first."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(text) < 40):
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected WIDTHxHEIGHT, e.g. 640x448")
    return int(width), int(height)


def interval(text: str) -> Interval:
    """ "0.8" -> 0.8, "0.2:0.6" -> (0.2, 0.6)."""
    expected = "expected a fraction of the steps or START:END, e.g. 0.2:0.6"
    try:
        values = [float(value) for value in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def schedule(text: str) -> tuple[str, Interval]:
    """ "cat=0.2" -> ("cat", 0.2), "0.8" -> ("default", 0.8)."""
    word, equals, when = text.rpartition("=")
    return (word if equals else "default", interval(when))


def fractions(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]."""
    expected = "expected fractions of the steps, e.g. 0,0.5,1"
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}") from None


def factor(text: str) -> tuple[str, float]:
    """ "cat=2" -> ("cat", 2.0)."""
    word, _, value = text.rpartition("=")
    try:
        return word, float(value)
    except ValueError:
        expected = "expected WORD=FACTOR, e.g. cat=2"
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}") from None


def words(text: str) -> tuple[str, ...]:
    """ "circle, red square" -> ("circle", "red square")."""
    if not (given := tuple(word for word in map(str.strip, text.split(",")) if word)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected at least one, e.g. circle,square")
    return given


def sites(text: str) -> tuple[str | int, ...]:
    """ "down,16x16,256" -> ("down", "16x16", 256)."""
    return tuple(whole(entry) if entry.isdecimal() else entry for entry in words(text))
