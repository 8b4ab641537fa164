"""Which files make a model, and their strict loading.

    source -> files and configs -> safetensors headers -> renamed
           -> compared with the modules' names and shapes -> tensors read one by one -> assigned

A source is "shapes" (bundled with minisd), a Hub repo id or a short name for one, a folder in
diffusers layout (unet/, vae/, text_encoder/, scheduler/, tokenizer/), or one .safetensors file in
the original CompVis layout, which holds all three models. sources.py finds the files,
tensor_file.py reads them, names.py says what their tensors are called here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..models.clip import CLIPTextConfig, CLIPTextModel
from ..models.dit import DiT
from ..models.dit_config import DiTConfig
from ..models.tokenizer import CLIPTokenizer
from ..models.unet import UNet, UNetConfig
from ..models.vae import AutoencoderKL, VAEConfig
from ..sampling.schedule import NoiseSchedule
from .configs import MODELS, dit_config, from_clip, named, read_config, read_json, read_tokenizer
from .folders import PICKLES, WHY_NO_PICKLES, P, expect_names, find_weights, why_a_part
from .header import Entry, read_header
from .kinds import INPAINTING, kind_of_channels, kind_of_tensors
from .names import LDM_PREFIX, Config, rename_diffusers, rename_ldm
from .sources import (
    CLIP,
    SHORT_NAMES,
    SIZES,
    CheckpointError,
    Part,
    Source,
    bundled,
    download,
    expect_pipeline,
    hub_repo,
    weights_file,
)
from .tensor_file import FLOATS, read_tensors

# What a single file of the original layout does not say; the configs' defaults are Stable Diffusion
# v1's, too.
SD_V1_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A located checkpoint, nothing of its weights read.

    configs, files: of each of unet, vae, text_encoder. scheduler: what scheduler_config.json says.
    rename: (part, name in the file) -> name in the module, or None for a tensor that the part does
    not use.
    """

    configs: dict[Part, Config]
    scheduler: dict[str, Any]
    schedule: NoiseSchedule
    own_tokenizer: Callable[[], CLIPTokenizer]
    files: dict[Part, Path]
    rename: Callable[[Part, str], str | None]

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Read when it is asked for: `minisd info` shows files without a vocabulary, too."""
        return self.own_tokenizer()


class Parts(NamedTuple):
    """The five parts of a Stable Diffusion model."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet
    vae: AutoencoderKL
    schedule: NoiseSchedule


def locate(
    source: Source,
    *,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    tokenizer: Source | None = None,
) -> Checkpoint:
    """Find the files of a source and read its configs. See `minisd.load` for the arguments."""
    expect_names(source, variant, revision)
    path = Path(source)
    if (repo := hub_repo(source)) is not None:
        try:
            folder = download(repo, variant, revision, local_files_only)
            return from_folder(folder, variant, tokenizer, local_files_only)
        except CheckpointError as error:
            if source not in SHORT_NAMES:
                raise
            raise CheckpointError(
                f"{source}: {error}. `minisd fetch {source}` downloads it ({SIZES[None]}, with "
                f"--variant fp16 {SIZES['fp16']}); --model shapes draws with the model that comes "
                "with minisd"
            ) from error
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} is for Hub repos, and {str(source)!r:.200} is not one"
        )
    if isinstance(source, str) and source in (models := bundled()):
        return from_folder(models[source], variant, tokenizer, local_files_only)
    if path.is_dir():
        return from_folder(path, variant, tokenizer, local_files_only)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        if variant is not None:
            raise ValueError(
                f"variant {variant!r} is for folders and Hub repos, and {path} is one file"
            )
        return from_single_file(path, tokenizer, local_files_only)
    raise CheckpointError(_why_no_model(source, path))


def _why_no_model(source: Source, path: Path) -> str:
    """What is wrong with a source that is neither bundled, on the Hub, a folder nor a file."""
    if path.suffix.lower() in PICKLES:
        return f"minisd does not read the pickle {path}: {WHY_NO_PICKLES}"
    if (part := why_a_part(path)) is not None:
        return part
    if path.is_file():
        return f"{path} is not a .safetensors file"
    if path.exists():
        return f"{path} is a pipe or a device, expected a folder or a file"
    models = bundled()
    if not isinstance(source, str) and (str(source) in models or hub_repo(str(source))):
        kind = "bundled model" if str(source) in models else "Hub repo"
        return (
            f"{source!r} is a path, and nothing is there; the {kind} is the string {str(source)!r}"
        )
    return (
        f"there is no model {str(source)!r:.200}: it is neither bundled "
        f"({', '.join(models) or 'no model is'}), nor a folder, nor a .safetensors file, nor a Hub "
        f"repo id (owner/name, or {', '.join(SHORT_NAMES)})"
    )


def from_folder(
    folder: Path,
    variant: str | None = None,
    tokenizer: Source | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """A checkpoint in diffusers' folder layout; variant "fp16" takes *.fp16.safetensors, part by
    part, and the plain file, with a warning, of a part without one.

    Where it has no text_encoder/ or no tokenizer/, that of openai/clip-vit-large-patch14 is taken:
    Stable Diffusion v1 was trained with that encoder, frozen. With transformer/ in place of unet/
    the network is a DiT.
    """
    expect_pipeline(folder, folder)
    if (folder / "transformer").is_dir():
        return _text_dit(folder, variant, tokenizer, local_files_only)
    has_encoder = (folder / "text_encoder").is_dir()
    plain = {part: weights_file(part, None) for part in MODELS}
    optional: tuple[Part, ...] = () if has_encoder else ("text_encoder",)
    paths = find_weights(folder, plain, variant, optional)
    configs = {
        part: read_config(part, path.parent / "config.json")
        for part, path in paths.items()
        if path.is_file()
    }
    if not has_encoder:
        configs["text_encoder"] = MODELS["text_encoder"][1]()
        wanted = cast(UNetConfig, configs["unet"]).cross_attention_dim
        if wanted != cast(CLIPTextConfig, configs["text_encoder"]).hidden_size:
            raise CheckpointError(
                f"{folder} has no text_encoder/, and its UNet does not go with {CLIP}'s"
            )
        paths["text_encoder"] = from_clip(
            f"{folder} has no text_encoder/", ["model.safetensors"], local_files_only
        )
    unet, vae = cast(UNetConfig, configs["unet"]), cast(VAEConfig, configs["vae"])
    _expect_channels(folder, unet.in_channels, unet.out_channels, vae.latent_channels)
    _expect_text(folder, unet.cross_attention_dim, configs["text_encoder"])
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = named(path, read_json)
    schedule = named(path, lambda _: NoiseSchedule.from_dict(scheduler))
    why = f"{folder} has no tokenizer/"
    own_tokenizer = partial(read_tokenizer, tokenizer, folder / "tokenizer", why, local_files_only)
    return Checkpoint(configs, scheduler, schedule, own_tokenizer, paths, rename_diffusers)


def _text_dit(
    folder: Path, variant: str | None, tokenizer: Source | None, local_files_only: bool
) -> Checkpoint:
    """Of a folder in which transformer/, a DiT that takes a text, is in the place of unet/."""
    dit = dit_config(folder / "transformer" / "config.json")
    if dit.num_embeds_ada_norm is not None:
        why = "its DiT takes labels: minisd.load_dit and `minisd dit` take it"
        raise CheckpointError(f"{folder} is for no texts, {why}")
    plain: dict[Part, str] = {part: weights_file(part, None) for part in MODELS}
    plain["unet"] = plain["unet"].replace("unet", "transformer")
    files = find_weights(folder, plain, variant)
    configs: dict[Part, Config] = {"unet": dit}
    for part in ("vae", "text_encoder"):
        configs[part] = read_config(part, files[part].parent / "config.json")
    latents = cast(VAEConfig, configs["vae"]).latent_channels
    _expect_channels(folder, dit.in_channels, dit.in_channels, latents)  # and maybe a variance
    _expect_text(folder, dit.cross_attention_dim, configs["text_encoder"])
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = named(path, read_json)
    schedule = named(path, lambda _: NoiseSchedule.from_dict(scheduler))
    own, why = folder / "tokenizer", f"{folder} has no tokenizer/"
    own_tokenizer = partial(read_tokenizer, tokenizer, own, why, local_files_only)
    return Checkpoint(configs, scheduler, schedule, own_tokenizer, files, rename_diffusers)


def _expect_channels(where: Path, takes: int, gives: int, latents: int) -> None:
    """CheckpointError for a model whose UNet takes more than a latent."""
    if kind := kind_of_channels(takes, gives, latents):
        raise CheckpointError(f"{where} is {kind}, which minisd does not draw with")


def _expect_text(where: Path, takes: int | None, text_encoder: Config) -> None:
    """CheckpointError for a network that takes texts of another width than its encoder gives."""
    gives = cast(CLIPTextConfig, text_encoder).hidden_size
    if takes != gives:
        got = f"its network takes texts of width {takes}, its text encoder gives {gives}"
        raise CheckpointError(f"{where}: {got}, which have to be as many")


def from_single_file(
    path: Path, tokenizer: Source | None = None, local_files_only: bool = False
) -> Checkpoint:
    """One file in the original CompVis layout.

    It carries neither configs nor a vocabulary: the configs are Stable Diffusion v1's; the
    vocabulary comes from the folder `tokenizer`, or a folder tokenizer/ beside the file, or else
    from the Hub repo openai/clip-vit-large-patch14, where it is the same. Of a file that also holds
    averaged weights (model_ema.*) the others are taken, as diffusers does.
    """
    names = read_header(path)
    kind = kind_of_tensors({name: entry.shape for name, entry in names.items()})
    if kind is not None and not kind.endswith("alone"):
        raise CheckpointError(f"{path} is {kind}, which minisd does not draw with")
    if missing := [p for p in LDM_PREFIX.values() if not any(name.startswith(p) for name in names)]:
        hint = "if it belongs to a folder in diffusers layout, give the folder"
        lacks = f"not in the original layout, it has no {'* and no '.join(missing)}*"
        raise CheckpointError(f"{path} is {lacks if kind is None else f'{kind}: {hint}'}")

    def side(name: str, axis: int) -> int:
        """The length of one axis of a convolution's weights; v1's latent has 4 channels."""
        shape = names[name].shape if name in names else ()
        return shape[axis] if len(shape) == 4 else 4

    unet, decoder = LDM_PREFIX["unet"], LDM_PREFIX["vae"] + "decoder.conv_in.weight"
    takes, gives = side(f"{unet}input_blocks.0.0.weight", 1), side(f"{unet}out.2.weight", 0)
    _expect_channels(path, takes, gives, side(decoder, 1))
    configs = {part: config() for part, (_, config) in MODELS.items()}
    if takes == INPAINTING:
        configs["unet"] = UNetConfig(in_channels=INPAINTING)
    wanted = "a folder tokenizer/ with vocab.json and merges.txt"
    why = f"{path} has no vocabulary: put {wanted} beside it"
    own_tokenizer = partial(
        read_tokenizer, tokenizer, path.parent / "tokenizer", why, local_files_only
    )

    def rename(part: Part, name: str) -> str | None:
        return rename_ldm(part, name, configs[part])

    schedule = NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    files = dict.fromkeys(MODELS, path)
    return Checkpoint(configs, SD_V1_SCHEDULE, schedule, own_tokenizer, files, rename)


def match_tensors(
    checkpoint: Checkpoint, part: Part, expected: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Entry], list[str]]:
    """Compare a part's file with the module's names and shapes -> (entries, faults).

    entries: module name -> Entry. faults: one line for each tensor that is missing, unexpected,
    misshapen or unreadable.
    """
    entries: dict[str, Entry] = {}
    faults = []
    for name, entry in read_header(checkpoint.files[part]).items():
        new = checkpoint.rename(part, name)
        if new is None:
            continue
        called = name if new == name else f"{name} (here {new})"
        shape = expected.get(new)
        # CompVis wrote the VAE's attention as 1x1 convolutions; as linear layers they drop two axes
        # of length 1.
        as_convolution = part == "vae" and ".attentions." in new
        if shape is None:
            faults.append(f"unexpected {called}, shape {entry.shape}")
        elif new in entries:
            faults.append(f"twice {called}")
        elif entry.shape != shape and not (as_convolution and entry.shape == (*shape, 1, 1)):
            faults.append(f"misshapen {called}, got {entry.shape}, expected {shape}")
        elif entry.dtype not in FLOATS:
            what = f"{entry.dtype}{' (quantised)' if entry.dtype[:2] in ('F8', 'I8', 'U8') else ''}"
            faults.append(
                f"unreadable {called}, got dtype {what}, expected one of {', '.join(FLOATS)}"
            )
        entries[new] = entry
    faults += [
        f"missing {name}, expected shape {shape}"
        for name, shape in expected.items()
        if name not in entries
    ]
    return entries, faults


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; twenty times as fast as isfinite().all()."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)  # in the order of memory: aminmax would make a copy
    low, high = tensor.aminmax()
    return bool(low > -math.inf and high < math.inf)  # NaN would be both


def load_tensors(
    path: Path,
    entries: dict[str, Entry],
    device: torch.device,
    dtype: torch.dtype,
    copy: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensors on their device, in `dtype`, those of convolutions in channels_last memory.

    That is the order in which convolutions compute, on a CPU and on CUDA: kept otherwise, they
    would be reordered at every call. CheckpointError where a value is not finite, or not any more
    in `dtype`.
    """
    tensors = {}
    for name, tensor in read_tensors(path, entries, device, dtype, torch.channels_last, copy):
        if not is_finite(tensor):
            kinds = f"{FLOATS[entries[name].dtype]} in the file, {dtype} wanted"
            raise CheckpointError(
                f"{path}: {name} has NaN or infinite values ({kinds.replace('torch.', '')})"
            )
        tensors[name] = tensor
    return tensors


def build_models(
    checkpoint: Checkpoint,
) -> tuple[dict[Part, nn.Module], dict[Part, dict[str, Entry]]]:
    """The modules, without memory, and what fills them: part -> module name -> Entry of its file.

    CheckpointError that lists every tensor which is missing, unexpected, misshapen or unreadable.
    """

    def make(part: Part) -> nn.Module:
        config = checkpoint.configs[part]
        return DiT(config) if isinstance(config, DiTConfig) else MODELS[part][0](config)

    modules, entries = build(checkpoint.files, make, partial(match_tensors, checkpoint))
    tokenizer, text = checkpoint.tokenizer, cast(CLIPTextConfig, checkpoint.configs["text_encoder"])
    length, last = tokenizer.max_length, max(tokenizer.vocab.values())
    if length > text.max_position_embeddings or last >= text.vocab_size:
        raise CheckpointError(
            f"the tokenizer makes {length} ids up to {last}, the text encoder takes at most "
            f"{text.max_position_embeddings} ids below {text.vocab_size}"
        )
    return modules, entries


def build(
    files: Mapping[P, Path],
    make: Callable[[P], nn.Module],
    match: Callable[[P, dict[str, tuple[int, ...]]], tuple[dict[str, Entry], list[str]]],
) -> tuple[dict[P, nn.Module], dict[P, dict[str, Entry]]]:
    """The module of each part, without memory, and what fills it: part -> module name -> Entry.

    match: part, names and shapes -> (entries, a line for each tensor that does not fit);
    CheckpointError with all these lines.
    """
    modules: dict[P, nn.Module] = {}
    entries: dict[P, dict[str, Entry]] = {}
    faults: dict[P, list[str]] = {}
    for part in files:
        try:
            with torch.device("meta"):
                modules[part] = make(part)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            # Its numbers go together with no architecture.
            raise CheckpointError(f"{part}: its config makes no model: {error}") from error
        state = modules[part].state_dict()
        entries[part], lines = match(part, {name: tuple(x.shape) for name, x in state.items()})
        if lines:
            faults[part] = lines
    if faults:
        raise CheckpointError(_told(files, faults))
    return modules, entries


def fill(
    modules: Mapping[P, nn.Module],
    files: Mapping[P, Path],
    entries: Mapping[P, dict[str, Entry]],
    device: torch.device,
    dtype: torch.dtype,
    copy: bool = False,
) -> None:
    """Give the modules their files' tensors, in evaluation mode and without gradients."""
    for part, module in modules.items():
        shapes = {name: x.shape for name, x in module.state_dict().items()}
        tensors = load_tensors(files[part], entries[part], device, dtype, copy)
        state = {name: x.view(shapes[name]) for name, x in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)


def _told(files: Mapping[P, Path], faults: Mapping[P, list[str]]) -> str:
    """The first fault in the first line, then all of them if there are more."""
    part, path = (first := next(iter(faults))), files[first]
    kind = kind_of_tensors({name: entry.shape for name, entry in read_header(path).items()})
    names: dict[str, str] = {"unet": "a UNet", "vae": "a VAE"}
    own = names.get(part, f"a {part.replace('_', ' ')}")
    is_other = kind is not None and kind != f"{own} alone"
    total = sum(map(len, faults.values()))
    told = f"{part}, {path}: " + (f"it is {kind}" if is_other else faults[part][0])
    if total == 1:
        return told
    lines = ["\n    ".join([f"  {p}, {files[p]}:", *each]) for p, each in faults.items()]
    return "\n".join([f"{told}; in all {total} tensors do not fit the models", *lines])


def load_parts(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, copy: bool = False
) -> Parts:
    """The modules with the files' tensors, in evaluation mode and without gradients."""
    modules, entries = build_models(checkpoint)
    fill(modules, checkpoint.files, entries, device, dtype, copy)
    return Parts(
        checkpoint.tokenizer,
        cast(CLIPTextModel, modules["text_encoder"]),
        cast(UNet, modules["unet"]),
        cast(AutoencoderKL, modules["vae"]),
        checkpoint.schedule,
    )
