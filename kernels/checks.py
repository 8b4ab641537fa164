"""What the attention ops refuse: shapes, dtypes and devices, never values.

`check` is for every implementation of them, `CHECKS` for the Triton kernels, by the name of the
registered op and with its arguments.
"""

import math

import torch
from torch import Tensor

MAX_KEYS = 128  # up to here cross_attention is the op for plain attention too
MAX_EDITED_KEYS = 256  # cross_attention holds the whole key row in one tile; it takes up to so many
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(
    q,
    k,
    v,
    source_row=None,
    inject=None,
    token_map=None,
    blend=None,
    reweight=None,
    save=None,
    save_mean=None,
    *,
    bias=None,
    kv_row=None,
    own_value=None,
) -> None:
    """ValueError unless q, k, v and the edit agree in shape, dtype and device, TypeError for a part
    of the edit that is no tensor; of every implementation."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "q, k, v: expected 4 dimensions (batch, heads, tokens, head_dim), "
            f"got {shapes(q, k, v)}"
        )
    B, H, N, D = q.shape
    if 0 in q.shape or 0 in k.shape[1:3]:
        raise ValueError(f"q, k, v: expected no empty dimension, got {shapes(q, k, v)}")
    if k.shape != (B, k.shape[1], k.shape[2], D) or v.shape != k.shape or H % k.shape[1]:
        raise ValueError(
            "q, k, v: expected (B, H, N, D), (B, K, L, D), (B, K, L, D) with K a divisor of H, "
            f"got {shapes(q, k, v)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
    if kv_row is not None:
        check_tensor("kv_row", kv_row)
        if kv_row.ndim != 2 or not kv_row.shape[1]:
            got = tuple(kv_row.shape)
            raise ValueError(f"kv_row: expected shape (S, M), M at least 1, got {got}")

    L = k.shape[2] * (1 if kv_row is None else kv_row.shape[1])
    ints, maps, tables = (torch.int32, torch.int64), (*DTYPES, q.dtype), (torch.float32,)
    edit = {  # name: (tensor, the shapes it may have after the rows, dtypes)
        "source_row": (source_row, [()], ints),
        "inject": (inject, [(H, N, L)], maps),
        "token_map": (token_map, [(L, L)], tables),
        "blend": (blend, [(L,), (H, L)], tables),
        "reweight": (reweight, [(L,), (H, L)], tables),
        "bias": (bias, [(h, n, L) for h in (H, 1) for n in (N, 1)], maps),
        "kv_row": (kv_row, None if kv_row is None else [kv_row.shape[1:]], ints),
        "own_value": (own_value, [()], (torch.float32, torch.bool)),
        "save": (save, [(H, N, L)], maps),
        "save_mean": (save_mean, [(N, L)], tables),
    }
    check_edit(q, {name: what for name, what in edit.items() if what[0] is not None})
    if source_row is not None and inject is not None:
        raise ValueError("edit: expected one source, got both source_row and inject")
    if source_row is None and inject is None and (token_map is not None or blend is not None):
        name = "token_map" if token_map is not None else "blend"
        raise ValueError(f"{name}: expected a source (source_row or inject) with it, got none")
    if own_value is not None and k.shape[2] != N:
        raise ValueError(f"own_value: expected as many keys as queries, {N}, got {k.shape[2]}")
    if own_value is not None and kv_row is not None and (save is not None or save_mean is not None):
        raise ValueError(
            "own_value: expected no saved map with kv_row, whose keys are not the row's own"
        )
    for name, x in (("save", save), ("save_mean", save_mean)):
        if x is not None and overlaps(x):
            raise ValueError(
                f"{name}: expected memory of its own for every element, got strides {x.stride()}"
            )


def check_edit(q: Tensor, edit: dict) -> None:
    """ValueError unless all tensors have the same number of rows, and the shape, dtype and device
    they should."""
    if not edit:
        return
    for name, (x, _, _) in edit.items():
        check_tensor(name, x)
    rows = {name: x.shape[0] if x.ndim else 0 for name, (x, _, _) in edit.items()}
    S, B = next(iter(rows.values())), q.shape[0]
    if any(each != S for each in rows.values()) or not 1 <= S <= B:
        raise ValueError(
            f"edit: expected one number of rows from 1 to the batch, {B}, in every tensor, "
            f"got {rows}"
        )
    for name, (x, allowed, dtypes) in edit.items():
        if tuple(x.shape[1:]) not in allowed:
            expected = " or ".join(str((S, *shape)) for shape in dict.fromkeys(allowed))
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device} like q, got {x.device}")


def check_tensor(name: str, x) -> None:
    """TypeError for a list or a number."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def overlaps(x: Tensor) -> bool:
    """Whether two elements of x may lie at one address: a stride is shorter than what the smaller
    ones span."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < span:
            return True
        span += stride * (size - 1)
    return False


def check_kernel(q: Tensor, k: Tensor, at_most: int | None = None) -> None:
    """ValueError for what the Triton kernels do not take."""
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim: expected a multiple of 8 up to {MAX_HEAD_DIM}, got {q.shape[3]}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v: expected {' or '.join(map(str, DTYPES))}, got {q.dtype}")
    if at_most is not None and k.shape[2] > at_most:
        raise ValueError(
            f"cross_attention takes at most {at_most} keys, got {k.shape[2]}; "
            "attention() takes any number, and impl='sdpa' edits and saves maps of more"
        )


def check_scale(scale: float | None) -> None:
    """ValueError unless the kernels can find the largest score before they multiply with scale."""
    if scale is not None and (isinstance(scale, Tensor) or not 0 < scale < math.inf):
        raise ValueError(f"scale: expected None or a finite number above 0, got {scale}")


def shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def check_attention(q, k, v, source_row, bias, kv_row, own_value, scale, is_causal):
    check(q, k, v, source_row, bias=bias, kv_row=kv_row, own_value=own_value)
    check_kernel(q, k)
    check_scale(scale)
    if is_causal and kv_row is not None:
        raise ValueError("is_causal: expected no kv_row, whose keys have no order among queries")


def check_attention_lse(q, k, v, source_row, bias, kv_row, own_value, scale, is_causal):
    check_attention(q, k, v, source_row, bias, kv_row, own_value, scale, is_causal)
    if own_value is not None:
        raise ValueError("return_lse: expected no own_value, whose map has no scores")


def check_cross_attention(q, k, v, source_row, inject, token_map, blend, reweight, bias, *others):
    *saves, scale = others
    check(q, k, v, source_row, inject, token_map, blend, reweight, *saves, bias=bias)
    check_kernel(q, k, MAX_EDITED_KEYS)
    check_scale(scale)


def check_attention_backward(*args):
    """Nothing: gradients.py calls it with what the forward op has checked."""


CHECKS = {
    "attention": check_attention,
    "attention_lse": check_attention_lse,
    "cross_attention": check_cross_attention,
    "cross_attention_save": check_cross_attention,
    "attention_backward": check_attention_backward,
}
