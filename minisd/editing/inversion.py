"""Inversion: the noise from which the sampler would draw a given image, so that it can be edited.

DDIM's steps are run backwards, from the image's latent to noise, by the image's prompt and without
guidance:

    x_t = next(x_s, eps(x_s, t)),   s before t
    next(x, eps) = alpha_t (x - sigma_s eps) / alpha_s + sigma_t eps

That is DDIM's own step solved for x_t, were eps taken at x_t; taken at x_s it is nearly right.
Fixed-point refinement puts what came out back in, x_t <- next(x_s, eps(x_t, t)), k times, after
which the steps forward lead back.

Under guidance they do not: e(uncond) moves the image away. Three remedies, each of which makes of
an inversion another one, whose latents, unconditional embeddings and `after` prompt-to-prompt
takes:

    null-text        optimise the unconditional embedding of each step (null_text.py)
    negative-prompt  take the image's own prompt for it: e(cond) + scale (e(target) - e(cond))
    direct           put the source row back on the recorded trajectory after each step

Sources: Song et al. 2020 (arXiv 2010.02502), section 4.3; Garibi et al. 2024, ReNoise (arXiv
2403.14602); Mokady et al. 2022 (2211.09794), Miyake et al. 2023 (2305.16807) and Ju et al. 2023
(2310.01506) for the remedies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..checkpoints.bundle import read_bundle, write_bundle
from ..drawing import Drawing, Options, as_list, chain, embed, memory_for
from ..pipeline import ImageInput
from ..sampling.guidance import MOST, Embeddings, conditional
from ..sampling.samplers import DDIM, Step

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

Method = Literal["ddim", "null-text", "negative-prompt", "direct"]
METHODS = get_args(Method)
# What a file holds beside latents and z.
FORMAT, FIELDS = (
    "minisd_inversion",
    ("prompts", "steps", "skip", "timesteps", "method", "guidance"),
)
TENSORS = ("latents", "z", "trajectory", "uncond", "losses")
NEEDED = {
    "null-text": ("guidance", "uncond", "losses"),
    "negative-prompt": ("uncond",),
    "direct": ("trajectory",),
}
# Options of Drawing that have no effect on an inversion, which has no guidance and no noise.
WITHOUT_GUIDANCE = (
    "guidance",
    "rule",
    "negative_prompt",
    "uncond",
    "sampler",
    "seed",
    "num_images",
    "latents",
)
# And on what is drawn from one: the inversion says these.
INVERTED = ("steps", "sampler", "seed", "num_images", "height", "width", "latents")


@dataclass(frozen=True, eq=False)
class Inversion:
    """B images as noise, and what leads back from it. All tensors float32, `uncond` of any kind.

    prompts           B texts, by which the images were inverted
    steps, skip, timesteps
                      the sampler's: DDIM(schedule, steps, skip), the timesteps of the full schedule
    latents           (B, C, h, w) at the level of the first step that runs, x_T with skip 0
    z                 (B, C, h, w) the images' latents
    method            one of METHODS
    guidance          the scale that null-text was made for, which needs one; None: any
    trajectory        (steps - skip + 1, B, C, h, w), from `latents` to `z`: entry i - skip is what
                      step i starts from
    uncond            (B, L, D), or one for each step, (steps, B, L, D); None: the caller's
    losses            (steps, inner steps, B) of null-text, NaN where none was computed
    """

    prompts: tuple[str, ...]
    steps: int
    skip: int
    timesteps: tuple[int, ...]
    latents: Tensor
    z: Tensor
    method: Method = "ddim"
    guidance: float | None = None
    trajectory: Tensor | None = None
    uncond: Tensor | None = None
    losses: Tensor | None = None

    def __post_init__(self) -> None:
        expect.whole_number("steps", self.steps, 1)
        expect.whole_number("skip", self.skip, 0, self.steps - 1)
        for name, kind in (("prompts", str), ("timesteps", int)):
            value = getattr(self, name)
            fits = isinstance(value, tuple) and value and all(type(each) is kind for each in value)
            if not fits:
                expected = f"a tuple of {kind.__name__}, at least one"
                raise ValueError(f"{name}: got {value!r:.80}, expected {expected}")
        if len(self.timesteps) != self.steps:
            got = f"{len(self.timesteps)} timesteps"
            raise ValueError(f"got {got}, expected one for each of {self.steps} steps")
        if self.method not in METHODS:
            expected = ", ".join(METHODS)
            raise ValueError(f"the method is {self.method!r:.80}, expected one of {expected}")
        if self.guidance is not None:
            expect.number("guidance", self.guidance, -MOST, MOST)
        needed = NEEDED.get(self.method, ())
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"{self.method} inversion needs {missing[0]}, which is missing")
        B, steps = len(self.prompts), self.steps
        expect.shape("z", self.z, B, "C", "h", "w")
        each = (steps,) if self.uncond is not None and self.uncond.ndim == 4 else ()
        others: dict[str, tuple[int | str, ...]] = {
            "trajectory": (steps - self.skip + 1, *self.z.shape),
            "losses": (steps, "inner", B),
            "uncond": (*each, B, "L", "D"),
        }
        for name, x in self.tensors().items():
            expect.shape(name, x, *others.get(name, tuple(self.z.shape)))
            if name != "uncond" and x.dtype != torch.float32:
                raise ValueError(f"{name}: got {x.dtype}, expected torch.float32")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that there are, by name."""
        return {name: x for name in TENSORS if (x := getattr(self, name)) is not None}

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.prompts)

    def __getitem__(self, i: int) -> "Inversion":
        """Image i alone."""
        i = range(len(self))[i]
        rows = {"latents": 0, "z": 0, "trajectory": 1, "losses": 2, "uncond": -3}
        parts: dict[str, Any] = {n: x.narrow(rows[n], i, 1) for n, x in self.tensors().items()}
        return replace(self, prompts=self.prompts[i : i + 1], **parts)

    def check(self, sd: "StableDiffusion") -> None:
        """ValueError unless it is one of this model's: its timesteps, channels and embeddings."""
        timesteps = tuple(t for t, _, _ in DDIM(sd.schedule, self.steps).plan())
        channels = sd.unet.config.in_channels
        if timesteps != self.timesteps or self.z.shape[1] != channels:
            got = f"{self.z.shape[1]} channels at timesteps {self.timesteps[:2]}..."
            has = f"{channels} channels and timesteps {timesteps[:2]}..."
            why = "it was made with another model"
            raise ValueError(f"the inversion is of {got}, the model has {has}: {why}")
        text = (sd.tokenizer.max_length, sd.unet.config.cross_attention_dim)
        if self.uncond is not None and self.uncond.shape[-2:] != text:
            own = tuple(self.uncond.shape[-2:])
            got = f"the embeddings are {own} for each text"
            raise ValueError(f"{got}, the model's are {text}")

    def unconditional(self, sd: "StableDiffusion") -> Embeddings | None:
        """What `cfg` takes, (B, L, D) or a list with one for each step; None: the caller's."""
        if self.uncond is None:
            return None
        uncond = self.uncond.to(sd.device, sd.dtype)
        return uncond if uncond.ndim == 3 else list(uncond)

    def after(self, rows: slice = slice(None)) -> Callable[[Tensor, Step], Tensor] | None:
        """Direct inversion's after(x, step): these rows are put back on the trajectory.

        None: another method.
        """
        path = self.trajectory
        if self.method != "direct" or path is None:
            return None

        def after(x: Tensor, step: Step) -> Tensor:
            x = x.clone()
            x[rows] = path[step.index + 1 - self.skip].to(x)
            return x

        return after

    def edit_options(self, sd: "StableDiffusion") -> dict[str, Any]:
        """What makes `edit_prompt` edit this image: edit_prompt(sd, prompt, target, **options)."""
        self.check(sd)
        if len(self) != 1:
            raise ValueError(f"got {len(self)} images, expected one: inversion[i] is image i alone")
        if self.skip:
            got = f"got skip={self.skip}"
            raise ValueError(f"prompt-to-prompt starts from noise, expected skip=0, {got}")
        options = {"latents": self.latents, "steps": self.steps, "sampler": "ddim"}
        options |= {"after": self.after(slice(0, 1)), "uncond": self.unconditional(sd)}
        return options if self.guidance is None else options | {"guidance": self.guidance}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, under its name only when it is whole."""
        fields = {name: getattr(self, name) for name in FIELDS}
        write_bundle(path, FORMAT, fields, self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> "Inversion":
        """Read a file that `save` wrote, on the CPU; ValueError if it is another or does not
        fit."""
        needed, known = ("latents", "z"), "|".join(TENSORS)
        fields, tensors = read_bundle(path, FORMAT, FIELDS, needed, known, may_be_nan=("losses",))
        try:
            return cls(**(fields | tensors))
        except ValueError as error:
            raise ValueError(f"{path} is no complete {FORMAT}: {error}") from error


@torch.no_grad()
def invert(
    sd: "StableDiffusion",
    image: ImageInput,
    prompt: str | Sequence[str],
    *,
    skip: int = 0,
    refine: int = 0,
    trajectory: bool = False,
    **options: Unpack[Options],
) -> Inversion:
    """DDIM inversion of image(s) by the prompt(s) that describe them, without guidance.

    image: what `sd.encode_image` takes; its mode, not a sample, is inverted. prompt: one for all
    images or one for each. skip: do not run the last steps, to the noisiest levels; sampling has to
    skip the same. refine: fixed-point iterations of each step, each costs one more call of the
    network; 1 or 2 will do. trajectory: keep the latents of all steps. options: steps (50), height,
    width, on_step and progress of `minisd.drawing.Drawing`. Latents are float32 even where the
    model is not.
    """
    drawing = Drawing.of(options, without=WITHOUT_GUIDANCE, steps=50)
    sampler = DDIM(sd.schedule, drawing.steps, skip, inverse=True)
    if not len(sampler):
        got = f"skip is {skip} of {drawing.steps} steps"
        raise ValueError(f"{got}, expected at least one step to run")
    expect.whole_number("refine", refine, 0)
    if refine and sd.schedule.prediction != "epsilon":  # of v, the two ways are two lines
        got = f"refine is {refine}, the model predicts {sd.schedule.prediction}"
        raise ValueError(f"{got}: expected 0, iterations lead back where eps is predicted")
    z = sd.encode_image(image, None, drawing.height, drawing.width).float()
    prompts = as_list(prompt)
    expect.rows("images", images=len(z), prompts=len(prompts))
    prompts = prompts * (len(z) // len(prompts))
    predict = conditional(sd.network, embed(sd, prompts))

    x, state, path, after = z, None, [z], chain(on_step=drawing.on_step)
    with memory_for("latents", z):
        for step in drawing.shown(sampler):
            start = x
            for _ in range(1 + refine):
                eps, state = predict(x.to(sd.dtype), step, state)
                x, _ = step(start, eps)
            if after is not None:
                x = after(x, step)
            if trajectory:
                path.append(x)
    timesteps = tuple(t for t, _, _ in sampler.plan())
    kept = torch.stack(path[::-1]) if trajectory else None
    return Inversion(tuple(prompts), drawing.steps, skip, timesteps, x, z, trajectory=kept)


def negative_prompt_inversion(sd: "StableDiffusion", inversion: Inversion) -> Inversion:
    """The image's prompt as the unconditional embedding: guidance has no effect on the source row.

        eps_source = e(cond),   eps_target = e(cond) + scale (e(target) - e(cond))

    It comes back as far as DDIM inversion does without guidance, at no cost.
    """
    inversion.check(sd)
    return replace(inversion, method="negative-prompt", uncond=embed(sd, inversion.prompts))


def direct_inversion(inversion: Inversion) -> Inversion:
    """The source row is put back on the trajectory after each step of the lockstep run.

    It comes back exactly. The target row is not touched; it follows the source through the
    attention maps. ValueError without a trajectory.
    """
    return replace(inversion, method="direct")


def redraw(
    sd: "StableDiffusion",
    inversion: Inversion,
    prompt: str | Sequence[str] | None = None,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw from an inversion: the images again, or by another prompt.

    prompt: None reconstructs the images; another one, or one for each image, edits them by the
    change of prompt alone. options: guidance (the inversion's own, or else 1, none),
    rule, negative_prompt (where the inversion has no unconditional embedding), on_step, progress of
    `minisd.drawing.Drawing`. ValueError for a direct inversion with another prompt: that takes a
    source row beside it, see `edit_prompt`.
    """
    return sd.decode(redraw_latents(sd, inversion, prompt, **options))


@torch.no_grad()
def redraw_latents(
    sd: "StableDiffusion",
    inversion: Inversion,
    prompt: str | Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The latents z (B, C, h, w) of `redraw`, float32: to compare them with `inversion.z`."""
    inversion.check(sd)
    own = 1.0 if inversion.guidance is None else inversion.guidance
    drawing = Drawing.of(options, without=INVERTED, steps=inversion.steps, guidance=own)
    prompts = list(inversion.prompts) if prompt is None else as_list(prompt)
    expect.rows("images", images=len(inversion), prompts=len(prompts))
    back = inversion.after()
    if back is not None and prompt is not None:
        how = "edit_prompt(sd, prompt, target, **edit_options)"
        raise ValueError(f"direct inversion edits through a source row: {how}")
    sampler = DDIM(sd.schedule, inversion.steps, inversion.skip)
    uncond = inversion.unconditional(sd) if drawing.uncond is None else drawing.uncond
    if uncond is None:
        uncond = embed(sd, as_list(drawing.negative_prompt))
    elif drawing.negative_prompt != "":
        raise ValueError("negative_prompt: the inversion has an unconditional embedding of its own")
    predict = drawing.rule(sd.network, uncond, embed(sd, prompts), drawing.guidance)

    # One order of the memory, one result: files keep none.
    x, state = inversion.latents.to(sd.device).contiguous(), None
    after = chain(after=back, on_step=drawing.on_step)
    with memory_for("latents", x):
        for step in drawing.shown(sampler):
            eps, state = predict(x.to(sd.dtype), step, state)
            x, _ = step(x, eps)
            if after is not None:
                x = after(x, step)
    return x
