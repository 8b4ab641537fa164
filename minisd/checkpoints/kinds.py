"""What a file is that is no checkpoint of Stable Diffusion v1, recognised by its first bytes and by
the names of its tensors, so that an error can say it.

The names are those of the programs that write such files: diffusers, CompVis' and Stability's
ldm and sgm, kohya-ss/sd-scripts, lllyasviel/ControlNet, black-forest-labs/flux.
"""

import re
from collections.abc import Mapping

PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
PICKLE = rb"\x80[\x02-\x05]|PK\x03\x04"  # of Python, and a zip archive of torch.save
NO_MODEL = "an addition to a model and no model"
SD2 = "a Stable Diffusion 2 model, whose texts go through another encoder (OpenCLIP's)"
# A pattern that one of a file's names matches -> what the file is. The first that fits is it.
FILES = {
    r"lora_(up|down|A|B)\b|[._]lora(_linear_layer)?\.(up|down)\b"
    r"|\.(hada|lokr)_w": f"a LoRA, {NO_MODEL}",
    r"(^|\.)ip_adapter\.|^image_proj\.": f"an IP-Adapter, {NO_MODEL}",
    r"motion_modules\.": f"a motion module of AnimateDiff, {NO_MODEL}",
    r"^(control_model|controlnet_\w+)\.|^input_hint_block\.": f"a ControlNet, {NO_MODEL}",
    r"^emb_params$|^string_to_param|^clip_[lg]$": f"a textual inversion, {NO_MODEL}",
    r"(^|\.)(double_blocks|single_transformer_blocks)\.": "a model of the Flux kind",
    r"(^|\.)joint_blocks\.": "a Stable Diffusion 3 model",
    r"^conditioner\.embedders\.": "a Stable Diffusion XL model",
    r"^cond_stage_model\.model\.": f"{SD2}, in one file",
    r"\.(absmax|quant_map|quant_state)(\.|$)|\.SCB$": "quantised by bitsandbytes",
    r"^(down_blocks\..*|mid_block\..*)attn2\.": "a UNet alone",
    r"^(encoder|decoder)\.(mid|mid_block|up|down)\b": "a VAE alone",
    r"^(text_model\.)?encoder\.layers\.": "a text encoder alone",
}
# What the class in model_index.json ends in or holds -> what the model is.
PIPELINES = {
    "XL": "a Stable Diffusion XL model",
    "Diffusion3": "a Stable Diffusion 3 model",
    "Flux": "a model of the Flux kind",
    "InstructPix2Pix": "an InstructPix2Pix model",
    "Depth2Img": "a model of depth to image",
    "Upscale": "an upscaler",
    "PixArt": "a PixArt model",
    "Kandinsky": "a Kandinsky model",
    "LatentConsistency": "a latent consistency model",
}
# Channels that a UNet takes, where they are not the latent's.
INPAINTING = 9  # latent, mask and masked latent: `minisd.inpaint` draws with it
INPUTS = {
    8: "an InstructPix2Pix model (latent and image)",
    7: "an upscaler (latent and image)",
    5: "a model of depth to image (latent and depth)",
}


def kind_of_bytes(head: bytes) -> str | None:
    """What a file is that begins with these bytes and could not be read as safetensors."""
    if head[8:9] == b"{":  # damaged safetensors
        return None
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; what it points to was not fetched (git lfs pull)"
    if head.lstrip().lower().startswith(PAGES):
        return "it is a web page: a server's answer in place of the file"
    if re.match(PICKLE, head):
        return "it is a pickle (.ckpt, .bin or .pt) under another name"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file, of quantised weights"
    if head.lstrip()[:1] in (b"{", b"["):
        return "it is JSON text"
    if len(head) >= 8 and not any(head):
        return "it begins with zeros: its download did not finish"
    return None


def kind_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file with tensors of these names and shapes is, if it is known and no whole model of
    version 1."""
    for pattern, kind in FILES.items():
        if any(re.search(pattern, name) for name in shapes):
            return kind
    if len(shapes) == 1 and len(next(iter(shapes.values()))) <= 2:
        return f"a textual inversion, {NO_MODEL}"
    return None


def kind_of_pipeline(index: Mapping[str, object]) -> str | None:
    """What a model is, of the contents of its model_index.json, if minisd does not draw with it."""
    name = str(index.get("_class_name"))
    return next((kind for part, kind in PIPELINES.items() if part in name), None)


def kind_of_config(values: Mapping[str, object]) -> str | None:
    """What a model is of whose UNet or text encoder this is the config.json, if minisd does not
    draw with it: OpenCLIP's encoder and what takes its texts are 1024 wide."""
    text = values.get("hidden_size") == 1024 and values.get("hidden_act") == "gelu"
    unet = values.get("cross_attention_dim") == 1024 and values.get("use_linear_projection") is True
    return SD2 if text or unet else None


def kind_of_channels(takes: int, gives: int, latents: int) -> str | None:
    """What a model is whose UNet takes and gives so many channels and whose VAE has latents of so
    many, if minisd does not draw with it."""
    if gives == latents and takes in (latents, 2 * latents + 1):
        return None
    if gives == latents and takes in INPUTS:
        return INPUTS[takes]
    return (
        f"a network that takes {takes} and gives {gives} channels beside a VAE with latents of "
        f"{latents}, which have to be as many"
    )
