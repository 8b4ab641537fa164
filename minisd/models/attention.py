"""Attention with edits as data, and the choice of the code that computes it.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

An edit is a value, an `AttentionEdit`, that reaches this function as an argument: nothing is
patched or called back. Source: Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross
Attention Control".
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from minisd_kernels import ops, reference
from torch import Tensor, nn

IMPLEMENTATIONS = ("triton", "sdpa", "reference")


class AttentionEdit(NamedTuple):
    """What to change and what to save at one attention site in one step; None switches a part off.

    Every tensor has S rows, S <= R, and addresses the last S of the R rows of the batch (guidance
    groups are group-major with the conditional group last). H heads, N queries, L keys, D head_dim.
    The sources are source_row, inject and inject_qk, at most one of them; token_map and blend need
    one.
    """

    source_row: Tensor | None = (
        None  # (S,) int     take the map of this row, counted within the S rows (arange: own)
    )
    inject: Tensor | None = None  # (S, H, N, L) or take this stored map
    inject_qk: tuple[Tensor, Tensor] | None = (
        None  # 2 x (S, H, N or L, D) or the map of this stored q, k
    )
    token_map: Tensor | None = (
        None  # (S, L, L) float32  source tokens -> own tokens: P_source @ token_map
    )
    blend: Tensor | None = (
        None  # (S, L) float32  0 keep the own column, 1 take the source's; None with a source: 1
    )
    reweight: Tensor | None = (
        None  # (S, L) float32  scale columns after the softmax, no renormalisation
    )
    save: Tensor | None = None  # (S, H, N, L)  out: the map, as used
    save_mean: Tensor | None = (
        None  # (S, N, L) float32  out: += mean over heads of the map, as used
    )
    save_qk: tuple[Tensor, Tensor] | None = (
        None  # 2 x (S, H, N or L, D)  out: own q and k, which inject_qk takes
    )

    def check_rows(self) -> "AttentionEdit":
        """Self, or ValueError if source_row, or a table (..., S) of it, names a row outside [0, S).

        It reads values, so it is called once, where an edit is built, and never in the loop over
        the steps.
        """
        if self.source_row is not None:
            S = self.source_row.shape[-1]
            wrong = self.source_row[(self.source_row < 0) | (self.source_row >= S)].tolist()
            if wrong:
                raise ValueError(f"source_row: expected values from 0 to {S - 1}, got {wrong}")
        return self


def attention(
    q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit | None = None, impl: str = "sdpa"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, with the map edited as `edit` says.

    q: (R, H, N, D), k, v: (R, H, L, D) -> (R, H, N, D). impl: "triton", the kernels of
    minisd_kernels, CUDA and inference only; "sdpa", PyTorch's scaled_dot_product_attention,
    anywhere and differentiable; "reference", the formula in eager PyTorch. ValueError for an
    unknown impl and for shapes, dtypes or devices that do not fit; RuntimeError for "triton" under
    autograd.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if edit is None:
        return plain(q, k, v, impl)
    check(q, k, v, edit)
    R, L = q.shape[0], k.shape[2]

    if edit.save_qk is not None:
        for buffer, x in zip(edit.save_qk, (q, k)):
            buffer.copy_(x[R - buffer.shape[0] :].detach())
    edit = edit._replace(save_qk=None)
    saves = edit.save is not None or edit.save_mean is not None
    if edit.inject_qk is not None:
        if edit.token_map is None and edit.blend is None:  # the stored q and k stand in for the own
            q, k = (torch.cat([x[: R - s.shape[0]], s]) for x, s in zip((q, k), edit.inject_qk))
            edit = edit._replace(inject_qk=None)
        elif saves or impl == "reference":
            edit = edit._replace(inject_qk=None, inject=reference.attention_map(*edit.inject_qk))

    fields = edit._asdict()
    inject_qk, _ = fields.pop("inject_qk"), fields.pop("save_qk")
    if impl == "reference":
        return reference.cross_attention(q, k, v, **fields)
    if impl == "triton" and (saves or L <= ops.MAX_KEYS and inject_qk is None):
        return ops.cross_attention(q, k, v, **fields)
    if saves:  # the map is asked for, of the edited rows
        first = R - number_of_rows(edit)
        edited = reference.cross_attention(q[first:], k[first:], v[first:], **fields)
        return (
            torch.cat([plain(q[:first], k[:first], v[:first], impl), edited]) if first else edited
        )
    return folded(q, k, v, edit, partial(plain, impl=impl))


def plain(q, k, v, impl):
    """Attention without an edit."""
    if impl == "reference":
        return reference.attention(q, k, v)
    if impl == "triton":
        return (
            ops.cross_attention(q, k, v) if k.shape[2] <= ops.MAX_KEYS else ops.attention(q, k, v)
        )
    return F.scaled_dot_product_attention(q, k, v)


def folded(q, k, v, edit, attend):
    """The edited attention in at most three calls of `attend`, without a map.

        V' = reweight * V;   out = P_own V' + [P_source (token_map @ (blend * V')) - P_own (blend * V')]

    Taking the whole own map first and then exchanging columns, instead of adding two parts, makes
    equal rows come out as they would without an edit, to the last bit.
    """
    if not number_of_rows(edit):
        return attend(q, k, v)
    first = q.shape[0] - number_of_rows(edit)
    has_source = (
        edit.source_row is not None or edit.inject is not None or edit.inject_qk is not None
    )
    if not has_source:
        whole, _ = ops.fold(v[first:], False, None, None, edit.reweight)
        return attend(q, k, torch.cat([v[:first], whole]))

    _, v_source = ops.fold(v[first:], True, edit.token_map, edit.blend, edit.reweight)
    if edit.inject is not None:
        source = edit.inject.to(v.dtype) @ v_source
    else:
        q_source, k_source = edit.inject_qk or (
            q[first:][edit.source_row],
            k[first:][edit.source_row],
        )
        if edit.blend is None:  # one term: the rows differ in q, k and v only
            return attend(
                *(
                    torch.cat([x[:first], s])
                    for x, s in zip((q, k, v), (q_source, k_source, v_source))
                )
            )
        source = attend(q_source, k_source, v_source)
    if edit.blend is None:
        return torch.cat([attend(q[:first], k[:first], v[:first]), source]) if first else source
    whole, _ = ops.fold(v[first:], False, None, None, edit.reweight)
    _, v_exchanged = ops.fold(v[first:], True, None, edit.blend, edit.reweight)
    out = attend(q, k, torch.cat([v[:first], whole]))
    return torch.cat(
        [out[:first], out[first:] + (source - attend(q[first:], k[first:], v_exchanged))]
    )


def number_of_rows(edit: AttentionEdit) -> int:
    """S, the rows that the edit addresses (0: none)."""
    tensors = [x[0] if isinstance(x, tuple) else x for x in edit]
    return next((x.shape[0] for x in tensors if x is not None), 0)


def check(q, k, v, edit):
    """ValueError unless the edit fits q, k, v: shapes, dtypes and devices, never values."""
    tensors = edit._asdict()
    inject_qk, save_qk = tensors.pop("inject_qk"), tensors.pop("save_qk")
    for name, pair in (("inject_qk", inject_qk), ("save_qk", save_qk)):
        if pair is None:
            continue
        S = number_of_rows(edit)
        for x, like in zip(pair, (q, k), strict=True):
            expected = (S, *like.shape[1:])
            if tuple(x.shape) != expected or not 1 <= S <= q.shape[0]:
                raise ValueError(
                    f"{name}: expected shape {expected} with at most {q.shape[0]} rows, got {tuple(x.shape)}"
                )
            if x.dtype != q.dtype or x.device != q.device:
                raise ValueError(
                    f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}"
                )
    if inject_qk is not None:
        if edit.source_row is not None or edit.inject is not None:
            name = "source_row" if edit.source_row is not None else "inject"
            raise ValueError(f"edit: expected one source, got both {name} and inject_qk")
        # inject_qk is the source that token_map and blend ask for; check them as if it were a row
        tensors["source_row"] = torch.empty(
            inject_qk[0].shape[0], dtype=torch.int64, device=q.device
        )
    ops.check(q, k, v, **tensors)


class Attention(nn.Module):
    """Multi-head attention; keys and values come from x itself or were projected beforehand.

    q = to_q(x), (k, v) = project(context), out = to_out(attention(q, k, v)).
    x: (B, N, channels); `context_channels` is the width that to_k and to_v take (None: channels,
    self-attention). Module names are diffusers'. `name` is the site name, `impl` the code that
    computes (see `attention`).
    """

    name = None
    impl = "sdpa"

    def __init__(self, channels, heads, context_channels=None, qkv_bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList(
            [nn.Linear(channels, channels)]
        )  # a list, because the checkpoint says to_out.0

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(
            1, 2
        )  # (B, N, H*D) -> (B, H, N, D), a view

    def project(self, context):
        """(B, L, context_channels) -> k, v, each (B, H, L, D)."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def fuse(self):
        """Let to_q, to_k and to_v of self-attention be one product: lay their weights in one piece
        of memory, in turn.

        They stay three parameters with the same values; moved or replaced, they are three products
        again. Hooks on the three layers are not called meanwhile.
        """
        layers = (self.to_q, self.to_k, self.to_v)
        for layer, weight in zip(layers, torch.cat([layer.weight for layer in layers]).chunk(3)):
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def qkv_weight(self):
        """The weights of to_q, to_k and to_v as one matrix (3 * channels, channels), or None:
        `fuse` did not lay them out, or they need gradients, or torch.compile is tracing, which
        cannot see where they lie."""
        weights = self.to_q.weight, self.to_k.weight, self.to_v.weight
        if (
            torch.compiler.is_compiling()
            or self.to_q.bias is not None
            or any(w.requires_grad for w in weights)
        ):
            return None
        q, size = weights[0], weights[0].numel()
        one_memory = len({w.untyped_storage().data_ptr() for w in weights}) == 1
        in_turn = [w.storage_offset() - q.storage_offset() for w in weights] == [0, size, 2 * size]
        return (
            q.as_strided((3 * q.shape[0], q.shape[1]), q.stride())
            if one_memory and in_turn
            else None
        )

    def forward(self, x, kv=None, edit=None):
        """x: (B, N, channels), kv: what `project` gave (None: self-attention), edit: AttentionEdit
        or None."""
        qkv = self.qkv_weight() if kv is None else None
        if qkv is not None:
            q, k, v = (self.split_heads(part) for part in F.linear(x, qkv).chunk(3, dim=-1))
        else:
            q = self.split_heads(self.to_q(x))
            k, v = self.project(x) if kv is None else kv
        out = attention(q, k, v, edit, self.impl)
        return self.to_out[0](out.transpose(1, 2).flatten(-2))
