"""Attention on a CPU: softmax(q k^T / sqrt(D)) v by a small C function, where it was built.

PyTorch gives the products of its own CPU attention to MKL, which leaves AVX-512 unused on AMD
processors, and of bfloat16 makes float32. cpu_attention.c is compiled when the package is installed
from its sources, if there is a compiler. Where there is none, or the processor lacks AVX-512,
`takes` says no and callers use scaled_dot_product_attention, whose results are the same up to the
order of the sums.

A query's result depends on its own q and on k and v alone, not on what else is in the batch or on
the number of threads, to the last bit.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

LEVEL = {torch.float32: 1, torch.bfloat16: 2}  # what minisd_attention_level must be at least
STEP = 8  # the head dim is a multiple of it


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled function; None where it was not built."""
    found = sorted(Path(__file__).parent.glob("_cpu_attention*.so"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.minisd_attention.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_float]
    return library


@functools.cache
def computes(dtype: torch.dtype) -> bool:
    """Whether the function is there and this processor has its instructions for that dtype."""
    there = library()
    return there is not None and there.minisd_attention_level() >= LEVEL.get(dtype, 3)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` computes these: on a CPU, (B, H, N or L, D) of one dtype, D a multiple
    of 8, each token's numbers side by side."""
    if q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype or not computes(q.dtype):
        return False
    B, H, N, D = q.shape
    L = k.shape[2]
    fits = k.shape == v.shape == (B, H, L, D) and D % STEP == 0 and min(B, H, N, L, D) > 0
    return fits and q.stride(3) == k.stride(3) == v.stride(3) == 1


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, for what `takes` accepts; no gradients.

    q: (B, H, N, D), k, v: (B, H, L, D) -> (B, H, N, D), a view of (B, N, H, D) memory. All sums in
    float32.
    """
    return torch.ops.minisd_kernels.cpu_attention(q, k, v)


def empty_out(q: Tensor, *others: Tensor) -> Tensor:
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D).transpose(1, 2)


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not takes(q, k, v):
        got = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k, v: got {got}, which minisd_kernels.cpu.takes would have refused")
    out = empty_out(q)
    B, H, N, D = q.shape
    numbers = [B, H, N, k.shape[2], D, q.dtype == torch.bfloat16, torch.get_num_threads()]
    for x in (q, k, v, out):
        numbers += x.stride()[:3]
    array = (ctypes.c_int64 * len(numbers))(*numbers)
    places = [x.data_ptr() for x in (q, k, v, out)]
    if library().minisd_attention(*places, array, D**-0.5):  # type: ignore[union-attr]
        raise MemoryError(f"attention over {k.shape[2]} keys found no memory for them")
    return out


torch.library.define(
    "minisd_kernels::cpu_attention",
    "(Tensor q, Tensor k, Tensor v) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("minisd_kernels::cpu_attention", "CPU")(run)
torch.library.register_fake("minisd_kernels::cpu_attention")(empty_out)
