"""Inversion: the noise from which the sampler would draw a given picture, so that a real picture
can be edited.

DDIM's steps are run backwards, from the picture's latent to noise, after the picture's prompt and
without guidance:

    x_t = next(x_s, eps(x_s, t)),   next(x, eps) = alpha_t (x - sigma_s eps) / alpha_s + sigma_t eps,   s before t

That is DDIM's own step solved for x_t, were eps taken at x_t; taken at x_s it is nearly right.
Fixed-point refinement puts what came out back in, x_t <- next(x_s, eps(x_t, t)), k times, after
which the steps forward lead back.

Under guidance they do not: e(uncond) moves the picture away. Three remedies, each of which makes of
an inversion another one, whose latents, unconditional embeddings and `after` prompt-to-prompt
takes:

    null-text        (null_text.py) optimise the unconditional embedding of each step; Mokady et al. 2022
    negative-prompt  take the picture's own prompt for it: e(cond) + scale (e(target) - e(cond));
    Miyake et al. 2023
    direct           put the source row back on the recorded trajectory after each step; Ju et al. 2023

Sources: Song et al. 2020 (arXiv 2010.02502), section 4.3; Garibi et al. 2024, ReNoise (arXiv
2403.14602); arXiv 2211.09794, 2305.16807, 2310.01506 for the remedies.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .. import expect
from ..files import atomic_write
from ..pipeline import DTYPES, as_list, memory_for
from ..sampling.guidance import cfg, conditional
from ..sampling.samplers import DDIM, Step, take

METHODS = ("ddim", "null-text", "negative-prompt", "direct")
# What a file holds: metadata FORMAT, a JSON object of ABOUT; some of TENSORS, and snapshot.0,
# snapshot.1, ...
FORMAT, ABOUT = "minisd_inversion", ("prompts", "steps", "skip", "timesteps", "method", "guidance")
TENSORS = ("latents", "z", "trajectory", "uncond", "losses")
OnStep = Callable[[Tensor, Step], object]
NEEDED = {
    "null-text": ("uncond", "losses"),
    "negative-prompt": ("uncond",),
    "direct": ("trajectory",),
}


@dataclass(frozen=True, eq=False)
class Inversion:
    """B pictures as noise, and what leads back from it. All tensors float32 except `uncond`, which
    may be any.

    prompts      B texts, after which the pictures were inverted
    steps, skip, timesteps   the sampler's: DDIM(schedule, steps, skip), the timesteps of the full schedule
    latents      (B, C, h, w) at the level of the first step that runs, x_T with skip 0
    z            (B, C, h, w) the pictures' latents
    method       one of METHODS
    guidance     the scale that null-text was made for; None: any
    trajectory   (steps - skip + 1, B, C, h, w), from `latents` to `z`: entry i - skip is what step i starts from
    uncond       (B, L, D), or one for each step, (steps, B, L, D); None: the caller's
    losses       (steps, inner steps, B) of null-text, NaN where none was computed
    snapshots    {number of the step in the order of the run: (B, C, h, w) after it}, for the `visual_steps`
    """

    prompts: tuple[str, ...]
    steps: int
    skip: int
    timesteps: tuple[int, ...]
    latents: Tensor
    z: Tensor
    method: str = "ddim"
    guidance: float | None = None
    trajectory: Tensor | None = None
    uncond: Tensor | None = None
    losses: Tensor | None = None
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        expect.whole_number("steps", self.steps, 1)
        expect.whole_number("skip", self.skip, 0, self.steps - 1)
        for name, kind in (("prompts", str), ("timesteps", int)):
            value = getattr(self, name)
            if not (
                isinstance(value, tuple) and value and all(type(each) is kind for each in value)
            ):
                raise ValueError(
                    f"{name}: got {value!r:.80}, expected a tuple of {kind.__name__}, at least one"
                )
        if len(self.timesteps) != self.steps:
            raise ValueError(
                f"got {len(self.timesteps)} timesteps, expected one for each of {self.steps} steps"
            )
        if self.method not in METHODS:
            raise ValueError(
                f"the method is {self.method!r:.80}, expected one of {', '.join(METHODS)}"
            )
        if self.guidance is not None:
            expect.number("guidance", self.guidance)
        if missing := [name for name in NEEDED.get(self.method, ()) if getattr(self, name) is None]:
            raise ValueError(f"{self.method} inversion needs {missing[0]}, which is missing")
        B, steps = len(self.prompts), self.steps
        expect.shape("z", self.z, B, "C", "h", "w")
        each = (steps,) if self.uncond is not None and self.uncond.ndim == 4 else ()
        others = {
            "trajectory": (steps - self.skip + 1, *self.z.shape),
            "losses": (steps, "inner", B),
        }
        others["uncond"] = (*each, B, "L", "D")
        for number in self.snapshots:
            expect.whole_number("the number of a snapshot", number, 0, steps - self.skip - 1)
        for name, x in self.tensors().items():
            expect.shape(name, x, *others.get(name, self.z.shape))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that there are, by name."""
        own = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        return own | {f"snapshot.{i}": x for i, x in self.snapshots.items()}

    def __len__(self) -> int:
        """B, the number of pictures."""
        return len(self.prompts)

    def __getitem__(self, i: int) -> "Inversion":
        """Picture i alone."""
        i = range(len(self))[i]
        one, rows = slice(i, i + 1), {"latents": 0, "z": 0, "trajectory": 1, "losses": 2}
        parts = {
            name: x.narrow(dim, i, 1)
            for name, dim in rows.items()
            if (x := getattr(self, name)) is not None
        }
        if self.uncond is not None:
            parts["uncond"] = self.uncond.narrow(-3, i, 1)
        snapshots = {step: x[one] for step, x in self.snapshots.items()}
        return replace(self, prompts=self.prompts[one], snapshots=snapshots, **parts)

    def check(self, sd) -> None:
        """ValueError unless the inversion is one of this model's: its timesteps, channels and
        embeddings."""
        timesteps = tuple(t for t, _, _ in DDIM(sd.schedule, self.steps).plan())
        channels = sd.unet.config.in_channels
        if timesteps != self.timesteps or self.z.shape[1] != channels:
            raise ValueError(
                f"the inversion is of {self.z.shape[1]} channels at timesteps {self.timesteps[:2]}..., the model has "
                f"{channels} channels and timesteps {timesteps[:2]}...: it was made with another model"
            )
        text = (sd.tokenizer.max_length, sd.unet.config.cross_attention_dim)
        if self.uncond is not None and self.uncond.shape[-2:] != text:
            own = tuple(self.uncond.shape[-2:])
            raise ValueError(f"the embeddings are {own} for each text, the model's are {text}")

    def unconditional(self, sd, negative_prompt: str = "") -> Tensor | list[Tensor]:
        """What `cfg` takes: (1 or B, L, D), or a list of (B, L, D) with one for each step."""
        if self.uncond is None:
            return sd.encode_prompt([negative_prompt])
        uncond = self.uncond.to(sd.device, sd.dtype)
        return uncond if uncond.ndim == 3 else list(uncond)

    def after(self, rows=slice(None)) -> Callable[[Tensor, Step], Tensor] | None:
        """Direct inversion's after(x, step): these rows of x are put back on the trajectory. None:
        another method."""
        if self.method != "direct":
            return None

        def after(x, step):
            x = x.clone()
            x[rows] = self.trajectory[step.index + 1 - self.skip].to(x)
            return x

        return after

    def edit_options(self, sd) -> dict:
        """The arguments of `edit_prompt` that make it edit this picture: edit_prompt(sd, prompt,
        target, **options)."""
        self.check(sd)
        if len(self) != 1:
            raise ValueError(
                f"got {len(self)} pictures, expected one: inversion[i] is picture i alone"
            )
        if self.skip:
            raise ValueError(
                f"prompt-to-prompt starts from noise, expected skip=0, got skip={self.skip}"
            )
        options = {
            "latents": self.latents,
            "steps": self.steps,
            "sampler": "ddim",
            "after": self.after(slice(0, 1)),
        }
        options["uncond"] = None if self.uncond is None else self.unconditional(sd)
        return options if self.guidance is None else options | {"guidance": self.guidance}

    def save(self, path) -> None:
        """Write one safetensors file, under its name only when it is whole; `load` reads it
        back."""
        about = {name: getattr(self, name) for name in ABOUT}
        tensors = {
            name: x.clone(memory_format=torch.contiguous_format)
            for name, x in self.tensors().items()
        }
        with atomic_write(path) as part:
            save_file(tensors, part, {FORMAT: json.dumps(about)})

    @classmethod
    def load(cls, path) -> "Inversion":
        """Read a file that `save` wrote, all on the CPU; ValueError if it is another, incomplete or
        does not fit."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
                tensors = {
                    name: file.get_tensor(name).clone() for name in file.keys()
                }  # not mapped: it may change
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        if not isinstance(about, dict):
            raise ValueError(f"{path} is not an inversion that minisd has saved")
        about |= {name: tuple(value) for name, value in about.items() if isinstance(value, list)}
        wrong = [
            name for name, x in tensors.items()
            if x.dtype not in DTYPES.values() or (name != "losses" and not x.isfinite().all())
        ]  # fmt: skip
        named = [name for name in tensors if re.fullmatch(r"snapshot\.(0|[1-9][0-9]{0,3})", name)]
        snapshots = {int(name[9:]): tensors.pop(name) for name in named}
        missing = (set(ABOUT) - set(about)) | ({"latents", "z"} - set(tensors))
        unknown = (set(about) - set(ABOUT)) | (set(tensors) - set(TENSORS))
        if missing or unknown or wrong:
            raise ValueError(
                f"{path} is no whole inversion: missing {sorted(missing)}, unknown {sorted(unknown)!r:.200}, "
                f"not finite {wrong!r:.200}"
            )
        try:
            return cls(**about, **tensors, snapshots=snapshots)
        except ValueError as error:
            raise ValueError(f"{path} is no whole inversion: {error}") from error


@torch.no_grad()
def invert(
    sd,
    image,
    prompt: str | Sequence[str],
    steps: int = 50,
    *,
    skip: int = 0,
    refine: int = 0,
    trajectory: bool = False,
    visual_steps: Iterable[int] = (),
    on_step: OnStep | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> Inversion:
    """DDIM inversion of picture(s) after the prompt(s) that describe them, without guidance.

    image, height, width: what `sd.encode_image` takes; its mode, not a sample, is inverted. prompt:
    one for all pictures or one for each. steps: of DDIM. skip: do not run the last steps, to the
    noisiest levels; sampling has to skip the same. refine: fixed-point iterations of each step,
    each costs one more call of the UNet; 1 or 2 will do. trajectory: keep the latents of all steps.
    visual_steps: numbers of the steps, 0 the first that is run, after which the latents are kept as
    `snapshots`. on_step(x, step) is called after each step, e.g. a Trace. Latents are float32 even
    where the model is not.
    """
    sampler = DDIM(sd.schedule, steps, skip, inverse=True)
    if not len(sampler):
        raise ValueError(f"skip is {skip} of {steps} steps, expected at least one step to run")
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise ValueError(
            f"refine is {refine!r}, expected the number of fixed-point iterations, from 0"
        )
    keep = Snapshots(visual_steps, len(sampler))
    z = sd.encode_image(image, None, height, width).float()
    prompts = as_list(prompt)
    expect.rows("pictures", pictures=len(z), prompts=len(prompts))
    prompts = prompts * (len(z) // len(prompts))
    predict = conditional(sd.unet, embed(sd, prompts))

    x, passed = z, [z]
    with memory_for("latents", z):
        for number, step in enumerate(tqdm(sampler, disable=not progress)):
            start = x
            for _ in range(1 + refine):
                x, _ = take(step, predict, x.to(sd.dtype), start=start)
            keep(number, x)
            if on_step is not None:
                on_step(x, step)
            if trajectory:
                passed.append(x)
    timesteps = tuple(t for t, _, _ in sampler.plan())
    path = torch.stack(passed[::-1]) if trajectory else None
    return Inversion(
        tuple(prompts), steps, skip, timesteps, x, z, trajectory=path, snapshots=keep.latents
    )


def negative_prompt_inversion(sd, inversion: Inversion) -> Inversion:
    """The picture's prompt as the unconditional embedding, so that guidance has no effect on the
    source row.

    eps_source = e(cond),   eps_target = e(cond) + scale (e(target) - e(cond)). It comes back as far as DDIM inversion
    does without guidance, at no cost.
    """
    inversion.check(sd)
    return replace(inversion, method="negative-prompt", uncond=embed(sd, inversion.prompts))


def direct_inversion(inversion: Inversion) -> Inversion:
    """The source row is put back on the trajectory after each step of the lockstep run: it comes
    back exactly.

    The target row is not touched; it follows the source through the attention maps. ValueError
    without a trajectory.
    """
    return replace(inversion, method="direct")


@torch.no_grad()
def redraw(
    sd,
    inversion: Inversion,
    prompt: str | Sequence[str] | None = None,
    guidance: float | None = None,
    *,
    negative_prompt: str = "",
    visual_steps: Iterable[int] | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
):
    """Sample from an inversion: latents z (B, C, h, w), for sd.decode; with visual_steps (z,
    {number: latents}).

    prompt: None reconstructs the pictures; another one, or one for each picture, edits them by the
    change of prompt alone. guidance: None is the inversion's own, or else 1, no guidance.
    negative_prompt: where the inversion has no unconditional embedding. visual_steps: numbers of
    the steps, 0 the first that is run, whose latents are returned. on_step(x, step) is called after
    each step. ValueError for a direct inversion with another prompt: that takes a source row beside
    it, see `edit_prompt`.
    """
    inversion.check(sd)
    if guidance is None:
        guidance = 1.0 if inversion.guidance is None else inversion.guidance
    prompts = list(inversion.prompts) if prompt is None else as_list(prompt)
    expect.rows("pictures", pictures=len(inversion), prompts=len(prompts))
    after = inversion.after()
    if after is not None and prompt is not None:
        raise ValueError(
            "direct inversion edits through a source row: edit_prompt(sd, prompt, target, **edit_options)"
        )
    sampler = DDIM(sd.schedule, inversion.steps, inversion.skip)
    keep = Snapshots(visual_steps or (), len(sampler))
    predict = cfg(
        sd.unet, inversion.unconditional(sd, negative_prompt), embed(sd, prompts), guidance
    )

    x = inversion.latents.to(
        sd.device
    ).contiguous()  # one order of the memory, one result: files keep none
    with memory_for("latents", x):
        for number, step in enumerate(tqdm(sampler, disable=not progress)):
            x, _ = take(step, predict, x.to(sd.dtype), start=x)
            if after is not None:
                x = after(x, step)
            keep(number, x)
            if on_step is not None:
                on_step(x, step)
    return x if visual_steps is None else (x, keep.latents)


class Snapshots:
    """keep(number, x) keeps the latents of the chosen steps in `latents`, {number: x}."""

    def __init__(self, chosen: Iterable[int], steps: int):
        self.chosen, self.latents = set(chosen), {}
        if not self.chosen <= set(range(steps)):
            raise ValueError(
                f"visual_steps are {sorted(self.chosen)}, expected numbers from 0 to {steps - 1}"
            )

    def __call__(self, number: int, x: Tensor) -> None:
        if number in self.chosen:
            self.latents[number] = x


def embed(sd, prompts: Sequence[str]) -> Tensor:
    """(B, L, D). One by one: in a batch, BLAS may give equal prompts embeddings that differ in the
    last bits."""
    return torch.cat([sd.encode_prompt([prompt]) for prompt in prompts])
