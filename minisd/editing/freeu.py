"""FreeU: more of what comes from below in the first up blocks, and less of the low frequencies that
skip connections bring.

In up block i, before each layer, of what comes from below the first half of the channels is
multiplied by b_i, and of the skip that joins the lowest frequencies by s_i:

    x[:, :C / 2] <- b_i x[:, :C / 2],    skip <- Re ifft2(m fft2(skip)),
    m = s_i at the frequencies 0 and -1 along both axes, 1 elsewhere

The blocks are chosen by their place, the first and the second, as diffusers does; the authors'
code chooses by width (1280 and 640 channels), which in Stable Diffusion v1 is the first two blocks
and the first layer of the third, then the rest of it.

Source: Si et al. 2023 (arXiv 2309.11497). For Stable Diffusion v1.4 they give b 1.3, 1.4 and s 0.9,
0.2; for 1.5 b 1.5, 1.6 and the same s.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import expect
from ..models.features import FeatureEdit
from ..models.unet import UNet
from ..sampling.guidance import StepEdits

BACKBONE, SKIP = (1.3, 1.4), (0.9, 0.2)  # of Stable Diffusion v1.4


def freeu(unet: UNet, b: Sequence[float] = BACKBONE, s: Sequence[float] = SKIP) -> StepEdits:
    """The edits of FreeU, the same in every step and in all rows: cfg(..., edits=freeu(sd.unet)).

    b, s: a factor for each of the first up blocks, 1 changes nothing. In a method that takes a
    rule: rule=partial(cfg, edits=freeu(sd.unet)). ValueError for what does not fit.
    """
    blocks = unet.up_blocks[: len(b)]
    if not 1 <= len(b) == len(s) == len(blocks):
        got, most = f"{len(b)} factors b and {len(s)} factors s", len(unet.up_blocks)
        raise ValueError(f"got {got}, expected as many of both, 1 to {most}, one for each up block")
    for name, values in (("b", b), ("s", s)):
        for value in values:
            expect.number(name, value)
    edits = {}
    below = unet.mid_block.name
    for block, b_i, s_i in zip(blocks, b, s):
        more, less = half_scaled(b_i), low_scaled(s_i)
        layers = block.attentions if len(block.attentions) else block.resnets
        for resnet, layer in zip(block.resnets, layers):
            edits[below] = FeatureEdit(apply=more)
            edits[f"{resnet.name}.skip"] = FeatureEdit(apply=less)
            below = layer.name
        below = block.name
    return lambda step: edits


def half_scaled(b: float) -> Callable[[Tensor], Tensor]:
    """x (R, C, h, w) -> the same, the first half of the channels times b."""

    def apply(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([b * x[:, :half], x[:, half:]], dim=1)

    return apply


def low_scaled(s: float) -> Callable[[Tensor], Tensor]:
    """x (R, C, h, w) -> the same, the lowest frequencies times s."""

    def apply(x: Tensor) -> Tensor:
        low = [torch.zeros(n, dtype=torch.float32, device=x.device) for n in x.shape[2:]]
        for axis in low:
            axis[0] = axis[-1] = 1
        m = 1 + (s - 1) * low[0][:, None] * low[1]
        return torch.fft.ifft2(torch.fft.fft2(x.float()) * m).real.to(x.dtype)

    return apply
