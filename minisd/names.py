"""Names of tensors in the files people publish -> names of minisd's modules.

Three layouts: diffusers' (the VAE's attention was renamed in 2022), transformers' CLIPTextModel (with or without the
prefix `text_model.`, alone or inside a whole CLIP), and the original single file of CompVis' ldm.modules,
https://github.com/CompVis/stable-diffusion. minisd's modules carry the newest names of diffusers and transformers.
"""

import re

VAE_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.12
CLIP_OTHER = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")  # of a whole CLIP


def rename_diffusers(part: str, name: str) -> str | None:
    """Diffusers' or transformers' name -> the module's, None for what is no weight of this part."""
    if part == "vae":
        return re.sub(
            r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda m: m[1] + VAE_OLD[m[2]], name
        )
    if part == "text_encoder":
        if name.endswith("position_ids") or name.startswith(CLIP_OTHER):
            return None
        return name.removeprefix("text_model.")
    return name


LDM_PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
LDM_UNET = [  # (pattern, replacement), applied in turn; the numbered blocks come first, see rename_ldm
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"(resnets\.\d+)\.in_layers\.0\.", r"\1.norm1."),
    (r"(resnets\.\d+)\.in_layers\.2\.", r"\1.conv1."),
    (r"(resnets\.\d+)\.emb_layers\.1\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.out_layers\.0\.", r"\1.norm2."),
    (r"(resnets\.\d+)\.out_layers\.3\.", r"\1.conv2."),
    (r"(resnets\.\d+)\.skip_connection\.", r"\1.conv_shortcut."),
]
LDM_VAE = [
    (r"^((?:en|de)coder)\.mid\.block_([12])\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
    (r"^((?:en|de)coder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    (r"^((?:en|de)coder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^(encoder\.down|decoder\.up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
]


def rename_ldm(part: str, name: str, config) -> str | None:
    """CompVis' name -> the module's; None outside the part's prefix. A name that no rule knows comes back as it is."""
    if not name.startswith(LDM_PREFIX[part]):
        return None
    name = name.removeprefix(LDM_PREFIX[part])
    if part == "unet":
        blocks = r"^(input|output)_blocks\.(\d+)\.(\d+)\.(op\.|conv\.)?"
        return _substitute([(blocks, lambda m: _ldm_unet_block(m, config.layers_per_block)), *LDM_UNET], name)
    if part == "vae":
        # CompVis numbers the decoder's stages from the finest, the module from the coarsest.
        last = len(config.block_out_channels) - 1
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        return _substitute(LDM_VAE, name)
    return rename_diffusers(part, name)


def _ldm_unet_block(match, layers: int) -> str:
    """input_blocks.n is conv_in, then for each stage `layers` layers and a downsampler; output_blocks.n has layers + 1
    layers for each stage, the upsampler being the last entry of the stage's last layer."""
    side, n, entry, resample = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input" and n == 0:
        return "conv_in."
    stage, layer = divmod(n - 1 if side == "input" else n, layers + 1)
    way = "down" if side == "input" else "up"
    if resample is not None:
        return f"{way}_blocks.{stage}.{way}samplers.0.conv."
    return f"{way}_blocks.{stage}.{'attentions' if entry else 'resnets'}.{layer}."


def _substitute(rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
