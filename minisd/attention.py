"""Attention with edits as data, and the choice of the code that computes it."""

import torch.nn.functional as F
from torch import nn

IMPLEMENTATIONS = ("triton", "sdpa", "reference")


def attention(q, k, v, edit=None, impl="sdpa"):
    """softmax(q k^T / sqrt(head_dim)) v.  q: (B, H, N, D), k, v: (B, H, L, D) -> (B, H, N, D)."""
    if edit is not None or impl != "sdpa":
        raise NotImplementedError("edits and the other implementations follow")
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention; keys and values come from x itself or were projected beforehand.

    q = to_q(x), (k, v) = project(context), out = to_out(attention(q, k, v)).
    x: (B, N, channels); `context_channels` is the width that to_k and to_v take (None: channels, self-attention).
    Module names are diffusers'. `name` is the site name, `impl` the code that computes (see `attention`).
    """

    name = None
    impl = "sdpa"

    def __init__(self, channels, heads, context_channels=None, qkv_bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, because the checkpoint says to_out.0

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, H*D) -> (B, H, N, D), a view

    def project(self, context):
        """(B, L, context_channels) -> k, v, each (B, H, L, D)."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def forward(self, x, kv=None, edit=None):
        """x: (B, N, channels), kv: what `project` gave (None: self-attention), edit: AttentionEdit or None."""
        q = self.split_heads(self.to_q(x))
        k, v = self.project(x) if kv is None else kv
        out = attention(q, k, v, edit, self.impl)
        return self.to_out[0](out.transpose(1, 2).flatten(-2))
