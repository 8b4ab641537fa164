"""The eager oracle of the ops: the formulas, term by term, in plain PyTorch.

Same argument names as in `ops.py` and `fused.py`, any float dtype (float64 included), any device,
differentiable. Every map is materialised, so this is slow and large on purpose: it exists to be
read, and to be compared with.

Sources: Vaswani et al. 2017 (attention), Hertz et al. 2022 (prompt-to-prompt: replace, refine,
reweight), Wu and He 2018 (GroupNorm), Ba et al. 2016 (LayerNorm), Shazeer 2020 (GEGLU).
"""

import torch
from torch import Tensor


def scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """scale q k^T + bias: (batch, heads, queries, keys); scale None: 1 / sqrt(head_dim).

    bias: anything that broadcasts to that, -inf to hide a key; is_causal hides from query i the
    keys after i.
    """
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias.to(s.dtype)
    if is_causal:
        later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(later, float("-inf"))
    return s


def attention_map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """P = softmax(scores): (batch, heads, queries, keys).

    A query from which every key is hidden attends to nothing: its row of P is 0, as in PyTorch's
    scaled_dot_product_attention.
    """
    s = scores(q, k, bias, scale, is_causal)
    if bias is None:
        return torch.softmax(s, dim=-1)
    nothing = (s == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(nothing, 0), dim=-1).masked_fill(nothing, 0)


def all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values with each head repeated for as many heads of q as it serves."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def routed(x: Tensor, source_row: Tensor) -> Tensor:
    """x with its last S rows replaced by the rows that `source_row` names; it counts within those S
    rows."""
    last = x[x.shape[0] - source_row.shape[0] :]
    return torch.cat([x[: x.shape[0] - source_row.shape[0]], last[source_row.long()]])


def joined(x: Tensor, kv_row: Tensor) -> Tensor:
    """The rows that `kv_row` (S, M) names, one after the other along the tokens: (S, heads, M *
    tokens, head_dim).

    x: (S, heads, tokens, head_dim), the keys or values of the S rows within which kv_row counts.
    """
    return x[kv_row.long()].transpose(1, 2).flatten(2, 3)


def per_head(table: Tensor) -> Tensor:
    """blend or reweight, (S, keys) or (S, heads, keys), as (S, 1 or heads, 1, keys)."""
    return table[:, None, None] if table.ndim == 2 else table[:, :, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_row: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    kv_row: Tensor | None = None,
    own_value: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention; the last S rows may take the map of another row: out[b] = P[row[b]] v[b].

    q: (batch, heads, queries, head_dim); k, v: (batch, K, keys, head_dim), K a divisor of heads;
    source_row: (S,) integers in [0, S); is_causal: query i sees the keys up to i, in all rows;
    bias, kv_row, own_value, scale: as in cross_attention. Returns (batch, heads, queries,
    head_dim), and with return_lse also lse = log(sum_l exp(scores_l)) of the map that each row
    uses, (batch, heads, queries).
    """
    edit = dict(source_row=source_row, bias=bias, kv_row=kv_row)
    out = cross_attention(q, k, v, **edit, own_value=own_value, scale=scale, is_causal=is_causal)
    if not return_lse:
        return out
    k = all_heads(k, q.shape[1])
    first = q.shape[0] - next((len(x) for x in edit.values() if x is not None), 0)
    keys = k[first:] if kv_row is None else joined(k[first:], kv_row)
    lse = scores(q[first:], keys, bias, scale, is_causal).logsumexp(-1)
    if source_row is not None:
        lse = lse[source_row.long()]
    plain = scores(q[:first], k[:first], None, scale, is_causal).logsumexp(-1)
    return out, torch.cat([plain, lse])


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
    bias: Tensor | None = None,
    kv_row: Tensor | None = None,
    own_value: Tensor | None = None,
    save: Tensor | None = None,
    save_mean: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention whose map is edited, and optionally saved, in the last S rows of the batch.

        P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

    P_own = softmax(scale q k^T + bias), with the keys (and V with the values) of the rows kv_row,
    one after the other, in place of the row's own. P_source is the P_own of row `source_row`
    (counted within the S rows) or the stored map `inject`. blend None with a source means 1;
    without a source P' = reweight * P_own. Last of all, a row whose own_value is not 0 has the
    identity for a map, out = V: chosen, not multiplied, because 0 times -inf is NaN.

    q: (batch, heads, queries, head_dim); k, v: (batch, K, keys, head_dim), K a divisor of heads, of
    which each serves heads / K in a row. is_causal: as in attention. kv_row: (S, M) integers in [0,
    S); L below is M times the keys. source_row: (S,); inject: (S, heads, queries, L); token_map:
    (S, L, L), source tokens -> own tokens; blend, reweight: (S, L), or (S, heads, L) for single
    heads; bias: (S, 1 or heads, 1 or queries, L); own_value: (S,), where there are as many keys as
    queries; save: (S, heads, queries, L), overwritten with P'; save_mean: (S, queries, L) float32,
    += mean of P' over heads. Returns (batch, heads, queries, head_dim).
    """
    edits = (
        source_row,
        inject,
        token_map,
        blend,
        reweight,
        bias,
        kv_row,
        own_value,
        save,
        save_mean,
    )
    first = q.shape[0] - next(
        (x.shape[0] for x in edits if x is not None), 0
    )  # rows before this one are left alone
    k, v = all_heads(k, q.shape[1]), all_heads(v, q.shape[1])
    plain = attention_map(q[:first], k[:first], None, scale, is_causal) @ v[:first]
    if first == q.shape[0]:
        return plain
    q, k, v = q[first:], k[first:], v[first:]
    own_keys, own_values = (k, v) if kv_row is None else (joined(k, kv_row), joined(v, kv_row))
    p = attention_map(q, own_keys, bias, scale, is_causal)

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
            b = per_head(blend).to(p.dtype)
            p = b * source + (1 - b) * p
    if reweight is not None:
        p = per_head(reweight).to(p.dtype) * p
    out = p @ own_values
    if own_value is not None:
        is_own = (own_value != 0)[:, None, None, None]
        out = torch.where(is_own, v, out)
        if save is not None or save_mean is not None:
            p = torch.where(is_own, torch.eye(p.shape[-1], dtype=p.dtype, device=p.device), p)

    if save is not None:  # in place, so that under gradients the buffer carries them
        save.copy_(p)
    if save_mean is not None:
        save_mean.add_(p.float().mean(dim=1))
    return torch.cat([plain, out])


def cross_attention_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    source_row: Tensor | None = None,
    inject: Tensor | None = None,
    token_map: Tensor | None = None,
    blend: Tensor | None = None,
    reweight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    grad_map: Tensor | None = None,
    grad_mean: Tensor | None = None,
) -> dict[str, Tensor]:
    """The gradients of `cross_attention`, written out: what its fused backward computes without a
    map in memory.

    grad_out: dL/d out; grad_map: dL/dP', of a saved map; grad_mean: dL/d(mean of P' over heads). r:
    reweight, b: blend, M: token_map.

        dP' = dO V^T + dMap + dMean / heads
        dP_own = (1 - b) r dP';   dP_source = (b r dP') M^T
        dS_t = P_t (dP_t - delta_t),   delta_t = rowsum(P_t dP_t),   for each of the two terms t
        dQ = scale dS K;   dK = scale dS^T Q;   dV = r [(1 - b) P_own^T dO + b M^T P_source^T dO]

    A row's dS is the sum over its own term and over those of all rows that take its map. The edit's
    own tensors follow from P' as it is defined. Returns the gradient of every tensor that was
    given, by its name.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    edits = (source_row, inject, token_map, blend, reweight, bias)
    S = next(
        (x.shape[0] for x in edits if x is not None), 0 if grad_map is None else grad_map.shape[0]
    )
    S = S or (0 if grad_mean is None else grad_mean.shape[0])
    first, heads = q.shape[0] - S, q.shape[1]

    def last(x):
        return x[first:]

    maps = (
        attention_map(q[:first], k[:first], scale=scale),
        attention_map(last(q), last(k), bias, scale),
    )
    d_map = grad_out @ v.mT  # (batch, heads, queries, keys)
    d = last(d_map)
    if grad_map is not None:
        d = d + grad_map
    if grad_mean is not None:
        d = d + grad_mean[:, None] / heads

    own, ones = maps[1], q.new_ones(1, 1, 1, k.shape[2])
    source = own[source_row.long()] if source_row is not None else inject
    r = ones if reweight is None else per_head(reweight)
    b = per_head(blend) if blend is not None else ones if source is not None else 0 * ones
    if source is None:
        source = torch.zeros_like(own)
    M = (torch.diag_embed(ones[0]) if token_map is None else token_map[:, None]).to(q.dtype)

    def through_softmax(p, dp):
        return p * (dp - (p * dp).sum(-1, keepdim=True))

    d_own, d_source = (1 - b) * r * d, (b * r * d) @ M.mT
    ds = through_softmax(own, d_own)
    if source_row is not None:
        rows = torch.arange(S, dtype=torch.int64, device=q.device)
        takes = source_row == rows[:, None]  # (row, taker): whether it takes the row's map
        ds = ds + torch.einsum(
            "rt,thnl->rhnl", takes.to(q.dtype), through_softmax(source, d_source)
        )
    ds_all = torch.cat([through_softmax(maps[0], d_map[:first]), ds])
    d_own_values, d_source_values = own.mT @ last(grad_out), source.mT @ last(grad_out)
    d_v = r.mT * ((1 - b).mT * d_own_values + b.mT * (M.mT @ d_source_values))

    moved = source @ M
    gradients = {
        "q": scale * ds_all @ k,
        "k": scale * ds_all.mT @ q,
        "v": torch.cat([maps[0].mT @ grad_out[:first], d_v]),
    }
    if inject is not None:
        gradients["inject"] = d_source
    if token_map is not None:
        gradients["token_map"] = (source.mT @ (b * r * d)).sum(1)
    if blend is not None:
        gradients["blend"] = summed_like(blend, r * (moved - own) * d)
    if reweight is not None:
        gradients["reweight"] = summed_like(reweight, (b * moved + (1 - b) * own) * d)
    if bias is not None:
        gradients["bias"] = ds.sum_to_size(bias.shape)
    return gradients


def summed_like(table: Tensor, x: Tensor) -> Tensor:
    """The gradient of a table that `per_head` has broadcast to x, (S, heads, queries, keys)."""
    return x.sum(2) if table.ndim == 3 else x.sum((1, 2))


def normalised(x: Tensor, dims, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps), mean and var over `dims`."""
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm(x + shift). x: (batch, channels, height, width); weight, bias: (channels,); shift:
    (rows, channels), row b % rows of image b."""
    if shift is not None:
        x = x + shift.repeat(len(x) // len(shift), 1)[:, :, None, None]
    y = normalised(x.unflatten(1, (groups, -1)), (2, 3, 4), eps).flatten(1, 2)
    return y * weight[:, None, None] + bias[:, None, None]


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x, groups, weight, bias, eps, shift))."""
    y = group_norm(x, groups, weight, bias, eps, shift)
    return y * torch.sigmoid(y)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: (..., channels); weight, bias: (channels,)."""
    return normalised(x, -1, eps) * weight + bias


def add_layer_norm(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x + h and LayerNorm of it."""
    return x + h, layer_norm(x + h, weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """h * gelu(gate), x = [h, gate] along the last dimension, the exact GELU: gelu(g) = g (1 +
    erf(g / sqrt 2)) / 2."""
    h, gate = x.chunk(2, dim=-1)
    return h * gate * (1 + torch.erf(gate * 2**-0.5)) / 2
