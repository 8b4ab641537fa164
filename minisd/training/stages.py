"""The stages of training, each of which leaves its state in the run's folder.

autoencoder -> autoencoder.pt      text -> text.pt      diffusion -> pool.pt, diffusion.pt
"""

import random
from dataclasses import replace
from pathlib import Path

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
from .loop import train
from .objective import (
    autoencoder_loss,
    diffusion_loss,
    draw_amplitudes,
    draw_times,
    layout_loss,
    silence,
    summary_loss,
)
from .recipes import Recipe

CAPTION_DROPOUT = 0.1  # share of the samples that train the unconditional branch of guidance


def train_autoencoder(recipe: Recipe, run: Path, seed: int, device: torch.device) -> None:
    """Minimise `autoencoder_loss` on drawn scenes."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(recipe.vae).to(device=device, memory_format=torch.channels_last)
    images, _, _ = draw_scenes(recipe.autoencoder.pool, recipe.image_size, seed)
    batch, size = recipe.autoencoder.batch, recipe.image_size // vae.factor

    def loss(generator: Generator) -> Tensor:
        chosen = random_rows(len(images), batch, generator)
        noise = normal((batch, recipe.vae.latent_channels, size, size), generator).to(device)
        return autoencoder_loss(vae, to_model(images[chosen], device), noise, recipe.kl_weight)

    train(vae, loss, recipe.autoencoder, run / "autoencoder.pt", seed, device)


def train_text(recipe: Recipe, run: Path, seed: int, device: torch.device) -> None:
    """Minimise `summary_loss` on captions: the text encoder learns alone what they say."""
    tokenizer = make_tokenizer()
    whole = build_models(recipe, tokenizer, seed)
    model = nn.ModuleDict({name: whole[name] for name in ("text_encoder", "summary_head")})
    model.to(device)
    rng = random.Random(seed + 2)
    count = recipe.text_encoder.pool
    captions = [scenes.caption(scenes.sample(rng, "train")) for _ in range(count)]
    ids = tokenizer(["", *captions])

    def loss(generator: Generator) -> Tensor:
        chosen = ids[random_rows(len(ids), recipe.text_encoder.batch, generator)].to(device)
        context = model["text_encoder"](chosen)
        return summary_loss(context, chosen, tokenizer.eos_id, model["summary_head"])

    train(model, loss, recipe.text_encoder, run / "text.pt", seed, device)


def train_diffusion(recipe: Recipe, run: Path, seed: int, device: torch.device) -> None:
    """Minimise `diffusion_loss`, and the helper losses beside it, over UNet and text encoder.

    The caption is dropped from a tenth of the samples, so that guidance can be used (Ho and
    Salimans 2022, https://arxiv.org/abs/2207.12598).
    """
    tokenizer = make_tokenizer()
    pool = load_pool(recipe, run, tokenizer, seed, device)
    schedule = NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    model = build_models(recipe, tokenizer, seed)
    trained = torch.load(run / "text.pt", map_location="cpu")["average"]
    model.load_state_dict(trained, strict=False)  # the rest is fresh
    model.to(device=device, memory_format=torch.channels_last)
    empty = tokenizer([""])
    seen: dict[str, Tensor] = {}  # what the last forward left for layout_loss
    model["unet"].mid_block.register_forward_hook(lambda module, args, out: seen.update(mid=out))

    def loss(generator: Generator) -> Tensor:
        batch = recipe.diffusion.batch
        chosen = random_rows(len(pool["ids"]), batch, generator)
        mean, std = pool["mean"][chosen].float(), pool["std"][chosen].float()
        z = pool["scaling_factor"] * (mean + std * normal(mean.shape, generator))
        noise = normal(z.shape, generator)
        t = draw_times(batch, len(schedule), recipe.noisy_share, generator)
        dropped = chance((batch, 1), CAPTION_DROPOUT, generator)
        ids = torch.where(dropped, empty, pool["ids"][chosen]).to(device)
        silent = chance((batch,), recipe.silent_share, generator).to(device)
        noise = noise * draw_amplitudes(batch, recipe.faint_share, generator)
        z, noise, t = z.to(device), noise.to(device), t.to(device)

        context = model["text_encoder"](ids)
        of_empty = model["text_encoder"](empty.to(device))
        heard = silence(context, of_empty, ids, tokenizer.eos_id, silent)
        value = diffusion_loss(model["unet"], schedule, z, noise, t, heard, recipe.max_weight)
        if recipe.layout_weight:
            boxes = pool["boxes"][chosen].to(device)
            layout = layout_loss(seen["mid"], model["layout_head"], boxes)
            value = value + recipe.layout_weight * layout
        if recipe.summary_weight:
            summary = summary_loss(context, ids, tokenizer.eos_id, model["summary_head"])
            value = value + recipe.summary_weight * summary
        return value

    train(model, loss, recipe.diffusion, run / "diffusion.pt", seed, device)


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
        vae = AutoencoderKL(recipe.vae).to(device=device, memory_format=torch.channels_last)
        vae.load_state_dict(torch.load(run / "autoencoder.pt", map_location=device)["average"])
        with atomic_write(path) as temporary:
            torch.save(encode_pool(vae, recipe, tokenizer, seed + 1, device), temporary)
    return torch.load(path, map_location="cpu")


def build_models(recipe: Recipe, tokenizer: CLIPTokenizer, seed: int) -> nn.ModuleDict:
    """UNet, text encoder and the heads of the helper losses at their starting point.

    torch's default layers, small embeddings as in CLIP, and zeros where a block or the network
    ends, so that each starts as the identity or as zero (as the published code does).
    """
    torch.manual_seed(seed)
    words = len(tokenizer.vocab)
    text = CLIPTextModel(replace(recipe.text, vocab_size=words))
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
    unet = UNet(recipe.unet)
    unet.attention = "reference"  # on a CPU its backward is a quarter faster than that of SDPA
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    parts = {"unet": unet, "text_encoder": text}
    heads = {
        "layout_head": nn.Conv2d(recipe.unet.block_out_channels[-1], 2, 1),
        "summary_head": nn.Linear(recipe.unet.cross_attention_dim, words),
    }
    return nn.ModuleDict(parts | heads)
