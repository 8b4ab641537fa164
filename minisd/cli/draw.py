"""The commands `minisd txt2img` and `minisd img2img`."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from .options import AddCommand, Call, DrawRequest, add_drawing_options, number
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

    parser = command("img2img", img2img, "redraw an image according to a prompt")
    parser.add_argument("image", help="the image to start from")
    parser.add_argument("prompt", help="what to draw")
    how_far = "how far from the image, from 0 (itself) to 1 (not bound to it)"
    parser.add_argument("--strength", type=number, default=0.75, help=how_far)
    own = "resize the image to that; without it, its own size, rounded down"
    add_drawing_options(parser, size_help=own)


def txt2img(args: Namespace, call: Call) -> None:
    prompt, weights = args.prompt, args.weights

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.long_prompts import long_prompt

        if weights is not None:
            return long_prompt(sd, prompt, weights, **options)
        return sd.txt2img(prompt, **options)

    draw(DrawRequest.of(args, call), run, lambda seed: {"prompt": prompt, "weights": weights})


def img2img(args: Namespace, call: Call) -> None:
    from ..viewing.images import read_image

    request = DrawRequest.of(args, call)
    image = read_image(args.image)  # before the model, which may take minutes
    prompt, strength = args.prompt, args.strength
    told = {"prompt": prompt, **file_chunks(image=args.image), "strength": strength}
    if "size" not in call.given:
        told["size"] = None  # at strength 0 the image keeps its own, which may be none to draw at

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        return sd.img2img(image, prompt, strength, **options)

    draw(request, run, lambda seed: told)
