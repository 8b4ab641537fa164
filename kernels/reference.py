"""The eager oracle of the ops: the formulas, term by term, in plain PyTorch.

Same argument names as in `ops.py` and `fused.py`, any float dtype (float64 included), any device, differentiable.
Every map is materialised, so this is slow and large on purpose: it exists to be read, and to be compared with.

Sources: Vaswani et al. 2017 (attention), Hertz et al. 2022 (prompt-to-prompt: replace, refine, reweight), Wu and He
2018 (GroupNorm), Ba et al. 2016 (LayerNorm), Shazeer 2020 (GEGLU).
"""

import torch
from torch import Tensor


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """P = softmax(q k^T / sqrt(head_dim)): (batch, heads, queries, keys)."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)


def routed(x: Tensor, source_row: Tensor) -> Tensor:
    """x with its last S rows replaced by the rows that `source_row` names; it counts within those S rows."""
    last = x[x.shape[0] - source_row.shape[0] :]
    return torch.cat([x[: x.shape[0] - source_row.shape[0]], last[source_row.long()]])


def attention(q: Tensor, k: Tensor, v: Tensor, source_row: Tensor | None = None) -> Tensor:
    """Attention; the last S rows may take the map of another row: out[b] = P[row[b]] v[b].

    q: (batch, heads, queries, head_dim); k, v: (batch, heads, keys, head_dim); source_row: (S,) integers in [0, S).
    Returns (batch, heads, queries, head_dim).
    """
    if source_row is not None:
        q, k = routed(q, source_row), routed(k, source_row)
    return attention_map(q, k) @ v


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    source_row: Tensor | None = None,
    inject: Tensor | None = None,
    token_map: Tensor | None = None,
    blend: Tensor | None = None,
    reweight: Tensor | None = None,
    save: Tensor | None = None,
    save_mean: Tensor | None = None,
) -> Tensor:
    """Attention whose map is edited, and optionally saved, in the last S rows of the batch.

        P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

    P_source is the map of row `source_row` (counted within the S rows) or the stored map `inject`. blend None with a
    source means 1; without a source P' = reweight * P_own.

    q: (batch, heads, queries, head_dim); k, v: (batch, heads, keys, head_dim); source_row: (S,); inject: (S, heads,
    queries, keys); token_map: (S, keys, keys), source tokens -> own tokens; blend, reweight: (S, keys); save: (S,
    heads, queries, keys), overwritten with P'; save_mean: (S, queries, keys) float32, += mean of P' over heads.
    Returns (batch, heads, queries, head_dim).
    """
    edits = (source_row, inject, token_map, blend, reweight, save, save_mean)
    rows = next((x.shape[0] for x in edits if x is not None), 0)
    first = q.shape[0] - rows  # rows before this one are left alone
    own = attention_map(q, k)
    p = own[first:]

    source = None
    if source_row is not None:
        source = p[source_row.long()]
    elif inject is not None:
        source = inject.to(p.dtype)
    if source is not None:
        if token_map is not None:
            source = source @ token_map.to(p.dtype)[:, None]
        if blend is None:
            p = source
        else:
            b = blend.to(p.dtype)[:, None, None]
            p = b * source + (1 - b) * p
    if reweight is not None:
        p = reweight.to(p.dtype)[:, None, None] * p

    if save is not None:
        save.copy_(p.detach())
    if save_mean is not None:
        save_mean.add_(p.detach().float().mean(dim=1))
    return torch.cat([own[:first], p]) @ v


def normalised(x: Tensor, dims, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps), mean and var over `dims`."""
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """silu(GroupNorm(x)). x: (batch, channels, height, width); weight, bias: (channels,)."""
    y = normalised(x.unflatten(1, (groups, -1)), (2, 3, 4), eps).flatten(1, 2)
    y = y * weight[:, None, None] + bias[:, None, None]
    return y * torch.sigmoid(y)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: (..., channels); weight, bias: (channels,)."""
    return normalised(x, -1, eps) * weight + bias


def geglu(x: Tensor) -> Tensor:
    """h * gelu(gate), x = [h, gate] along the last dimension, the exact GELU: gelu(g) = g (1 + erf(g / sqrt 2)) / 2."""
    h, gate = x.chunk(2, dim=-1)
    return h * gate * (1 + torch.erf(gate * 2**-0.5)) / 2
