"""Adapters: small files that change a model which is loaded, LoRA and textual inversion.

    LoRA                W' = W + sum_i weight_i (alpha_i / rank_i) B_i A_i      (Hu et al. 2021)
    textual inversion   a new word is n rows that the text encoder takes for its tokens
                                                                               (Gal et al. 2022)

LoRA files name layers in kohya's way (lora_unet_down_blocks_0_..., lora_te_text_model_...), in
PEFT's and diffusers' (unet.down_blocks.0..., lora_A and lora_B), or in that of older diffusers
(attn1.processor.to_q_lora.down). Here a table is made of the model's own layers, spelled in each of
these ways, so no name is guessed. B A of a convolution is one matrix product, too: A (rank, in, kh,
kw) lies as (rank, in kh kw), B as (out, rank).

Sources: arXiv 2106.09685 and 2208.01618; https://github.com/kohya-ss/sd-scripts; PEFT's LoraConfig
(lora_alpha, alpha_pattern, use_rslora).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import expect
from ..files import expect_file
from .folders import PICKLES
from .kinds import kind_of_tensors
from .load import is_finite
from .sources import CheckpointError, Source, sha256
from .tensor_file import FLOATS, read_header

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
# layer name + one of these + "weight"; what PEFT calls B is up, A is down
SUFFIX = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.default)?|\.lora_(?P<kohya>down|up)"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up))\.weight"
)
SHOWN = 20  # faults of a file that an error lists


@dataclass
class Factors:
    """What a file says of one layer: B (out, rank), A (rank, in), alpha; None: not said."""

    up: Tensor | None = None
    down: Tensor | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Adapters:
    """What was put into a model beside its own weights.

    merged: for each LoRA file (path, sha256, weight). originals: "unet.conv_in" -> the weights of
    that layer as they were. words: for each textual inversion (path, sha256, token). vectors: (n,
    D), the rows of their tokens, whose ids begin after the tokenizer's own.
    """

    merged: list[tuple[str, str, float]] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    words: list[tuple[str, str, str]] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)


# LoRA


@torch.no_grad()
def merge(sd: "StableDiffusion", loras: list[tuple[Source, float]]) -> None:
    """Add LoRA files to the weights of the UNet and the text encoder, in place; see
    `StableDiffusion.merge`."""
    layers = layers_of(sd)
    changes: dict[str, Tensor] = {}
    about = []
    for source, weight in loras:
        path = lora_file(source)
        for name, factors in read_lora(path, layers).items():
            own: Tensor = layers[name].weight
            change = weight * delta(factors, own)
            changes[name] = changes[name] + change if name in changes else change
        about.append((str(source), sha256(path), weight))
    merged = {name: layers[name].weight.to(change) + change for name, change in changes.items()}
    for name, new in merged.items():
        if not is_finite(new.to(layers[name].weight.dtype)):
            raise CheckpointError(f"the LoRA makes {name} infinite in {layers[name].weight.dtype}")
    for name, new in merged.items():
        own = layers[name].weight
        if name not in sd.adapters.originals:
            sd.adapters.originals[name] = own.detach().clone()
        own.copy_(new)
    sd.adapters.merged.extend(about)


@torch.no_grad()
def unmerge(sd: "StableDiffusion") -> None:
    """Give every layer the weights back that it had before the first merge, bit for bit."""
    layers = layers_of(sd)
    for name, original in sd.adapters.originals.items():
        layers[name].weight.copy_(original)
    sd.adapters.originals.clear()
    sd.adapters.merged.clear()


def layers_of(sd: "StableDiffusion") -> dict[str, Any]:
    """Every layer that a LoRA can change, "unet.conv_in" -> module."""
    return {
        f"{part}.{name}": module
        for part, model in (("unet", sd.unet), ("text_encoder", sd.text_encoder))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def delta(factors: Factors, own: Tensor) -> Tensor:
    """(alpha / rank) B A in the shape of a layer's weight, in float32 or its wider dtype."""
    assert factors.up is not None and factors.down is not None and factors.alpha is not None
    kind = torch.promote_types(own.dtype, torch.float32)
    up, down = (x.flatten(1).to(own.device, kind) for x in (factors.up, factors.down))
    return (factors.alpha / len(down) * (up @ down)).view(own.shape)


def lora_file(source: Source) -> Path:
    """The file of a LoRA: itself, or adapter_model.safetensors in a folder that PEFT saved."""
    path = Path(source)
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    if path.exists() and not path.is_dir():
        expect_file(path)
    if not path.is_file():
        raise CheckpointError(f"there is no LoRA file {str(path)!r:.200}")
    return path


def read_lora(path: Path, layers: dict[str, Any]) -> dict[str, Factors]:
    """What a file says of each layer. CheckpointError that lists all that is unknown, incomplete or
    misshapen."""
    tensors, about = read_small(path)
    config = peft_config(path, about)
    known = {spelled: name for name in layers for spelled in spellings(name)}
    found: dict[str, Factors] = {}
    faults: list[str] = []
    for key, tensor in tensors.items():
        match = SUFFIX.fullmatch(key)
        layer = known.get(match["layer"] if match else key.removesuffix(".alpha"))
        if layer is None or not (match or key.endswith(".alpha")):
            faults.append(f"unexpected {key}, shape {tuple(tensor.shape)}")
            continue
        factors = found.setdefault(layer, Factors())
        if match is None and tensor.numel() != 1:
            faults.append(f"misshapen {key}, got {tuple(tensor.shape)}, expected one number")
        elif match is None:
            factors.alpha = float(tensor)
        elif "B" in match.groups() or "up" in match.groups():
            factors.up = tensor
        else:
            factors.down = tensor
    for name, factors in found.items():
        faults += misfits(name, factors, layers[name].weight)
        factors.alpha = scaled_alpha(name, factors, config)
    if faults or not found:
        raise CheckpointError(f"{path} is no LoRA for this model: {_told(tensors, faults)}")
    return found


def _told(tensors: dict[str, Tensor], faults: list[str]) -> str:
    """What the file is, or the first fault, in the first line; then all of them if there are
    more."""
    kind = kind_of_tensors({name: tuple(x.shape) for name, x in tensors.items()})
    is_other = kind is not None and not kind.startswith("a LoRA")
    first = f"it is {kind}" if is_other else (faults or ["it is empty"])[0]
    if len(faults) < 2:
        return first
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "\n    ".join([f"{first}; in all {len(faults)} faults", *faults[:SHOWN], *more])


def spellings(name: str) -> Iterator[str]:
    """How files call a layer, of "unet.down_blocks..." or "text_encoder.encoder.layers..."."""
    part, _, name = name.partition(".")
    if part == "unet":
        yield f"lora_unet_{name.replace('.', '_')}"
        older = re.sub(r"\.(attn[12])\.(to_[qkv]|to_out)(\.0)?$", r".\1.processor.\2", name)
        for each in dict.fromkeys((name, older)):
            yield from (each, f"unet.{each}", f"base_model.model.{each}")
        return
    yield from (f"lora_te{n}_text_model_{name.replace('.', '_')}" for n in ("", "1"))
    last = name.rpartition(".")[2]
    older = name.removesuffix(last) + ATTENTION.get(last, last)
    for each in dict.fromkeys((name, older)):
        for called in (each, f"text_model.{each}"):
            yield from (f"text_encoder.{called}", f"base_model.model.{called}")


def misfits(name: str, factors: Factors, own: Tensor) -> list[str]:
    """What keeps B A from being added to a layer's weight: one line, or none."""
    up, down = factors.up, factors.down
    if up is None or down is None:
        return [f"{name} has {'no up (B)' if up is None else 'no down (A)'}"]
    fits = min(up.ndim, down.ndim) >= 2 and len(down) > 0
    fits = fits and up.flatten(1).shape == (len(own), len(down))
    fits = fits and down.flatten(1).shape[1] == own[0].numel()
    fits = fits and (down.ndim == 2 or math.prod(down.shape[2:]) == math.prod(own.shape[2:]))
    if not fits:
        got = f"B {tuple(up.shape)}, A {tuple(down.shape)}"
        return [f"{name} has {got} for weights of shape {tuple(own.shape)}"]
    if not (up.is_floating_point() and down.is_floating_point()):
        return [f"{name} has dtypes {up.dtype} and {down.dtype}, expected floats"]
    return []


def peft_config(path: Path, about: dict[str, str]) -> dict[str, Any]:
    """What the file, or adapter_config.json beside it, says of alphas.

    {"unet.lora_alpha": ...}, or without the part where a file is of one model alone.
    """
    beside = path.with_name("adapter_config.json")
    try:
        config: Any = json.loads(about.get("lora_adapter_metadata", "{}"))
        if not config and path.name == "adapter_model.safetensors" and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}, expected an object")
        for key, value in config.items():
            _expect_known(key.rpartition(".")[2], value)
    except (OSError, ValueError, RecursionError, re.error) as error:
        raise CheckpointError(f"{path}: PEFT's config cannot be used: {error}") from error
    return config


def _expect_known(key: str, value: Any) -> None:
    """ValueError or re.error for what PEFT's config says and `scaled_alpha` cannot take."""
    if key in ("use_dora", "lora_bias") and value:
        raise ValueError(f"{key} is {value!r:.80}, only LoRA without it is supported")
    if key == "lora_alpha" and value is not None:
        expect.number(key, value)
    if key == "alpha_pattern" and value is not None:
        if not isinstance(value, dict):
            raise ValueError(f"{key} is {value!r:.80}, expected an object")
        for pattern, alpha in value.items():
            re.compile(pattern)
            expect.number(f"{key} of {pattern!r:.80}", alpha)


def scaled_alpha(name: str, factors: Factors, config: dict[str, Any]) -> float:
    """alpha of a layer: the file's tensor, or else PEFT's config, or else the rank (scale 1)."""
    rank = 1 if factors.down is None else len(factors.down)
    if factors.alpha is not None:
        return factors.alpha
    part, _, layer = name.partition(".")

    def said(key: str) -> Any:
        return config.get(f"{part}.{key}", config.get(key))

    alpha = said("lora_alpha")
    for pattern, own in (said("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):  # as PEFT does
            alpha = own
    if alpha is None:
        return rank
    return float(alpha) * (math.sqrt(rank) if said("use_rslora") else 1.0)


# textual inversion


@torch.no_grad()
def add_embedding(sd: "StableDiffusion", source: Source, token: str | None = None) -> str:
    """Teach the model a new word, see `StableDiffusion.add_embedding`."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        expect_file(path)
    if not path.is_file():
        raise CheckpointError(f"there is no embedding file {str(path)!r:.200}")
    tensors, _ = read_small(path)
    name = "emb_params" if "emb_params" in tensors else next(iter(tensors), "")
    vectors = tensors.get(name)
    width = sd.text_encoder.config.hidden_size
    kind = kind_of_tensors({name: tuple(x.shape) for name, x in tensors.items()})
    if kind is not None and not kind.startswith("a textual inversion"):
        raise CheckpointError(f"{path} is no textual inversion: it is {kind}")
    if vectors is None or len(tensors) != 1 or vectors.ndim not in (1, 2) or not vectors.numel():
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in list(tensors.items())[:SHOWN])
        expected = "one tensor, (D,) or (n, D), called by its token or emb_params"
        raise CheckpointError(
            f"{path} is no textual inversion: got {got or 'nothing'}, expected {expected}"
        )
    vectors = vectors.reshape(-1, vectors.shape[-1])
    if vectors.shape[1] != width or not vectors.is_floating_point():
        got = f"{vectors.dtype} of {vectors.shape[1]} numbers"
        raise CheckpointError(f"{path} has vectors of {got}, the text encoder's have {width}")
    if token is None:
        token = path.stem if name == "emb_params" else name
    sd.tokenizer.add_token(token, len(vectors))
    sd.adapters.vectors.append(vectors.float())
    sd.adapters.words.append((str(source), sha256(path), token))
    return token


def token_embeddings(sd: "StableDiffusion", ids: Tensor) -> Tensor:
    """What the text encoder takes for ids (B, L): ids, or (B, L, D) where some are new words'.

    Row i of the new words' vectors has the id first_new + i.
    """
    new, ids = ids - sd.tokenizer.first_new, ids.to(sd.device)
    if not (new >= 0).any():
        return ids
    new = new.to(sd.device)
    table = sd.text_encoder.embeddings.token_embedding
    vectors = torch.cat(sd.adapters.vectors).to(table.weight)
    known = table(ids.where(new < 0, 0))
    return torch.where((new >= 0)[..., None], vectors[new.clamp(min=0)], known)


def read_small(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of an adapter's .safetensors file; CheckpointError where it is none."""
    if path.suffix.lower() != ".safetensors":
        why = ": minisd reads no pickles, which run whatever code their author put into them"
        is_pickle = path.suffix.lower() in PICKLES
        raise CheckpointError(f"{path} is not a .safetensors file{why if is_pickle else ''}")
    for name, entry in read_header(path).items():  # says what is wrong with a file
        if entry.dtype not in (*FLOATS, "I64", "I32"):
            expected = f"expected one of {', '.join(FLOATS)}"
            raise CheckpointError(f"{path}: {name} has dtype {entry.dtype}, {expected}")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    if bad := [name for name, x in tensors.items() if x.numel() and not is_finite(x)]:
        raise CheckpointError(f"{path}: {bad[0]} has NaN or infinite values")
    return tensors, about
