"""Train a small latent diffusion model from scratch on the pictures of `minisd.scenes`; it made the
bundled `shapes`.

Its stages share one run folder; each resumes where it was stopped:

    python -m minisd.training autoencoder --run RUN   L = |x - decode(z)| + kl_weight KL(q(z|x) || N(0, 1)),  z ~ q(z|x)
    python -m minisd.training text --run RUN          L = summary_loss: ends and pads tell which words the caption has
    python -m minisd.training diffusion --run RUN     L = w_t |eps - eps_theta(alpha_t z + sigma_t eps, t, text)|^2
    python -m minisd.training export --run RUN --to weights/shapes     the folder in diffusers layout, float16

The objective is that of Rombach et al. 2022, https://arxiv.org/abs/2112.10752 (eq. 2, with the text
encoder trained along as in its section 4.3), Ho et al. 2020; the caption is dropped from a tenth of
the samples so that guidance can be used (Ho and Salimans 2022). The learning rate is constant after
a warm-up and falls to zero over the last fifth, so a run that was given more steps goes on from its
checkpoint as if it had been planned so.
"""

import argparse
import copy
import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ..checkpoints.export import config_json, model_index, write_json
from ..checkpoints.load import SD_V1_SCHEDULE, weights_file
from ..models.clip import CLIPTextConfig, CLIPTextModel
from ..models.tokenizer import CLIPTokenizer, build_vocabulary
from ..models.unet import CROSS_DOWN, CROSS_UP, PLAIN_DOWN, PLAIN_UP, UNet, UNetConfig
from ..models.vae import AutoencoderKL, VAEConfig
from ..sampling.schedule import NoiseSchedule
from . import scenes

SCHEDULE = {"_class_name": "DDIMScheduler", "clip_sample": False, **SD_V1_SCHEDULE}
CAPTION_DROPOUT = 0.1
WARMUP, COOLDOWN = 200, 0.2  # steps; share of all steps
MAX_GRADIENT = 1.0
SAVE_EVERY = 250


@dataclass(frozen=True)
class Stage:
    """How one stage is trained: `steps` of `batch` samples from a pool of `pool` scenes with AdamW
    at `lr`."""

    steps: int
    batch: int
    lr: float
    pool: int
    ema: float


@dataclass(frozen=True)
class Recipe:
    """A model's numbers and how its two stages are trained. `text` lacks only the size of the
    vocabulary."""

    image_size: int
    vae: VAEConfig
    text: dict
    unet: UNetConfig
    autoencoder: Stage
    text_encoder: Stage
    diffusion: Stage
    kl_weight: float
    max_weight: float  # of the diffusion loss
    noisy_share: (
        float  # of the samples, drawn from the noisiest quarter of the times instead of from all
    )
    layout_weight: float  # of layout_loss, beside the diffusion loss
    summary_weight: float  # of summary_loss, likewise
    silent_share: (
        float  # of the samples, whose ends and pads are silenced: the words alone must tell
    )
    faint_share: float  # of the samples, whose noise is fainter than their time says


RECIPES = {
    "small": Recipe(  # two CPU cores, about four hours
        image_size=64,
        vae=VAEConfig(
            block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=64
        ),
        text=dict(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        ),
        unet=UNetConfig(
            sample_size=16,
            down_block_types=(CROSS_DOWN, CROSS_DOWN),
            up_block_types=(CROSS_UP, CROSS_UP),
            block_out_channels=(80, 160),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=128,
            norm_num_groups=16,
        ),
        autoencoder=Stage(steps=2600, batch=24, lr=1e-3, pool=20_000, ema=0.99),
        text_encoder=Stage(steps=2000, batch=48, lr=2e-3, pool=20_000, ema=0.99),
        diffusion=Stage(steps=12_000, batch=32, lr=1e-3, pool=60_000, ema=0.999),
        kl_weight=1e-5,
        max_weight=100.0,
        noisy_share=0.3,
        layout_weight=1.0,
        summary_weight=0.05,
        silent_share=0.5,
        faint_share=0.6,
    ),
    "large": Recipe(  # one GPU
        image_size=128,
        vae=VAEConfig(
            block_out_channels=(32, 64, 96, 96),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=128,
        ),
        text=dict(
            hidden_size=160, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4
        ),
        unet=UNetConfig(
            sample_size=16,
            down_block_types=(
                CROSS_DOWN,
                CROSS_DOWN,
                PLAIN_DOWN,
            ),  # the third level sees where in the picture it is
            up_block_types=(PLAIN_UP, CROSS_UP, CROSS_UP),
            block_out_channels=(80, 128, 128),
            layers_per_block=1,
            attention_head_dim=(2, 2, 2),
            cross_attention_dim=160,
            norm_num_groups=16,
        ),
        autoencoder=Stage(steps=10_000, batch=64, lr=1e-3, pool=60_000, ema=0.999),
        text_encoder=Stage(steps=4000, batch=256, lr=1e-3, pool=100_000, ema=0.99),
        diffusion=Stage(steps=60_000, batch=256, lr=1e-3, pool=200_000, ema=0.9995),
        kl_weight=1e-5,
        max_weight=100.0,
        noisy_share=0.3,
        layout_weight=1.0,
        summary_weight=0.05,
        silent_share=0.5,
        faint_share=0.6,
    ),
}


# ---- objectives
# ----------------------------------------------------------------------------------------------------


def autoencoder_loss(vae, x, noise, kl_weight):
    """mean |x - decode(mean + std * noise)| + kl_weight * mean KL(N(mean, std^2) || N(0, 1)).

    x: (B, 3, H, W) in [-1, 1]; noise: normal, of the latent's shape (B, latent_channels, h, w).
    """
    mean, logvar = vae.encode(x)
    z = mean + torch.exp(0.5 * logvar) * noise
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return F.l1_loss(vae.decode(z).float(), x) + kl_weight * kl.float().mean()


def diffusion_loss(unet, schedule, z, noise, t, context, max_weight=1.0):
    """mean w_t |noise - unet(alpha_t z + sigma_t noise, t, context)|^2,  w_t = min(1 / alpha_t^2,
    max_weight).

    With max_weight 1 this is the simplified objective of Ho et al. 2020, eq. 14. An error in the
    noise is an error in the picture times alpha / sigma, so that objective hardly sees the noisiest
    times, where nothing but the text tells what to draw; 1 / alpha^2 is the weight that predicting
    v gives them (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512).

    z, noise: (B, C, h, w); t: (B,) integers from 0; context: (B, L, D).
    """
    alphas_cumprod = schedule.alphas_cumprod.to(z.device)[t][:, None, None, None]
    x = alphas_cumprod.sqrt() * z + (1 - alphas_cumprod).sqrt() * noise
    weight = (1 / alphas_cumprod).clamp(max=max_weight)
    return (weight * (unet(x, t, context).float() - noise) ** 2).mean()


def layout_loss(features, head, boxes):
    """Binary cross-entropy of head(features) with the boxes: which cells does the first thing
    cover, which the second?

    A helper at training, not exported. Where things go is decided at times so noisy that the
    diffusion loss hardly sees it, and convolutions see absolute positions only through the zero
    padding at the border, so place words stay unused for long. features: (B, C, h, w); head: C -> 2
    channels; boxes: (B, 2, 3) centre x, y and side as shares of the picture, side 0 for no thing.
    """
    h, w = features.shape[2:]
    y, x = ((torch.arange(n, device=features.device) + 0.5) / n for n in (h, w))
    cx, cy, side = boxes[..., None, None].unbind(2)  # each (B, 2, 1, 1)
    covered = ((x - cx).abs() < side / 2) & ((y[:, None] - cy).abs() < side / 2)  # (B, 2, h, w)
    return F.binary_cross_entropy_with_logits(head(features).float(), covered.float())


def summary_loss(context, ids, end, head):
    """Binary cross-entropy, summed over the vocabulary: which tokens the caption has, told from
    each end token and pad.

    A helper at training, not exported. It stands in for CLIP's pretraining, which gathers the
    caption at its end: of the 77 tokens the UNet looks at, most are ends and pads, and what they do
    not hold is found late. context: (B, L, D); ids: (B, L); end: the id of the end token, which
    also pads; head: D -> size of the vocabulary.
    """
    rows, positions = (ids == end).nonzero(as_tuple=True)
    logits = head(context[rows, positions]).float()  # (ends and pads of all captions, vocabulary)
    present = torch.zeros(len(ids), logits.shape[1], device=ids.device).scatter_(1, ids, 1.0)
    return F.binary_cross_entropy_with_logits(logits, present[rows], reduction="sum") / len(rows)


def silence(context, empty, ids, end, rows):
    """The context with the end tokens and pads of the chosen rows replaced by those of the empty
    caption.

    What the pads tell of a caption, a UNet can draw without ever looking at the words, and then an
    edit of a word's attention (reweighting it, say) changes nothing. Rows whose words alone tell
    keep both ways alive. context: (B, L, D); empty: (1, L, D); ids: (B, L); end: the id of the end
    token, which also pads; rows: (B,) bool.
    """
    return torch.where((rows[:, None] & (ids == end))[..., None], empty, context)


def draw_times(batch, steps, noisy_share, generator):
    """t (batch,) from 0 to steps - 1: uniform, or with probability noisy_share uniform over the
    last quarter.

    By the inverse of the distribution function at evenly spaced points with one random offset, so
    that every batch covers the times evenly (Kingma et al. 2021, https://arxiv.org/abs/2107.00630,
    appendix I.1).
    """
    u = (torch.arange(batch) + torch.rand(1, generator=generator)) / batch
    plain = 1 - noisy_share
    late = 0.75 + (u - 0.75 * plain) / (plain + 4 * noisy_share)
    t = torch.where(u < 0.75 * plain, u / max(plain, 1e-9), late)
    return (t * steps).long().clamp(max=steps - 1)


def draw_amplitudes(batch, faint_share, generator):
    """Factors of the noise (batch, 1, 1, 1): uniform from 0.6 to 1 with probability faint_share,
    else 1.

    A rendered picture holds no noise at all, so DDIM inversion, which runs the sampler backwards
    from it, comes to latents whose noise is fainter than their time says: alpha_t z + sigma_t k
    eps, k < 1. A UNet that has never seen such latents amplifies the errors of inversion there.
    What it is to answer is k eps, the noise that is in them.
    """
    faint = torch.rand(batch, generator=generator) < faint_share
    return torch.where(faint, 0.6 + 0.4 * torch.rand(batch, generator=generator), 1.0)[
        :, None, None, None
    ]


# ---- data
# ----------------------------------------------------------------------------------------------------------


def draw_scenes(count, image_size, seed):
    """`count` training scenes -> pictures (count, image_size, image_size, 3) uint8, captions, boxes
    (count, 2, 3)."""
    rng = random.Random(seed)
    pictures = np.empty((count, image_size, image_size, 3), np.uint8)
    captions, boxes = [], torch.zeros(count, 2, 3)
    for i in tqdm(range(count), desc="drawing", file=sys.stderr):
        scene = scenes.sample(rng, "train")
        pictures[i] = scenes.render(scene, image_size)
        captions.append(scenes.caption(scene))
        for j, box in enumerate(scene.boxes):
            boxes[i, j] = torch.tensor([box.x, box.y, box.side]) / scenes.SIDE
    return torch.from_numpy(pictures), captions, boxes


def to_model(pictures, device):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-1, 1]."""
    return pictures.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_tokenizer():
    """The tokenizer of this world: CLIP's layout, one token for each word of the grammar."""
    return CLIPTokenizer(*build_vocabulary(scenes.words()))


@torch.no_grad()
def encode_pool(vae, recipe, tokenizer, seed, device):
    """Draw the diffusion stage's pool and encode it once.

    Keeps mean and std of every latent, (n, C, h, w) float16, the token ids of every caption, (n,
    L), its boxes, the factor that makes the latents' standard deviation 1, and the VAE used.
    """
    pictures, captions, boxes = draw_scenes(recipe.diffusion.pool, recipe.image_size, seed)
    means, stds = [], []
    for chunk in tqdm(pictures.split(250), desc="encoding", file=sys.stderr):
        mean, logvar = vae.encode(to_model(chunk, device))
        means.append(mean.half().cpu())
        stds.append(torch.exp(0.5 * logvar).half().cpu())
    mean, std = torch.cat(means), torch.cat(stds)
    factor = 1 / (mean.float().var() + std.float().square().mean()).sqrt().item()
    ids, state = tokenizer(captions), vae.state_dict()
    return {
        "mean": mean,
        "std": std,
        "ids": ids,
        "boxes": boxes,
        "scaling_factor": factor,
        "vae": state,
    }


# ---- the loop
# ------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak):
    """Linear warm-up over WARMUP steps, constant, linear to zero over the last COOLDOWN of all
    steps."""
    return peak * min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


def save_atomically(state, path):
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def fit(model, loss, stage, path, seed, device):
    """Minimise loss(generator) over the parameters of `model`, and keep their exponential moving
    average.

    `loss` draws what is random from the generator, which is seeded by (seed, step), so that a
    resumed run sees what an unbroken one would have seen. Every SAVE_EVERY steps and at the end,
    `path` gets the state dicts "model", "average" and "optimizer" and the number of steps done.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), stage.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average, first = copy.deepcopy(model).requires_grad_(False), 0
    if path.exists():
        state = torch.load(path, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(
        range(first, stage.steps),
        initial=first,
        total=stage.steps,
        desc=path.stem,
        file=sys.stderr,
        mininterval=5,
    )
    smooth = None
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage.lr)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        optimizer.step()
        decay = min(stage.ema, (1 + step) / (10 + step))  # the average forgets the start quickly
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            parts = {"model": model, "average": average, "optimizer": optimizer}
            save_atomically(
                {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, path
            )


def fit_autoencoder(recipe, run, seed, device):
    torch.manual_seed(seed)
    vae = AutoencoderKL(recipe.vae).to(device, memory_format=torch.channels_last)
    pictures, _, _ = draw_scenes(recipe.autoencoder.pool, recipe.image_size, seed)
    size = recipe.image_size // vae.factor

    def loss(generator):
        chosen = torch.randint(len(pictures), (recipe.autoencoder.batch,), generator=generator)
        noise = torch.randn(
            len(chosen), recipe.vae.latent_channels, size, size, generator=generator
        ).to(device)
        return autoencoder_loss(vae, to_model(pictures[chosen], device), noise, recipe.kl_weight)

    fit(vae, loss, recipe.autoencoder, run / "autoencoder.pt", seed, device)


def fit_text(recipe, run, seed, device):
    tokenizer = make_tokenizer()
    model = build_diffusion(recipe, tokenizer, seed)
    model = nn.ModuleDict({name: model[name] for name in ("text_encoder", "summary_head")}).to(
        device
    )
    rng = random.Random(seed + 2)
    ids = tokenizer(
        [""]
        + [scenes.caption(scenes.sample(rng, "train")) for _ in range(recipe.text_encoder.pool)]
    )

    def loss(generator):
        chosen = ids[torch.randint(len(ids), (recipe.text_encoder.batch,), generator=generator)].to(
            device
        )
        return summary_loss(
            model["text_encoder"](chosen), chosen, tokenizer.eos_id, model["summary_head"]
        )

    fit(model, loss, recipe.text_encoder, run / "text.pt", seed, device)


def fit_diffusion(recipe, run, seed, device):
    tokenizer = make_tokenizer()
    pool_file = run / "pool.pt"
    if not pool_file.exists():  # what the autoencoder learns after this is not used
        vae = AutoencoderKL(recipe.vae).to(device, memory_format=torch.channels_last)
        vae.load_state_dict(torch.load(run / "autoencoder.pt", map_location=device)["average"])
        save_atomically(encode_pool(vae, recipe, tokenizer, seed + 1, device), pool_file)
    pool = torch.load(pool_file, map_location="cpu")
    schedule = NoiseSchedule.from_dict(SCHEDULE)
    model = build_diffusion(recipe, tokenizer, seed)
    model.load_state_dict(
        torch.load(run / "text.pt", map_location="cpu")["average"], strict=False
    )  # the rest is fresh
    model.to(device, memory_format=torch.channels_last)
    empty = tokenizer([""])
    seen = {}  # what the last forward left for layout_loss
    model["unet"].mid_block.register_forward_hook(lambda module, args, out: seen.update(mid=out))

    def loss(generator):
        batch = recipe.diffusion.batch
        chosen = torch.randint(len(pool["ids"]), (batch,), generator=generator)
        mean, std = pool["mean"][chosen].float(), pool["std"][chosen].float()
        z = pool["scaling_factor"] * (mean + std * torch.randn(mean.shape, generator=generator))
        noise = torch.randn(z.shape, generator=generator)
        t = draw_times(batch, len(schedule), recipe.noisy_share, generator)
        drop = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(drop, empty, pool["ids"][chosen]).to(device)
        context = model["text_encoder"](ids)
        silent = (torch.rand(batch, generator=generator) < recipe.silent_share).to(device)
        context_seen = silence(
            context, model["text_encoder"](empty.to(device)), ids, tokenizer.eos_id, silent
        )
        noise = noise * draw_amplitudes(batch, recipe.faint_share, generator)
        z, noise, t = z.to(device), noise.to(device), t.to(device)
        value = diffusion_loss(
            model["unet"], schedule, z, noise, t, context_seen, recipe.max_weight
        )
        if recipe.layout_weight:
            boxes = pool["boxes"][chosen].to(device)
            value = value + recipe.layout_weight * layout_loss(
                seen["mid"], model["layout_head"], boxes
            )
        if recipe.summary_weight:
            value = value + recipe.summary_weight * summary_loss(
                context, ids, tokenizer.eos_id, model["summary_head"]
            )
        return value

    fit(model, loss, recipe.diffusion, run / "diffusion.pt", seed, device)


def build_diffusion(recipe, tokenizer, seed):
    """UNet, text encoder and the heads of the helper losses at their starting point.

    torch's default layers, small embeddings as in CLIP, and zeros where a block or the network
    ends, so that each starts as the identity or as zero (as the published code does).
    """
    torch.manual_seed(seed)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer.vocab), **recipe.text))
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
    unet = UNet(recipe.unet)
    unet.attention = "reference"  # on a CPU the backward of eager attention is a quarter faster than that of SDPA
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    layout_head = nn.Conv2d(recipe.unet.block_out_channels[-1], 2, 1)
    summary_head = nn.Linear(recipe.unet.cross_attention_dim, len(tokenizer.vocab))
    parts = {
        "unet": unet,
        "text_encoder": text,
        "layout_head": layout_head,
        "summary_head": summary_head,
    }
    return nn.ModuleDict(parts)


# ---- export
# --------------------------------------------------------------------------------------------------------


def export(recipe, run, folder):
    """Write what the run has learned so far (the averages) as a checkpoint folder in diffusers
    layout, float16."""
    tokenizer = make_tokenizer()
    pool = torch.load(run / "pool.pt", map_location="cpu", mmap=True)
    averages = torch.load(run / "diffusion.pt", map_location="cpu", mmap=True)["average"]
    configs = {
        "vae": replace(recipe.vae, scaling_factor=pool["scaling_factor"]),
        "unet": recipe.unet,
        "text_encoder": CLIPTextConfig(vocab_size=len(tokenizer.vocab), **recipe.text),
    }
    for part, config in configs.items():
        prefix, state = ("", pool["vae"]) if part == "vae" else (f"{part}.", averages)
        halves = {
            k.removeprefix(prefix): x.half().contiguous()
            for k, x in state.items()
            if k.startswith(prefix)
        }
        write_json(folder / part / "config.json", config_json(part, config, tokenizer))
        save_file(halves, folder / weights_file(part, None), metadata={"format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULE)
    write_json(folder / "model_index.json", model_index(SCHEDULE))
    tokenizer.save(folder / "tokenizer")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m minisd.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("autoencoder", "text", "diffusion", "export"))
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the run: checkpoints, encoded pool"
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="small",
        help="small: 64x64, for a CPU; large: 128x128, for a GPU",
    )
    parser.add_argument(
        "--steps", type=int, help="train to this many steps instead of the recipe's"
    )
    parser.add_argument(
        "--max-weight",
        type=float,
        help="diffusion: cap of the loss's weight instead of the recipe's",
    )
    parser.add_argument(
        "--noisy-share",
        type=float,
        help="diffusion: share of the samples that are drawn very noisy",
    )
    parser.add_argument("--layout-weight", type=float, help="diffusion: weight of the layout loss")
    parser.add_argument(
        "--summary-weight", type=float, help="diffusion: weight of the summary loss"
    )
    parser.add_argument(
        "--silent-share",
        type=float,
        help="diffusion: share of the samples whose words alone must tell",
    )
    parser.add_argument(
        "--faint-share", type=float, help="diffusion: share of the samples whose noise is fainter"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--to", type=Path, help="export: the folder to write")
    args = parser.parse_args(arguments)
    recipe, device = RECIPES[args.recipe], torch.device(args.device)
    if (args.stage == "export") != (args.to is not None):
        parser.error("--to goes with export, and export needs it")
    needed = {
        "diffusion": ("autoencoder.pt", "text.pt"),
        "export": ("pool.pt", "diffusion.pt"),
    }.get(args.stage, ())
    for name in needed:
        if not (args.run / name).exists():
            parser.error(
                f"{args.run / name} is not there: the stages run in order, autoencoder, text, diffusion, export"
            )
    args.run.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        return export(recipe, args.run, args.to)
    names = (
        "max_weight",
        "noisy_share",
        "layout_weight",
        "summary_weight",
        "silent_share",
        "faint_share",
    )
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.steps is not None:
        name = {"text": "text_encoder"}.get(args.stage, args.stage)
        changes[name] = replace(getattr(recipe, name), steps=args.steps)
    fits = {"autoencoder": fit_autoencoder, "text": fit_text, "diffusion": fit_diffusion}
    fits[args.stage](replace(recipe, **changes), args.run, args.seed, device)


if __name__ == "__main__":
    main()
