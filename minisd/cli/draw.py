"""The commands `minisd txt2img` and `minisd img2img`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from .options import AddCommand, Call, DrawRequest, add_drawing_options, number, numbers, positive
from .output import draw, file_chunks

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import Options
    from ..pipeline import StableDiffusion


def add_commands(command: AddCommand) -> None:
    parser = command("txt2img", txt2img, "draw an image of a prompt")
    parser.add_argument("prompt", help="what to draw")
    read = "take (word:1.3) for a weight and a prompt of any length; how it acts"
    parser.add_argument("--weights", choices=("embedding", "bias"), help=read)
    add_drawing_options(parser, size_help="size in pixels; without it the model's own")
    add_rule_options(parser)

    parser = command("img2img", img2img, "redraw an image according to a prompt")
    parser.add_argument("image", help="the image to start from")
    parser.add_argument("prompt", help="what to draw")
    how_far = "how far from the image, from 0 (itself) to 1 (not bound to it)"
    parser.add_argument("--strength", type=number, default=0.75, help=how_far)
    own = "resize the image to that; without it, its own size, rounded down"
    add_drawing_options(parser, size_help=own)
    add_rule_options(parser)


RULES = ("freeu", "seg", "deep_cache")


def add_rule_options(parser: ArgumentParser) -> None:
    """What changes the network's prediction, one of them."""
    add = parser.add_mutually_exclusive_group().add_argument
    b_s = "FreeU: factors of two up blocks' features, and of their skips; 1.3,1.4,0.9,0.2"
    add("--freeu", metavar="B1,B2,S1,S2", type=numbers, help=b_s)
    blurred = "smoothed-energy guidance at that scale beside --guidance; 3 is usual"
    add("--seg", metavar="SCALE", type=number, help=blurred)
    n = "DeepCache: the deep layers in every N-th step alone, quicker and not the same"
    add("--deep-cache", metavar="N", type=positive, help=n)


def with_rule(args: Namespace, sd: StableDiffusion, options: Options) -> Options:
    """The options with the rule that was asked for."""
    from ..editing.deep_cache import deep_cache
    from ..editing.freeu import freeu
    from ..editing.smoothed import seg
    from ..sampling.guidance import cfg

    rule: Any = options.get("rule", cfg)
    if args.freeu is not None:
        half = len(args.freeu) // 2
        rule = partial(rule, edits=freeu(sd.unet, args.freeu[:half], args.freeu[half:]))
    elif args.seg is not None:
        rule = partial(seg, seg_scale=args.seg)
    elif args.deep_cache is not None:
        rule = partial(deep_cache, unet=sd.unet, every=args.deep_cache)
    return {**options, "rule": rule}


def told_rule(args: Namespace, call: Call) -> dict[str, object]:
    """The same for the PNG's text; ValueError for what cannot be together."""
    if args.seg is not None or args.deep_cache is not None:
        call.refuse("it is a rule of its own, expected it without --seg and --deep-cache", "pag")
    factors = None if args.freeu is None else ",".join(f"{x:g}" for x in args.freeu)
    return {"freeu": factors, "seg": args.seg, "deep-cache": args.deep_cache}


def txt2img(args: Namespace, call: Call) -> None:
    prompt, weights = args.prompt, args.weights

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.long_prompts import long_prompt

        if weights is not None:
            return long_prompt(sd, prompt, weights, **with_rule(args, sd, options))
        return sd.txt2img(prompt, **with_rule(args, sd, options))

    told = {"prompt": prompt, "weights": weights, **told_rule(args, call)}
    draw(DrawRequest.of(args, call), run, lambda seed: told)


def img2img(args: Namespace, call: Call) -> None:
    from ..viewing.images import read_as_it_is

    request = DrawRequest.of(args, call)
    image = read_as_it_is(args.image)  # before the model, which may take minutes
    prompt, strength = args.prompt, args.strength
    told = {"prompt": prompt, **file_chunks(image=args.image), "strength": strength}
    told |= told_rule(args, call)
    if "size" not in call.given:
        told["size"] = None  # at strength 0 the image keeps its own, which may be none to draw at

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        return sd.img2img(image, prompt, strength, **with_rule(args, sd, options))

    draw(request, run, lambda seed: told)
