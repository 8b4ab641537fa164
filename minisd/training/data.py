"""The training data: scenes drawn by `scenes`, their captions, and their latents encoded once."""

import random
import sys
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models.tokenizer import CLIPTokenizer, build_vocabulary
from ..models.vae import AutoencoderKL
from . import scenes


class Pool(TypedDict):
    """What the diffusion stage learns from, of n scenes, as it stands in the run's pool.pt.

    mean, std: of every latent, (n, C, h, w) float16. ids: token ids of every caption, (n, L).
    boxes: (n, 2, 3). scaling_factor: makes the latents' standard deviation 1. vae: the state dict
    of the autoencoder that encoded them.
    """

    mean: Tensor
    std: Tensor
    ids: Tensor
    boxes: Tensor
    scaling_factor: float
    vae: dict[str, Tensor]


def draw_scenes(count: int, image_size: int, seed: int) -> tuple[Tensor, list[str], Tensor]:
    """`count` training scenes -> images, captions, boxes.

    images: (count, image_size, image_size, 3) uint8. boxes: (count, 2, 3), centre x, y and side of
    the first and the second thing as shares of the image; zeros where there is no second.
    """
    rng = random.Random(seed)
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    captions = []
    boxes = torch.zeros(count, 2, 3, dtype=torch.float32, device="cpu")
    for i in tqdm(range(count), desc="drawing", file=sys.stderr):
        scene = scenes.sample(rng, "train")
        images[i] = np.asarray(scenes.render(scene, image_size))
        captions.append(scenes.caption(scene))
        for j, box in enumerate(scene.boxes):
            place = torch.tensor([box.x, box.y, box.side], dtype=torch.float32, device="cpu")
            boxes[i, j] = place / scenes.SIDE
    return torch.from_numpy(images), captions, boxes


def to_model(images: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-1, 1]."""
    return images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer of this world: CLIP's layout, one token for each word of the grammar."""
    return CLIPTokenizer(*build_vocabulary(scenes.words()))


def encode_pool(
    vae: AutoencoderKL,
    count: int,
    image_size: int,
    tokenizer: CLIPTokenizer,
    seed: int,
    device: torch.device,
) -> Pool:
    """Draw the scenes of a diffusion stage and encode them once."""
    images, captions, boxes = draw_scenes(count, image_size, seed)
    return encode(vae, images, tokenizer(captions), boxes, device)


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Tensor, ids: Tensor, boxes: Tensor, device: torch.device
) -> Pool:
    """The latents of images (n, H, W, 3) uint8, with what else the diffusion stage learns from."""
    means, stds = [], []
    for chunk in tqdm(images.split(250), desc="encoding", file=sys.stderr):
        mean, logvar = vae.encode(to_model(chunk, device))
        means.append(mean.half().cpu())
        stds.append(torch.exp(0.5 * logvar).half().cpu())
    mean, std = torch.cat(means), torch.cat(stds)
    return {
        "mean": mean,
        "std": std,
        "ids": ids,
        "boxes": boxes,
        "scaling_factor": 1 / (mean.float().var() + std.float().square().mean()).sqrt().item(),
        "vae": vae.state_dict(),
    }
