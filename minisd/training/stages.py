"""The stages of training: autoencoder, text, diffusion.

Each leaves its state in the run's folder: autoencoder.pt, text.pt, diffusion.pt and, with the
latents that the last one learns from, pool.pt.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..checkpoints.load import SD_V1_SCHEDULE
from ..files import atomic_write
from ..models.clip import CLIPTextModel
from ..models.tokenizer import CLIPTokenizer
from ..models.unet import UNet
from ..models.vae import AutoencoderKL
from ..sampling.schedule import NoiseSchedule
from . import scenes
from .data import Pool, draw_scenes, encode_pool, make_tokenizer, to_model
from .loop import to_device, train
from .objective import (
    autoencoder_loss,
    diffusion_loss,
    draw_amplitudes,
    draw_times,
    layout_loss,
    silence,
    summary_loss,
)
from .recipes import Recipe, TransformerRecipe

CAPTION_DROPOUT = 0.1  # share of the samples that train the unconditional branch of guidance


def train_autoencoder(recipe: Recipe, run: Path, seed: int, device: torch.device) -> None:
    """Minimise `autoencoder_loss` on drawn scenes."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(recipe.vae)
    images, _, _ = draw_scenes(recipe.autoencoder.pool, recipe.image_size, seed)
    fit_autoencoder(vae, images, recipe, run, seed, device)


def fit_autoencoder(
    vae: AutoencoderKL, images: Tensor, recipe: Recipe, run: Path, seed: int, device: torch.device
) -> None:
    """Minimise `autoencoder_loss` on images (n, H, W, 3) uint8; -> the run's autoencoder.pt."""
    batch, size = recipe.autoencoder.batch, recipe.image_size // vae.factor

    def loss(generator: Generator) -> Tensor:
        chosen = random_rows(len(images), batch, generator)
        noise = normal((batch, recipe.vae.latent_channels, size, size), generator).to(device)
        return autoencoder_loss(vae, to_model(images[chosen], device), noise, recipe.kl_weight)

    train(vae, loss, recipe.autoencoder, run / "autoencoder.pt", seed, device)


def train_text(recipe: Recipe, run: Path, seed: int, device: torch.device) -> None:
    """Minimise `summary_loss` on captions: the text encoder learns alone what they say."""
    rng = random.Random(seed + 2)
    count = recipe.text_encoder.pool
    captions = [scenes.caption(scenes.sample(rng, "train")) for _ in range(count)]
    fit_text(captions, make_tokenizer(), recipe, run, seed, device)


def fit_text(
    captions: list[str],
    tokenizer: CLIPTokenizer,
    recipe: Recipe,
    run: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Minimise `summary_loss` over captions and the empty one; -> the run's text.pt."""
    fresh = Trained(recipe, tokenizer, seed)
    encoder, head = fresh.text_encoder, fresh.summary_head
    ids = tokenizer(["", *captions])

    def loss(generator: Generator) -> Tensor:
        chosen = ids[random_rows(len(ids), recipe.text_encoder.batch, generator)].to(device)
        return summary_loss(encoder(chosen), chosen, tokenizer.eos_id, head)

    model = nn.ModuleDict({"text_encoder": encoder, "summary_head": head})
    train(model, loss, recipe.text_encoder, run / "text.pt", seed, device)


def train_diffusion(recipe: Recipe, run: Path, seed: int, device: torch.device) -> None:
    """Fit UNet and text encoder, which start fresh and where its own stage left it, to scenes."""
    tokenizer = make_tokenizer()
    pool = load_pool(recipe, run, tokenizer, seed, device)
    model = Trained(recipe, tokenizer, seed)
    fit_diffusion(model, pool, tokenizer, recipe, run, seed, device)


def fit_diffusion(
    model: "Trained",
    pool: Pool,
    tokenizer: CLIPTokenizer,
    recipe: Recipe,
    run: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Minimise `diffusion_loss`, and the helper losses beside it, over UNet and text encoder; the
    latter begins where the run's text.pt left it. -> the run's diffusion.pt

    The caption is dropped from a tenth of the samples, so that guidance can be used (Ho and
    Salimans 2022, https://arxiv.org/abs/2207.12598).
    """
    learned = torch.load(run / "text.pt", map_location="cpu")["average"]
    model.load_state_dict(learned, strict=False)  # the UNet is as it was given
    schedule = NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    empty = tokenizer([""])
    seen: dict[str, Tensor] = {}  # what the last forward left for layout_loss
    model.unet.mid_block.register_forward_hook(lambda module, args, out: seen.update(mid=out))

    def loss(generator: Generator) -> Tensor:
        batch = recipe.diffusion.batch
        s = draw_samples(pool, batch, len(schedule), empty, recipe, generator).to(device)
        context = model.text_encoder(s.ids)
        of_empty = model.text_encoder(empty.to(device))
        heard = silence(context, of_empty, s.ids, tokenizer.eos_id, s.silent)
        value = diffusion_loss(model.unet, schedule, s.z, s.noise, s.t, heard, recipe.max_weight)
        if recipe.layout_weight:
            layout = layout_loss(seen["mid"], model.layout_head, s.boxes)
            value = value + recipe.layout_weight * layout
        if recipe.summary_weight:
            summary = summary_loss(context, s.ids, tokenizer.eos_id, model.summary_head)
            value = value + recipe.summary_weight * summary
        return value

    train(model, loss, recipe.diffusion, run / "diffusion.pt", seed, device)


class Samples(NamedTuple):
    """What one step of a diffusion stage learns from, a row each.

    z, noise: (B, C, h, w). t: (B,). ids: (B, L). boxes: (B, 2, 3). silent: (B,) bool, whether the
    words alone must tell.
    """

    z: Tensor
    noise: Tensor
    t: Tensor
    ids: Tensor
    boxes: Tensor
    silent: Tensor

    def to(self, device: torch.device) -> "Samples":
        return Samples(*(x.to(device) for x in self))


def draw_samples(
    pool: Pool,
    batch: int,
    times: int,
    empty: Tensor,
    shares: Recipe | TransformerRecipe,
    generator: Generator,
) -> Samples:
    """Random scenes of the pool with their noise and times; `empty`, (1, L), for dropped captions.

    shares: whose noisy_share, silent_share and faint_share hold.
    """
    chosen = random_rows(len(pool["ids"]), batch, generator)
    mean, std = pool["mean"][chosen].float(), pool["std"][chosen].float()
    z = pool["scaling_factor"] * (mean + std * normal(mean.shape, generator))
    noise = normal(z.shape, generator)
    t = draw_times(batch, times, shares.noisy_share, generator)
    dropped = chance((batch, 1), CAPTION_DROPOUT, generator)
    ids = torch.where(dropped, empty, pool["ids"][chosen])
    silent = chance((batch,), shares.silent_share, generator)
    noise = noise * draw_amplitudes(batch, shares.faint_share, generator)
    return Samples(z, noise, t, ids, pool["boxes"][chosen], silent)


def random_rows(count: int, batch: int, generator: Generator) -> Tensor:
    """(batch,) numbers from 0 to count - 1."""
    return torch.randint(count, (batch,), generator=generator, dtype=torch.int64, device="cpu")


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """N(0, 1), float32 on the CPU, the same for every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def chance(shape: tuple[int, ...], share: float, generator: Generator) -> Tensor:
    """True with probability `share`, on the CPU."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < share


def load_pool(
    recipe: Recipe, run: Path, tokenizer: CLIPTokenizer, seed: int, device: torch.device
) -> Pool:
    """The run's pool.pt, made first if it is not there: later autoencoders are not used."""
    path = run / "pool.pt"
    if not path.exists():
        vae = AutoencoderKL(recipe.vae)
        to_device(vae, device)
        vae.load_state_dict(torch.load(run / "autoencoder.pt", map_location=device)["average"])
        with atomic_write(path) as temporary:
            count, size = recipe.diffusion.pool, recipe.image_size
            torch.save(encode_pool(vae, count, size, tokenizer, seed + 1, device), temporary)
    return torch.load(path, map_location="cpu")


class Trained(nn.Module):
    """UNet, text encoder and the heads of the helper losses, at their starting point.

    torch's default layers, small embeddings as in CLIP, and zeros where a block or the network
    ends, so that each starts as the identity or as zero (as the published code does).
    """

    def __init__(self, recipe: Recipe, tokenizer: CLIPTokenizer, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        words = len(tokenizer.vocab)
        text = CLIPTextModel(replace(recipe.text, vocab_size=words))
        nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
        self.unet = UNet(recipe.unet)
        self.unet.attention = "reference"  # on a CPU its backward is a quarter faster than SDPA's
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                for parameter in module.parameters(recurse=False):
                    nn.init.zeros_(parameter)
        self.text_encoder = text
        self.layout_head = nn.Conv2d(recipe.unet.block_out_channels[-1], 2, 1)
        self.summary_head = nn.Linear(recipe.unet.cross_attention_dim, words)
