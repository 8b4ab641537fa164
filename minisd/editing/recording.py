"""Prompt-to-prompt in two runs: record the attention maps of one, inject them into another.

Cross-attention is recorded as the maps P (H, N, L), self-attention as q and k (H, N, D) from which
its map is computed again; of the conditional row only, on the CPU, by default in float16. That is
large (a 512 x 512 image of Stable Diffusion v1, 50 steps: 1.66 GB of cross maps), so the size is
worked out first. Where both prompts are known beforehand, `edit_prompt` needs none of it. Source:
Hertz et al. 2022 (arXiv 2208.01626), algorithm 1.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..checkpoints.bundle import read_bundle, write_bundle
from ..drawing import Drawing, Options
from ..models.attention import AttentionEdit
from ..sampling.samplers import Step
from .prompt_to_prompt import EditedOptions, EditOptions, PromptToPrompt, split
from .sites import Where, coarsest, select_sites

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

GB = 1e9
FORMAT, FIELDS = "minisd_recording", ("prompt", "steps", "size")
MAPS = r".+\.(p|q|k)"  # what the tensors beside t and z are called


@dataclass(frozen=True, eq=False)
class Recording:
    """What one run's attention was: of `prompt`, over `steps` steps, for latents of `size` (h, w).

    t: (steps,) the timesteps that ran, -1 where none did. maps: {"SITE.p": (steps, 1, H, N, L)} of
    cross-attention, {"SITE.q", "SITE.k": (steps, 1, H, N, D)} of self-attention, on the CPU. z:
    (1, C, h, w) the latent that was drawn, for sd.decode; None before the run has ended. There is
    at least one map.
    """

    prompt: str
    steps: int
    size: tuple[int, int]
    t: Tensor
    maps: dict[str, Tensor]
    z: Tensor | None = None

    def __post_init__(self) -> None:
        expect.whole_number("steps", self.steps, 1)
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt: got {self.prompt!r:.80}, expected a text")
        sides = self.size if isinstance(self.size, tuple) and len(self.size) == 2 else (0,)
        for side in sides:
            expect.whole_number("size", side, 1)
        expect.shape("t", self.t, self.steps)
        if not self.maps:
            raise ValueError("the recording has no map, expected at least one: choose sites")
        for name, x in self.maps.items():
            if not re.fullmatch(MAPS, name):
                raise ValueError(f"got the map {name!r:.80}, expected SITE.p, SITE.q or SITE.k")
            expect.shape(name, x, self.steps, 1, "H", "N", "L")
            site, kind = name.rsplit(".", 1)
            if kind == "p":
                continue
            other = self.maps.get(f"{site}.{'k' if kind == 'q' else 'q'}")
            if other is None:
                expected = f"expected {site}.q and .k"
                raise ValueError(f"{name} is there without its other half, {expected}")
            if other.shape != x.shape:
                got = f"{tuple(x.shape)} and {tuple(other.shape)}"
                raise ValueError(f"{site}.q and .k: got {got}, expected the same shape")
        if self.z is not None:
            expect.shape("z", self.z, 1, "C", *self.size)

    def check(self, sd: "StableDiffusion") -> None:
        """ValueError unless it is one of this model's: its sites, their shapes, its channels."""
        cross, own = sd.unet.sites("cross"), sd.unet.sites("self")
        shapes = map_shapes(sd, self.size, cross, own)
        for name, x in self.maps.items():
            if name not in shapes:
                expected = f"names like {cross[0]}.p and {own[0]}.q"
                raise ValueError(f"the model has no site for the map {name}, expected {expected}")
            if tuple(x.shape[1:]) != shapes[name]:
                got = f"{name} has the shape {tuple(x.shape[1:])} in each step"
                why = "it was made with another model"
                raise ValueError(f"{got}, the model's has {shapes[name]}: {why}")
        if self.z is not None and self.z.shape[1] != sd.unet.config.in_channels:
            got = f"z has {self.z.shape[1]} channels"
            raise ValueError(f"{got}, the model's latents have {sd.unet.config.in_channels}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, under its name only when it is whole."""
        fields = {name: getattr(self, name) for name in FIELDS}
        z = {} if self.z is None else {"z": self.z}
        write_bundle(path, FORMAT, fields, {"t": self.t, **z, **self.maps})

    @classmethod
    def load(cls, path: str | Path) -> "Recording":
        """Read a file that `save` wrote; ValueError if it is another, incomplete or does not
        fit."""
        fields, tensors = read_bundle(
            path, FORMAT, FIELDS, needed=("t",), known=f"z|{MAPS}", integers=("t",)
        )
        t, z = tensors.pop("t"), tensors.pop("z", None)
        try:
            return cls(**fields, t=t, maps=tensors, z=z)
        except ValueError as error:
            raise ValueError(f"{path} is no complete {FORMAT}: {error}") from error


def map_shapes(
    sd: "StableDiffusion", size: tuple[int, int], cross: Collection[str], own: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """{name of what is recorded: its shape in one step} of these sites of cross, self-attention."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in [*cross, *own]:
        module, queries = sd.unet.site(site), math.prod(sd.unet.grid(site, size))
        if site in cross:
            shapes[f"{site}.p"] = (1, module.heads, queries, sd.tokenizer.max_length)
        else:
            shape = (1, module.heads, queries, module.head_dim)
            shapes[f"{site}.q"] = shapes[f"{site}.k"] = shape
    return shapes


class RecorderOptions(TypedDict, total=False):
    """The arguments of `Recorder` that say what is recorded."""

    cross_sites: Where | None
    self_sites: Where | None
    dtype: torch.dtype
    limit: float


class RecordOptions(Options, RecorderOptions, total=False):
    """What `record` takes: how it is drawn, and what is recorded."""


class Recorder:
    """Makes `recorder.recording`: denoise(x, sampler, cfg(..., edits=recorder),
    after=recorder.store).

    cross_sites, self_sites: what to record, see `select_sites`; by default all cross sites, and the
    self sites up to the coarsest resolution of the down and up blocks; [] for none. dtype: of what
    is stored. limit: bytes that it may take; `bytes` is what it takes. height, width: of the image
    in pixels, if not the model's own. MemoryError above the limit.
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        prompt: str,
        steps: int,
        cross_sites: Where | None = None,
        self_sites: Where | None = None,
        dtype: torch.dtype = torch.float16,
        limit: float = 4 * GB,
        height: int | None = None,
        width: int | None = None,
    ):
        expect.whole_number("steps", steps, 1)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}, expected a floating-point torch dtype")
        size = sd.latent_size(height, width)
        self.cross_sites = select_sites(sd.unet, "cross", cross_sites, size)
        coarse = coarsest(sd.unet, size) if self_sites is None else self_sites
        self.self_sites = select_sites(sd.unet, "self", coarse, size)
        shapes = map_shapes(sd, size, self.cross_sites, self.self_sites)
        self.bytes = steps * sum(map(math.prod, shapes.values())) * dtype.itemsize
        if self.bytes > limit:
            counts = (
                f"{len(self.cross_sites)} cross- and {len(self.self_sites)} self-attention sites"
            )
            takes = f"takes {self.bytes / GB:.3g} GB, the limit is {limit / GB:.3g} GB"
            hint = "choose sites, take fewer steps or raise the limit"
            raise MemoryError(f"recording {counts} over {steps} steps {takes}: {hint}")
        maps = {
            name: torch.zeros(steps, *shape, dtype=dtype, device="cpu")
            for name, shape in shapes.items()
        }
        t = torch.full((steps,), -1, dtype=torch.int64, device="cpu")
        self.recording = Recording(prompt, steps, size, t, maps)
        # What the network writes in one step: it keeps its storage, as a CUDA graph needs.
        self.buffers = {
            name: torch.zeros(
                shape, dtype=dtype if name.endswith(".p") else sd.dtype, device=sd.device
            )
            for name, shape in shapes.items()
        }

    def __call__(self, step: Step) -> dict[str, AttentionEdit]:
        at = self.buffers
        edits = {site: AttentionEdit(save=at[f"{site}.p"]) for site in self.cross_sites}
        return edits | {
            site: AttentionEdit(save_qk=(at[f"{site}.q"], at[f"{site}.k"]))
            for site in self.self_sites
        }

    def store(self, x: Tensor, step: Step) -> Tensor:
        """Keep what the step has written; x is returned as it is."""
        self.recording.t[step.index] = step.t
        for name, buffer in self.buffers.items():
            self.recording.maps[name][step.index].copy_(buffer)
        return x


class Injection:
    """The edits that inject a recording into a run of target prompts, for cfg(..., edits=...).

    The same as `PromptToPrompt(sd, recording.prompt, *targets, steps=recording.steps, ...)`, with
    stored maps instead of a source row: the rows are the targets, `images` of each. edit: its other
    arguments. ValueError if the recording is another model's, if the sites choose nothing of it, or
    if the sampler's timesteps differ.
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        recording: Recording,
        *targets: str,
        images: int = 1,
        **edit: Unpack[EditOptions],
    ):
        recording.check(sd)
        height, width = (side * sd.vae.factor for side in recording.size)
        p2p = PromptToPrompt(
            sd,
            recording.prompt,
            *targets,
            steps=recording.steps,
            height=height,
            width=width,
            **edit,
        )
        chosen = map_shapes(sd, recording.size, p2p.cross_sites, p2p.self_sites)
        if not chosen.keys() & recording.maps.keys():
            has = ", ".join(dict.fromkeys(name.rsplit(".", 1)[0] for name in recording.maps))
            raise ValueError(f"the sites choose nothing of the recording, which has {has:.200}")
        self.recording, self.p2p, self.sources = recording, p2p.repeated(images), images
        self.prompts, self.dtype, self.device = p2p.prompts[1:], sd.dtype, sd.device

    def __call__(self, step: Step) -> dict[str, AttentionEdit]:
        i, p2p, recorded = step.index, self.p2p, self.recording
        if i >= recorded.steps or recorded.t[i] != step.t:
            like = f"of {recorded.steps} steps at timesteps {recorded.t.tolist()}"
            got = f"step {i} is at timestep {step.t}"
            raise ValueError(f"{got}, expected a run like the recorded one {like}")
        rows = slice(self.sources, None)  # the targets'
        token_map, blend = p2p.token_map[rows], p2p.blend[i, rows]
        factors = None if p2p.reweight is None else p2p.reweight[i, rows]
        on = (p2p.self_row[i, rows] < self.sources).float()  # whether a row takes the source's map
        edits = {}
        for name in recorded.maps:
            site, kind = name.rsplit(".", 1)
            if kind == "p" and site in p2p.cross_sites:
                edits[site] = AttentionEdit(
                    inject=self.stored(name, i), token_map=token_map, blend=blend, reweight=factors
                )
            elif kind == "q" and site in p2p.self_sites:
                q, k = self.stored(name, i), self.stored(f"{site}.k", i)
                # By value, so that the tensors are the same at every step.
                gate = on[:, None].expand(-1, q.shape[2]).contiguous()
                pair = q.to(self.dtype), k.to(self.dtype)
                edits[site] = AttentionEdit(inject_qk=pair, blend=gate)
        return edits

    def stored(self, name: str, i: int) -> Tensor:
        """(targets, H, N, L or D): what was recorded at step i, for every target row."""
        rows = len(self.p2p.prompts) - self.sources
        return self.recording.maps[name][i].to(self.device).expand(rows, -1, -1, -1)


def record(sd: "StableDiffusion", prompt: str, **options: Unpack[RecordOptions]) -> Recording:
    """Draw a prompt and record its maps; the image is sd.decode(recording.z).

    options: what is recorded (the other arguments of `Recorder`) and how it is drawn
    (`minisd.drawing.Drawing`, here steps=50, sampler="ddim"). The size is worked out before the
    run: MemoryError above `limit`.
    """
    names = RecorderOptions.__annotations__
    what: dict[str, Any] = {name: v for name, v in options.items() if name in names}
    how: Any = {name: v for name, v in options.items() if name not in names}
    without = ("num_images",)
    drawing = Drawing.of(how, without=without, beside=names, steps=50, sampler="ddim")
    x = drawing.noise(sd, 1)
    height, width = (side * sd.vae.factor for side in x.shape[2:])
    recorder = Recorder(sd, prompt, drawing.steps, **what, height=height, width=width)
    predict = drawing.rule(sd.network, *drawing.embed(sd, [prompt]), drawing.guidance, recorder)
    z = drawing.denoise(x, drawing.make_sampler(sd), predict, recorder.store)
    return replace(recorder.recording, z=z.float().cpu())


def replay(
    sd: "StableDiffusion",
    recording: Recording,
    *targets: str,
    **options: Unpack[EditedOptions],
) -> list[Image.Image]:
    """Draw target prompts with the recorded maps, num_images of each.

    options: as in `edit_prompt`, but without steps and a size, which are the recording's; the
    others should be what they were in `record`.
    """
    for name in ("steps", "height", "width"):
        if name in options:
            raise ValueError(f"{name} is the recording's: got {options[name]!r}")
    drawing, edit = split({**options, "steps": recording.steps})
    drawing = drawing.for_each_seed().at(*(side * sd.vae.factor for side in recording.size))
    edits = Injection(sd, recording, *targets, images=drawing.num_images, **edit)
    x = drawing.noise(sd, drawing.num_images).repeat(len(edits.prompts), 1, 1, 1)
    predict = drawing.rule(sd.network, *drawing.embed(sd, edits.prompts), drawing.guidance, edits)
    return sd.decode(drawing.denoise(x, drawing.make_sampler(sd), predict))
