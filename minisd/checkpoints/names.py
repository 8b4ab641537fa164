"""Names of tensors in the files people publish <-> names of minisd's modules.

Three layouts: diffusers' (the VAE's attention was renamed in 2022), transformers' CLIPTextModel
(with or without the prefix `text_model.`, alone or inside a whole CLIP), and the original single
file of CompVis' ldm.modules, https://github.com/CompVis/stable-diffusion. minisd's modules carry
the newest names of diffusers and transformers.
"""

import re
from functools import lru_cache

from ..models.clip import CLIPTextConfig
from ..models.dit_config import DiTConfig
from ..models.unet import UNetConfig
from ..models.vae import VAEConfig
from .sources import Part

Config = UNetConfig | DiTConfig | VAEConfig | CLIPTextConfig

# diffusers before 0.12
VAE_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What a whole CLIP has beside its text model.
CLIP_OTHER = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def rename_diffusers(part: Part, name: str) -> str | None:
    """Diffusers' or transformers' name -> the module's, None for what is no weight of this part."""
    if part == "vae":
        return re.sub(
            r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
            lambda m: m[1] + VAE_OLD[m[2]],
            name,
        )
    if part == "text_encoder":
        if name.endswith("position_ids") or name.startswith(CLIP_OTHER):
            return None
        return name.removeprefix("text_model.")
    return name


# CompVis: one prefix for each part, and inside it a table {CompVis' start of a name: the module's}
# that the config's numbers write out. What no entry starts (conv_in, quant_conv, everything inside
# a transformer) is called the same.

LDM_PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
LDM_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def rename_ldm(part: Part, name: str, config: Config) -> str | None:
    """CompVis' name -> the module's; None outside the part's prefix.

    A name that no rule knows comes back as it is.
    """
    if not name.startswith(LDM_PREFIX[part]):
        return None
    name = name.removeprefix(LDM_PREFIX[part])
    if isinstance(config, CLIPTextConfig):
        return rename_diffusers(part, name)
    return _exchange_start(name, _ldm_table(_of_ldm(config)))


def to_ldm(part: Part, name: str, config: Config) -> str:
    """The module's name -> CompVis'."""
    if isinstance(config, CLIPTextConfig):
        return f"{LDM_PREFIX[part]}text_model.{name}"
    table = {new: old for old, new in _ldm_table(_of_ldm(config)).items()}
    return LDM_PREFIX[part] + _exchange_start(name, table)


def _of_ldm(config: UNetConfig | DiTConfig | VAEConfig) -> UNetConfig | VAEConfig:
    """The config; ValueError for a DiT, which CompVis' layout has no place for."""
    if isinstance(config, DiTConfig):
        raise ValueError("a single file in CompVis' layout holds a UNet, got a DiT")
    return config


def _exchange_start(name: str, table: dict[str, str]) -> str:
    """Replace the longest start of a dotted name that is in the table; they have 1 to 6 pieces."""
    pieces = name.split(".", 6)
    for n in range(6, 0, -1):
        if (start := ".".join(pieces[:n])) in table:
            return table[start] + name.removeprefix(start)
    return name


@lru_cache
def _ldm_table(config: UNetConfig | VAEConfig) -> dict[str, str]:
    return _ldm_unet(config) if isinstance(config, UNetConfig) else _ldm_vae(config)


def _ldm_unet(config: UNetConfig) -> dict[str, str]:
    """The UNet's table.

    input_blocks.n is conv_in, then for each level its layers and a downsampler; output_blocks.n has
    one layer more for each level, the upsampler being the last entry of the level's last layer;
    entry 0 is the resnet.
    """
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    layers = config.layers_per_block
    for i, kind in enumerate(config.up_block_types):
        n = 1 + i * (layers + 1)
        for j in range(layers):
            resnets[f"input_blocks.{n + j}.0"] = f"down_blocks.{i}.resnets.{j}"
            table[f"input_blocks.{n + j}.1"] = f"down_blocks.{i}.attentions.{j}"
        table[f"input_blocks.{n + layers}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
        n = i * (layers + 1)
        has_attention = kind.startswith("CrossAttn")
        for j in range(layers + 1):
            resnets[f"output_blocks.{n + j}.0"] = f"up_blocks.{i}.resnets.{j}"
            if has_attention:
                table[f"output_blocks.{n + j}.1"] = f"up_blocks.{i}.attentions.{j}"
        table[f"output_blocks.{n + layers}.{1 + has_attention}.conv"] = (
            f"up_blocks.{i}.upsamplers.0.conv"
        )
    for old, new in resnets.items():
        table |= {f"{old}.{inner}": f"{new}.{name}" for inner, name in LDM_RESNET.items()}
    return table


def _ldm_vae(config: VAEConfig) -> dict[str, str]:
    """The VAE's table.

    CompVis numbers the decoder's levels from the finest, the module from the coarsest.
    """
    table, resnets = {}, {}
    last = len(config.block_out_channels) - 1
    for side in ("encoder", "decoder"):
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for inner, name in LDM_VAE_ATTENTION.items():
            table[f"{side}.mid.attn_1.{inner}"] = f"{side}.mid_block.attentions.0.{name}"
        for j in range(2):
            resnets[f"{side}.mid.block_{j + 1}"] = f"{side}.mid_block.resnets.{j}"
    for i in range(last + 1):
        for j in range(config.layers_per_block):
            resnets[f"encoder.down.{i}.block.{j}"] = f"encoder.down_blocks.{i}.resnets.{j}"
        for j in range(config.layers_per_block + 1):
            resnets[f"decoder.up.{last - i}.block.{j}"] = f"decoder.up_blocks.{i}.resnets.{j}"
        table[f"encoder.down.{i}.downsample"] = f"encoder.down_blocks.{i}.downsamplers.0"
        table[f"decoder.up.{last - i}.upsample"] = f"decoder.up_blocks.{i}.upsamplers.0"
    for old, new in resnets.items():
        table |= {old: new, f"{old}.nin_shortcut": f"{new}.conv_shortcut"}
    return table
