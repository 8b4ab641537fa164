"""A DiT in diffusers' folder layout, as facebook/DiT-XL-2-256 has it on the Hub: transformer/,
vae/ and scheduler/.

diffusers keeps a copy of the time's and the label's embedders in every block. minisd's DiT has one,
so all copies have to be the same, which is checked. The weights that facebookresearch/DiT published
itself are pickles (.pt), which are not read; both are under CC-BY-NC 4.0, for no commercial use.
"""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from ..models.dit import DiT
from ..models.dit_config import DiTConfig
from ..models.vae import AutoencoderKL, VAEConfig
from ..sampling.schedule import NoiseSchedule
from .configs import dit_config, named, read_config, read_json
from .folders import PICKLES, WHY_NO_PICKLES, expect_names, find_weights, why_a_part
from .header import Entry, read_header
from .load import build, fill
from .names import rename_diffusers
from .sources import (
    INDEX,
    CheckpointError,
    Source,
    _fetch,
    bundled,
    copy_present,
    expect_pipeline,
    fetch_weights,
    hub_repo,
)
from .tensor_file import FLOATS, read_tensors

PUBLISHED = "facebook/DiT-XL-2-256"
LICENCE = f"{PUBLISHED} has the weights as safetensors, under CC-BY-NC 4.0: no commercial use"
WEIGHTS = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")}
CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
EMBEDDER = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")  # a copy in a block


class DiTCheckpoint(NamedTuple):
    """A located DiT, nothing of its weights read.

    files: of transformer and vae. names: of labels, of one several between commas.
    """

    config: DiTConfig
    vae_config: VAEConfig
    schedule: NoiseSchedule
    files: dict[str, Path]
    names: dict[int, str]


def locate_dit(
    source: Source,
    *,
    compat: str = "published",
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> DiTCheckpoint:
    """Find the files of a source and read the configs. See `minisd.load_dit`."""
    expect_names(source, variant, revision)
    if Path(source).suffix.lower() in PICKLES:
        got = f"minisd does not read the pickle {source}: {WHY_NO_PICKLES}"
        raise CheckpointError(f"{got}. {LICENCE}")
    folder = Path(source)
    if (repo := hub_repo(source)) is not None:
        try:
            folder = download_dit(repo, variant, revision, local_files_only)
        except CheckpointError as error:
            if repo != PUBLISHED:
                raise
            other = "shapes-dit is the DiT that comes with minisd"
            raise CheckpointError(f"{error}. {other}") from error
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for Hub repos, and {source!r} is not one")
    elif isinstance(source, str):
        folder = bundled().get(source, folder)
    if (part := why_a_part(folder)) is not None:
        raise CheckpointError(part)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(source)!r:.200} with a DiT. {LICENCE}")
    expect_pipeline(folder, folder)
    for path in CONFIGS:
        if not (folder / path).is_file():
            is_other = (folder / "unet").is_dir() and not (folder / "transformer").is_dir()
            hint = "with its unet/, minisd.load and the other commands take it"
            if not is_other:
                hint = "a DiT has transformer/, vae/ and scheduler/, with .safetensors files"
            raise CheckpointError(f"{folder / path} is missing: {hint}")
    files = find_weights(folder, WEIGHTS, variant)
    config = dit_config(folder / CONFIGS[0], compat)
    if config.num_embeds_ada_norm is None:
        why = "its DiT takes a text: minisd.load, and --model of the other commands, take it"
        raise CheckpointError(f"{folder} is for no labels, {why}")
    vae_config = cast(VAEConfig, read_config("vae", folder / CONFIGS[1]))
    if vae_config.latent_channels != config.in_channels:
        got = f"its VAE has latents of {vae_config.latent_channels} channels"
        raise CheckpointError(f"{folder}: {got}, its transformer takes {config.in_channels}")
    scheduler = folder / CONFIGS[2]
    schedule = named(scheduler, lambda path: NoiseSchedule.from_dict(read_json(path)))
    names = named(folder / INDEX, partial(read_names, most=config.num_embeds_ada_norm))
    return DiTCheckpoint(config, vae_config, schedule, files, names)


def read_names(path: Path, most: int) -> dict[int, str]:
    """id2label of a model_index.json, label from 0 to `most` -> its names; without one, nothing."""
    found = (read_json(path).get("id2label") or {}) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"id2label is {found!r:.80}, expected a name for each label")
    for label, name in found.items():
        is_label = label.isascii() and label.isdecimal() and int(label) <= most
        if not (is_label and isinstance(name, str)):
            got = f"id2label has {name!r:.80} of {label!r:.80}"
            raise ValueError(f"{got}, expected a name of a label from 0 to {most}")
    return {int(label): name for label, name in found.items()}


def download_dit(
    repo: str,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    to: Path | None = None,
    repair: bool = False,
) -> Path:
    """Fetch the files of a Hub repo that a DiT needs, and no other -> their folder.

    The small ones first, all of one commit; to, repair: as in `sources.download`.
    """
    folder = _fetch(repo, CONFIGS, revision, local_files_only, [INDEX], repair=repair)
    if to is not None:
        copy_present([*CONFIGS, INDEX], folder, to)
    return fetch_weights(repo, WEIGHTS.values(), variant, folder, local_files_only, to, repair)


def load_dit_parts(
    checkpoint: DiTCheckpoint, device: torch.device, dtype: torch.dtype, copy: bool = False
) -> tuple[DiT, AutoencoderKL, NoiseSchedule]:
    """The modules with the files' tensors, in evaluation mode and without gradients.

    CheckpointError that lists every tensor which is missing, unexpected, misshapen or unreadable,
    and every copy of an embedder that differs from the first block's.
    """

    def make(part: str) -> nn.Module:
        is_vae = part == "vae"
        return AutoencoderKL(checkpoint.vae_config) if is_vae else DiT(checkpoint.config)

    modules, entries = build(checkpoint.files, make, partial(match, checkpoint))
    fill(modules, checkpoint.files, entries, device, dtype, copy)
    dit, vae = cast(DiT, modules["transformer"]), cast(AutoencoderKL, modules["vae"])
    return dit, vae, checkpoint.schedule


def match(
    checkpoint: DiTCheckpoint, part: str, expected: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Entry], list[str]]:
    """(module name -> Entry of the part's file, a line for each tensor that does not fit)."""
    path, entries, faults = checkpoint.files[part], {}, []
    copies: dict[str, dict[int, tuple[str, Entry]]] = {}
    for name, entry in read_header(path).items():
        new = rename_diffusers("vae", name) if part == "vae" else name
        if part == "transformer" and (found := EMBEDDER.fullmatch(name)):
            copies.setdefault(found[2], {})[int(found[1])] = name, entry
            if found[1] != "0":
                continue
            new = found[2]
        shape = expected.get(str(new))
        as_convolution = part == "vae" and entry.shape == (*(shape or ()), 1, 1)
        if new is None or shape is None:
            faults.append(f"unexpected {name}, shape {entry.shape}")
        elif entry.shape != shape and not as_convolution:
            faults.append(f"misshapen {name}, got {entry.shape}, expected {shape}")
        elif entry.dtype not in FLOATS:
            faults.append(f"unreadable {name}, got dtype {entry.dtype}")
        entries[str(new)] = entry
    missing = [name for name in expected if name not in entries]
    faults += [f"missing {name}, expected shape {expected[name]}" for name in missing]
    if not faults:
        faults = differing(path, copies, checkpoint.config.num_layers)
    return entries, faults


def differing(
    path: Path, copies: dict[str, dict[int, tuple[str, Entry]]], layers: int
) -> list[str]:
    """A line for each copy of an embedder that is missing or is not the first block's."""
    faults = []
    for inner, by_block in copies.items():
        absent = [i for i in range(layers) if i not in by_block]
        faults += [f"missing transformer_blocks.{i}.norm1.emb.{inner}" for i in absent]
        tensors = dict(read_tensors(path, dict(by_block.values())))
        first = tensors[by_block[0][0]]
        for name, tensor in tensors.items():
            if not torch.equal(tensor, first):
                why = "minisd has one embedder for all blocks"
                faults.append(f"{name} differs from {by_block[0][0]}: {why}")
    return faults
