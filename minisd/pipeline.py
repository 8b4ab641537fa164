"""Stable Diffusion end to end: text and pictures in, pictures out.

    txt2img:  x = noise;                          x_T -> ... -> x_0 under guidance;  picture = decode(x_0)
    img2img:  x = alpha z + sigma noise, z = encode(picture), from part of the way;  the same

Rombach et al. 2022, https://arxiv.org/abs/2112.10752; classifier-free guidance, Ho and Salimans
2022, https://arxiv.org/abs/2207.12598; img2img, Meng et al. 2022 (SDEdit),
https://arxiv.org/abs/2108.01073.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from . import expect
from .checkpoints import load as checkpoint
from .engine import onednn
from .engine.graphs import Replay
from .models.attention import IMPLEMENTATIONS
from .models.clip import CLIPTextModel
from .models.tokenizer import CLIPTokenizer
from .models.unet import UNet
from .models.vae import AutoencoderKL
from .sampling.guidance import cfg
from .sampling.samplers import DDIM, DPMpp2M, Sampler, Step, denoise
from .sampling.schedule import NoiseSchedule
from .viewing.images import as_given, to_pil, to_tensor

SAMPLERS = {
    "dpm++": DPMpp2M,  # DPM-Solver++ 2M on Karras' noise levels
    "dpm++ linspace": lambda schedule, steps: DPMpp2M(schedule, steps, karras=False),
    "ddim": DDIM,
}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
MOST_PIXELS = 2048 * 2048  # of a picture: 16 times those that Stable Diffusion v1 was trained on


@dataclass(repr=False)
class StableDiffusion:
    """The five parts, and the few functions that join them.

    A picture is a PIL image, or a tensor (B, 3, H, W) in [-1, 1]; a latent z or x is (B, C, H /
    factor, W / factor), C = unet.config.in_channels (4) and factor = vae.factor (8 in SD v1),
    scaled by vae.config.scaling_factor.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet
    vae: AutoencoderKL
    schedule: NoiseSchedule

    def __repr__(self) -> str:
        size = sum(
            p.numel()
            for model in (self.text_encoder, self.unet, self.vae)
            for p in model.parameters()
        )
        what = f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {self.unet.attention} attention"
        return f"StableDiffusion({size / 1e6:.0f} M parameters, {what})"

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def to(self, device=None, dtype=None) -> "StableDiffusion":
        """Move the three models in place. `unet.attention` stays as it is: "triton" needs a CUDA
        device."""
        device = pick_device(self.device if device is None else device)
        dtype = pick_dtype(self.dtype if dtype is None else dtype, device)
        for model in (self.text_encoder, self.unet, self.vae):
            model.to(device, dtype)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Text encoder's last hidden states, (B, 77, D). Prompts longer than 77 tokens are cut,
        with a warning."""
        return self.text_encoder(self.tokenizer(as_list(prompts)).to(self.device))

    @torch.no_grad()
    def encode_image(
        self, image, generator: torch.Generator | None = None, height=None, width=None
    ) -> Tensor:
        """z = scaling_factor * (mean + std * noise), noise drawn from `generator`; None: the mode,
        that is the mean.

        image, height, width: what `pixels` takes. Returns (B, C, H / factor, W / factor).
        """
        x = self.pixels(image, height, width)
        with memory_for("pictures", x):
            mean, logvar = self.vae.encode(x)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            mean = mean + (0.5 * logvar).exp() * noise.to(mean)
        z = self.vae.config.scaling_factor * mean
        return (
            z.contiguous()
        )  # as noise is: other strides would cost a compiled graph, and a CUDA graph, of their own

    @torch.no_grad()
    def decode(self, z: Tensor, as_tensor: bool = False) -> list[Image.Image] | Tensor:
        """The pictures of latents z: PIL images, or one tensor (B, 3, H, W) in [-1, 1]."""
        expect.shape("latents", z, "B", self.vae.config.latent_channels, "h", "w")
        z = z.to(self.device, self.dtype) / self.vae.config.scaling_factor
        # One by one: at 512 x 512 the decoder's activations are the largest of all.
        with memory_for("pictures", z, self.vae.factor):
            image = torch.cat([self.vae.decode(row) for row in z.split(1)])
        return image.clamp(-1, 1) if as_tensor else to_pil(image)

    def noise(
        self, seed: int | Sequence[int], batch: int | None = None, height=None, width=None
    ) -> Tensor:
        """x_T ~ N(0, 1), (B, C, height / factor, width / factor); the size is in pixels, default
        the model's own.

        Row i is drawn with seed + i, whatever the batch (None: one row); a list gives each row its
        seed. Drawn on the CPU in float32, so that it is the same on every device.
        """
        if batch is not None:
            expect.whole_number("batch", batch, 1)
        seeds = [seed + i for i in range(batch or 1)] if isinstance(seed, Integral) else seed
        if not (isinstance(seeds, (list, tuple)) and seeds and all(map(is_seed, seeds))):
            expected = "a whole number or a list of them, at least one, from -2**63 to 2**64 - 1"
            raise ValueError(f"got seeds {seeds!r}, expected {expected}")
        if batch not in (None, len(seeds)):
            raise ValueError(f"got {len(seeds)} seeds for {batch} pictures, expected one for each")
        shape = (1, self.unet.config.in_channels, *self.latent_size(height, width))
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
        return torch.cat(rows).to(self.device, self.dtype)

    def pixels(self, image, height: int | None = None, width: int | None = None) -> Tensor:
        """Picture(s) as the VAE takes them, (B, 3, height, width) in [-1, 1].

        PIL images, one or a list, are turned upright, made RGB and resized (Lanczos); without a
        size, to that of the first, its sides rounded down to multiples of vae.factor as in
        diffusers. A tensor must have the right size.
        """
        if isinstance(image, Tensor):
            return self._check_pixels(image, height, width)
        images = as_given(image)
        if not images:
            raise ValueError("got an empty list, expected at least one picture")
        factor = self.vae.factor
        if min(images[0].size) < factor and None in (height, width):
            size = " x ".join(map(str, images[0].size))
            raise ValueError(
                f"the picture is {size} pixels, expected at least {factor} x {factor}, or a size for it"
            )
        height = images[0].height // factor * factor if height is None else height
        width = images[0].width // factor * factor if width is None else width
        self.latent_size(height, width)
        return to_tensor(images, height, width).to(self.device, self.dtype)

    def txt2img(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        steps: int = 25,
        guidance: float = 7.5,
        sampler: str = "dpm++",
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        on_step: Callable[[Tensor, Step], Tensor | None] | None = None,
        progress: bool = True,
        num_images: int = 1,
    ) -> list[Image.Image]:
        """Draw prompt(s): `num_images` pictures of each, those of the first prompt first.

        negative_prompt: what guidance leads away from, one for all or one for each prompt; it has
        no effect at guidance 1, where no unconditional half is computed. steps: 1 to 1000. sampler:
        one of SAMPLERS. seed: picture i of the list is drawn with seed + i; a list gives each
        picture its seed. height, width: pixels, multiples of vae.factor, by default the model's
        own. latents: x_T (B, C, h, w) in place of the seed's noise. on_step(x, step) is called
        after each step and may return new latents. progress: a bar on stderr. ValueError for what
        does not fit.
        """
        prompts = as_list(prompt)
        plan = make_sampler(sampler, self.schedule, steps)
        predict = cfg(self.unet, *self.condition(prompts, negative_prompt, num_images), guidance)
        x = self.starting_noise(len(prompts) * num_images, seed, latents, height, width)
        return self.decode(denoise_shown(x, plan, predict, on_step, progress))

    def img2img(
        self,
        image,
        prompt: str | Sequence[str],
        strength: float = 0.75,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 25,
        guidance: float = 7.5,
        sampler: str = "dpm++",
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        on_step: Callable[[Tensor, Step], Tensor | None] | None = None,
        progress: bool = True,
        num_images: int = 1,
    ) -> list[Image.Image]:
        """Redraw picture(s) after prompt(s): noise them to the level `strength` of the way up, then
        denoise.

        image: what `pixels` takes, one picture for all prompts or one for each; height, width:
        resize it to that. strength: 0 to 1; the last int(steps * strength) steps are run, and if
        there are none the picture itself is returned, of its own size unless one is given. latents:
        noise (B, C, h, w) in place of the seed's. The rest is as in `txt2img`.
        """
        prompts = as_list(prompt)
        plan = make_sampler(sampler, self.schedule, steps, strength)
        predict = cfg(self.unet, *self.condition(prompts, negative_prompt, num_images), guidance)
        pictures = self.pixels(image, height, width)
        expect.rows("prompts", prompts=len(prompts), pictures=len(pictures))
        noise = self.starting_noise(len(prompts) * num_images, seed, latents, *pictures.shape[2:])
        if len(plan) == 0:
            kept = unchanged(image, pictures, height, width)
            return [each for each in kept * (len(prompts) // len(kept)) for _ in range(num_images)]
        z = _per_image(self.encode_image(pictures), len(prompts), num_images)
        return self.decode(denoise_shown(plan.start(z, noise), plan, predict, on_step, progress))

    def condition(self, prompts: list[str], negative_prompt, num_images: int = 1):
        """(uncond, cond), the embeddings of all pictures, (B, 77, D) each, those of one prompt
        standing together."""
        negatives = as_list(negative_prompt)
        expect.rows("prompts", prompts=len(prompts), negative_prompts=len(negatives))
        expect.whole_number("num_images", num_images, 1)
        context = self.encode_prompt(negatives + prompts)  # at once, as a user would
        context = context.split([len(negatives), len(prompts)])
        return [_per_image(rows, len(prompts), num_images) for rows in context]

    def starting_noise(self, batch: int | None, seed, latents, height=None, width=None) -> Tensor:
        """The given latents, or else the seed's noise, (batch, C, h, w); batch None: as many as are
        given, or one.

        ValueError for latents of another number or another size than height x width pixels.
        """
        if latents is None:
            latents = self.noise(seed, batch, height, width)
        elif not (
            isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim == 4
        ):
            got = (
                f"{latents.dtype} {tuple(latents.shape)}"
                if isinstance(latents, Tensor)
                else type(latents).__name__
            )
            raise ValueError(f"the latents are {got}, expected a tensor of floats (B, C, h, w)")
        elif height is None and width is None:
            height, width = (side * self.vae.factor for side in latents.shape[-2:])
        expected = (
            batch or len(latents),
            self.unet.config.in_channels,
            *self.latent_size(height, width),
        )
        if tuple(latents.shape) != expected:
            raise ValueError(f"the latents have shape {tuple(latents.shape)}, expected {expected}")
        return latents.to(self.device, self.dtype)

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(h, w) of the latents of a picture of that many pixels, MOST_PIXELS at most; None: the
        model's own size."""
        factor, own = self.vae.factor, self.unet.config.sample_size
        if own is None and None in (height, width):
            raise ValueError(
                "the model's config names no size (sample_size): give height and width"
            )
        h, w = own if isinstance(own, (tuple, list)) else (own, own)
        height, width = (
            h * factor if height is None else height,
            w * factor if width is None else width,
        )
        if not all(
            isinstance(side, Integral) and side > 0 and side % factor == 0
            for side in (height, width)
        ):
            raise ValueError(
                f"the picture is {width!r} x {height!r} pixels, expected positive multiples of {factor}"
            )
        if height * width > MOST_PIXELS:
            raise ValueError(
                f"the picture is {width} x {height} pixels, expected at most {MOST_PIXELS:,} in all: give a smaller "
                "size (--size WxH, or height= and width=)"
            )
        return height // factor, width // factor

    def _check_pixels(self, image: Tensor, height: int | None, width: int | None) -> Tensor:
        """A tensor (B, 3, H, W) in [-1, 1] of the right size, on the model's device."""
        if (
            image.ndim != 4
            or image.shape[1] != 3
            or not image.is_floating_point()
            or not len(image)
        ):
            raise ValueError(
                f"got a {image.dtype} tensor of shape {tuple(image.shape)}, expected floats (B, 3, H, W)"
            )
        own = tuple(image.shape[2:])
        if own != (own[0] if height is None else height, own[1] if width is None else width):
            raise ValueError(
                f"got a tensor of {own[1]} x {own[0]} pixels for {width} x {height}; only PIL images are resized"
            )
        self.latent_size(*own)
        low, high = image.aminmax()
        if not (low >= -1 and high <= 1):
            raise ValueError(
                f"got a tensor with values from {low:g} to {high:g}, expected -1 (black) to 1 (white)"
            )
        return image.to(self.device, self.dtype)


def load(
    source,
    *,
    device=None,
    dtype=None,
    attention: str = "auto",
    compile: bool | str = False,
    graph: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    tokenizer=None,
) -> StableDiffusion:
    """Load a model: "shapes" (bundled), a Hub repo id or sd-v1-4 or sd-v1-5, a folder in diffusers
    layout, or one CompVis .safetensors file.

    device: None is "cuda" if there is one, else "cpu". dtype: a torch dtype or its name; None is
    float16 on CUDA, else float32; "auto" takes bfloat16 on a CPU that computes in it; `print(sd)`
    shows what it became. attention: "triton", "sdpa" or "reference"; "auto" is triton on CUDA, else
    sdpa; `sd.unet.attention` shows it. compile: let torch.compile make one graph of the UNet, with
    its default backend or the one named; slow at the first call for each size, number of pictures
    and kind of edit, each a graph of its own. graph: CUDA only, replay each denoising step as a
    CUDA graph (cuda_graph.py). Both hold for all methods of drawing and editing. variant: "fp16"
    takes the files *.fp16.safetensors. revision: branch, tag or commit of a Hub repo.
    local_files_only: do not ask the Hub, use its local cache. tokenizer: a folder with vocab.json
    and merges.txt, in place of the model's own. On a CPU, weights that keep their dtype stay mapped
    from their files: such a file may be replaced meanwhile, but not overwritten in place. Raises
    CheckpointError, a ValueError, if the model cannot be found or read, if tensors are missing,
    unexpected or misshapen (one error that lists them all), or if a weight is not finite.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    if attention not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"attention is {attention!r}, expected auto, {', '.join(IMPLEMENTATIONS)}")
    if graph and device.type != "cuda":
        raise ValueError(f"graph=True replays CUDA graphs and needs a CUDA device, got {device}")
    where = {
        "variant": variant,
        "revision": revision,
        "local_files_only": local_files_only,
        "tokenizer": tokenizer,
    }
    found = checkpoint.locate(source, **where)
    sd = StableDiffusion(*checkpoint.load_parts(found, device, dtype))
    sd.unet.attention = (
        ("triton" if device.type == "cuda" else "sdpa") if attention == "auto" else attention
    )
    make_quick(sd.text_encoder)
    make_quick(sd.vae)
    make_quick(sd.unet, compile)
    if graph:
        sd.unet.replay = Replay()
    return sd


def make_quick(model: nn.Module, compile: bool | str = False) -> nn.Module:
    """How `load` has a model computed: by oneDNN on a CPU, else in channels_last, on CUDA with q, k
    and v of self-attention in one product; one compiled graph if asked."""
    weight = next(model.parameters())
    if weight.device.type == "cpu" and not compile and onednn.available(weight.dtype):
        onednn.use_onednn(model)
    else:
        model.to(memory_format=torch.channels_last)
    if (
        isinstance(model, UNet) and weight.device.type == "cuda"
    ):  # on a CPU a copy of mapped weights would gain 0.1 %
        model.fuse_qkv()
    if compile:
        options = {"backend": compile} if isinstance(compile, str) else {}
        if (
            "recompile_limit" in inspect.signature(torch.compile).parameters
        ):  # torch 2.10 has only its limit of 8
            options["recompile_limit"] = (
                256  # each size and method is a graph of its own: the ninth would be an error
            )
        model.compile(fullgraph=True, dynamic=False, **options)
    return model


def pick_device(device) -> torch.device:
    """torch.device(device), None being CUDA if there is one; ValueError if there is no such device
    here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if (device := torch.device(device)).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return device


def pick_dtype(dtype, device: torch.device) -> torch.dtype:
    """A torch dtype from itself or its name, None being float16 on CUDA and float32 elsewhere.

    "auto" is the same, but bfloat16 on a CPU whose instructions include products of bfloat16.
    """
    if dtype == "auto" and device.type == "cpu":
        has = torch.cpu.get_capabilities().get
        return (
            torch.bfloat16
            if has("avx512_bf16") or has("amx_bf16") or has("bf16")
            else torch.float32
        )
    if dtype in (None, "auto"):
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)} or auto")
    return DTYPES[dtype]


def make_sampler(name: str, schedule: NoiseSchedule, steps: int, strength: float = 1.0) -> Sampler:
    """The sampler of that name, of whose steps the last int(steps * strength) are run (diffusers'
    rule)."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}, expected one of {', '.join(map(repr, SAMPLERS))}")
    whole = SAMPLERS[name](schedule, steps)
    expect.number("strength", strength, 0, 1)
    return replace(whole, skip=steps - int(steps * strength))


def denoise_shown(x: Tensor, sampler: Sampler, predict, on_step, progress: bool) -> Tensor:
    """`denoise` with a progress bar and an on_step that may return None."""

    def after(x, step):
        new = on_step(x, step)
        if new is None:
            return x
        if not (isinstance(new, Tensor) and new.shape == x.shape):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"on_step returned {got}, expected None or latents of shape {tuple(x.shape)}"
            )
        return new.to(x)

    with memory_for("latents", x):
        return denoise(x, tqdm(sampler, disable=not progress), predict, after if on_step else None)


def unchanged(image, pixels: Tensor, height: int | None, width: int | None) -> list[Image.Image]:
    """The pictures themselves where none of the steps is run; resized, as `pixels` are, if there is
    a size for them."""
    return as_given(image) if height is None and width is None else to_pil(pixels)


@contextmanager
def memory_for(what: str, x: Tensor, factor: int = 1) -> Iterator[None]:
    """torch's errors of memory that it does not get, as a MemoryError that says what for; its size
    is `factor` x's."""
    try:
        yield
    except RuntimeError as error:  # on a CPU it has no class of its own
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        hint = (
            "a smaller size (--size WxH, or height= and width=), fewer pictures at once or bfloat16"
        )
        size = f"{x.shape[3] * factor} x {x.shape[2] * factor}"
        raise MemoryError(f"not enough memory for {what} of {size}: try {hint}") from error


def _per_image(rows: Tensor, prompts: int, num_images: int) -> Tensor:
    """One row for all prompts or one for each -> one for each picture, those of one prompt standing
    together."""
    return rows.expand(prompts, *rows.shape[1:]).repeat_interleave(num_images, dim=0)


def as_list(texts: str | Sequence[str]) -> list[str]:
    if not isinstance(texts, Sequence):
        raise TypeError(f"got {texts!r}, expected a text or a list of texts")
    return [texts] if isinstance(texts, str) else list(texts)


def is_seed(value) -> bool:
    """Whether torch takes it as a seed: a whole number from -2**63 to 2**64 - 1."""
    return isinstance(value, Integral) and -(2**63) <= value < 2**64
