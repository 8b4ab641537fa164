"""DiT as its paper and its published code have it, written again: one function for each formula,
parameters taken by name from a state dict, in float64. And pairs with diffusers' model.

Nothing of minisd is used here. https://github.com/facebookresearch/DiT, models.py.
"""

import math

import torch
from diffusers import DiTTransformer2DModel
from tiny import randomise

KINDS = ("adaln_zero", "adaln", "in_context", "cross_attention")


def frequencies(t):
    """TimestepEmbedder.timestep_embedding: cos, then sin, of t 10000^(-i / 128).

    The angles in float32, as the published code has them: up to 999 they lose the last digits.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128)
    angles = (t[:, None].float() * freqs).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def place(h, w, d):
    """get_2d_sincos_pos_embed: (h * w, d), half of the channels of the column, half of the row."""
    table = torch.zeros(h, w, d, dtype=torch.float64)
    q = d // 4
    for y in range(h):
        for x in range(w):
            for half, at in enumerate((x, y)):
                for i in range(q):
                    angle = at / 10000 ** (i / q)
                    table[y, x, 2 * half * q + i] = math.sin(angle)
                    table[y, x, (2 * half + 1) * q + i] = math.cos(angle)
    return table.reshape(h * w, d)


def ln(x, weight=None, bias=None, eps=1e-6):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight + bias


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Published:
    """The published network on the weights of a state dict of minisd's DiT."""

    def __init__(self, state, config):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.config = config

    def linear(self, name, x):
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def norm(self, name, x):
        return ln(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attention(self, name, x, context):
        heads = self.config.num_attention_heads
        q, k, v = (
            self.linear(f"{name}.to_{which}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for which, y in (("q", x), ("k", context), ("v", context))
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(f"{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(self, name, x):
        return self.linear(f"{name}.net.2", gelu(self.linear(f"{name}.net.0.proj", x)))

    def block(self, name, x, c, context):
        kind = self.config.conditioning
        if kind in ("adaln_zero", "adaln"):
            parts = self.linear(f"{name}.norm1.linear", silu(c))[:, None].chunk(
                6 if kind == "adaln_zero" else 4, -1
            )
            if kind == "adaln":
                one = torch.ones_like(parts[0])
                parts = (*parts[:2], one, *parts[2:], one)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            h = ln(x) * (1 + scale1) + shift1
            x = x + gate1 * self.attention(f"{name}.attn1", h, h)
            if context is not None:  # a text: minisd's own
                x = x + self.attention(f"{name}.attn2", ln(x), context)
            return x + gate2 * self.mlp(f"{name}.ff", ln(x) * (1 + scale2) + shift2)
        h = self.norm(f"{name}.norm1", x)
        x = x + self.attention(f"{name}.attn1", h, h)
        if context is not None:
            x = x + self.attention(f"{name}.attn2", self.norm(f"{name}.norm2", x), context)
        return x + self.mlp(f"{name}.ff", self.norm(f"{name}.norm3", x))

    def __call__(self, x, t, labels=None, text=None):
        config, p = self.config, self.config.patch_size
        B, C, h, w = x.shape
        patches = x.double().reshape(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        weight = self.state["pos_embed.proj.weight"].flatten(1)
        tokens = patches.reshape(B, -1, C * p * p) @ weight.T + self.state["pos_embed.proj.bias"]
        tokens = tokens + place(h // p, w // p, config.width)
        time = silu(self.linear("timestep_embedder.linear_1", frequencies(t)))
        time = self.linear("timestep_embedder.linear_2", time)
        c, context = time, None if text is None else text.double()
        if labels is not None:
            label = self.state["class_embedder.embedding_table.weight"][labels]
            c = time + label
            if config.conditioning == "in_context":
                tokens = torch.cat([tokens, time[:, None], label[:, None]], dim=1)
            if config.conditioning == "cross_attention":
                context = torch.stack([time, label], dim=1)
        for i in range(config.num_layers):
            tokens = self.block(f"transformer_blocks.{i}", tokens, c, context)
        tokens = tokens[:, : h // p * (w // p)]
        if config.conditioning in ("adaln_zero", "adaln"):
            shift, scale = self.linear("proj_out_1", silu(c))[:, None].chunk(2, -1)
            tokens = ln(tokens) * (1 + scale) + shift
        else:
            tokens = self.norm("norm_out", tokens)
        out = self.linear("proj_out_2", tokens).reshape(B, h // p, w // p, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(B, -1, h, w)


def multiply_adds(config, h, w):
    """Of one call for one latent of h x w, by the formula: in each block 4 d^2 of attention and 8
    d^2 of the MLP for each token, 2 T d for its scores and values, and once the 6 d^2 of what the
    norms are made of; at the ends the embedding of each patch, what it becomes, and its norm's 2
    d^2; and the time's two layers."""
    d, p = config.width, config.patch_size
    T = (h // p) * (w // p)
    blocks = config.num_layers * (T * (12 * d * d + 2 * T * d) + 6 * d * d)
    ends = T * d * p * p * (config.in_channels + config.out_channels) + 2 * d * d
    return blocks + ends + 256 * d + d * d


def diffusers_pair(seed=0, **config):
    """A random DiT of diffusers, the embedders in its blocks alike; its tensors by our names."""
    reference = randomise(DiTTransformer2DModel(**config), seed)
    first = reference.transformer_blocks[0].norm1.emb.state_dict()
    for block in reference.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    state, emb = {}, ".norm1.emb."
    for name, tensor in reference.state_dict().items():
        state[name.partition(emb)[2] if emb in name else name] = tensor
    return reference, state
