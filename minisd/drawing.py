"""Drawing: what all ways of drawing share, said and checked once.

A method (txt2img, edit_prompt, blend, ...) takes `**options`, which are the fields of `Drawing`,
and is then a few lines: embed the texts, choose the noise, run the loop, decode.

    drawing = Drawing.of(options)
    uncond, cond = drawing.embed(sd, prompts)
    x = drawing.noise(sd, rows)
    predict = drawing.rule(sd.network, uncond, cond, drawing.guidance)
    z = drawing.denoise(x, drawing.make_sampler(sd), predict)
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard, TypeVar, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from . import expect
from .sampling.ddpm import DDPM
from .sampling.guidance import Embeddings, Predict, cfg, check_scales
from .sampling.loop import denoise
from .sampling.samplers import DDIM, DPMpp2M, Sampler, Step
from .sampling.schedule import NoiseSchedule

if TYPE_CHECKING:
    from .latents import Latents
    from .pipeline import StableDiffusion

SamplerName = Literal["dpm++", "dpm++ linspace", "ddim", "ddpm"]
SAMPLERS = get_args(SamplerName)
T = TypeVar("T")
FAR = 2.5  # times the pixels a model was trained on: from there on things repeat or fall apart
log = logging.getLogger("minisd")
Rule = Callable[..., Predict]
OnStep = Callable[[Tensor, Step], Tensor | None]


class Cancelled(Exception):
    """For an on_step that stops a drawing: raise it there, catch it around the call.

    Nothing in minisd raises or catches it; any exception would do, this one is nobody else's.
    """


class Options(TypedDict, total=False):
    """The fields of `Drawing`, as keyword arguments of everything that draws."""

    negative_prompt: str | Sequence[str]
    uncond: Embeddings | None
    steps: int
    guidance: float | Sequence[float]
    rule: Rule
    sampler: SamplerName
    seed: int | Sequence[int]
    num_images: int
    height: int | None
    width: int | None
    latents: Tensor | None
    on_step: OnStep | None
    progress: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """The options that all ways of drawing share.

    negative_prompt   what guidance leads away from, one for all prompts or one for each; it has no
                      effect at guidance 1, where no unconditional half is computed
    uncond            its embedding in place of the text: (1 or B, L, D), or a list with one for
                      each of `steps` (null-text inversion makes one)
    steps             1 to 1000, of the sampler's full schedule
    guidance          scale of classifier-free guidance; 1: none, twice as fast; or a list with one
                      for each image
    rule              how the text and the negative one make one prediction: `cfg`, or one like it
                      (`pag`), called as rule(network, uncond, cond, guidance, edits)
    sampler           "dpm++": DPM-Solver++ 2M on Karras' noise levels; "dpm++ linspace": on the
                      schedule's own; "ddim"; "ddpm": ancestral, with noise of the image's seed at
                      every step, where the method takes it
    seed              image i is drawn with seed + i, whatever the batch; a list, or any
                      other sequence, gives each its seed. torch's generator reads its last 32
                      bits: seed and seed + 2**32 draw the same noise
    num_images        of each prompt; those of the first prompt come first
    height, width     in pixels, multiples of vae.factor; None: the model's own, or the image's
    latents           noise (B, C, h, w) in place of the seed's
    on_step           called with (x, step) after each step, and may return new latents
    progress          a bar on stderr

    ValueError for values that do not fit; an unknown option, or a prompt that is no text, is a
    TypeError.
    """

    negative_prompt: str | Sequence[str] = ""
    uncond: Embeddings | None = None
    steps: int = 25
    guidance: float | Sequence[float] = 7.5
    rule: Rule = cfg
    sampler: SamplerName = "dpm++"
    seed: int | Sequence[int] = 0
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    latents: Tensor | None = None
    on_step: OnStep | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        expect.whole_number("steps", self.steps, 1)
        check_scales("guidance", self.guidance)
        expect.whole_number("num_images", self.num_images, 1)
        if self.sampler not in SAMPLERS:
            expected = ", ".join(map(repr, SAMPLERS))
            raise ValueError(f"sampler is {self.sampler!r}, expected one of {expected}")
        if self.uncond is not None and self.negative_prompt != "":
            raise ValueError("got negative_prompt and uncond, expected one of them")
        if isinstance(self.uncond, (list, tuple)) and len(self.uncond) != self.steps:
            got = f"uncond is a list of {len(self.uncond)} entries"
            raise ValueError(f"{got}, expected one for each of {self.steps} steps")
        if not callable(self.rule):
            raise ValueError(f"rule is {self.rule!r:.80}, expected a function like cfg")
        if not (self.on_step is None or callable(self.on_step)):
            raise ValueError(f"on_step is {self.on_step!r:.80}, expected a function (x, step)")

    @classmethod
    def of(
        cls,
        options: Options,
        *,
        without: Collection[str] = (),
        beside: Collection[str] = (),
        **defaults: Any,
    ) -> Drawing:
        """From a method's options. defaults: where the method's are others.

        without: the options that have no effect on the method: ValueError if one is given. beside:
        the method's own, which the TypeError for an unknown one names too.
        """
        own = [name for name in Options.__annotations__ if name not in without]
        check_names("option", set(options) - set(without), [*own, *beside])
        given: dict[str, Any] = {**defaults, **options}
        for name in without:
            if name in options:
                raise ValueError(f"{name} has no effect here: got {given[name]!r:.80}")
        return cls(**given)

    def at(self, height: int, width: int) -> Drawing:
        """The same at the size of an image that was given."""
        return replace(self, height=height, width=width)

    def for_each_seed(self) -> Drawing:
        """The same with num_images as many as there are seeds in a list, for methods that draw all
        prompts from one noise."""
        if self.num_images > 1 or isinstance(self.seed, Integral):
            return self
        return replace(self, num_images=len(seeds(self.seed)))

    def make_sampler(self, sd: Latents, strength: float = 1.0, rows: int | None = None) -> Sampler:
        """The sampler, of whose steps the last int(steps * strength) run (diffusers' rule).

        rows: of which each has its own noise at each step; None: the method is for samplers without
        noise, and ValueError for "ddpm". A warning where no step runs though strength is not 0.
        """
        expect.number("strength", strength, 0, 1)
        skip = self.steps - int(self.steps * strength)
        if strength > 0 and skip == self.steps:
            got = f"{self.steps} steps at strength {strength:g} are less than one step"
            warnings.warn(f"{got}: the image comes back as it is", stacklevel=3)
        if self.sampler == "ddpm":
            if rows is None:
                known = ", ".join(name for name in SAMPLERS if name != "ddpm")
                raise ValueError(f"sampler is 'ddpm', expected one without noise here: {known}")
            return DDPM(sd.schedule, self.steps, skip, seed=tuple(seeds(self.seed, rows)))
        return sampler_named(self.sampler, sd.schedule, self.steps, skip)

    def noise(self, sd: Latents, rows: int) -> Tensor:
        """x_T (rows, C, h, w): the given latents, or else the seed's noise.

        ValueError for latents of another number or another size than height x width pixels.
        """
        x, height, width = self.latents, self.height, self.width
        if x is None:
            x = sd.noise(self.seed, rows, height, width)
            warn_if_far(sd, x)
            return x
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 4):
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"the latents are {got}, expected a tensor of floats (B, C, h, w)")
        if height is None and width is None:
            height, width = (side * sd.vae.factor for side in x.shape[-2:])
        expected = (rows, sd.channels, *sd.latent_size(height, width))
        if tuple(x.shape) != expected:
            raise ValueError(f"the latents have shape {tuple(x.shape)}, expected {expected}")
        return x.to(sd.device, sd.dtype)

    def embed(self, sd: StableDiffusion, prompts: Sequence[str]) -> tuple[Embeddings, Tensor]:
        """(uncond, cond) of all images, cond (len(prompts) * num_images, L, D)."""
        negatives = as_list(self.negative_prompt)
        expect.rows("prompts", prompts=len(prompts), negative_prompts=len(negatives))
        check_scales("guidance", self.guidance, len(prompts) * self.num_images)
        cond = self.per_image(embed(sd, prompts), len(prompts))
        if self.uncond is not None:
            return self.uncond, cond
        return self.per_image(embed(sd, negatives), len(prompts)), cond

    def per_image(self, rows: Tensor, prompts: int) -> Tensor:
        """One row for all prompts or one for each -> one for each image, prompt after prompt."""
        return rows.expand(prompts, *rows.shape[1:]).repeat_interleave(self.num_images, dim=0)

    def each(self, images: Sequence[T]) -> list[T]:
        """num_images times each, in the order of `per_image`."""
        return [image for image in images for _ in range(self.num_images)]

    def denoise(
        self,
        x: Tensor,
        sampler: Sampler,
        predict: Predict,
        after: Callable[[Tensor, Step], Tensor] | None = None,
    ) -> Tensor:
        """The loop, with a progress bar; `after` and then on_step see the latent after each
        step."""
        start = time.monotonic()
        with memory_for("latents", x):
            hook = chain(after=after, on_step=self.on_step)
            x = denoise(x, self.shown(sampler), predict, hook)
        seconds = time.monotonic() - start
        what = f"{len(x)} latents of {x.shape[3]} x {x.shape[2]}"
        log.info("%d steps of %s in %.2f s", len(sampler), what, seconds)
        return x

    def shown(self, sampler: Sampler) -> tqdm[Step]:
        """The steps under a progress bar."""
        return tqdm(sampler, disable=not self.progress)


def warn_if_far(sd: Latents, x: Tensor) -> None:
    """A UserWarning, before minutes are spent, for images far from the size that the model knows.

    x: (B, C, h, w). Where the config names no size, nothing is known.
    """
    own = sd.denoiser.config.sample_size
    if own is None:
        return
    h, w = own if isinstance(own, tuple) else (own, own)
    times = x.shape[2] * x.shape[3] / (h * w)
    if not 1 / FAR <= times <= FAR:
        factor = sd.vae.factor
        got = f"{x.shape[3] * factor} x {x.shape[2] * factor} pixels are {times:.2g} times"
        trained = f"those that the model was trained on ({w * factor} x {h * factor})"
        warnings.warn(f"{got} {trained}: things may repeat or fall apart", stacklevel=4)


def seeds(seed: int | Sequence[int], rows: int | None = None) -> list[int]:
    """The seed of each row, as torch takes it: seed + i, or the i-th of a sequence.

    rows: None is 1, or as many as the sequence has. ValueError for what is no seed.
    """
    given: Any = seed
    if is_seed(seed):
        given = [int(seed) + i for i in range(rows or 1)]
    is_text = isinstance(given, (str, bytes, bytearray))
    listed = isinstance(given, Sequence) and not is_text and len(given) > 0
    if listed and rows not in (None, len(given)):
        raise ValueError(f"got {len(given)} seeds for {rows} images, expected one for each")
    if not (listed and all(is_seed(s) and -(2**63) <= int(s) < 2**64 for s in given)):
        expected = "a whole number or a list of them, at least one, from -2**63 to 2**64 - 1"
        raise ValueError(f"got seeds {given!r:.80}, expected {expected}")
    return [int(s) for s in given]


def is_seed(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def embed(sd: StableDiffusion, prompts: Sequence[str]) -> Tensor:
    """(B, L, D). Each text once and alone: in a batch, BLAS may give equal texts other last
    bits."""
    prompts = as_list(prompts)
    rows = {text: sd.encode_prompt([text]) for text in dict.fromkeys(prompts)}
    return torch.cat([rows[text] for text in prompts])


def sampler_named(name: SamplerName, schedule: NoiseSchedule, steps: int, skip: int = 0) -> Sampler:
    """The sampler of that name."""
    if name == "ddim":
        return DDIM(schedule, steps, skip)
    return DPMpp2M(schedule, steps, skip, karras=name == "dpm++")


def chain(**hooks: OnStep | None) -> Callable[[Tensor, Step], Tensor] | None:
    """after(x, step): the given ones in turn, where one may return None for x as it is."""
    given = [(name, hook) for name, hook in hooks.items() if hook is not None]

    def after(x: Tensor, step: Step) -> Tensor:
        for name, hook in given:
            new = hook(x, step)
            if new is None:
                continue
            if not (isinstance(new, Tensor) and new.shape == x.shape):
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                expected = f"None or latents of shape {tuple(x.shape)}"
                raise ValueError(f"{name} returned {got}, expected {expected}")
            x = new.to(x)
        return x

    return after if given else None


@contextmanager
def memory_for(what: str, x: Tensor, factor: int = 1) -> Iterator[None]:
    """torch's errors of memory that it does not get, as a MemoryError that says what for.

    x: (B, C, h, w); what is `factor` times as high and wide.
    """
    try:
        yield
    except RuntimeError as error:  # on a CPU it has no class of its own
        out = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise
        size = f"{x.shape[3] * factor} x {x.shape[2] * factor}"
        hint = "a smaller size (--size WxH, or height= and width=), fewer images or bfloat16"
        raise MemoryError(f"not enough memory for {what} of {size}: try {hint}") from error


def as_list(texts: str | Sequence[str]) -> list[str]:
    """A text as a list of one, a list as it is; TypeError for anything that is no text."""
    if not isinstance(texts, Sequence):
        raise TypeError(f"got {texts!r:.80}, expected a text or a list of texts")
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise TypeError(f"got {text!r:.80} as one of the texts, expected a str")
    return listed


def check_names(what: str, given: Collection[str], known: Collection[str]) -> None:
    """TypeError for names of options that are not known."""
    if unknown := sorted(set(given) - set(known)):
        named = ", ".join(map(repr, unknown))
        raise TypeError(f"got the {what} {named}, expected {', '.join(known)}")
