"""The stages that train DiTs on labels: the bundled `shapes-dit`, and four small ones for a figure.

    L = w_t |eps - eps_theta(alpha_t z + sigma_t eps, t, label)|^2 + L_t     (hybrid_loss)

A label is a shape and a colour; size, place and background of the one thing are drawn by chance.
The autoencoder is that of `shapes`. The four, two sizes with patches of 2 and of 4 each, are figure
6 of Peebles and Xie 2022 (https://arxiv.org/abs/2212.09748) in miniature: what more of the network,
or more tokens of the same network, are worth after the same number of steps.
"""

import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm

from ..checkpoints.export import write_json
from ..checkpoints.load import load_parts, locate
from ..checkpoints.sources import bundled, weights_file
from ..files import atomic_folder, atomic_write
from ..models.dit import DiT, drop_labels
from ..models.dit_config import DiTConfig
from ..models.vae import AutoencoderKL
from . import scenes
from .data import to_model
from .loop import train
from .objective import draw_times, hybrid_loss
from .recipes import LabelRecipe
from .stages import normal, random_rows

LABELS = [scenes.Thing(shape, colour) for shape in scenes.SHAPES for colour in scenes.COLOURS]
LABEL_DROPOUT = 0.1  # share of the samples that train the unconditional branch of guidance
SEED = 3  # beside the run's: of the pool's scenes


class LabelPool(NamedTuple):
    """Latents to learn from, unscaled: mean and std (n, C, h, w) float16, labels (n,)."""

    mean: Tensor
    std: Tensor
    labels: Tensor


def render_labels(count: int, seed: int) -> list[Image.Image]:
    """Renderings of labels 0, 1, ..., K - 1, 0, 1, ..., `count` of them, 64 x 64."""
    rng = random.Random(seed)
    said = (scenes.Description((LABELS[i % len(LABELS)],)) for i in range(count))
    return [
        scenes.render(scenes.draw(each, rng))
        for each in tqdm(said, "drawing", count, file=sys.stderr)
    ]


@torch.no_grad()
def encode_labels(vae: AutoencoderKL, count: int, seed: int) -> LabelPool:
    """Renderings as the autoencoder encodes them, and their labels."""
    pixels = torch.from_numpy(np.stack([np.asarray(x) for x in render_labels(count, seed)]))
    device = next(vae.parameters()).device
    coded = [
        vae.encode(to_model(some, device))
        for some in tqdm(pixels.split(250), "encoding", file=sys.stderr)
    ]
    mean, logvar = (torch.cat(each).cpu() for each in zip(*coded))
    labels = torch.arange(count, dtype=torch.int64, device="cpu") % len(LABELS)
    return LabelPool(mean.half(), torch.exp(0.5 * logvar).half(), labels)


def train_labelled(recipe: LabelRecipe, run: Path, seed: int, device: torch.device) -> None:
    """Minimise `hybrid_loss` over each DiT of the recipe, one after the other; -> NAME.pt each."""
    parts = load_parts(locate("shapes"), device, torch.float32)
    path, how = run / "labelled.pt", recipe.how
    if not path.exists():
        with atomic_write(path) as temporary:
            torch.save(encode_labels(parts.vae, how.pool, seed + SEED)._asdict(), temporary)
    pool = LabelPool(**torch.load(path, map_location="cpu"))
    factor, schedule = parts.vae.config.scaling_factor, parts.schedule
    for name, config in recipe.dits.items():
        torch.manual_seed(seed)
        dit = DiT(config)
        dit.attention = "reference"  # on a CPU its backward is quicker than SDPA's

        def loss(generator: Generator, dit: DiT = dit) -> Tensor:
            rows = random_rows(len(pool.labels), how.batch, generator)
            mean, std = pool.mean[rows].float(), pool.std[rows].float()
            z = factor * (mean + std * normal(mean.shape, generator)).to(device)
            noise = normal(mean.shape, generator).to(device)
            t = draw_times(how.batch, len(schedule), recipe.noisy_share, generator).to(device)
            labels = drop_labels(pool.labels[rows], dit.labels, LABEL_DROPOUT, generator)
            context = dit.embed_labels(labels.to(device))
            return hybrid_loss(dit, schedule, z, noise, t, context, recipe.max_weight)

        train(nn.ModuleDict({"dit": dit}), loss, how, run / f"{name}.pt", seed, device)


def export_labelled(recipe: LabelRecipe, run: Path, folder: Path) -> None:
    """Write each DiT's average in float16 as a folder of its name, which `minisd.load_dit` takes,
    with the bundled autoencoder and schedule. All of them or nothing."""
    with atomic_folder(folder, last=list(recipe.dits)[-1]) as temporary:
        for name, config in recipe.dits.items():
            run_state = torch.load(run / f"{name}.pt", map_location="cpu", mmap=True)
            average = run_state["average"]
            state = {key.removeprefix("dit."): tensor for key, tensor in average.items()}
            write_dit(config, state, run_state["step"], temporary / name)


def write_dit(config: DiTConfig, state: dict[str, Tensor], steps: int, folder: Path) -> None:
    """A DiT in diffusers' layout: a copy of the embedders in every block. steps: of its training,
    for model_index.json."""
    halves = {}
    for name, tensor in state.items():
        embeds = name.startswith(("timestep_embedder.", "class_embedder."))
        copies = [f"transformer_blocks.{i}.norm1.emb." for i in range(config.num_layers)]
        for before in copies if embeds else [""]:
            halves[before + name] = tensor.half().contiguous().clone()
    for part in ("vae", "scheduler"):
        shutil.copytree(bundled()["shapes"] / part, folder / part)
    own = folder / "transformer"
    write_json(own / "config.json", asdict(config) | {"_class_name": "DiT"})
    save_file(halves, own / Path(weights_file("unet", None)).name, metadata={"format": "pt"})
    names = {str(i): str(thing) for i, thing in enumerate(LABELS)}
    index = {"_class_name": "DiTPipeline", "id2label": names, "trained_steps": steps}
    write_json(folder / "model_index.json", index)
