"""The commands `minisd blend` (blended latent diffusion), `minisd inpaint` (inpainting models) and
`minisd erase` (concept erasure)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .options import AddCommand, Call, DrawRequest, add_drawing_options, number, weights, whole
from .output import draw, file_chunks, line_again

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import Options
    from ..pipeline import StableDiffusion

SIZE = "resize the image to that; without it, its own size"


def add_commands(command: AddCommand) -> None:
    what = "redraw the white part of a mask according to a prompt; no other pixel changes"
    add_blend_options(command("blend", blend, what), strength=0.95)
    what = "fill the white part of a mask by an inpainting model, whose UNet takes 9 channels"
    add_blend_options(command("inpaint", inpaint, what), strength=1.0)
    what = "draw a prompt, or redraw an image according to it, without the concepts named"
    add_erase_options(command("erase", erase, what))


def add_blend_options(parser: ArgumentParser, strength: float) -> None:
    add = parser.add_argument
    add("image", help="the image")
    add("mask", help="an image of its proportions: white is redrawn, black is kept")
    add("prompt", help="what is to be seen, of the whole image")
    how_far = "how far from the image, from 0 (itself) to 1 (not bound to it)"
    add("--strength", type=number, default=strength, help=how_far)
    either = parser.add_mutually_exclusive_group().add_argument
    fade = "fade inside the mask's edge over that many pixels"
    either("--feather", type=whole, default=0, metavar="PIXELS", help=fade)
    bare = "the decoded image as it is, in which every pixel changes"
    either("--no-paste-back", action="store_true", help=bare)
    add_drawing_options(parser, size_help=SIZE)


def add_erase_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("concepts", nargs="+", metavar="concept", help="what to leave out, e.g. 'a red hat'")
    add("--image", help="an image to redraw; without it, the drawing starts from noise")
    add("--strength", type=number, help="how far from the image, from 0 to 1; without it 0.3")
    scale = "one weight, or one for each concept: 10,5"
    add("--erase-scale", type=weights, default=10.0, metavar="W", help=scale)
    sega = "semantic guidance: only where a concept shows most, late, with momentum"
    add("--sega", action="store_true", help=sega)
    most = "with --sega: the quantile from which on it shows most"
    add("--threshold", type=number, default=0.9, help=most)
    first = "with --sega: nothing is done in so many first steps"
    add("--warmup", type=whole, default=10, metavar="STEPS", help=first)
    earlier = "with --sega: how much of earlier steps' direction is added"
    add("--momentum", type=number, default=0.1, help=earlier)
    add_drawing_options(parser, size_help=SIZE)
    parser.set_defaults(steps=50)


def blend(args: Namespace, call: Call) -> None:
    from ..editing.blended import blend

    fill(args, call, blend)


def inpaint(args: Namespace, call: Call) -> None:
    from ..editing.inpainting import inpaint

    fill(args, call, inpaint)


def fill(args: Namespace, call: Call, method: Callable[..., list[Image.Image]]) -> None:
    """What both commands do with an image and a mask."""
    from ..editing.blended import read_mask
    from ..viewing.images import read_as_it_is

    request = DrawRequest.of(args, call)
    image, mask = read_as_it_is(args.image), read_mask(args.mask)  # before the model, which is slow
    prompt, strength, feather = args.prompt, args.strength, args.feather
    paste_back = not args.no_paste_back
    if not paste_back:  # argparse does not notice a default that is typed
        call.refuse("it has no effect with --no-paste-back", "feather")
    files = file_chunks(image=args.image, mask=args.mask)

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        how = {"feather": feather, "paste_back": paste_back}
        return method(sd, image, mask, prompt, strength, **how, **options)

    draw(request, run, telling(prompt, files, call))


def erase(args: Namespace, call: Call) -> None:
    from ..editing.erasure import erase_concepts
    from ..viewing.images import read_as_it_is

    call.refuse("erasure has a rule of guidance of its own", "pag")
    request = DrawRequest.of(args, call, negative_at_1=True)
    if args.image is None:
        call.refuse("expected --image with it", "strength")
    image = None if args.image is None else read_as_it_is(args.image)
    files = {} if args.image is None else file_chunks(image=args.image)
    prompt, concepts = args.prompt, args.concepts
    strength, scale, guide = args.strength, args.erase_scale, guide_of(args, call)

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        return erase_concepts(sd, image, prompt, concepts, strength, scale, guide=guide, **options)

    draw(request, run, telling(prompt, files, call))


def telling(prompt: str, files: dict[str, str], call: Call) -> Callable[[int], dict[str, str]]:
    """What the PNG of each seed tells, of both commands."""
    return lambda seed: {"prompt": prompt, **files, "arguments": line_again(call.argv, seed)}


def guide_of(args: Namespace, call: Call) -> Callable[..., Any]:
    """How the concepts are led away from: erasure's own rule, or sega with its options."""
    from ..sampling.guidance import erase, sega

    if not args.sega:
        call.refuse("expected --sega with it", "threshold", "warmup", "momentum")
        return erase
    if args.warmup >= args.steps:
        expected = f"less than --steps {args.steps}, or nothing is erased"
        raise ValueError(f"--warmup {args.warmup}: expected {expected}")
    return partial(sega, threshold=args.threshold, warmup=args.warmup, momentum=args.momentum)
