"""The tiny random model of the prompt-to-prompt tests: attention at 8 x 8 and 4 x 4, every letter a
token."""

import tiny
from oracle import CROSS_DOWN, CROSS_UP, unet_pair

import minisd


def load(folder):
    """(diffusers' UNet, minisd's StableDiffusion with the same UNet). The tokenizer has one token
    per character."""
    tiny.save(folder)
    sd = minisd.load(folder, device="cpu")
    reference, sd.unet = unet_pair(
        seed=5,
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=(CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP),
        layers_per_block=1,
        attention_head_dim=2,
    )
    return reference, sd
