"""Stable Diffusion end to end: text and images in, images out.

    txt2img:  x = noise;                          x_T -> ... -> x_0 under guidance;  decode(x_0)
    img2img:  x = alpha z + sigma noise, z = encode(image), from part of the way;    the same

Rombach et al. 2022, https://arxiv.org/abs/2112.10752; classifier-free guidance, Ho and Salimans
2022, https://arxiv.org/abs/2207.12598; img2img, Meng et al. 2022 (SDEdit),
https://arxiv.org/abs/2108.01073.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from PIL import Image
from torch import Tensor

from . import expect
from .checkpoints.adapters import Adapters, add_embedding, merge, token_embeddings, unmerge
from .checkpoints.load import load_parts, locate
from .checkpoints.sources import Source
from .drawing import Drawing, Options, as_list, log
from .latents import ImageInput as ImageInput, Latents
from .models.attention import IMPLEMENTATIONS, Implementation
from .models.clip import CLIPTextModel
from .models.tokenizer import CLIPTokenizer
from .models.unet import UNet
from .models.vae import AutoencoderKL
from .recipes import tell
from .sampling.schedule import NoiseSchedule
from .viewing.images import as_kept, to_pil

DtypeName = Literal["float16", "bfloat16", "float32", "float64", "auto"]
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(repr=False)
class StableDiffusion(Latents):
    """The five parts, and the few functions that join them; images and latents: see `Latents`.

    compile, graph, batch_invariant: how `network` computes the UNet, see `load`. adapters: what
    `merge` and `add_embedding` have put in. loaded: what `load` was told.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet
    vae: AutoencoderKL
    schedule: NoiseSchedule
    compile: bool | str = False
    graph: bool = False
    batch_invariant: bool = False
    adapters: Adapters = field(default_factory=Adapters)
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> UNet:
        return self.unet

    def __repr__(self) -> str:
        size = sum(
            p.numel()
            for model in (self.text_encoder, self.unet, self.vae)
            for p in model.parameters()
        )
        what = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        attention = f"{self.unet.attention} attention"
        return f"StableDiffusion({size / 1e6:.0f} M parameters, {what}, {attention})"

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | DtypeName | None = None,
    ) -> "StableDiffusion":
        """Move the three models in place. `unet.attention` stays: "triton" needs a CUDA device."""
        device = pick_device(self.device if device is None else device)
        dtype = pick_dtype(self.dtype if dtype is None else dtype, device)
        for model in (self.text_encoder, self.unet, self.vae):
            model.to(device, dtype)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Text encoder's last hidden states, (B, 77, D). Longer prompts are cut, with a warning."""
        tokens = token_embeddings(self, self.tokenizer(as_list(prompts)))
        # On a CPU one by one: so a text's bits are the same whatever stands beside it.
        alone = self.device.type == "cpu" or self.batch_invariant
        some = tokens.split(1 if alone else len(tokens))
        return torch.cat([self.text_encoder(each) for each in some])

    def merge(self, *loras: Source | tuple[Source, float]) -> None:
        """Add LoRA files to the weights of the UNet and the text encoder, in place.

            W' = W + sum_i weight_i (alpha_i / rank_i) B_i A_i,   computed in float32, rounded once

        loras: files with kohya's, PEFT's or diffusers' names, each alone (weight 1) or with its
        weight: sd.merge("style.safetensors", ("hat.safetensors", 0.5)). A layer's alpha is the
        file's; where it says none, its rank. CheckpointError, and nothing changed, for a file that
        does not fit: DoRA, LyCORIS' other kinds, another model's layers.
        """
        given = [each if isinstance(each, tuple) else (each, 1.0) for each in loras]
        for _, weight in given:
            expect.number("weight of a LoRA", weight)
        merge(self, given)

    def unmerge(self) -> None:
        """Take all LoRAs back: each weight is what it was before the first merge, bit for bit."""
        unmerge(self)

    def add_embedding(self, path: Source, token: str | None = None) -> str:
        """Teach the text encoder a new word (textual inversion) -> the word, for use in prompts.

        path: a .safetensors file with one tensor, (D,) or (n, D): diffusers' layout, in which it is
        called by its word, or A1111's, in which it is called emb_params and the word is the file's
        name. token: another word. A word of n vectors takes n of the prompt's 75 tokens.
        """
        return add_embedding(self, path, token)

    def txt2img(self, prompt: str | Sequence[str], **options: Unpack[Options]) -> list[Image.Image]:
        """Draw prompt(s), num_images of each. options: see `minisd.drawing.Drawing`."""
        arguments = dict(locals())
        prompts, drawing = as_list(prompt), Drawing.of(options)
        plan = drawing.make_sampler(self, rows=len(prompts) * drawing.num_images)
        uncond, cond = drawing.embed(self, prompts)
        x = drawing.noise(self, len(cond))
        predict = drawing.rule(self.network, uncond, cond, drawing.guidance)
        images = self.decode(drawing.denoise(x, plan, predict))
        return tell(images, self, "txt2img", arguments, drawing, prompts)

    def img2img(
        self,
        image: ImageInput,
        prompt: str | Sequence[str],
        strength: float = 0.75,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Redraw image(s) according to prompt(s): noise them to `strength` of the way, denoise.

            x = alpha z + sigma noise,   z = encode(image), at the level of the first step that runs

        image: what `pixels` takes, one for all prompts or one for each. strength: 0 to 1; the last
        int(steps * strength) steps are run, and if there are none the image itself is returned, of
        its own size unless one is given. options: see `minisd.drawing.Drawing`. Meng et al. 2022
        (SDEdit).
        """
        arguments = dict(locals())
        prompts, drawing = as_list(prompt), Drawing.of(options)
        rows = len(prompts) * drawing.num_images
        plan = drawing.make_sampler(self, strength, rows)
        pixels = self.pixels(image, drawing.height, drawing.width)
        expect.rows("prompts", prompts=len(prompts), images=len(pixels))
        noise = drawing.at(*pixels.shape[2:]).noise(self, rows)
        if len(plan) == 0:
            kept = unchanged(image, pixels, drawing)
            kept = drawing.each(kept * (len(prompts) // len(kept)))
            return tell(kept, self, "img2img", arguments, drawing, prompts)
        uncond, cond = drawing.embed(self, prompts)
        z = drawing.per_image(self.encode_image(pixels), len(prompts))
        predict = drawing.rule(self.network, uncond, cond, drawing.guidance)
        images = self.decode(drawing.denoise(plan.start(z, noise), plan, predict))
        return tell(images, self, "img2img", arguments, drawing, prompts)


def load(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | DtypeName | None = None,
    attention: Implementation | Literal["auto"] = "auto",
    compile: bool | str = False,
    graph: bool = False,
    batch_invariant: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    tokenizer: str | Path | None = None,
    copy: bool = False,
) -> StableDiffusion:
    """Load a model: "shapes" (bundled), a Hub repo id or sd-v1-4 or sd-v1-5, a folder in diffusers
    layout, or one CompVis .safetensors file.

    device: None is "cuda" if there is one, else "cpu". dtype: a torch dtype or its name; None is
    float16 on CUDA, else float32; "auto" takes bfloat16 on a CPU that computes in it; `print(sd)`
    shows what it became. attention: "triton", "sdpa" or "reference"; "auto" is triton on CUDA, else
    sdpa; `sd.unet.attention` shows it. compile: let torch.compile make one graph of the UNet, with
    its default backend or the one named; slow at the first call for each size, number of images and
    kind of edit, each a graph of its own. graph: CUDA only, replay the UNet as a CUDA graph.
    batch_invariant: images drawn together are computed one after the other, so that an image's bits
    do not depend on how many they are, on a card either (docs/models.md has what is left out). All
    three hold for all methods of drawing and editing, and for `sd.network` in a loop of your own.
    variant: "fp16" takes the files *.fp16.safetensors, and of parts without one the plain file,
    with a warning. revision: branch, tag or commit of a Hub
    repo. local_files_only: do not ask the Hub, use its local cache. tokenizer: a folder with
    vocab.json and merges.txt, in place of the model's own.

    On a CPU, weights that keep their dtype stay mapped from their files (but for convolutions,
    which take channels_last memory): such a file may be replaced or removed meanwhile, but who
    overwrites it in place (cp, rsync --inplace) changes what is drawn, and who cuts it ends the
    process (SIGBUS). copy: read all of it into memory at once.

    Raises CheckpointError, a ValueError, if the model cannot be found or read, if it is of a kind
    that minisd does not draw with, if tensors are missing, unexpected or misshapen (one error that
    lists them all, the first fault in its first line), or if a weight is not finite.
    """
    where, kind, implementation = pick(device, dtype, attention, graph)
    checkpoint = locate(
        source,
        variant=variant,
        revision=revision,
        local_files_only=local_files_only,
        tokenizer=tokenizer,
    )
    how: Any = {"compile": compile, "graph": graph, "batch_invariant": batch_invariant}
    loaded = as_told(source, variant=variant, revision=revision, tokenizer=tokenizer, **how)
    start, parts = time.monotonic(), load_parts(checkpoint, where, kind, copy)
    sd = StableDiffusion(*parts, **how, loaded=loaded)
    sd.unet.attention = implementation
    log.info("loaded %s in %.2f s: %s", source, time.monotonic() - start, sd)
    return sd


def as_told(source: str | Path, **others: Any) -> dict[str, Any]:
    """What `load` was told, as JSON has it; what is None or False is left out."""
    given = {name: value for name, value in others.items() if value}
    kept = {name: value if value is True else str(value) for name, value in given.items()}
    return {"source": str(source), **kept}


def pick(
    device: torch.device | str | None,
    dtype: torch.dtype | DtypeName | None,
    attention: Implementation | Literal["auto"],
    graph: bool,
) -> tuple[torch.device, torch.dtype, Implementation]:
    """What the arguments of `load` mean here; ValueError for what this machine does not have."""
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    implementation = pick_attention(attention, where)
    if graph and where.type != "cuda":
        raise ValueError(f"graph=True replays CUDA graphs and needs a CUDA device, got {where}")
    return where, kind, implementation


def pick_attention(
    attention: Implementation | Literal["auto"], device: torch.device
) -> Implementation:
    """The code that computes attention there; ValueError for an unknown name."""
    if attention not in ("auto", *IMPLEMENTATIONS):
        expected = f"auto, {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(f"attention is {attention!r}, expected {expected}")
    if attention == "auto":
        return "triton" if device.type == "cuda" else "sdpa"
    return attention


def pick_device(device: torch.device | str | None) -> torch.device:
    """torch.device(device), None being CUDA if there is one; ValueError if there is none here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if (device := torch.device(device)).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {why}") from error
    return device


def pick_dtype(dtype: torch.dtype | DtypeName | None, device: torch.device) -> torch.dtype:
    """A torch dtype from itself or its name, None being float16 on CUDA and float32 elsewhere.

    "auto" is the same, but bfloat16 on a CPU whose instructions include products of bfloat16.
    """
    if dtype == "auto" and device.type == "cpu":
        has = torch.cpu.get_capabilities().get
        quick = has("avx512_bf16") or has("amx_bf16") or has("bf16")
        return torch.bfloat16 if quick else torch.float32
    if dtype in (None, "auto"):
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)} or auto")
    return DTYPES[dtype]


def unchanged(image: ImageInput, pixels: Tensor, drawing: Drawing) -> list[Image.Image]:
    """The images themselves, in their own colours, where no step is run; resized, as `pixels` are,
    if a size is given."""
    own_size = drawing.height is None and drawing.width is None
    return as_kept(image) if own_size else to_pil(pixels)
