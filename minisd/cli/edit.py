"""The commands `minisd edit` (prompt-to-prompt) and `minisd heatmap`."""

import argparse

from .invert import add_inversion_options, edit_options, picture_size, read_image
from .main import (
    add_drawing_options,
    draw,
    drawing_options,
    load_model,
    number,
    output_paths,
    refuse,
    text_chunks,
    tracing,
    whole_line,
    write_png,
)

SITES = "in down, mid or up, on a grid (16x16), or with at most so many positions (256)"


def add_commands(command) -> None:
    """command(name, run, help) -> the parser of a new command."""
    parser = command(
        "edit", edit, "draw a prompt, and the same picture after other prompts (prompt-to-prompt)"
    )
    add = parser.add_argument
    add("source", help="the prompt of the picture that is edited")
    add(
        "target",
        nargs="*",
        help="prompts to edit it to; none with --reweight: the source prompt itself",
    )
    when = "FRACTION of the steps, START:END, or WORD=... for a word of the target (repeat)"
    add(
        "--cross",
        metavar="WHEN",
        type=schedule,
        action="append",
        help=f"take the source's cross-attention: {when}",
    )
    add(
        "--sweep",
        metavar="FRACTIONS",
        type=fractions,
        help="draw the one target with each as --cross: 0,0.25,0.5,1",
    )
    add(
        "--self",
        metavar="WHEN",
        type=interval,
        default=0.4,
        dest="own",
        help="take its self-attention: as --cross",
    )
    add(
        "--kind",
        choices=("replace", "refine"),
        help="words swapped, or added and removed; without it, by the prompts",
    )
    add(
        "--reweight",
        metavar="WORD=FACTOR",
        type=factor,
        action="append",
        help="scale a word's attention (repeat)",
    )
    add(
        "--local-blend",
        metavar="WORDS",
        type=words,
        help="change it only near these words, e.g. circle,square",
    )
    add(
        "--subtract",
        metavar="WORDS",
        type=words,
        help="with --local-blend: but not near these words",
    )
    add(
        "--threshold",
        type=number,
        default=0.3,
        help="with --local-blend: share of the greatest attention",
    )
    add("--sites", metavar="WHERE", type=sites, help=f"only cross-attention sites {SITES}")
    add(
        "--compat", choices=("google",), help="the token maps and step counts of the published code"
    )
    add(
        "--sheet",
        metavar="PATH",
        help="write source, seed-only baseline and edit side by side, a row for each target",
    )
    add(
        "--image",
        metavar="PATH",
        help="edit this picture, which SOURCE describes, or an inversion that was saved",
    )
    add_inversion_options(parser, otherwise="direct")
    add_drawing_options(
        parser, size_help="size in pixels; without it the model's own, or that of --image"
    )
    parser.set_defaults(steps=50, sampler="ddim", output=None)

    parser = command(
        "heatmap", heatmap, "draw a picture, and where in it each word of the prompt is"
    )
    add = parser.add_argument
    add("prompt", help="what to draw")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--words", type=words, metavar="WORDS", help="only these words, e.g. circle,square")
    either(
        "--tokens",
        action="store_true",
        help="one map for each token on one scale, <bos> and <eos> among them",
    )
    add("--sites", metavar="WHERE", type=sites, help=f"only cross-attention sites {SITES}")
    add("--until", type=number, default=1.0, help="the mean over this first part of the steps")
    add_drawing_options(parser, size_help="size in pixels; without it the model's own")


def interval(text: str):
    """ "0.8" -> 0.8, "0.2:0.6" -> (0.2, 0.6)."""
    try:
        values = tuple(map(float, text.split(":")))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a fraction of the steps or START:END, e.g. 0.2:0.6"
        )
    return values if len(values) == 2 else values[0]


def schedule(text: str):
    """ "cat=0.2" -> ("cat", 0.2), "0.8" -> ("default", 0.8)."""
    word, equals, when = text.rpartition("=")
    return (word if equals else "default", interval(when))


def fractions(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]."""
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected fractions of the steps, e.g. 0,0.5,1"
        ) from None


def factor(text: str) -> tuple[str, float]:
    word, _, value = text.rpartition("=")
    try:
        return word, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected WORD=FACTOR, e.g. cat=2"
        ) from None


def words(text: str) -> tuple[str, ...]:
    """ "circle, red square" -> ("circle", "red square")."""
    if not (found := tuple(word for word in map(str.strip, text.split(",")) if word)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected at least one, e.g. circle,square")
    return found


def sites(text: str) -> tuple[str | int, ...]:
    """ "down,16x16,256" -> ("down", "16x16", 256)."""
    return tuple(int(entry) if entry.isdecimal() else entry for entry in words(text))


def edit(args) -> None:
    options = {
        "self_steps": args.own,
        "edit": args.kind,
        "cross_sites": args.sites,
        "compat": args.compat,
    }
    if args.cross:
        options["cross_steps"] = {"default": 0.8} | dict(args.cross)
    if args.reweight:
        options["reweight"] = dict(args.reweight)
    blend = None
    if args.local_blend:
        blend = {
            "words": args.local_blend,
            "subtract": args.subtract or (),
            "threshold": args.threshold,
        }
    else:
        refuse(args, "expected --local-blend with it", "subtract", "threshold")

    given = read_image(args, args.source)
    targets = args.target or [args.source]
    if args.sweep:
        if len(args.target) != 1 or args.cross:
            raise ValueError(
                f"--sweep: expected one target and no --cross, got {len(args.target)} targets"
            )
        targets = args.target = args.target * len(args.sweep)
        options["cross_steps"] = args.sweep
    each = 1 + len(targets)
    pictures = (
        []
        if args.output is None and args.sheet
        else output_paths(args.output or ".", args.n * each)
    )
    sheets = output_paths(args.sheet, args.n, "--sheet") if args.sheet else []
    sd = load_model(args)
    from ..editing.prompt_to_prompt import edit_prompt

    check_edit(args, sd, given, options, blend)
    settings = {"arguments": whole_line(args)}
    for i in range(args.n):
        seed = args.seed + i
        with tracing(args, sd, seed) as on_step:
            shared = drawing_options(args, seed) | {
                "on_step": on_step,
                "baseline": bool(sheets and not args.sweep),
            }
            shared |= edit_options(args, sd, given)
            drawn = edit_prompt(
                sd, args.source, *args.target, local_blend=blend, **shared, **options
            )
        images, baseline = drawn if shared["baseline"] else (drawn, None)
        for path, image, prompt in zip(pictures[i * each :], images, [args.source, *targets]):
            texts = {"source": args.source, "prompt": prompt}
            write_png(path, image, text_chunks(args, sd, seed, image, texts, settings))
            print(path)
        if sheets:
            sheet = edit_sheet(args.source, targets, images, baseline, args.sweep)
            write_png(
                sheets[i],
                sheet,
                text_chunks(args, sd, seed, images[0], {"source": args.source}, settings),
            )
            print(sheets[i])


def check_edit(args, sd, image, options: dict, blend: dict | None) -> None:
    """Refuse what `edit_prompt` will refuse, before a picture is inverted, which may take hours."""
    from ..editing.local_blend import LocalBlend
    from ..editing.prompt_to_prompt import PromptToPrompt

    width, height = args.size or (None, None)
    if image is not None:
        height, width = picture_size(sd, image, height, width)
    p2p = PromptToPrompt(
        sd, args.source, *args.target, steps=args.steps, height=height, width=width, **options
    )
    if blend is not None:
        LocalBlend(p2p.maps, **blend)


def edit_sheet(
    source: str, targets: list[str], images: list, baseline: list | None, sweep: list[float] | None
):
    """Source, seed-only baseline and edit side by side, a row for each target; of a sweep all
    pictures in one row."""
    from ..viewing.visualize import contact_sheet

    if sweep:
        captions = [source, *(f"{fraction:.0%}: {targets[0]}" for fraction in sweep)]
        return contact_sheet(images, captions, columns=len(images))
    rows = [[images[0], plain, edited] for plain, edited in zip(baseline[1:], images[1:])]
    captions = [[source, f"without edit: {target}", f"edit: {target}"] for target in targets]
    return contact_sheet(sum(rows, []), sum(captions, []), columns=3)


def heatmap(args) -> None:
    def run(sd, **options):
        from ..editing.alignment import find_word, missing_word
        from ..viewing.visualize import heatmap, token_sheet, word_sheet

        for word in args.words or ():  # before the picture, which may take minutes
            if not find_word(sd.tokenizer, args.prompt, word):
                raise missing_word(word, [args.prompt])
        image, maps = heatmap(sd, args.prompt, where=args.sites, until=args.until, **options)
        if args.tokens:
            return [token_sheet(image, maps)]
        return [word_sheet(image, maps, args.words)]

    draw(args, {"arguments": whole_line(args)}, run)
