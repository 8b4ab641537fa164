"""Pairs of a random diffusers / transformers model and ours with the same weights, and how far
apart they are."""

import sys

from diffusers import AutoencoderKL as ReferenceVAE, UNet2DConditionModel
from tiny import randomise
from transformers import CLIPTextConfig as ReferenceTextConfig, CLIPTextModel as ReferenceText

from minisd import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet, UNetConfig, VAEConfig

CROSS_DOWN, PLAIN_DOWN, CROSS_UP, PLAIN_UP = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
)


def unet_pair(seed=0, **config):
    """A random tiny diffusers UNet and ours with the same weights."""
    depth = len(config["block_out_channels"])
    config = {
        "sample_size": 16,
        "down_block_types": (CROSS_DOWN,) * (depth - 1) + (PLAIN_DOWN,),
        "up_block_types": (PLAIN_UP,) + (CROSS_UP,) * (depth - 1),
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    } | config
    reference = randomise(UNet2DConditionModel(**config), seed)
    return reference, load(UNet(UNetConfig.from_dict(dict(reference.config))), reference)


def vae_pair(seed=0, **config):
    """A random tiny diffusers VAE and ours with the same weights."""
    depth = len(config["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
    }
    reference = randomise(ReferenceVAE(**blocks, **config), seed)
    return reference, load(AutoencoderKL(VAEConfig.from_dict(dict(reference.config))), reference)


def text_pair(seed=0, **config):
    """A random tiny transformers CLIP text model and ours with the same weights."""
    config = {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98} | config
    reference = randomise(ReferenceText(ReferenceTextConfig(**config)), seed)
    return reference, load(
        CLIPTextModel(CLIPTextConfig.from_dict(reference.config.to_dict())), reference
    )


def load(ours, reference):
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.eval()


def difference(ours, reference):
    """max |ours - reference| / max |reference|; a NaN or infinity anywhere gives one, which no bar
    passes."""
    assert ours.shape == reference.shape, (
        f"shape {tuple(ours.shape)} instead of {tuple(reference.shape)}"
    )
    return (
        (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
    ).item()


def return_latents(sd, monkeypatch):
    """sd's methods return latents in place of images, which can be told no recipe."""
    monkeypatch.setattr(sd, "decode", lambda z: z, raising=False)
    for name, module in list(sys.modules.items()):
        if name.startswith("minisd.") and "tell" in vars(module):
            monkeypatch.setattr(module, "tell", lambda images, *about, **more: images)
