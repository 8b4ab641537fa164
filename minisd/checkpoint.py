"""Where weights come from, and their strict loading.

    source -> files and configs -> safetensors headers -> renamed -> compared with the modules' names and shapes
           -> tensors read one by one into memory of their own -> assigned

A source is "shapes" (bundled with minisd), a Hub repo id, a folder in diffusers layout (unet/, vae/, text_encoder/,
scheduler/, tokenizer/), or one .safetensors file in the original CompVis layout, which holds all three models.

File format: https://huggingface.co/docs/safetensors. The names are in names.py.
"""

import json
import math
import operator
import os
import re
import struct
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .clip import CLIPTextConfig, CLIPTextModel
from .names import LDM_PREFIX, rename_diffusers, rename_ldm
from .schedule import NoiseSchedule
from .tokenizer import CLIPTokenizer
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL, VAEConfig

MODELS = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# What a single file of the original layout does not say; the configs' defaults are Stable Diffusion v1's, too.
SD_V1_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
SD_V1_VOCABULARY = "openai/clip-vit-large-patch14"  # a Hub repo with the same vocabulary
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that is not there, cannot be read, or does not fit the models."""


class Entry(NamedTuple):
    """One tensor of a safetensors file: its format's dtype name, its shape, and where its bytes start and stop."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint(NamedTuple):
    """A located checkpoint, nothing of the weights read: for each of unet, vae, text_encoder its config and file, and
    `rename`, (part, name in the file) -> name in the module, or None for a tensor that the part does not use."""

    configs: dict[str, UNetConfig | VAEConfig | CLIPTextConfig]
    schedule: NoiseSchedule
    tokenizer: CLIPTokenizer
    files: dict[str, Path]
    rename: Callable[[str, str], str | None]


class Parts(NamedTuple):
    """The five parts of a Stable Diffusion model."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet
    vae: AutoencoderKL
    schedule: NoiseSchedule


def bundled() -> dict[str, Path]:
    """The models that come with minisd, name -> folder."""
    root = Path(str(files("minisd_weights")))
    return {path.parent.parent.name: path.parent.parent for path in sorted(root.glob("*/unet/config.json"))}


def locate(source, *, variant=None, revision=None, local_files_only=False) -> Checkpoint:
    """Find the files of a source and read its configs and vocabulary. See `minisd.load` for the arguments."""
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ValueError(f"the model is {source!r}, expected a bundled name, a Hub repo id, a folder or a file")
    path = Path(source)
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not path.exists()
    if is_hub_id and path.suffix != ".safetensors":
        return from_folder(download(source, variant, revision, local_files_only), variant)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for Hub repos, and {str(source)!r} is not one")
    if source in (models := bundled()):
        return from_folder(models[source], variant)
    if path.is_dir():
        return from_folder(path, variant)
    if path.is_file() and path.suffix == ".safetensors":
        if variant is not None:
            raise ValueError(f"variant={variant!r} is for folders and Hub repos, and {path} is one file")
        return from_single_file(path, local_files_only)
    if path.is_file():
        raise CheckpointError(f"{path} is not a .safetensors file; minisd does not read pickles (.ckpt, .bin, .pt)")
    raise CheckpointError(
        f"there is no model {str(source)!r}: it is neither bundled ({', '.join(models) or 'no model is'}), nor a "
        "folder, nor a .safetensors file, nor a Hub repo id (owner/name)"
    )


def weights_file(part: str, variant: str | None) -> str:
    return f"{part}/{WEIGHTS[part]}{'' if variant is None else f'.{variant}'}.safetensors"


def from_folder(folder: Path, variant: str | None = None) -> Checkpoint:
    """A checkpoint in diffusers' folder layout; variant "fp16" takes the files called *.fp16.safetensors."""
    paths = {part: folder / weights_file(part, variant) for part in MODELS}
    for path in paths.values():
        if not path.is_file():
            beside = sorted(p.name for p in path.parent.glob("*") if p.name != "config.json")
            raise CheckpointError(
                f"{path} is missing; beside it: {', '.join(beside) or 'nothing'}. minisd reads .safetensors files "
                "only, not .bin pickles; variant='fp16' takes the files *.fp16.safetensors"
            )
    configs = {part: _config(config.from_dict, folder / part / "config.json") for part, (_, config) in MODELS.items()}
    schedule = _config(NoiseSchedule.from_dict, folder / "scheduler" / "scheduler_config.json")
    return Checkpoint(configs, schedule, _tokenizer(folder / "tokenizer"), paths, rename_diffusers)


def from_single_file(path: Path, local_files_only: bool = False) -> Checkpoint:
    """One file in the original CompVis layout.

    It carries neither configs nor a vocabulary: the configs are Stable Diffusion v1's, the vocabulary comes from a
    folder tokenizer/ beside the file or else from the Hub repo openai/clip-vit-large-patch14, where it is the same.
    Of a file that also holds averaged weights (model_ema.*) the others are taken, as diffusers does.
    """
    names = read_header(path)
    if missing := [p for p in LDM_PREFIX.values() if not any(name.startswith(p) for name in names)]:
        raise CheckpointError(
            f"{path} is not in the original layout, it has no {'* and no '.join(missing)}*; "
            "if it belongs to a folder in diffusers layout, give the folder"
        )
    configs = {part: config() for part, (_, config) in MODELS.items()}
    folder = path.parent / "tokenizer"
    if not folder.is_dir():
        try:
            folder = _fetch(SD_V1_VOCABULARY, VOCABULARY_FILES[:2], None, local_files_only)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} has no vocabulary: put a folder tokenizer/ with vocab.json and merges.txt beside it ({error})"
            ) from error
    schedule = NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    tokenizer = _tokenizer(folder)

    def rename(part, name):
        return rename_ldm(part, name, configs[part])

    return Checkpoint(configs, schedule, tokenizer, dict.fromkeys(MODELS, path), rename)


def download(repo: str, variant=None, revision=None, local_files_only=False) -> Path:
    """Fetch the files that minisd needs, and no other, of a Hub repo in diffusers layout -> their folder in the cache.

    Small files first, the weights last; all of one commit.
    """
    configs = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in MODELS)]
    vocabulary = [f"tokenizer/{name}" for name in VOCABULARY_FILES]
    folder = _fetch(repo, configs, revision, local_files_only, optional=vocabulary)
    if not (folder / vocabulary[0]).exists():  # saved by transformers 5
        _fetch(repo, ["tokenizer/tokenizer.json"], folder.name, local_files_only)
    return _fetch(repo, [weights_file(part, variant) for part in MODELS], folder.name, local_files_only)


def _fetch(repo, needed, revision, local_files_only, optional=()) -> Path:
    """The folder of one snapshot of `repo` that holds the `needed` files, and the `optional` ones that the repo has."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = None
    for name in [*needed, *optional]:
        try:
            path = Path(hf_hub_download(repo, name, revision=revision, local_files_only=local_files_only))
        except EntryNotFoundError as error:
            unknown = isinstance(error, LocalEntryNotFoundError)  # not in the cache, and the Hub was not asked
            known = not unknown or try_to_load_from_cache(repo, name, revision=revision) is _CACHED_NO_EXIST
            if name in optional and (known or local_files_only):
                continue
            if unknown:
                why = "is not in the local Hub cache" + ("" if local_files_only else ", and the Hub was not reached")
            else:
                why = f"does not exist at revision {revision or 'main'} (minisd reads .safetensors, not .bin pickles)"
            raise CheckpointError(f"Hub repo {repo}: {name} {why}") from error
        except (OSError, ValueError) as error:  # no such repo, folder or revision, gated, no disk space
            raise CheckpointError(f"{repo} is no folder, and from the Hub repo {name} did not come: {error}") from error
        folder = path.parents[name.count("/")]
        revision = folder.name  # the snapshot's commit: the other files come from the same one
    return folder


def _config(from_dict, path: Path):
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_folder(folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_header(path: Path) -> dict[str, Entry]:
    """Names, shapes and places of the tensors of a safetensors file: 8 bytes length, JSON of that length, the data.

    CheckpointError unless the tensors fill the data one after the other to its last byte, as the format demands.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header would be {length} bytes long, the file is {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, value in header.items():
            start, stop = (8 + length + operator.index(offset) for offset in value["data_offsets"])
            entries[name] = Entry(str(value["dtype"]), tuple(value["shape"]), start, stop)
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            if entry.start != end or entry.stop < end:
                raise ValueError(f"{name} is at bytes {entry.start} to {entry.stop}, expected to begin at {end}")
            if entry.stop > size:
                raise ValueError(f"it ends at byte {size}, inside or before {name}: the file is cut off")
            end = entry.stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    return entries


def match(checkpoint: Checkpoint, part: str, expected: dict[str, tuple[int, ...]]):
    """Compare a part's file with the module's names and shapes -> (found, faults).

    found: module name -> Entry. faults: one line for each tensor that is missing, unexpected or misshapen.
    """
    found, faults = {}, []
    for name, entry in read_header(checkpoint.files[part]).items():
        new = checkpoint.rename(part, name)
        if new is None:
            continue
        called = name if new == name else f"{name} (here {new})"
        shape = expected.get(new)
        if shape is None:
            faults.append(f"unexpected {called}, shape {entry.shape}")
        elif new in found:
            faults.append(f"twice {called}")
        # CompVis wrote the VAE's attention as 1x1 convolutions; as linear layers they drop two axes of length 1.
        elif entry.shape not in (shape, (*shape, 1, 1) if part == "vae" and ".attentions." in new else shape):
            faults.append(f"misshapen {called}, got {entry.shape}, expected {shape}")
        elif entry.dtype not in FLOATS:
            faults.append(f"unreadable {called}, got dtype {entry.dtype}, expected one of {', '.join(FLOATS)}")
        elif entry.stop - entry.start != math.prod(shape) * FLOATS[entry.dtype].itemsize:
            faults.append(f"corrupt {called}, {entry.stop - entry.start} bytes for {entry.dtype} {entry.shape}")
        found[new] = entry
    faults += [f"missing {name}, expected shape {shape}" for name, shape in expected.items() if name not in found]
    return found, faults


def read_tensors(path: Path, entries: dict[str, Entry], device, dtype) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, one after the other, each in memory of its own.

    Not mapped: the data of the published fp32 files does not start at a multiple of 4 bytes, and mapped pages count as
    memory beside the copies that the change of dtype or device makes.
    """
    with open(path, "rb") as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            tensor = torch.empty(math.prod(entry.shape), dtype=FLOATS[entry.dtype])
            file.seek(entry.start)
            if file.readinto(tensor.view(torch.uint8).numpy()) != entry.stop - entry.start:
                raise CheckpointError(f"{path} ended inside {name} while it was read")
            yield name, tensor.view(entry.shape).to(device, dtype)


def load_parts(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Parts:
    """Build the modules without memory, then give them the file's tensors, in evaluation mode and without gradients."""
    modules: dict[str, nn.Module] = {}
    found, faults, total = {}, [], 0
    for part, (model, _) in MODELS.items():
        try:
            with torch.device("meta"):
                modules[part] = model(checkpoint.configs[part])
        except (ValueError, RuntimeError, ZeroDivisionError) as error:  # numbers that go together with no architecture
            raise CheckpointError(f"{part}: its config makes no model: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in modules[part].state_dict().items()}
        found[part], lines = match(checkpoint, part, expected)
        total += len(lines)
        faults += ["\n    ".join([f"\n  {part}, {checkpoint.files[part]}:", *lines])] if lines else []
    if faults:
        raise CheckpointError(f"{total} tensors do not fit the models:{''.join(faults)}")
    tokenizer, text = checkpoint.tokenizer, checkpoint.configs["text_encoder"]
    if tokenizer.max_length > text.max_position_embeddings or max(tokenizer.vocab.values()) >= text.vocab_size:
        raise CheckpointError(
            f"the tokenizer makes {tokenizer.max_length} ids up to {max(tokenizer.vocab.values())}, the text encoder "
            f"takes at most {text.max_position_embeddings} ids below {text.vocab_size}"
        )
    for part, module in modules.items():
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        tensors = read_tensors(checkpoint.files[part], found[part], device, dtype)
        module.load_state_dict({name: t.view(shapes[name]) for name, t in tensors}, strict=True, assign=True)
        module.eval().requires_grad_(False)
    return Parts(tokenizer, modules["text_encoder"], modules["unet"], modules["vae"], checkpoint.schedule)
