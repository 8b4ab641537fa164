"""Writing a checkpoint: diffusers' folder layout, or one file in the original CompVis layout.

Tensors go from file to file one at a time, so a model is exported in the memory of its largest
tensor. What is written carries the newest names of diffusers and the Hub's `text_model.` prefix,
which diffusers and minisd read back.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import atomic_folder, write_new
from ..models.clip import CLIPTextConfig
from ..models.dit_config import DiTConfig
from ..models.tokenizer import CLIPTokenizer
from ..models.unet import UNetConfig
from ..models.vae import VAEConfig
from ..sampling.schedule import NoiseSchedule
from .header import Entry
from .load import MODELS, SD_V1_SCHEDULE, Checkpoint, build_models
from .names import Config, to_ldm
from .sources import CheckpointError, Part, weights_file
from .tensor_file import FLOATS, read_tensors, write_tensors

# "float16" -> "F16"
DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def export(
    checkpoint: Checkpoint, folder: str | os.PathLike[str], dtype: str | None = None
) -> None:
    """Write a checkpoint as a folder in diffusers layout, all of it or nothing.

    dtype: float16, bfloat16, float32 or float64; None keeps each file's own. FileExistsError unless
    the folder is new or empty.
    """
    if isinstance(checkpoint.configs["unet"], DiTConfig):
        raise CheckpointError("a DiT is not exported: its folder can be copied as it is")
    modules, entries = build_models(checkpoint)
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False} | checkpoint.scheduler
    with atomic_folder(folder, last="model_index.json") as temporary:
        for part, module in modules.items():
            path = temporary / weights_file(part, None)
            config = config_json(part, checkpoint.configs[part], checkpoint.tokenizer)
            write_json(path.parent / "config.json", config)
            shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            tensors = _in_order(checkpoint, part, entries[part], shapes)
            prefix = "text_model." if part == "text_encoder" else ""
            written = {prefix + name: shape for name, shape in shapes.items()}
            write_tensors(path, written, _dtype(dtype, entries[part]), tensors)
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        write_json(temporary / "model_index.json", model_index(scheduler))
        checkpoint.tokenizer.save(temporary / "tokenizer")


def export_single_file(
    checkpoint: Checkpoint, path: str | os.PathLike[str], dtype: str | None = None
) -> None:
    """Write a checkpoint as one .safetensors file in CompVis' layout, all of it or nothing.

    Such a file says nothing of its configs, its schedule and its vocabulary: CheckpointError unless
    they are Stable Diffusion v1's, which readers take for granted. FileExistsError if the file is
    there.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    target = Path(os.path.realpath(path))
    if target.exists():
        raise FileExistsError(f"{path} is there already")
    _expect_v1(checkpoint)
    modules, entries = build_models(checkpoint)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            as_convolution = part == "vae" and ".attentions." in name and tensor.ndim == 2
            axes = (1, 1) if as_convolution else ()
            shapes[to_ldm(part, name, checkpoint.configs[part])] = (*tensor.shape, *axes)
    tensors = (
        tensor
        for part, module in modules.items()
        for tensor in _in_order(checkpoint, part, entries[part], module.state_dict())
    )
    of_all = {f"{part}.{name}": entries[part][name] for part in entries for name in entries[part]}
    kind = _dtype(dtype, of_all)
    write_new([target], lambda temporary: write_tensors(temporary, shapes, kind, tensors))


def _expect_v1(checkpoint: Checkpoint) -> None:
    """CheckpointError unless the configs, sizes aside, and the schedule are v1's."""
    for part, (_, config) in MODELS.items():
        own, v1 = checkpoint.configs[part], config()
        if not isinstance(own, CLIPTextConfig) and not isinstance(v1, CLIPTextConfig):
            sizeless: Config = replace(own, sample_size=v1.sample_size)
        else:
            sizeless = own
        if sizeless != v1:
            raise CheckpointError(
                f"a single file holds Stable Diffusion v1's {part}; got {own}, expected {v1}"
            )
    schedule, v1_schedule = checkpoint.schedule, NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    if len(schedule) != len(v1_schedule) or not v1_schedule.alphas_cumprod.allclose(
        schedule.alphas_cumprod
    ):
        raise CheckpointError(
            "a single file has Stable Diffusion v1's schedule, and this model another"
        )


def config_json(part: Part, config: Config, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """A part's config.json, as diffusers and transformers read it."""
    values = asdict(config)
    if isinstance(config, UNetConfig):
        return values | {"_class_name": "UNet2DConditionModel"}
    if isinstance(config, VAEConfig):
        stages = len(config.block_out_channels)
        blocks = {
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
        }
        return values | blocks | {"_class_name": "AutoencoderKL"}
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return values | ids | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}


def model_index(scheduler: dict[str, Any]) -> dict[str, Any]:
    """model_index.json: the classes with which diffusers reads the parts."""
    return PIPELINE | {"scheduler": ["diffusers", scheduler["_class_name"]]}


def _in_order(
    checkpoint: Checkpoint, part: Part, entries: Mapping[str, Entry], names: Iterable[str]
) -> Iterator[Tensor]:
    """The part's tensors in the order of `names`, which need not be that of their bytes."""
    for name in names:
        [(_, tensor)] = read_tensors(checkpoint.files[part], {name: entries[name]})
        yield tensor


def _dtype(dtype: str | None, entries: Mapping[str, Entry]) -> str:
    """The format's name of the dtype to write: that asked for, or else the widest in the file."""
    if dtype is None:
        kinds = {entry.dtype for entry in entries.values()}
        return max(kinds, key=lambda name: FLOATS[name].itemsize)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
