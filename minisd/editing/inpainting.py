"""Inpainting: models that were trained to fill the white part of a mask.

Their UNet sees, beside the latent x, the mask and the latent of the image without what the mask
covers:

    eps(cat(x, m, z_masked), t, text),      m (B, 1, h, w) in {0, 1}, 1 is drawn
    z_masked = encode(image (1 - M)),       M the mask in pixels; covered is mid-grey, 0

so its first convolution has 4 + 1 + 4 channels; all else is Stable Diffusion. Source:
https://huggingface.co/runwayml/stable-diffusion-inpainting and CompVis' inpaint_st.py; Rombach et
al. 2022, section 4.5. Blended diffusion (blended.py) does the same with a model that was not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from .. import expect
from ..drawing import Drawing, Options
from ..pipeline import ImageInput
from ..recipes import tell
from .blended import Given, Mask, MaskInput, resized

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


@dataclass(frozen=True, eq=False)
class WithMask:
    """The network as guidance calls it, network(x, t, context, edits), of an inpainting model.

    known: cat(m, z_masked), (1 or B, 5, h, w), which stands beside x at every step.
    """

    network: Any  # sd.network
    known: Tensor

    def __call__(self, x: Tensor, t: Tensor, context: Any, edits: Any = None) -> Tensor:
        known = self.known.expand(len(x), -1, -1, -1).to(x)
        return self.network(torch.cat([x, known], dim=1), t, context, edits)

    def prepare(self, context: Tensor) -> Any:
        return self.network.prepare(context)

    def prepare_times(self, t: Tensor) -> Tensor:
        return self.network.prepare_times(t)


def inpaint(
    sd: "StableDiffusion",
    image: ImageInput,
    mask: MaskInput | list[MaskInput] | tuple[MaskInput, ...],
    prompt: str | Sequence[str],
    strength: float = 1.0,
    *,
    feather: int = 0,
    paste_back: bool = True,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Fill the white part of a mask by an inpainting model, one whose UNet takes 9 channels.

    image, mask, prompt, feather, paste_back, options: as in `minisd.blend`. strength: 1 starts from
    noise alone; below, the last int(steps * strength) steps are run from the image, and if there
    are none it is returned. Without paste_back all pixels are the decoder's, as in diffusers.
    ValueError for a model of another kind.
    """
    arguments = dict(locals())
    if (got := sd.unet.config.in_channels) != (expected := 2 * sd.channels + 1):
        why = f"the model's UNet takes {got} channels, an inpainting model's {expected}"
        raise ValueError(f"{why}: expected such a model; `blend` (minisd blend) takes any")
    drawing = Drawing.of(options)
    plan = drawing.make_sampler(sd, strength)
    expect.whole_number("feather", feather, 0)
    given = Given.of(sd, image, mask, prompt, drawing)
    noise = drawing.at(*given.pixels.shape[2:]).noise(sd, len(given.images))
    if len(plan) == 0:
        return tell(given.images, sd, "inpaint", arguments, drawing, given.prompts)

    rows = len(given.prompts)
    known = drawing.per_image(mask_and_masked(sd, given.pixels, given.masks), rows)
    x = noise
    if strength < 1:
        x = plan.start(drawing.per_image(sd.encode_image(given.pixels), rows), noise)
    uncond, cond = drawing.embed(sd, given.prompts)
    predict = drawing.rule(WithMask(sd.network, known), uncond, cond, drawing.guidance)
    drawn = sd.decode(drawing.denoise(x, plan, predict))
    if paste_back:
        drawn = given.pasted(drawn, feather)
    return tell(drawn, sd, "inpaint", arguments, drawing, given.prompts)


def mask_and_masked(sd: "StableDiffusion", pixels: Tensor, masks: list[Mask]) -> Tensor:
    """cat(m, z_masked) of images (B, 3, H, W) and masks, one for all or one for each, (rows, 5, h,
    w).

    m is the mask's pixel at the upper left of each latent position, as these models were trained.
    """
    height, width = pixels.shape[2:]
    M = torch.stack([torch.from_numpy(resized(mask, height, width).copy()) for mask in masks])
    M = M[:, None].to(pixels)  # (B, 1, H, W)
    z = sd.encode_image(pixels * (1 - M))
    m = M[..., :: sd.vae.factor, :: sd.vae.factor].expand(len(z), -1, -1, -1)
    return torch.cat([m, z], dim=1)
