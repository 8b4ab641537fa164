"""The stage that trains a DiT on the latents and the texts of the bundled model.

    L = w_t |eps - eps_theta(alpha_t z + sigma_t eps, t, text)|^2 + layout_weight L_layout

Autoencoder, vocabulary and text encoder are those of `shapes` and are not trained: what is learned
is the transformer alone, so that the two networks can be compared on one world.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from ..checkpoints.export import write_json
from ..checkpoints.load import Parts, load_parts, locate
from ..checkpoints.sources import bundled, weights_file
from ..files import atomic_folder, atomic_write
from ..models.dit import DiT
from .data import Pool, encode_pool
from .loop import train
from .objective import diffusion_loss, layout_loss, silence
from .recipes import TransformerRecipe
from .stages import draw_samples

SEED = 2  # beside the run's: of the pool's scenes


def train_transformer(
    recipe: TransformerRecipe, run: Path, seed: int, device: torch.device
) -> None:
    """Minimise `diffusion_loss`, and the layout loss beside it, over a DiT; -> transformer.pt."""
    parts = load_parts(locate("shapes"), device, torch.float32)
    pool = load_pool(parts, recipe, run, seed, device)
    torch.manual_seed(seed)
    dit = DiT(recipe.dit)
    dit.attention = "reference"  # on a CPU its backward is quicker than SDPA's
    model = nn.ModuleDict({"dit": dit, "layout_head": nn.Conv2d(recipe.dit.width, 2, 1)})
    grid = dit.patches()
    seen: dict[str, Tensor] = {}  # what the last forward left for layout_loss
    middle = dit.transformer_blocks[recipe.dit.num_layers // 2 - 1]
    middle.register_forward_hook(lambda module, args, out: seen.update(middle=out))
    empty = parts.tokenizer([""])
    of_empty = parts.text_encoder(empty.to(device))

    def loss(generator: Generator) -> Tensor:
        batch, times = recipe.diffusion.batch, len(parts.schedule)
        s = draw_samples(pool, batch, times, empty, recipe, generator).to(device)
        with torch.no_grad():
            context = parts.text_encoder(s.ids)
        heard = silence(context, of_empty, s.ids, parts.tokenizer.eos_id, s.silent)
        weight, schedule = recipe.max_weight, parts.schedule
        value = diffusion_loss(dit, schedule, s.z, s.noise, s.t, heard, weight)
        features = seen["middle"].transpose(1, 2).unflatten(2, grid)
        layout = layout_loss(features, model["layout_head"], s.boxes)
        return value + recipe.layout_weight * layout

    train(model, loss, recipe.diffusion, run / "transformer.pt", seed, device)


def load_pool(
    parts: Parts, recipe: TransformerRecipe, run: Path, seed: int, device: torch.device
) -> Pool:
    """The run's latents.pt, made first if it is not there, scaled as the bundled model's are."""
    path = run / "latents.pt"
    if not path.exists():
        count, size = recipe.diffusion.pool, parts.vae.config.sample_size
        assert isinstance(size, int)  # of `shapes`
        pool = encode_pool(parts.vae, count, size, parts.tokenizer, seed + SEED, device)
        pool["scaling_factor"] = parts.vae.config.scaling_factor
        with atomic_write(path) as temporary:
            torch.save(pool, temporary)
    return torch.load(path, map_location="cpu")


def export_transformer(recipe: TransformerRecipe, run: Path, folder: Path) -> None:
    """Write the DiT that the run has now, its average in float16, as a folder that `minisd.load`
    takes: transformer/ and the bundled model's other parts. All of it or nothing."""
    average = torch.load(run / "transformer.pt", map_location="cpu", mmap=True)["average"]
    halves = {
        name.removeprefix("dit."): tensor.half().contiguous()
        for name, tensor in average.items()
        if name.startswith("dit.")
    }
    index = {"_class_name": "minisd", "transformer": ["minisd", "DiT"]}
    with atomic_folder(folder, last="model_index.json") as temporary:
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            shutil.copytree(bundled()["shapes"] / part, temporary / part)
        own = temporary / "transformer"
        write_json(own / "config.json", asdict(recipe.dit) | {"_class_name": "DiT"})
        weights = own / Path(weights_file("unet", None)).name
        save_file(halves, weights, metadata={"format": "pt"})
        write_json(temporary / "model_index.json", index)
