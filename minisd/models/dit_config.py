"""The numbers of a DiT: its config, as its files hold it, and the published sizes.

Peebles and Xie 2022, https://arxiv.org/abs/2212.09748, table 1.
"""

from dataclasses import dataclass
from typing import Any, Literal

from .config import read_config

Conditioning = Literal["adaln_zero", "adaln", "in_context", "cross_attention"]
# Options of diffusers' model, with the one value that is DiT.
NEUTRAL = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
# Where diffusers' defaults are others than the fields'.
ABSENT = {"out_channels": 4}
HARMLESS = ("norm_num_groups",)


@dataclass(frozen=True)
class DiTConfig:
    """The numbers of a DiT; the defaults are those of DiT-XL/2 for images of 256 x 256.

    out_channels: twice in_channels with a learned variance. num_embeds_ada_norm: the number of
    labels, or else cross_attention_dim: the width of a text that each block attends to; the other
    is None. conditioning: how time and label enter, see `Block`. The names are diffusers'.
    """

    sample_size: int | tuple[int, int] | None = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_embeds_ada_norm: int | None = 1000
    cross_attention_dim: int | None = None
    conditioning: Conditioning = "adaln_zero"
    compat: Literal["published", "diffusers"] = "published"

    def __post_init__(self) -> None:
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            expected = f"{self.in_channels}, or {2 * self.in_channels} with a learned variance"
            raise ValueError(f"out_channels: got {self.out_channels}, expected {expected}")
        if self.width % 4:  # half of them for each side, half of these sines
            raise ValueError(f"the width is {self.width}, expected a multiple of 4")
        text, labels = self.cross_attention_dim, self.num_embeds_ada_norm
        if (text is None) == (labels is None):
            got = f"cross_attention_dim {text} and num_embeds_ada_norm {labels}"
            raise ValueError(f"got {got}, expected one condition: a text or labels")
        if text is not None and not self.modulates:
            got = f"conditioning is {self.conditioning!r} of a text"
            raise ValueError(f"{got}, expected 'adaln_zero' or 'adaln'")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiTConfig":
        """Read the checkpoint's transformer/config.json. ValueError for maths that DiT has not."""
        return read_config(cls, values, NEUTRAL, ABSENT, HARMLESS)

    @property
    def width(self) -> int:
        """d, the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def modulates(self) -> bool:
        """Whether time and label enter through the norms."""
        return self.conditioning in ("adaln_zero", "adaln")

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels


SIZES = {  # name -> layers, heads, head dim: table 1 of the paper
    "S": (12, 6, 64),
    "B": (12, 12, 64),
    "L": (24, 16, 64),
    "XL": (28, 16, 72),
}


def named_config(name: str, **others: Any) -> DiTConfig:
    """The config of a published size: "XL/2" is size XL with patches of 2 x 2."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal():
        raise ValueError(f"got {name!r}, expected one of {', '.join(SIZES)} and a patch: XL/2")
    layers, heads, head_dim = SIZES[size]
    return DiTConfig(
        patch_size=int(patch),
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        **others,
    )
