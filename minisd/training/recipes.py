"""The models that can be trained, as numbers: their sizes and how each stage is run."""

from dataclasses import dataclass

from ..models.clip import CLIPTextConfig
from ..models.dit_config import DiTConfig
from ..models.unet import CROSS_DOWN, CROSS_UP, PLAIN_DOWN, PLAIN_UP, UNetConfig
from ..models.vae import VAEConfig


@dataclass(frozen=True)
class Hyperparameters:
    """How one stage is trained: AdamW for `steps` steps at learning rate `lr`.

    Each step takes `batch` samples from a pool of `pool` scenes; `ema` is the decay of the
    parameters' exponential moving average, which is what is exported.
    """

    steps: int
    batch: int
    lr: float
    pool: int
    ema: float


@dataclass(frozen=True)
class Recipe:
    """A model's numbers, how its stages are trained, and the weights of their losses.

    text: the vocabulary's size in it is a placeholder; it is known once the tokenizer is made.
    max_weight: cap of the diffusion loss's weight. noisy_share: of the samples, drawn from the
    noisiest quarter of the times instead of from all. layout_weight, summary_weight: of the helper
    losses, beside the diffusion loss. silent_share: of the samples, whose end tokens and pads are
    silenced, so that the words alone must tell. faint_share: of the samples, whose noise is fainter
    than their time says.
    """

    image_size: int
    vae: VAEConfig
    text: CLIPTextConfig
    unet: UNetConfig
    autoencoder: Hyperparameters
    text_encoder: Hyperparameters
    diffusion: Hyperparameters
    kl_weight: float
    max_weight: float
    noisy_share: float
    layout_weight: float
    summary_weight: float
    silent_share: float
    faint_share: float


@dataclass(frozen=True)
class TransformerRecipe:
    """A DiT that learns on latents and texts of the bundled model, whose parts stay as they are.

    The losses' weights and the shares of the samples are a Recipe's.
    """

    dit: DiTConfig
    diffusion: Hyperparameters
    max_weight: float
    noisy_share: float
    layout_weight: float
    silent_share: float
    faint_share: float


@dataclass(frozen=True)
class LabelRecipe:
    """DiTs for labels, by their names, that are trained alike, for the same number of steps."""

    dits: dict[str, DiTConfig]
    how: Hyperparameters
    max_weight: float
    noisy_share: float


def small_dit(layers: int, heads: int, patch: int) -> DiTConfig:
    """A DiT for the 24 labels of `labelled`, heads of 32 channels, with a learned variance."""
    return DiTConfig(
        sample_size=16,
        patch_size=patch,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_embeds_ada_norm=24,
    )


MINIATURE = LabelRecipe(  # one CPU core, about six minutes
    dits={
        "small-4": small_dit(4, 2, 4),
        "small-2": small_dit(4, 2, 2),
        "large-4": small_dit(6, 4, 4),
        "large-2": small_dit(6, 4, 2),
    },
    how=Hyperparameters(steps=500, batch=64, lr=2e-3, pool=6000, ema=0.99),
    max_weight=20.0,
    noisy_share=0.2,
)
SHAPES_DIT = LabelRecipe(  # one CPU core, 80 minutes
    dits={"shapes-dit": small_dit(6, 4, 2)},
    how=Hyperparameters(steps=12_000, batch=64, lr=2e-3, pool=12_000, ema=0.999),
    max_weight=20.0,
    noisy_share=0.2,
)
TRANSFORMER = TransformerRecipe(  # one CPU core, about an hour
    dit=DiTConfig(
        sample_size=16,
        patch_size=2,
        out_channels=4,
        num_layers=6,
        num_attention_heads=3,
        attention_head_dim=64,
        num_embeds_ada_norm=None,
        cross_attention_dim=128,
    ),
    diffusion=Hyperparameters(steps=7000, batch=32, lr=1e-3, pool=24_000, ema=0.999),
    max_weight=100.0,
    noisy_share=0.3,
    layout_weight=1.0,
    silent_share=0.3,
    faint_share=0.0,
)
RECIPES = {
    "small": Recipe(  # two CPU cores, about four hours
        image_size=64,
        vae=VAEConfig(
            block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=64
        ),
        text=CLIPTextConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        ),
        unet=UNetConfig(
            sample_size=16,
            down_block_types=(CROSS_DOWN, CROSS_DOWN),
            up_block_types=(CROSS_UP, CROSS_UP),
            block_out_channels=(80, 160),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=128,
            norm_num_groups=16,
        ),
        autoencoder=Hyperparameters(steps=2600, batch=24, lr=1e-3, pool=20_000, ema=0.99),
        text_encoder=Hyperparameters(steps=2000, batch=48, lr=2e-3, pool=20_000, ema=0.99),
        diffusion=Hyperparameters(steps=12_000, batch=32, lr=1e-3, pool=60_000, ema=0.999),
        kl_weight=1e-5,
        max_weight=100.0,
        noisy_share=0.3,
        layout_weight=1.0,
        summary_weight=0.05,
        silent_share=0.5,
        faint_share=0.6,
    ),
    "large": Recipe(  # one GPU
        image_size=128,
        vae=VAEConfig(
            block_out_channels=(32, 64, 96, 96),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=128,
        ),
        text=CLIPTextConfig(
            hidden_size=160, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4
        ),
        unet=UNetConfig(
            sample_size=16,
            # The third level sees where in the image it is.
            down_block_types=(CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
            up_block_types=(PLAIN_UP, CROSS_UP, CROSS_UP),
            block_out_channels=(80, 128, 128),
            layers_per_block=1,
            attention_head_dim=(2, 2, 2),
            cross_attention_dim=160,
            norm_num_groups=16,
        ),
        autoencoder=Hyperparameters(steps=10_000, batch=64, lr=1e-3, pool=60_000, ema=0.999),
        text_encoder=Hyperparameters(steps=4000, batch=256, lr=1e-3, pool=100_000, ema=0.99),
        diffusion=Hyperparameters(steps=60_000, batch=256, lr=1e-3, pool=200_000, ema=0.9995),
        kl_weight=1e-5,
        max_weight=100.0,
        noisy_share=0.3,
        layout_weight=1.0,
        summary_weight=0.05,
        silent_share=0.5,
        faint_share=0.6,
    ),
}
