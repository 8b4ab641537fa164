"""The command `minisd invert`, and what `minisd edit --image` shares with it: the four ways to invert a picture."""

import argparse
from pathlib import Path

from .cli import add_drawing_options, draw, positive, read_picture, whole_line

METHODS = ("ddim", "null-text", "negative-prompt", "direct")  # editing.inversion.METHODS
DEFAULTS = {"inversion": "direct", "refine": 0, "inner": 10}


def add_commands(command) -> None:
    """command(name, run, help) -> the parser of a new command."""
    parser = command("invert", invert, "find the noise that draws a given picture, and draw it again from that")
    parser.add_argument("image", help="the picture, or an inversion that --save wrote")
    parser.add_argument("prompt", help="what it shows; for a saved inversion another text edits it by that alone")
    parser.add_argument("--save", metavar="FILE", help="write the inversion, one .safetensors file, for edit --image")
    add_inversion_options(parser, "; without it, ddim")
    add_drawing_options(parser, size_help="resize the picture to that; without it, its own size, rounded down")
    parser.set_defaults(steps=50, sampler="ddim", guidance=None)


def add_inversion_options(parser, otherwise: str) -> None:
    add = parser.add_argument
    add("--inversion", choices=METHODS, help=f"what is done so that guidance leads back to the picture{otherwise}")
    add("--refine", type=count, metavar="K", help="fixed-point iterations of each step of the inversion; without it, 0")
    add("--inner", type=positive, metavar="N", help="null-text: steps of Adam for each step at most; without it, 10")


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 0")
    return value


def read_image(args):
    """The picture, or the saved inversion, that args.image names, or None; before the model, which may take minutes."""
    given = [name for name in DEFAULTS if getattr(args, name) is not None]
    if args.image is None and given:
        raise ValueError(f"--{given[0]}: expected --image with it")
    if args.image is None:
        return None
    if args.n != 1 or args.sampler != "ddim":
        raise ValueError("an inverted picture is drawn by DDIM from its own noise: expected -n 1 and --sampler ddim")
    if Path(args.image).suffix.lower() != ".safetensors":
        return read_picture(args.image)
    if given := given + ["size"] * (args.size is not None):
        raise ValueError(f"--{given[0]}: {args.image} is an inversion already")
    from .editing.inversion import Inversion

    inversion = Inversion.load(args.image)
    args.steps = inversion.steps
    return inversion


def inversion_of(args, sd, image, prompt: str, method: str):
    """The picture's inversion after the prompt; what is one already stays as it is."""
    from .editing.inversion import Inversion, direct_inversion, invert, negative_prompt_inversion
    from .editing.null_text import null_text

    if isinstance(image, Inversion):
        return image
    (width, height), path = args.size or (None, None), method in ("null-text", "direct")
    size = {"height": height, "width": width}
    inversion = invert(sd, image, prompt, args.steps, refine=args.refine or 0, trajectory=path, **size)
    if method == "null-text":
        return null_text(sd, inversion, args.guidance, inner_steps=args.inner or DEFAULTS["inner"])
    if method == "negative-prompt":
        return negative_prompt_inversion(sd, inversion)
    return direct_inversion(inversion) if method == "direct" else inversion


def edit_options(args, sd, image) -> dict:
    """What `edit_prompt` takes to edit the picture, or the inversion, that is --image; {} without one."""
    if image is None:
        return {}
    inversion = inversion_of(args, sd, image, args.source, args.inversion or DEFAULTS["inversion"])
    if inversion.prompts != (args.source,):
        prompts = ", ".join(map(repr, inversion.prompts))
        raise ValueError(f"{args.image} was inverted after {prompts}: give that as SOURCE")
    options = inversion.edit_options(sd)
    args.guidance = options.get("guidance", args.guidance)
    return options


def invert(args) -> None:
    """Guidance: what was given, or what null-text was made for, or 1 for plain DDIM and 7.5 for the others."""
    from .editing.inversion import Inversion, redraw

    image, method = read_image(args), args.inversion or "ddim"
    if isinstance(image, Inversion):
        method = image.method
    if args.guidance is None:
        args.guidance = (image.guidance if isinstance(image, Inversion) else None) or (1.0 if method == "ddim" else 7.5)
    if args.save and not args.save.endswith(".safetensors"):
        raise ValueError(f"--save {args.save}: expected a name that ends in .safetensors")

    def run(sd, on_step, negative_prompt, **options):
        inversion = inversion_of(args, sd, image, args.prompt, method)
        if args.save:
            inversion.save(args.save)
            print(args.save)
        prompt = None if inversion.prompts == (args.prompt,) else args.prompt
        z = redraw(sd, inversion, prompt, args.guidance, negative_prompt=negative_prompt, on_step=on_step)
        return sd.decode(z)

    draw(args, {"arguments": whole_line(args)}, run)
