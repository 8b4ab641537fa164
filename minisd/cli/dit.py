"""The command `minisd dit`."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from .options import AddCommand, Call, DrawRequest, add_drawing_options, count
from .output import check_seeds, draw, line_again

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import Options
    from ..labels import LabelDiffusion


def add_commands(command: AddCommand) -> None:
    what = "draw an image of a label with a diffusion transformer (DiT)"
    parser = command("dit", dit, what)
    what = "what to draw, a number (of ImageNet 0 to 999; 207: a golden retriever) or a name"
    parser.add_argument("--label", type=label, required=True, metavar="K", help=what)
    whose = "whose formulas are followed where the published code and diffusers differ"
    choices = ("published", "diffusers")
    parser.add_argument("--compat", choices=choices, default="published", help=whose)
    add_drawing_options(parser, size_help="size in pixels; without it the model's own")
    model = "facebook/DiT-XL-2-256"  # under CC-BY-NC
    parser.set_defaults(model=model, steps=250, guidance=4.0, sampler="ddpm")


def label(text: str) -> int | str:
    """A number, or else a name."""
    return count(text) if re.fullmatch(r"[+-]?\d+", text) else text


def dit(args: Namespace, call: Call) -> None:
    call.refuse("a DiT takes a label and no text", "negative_prompt", "tokenizer")
    call.refuse("a DiT has no such sites", "pag")
    call.refuse("it is for a UNet and its text encoder", "lora", "embedding")
    request = DrawRequest.of(args, call)

    def run(model: LabelDiffusion, options: Options) -> list[Image.Image]:
        own: Any = {name: x for name, x in options.items() if name != "negative_prompt"}
        return model.generate(args.label, **own)

    def told(seed: int) -> dict[str, object]:
        return {"label": args.label, "arguments": line_again(call.argv, seed)}

    draw(request, run, told, load=partial(load, compat=args.compat))


def load(request: DrawRequest, compat: Any) -> LabelDiffusion:
    from ..labels import load_dit

    check_seeds(request)
    model, dtype = request.model, request.dtype
    loaded = load_dit(
        model.source,
        device=request.device,
        dtype=dtype,  # type: ignore[arg-type]  # one of options.DTYPES
        compat=compat,
        variant=model.variant,
        revision=model.revision,
        local_files_only=model.local_files_only,
    )
    request.call.before_writing()
    return loaded
