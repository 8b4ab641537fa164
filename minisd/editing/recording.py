"""Prompt-to-prompt in two runs: record the attention maps of one, inject them into another.

Cross-attention is recorded as the maps P (H, N, L), self-attention as q and k (H, N, D) from which
its map is computed again; of the conditional row only, on the CPU, by default in float16. That is
large (a 512 x 512 picture of Stable Diffusion v1, 50 steps: 1.66 GB of cross maps), so the size is
worked out first. Where both prompts are known beforehand, `edit_prompt` needs none of it. Source:
Hertz et al. 2022 (arXiv 2208.01626), algorithm 1.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import expect
from ..files import atomic_write
from ..models.attention import AttentionEdit
from ..pipeline import denoise_shown, make_sampler, pick_dtype
from ..sampling.guidance import cfg
from .prompt_to_prompt import PromptToPrompt
from .sites import coarsest, select_sites

GB = 1e9


@dataclass
class Recording:
    """What one run's attention was: of `prompt`, over `steps` steps, for latents of `size` (h, w).

    t: (steps,) the timesteps that ran, -1 where none did. maps: {"SITE.p": (steps, 1, H, N, L)} of
    cross-attention, {"SITE.q", "SITE.k": (steps, 1, H, N, D)} of self-attention, on the CPU.
    """

    prompt: str
    steps: int
    size: tuple[int, int]
    t: Tensor
    maps: dict[str, Tensor]

    def save(self, path) -> None:
        """Write one safetensors file, under its name only when it is whole; `load` reads it
        back."""
        about = {"prompt": self.prompt, "steps": self.steps, "size": self.size}
        with atomic_write(path) as part:
            save_file({"t": self.t, **self.maps}, part, {"minisd_recording": json.dumps(about)})

    @classmethod
    def load(cls, path) -> "Recording":
        """Read a file that `save` wrote; ValueError if it is another."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("minisd_recording", "null"))
                maps = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        if about is None:
            raise ValueError(f"{path} is not a recording that minisd has saved")
        return cls(about["prompt"], about["steps"], tuple(about["size"]), maps.pop("t"), maps)


class Recorder:
    """Makes `recorder.recording`: denoise(x, sampler, cfg(..., edits=recorder),
    after=recorder.store).

    cross_sites, self_sites: what to record, see `select_sites`; by default all cross sites, and the
    self sites up to the coarsest resolution of the down and up blocks; [] for none. dtype: of what
    is stored. limit: bytes that it may take; `bytes` is what it takes. height, width: of the
    picture in pixels, if not the model's own. MemoryError above the limit.
    """

    def __init__(
        self,
        sd,
        prompt: str,
        steps: int,
        cross_sites: str | int | Sequence[str | int] | None = None,
        self_sites: str | int | Sequence[str | int] | None = None,
        dtype: torch.dtype = torch.float16,
        limit: float = 4 * GB,
        height: int | None = None,
        width: int | None = None,
    ):
        expect.whole_number("steps", steps, 1)
        dtype = pick_dtype(dtype, sd.device)
        size = sd.latent_size(height, width)
        self.cross_sites = select_sites(sd.unet, "cross", cross_sites, size)
        self_sites = coarsest(sd.unet, size) if self_sites is None else self_sites
        self.self_sites = select_sites(sd.unet, "self", self_sites, size)
        shapes = {}
        for site in self.cross_sites + self.self_sites:
            module, queries = sd.unet.get_submodule(site), math.prod(sd.unet.grid(site, size))
            if site in self.cross_sites:
                shapes[f"{site}.p"] = (1, module.heads, queries, sd.tokenizer.max_length)
            else:
                head_dim = module.to_q.out_features // module.heads
                shapes[f"{site}.q"] = shapes[f"{site}.k"] = (1, module.heads, queries, head_dim)
        self.bytes = steps * sum(map(math.prod, shapes.values())) * dtype.itemsize
        if self.bytes > limit:
            raise MemoryError(
                f"recording {len(self.cross_sites)} cross- and {len(self.self_sites)} self-attention sites over "
                f"{steps} steps takes {self.bytes / GB:.3g} GB, the limit is {limit / GB:.3g} GB: choose sites, take "
                "fewer steps or raise the limit"
            )
        maps = {name: torch.zeros(steps, *shape, dtype=dtype) for name, shape in shapes.items()}
        self.recording = Recording(prompt, steps, size, torch.full((steps,), -1), maps)
        # What the network writes in one step: it keeps its storage, as a replayed CUDA graph needs.
        self.buffers = {
            name: torch.zeros(
                shape, dtype=dtype if name.endswith(".p") else sd.dtype, device=sd.device
            )
            for name, shape in shapes.items()
        }

    def __call__(self, step) -> dict[str, AttentionEdit]:
        at = self.buffers
        edits = {site: AttentionEdit(save=at[f"{site}.p"]) for site in self.cross_sites}
        return edits | {
            site: AttentionEdit(save_qk=(at[f"{site}.q"], at[f"{site}.k"]))
            for site in self.self_sites
        }

    def store(self, x: Tensor, step) -> Tensor:
        """Keep what the step has written; x is returned as it is."""
        self.recording.t[step.index] = step.t
        for name, buffer in self.buffers.items():
            self.recording.maps[name][step.index].copy_(buffer)
        return x


class Replay:
    """The edits that inject a recording into a run of target prompts: cfg(..., edits=Replay(sd,
    recording, ...)).

    The same as `PromptToPrompt(sd, recording.prompt, *targets, steps=recording.steps, ...)`, with
    stored maps instead of a source row: the rows are the targets. edit: its other arguments.
    ValueError if the sampler's timesteps differ.
    """

    def __init__(self, sd, recording: Recording, *targets: str, **edit):
        height, width = (side * sd.vae.factor for side in recording.size)
        self.recording = recording
        self.p2p = PromptToPrompt(
            sd,
            recording.prompt,
            *targets,
            steps=recording.steps,
            height=height,
            width=width,
            **edit,
        )
        self.prompts, self.dtype, self.device = self.p2p.prompts[1:], sd.dtype, sd.device

    def __call__(self, step) -> dict[str, AttentionEdit]:
        i, p2p, recorded = step.index, self.p2p, self.recording
        if i >= recorded.steps or recorded.t[i] != step.t:
            raise ValueError(
                f"step {i} is at timestep {step.t}, expected a run like the recorded one of {recorded.steps} steps at "
                f"timesteps {recorded.t.tolist()}"
            )
        token_map, blend = p2p.token_map[1:], p2p.blend[i, 1:]
        factors = None if p2p.reweight is None else p2p.reweight[i, 1:]
        edits = {}
        for name in recorded.maps:
            site, part = name.rsplit(".", 1)
            if part == "p" and site in p2p.cross_sites:
                edits[site] = AttentionEdit(
                    inject=self.stored(name, i), token_map=token_map, blend=blend, reweight=factors
                )
            elif part == "q" and site in p2p.self_sites:
                q, k = (
                    self.stored(name, i).to(self.dtype),
                    self.stored(f"{site}.k", i).to(self.dtype),
                )
                on = (
                    p2p.self_row[i, 1:] == 0
                ).float()  # by value, so that the tensors are the same at every step
                edits[site] = AttentionEdit(
                    inject_qk=(q, k), blend=on[:, None].expand(-1, q.shape[2]).contiguous()
                )
        return edits

    def stored(self, name: str, i: int) -> Tensor:
        """(targets, H, N, L or D): what was recorded at step i, for every target."""
        return self.recording.maps[name][i].to(self.device).expand(len(self.prompts), -1, -1, -1)


def record(
    sd,
    prompt: str,
    *,
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str = "ddim",
    seed: int = 0,
    latents: Tensor | None = None,
    uncond: Tensor | Sequence[Tensor] | None = None,
    negative_prompt: str = "",
    progress: bool = True,
    **what,
):
    """Draw a prompt and record its maps: (PIL image, Recording).

    what: the other arguments of `Recorder`. latents, uncond: as in `edit_prompt`. The size is
    worked out before the run: MemoryError above `limit`.
    """
    x = sd.starting_noise(1, seed, latents, what.get("height"), what.get("width"))
    what["height"], what["width"] = (side * sd.vae.factor for side in x.shape[2:])
    recorder = Recorder(sd, prompt, steps, **what)
    uncond = sd.encode_prompt([negative_prompt]) if uncond is None else uncond
    predict = cfg(sd.unet, uncond, sd.encode_prompt([prompt]), guidance, recorder)
    plan = make_sampler(sampler, sd.schedule, steps)
    x = denoise_shown(x, plan, predict, recorder.store, progress)
    return sd.decode(x)[0], recorder.recording


def replay(
    sd,
    recording: Recording,
    *targets: str,
    injection_ratio: float = 0.8,
    self_ratio: float = 0.4,
    guidance: float = 7.5,
    sampler: str = "ddim",
    seed: int = 0,
    latents: Tensor | None = None,
    uncond: Tensor | Sequence[Tensor] | None = None,
    negative_prompt: str = "",
    progress: bool = True,
    **edit,
):
    """Draw target prompts with the recorded maps: a list of PIL images.

    injection_ratio, self_ratio: the fraction of the STEPS in which cross- and self-attention maps
    are injected, the cross_steps and self_steps of `PromptToPrompt`; edit: its other arguments. The
    rest is as in `edit_prompt`, and should be what it was in `record`.
    """
    edits = Replay(
        sd, recording, *targets, cross_steps=injection_ratio, self_steps=self_ratio, **edit
    )
    height, width = (side * sd.vae.factor for side in recording.size)
    x = sd.starting_noise(1, seed, latents, height, width)
    uncond = sd.encode_prompt([negative_prompt]) if uncond is None else uncond
    predict = cfg(sd.unet, uncond, sd.encode_prompt(edits.prompts), guidance, edits)
    plan = make_sampler(sampler, sd.schedule, recording.steps)
    return sd.decode(
        denoise_shown(x.expand(len(edits.prompts), -1, -1, -1), plan, predict, None, progress)
    )
