"""The command `minisd invert`, and what `minisd edit --image` shares with it: the four ways to
invert a picture."""

import argparse
from pathlib import Path

from .main import add_drawing_options, check_place, draw, positive, read_picture, refuse, whole_line

METHODS = ("ddim", "null-text", "negative-prompt", "direct")  # editing.inversion.METHODS


def add_commands(command) -> None:
    """command(name, run, help) -> the parser of a new command."""
    parser = command(
        "invert", invert, "find the noise that draws a given picture, and draw it again from that"
    )
    parser.add_argument("image", help="the picture, or an inversion that --save wrote")
    parser.add_argument(
        "prompt", help="what it shows; for a saved inversion another text edits it by that alone"
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="write the inversion, one .safetensors file, for edit --image",
    )
    add_inversion_options(parser, otherwise="ddim")
    add_drawing_options(
        parser, size_help="resize the picture to that; without it, its own size, rounded down"
    )
    parser.set_defaults(steps=50, sampler="ddim", guidance=None)


def add_inversion_options(parser, otherwise: str) -> None:
    add, back = parser.add_argument, "what is done so that guidance leads back to the picture"
    add("--inversion", choices=METHODS, help=f"{back}; without it, {otherwise}")
    add(
        "--refine",
        type=count,
        metavar="K",
        help="fixed-point iterations of each step of the inversion; without it, 0",
    )
    add(
        "--inner",
        type=positive,
        metavar="N",
        help="null-text: steps of Adam for each step at most; without it, 10",
    )
    parser.set_defaults(otherwise=otherwise)


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 0")
    return value


def read_image(args, source: str | None = None):
    """The picture, or the saved inversion, that args.image names, or None; before the model, which
    may take minutes.

    source: the prompt that a saved inversion has to be of. Sets args.method, and args.steps to
    those of the inversion.
    """
    if args.image is None:
        refuse(args, "expected --image with it", "inversion", "refine", "inner")
        return None
    if args.n != 1 or args.sampler != "ddim":
        raise ValueError(
            "an inverted picture is drawn by DDIM from its own noise: expected -n 1 and --sampler ddim"
        )
    refuse(args, "an inverted picture is drawn from its own noise", "seed")
    if Path(args.image).suffix.lower() == ".safetensors":
        image = read_inversion(args, source)
    else:
        image, args.method = read_picture(args.image), args.inversion or args.otherwise
        if args.method != "null-text":
            refuse(args, "expected --inversion null-text with it", "inner")
        elif args.guidance == 1:
            raise ValueError("--guidance 1: null-text has no effect at it, expected another scale")
    if args.method in ("null-text", "negative-prompt"):
        refuse(
            args, f"a {args.method} inversion has an unconditional embedding of its own", "negative"
        )
    return image


def read_inversion(args, source: str | None):
    from ..editing.inversion import Inversion

    refuse(args, f"{args.image} is an inversion already", "inversion", "refine", "inner", "size")
    inversion = Inversion.load(args.image)
    if len(inversion) != 1:
        raise ValueError(
            f"{args.image} holds {len(inversion)} pictures, expected one: save inversion[i]"
        )
    if source is not None and inversion.prompts != (source,):
        prompts = ", ".join(map(repr, inversion.prompts))
        raise ValueError(f"{args.image} was inverted after {prompts}: give that as SOURCE")
    if args.steps != inversion.steps:
        refuse(args, f"{args.image} was inverted in {inversion.steps} steps", "steps")
    if source is not None and inversion.guidance not in (None, args.guidance):
        refuse(args, f"{args.image} was made for guidance {inversion.guidance:g}", "guidance")
    args.steps, args.method = inversion.steps, inversion.method
    return inversion


def picture_size(sd, image, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels of the inverted picture that `read_image` gave."""
    from ..editing.inversion import Inversion

    if isinstance(image, Inversion):
        return tuple(side * sd.vae.factor for side in image.z.shape[-2:])
    return tuple(sd.pixels(image, height, width).shape[-2:])


def inversion_of(args, sd, image, prompt: str):
    """The picture's inversion after the prompt; what is one already stays as it is."""
    from ..editing.inversion import Inversion, direct_inversion, invert, negative_prompt_inversion
    from ..editing.null_text import null_text

    if isinstance(image, Inversion):
        return image
    (width, height), path = args.size or (None, None), args.method in ("null-text", "direct")
    size = {"height": height, "width": width}
    inversion = invert(
        sd, image, prompt, args.steps, refine=args.refine or 0, trajectory=path, **size
    )
    if args.method == "null-text":
        return null_text(sd, inversion, args.guidance, inner_steps=args.inner or 10)
    if args.method == "negative-prompt":
        return negative_prompt_inversion(sd, inversion)
    return direct_inversion(inversion) if args.method == "direct" else inversion


def edit_options(args, sd, image) -> dict:
    """What `edit_prompt` takes to edit the picture, or the inversion, that is --image; {} without
    one."""
    if image is None:
        return {}
    options = inversion_of(args, sd, image, args.source).edit_options(sd)
    args.guidance = options.get("guidance", args.guidance)
    return options


def invert(args) -> None:
    """Guidance: what was given, or what null-text was made for, or 1 for plain DDIM and 7.5 for the
    others."""
    from ..editing.inversion import Inversion, redraw

    image = read_image(args)
    saved = isinstance(image, Inversion)
    if saved and args.method == "direct" and image.prompts != (args.prompt,):
        edit = f"minisd edit --image {args.image} SOURCE TARGET"
        raise ValueError(f"a direct inversion is edited beside its source, by {edit}")
    if args.method == "direct":
        refuse(args, "a direct inversion comes back whatever it is", "guidance", "negative")
    if args.guidance is None and saved:
        args.guidance = image.guidance
    if args.guidance is None:
        args.guidance = 1.0 if args.method == "ddim" else 7.5
    if args.save:
        if not args.save.endswith(".safetensors") or Path(args.save).is_dir():
            raise ValueError(
                f"--save {args.save}: expected the name of a file that ends in .safetensors"
            )
        check_place("--save", Path(args.save))

    def run(sd, on_step, negative_prompt, **options):
        inversion = inversion_of(args, sd, image, args.prompt)
        if args.save:
            inversion.save(args.save)
            print(args.save)
        prompt = None if inversion.prompts == (args.prompt,) else args.prompt
        z = redraw(
            sd, inversion, prompt, args.guidance, negative_prompt=negative_prompt, on_step=on_step
        )
        return sd.decode(z)

    draw(args, {"arguments": whole_line(args)}, run)
