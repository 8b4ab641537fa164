"""A tiny Stable Diffusion with random weights, written to disk by diffusers and transformers."""

import json
import warnings

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULER = {  # Stable Diffusion v1.4's
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.18215,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 77,
    "vocab_size": 514,
    "hidden_act": "quick_gelu",
}


def randomise(module, seed):
    """Give every parameter a random value: fresh norms are 1 and 0, fresh biases 0, and hide
    mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(
                    0.2 * value + (1 if "norm" in name and name.endswith("weight") else 0)
                )
            else:
                parameter.copy_(value / parameter[0].numel() ** 0.5)
    return module.eval()


def tokenizer_files(folder):
    """A vocabulary without merges: the 256 bytes as printable characters, the same with </w>, two
    special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pipeline(folder, seed=0):
    """A StableDiffusionPipeline of diffusers, tiny and random; its tokenizer's files go to
    `folder`."""
    return StableDiffusionPipeline(
        vae=randomise(AutoencoderKL(**VAE), seed),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), seed + 1),
        tokenizer=CLIPTokenizer.from_pretrained(str(tokenizer_files(folder))),
        unet=randomise(UNet2DConditionModel(**UNET), seed + 2),
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(folder, variant=None):
    """Write the tiny model in diffusers' folder layout, with vocab.json and merges.txt ->
    diffusers' pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline(folder / "tokenizer")
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder, variant=variant)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return pipe
