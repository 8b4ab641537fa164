"""Between images and latents: what a latent diffusion model does beside its network.

    z = scaling_factor * encode(image);    x_T ~ N(0, 1) of the same shape;    image = decode(z)

Rombach et al. 2022, https://arxiv.org/abs/2112.10752.
"""

from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, Literal, cast, overload

import torch
from PIL import Image
from torch import Tensor

from . import expect
from .drawing import memory_for, seeds
from .engine.network import Network, network
from .models.denoiser import Denoiser
from .models.vae import AutoencoderKL
from .sampling.schedule import NoiseSchedule
from .viewing.images import ImageInput, as_given, to_pil, to_tensor

MOST_PIXELS = 2048 * 2048  # of an image: 16 times those that Stable Diffusion v1 was trained on


class Latents:
    """A network that denoises latents, and the autoencoder that makes them; a dataclass inherits.

    An image is a PIL image, or a tensor (B, 3, H, W) in [-1, 1]; a latent z or x is (B, C, H /
    factor, W / factor), C = channels (4) and factor = vae.factor, scaled by
    vae.config.scaling_factor.
    """

    vae: AutoencoderKL
    schedule: NoiseSchedule
    compile: bool | str
    graph: bool
    batch_invariant: bool = False

    @property
    def denoiser(self) -> Denoiser:
        """The network that predicts the noise."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Of a latent: the VAE's."""
        return self.vae.config.latent_channels

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def network(self) -> Network:
        """The denoiser as it is computed: itself, compiled, a CUDA graph, image by image. Methods
        ask this."""
        key = (self.denoiser, self.compile, self.graph, self.batch_invariant)
        if self.__dict__.get("_network", (None,))[:-1] != key:
            self.__dict__["_network"] = (*key, network(*key))
        return self.__dict__["_network"][-1]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the parts; what was compiled or captured is made anew."""
        return {each.name: getattr(self, each.name) for each in fields(cast(Any, self))}

    @torch.no_grad()
    def encode_image(
        self,
        image: ImageInput,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """z = scaling_factor * (mean + std * noise), (B, C, H / factor, W / factor).

        The noise is drawn from `generator`; None: the mode, that is the mean. image, height, width:
        what `pixels` takes.
        """
        x = self.pixels(image, height, width)
        with memory_for("images", x):
            moments = [self.vae.encode(row) for row in x.split(1)]  # as in decode
        mean, logvar = (torch.cat(each) for each in zip(*moments))
        if generator is not None:
            noise = torch.randn(
                mean.shape, generator=generator, device=generator.device, dtype=torch.float32
            )
            mean = mean + (0.5 * logvar).exp() * noise.to(mean)
        z = self.vae.config.scaling_factor * mean
        return z.contiguous()  # as noise is: other strides would cost a graph of their own

    @overload
    def decode(self, z: Tensor, as_tensor: Literal[False] = False) -> list[Image.Image]: ...

    @overload
    def decode(self, z: Tensor, as_tensor: Literal[True]) -> Tensor: ...

    @torch.no_grad()
    def decode(self, z: Tensor, as_tensor: bool = False) -> list[Image.Image] | Tensor:
        """The images of latents z: PIL images, or one tensor (B, 3, H, W) in [-1, 1]."""
        expect.shape("latents", z, "B", self.vae.config.latent_channels, "h", "w")
        z = z.to(self.device, self.dtype) / self.vae.config.scaling_factor
        # One by one: at 512 x 512 the decoder's activations are the largest of all.
        with memory_for("images", z, self.vae.factor):
            image = torch.cat([self.vae.decode(row) for row in z.split(1)])
        return image.clamp(-1, 1) if as_tensor else to_pil(image)

    def noise(
        self,
        seed: int | Sequence[int],
        batch: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """x_T ~ N(0, 1), (B, C, height / factor, width / factor); in pixels, None: the model's own.

        Row i is drawn with seed + i, whatever the batch (None: one row); a sequence gives each row
        its seed. Drawn on the CPU in float32, so that it is the same on every device.
        """
        if batch is not None:
            expect.whole_number("batch", batch, 1)
        shape = (1, self.channels, *self.latent_size(height, width))
        generators = [torch.Generator("cpu").manual_seed(each) for each in seeds(seed, batch)]
        rows = [
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for generator in generators
        ]
        return torch.cat(rows).to(self.device, self.dtype)

    def pixels(
        self, image: ImageInput, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Image(s) as the VAE takes them, (B, 3, height, width) in [-1, 1].

        PIL images, files' names or bytes, and arrays (see `minisd.viewing.images.as_given`), one or
        a list, are turned upright, made RGB and resized (Lanczos); without a
        size, to that of the first, its sides rounded down to multiples of vae.factor as in
        diffusers. A tensor must have the right size.
        """
        if isinstance(image, Tensor):
            return self._check_pixels(image, height, width)
        images = as_given(image)
        if not images:
            raise ValueError("got an empty list, expected at least one image")
        factor = self.vae.factor
        if min(images[0].size) < factor and None in (height, width):
            size = " x ".join(map(str, images[0].size))
            expected = f"at least {factor} x {factor}, or a size for it"
            raise ValueError(f"the image is {size} pixels, expected {expected}")
        height = images[0].height // factor * factor if height is None else height
        width = images[0].width // factor * factor if width is None else width
        self.latent_size(height, width)
        return to_tensor(images, height, width).to(self.device, self.dtype)

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(h, w) of the latents of an image of that many pixels, at most MOST_PIXELS in all.

        None: the model's own size.
        """
        factor, own = self.vae.factor, self.denoiser.config.sample_size
        if height is None or width is None:
            if own is None:
                got = "the model's config names no size (sample_size)"
                raise ValueError(f"{got}: give height and width")
            h, w = own if isinstance(own, tuple) else (own, own)
            height = h * factor if height is None else height
            width = w * factor if width is None else width
        sides = (height, width)
        integers = all(isinstance(side, Integral) for side in sides)
        if not (integers and all(side > 0 and side % factor == 0 for side in sides)):
            got = f"{width!r} x {height!r}"
            raise ValueError(f"the image is {got} pixels, expected positive multiples of {factor}")
        if height * width > MOST_PIXELS:
            hint = "give a smaller size (--size WxH, or height= and width=)"
            got = f"the image is {width} x {height} pixels"
            raise ValueError(f"{got}, expected at most {MOST_PIXELS:,} in all: {hint}")
        return height // factor, width // factor

    def _check_pixels(self, image: Tensor, height: int | None, width: int | None) -> Tensor:
        """A tensor (B, 3, H, W) in [-1, 1] of the right size, on the model's device."""
        of_floats = image.ndim == 4 and image.shape[1] == 3 and image.is_floating_point()
        if not (of_floats and len(image)):
            got = f"a {image.dtype} tensor of shape {tuple(image.shape)}"
            raise ValueError(f"got {got}, expected floats (B, 3, H, W)")
        own = tuple(image.shape[2:])
        wanted = (own[0] if height is None else height, own[1] if width is None else width)
        if own != wanted:
            got = f"a tensor of {own[1]} x {own[0]} pixels for {width} x {height}"
            raise ValueError(f"got {got}; only PIL images are resized")
        self.latent_size(*own)
        low, high = image.aminmax()
        if not (low >= -1 and high <= 1):
            got = f"a tensor with values from {low:g} to {high:g}"
            raise ValueError(f"got {got}, expected -1 (black) to 1 (white)")
        return image.to(self.device, self.dtype)
