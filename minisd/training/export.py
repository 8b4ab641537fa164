"""What a run has learned, as a checkpoint that minisd and diffusers load."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoints.export import config_json, model_index, write_json
from ..checkpoints.load import SD_V1_SCHEDULE
from ..checkpoints.names import Config
from ..checkpoints.sources import Part, weights_file
from ..files import atomic_folder
from ..models.tokenizer import CLIPTokenizer
from .data import make_tokenizer
from .recipes import Recipe

SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, **SD_V1_SCHEDULE}


def export(recipe: Recipe, run: Path, folder: Path, tokenizer: CLIPTokenizer | None = None) -> None:
    """Write the averages that the run has now as a folder in diffusers layout, float16, all of it
    or nothing; FileExistsError unless the folder is new or empty.

    tokenizer: of the captions; None is that of the scenes.
    """
    tokenizer = tokenizer or make_tokenizer()
    pool = torch.load(run / "pool.pt", map_location="cpu", mmap=True)
    averages = torch.load(run / "diffusion.pt", map_location="cpu", mmap=True)["average"]
    configs: dict[Part, Config] = {
        "vae": replace(recipe.vae, scaling_factor=pool["scaling_factor"]),
        "unet": recipe.unet,
        "text_encoder": replace(recipe.text, vocab_size=len(tokenizer.vocab)),
    }
    with atomic_folder(folder, last="model_index.json") as temporary:
        for part, config in configs.items():
            prefix, state = ("", pool["vae"]) if part == "vae" else (f"{part}.", averages)
            halves = {
                name.removeprefix(prefix): tensor.half().contiguous()
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            write_json(temporary / part / "config.json", config_json(part, config, tokenizer))
            save_file(halves, temporary / weights_file(part, None), metadata={"format": "pt"})
        write_json(temporary / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(temporary / "model_index.json", model_index(SCHEDULER))
        tokenizer.save(temporary / "tokenizer")
