"""The CLIP text encoder: a causal transformer whose last hidden states are the UNet's context.

Radford et al. 2021, https://arxiv.org/abs/2103.00020; module names are those of transformers'
CLIPTextModel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import expect
from . import ops
from .config import read_config


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's approximation of the GELU, with which CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


Activation = Literal["quick_gelu", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
}
# Where transformers' defaults are others than the numbers of ViT-L/14.
ABSENT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The numbers of a CLIP text model; the defaults are ViT-L/14's, which SD v1 uses."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: got {self.hidden_act!r}, supported are {', '.join(ACTIVATIONS)}"
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} heads do not divide hidden_size "
                f"{self.hidden_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Read the checkpoint's text_encoder/config.json (a dict).

        The many other keys that transformers writes there (dropout, token ids, generation settings)
        do not enter the last hidden state and are ignored; the token ids of SD v1's file are wrong
        anyway. ValueError for values that do not fit, and for the config of a whole CLIP, whose
        text model is in "text_config".
        """
        if "text_config" in values:
            raise ValueError(
                "this is the config of a whole CLIP; expected that of its text model, its "
                "text_config"
            )
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        return read_config(cls, known, neutral={}, absent=ABSENT)


def embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding(rows, width) with its own initial values, of the default dtype and device.

    On the meta device, which has no values, torch would import sympy and torch._dynamo to draw
    them: a second of each load.
    """
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


class Embeddings(nn.Module):
    """token_embedding[ids] + position_embedding[0..L-1]; embeddings may stand in place of ids."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids if ids.is_floating_point() else self.token_embedding(ids)
        places = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        return tokens + self.position_embedding(places)


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and to those before it. x: (B, L, hidden) -> (B, L, hidden)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            ops.linear(proj, x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, L, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return ops.linear(self.out_proj, out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(self.fc2, self.act(ops.linear(self.fc1, x)))


class EncoderLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalSelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, one after the other. x: (B, L, hidden) -> (B, L, hidden)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextModel(nn.Module):
    """ids (B, L) -> final_layer_norm of the last layer, (B, L, hidden).

    In place of ids, floats (B, L, hidden) are taken for the rows of the token embedding: words that
    its table does not have (textual inversion), or whatever gradients are wanted of. As in Stable
    Diffusion there is no padding mask: pads are attended to like any token. ValueError if L exceeds
    the position embeddings.
    """

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(ids, Tensor) and ids.is_floating_point():
            expect.shape("token embeddings", ids, "B", "L", self.config.hidden_size)
        else:
            expect.shape("token ids", ids, "B", "L")
        if ids.shape[1] > (most := self.config.max_position_embeddings):
            raise ValueError(f"token ids: got {ids.shape[1]} in a row, expected at most {most}")
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))
