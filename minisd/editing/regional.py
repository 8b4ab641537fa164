"""Regional prompts: each text in its own place of the image.

The text is the prompt's rows, then those of each region's text, 77 each, one after the other; in
cross-attention a position outside a region does not see its rows, and sees the prompt's everywhere:

    P = softmax(q k^T / sqrt(D) + bias),    bias = -inf for rows of a region, outside its mask

The unconditional text is repeated as often, which changes no attention. Masks are resized to each
site's grid. No map is stored: the bias is (1, 1, N, L).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image
from torch import Tensor

from ..drawing import Drawing, Options, embed
from ..models.attention import AttentionEdit
from ..recipes import tell
from .blended import MaskInput, latent_mask, read_mask

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion


def regional(
    sd: "StableDiffusion", prompt: str, regions: Mapping[str, MaskInput], **options: Unpack[Options]
) -> list[Image.Image]:
    """Draw a prompt that holds everywhere, and the text of each region inside its mask.

    regions: {text: mask}, masks being what `minisd.blend` takes, white inside; they may overlap.
    options: see `minisd.drawing.Drawing`. ValueError for a mask of which nothing is left on the
    latent's grid.
    """
    arguments, drawing = dict(locals()), Drawing.of(options)
    if not regions:
        raise ValueError("got no region, expected at least one {text: mask}")
    masks = [read_mask(mask) for mask in regions.values()]
    x = drawing.noise(sd, drawing.num_images)
    size = (x.shape[2], x.shape[3])
    inside = torch.cat([latent_mask(mask, *size) for mask in masks]).to(sd.device)
    uncond, _ = drawing.embed(sd, [prompt])
    if not isinstance(uncond, Tensor):
        raise ValueError("uncond is a list for each step, expected one embedding")
    texts = embed(sd, [prompt, *regions])  # (1 + regions, L, D)
    cond = texts.flatten(0, 1)[None].expand(len(x), -1, -1)
    edits = {}
    for site in sd.unet.sites("cross"):
        grid = sd.unet.grid(site, size)
        edits[site] = AttentionEdit(bias=region_bias(inside, grid, texts.shape[1], len(x)))
    predict = drawing.rule(
        sd.network, uncond.repeat(1, len(texts), 1), cond, drawing.guidance, lambda step: edits
    )
    images = sd.decode(drawing.denoise(x, drawing.make_sampler(sd, rows=len(x)), predict))
    return tell(images, sd, "regional", arguments, drawing, [prompt])


def region_bias(inside: Tensor, grid: tuple[int, int], length: int, rows: int) -> Tensor:
    """(rows, 1, N, (1 + regions) * length): 0 where a position may look, -inf where not.

    inside: (regions, 1, h, w) bool; a position of the grid is inside where any of the latent's that
    it stands for is.
    """
    near = torch.nn.functional.adaptive_max_pool2d(inside.float(), grid).flatten(1).mT > 0  # (N, r)
    hidden = torch.zeros(near.shape, dtype=torch.float32, device=near.device)
    hidden = hidden.masked_fill(~near, float("-inf"))
    common = torch.zeros(len(near), 1, dtype=torch.float32, device=near.device)
    bias = torch.cat([common, hidden], 1).repeat_interleave(length, 1)
    return bias.expand(rows, 1, -1, -1).contiguous()
