"""The public attention ops, checked in checks.py and computed by the Triton kernels beside.

Importing this module imports torch only; Triton is imported by the first call. The function picks
one of the registered ops (dispatch.py): one that writes to `save` arguments is apart from the pure
one, because an op whose mutated arguments are all None breaks inductor. Gradients are a path of
their own (gradients.py), taken where an input needs one.
"""

import torch
from torch import Tensor

from .checks import DTYPES, MAX_EDITED_KEYS, MAX_KEYS, check
from .dispatch import call, needs_gradient

__all__ = ["MAX_EDITED_KEYS", "MAX_KEYS", "attention", "check", "cross_attention", "edited_map"]


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
    """Flash attention; the last S rows may take the map of another row, or other keys and values.

        out[b] = softmax(scale q k^T + bias)[source_row[b]] v[b]

    No map is ever stored: the kernel reads q and k of row `source_row` (self-attention injection)
    and v of its own. With kv_row, k and v are those of the rows kv_row[b], one after the other; a
    row whose own_value is not 0 has the identity for a map, out = v. is_causal hides from query i
    the keys after i, in all rows; not with kv_row. return_lse: also (batch, heads, queries)
    float32, the logarithm of each softmax's denominator, sum_l exp(scale q k_l + bias_l), of the
    map that a row uses, -inf where every key is hidden; not with own_value.

    q: (batch, heads, queries, D); k, v: (batch, K, keys, D), K a divisor of heads, each for heads /
    K of them in a row; D a multiple of 8 up to 256; float16, bfloat16 or float32, any strides;
    under autocast they are cast to its dtype, as by
    scaled_dot_product_attention. source_row: (S,) int32 or int64 with values in [0, S), counted
    within the last S rows; kv_row: (S, M), likewise. The values are not checked here, that would
    synchronise the device. bias: (S, 1 or heads, 1 or queries, keys), float16, bfloat16 or
    float32, -inf to hide a key; with kv_row over M times the keys. own_value: (S,) float32 or
    bool. scale: above 0, None for 1 / sqrt(D).
    Returns (batch, heads, queries, D) as a view of (batch, queries, heads, D) memory.
    Differentiable in q, k and v, lse too. ValueError: shapes, dtypes, devices. TypeError: a part
    of the edit that is no tensor. RuntimeError: forward-mode derivatives, a gradient of the bias.
    Source: Dao et al. 2022, 2023 (FlashAttention 1 and 2); Hertz et al. 2022 (self-attention
    injection); Cao et al. 2023 (MasaCtrl, kv_row); Ahn et al. 2024 (own_value).
    """
    q, k, v = as_autocast(q, k, v)
    edit = (source_row, bias, kv_row, own_value)
    if needs_gradient(q, k, v, *edit):
        from . import gradients

        names = ("source_row", "bias", "kv_row", "own_value")
        fields = dict(zip(names, edit)) | dict(is_causal=is_causal, return_lse=return_lse)
        return gradients.attention(q, k, v, **fields, scale=scale)
    name = "attention_lse" if return_lse else "attention"
    return call(name, q, k, v, *edit, scale, is_causal)


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
) -> Tensor:
    """Attention over at most 256 keys whose map is edited, and optionally saved, in the last S
    rows.

        P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

    P_own = softmax(scale q k^T + bias). P_source is the map of row `source_row` (counted within
    the S rows), recomputed in the kernel, or the stored map `inject`. blend None with a source
    means 1. Without a source P' = reweight * P_own. One launch whatever the edit; P' reaches
    memory only where a save asks for it. A row whose blend is 0 everywhere costs what one without
    an edit does, and comes out the same.

    q: (batch, heads, queries, D); k, v: (batch, K, keys, D), K a divisor of heads; D a multiple of
    8 up to 256; float16, bfloat16 or float32, any strides; cast under autocast. source_row: (S,)
    int32 or int64, values in [0, S), not checked here. inject: (S, heads, queries, keys).
    token_map: (S, keys, keys) float32, source tokens -> own tokens. blend, reweight: (S, keys) or,
    for single heads, (S, heads, keys), float32. bias: (S, 1 or heads, 1 or queries, keys). save:
    (S, heads, queries, keys), overwritten with P'. save_mean: (S, queries, keys) float32, += mean
    of P' over heads. inject, bias and save may be float16, bfloat16 or float32. Returns (batch,
    heads, queries, D) as a view of (batch, queries, heads, D) memory.

    Differentiable in all but bias; a map that carries gradients is `edited_map`'s. ValueError:
    shapes, dtypes, devices, more than 256 keys (attention takes any number, `impl="sdpa"` of minisd
    edits and saves such maps), two sources, a token_map or blend without a source, save memory that
    overlaps, kv_row or own_value (attention takes them). TypeError: a part of the edit that is no
    tensor. RuntimeError: forward-mode derivatives. Where an input needs a gradient, P' is
    `edited_map`'s and the save buffers, written in place, carry it.
    Source: Hertz et al. 2022 (prompt-to-prompt).
    """
    q, k, v = as_autocast(q, k, v)
    tables = (token_map, blend, reweight)
    if kv_row is not None or own_value is not None:
        name = "own_value" if kv_row is None else "kv_row"
        raise ValueError(
            f"{name}: cross_attention does not take it; attention() does, and "
            "impl='sdpa' takes it with all else"
        )
    if needs_gradient(q, k, v, source_row, inject, *tables, bias, save, save_mean):
        from . import gradients

        edit = dict(source_row=source_row, inject=inject, bias=bias, save=save, save_mean=save_mean)
        edit |= dict(token_map=token_map, blend=blend, reweight=reweight)
        return gradients.cross_attention(q, k, v, **edit, scale=scale)
    if save is not None or save_mean is not None:
        edit = (source_row, inject, *tables, bias, save, save_mean)
        return call("cross_attention_save", q, k, v, *edit, scale)
    return call("cross_attention", q, k, v, source_row, inject, *tables, bias, scale)


def edited_map(
    q: Tensor,
    k: Tensor,
    *,
    rows: int | None = None,
    source_row: Tensor | None = None,
    inject: Tensor | None = None,
    token_map: Tensor | None = None,
    blend: Tensor | None = None,
    reweight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """P' of cross_attention as a new tensor that carries gradients: what a save holds under them.

    Arguments as in cross_attention; rows: how many of the last rows where no tensor says so
    (None: all). Returns (S, heads, queries, keys) in q's dtype. The map is formed in PyTorch, as
    it is the result; its gradients recompute it, so that none is kept for them.
    """
    from . import gradients

    q, k = as_autocast(q, k)
    edit = dict(source_row=source_row, inject=inject, token_map=token_map, blend=blend)
    return gradients.edited_map(q, k, rows, **edit, reweight=reweight, bias=bias, scale=scale)


def fold(
    v: Tensor,
    has_source: bool,
    token_map: Tensor | None,
    blend: Tensor | None,
    reweight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(V_own, V_source) such that the edited output is P_own V_own + P_source V_source; None: zero.

        V_own = (1 - blend) * reweight * V;   V_source = token_map @ (blend * reweight * V)

    Exact, because the edit is linear in both maps. v: (S, heads, keys, D), the rows that are
    edited; the result has its dtype and is computed in float32 at least. blend, reweight: (S,
    keys) or (S, heads, keys). For what has no map to edit: minisd's impl="sdpa", and the gradients.
    """
    x = v if v.dtype == torch.float64 else v.float()
    heads = [table.shape[1] for table in (blend, reweight) if table is not None and table.ndim == 3]
    if heads and heads[0] != v.shape[1]:  # fewer key heads than the tables have
        x = x.repeat_interleave(heads[0] // v.shape[1], 1)
    if reweight is not None:
        x = as_column(reweight) * x
    if not has_source:
        return x.to(v.dtype), None
    own = None
    if blend is not None:
        own = ((1 - as_column(blend)) * x).to(v.dtype)
        x = as_column(blend) * x
    if token_map is not None:
        x = token_map[:, None].to(x.dtype) @ x
    return own, x.to(v.dtype)


def as_column(table: Tensor) -> Tensor:
    """(S, keys) or (S, heads, keys) as (S, 1 or heads, keys, 1)."""
    return table[:, None, :, None] if table.ndim == 2 else table[..., None]


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast that is on, as scaled_dot_product_attention takes
    them."""
    if not torch._C._is_any_autocast_enabled():  # a tenth of the time of asking for the device
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in DTYPES else x for x in tensors)
