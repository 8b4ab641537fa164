"""Attention with gradients: the ops of ops.py where an input needs one.

An edit of the map folds into the values (`ops.fold`), which PyTorch differentiates; what is left
is a sum of products of maps with values, `Terms`, whose backward recomputes the maps
(backward.py). So no map is stored between, and a map that is asked for is a new tensor that
carries gradients (`edited_map`). Gathering keys by kv_row and choosing by own_value are PyTorch's.
The formulas, written out: reference.cross_attention_gradients.
"""

import torch
from torch import Tensor

from . import checks, ops, reference
from .dispatch import call
from .reference import all_heads


class Terms(torch.autograd.Function):
    """P V, and in the last S rows P_own V + P_source V_source.

        P = softmax(scale q k^T + bias)

    q: (B, H, N, D); k: (B, H, L, D); v: (B, H, L, DV); v_source: (S, H, L, DV) or None;
    source_row: (S,) or None; bias: (S, H, N, L) or what broadcasts to it, or None. Without
    v_source a row that source_row routes has the other row's map only. Maps are formed and
    thrown away in PyTorch if `formed`, which takes any DV; otherwise the kernels compute.
    """

    @staticmethod
    def forward(q, k, v, v_source, source_row, bias, scale, formed):
        if formed:
            return formed_terms(q, k, v, v_source, source_row, bias, scale)
        if v_source is None:
            return one_term(q, k, v, source_row, bias, scale)
        first = q.shape[0] - v_source.shape[0]
        own = one_term(q, k, v, None, bias, scale)
        own[first:] += one_term(q[first:], k[first:], v_source, source_row, bias, scale)
        return own

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out):
        grads = gradients_of(ctx, grad_out, *ctx.saved_tensors, None, False)
        return *grads, None, None, None, None


def one_term(q, k, v, source_row, bias, scale) -> Tensor:
    """P V, of the map of row source_row in the last rows: one launch."""
    if k.shape[2] <= checks.MAX_KEYS:
        tables = (None,) * 4  # inject too
        return call("cross_attention", q, k, v, source_row, *tables, bias, scale)
    return call("attention", q, k, v, source_row, bias, None, None, scale, False)


class WithLse(torch.autograd.Function):
    """ops.attention with lse or is_causal: P V of one term a row, `Terms` without v_source."""

    @staticmethod
    def forward(q, k, v, source_row, bias, scale, is_causal):
        return call("attention_lse", q, k, v, source_row, bias, None, None, scale, is_causal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.is_causal = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, source_row, bias = ctx.saved_tensors
        tensors = (q, k, v, None, source_row, bias)
        q, k, v, _ = gradients_of(ctx, grad_out, *tensors, grad_lse, ctx.is_causal)
        return q, k, v, None, None, None, None


def gradients_of(ctx, grad_out, q, k, v, v_source, source_row, bias, grad_lse, is_causal):
    """The gradients of q, k, v and v_source; RuntimeError for those that there are not."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        what = "the Triton kernels have no second derivatives, nor torch.func's first"
        raise RuntimeError(f"{what}; use impl='sdpa'")
    if bias is not None and bias.requires_grad:
        raise RuntimeError("bias: the Triton kernels have no gradient of it; use impl='sdpa'")
    tensors = (grad_out, q, k, v, v_source, source_row, bias, grad_lse)
    *grads, of_source = call("attention_backward", *tensors, ctx.scale, is_causal)
    return *grads, None if v_source is None else of_source


def formed_terms(q, k, v, v_source, source_row, bias, scale) -> Tensor:
    """`Terms` by maps in memory, for values of any width."""
    first = q.shape[0] - next((x.shape[0] for x in (source_row, bias) if x is not None), 0)
    plain = reference.attention_map(q[:first], k[:first], scale=scale) @ v[:first]
    own = reference.attention_map(q[first:], k[first:], bias, scale)
    source = own if source_row is None else own[source_row.long()]
    edited = source @ v[first:] if v_source is None else own @ v[first:] + source @ v_source
    return torch.cat([plain, edited])


def attention(
    q, k, v, *, source_row, bias, kv_row, own_value, scale, is_causal, return_lse
) -> Tensor | tuple[Tensor, Tensor]:
    """ops.attention, differentiable."""
    check = checks.check_attention_lse if return_lse else checks.check_attention
    check(q, k, v, source_row, bias, kv_row, own_value, scale, is_causal)
    k, v = all_heads(k, q.shape[1]), all_heads(v, q.shape[1])

    def attend(q, k, v, source_row, bias):
        if return_lse or is_causal:
            return WithLse.apply(q, k, v, source_row, bias, scale, is_causal)
        return Terms.apply(q, k, v, None, source_row, bias, scale, False), None

    if kv_row is None:
        out, lse = attend(q, k, v, source_row, bias)
    else:  # other numbers of keys in edited rows than in the rest
        first = q.shape[0] - kv_row.shape[0]
        keys, values = (reference.joined(x[first:], kv_row) for x in (k, v))
        out, lse = attend(q[first:], keys, values, source_row, bias)
        if first:
            plain = attend(q[:first], k[:first], v[:first], None, None)
            out = torch.cat([plain[0], out])
            lse = torch.cat([plain[1], lse]) if return_lse else None
    out = with_own_values(out, v, own_value)
    return (out, lse) if return_lse else out


def with_own_values(out: Tensor, v: Tensor, own_value: Tensor | None) -> Tensor:
    """out, or v in the rows whose own_value is not 0."""
    if own_value is None:
        return out
    first = out.shape[0] - own_value.shape[0]
    edited = torch.where((own_value != 0)[:, None, None, None], v[first:], out[first:])
    return torch.cat([out[:first], edited])


def cross_attention(
    q, k, v, *, source_row, inject, token_map, blend, reweight, bias, save, save_mean, scale
) -> Tensor:
    """ops.cross_attention, differentiable."""
    tables = (token_map, blend, reweight)
    checks.check_cross_attention(q, k, v, source_row, inject, *tables, bias, save, save_mean, scale)
    if save is not None or save_mean is not None:  # in place, so that the buffer carries gradients
        rows = (save if save is not None else save_mean).shape[0]
        edit = dict(source_row=source_row, inject=inject, token_map=token_map, blend=blend)
        p = edited_map(q, k, rows, **edit, reweight=reweight, bias=bias, scale=scale)
        if save is not None:
            save.copy_(p)
        if save_mean is not None:
            save_mean.add_(p.float().mean(dim=1))
    k, v = all_heads(k, q.shape[1]), all_heads(v, q.shape[1])
    S = next((x.shape[0] for x in (source_row, inject, *tables) if x is not None), 0)
    first = q.shape[0] - S
    has_source = source_row is not None or inject is not None
    v_own, v_source = ops.fold(v[first:], has_source, *tables)

    def whole(edited):
        """The values of all rows."""
        return torch.cat([v[:first], edited]) if any(x is not None for x in tables) else v

    if inject is None:
        terms = (whole(v_source), None) if v_own is None else (whole(v_own), v_source)
        return Terms.apply(q, k, *terms, source_row, bias, scale, False)
    stored = inject.to(v.dtype) @ v_source  # its product is linear in it
    if v_own is not None:
        own = Terms.apply(q, k, whole(v_own), None, None, bias, scale, False)
        return torch.cat([own[:first], own[first:] + stored])
    if not first:
        return stored
    plain = Terms.apply(q[:first], k[:first], v[:first], None, None, None, scale, False)
    return torch.cat([plain, stored])


def edited_map(
    q, k, rows, *, source_row, inject, token_map, blend, reweight, bias, scale
) -> Tensor:
    """ops.edited_map: P' = P_own A_own + P_source A_source, where A is what folding makes of the
    identity."""
    edit = (source_row, inject, token_map, blend, reweight)
    checks.check(q, k, k, *edit, bias=bias)
    k = all_heads(k, q.shape[1])
    sizes = [x.shape[0] for x in (*edit, bias) if x is not None] + [
        q.shape[0] if rows is None else rows
    ]
    S = sizes[0]
    q, k = q[q.shape[0] - S :], k[k.shape[0] - S :]
    (_, H, _, _), L = q.shape, k.shape[2]
    identity = torch.eye(L, dtype=q.dtype, device=q.device).expand(S, H, L, L)
    own, source = ops.fold(
        identity, source_row is not None or inject is not None, token_map, blend, reweight
    )
    if source_row is not None:
        values = (source, None) if own is None else (own, source)
        return Terms.apply(q, k, *values, source_row, bias, scale, True)
    p = None if own is None else Terms.apply(q, k, own, None, None, bias, scale, True)
    if inject is None:
        return p
    stored = inject.to(q.dtype) @ source
    return stored if p is None else p + stored
