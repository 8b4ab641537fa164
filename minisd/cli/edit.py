"""The commands `minisd edit` (prompt-to-prompt) and `minisd heatmap`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .invert import InvertRequest, add_inversion_options
from .options import (
    AddCommand,
    Call,
    DrawRequest,
    add_drawing_options,
    factor,
    fractions,
    interval,
    number,
    schedule,
    sites,
    words,
)
from .output import (
    Places,
    check_apart,
    draw,
    line_again,
    load_model,
    output_places,
    text_chunks,
    tracing,
)

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import Options
    from ..editing.prompt_to_prompt import EditOptions
    from ..pipeline import StableDiffusion

SITES = "in down, mid or up, on a grid (16x16), or with at most so many positions (256)"


def add_commands(command: AddCommand) -> None:
    what = "draw a prompt, and the same image according to other prompts (prompt-to-prompt)"
    parser = command("edit", edit, what)
    add_edit_options(parser)
    add_inversion_options(parser, otherwise="direct")
    own = "size in pixels; without it the model's own, or that of --image"
    add_drawing_options(parser, size_help=own)
    parser.set_defaults(steps=50, sampler="ddim", output=None)

    what = "draw an image, and where in it each word of the prompt is"
    parser = command("heatmap", heatmap, what)
    add = parser.add_argument
    add("prompt", help="what to draw")
    either = parser.add_mutually_exclusive_group().add_argument
    only = "only these words, e.g. circle,square"
    either("--words", type=words, metavar="WORDS", help=only)
    tokens = "one map for each token on one scale, <bos> and <eos> among them"
    either("--tokens", action="store_true", help=tokens)
    only = f"only cross-attention sites {SITES}"
    add("--where", "--sites", metavar="WHERE", type=sites, help=only)
    add("--until", type=number, default=1.0, help="the mean over this first part of the steps")
    sums = "DAAM's maps: the sum of those of all sites, enlarged to the latent's size"
    add("--daam", action="store_true", help=sums)
    add_drawing_options(parser, size_help="size in pixels; without it the model's own")


def add_edit_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="the prompt of the image that is edited")
    targets = "prompts to edit it to, right after SOURCE; none with --reweight: that itself"
    add("target", nargs="*", help=targets)
    when = "FRACTION of the steps, START:END, or WORD=... for a word of the target (repeat)"
    cross = f"take the source's cross-attention: {when}; without it, 0.8"
    add("--cross-steps", metavar="WHEN", type=schedule, action="append", help=cross)
    sweep = "draw the one target with each as --cross-steps: 0,0.25,0.5,1"
    add("--sweep", metavar="FRACTIONS", type=fractions, help=sweep)
    own = "take its self-attention: FRACTION of the steps, or START:END"
    add("--self-steps", metavar="WHEN", type=interval, default=0.4, help=own)
    kind = "words swapped, or added and removed; without it, by the prompts"
    add("--edit", "--kind", choices=("replace", "refine"), help=kind)
    scale = "scale a word's attention (repeat)"
    add("--reweight", metavar="WORD=FACTOR", type=factor, action="append", help=scale)
    near = "change it only near these words, e.g. circle,square"
    add("--local-blend", metavar="WORDS", type=words, help=near)
    far = "with --local-blend: but not near these words"
    add("--subtract", metavar="WORDS", type=words, help=far)
    share = "with --local-blend: share of the greatest attention"
    add("--threshold", type=number, default=0.3, help=share)
    only = f"only cross-attention sites {SITES}"
    add("--cross-sites", "--sites", metavar="WHERE", type=sites, help=only)
    published = "the token maps and step counts of the published code"
    add("--compat", choices=("google",), help=published)
    sheet = "write source, seed-only baseline and edit side by side, a row for each target"
    add("--sheet", metavar="PATH", help=sheet)
    given = "edit this image, which SOURCE describes, or an inversion that was saved"
    add("--image", metavar="PATH", help=given)


# edit


@dataclass(frozen=True)
class EditRequest:
    """`minisd edit`: what is drawn, and where it goes.

    targets       as they are given, or once for each fraction of a sweep
    edit          the arguments of `PromptToPrompt`
    local_blend   those of `LocalBlend`
    inverting     the image that is edited, if one is given
    images        of one seed after the other, of each the source and the targets; None if only
                  sheets are asked for
    sheets        one for each seed, if they are asked for
    """

    drawing: DrawRequest
    source: str
    targets: list[str]
    edit: EditOptions
    local_blend: dict[str, Any] | None
    sweep: list[float] | None
    inverting: InvertRequest | None
    images: Places | None
    sheets: Places | None

    @classmethod
    def of(cls, args: Namespace, call: Call) -> EditRequest:
        blend = None
        if args.local_blend:
            subtract = args.subtract or ()
            blend = {"words": args.local_blend, "subtract": subtract, "threshold": args.threshold}
        else:
            call.refuse("expected --local-blend with it", "subtract", "threshold")
        if args.sweep and (len(args.target) != 1 or args.cross_steps):
            got = f"got {len(args.target)} targets"
            raise ValueError(f"--sweep: expected one target and no --cross-steps, {got}")
        targets = args.target * len(args.sweep) if args.sweep else args.target
        inverting = read_inverting(args, call)
        drawing = DrawRequest.of(args, call, **(inverting.options if inverting else {}))
        each = 1 + max(len(targets), 1)
        only_sheets = args.output is None and args.sheet
        images = None if only_sheets else output_places(args.output or ".", args.num_images * each)
        sheets = output_places(args.sheet, args.num_images, "--sheet") if args.sheet else None
        check_apart(images, sheets, drawing.trace)
        return cls(
            drawing=drawing,
            source=args.source,
            targets=targets,
            edit=edit_options(args),
            local_blend=blend,
            sweep=args.sweep,
            inverting=inverting,
            images=images,
            sheets=sheets,
        )

    @property
    def prompts(self) -> list[str]:
        """Of the images of one seed, the source first."""
        return [self.source, *(self.targets or [self.source])]

    def again(self, seed: int, place: str = "-o") -> str:
        """The command that draws the images of a seed again, or with place="--sheet" its sheet."""
        return line_again(self.drawing.call.argv, None if self.inverting else seed, place)


def edit_options(args: Namespace) -> EditOptions:
    options: EditOptions = {
        "self_steps": args.self_steps,
        "edit": args.edit,
        "cross_sites": args.cross_sites,
        "compat": args.compat,
    }
    if args.sweep:
        options["cross_steps"] = args.sweep
    elif args.cross_steps:
        options["cross_steps"] = {"default": 0.8} | dict(args.cross_steps)
    if args.reweight:
        options["reweight"] = dict(args.reweight)
    return options


def read_inverting(args: Namespace, call: Call) -> InvertRequest | None:
    """The image that --image names, which has to be inverted by the source prompt."""
    from ..editing.inversion import Inversion

    if args.image is None:
        call.refuse("expected --image with it", "inversion", "refine", "inner_steps")
        return None
    inverting = InvertRequest.of(args, call, "direct")
    if isinstance(image := inverting.image, Inversion):
        if image.prompts != (args.source,):
            by = ", ".join(map(repr, image.prompts))
            raise ValueError(f"{args.image} was inverted by {by}: give that as SOURCE")
        if image.guidance not in (None, inverting.guidance):
            call.refuse(f"{args.image} was made for guidance {image.guidance:g}", "guidance")
    return inverting


def edit(args: Namespace, call: Call) -> None:
    request = EditRequest.of(args, call)
    drawing, source = request.drawing, request.source
    sd = load_model(drawing)
    check_edit(request, sd)
    for i, seed in enumerate(drawing.seeds):
        with tracing(drawing, sd, seed) as on_step:
            images, sheet = draw_edit(request, sd, drawing.options_of(seed, on_step))
        if request.images is not None:
            for j, (image, prompt) in enumerate(zip(images, request.prompts)):
                told = {"source": source, "prompt": prompt, "arguments": request.again(seed)}
                chunks = text_chunks(drawing, sd, seed, image, told)
                print(request.images.write(i * len(images) + j, image, chunks))
        if request.sheets is not None and sheet is not None:
            told = {"source": source, "arguments": request.again(seed, "--sheet")}
            chunks = text_chunks(drawing, sd, seed, images[0], told)
            print(request.sheets.write(i, sheet, chunks))


def check_edit(request: EditRequest, sd: StableDiffusion) -> None:
    """Refuse what `edit_prompt` will refuse, before an image is inverted, which may take hours."""
    from ..editing.local_blend import LocalBlend
    from ..editing.prompt_to_prompt import PromptToPrompt

    options, blend = request.drawing.options, request.local_blend
    height, width = options["height"], options["width"]
    if request.inverting is not None:
        height, width = request.inverting.image_size(sd)
    p2p = PromptToPrompt(
        sd,
        request.source,
        *request.targets,
        steps=options["steps"],
        collect_maps=blend is not None,
        height=height,
        width=width,
        **request.edit,
    )
    if blend is not None:
        LocalBlend(p2p.maps, **blend)


def draw_edit(
    request: EditRequest, sd: StableDiffusion, options: Options
) -> tuple[list[Image.Image], Image.Image | None]:
    """The source and its edits, and the sheet if one is asked for."""
    from ..editing.prompt_to_prompt import edit_prompt, seed_baseline

    after = None
    if request.inverting is not None:
        inversion = request.inverting.inverted(sd, request.source)
        inverted = inversion.edit_options(sd)
        after = inverted.pop("after")
        options = {**options, **inverted}  # type: ignore[typeddict-item]
    images = edit_prompt(
        sd,
        request.source,
        *request.targets,
        local_blend=request.local_blend,
        after=after,
        **request.edit,
        **options,
    )
    if not request.sheets:
        return images, None
    if request.sweep:
        return images, sweep_sheet(request, images)
    plain: Options = {**options, "on_step": None}  # the trace is the edit's
    baseline = seed_baseline(sd, *request.prompts, **plain)
    return images, edit_sheet(request.prompts, images, baseline)


def sweep_sheet(request: EditRequest, images: list[Image.Image]) -> Image.Image:
    """All images of a sweep in one row."""
    from ..viewing.visualize import contact_sheet

    parts = zip(request.sweep or (), request.targets)
    captions = [request.source, *(f"{fraction:.0%}: {target}" for fraction, target in parts)]
    return contact_sheet(images, captions, columns=len(images))


def edit_sheet(
    prompts: list[str], images: list[Image.Image], baseline: list[Image.Image]
) -> Image.Image:
    """Source, seed-only baseline and edit side by side, a row for each target."""
    from ..viewing.visualize import contact_sheet

    shown, captions = [], []
    for target, plain, edited in zip(prompts[1:], baseline[1:], images[1:]):
        shown += [images[0], plain, edited]
        captions += [prompts[0], f"without edit: {target}", f"edit: {target}"]
    return contact_sheet(shown, captions, columns=3)


# heatmap


def heatmap(args: Namespace, call: Call) -> None:
    request = DrawRequest.of(args, call)
    prompt, only, tokens = args.prompt, args.words, args.tokens
    where, until = args.where, args.until

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        from ..editing.alignment import find_word, missing_word
        from ..editing.daam import daam
        from ..viewing.visualize import heatmap, token_sheet, word_sheet

        for word in only or ():  # before the drawing, which may take minutes
            if not find_word(sd.tokenizer, prompt, word):
                raise missing_word(sd.tokenizer, word, [prompt])
        [image], maps = heatmap(sd, prompt, where=where, until=until, **options)
        maps = daam(maps) if args.daam else maps
        return [token_sheet(image, maps) if tokens else word_sheet(image, maps, only)]

    draw(request, run, lambda seed: {"prompt": prompt, "arguments": line_again(call.argv, seed)})
