"""The command `minisd invert`, and what `minisd edit --image` shares with it: the four ways to
invert an image."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .options import AddCommand, Call, DrawRequest, add_drawing_options, count, positive
from .output import check_file, draw, line_again

if TYPE_CHECKING:
    from PIL import Image

    from ..drawing import Options
    from ..editing.inversion import Inversion, Method
    from ..pipeline import StableDiffusion

METHODS = ("ddim", "null-text", "negative-prompt", "direct")  # editing.inversion.METHODS


def add_commands(command: AddCommand) -> None:
    what = "find the noise that draws a given image, and draw it again from that"
    parser = command("invert", invert, what)
    parser.add_argument("image", help="the image, or an inversion that --save wrote")
    shows = "what it shows; for a saved inversion another text edits it by that alone"
    parser.add_argument("prompt", help=shows)
    save = "write the inversion, one .safetensors file, for edit --image"
    parser.add_argument("--save", metavar="FILE", help=save)
    add_inversion_options(parser, otherwise="ddim")
    own = "resize the image to that; without it, its own size, rounded down"
    add_drawing_options(parser, size_help=own)
    parser.set_defaults(steps=50, sampler="ddim", guidance=None)


def add_inversion_options(parser: ArgumentParser, otherwise: Method) -> None:
    add, back = parser.add_argument, "what is done so that guidance leads back to the image"
    add("--inversion", choices=METHODS, help=f"{back}; without it, {otherwise}")
    refine = "fixed-point iterations of each step of the inversion; without it, 0"
    add("--refine", type=count, metavar="K", help=refine)
    inner = "null-text: steps of Adam for each step at most; without it, 10"
    add("--inner-steps", "--inner", type=positive, metavar="N", help=inner)


@dataclass(frozen=True)
class InvertRequest:
    """An image, or an inversion that was saved, and how it is inverted.

    guidance   that it is drawn with: the given one, or null-text's, or the method's
    """

    image: Image.Image | Inversion
    method: Method
    steps: int
    guidance: float
    size: tuple[int, int] | None
    refine: int
    inner_steps: int

    @classmethod
    def of(cls, args: Namespace, call: Call, otherwise: Method) -> InvertRequest:
        """Reads what args.image names: before the model, which may take minutes.

        otherwise: the method where none is given.
        """
        if args.num_images != 1 or args.sampler != "ddim":
            why = "an inverted image is drawn by DDIM from its own noise"
            raise ValueError(f"{why}: expected -n 1 and --sampler ddim")
        call.refuse("an inverted image is drawn from its own noise", "seed")
        saved = Path(args.image).suffix.lower() == ".safetensors"
        request = cls._saved(args, call) if saved else cls._new(args, call, otherwise)
        if request.method in ("null-text", "negative-prompt"):
            why = f"a {request.method} inversion has an unconditional embedding of its own"
            call.refuse(why, "negative_prompt")
        return request

    @classmethod
    def _new(cls, args: Namespace, call: Call, otherwise: Method) -> InvertRequest:
        from ..viewing.images import read_image

        image, method = read_image(args.image), args.inversion or otherwise
        guidance = own_guidance(method) if args.guidance is None else args.guidance
        if method != "null-text":
            call.refuse("expected --inversion null-text with it", "inner_steps")
        elif guidance == 1:
            raise ValueError("--guidance 1: null-text has no effect at it, expected another scale")
        refine, inner_steps = args.refine or 0, args.inner_steps or 10
        return cls(image, method, args.steps, guidance, args.size, refine, inner_steps)

    @classmethod
    def _saved(cls, args: Namespace, call: Call) -> InvertRequest:
        from ..editing.inversion import Inversion

        path, settings = args.image, ("inversion", "refine", "inner_steps", "size")
        call.refuse(f"{path} is an inversion already", *settings)
        image = Inversion.load(path)
        if len(image) != 1:
            expected = "expected one: save inversion[i]"
            raise ValueError(f"{path} holds {len(image)} images, {expected}")
        if args.steps != image.steps:
            call.refuse(f"{path} was inverted in {image.steps} steps", "steps")
        guidance = args.guidance if "guidance" in call.given else image.guidance
        guidance = args.guidance if guidance is None else guidance
        guidance = own_guidance(image.method) if guidance is None else guidance
        return cls(image, image.method, image.steps, guidance, None, 0, 0)

    @property
    def options(self) -> Options:
        """What the inversion says of how it is drawn."""
        return {"steps": self.steps, "guidance": self.guidance}

    def image_size(self, sd: StableDiffusion) -> tuple[int, int]:
        """(height, width) in pixels of the image as it is inverted."""
        from ..editing.inversion import Inversion

        if isinstance(self.image, Inversion):
            h, w = self.image.z.shape[-2:]
            return h * sd.vae.factor, w * sd.vae.factor
        width, height = self.size or (None, None)
        h, w = sd.pixels(self.image, height, width).shape[-2:]
        return h, w

    def inverted(self, sd: StableDiffusion, prompt: str) -> Inversion:
        """The inversion by the prompt, which says what the image shows; a saved one is as it is."""
        from ..editing import inversion as by
        from ..editing.null_text import null_text

        if isinstance(self.image, by.Inversion):
            return self.image
        (width, height), method = self.size or (None, None), self.method
        inversion = by.invert(
            sd,
            self.image,
            prompt,
            steps=self.steps,
            refine=self.refine,
            trajectory=method in ("null-text", "direct"),
            height=height,
            width=width,
        )
        if method == "null-text":
            return null_text(sd, inversion, self.guidance, inner_steps=self.inner_steps)
        if method == "negative-prompt":
            return by.negative_prompt_inversion(sd, inversion)
        return by.direct_inversion(inversion) if method == "direct" else inversion


def own_guidance(method: Method) -> float:
    """Where none is given: plain DDIM comes back without any."""
    return 1.0 if method == "ddim" else 7.5


def invert(args: Namespace, call: Call) -> None:
    from ..editing.inversion import Inversion, redraw
    from ..sampling.guidance import cfg

    inverting, prompt, save = InvertRequest.of(args, call, "ddim"), args.prompt, args.save
    if inverting.method == "direct":
        if isinstance(inverting.image, Inversion) and inverting.image.prompts != (prompt,):
            edit = f"minisd edit --image {args.image} SOURCE TARGET"
            raise ValueError(f"a direct inversion is edited beside its source, by {edit}")
        call.refuse("a direct inversion comes back whatever it is", "guidance", "negative_prompt")
    request = DrawRequest.of(args, call, **inverting.options)
    if save is not None:
        check_save(save)

    def run(sd: StableDiffusion, options: Options) -> list[Image.Image]:
        inversion = inverting.inverted(sd, prompt)
        if save is not None:
            inversion.save(save)
            print(save)
        return redraw(
            sd,
            inversion,
            None if inversion.prompts == (prompt,) else prompt,
            guidance=inverting.guidance,
            rule=options.get("rule", cfg),
            negative_prompt=options["negative_prompt"],
            on_step=options["on_step"],
        )

    draw(request, run, lambda _: {"prompt": prompt, "arguments": line_again(call.argv, None)})


def check_save(path: str) -> None:
    """ValueError or OSError unless an inversion can be written there."""
    if not path.endswith(".safetensors") or Path(path).is_dir():
        raise ValueError(f"--save {path}: expected the name of a file that ends in .safetensors")
    check_file("--save", Path(path))
