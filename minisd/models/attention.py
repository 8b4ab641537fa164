"""Attention with edits as data, and the choice of the code that computes it.

    P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

An edit is a value, an `AttentionEdit`, that reaches this function as an argument: nothing is
patched or called back. Source: Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross
Attention Control".
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from minisd_kernels import cpu, ops as kernels, reference
from torch import Tensor, nn

from . import ops
from .features import check_rows, edited

NONE: Mapping[str, Any] = MappingProxyType({})  # no edits
Implementation = Literal["triton", "sdpa", "reference"]
IMPLEMENTATIONS = get_args(Implementation)


def check_implementation(impl: str) -> Implementation:
    """impl, or ValueError if no such code computes attention."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return cast(Implementation, impl)


class AttentionEdit(NamedTuple):
    """What to change and what to save at one attention site in one step; None switches a part off.

        P' = reweight * [blend * (P_source @ token_map) + (1 - blend) * P_own];   out = P' V

    In order: keys and values (kv_row), scores (bias), softmax, source, blend, reweight, and last of
    all own_value, by selection. Every tensor has S rows, S <= R, and addresses the last S of the R
    rows of the batch (guidance groups are group-major with the conditional group last). H heads, N
    queries, L keys (M times as many with kv_row), D head_dim. The sources are source_row, inject
    and inject_qk, at most one of them; token_map and blend need one. Tables are float32 and (S, L),
    or (S, H, L) for single heads.

    source_row  (S,) int: take the map of this row, counted within the S rows (arange: own)
    inject      (S, H, N, L): or take this stored map
    inject_qk   2 x (S, H, N or L, D): or the map of this stored q and k
    token_map   (S, L, L) float32: source tokens -> own tokens, P_source @ token_map
    blend       0 keeps the own column, 1 takes the source's; None with a source: 1
    reweight    scales columns after the softmax, without renormalisation
    bias        (S, 1 or H, 1 or N, L): added to the scaled scores, -inf hides a key
    kv_row      (S, M) int: keys and values of these rows, one after the other
    own_value   (S,): not 0: the map is the identity, out = V (as many keys as queries)
    save        (S, H, N, L), out: the map, as used
    save_mean   (S, N, L) float32, out: += mean over heads of the map, as used
    save_qk     2 x (S, H, N or L, D), out: own q and k, which inject_qk takes
    """

    source_row: Tensor | None = None
    inject: Tensor | None = None
    inject_qk: tuple[Tensor, Tensor] | None = None
    token_map: Tensor | None = None
    blend: Tensor | None = None
    reweight: Tensor | None = None
    bias: Tensor | None = None
    kv_row: Tensor | None = None
    own_value: Tensor | None = None
    save: Tensor | None = None
    save_mean: Tensor | None = None
    save_qk: tuple[Tensor, Tensor] | None = None

    def check_rows(self) -> "AttentionEdit":
        """Self, or ValueError if source_row or kv_row names a row outside [0, S).

        Either may be a table of many steps, (..., S) and (..., S, M). It reads values, so it is
        called once, where an edit is built, and never in the loop over the steps.
        """
        for name, table, axis in (("source_row", self.source_row, -1), ("kv_row", self.kv_row, -2)):
            if table is not None:
                check_rows(name, table, axis)
        return self


def attention(
    q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit | None = None, impl: str = "sdpa"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, with the map edited as `edit` says.

    q: (R, H, N, D), k, v: (R, H, L, D) -> (R, H, N, D). impl: "triton", the kernels of
    minisd_kernels, CUDA only; "sdpa", PyTorch's scaled_dot_product_attention, anywhere, or on a CPU
    without gradients minisd_kernels.cpu, where that was built; "reference", the formula in eager
    PyTorch. Under autocast all compute in its dtype. All differentiate, and a map saved under
    gradients carries them. ValueError for an unknown impl and for shapes, dtypes or devices that do
    not fit; TypeError for a part of the edit that is no tensor; RuntimeError for what "triton" does
    not differentiate (bias, forward mode).
    """
    if edit is None and impl == "triton":
        return plain(q, k, v, impl=impl)  # the kernels heed autocast themselves
    check_implementation(impl)
    q, k, v = kernels.as_autocast(q, k, v)
    if edit is None:
        return plain(q, k, v, impl=impl)
    check(q, k, v, edit)
    R, L = q.shape[0], k.shape[2]

    if edit.save_qk is not None:
        for buffer, x in zip(edit.save_qk, (q, k)):
            buffer.copy_(x[R - buffer.shape[0] :])
    edit = edit._replace(save_qk=None)
    first = R - number_of_rows(edit)
    saves = edit.save is not None or edit.save_mean is not None
    if edit.inject_qk is not None and (saves or impl == "reference"):
        P = reference.attention_map(edit.inject_qk[0], edit.inject_qk[1])
        edit = edit._replace(inject_qk=None, inject=P)

    if impl == "reference":
        return reference.cross_attention(q, k, v, **fields(edit))
    if impl == "triton" and kernel_takes(edit, L):
        beyond = L > kernels.MAX_KEYS or edit.kv_row is not None or edit.own_value is not None
        flash = beyond and given(edit).keys() <= FLASH_FIELDS
        return (kernels.attention if flash else kernels.cross_attention)(q, k, v, **given(edit))
    attend = partial(plain, impl=impl)
    if not saves:
        return folded(q, k, v, edit, attend)
    # The map is asked for, of the edited rows.
    edited = reference.cross_attention(q[first:], k[first:], v[first:], **fields(edit))
    return torch.cat([attend(q[:first], k[:first], v[:first]), edited]) if first else edited


FLASH_FIELDS = {"source_row", "bias", "kv_row", "own_value"}  # of kernels.attention, for any L


def kernel_takes(edit: AttentionEdit, L: int) -> bool:
    """Whether the Triton kernels take this edit of L keys as it is."""
    if edit.inject_qk is not None:
        return False
    if given(edit).keys() <= FLASH_FIELDS:
        return True
    return L <= kernels.MAX_EDITED_KEYS and edit.kv_row is None and edit.own_value is None


def fields(edit: AttentionEdit) -> dict[str, Any]:
    """What the kernels and the reference take: all fields but the stored q and k."""
    return {name: x for name, x in edit._asdict().items() if not name.endswith("_qk")}


def given(edit: AttentionEdit) -> dict[str, Any]:
    """Those that are not None."""
    return {name: x for name, x in fields(edit).items() if x is not None}


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, impl: str) -> Tensor:
    """Attention without an edit. bias: (R, 1 or H, 1 or N, L)."""
    if impl == "reference":
        return reference.attention(q, k, v, bias=bias)
    if impl == "triton":
        one_pass = k.shape[2] <= kernels.MAX_KEYS
        return (kernels.cross_attention if one_pass else kernels.attention)(q, k, v, bias=bias)
    here = bias is None and q.device.type == "cpu" and ops.is_inference(q, k, v)
    if here and cpu.takes(q, k, v):
        return cpu.attention(q, k, v)  # the same, quicker but for a few queries
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask)


def folded(
    q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit, attend: Callable[..., Tensor]
) -> Tensor:
    """The edited attention in at most two calls of `attend` over the edited rows, without a map.

        out = P_own V_own + P_source V_source
        V_own = (1 - blend) * reweight * V,   V_source = token_map @ (blend * reweight * V)

    A row that takes nothing from a source has V_own = V and V_source = 0: it comes out as it would
    without an edit, to the last bit. q, k, v: (R, H, N or L, D).
    """
    first = q.shape[0] - number_of_rows(edit)
    if first == q.shape[0]:
        return attend(q, k, v)
    plain_rows = q[:first], k[:first], v[:first]
    q, k, v = q[first:], k[first:], v[first:]
    values, bias, row = v, edit.bias, edit.source_row
    if edit.kv_row is not None:
        k, v = reference.joined(k, edit.kv_row), reference.joined(v, edit.kv_row)
    has_source = row is not None or edit.inject is not None or edit.inject_qk is not None
    v_own, v_source = kernels.fold(v, has_source, edit.token_map, edit.blend, edit.reweight)

    terms: list[Any] = [] if v_own is None else [(q, k, v_own, bias)]
    if row is not None:
        terms.append((q[row], k[row], v_source, None if bias is None else bias[row]))
    elif edit.inject_qk is not None:
        terms.append((*edit.inject_qk, v_source))
    if first and terms and bias is None and edit.kv_row is None:
        # In one call with the first term: the last bits of a row may depend on the batch.
        together = attend(*(torch.cat(pair) for pair in zip(plain_rows, terms.pop(0)[:3])))
        plain_out, out = together[:first], [together[first:]]
    else:
        plain_out, out = attend(*plain_rows) if first else values[:0], []
    out += [attend(*term) for term in terms]
    if edit.inject is not None:
        out.append(edit.inject.to(v.dtype) @ v_source)
    edited = sum(out[1:], out[0])
    if edit.own_value is not None:
        edited = torch.where((edit.own_value != 0)[:, None, None, None], values, edited)
    return torch.cat([plain_out, edited]) if first else edited


def number_of_rows(edit: AttentionEdit) -> int:
    """S, the rows that the edit addresses (0: none)."""
    tensors = [x[0] if isinstance(x, tuple) else x for x in edit]
    return next((x.shape[0] for x in tensors if torch.is_tensor(x)), 0)


def check(q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit) -> None:
    """ValueError unless the edit fits q, k, v: shapes, dtypes and devices, never values; TypeError
    for what is no tensor."""
    tensors = edit._asdict()
    inject_qk, save_qk = tensors.pop("inject_qk"), tensors.pop("save_qk")
    for name, pair in (("inject_qk", inject_qk), ("save_qk", save_qk)):
        if pair is None:
            continue
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(torch.is_tensor, pair))):
            raise TypeError(f"{name}: expected q and k, a tuple of two tensors, got {pair!r:.80}")
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
        if edit.kv_row is not None:
            raise ValueError("inject_qk: its keys are its own, expected no kv_row with it")
        # inject_qk is the source that token_map and blend ask for; check them as if it were a row
        tensors["source_row"] = torch.empty(
            inject_qk[0].shape[0], dtype=torch.int64, device=q.device
        )
    kernels.check(q, k, v, **tensors)
    if k.shape[1] != q.shape[1]:  # the kernels take fewer; folding here does not
        raise ValueError(f"k, v: expected the {q.shape[1]} heads of q, got {k.shape[1]}")


class Attention(nn.Module):
    """Multi-head attention; keys and values come from x itself or were projected beforehand.

    q = to_q(x), (k, v) = project(context), out = to_out(attention(q, k, v)).
    x: (B, N, channels); `context_channels` is the width that to_k and to_v take (None: channels,
    self-attention). Module names are diffusers'. `name` is its own, dotted, within the UNet; its
    features are called name.q, name.k, name.v and name.out.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int | None = None,
        qkv_bias: bool = False,
        name: str = "",
    ):
        super().__init__()
        self.heads, self.head_dim, self.name = heads, channels // heads, name
        self.features = tuple(f"{name}.{part}" for part in ("q", "k", "v", "out"))
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # the checkpoint's to_out.0

    def split_heads(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        return x.view(B, N, self.heads, -1).transpose(1, 2)  # (B, N, H*D) -> (B, H, N, D)

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
        edits: Mapping[str, Any] = NONE,
    ) -> Tensor:
        """x: (B, N, channels), kv: what `project` gave (None: self-attention) -> (B, N, channels).

        edit: of the map; edits: of its features, by their names (any others are not its own).
        """
        q = self.split_heads(ops.linear(self.to_q, x))
        k, v = self.project(x) if kv is None else kv
        if edits:
            named = zip((q, k, v), self.features)
            q, k, v = (edited(y, edits.get(name), name) for y, name in named)
        out = attention(q, k, v, edit, impl)
        to_out, *_ = self.to_out  # quicker than an index
        out = ops.linear(to_out, out.transpose(1, 2).flatten(-2))
        return edited(out, edits.get(self.features[3]), self.features[3]) if edits else out
