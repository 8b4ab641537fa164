"""Attention with edits as data, and the choice of the code that computes it.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

An edit is a value, an `AttentionEdit`, that reaches this function as an argument: nothing is
patched or called back. Source: Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross
Attention Control".
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from minisd_kernels import ops as kernels, reference
from torch import Tensor, nn

from . import ops

Implementation = Literal["triton", "sdpa", "reference"]
IMPLEMENTATIONS = get_args(Implementation)


def check_implementation(impl: str) -> Implementation:
    """impl, or ValueError if no such code computes attention."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return cast(Implementation, impl)


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
    check_implementation(impl)
    if edit is None:
        return plain(q, k, v, impl)
    check(q, k, v, edit)
    R, L = q.shape[0], k.shape[2]

    if edit.save_qk is not None:
        for buffer, x in zip(edit.save_qk, (q, k)):
            buffer.copy_(x[R - buffer.shape[0] :].detach())
    edit = edit._replace(save_qk=None)
    saves = edit.save is not None or edit.save_mean is not None
    if (pair := edit.inject_qk) is not None:
        if edit.token_map is None and edit.blend is None:  # the stored q and k stand in for the own
            first = R - pair[0].shape[0]
            q, k = torch.cat([q[:first], pair[0]]), torch.cat([k[:first], pair[1]])
            edit = edit._replace(inject_qk=None)
        elif saves or impl == "reference":
            P = reference.attention_map(pair[0], pair[1])
            edit = edit._replace(inject_qk=None, inject=P)

    fields = edit._asdict()
    inject_qk, _ = fields.pop("inject_qk"), fields.pop("save_qk")
    if impl == "reference":
        return reference.cross_attention(q, k, v, **fields)
    if impl == "triton" and (saves or L <= kernels.MAX_KEYS and inject_qk is None):
        return kernels.cross_attention(q, k, v, **fields)
    if saves:  # the map is asked for, of the edited rows
        first = R - number_of_rows(edit)
        edited = reference.cross_attention(q[first:], k[first:], v[first:], **fields)
        own = [plain(q[:first], k[:first], v[:first], impl)] if first else []
        return torch.cat([*own, edited])
    if impl == "triton" and edit == AttentionEdit(source_row=edit.source_row):
        return kernels.attention(q, k, v, edit.source_row)  # the kernel reads the row's q and k
    return folded(q, k, v, edit, partial(plain, impl=impl))


def plain(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    """Attention without an edit."""
    if impl == "reference":
        return reference.attention(q, k, v)
    if impl == "triton":
        one_pass = k.shape[2] <= kernels.MAX_KEYS
        return (kernels.cross_attention if one_pass else kernels.attention)(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def folded(
    q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit, attend: Callable[..., Tensor]
) -> Tensor:
    """The edited attention in at most two calls of `attend` over the edited rows, without a map.

        out = P_own V_own + P_source V_source
        V_own = (1 - blend) * reweight * V,   V_source = token_map @ (blend * reweight * V)

    A row that takes nothing from a source has V_own = V and V_source = 0: it comes out as it would
    without an edit, to the last bit.
    """
    S = number_of_rows(edit)
    if not S:
        return attend(q, k, v)
    first = q.shape[0] - S
    has_source = any(x is not None for x in (edit.source_row, edit.inject, edit.inject_qk))
    v_own, v_source = kernels.fold(v[first:], has_source, edit.token_map, edit.blend, edit.reweight)
    if not has_source:
        return attend(q, k, torch.cat([v[:first], v_own]))
    if edit.inject is not None:
        source = edit.inject.to(v.dtype) @ v_source
    else:
        row = edit.source_row
        q_source, k_source = edit.inject_qk or (q[first:][row], k[first:][row])
        if v_own is None:  # one term: the rows differ in q, k and v only
            pairs = zip((q, k, v), (q_source, k_source, v_source))
            return attend(*(torch.cat([x[:first], x_source]) for x, x_source in pairs))
        source = attend(q_source, k_source, v_source)
    if v_own is None:
        return torch.cat([attend(q[:first], k[:first], v[:first]), source]) if first else source
    own = attend(q, k, torch.cat([v[:first], v_own]))
    return torch.cat([own[:first], own[first:] + source]) if first else own + source


def number_of_rows(edit: AttentionEdit) -> int:
    """S, the rows that the edit addresses (0: none)."""
    tensors = [x[0] if isinstance(x, tuple) else x for x in edit]
    return next((x.shape[0] for x in tensors if x is not None), 0)


def check(q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit) -> None:
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
                most = f"at most {q.shape[0]} rows"
                got = tuple(x.shape)
                raise ValueError(f"{name}: expected shape {expected} with {most}, got {got}")
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
    kernels.check(q, k, v, **tensors)


class Attention(nn.Module):
    """Multi-head attention; keys and values come from x itself or were projected beforehand.

    q = to_q(x), (k, v) = project(context), out = to_out(attention(q, k, v)).
    x: (B, N, channels); `context_channels` is the width that to_k and to_v take (None: channels,
    self-attention). Module names are diffusers'.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int | None = None,
        qkv_bias: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # the checkpoint's to_out.0

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, H*D) -> (B, H, N, D)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, context_channels) -> k, v, each (B, H, L, D)."""
        k, v = ops.linear(self.to_k, context), ops.linear(self.to_v, context)
        return self.split_heads(k), self.split_heads(v)

    def forward(
        self,
        x: Tensor,
        kv: tuple[Tensor, Tensor] | None = None,
        edit: AttentionEdit | None = None,
        impl: str = "sdpa",
    ) -> Tensor:
        """x: (B, N, channels), kv: what `project` gave (None: self-attention) -> (B, N,
        channels)."""
        q = self.split_heads(ops.linear(self.to_q, x))
        k, v = self.project(x) if kv is None else kv
        out = attention(q, k, v, edit, impl)
        return ops.linear(self.to_out[0], out.transpose(1, 2).flatten(-2))
