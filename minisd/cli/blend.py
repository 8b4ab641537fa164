"""The commands `minisd blend` (blended latent diffusion) and `minisd erase` (concept erasure)."""

from functools import partial
from pathlib import Path

from .main import add_drawing_options, draw, number, read_picture, refuse, whole_line


def add_commands(command) -> None:
    """command(name, run, help) -> the parser of a new command."""
    size = "resize the picture to that; without it, its own size"
    parser = command(
        "blend", blend, "redraw the white part of a mask after a text; no other pixel changes"
    )
    add = parser.add_argument
    add("image", help="the picture")
    add("mask", help="a picture of its proportions: white is redrawn, black is kept")
    add("prompt", help="what is to be seen, of the whole picture")
    how_far = "how far from the picture, from 0 (itself) to 1 (not bound to it)"
    add("--strength", type=number, default=0.95, help=how_far)
    either = parser.add_mutually_exclusive_group().add_argument
    either(
        "--feather",
        type=int,
        default=0,
        metavar="PIXELS",
        help="fade inside the mask's edge over that many pixels",
    )
    either(
        "--no-paste-back",
        action="store_true",
        help="the decoded picture as it is, in which every pixel changes",
    )
    add_drawing_options(parser, size_help=size)

    parser = command(
        "erase", erase, "draw a text, or redraw a picture after it, without the concepts named"
    )
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("concepts", nargs="+", metavar="concept", help="what to leave out, e.g. 'a red hat'")
    add("--image", help="a picture to redraw; without it, the drawing starts from noise")
    add("--strength", type=number, help="how far from the picture, from 0 to 1; without it 0.3")
    add(
        "--erase-scale",
        type=weights,
        default=10.0,
        metavar="W",
        help="one weight, or one for each concept: 10,5",
    )
    add(
        "--sega",
        action="store_true",
        help="semantic guidance: only where a concept shows most, late, with momentum",
    )
    add(
        "--threshold",
        type=number,
        default=0.9,
        help="with --sega: the quantile from which on it shows most",
    )
    add(
        "--warmup",
        type=int,
        default=10,
        metavar="STEPS",
        help="with --sega: nothing is done in so many first steps",
    )
    add(
        "--momentum",
        type=number,
        default=0.1,
        help="with --sega: how much of earlier steps' direction is added",
    )
    add_drawing_options(parser, size_help=size)
    parser.set_defaults(steps=50)


def weights(text: str) -> float | list[float]:
    """ "10" -> 10.0, "10,5" -> [10.0, 5.0]."""
    values = [number(value) for value in text.split(",")]
    return values[0] if len(values) == 1 else values


def settings(args, **files: str) -> dict:
    """What the PNG tells: the whole command, and the files that it read."""
    from hashlib import sha256

    hashes = {
        f"{name}_sha256": sha256(Path(path).read_bytes()).hexdigest()
        for name, path in files.items()
    }
    return {**files, **hashes, "arguments": whole_line(args)}


def blend(args) -> None:
    from ..editing.blended import blend, read_mask

    image, mask = (
        read_picture(args.image),
        read_mask(args.mask),
    )  # before the model, which may take minutes

    def run(sd, **options):
        return blend(
            sd, image, mask, args.prompt, args.strength,
            feather=args.feather, paste_back=not args.no_paste_back, **options,
        )  # fmt: skip

    draw(args, settings(args, image=args.image, mask=args.mask), run)


def erase(args) -> None:
    from ..editing.erasure import erase_concepts
    from ..sampling.guidance import erase, sega

    image, guide = None if args.image is None else read_picture(args.image), erase
    if args.sega:
        if args.warmup >= args.steps:
            raise ValueError(
                f"--warmup {args.warmup}: expected less than --steps {args.steps}, or nothing is erased"
            )
        guide = partial(sega, threshold=args.threshold, warmup=args.warmup, momentum=args.momentum)
    else:
        refuse(args, "expected --sega with it", "threshold", "warmup", "momentum")

    def run(sd, **options):
        return erase_concepts(
            sd,
            image,
            args.prompt,
            args.concepts,
            args.strength,
            args.erase_scale,
            guide=guide,
            **options,
        )

    draw(args, settings(args, **({} if image is None else {"image": args.image})), run)
