"""The commands of the methods on attention: `minisd masactrl`, `pnp`, `style`, `excite`, ..."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .options import (
    AddCommand,
    Call,
    DrawRequest,
    add_drawing_options,
    count,
    number,
    positive,
    words,
)
from .output import draw, file_chunks, line_again

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import Options
    from ..pipeline import StableDiffusion

OWN_SIZE = "size in pixels; without it the model's own"


def add_commands(command: AddCommand) -> None:
    what = "draw a prompt, and others that look like it in a layout of their own (MasaCtrl)"
    parser = command("masactrl", masactrl, what)
    parser.add_argument("source", help="the prompt whose contents are taken")
    parser.add_argument("target", nargs="+", help="the prompts that lay them out anew")
    from_step = "the first step in which the source's keys and values are taken"
    parser.add_argument("--start", type=count, default=4, metavar="STEP", help=from_step)
    site = "the first self-attention site, counted from 0; without it five eighths of the way"
    parser.add_argument("--first", type=count, metavar="SITE", help=site)
    add_drawing_options(parser, size_help=OWN_SIZE)
    parser.set_defaults(steps=50, sampler="ddim")

    what = "draw a prompt, and others in its layout, by a feature and maps of it (Plug-and-Play)"
    parser = command("pnp", plug_and_play, what)
    parser.add_argument("source", help="the prompt whose layout is taken")
    parser.add_argument("target", nargs="+", help="the prompts that are drawn in it")
    part = "the part of the steps in which the source's feature is taken"
    parser.add_argument("--feature-steps", type=number, default=0.8, metavar="PART", help=part)
    part = "the part of the steps in which its self-attention is taken"
    parser.add_argument("--self-steps", type=number, default=0.5, metavar="PART", help=part)
    add_drawing_options(parser, size_help=OWN_SIZE)
    parser.set_defaults(steps=50, sampler="ddim")

    what = "draw prompts in the manner of the first (StyleAligned)"
    parser = command("style", style, what)
    parser.add_argument("reference", help="the prompt that says the manner")
    parser.add_argument("prompt", nargs="+", help="what else to draw, each from its own noise")
    add_drawing_options(parser, size_help=OWN_SIZE)
    parser.set_defaults(steps=50, sampler="ddim")

    add_single_commands(command)


def add_single_commands(command: AddCommand) -> None:
    """Those that draw or edit one image, not several side by side."""
    what = "draw a prompt so that each of some words is seen (Attend-and-Excite)"
    parser = command("excite", excite, what)
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("words", type=words, help="the words, e.g. circle,square")
    parser.add_argument("--scale", type=number, default=20.0, help="of the first step's move")
    part = "the part of the steps in which the latent is moved"
    parser.add_argument("--until", type=number, default=0.5, help=part)
    most = "at most so many more moves at each of three steps"
    parser.add_argument("--refinements", type=count, default=20, metavar="N", help=most)
    add_drawing_options(parser, size_help=OWN_SIZE)
    parser.set_defaults(steps=50, sampler="ddim")

    what = "draw a prompt with a text of its own in each region of the image"
    parser = command("regional", regional, what)
    parser.add_argument("prompt", help="what holds everywhere, e.g. 'on a white background'")
    where = "what is to be seen where the image MASK is white (repeat)"
    pair: Any = {"nargs": 2, "metavar": ("TEXT", "MASK"), "action": "append", "required": True}
    parser.add_argument("--region", help=where, **pair)
    add_drawing_options(parser, size_help=OWN_SIZE)

    what = "edit an image where two prompts disagree about it, found without a mask (DiffEdit)"
    parser = command("diffedit", diffedit, what)
    parser.add_argument("image", help="the image")
    parser.add_argument("source", help="what it shows")
    parser.add_argument("target", help="what it is to show")
    how_far = "how much of the schedule is inverted and drawn again"
    parser.add_argument("--strength", type=number, default=0.8, help=how_far)
    looks = "with so many noises the two prompts are compared"
    parser.add_argument("--noises", type=positive, default=10, metavar="N", help=looks)
    share = "share of the greatest difference from which on it is redrawn"
    parser.add_argument("--threshold", type=number, default=0.5, help=share)
    add_drawing_options(parser, size_help="resize the image to that; without it, its own size")
    parser.set_defaults(steps=50, sampler="ddim")


def masactrl(args: Namespace, call: Call) -> None:
    request, prompts = DrawRequest.of(args, call), [args.source, *args.target]

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.masactrl import masactrl

        return masactrl(sd, *prompts, start=args.start, first=args.first, **options)

    draw(request, run, telling(call), prompts)


def plug_and_play(args: Namespace, call: Call) -> None:
    request, prompts = DrawRequest.of(args, call), [args.source, *args.target]
    how = {"feature_steps": args.feature_steps, "self_steps": args.self_steps}

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.plug_and_play import plug_and_play

        return plug_and_play(sd, *prompts, **how, **options)

    draw(request, run, telling(call), prompts)


def style(args: Namespace, call: Call) -> None:
    request, prompts = DrawRequest.of(args, call), [args.reference, *args.prompt]

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.style_aligned import style_aligned

        return style_aligned(sd, *prompts, **options)

    draw(request, run, telling(call), prompts)


def excite(args: Namespace, call: Call) -> None:
    request = DrawRequest.of(args, call)
    how = {"scale": args.scale, "until": args.until, "refinements": args.refinements}

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.attend_and_excite import attend_and_excite

        return attend_and_excite(sd, args.prompt, args.words, **how, **options)

    draw(request, run, telling(call), [args.prompt])


def regional(args: Namespace, call: Call) -> None:
    from ..editing.blended import read_mask

    request = DrawRequest.of(args, call)
    regions = {text: read_mask(mask) for text, mask in args.region}
    if len(regions) < len(args.region):
        raise ValueError("--region: got a text twice, expected one mask for each")

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.regional import regional

        return regional(sd, args.prompt, regions, **options)

    draw(request, run, telling(call), [args.prompt])


def diffedit(args: Namespace, call: Call) -> None:
    from ..viewing.images import read_as_it_is

    if args.sampler != "ddim":
        raise ValueError(f"--sampler {args.sampler}: DiffEdit inverts, expected ddim")
    request, image = DrawRequest.of(args, call), read_as_it_is(args.image)
    how = {"strength": args.strength, "noises": args.noises, "threshold": args.threshold}

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.diffedit import diffedit

        own: Any = {name: value for name, value in options.items() if name != "sampler"}
        return diffedit(sd, image, args.source, args.target, **how, **own)

    draw(request, run, telling(call, image=args.image), [args.target])


def telling(call: Call, **files: str) -> Callable[[int], dict[str, object]]:
    """What the PNG of each seed tells."""
    told = file_chunks(**files)
    return lambda seed: {**told, "arguments": line_again(call.argv, seed)}
