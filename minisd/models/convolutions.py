"""3x3 convolutions written as products by oneDNN, some of them with fewer multiplications.

Everything reads the weights as they lie in channels_last memory, at each call: there is no copy of
them that could be stale. models/ops.py chooses among these functions, for values alone, without
gradients. x: (B, C, h, w), weight: (O, C, 3, 3) -> channels_last memory.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

GELU = "none"  # no approximation: the exact one, by erf


def product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """x W^T + b by oneDNN, or gelu of it. x: (..., in), weight: (out, in); then: "none", "gelu".

    A single row is computed as the first of two: for one row oneDNN has other code.
    """
    single = x.numel() == x.shape[-1]
    rows = x.reshape(1, -1).expand(2, -1) if single else x
    how = GELU if then == "gelu" else ""
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, then, [], how)
    return y[:1].view(*x.shape[:-1], len(weight)) if single else y


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor, together: int) -> Tensor:
    """function(x) of a batch of images, so many of them at a time."""
    if len(x) <= together:
        return function(x)
    out = None
    for start in range(0, len(x), together):
        y = function(x[start : start + together])
        if out is None:
            shape, order = (len(x), *y.shape[1:]), torch.channels_last
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=order)
        out[start : start + together] = y
    return cast(Tensor, out)


def padded(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h + 2, w + 2, C), zeros around it."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()


def windows(x: Tensor, side: int) -> Tensor:
    """The squares of side x side positions: (B, H, W, C) -> (B, h, w, side^2 C), h = H - side + 1.

    x may be a part of a larger tensor.
    """
    (B, H, W, C), (b, row, column, channel) = x.shape, x.stride()
    h, w = H - side + 1, W - side + 1
    all_of_them = x.as_strided((B, h, w, side, side, C), (b, row, column, row, column, channel))
    return all_of_them.reshape(B, h, w, side * side * C)


def windows_3x3(x: Tensor) -> Tensor:
    """The 3x3 window around each position, zeros outside: (B, C, h, w) -> (B, h, w, 9 C)."""
    return windows(padded(x), 3)


def by_windows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as one product of windows and weights."""
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 9 C), a view
    return product(windows_3x3(x), matrix, bias).permute(0, 3, 1, 2)


def upsampled(x: Tensor, weight: Tensor, bias: Tensor | None, together: int) -> Tensor:
    """The convolution of x with each pixel repeated in a square of 2 x 2: (B, O, 2h, 2w).

    Three neighbours in a row of the enlarged image are copies of two pixels, (a, b, b) or
    (a, a, b), so

        w0 a + w1 b + w2 b = w0 a + (w1 + w2) b,     w0 a + w1 a + w2 b = (w0 + w1) a + w2 b

    and likewise along columns: four convolutions of x by 2x2 in place of one of 3x3 with four times
    the positions, 4/9 of the multiplications. together: images at a time.
    """
    kernel = weight.permute(0, 2, 3, 1)  # (O, 3, 3, C)
    B, _, h, w = x.shape
    out = torch.empty((B, h, 2, w, 2, len(weight)), dtype=x.dtype, device=x.device)
    for i in (0, 1):
        rows = folded(kernel, 1, i)
        for j in (0, 1):
            matrix = folded(rows, 2, j).flatten(1)  # (O, 4 C)
            for start in range(0, B, together):
                part = padded(x[start : start + together])[:, i : i + h + 1, j : j + w + 1]
                out[start : start + together, :, i, :, j] = product(windows(part, 2), matrix, bias)
    return out.view(B, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


def folded(kernel: Tensor, dim: int, odd: int) -> Tensor:
    """Three weights along `dim` to the two of an even or odd row or column of the enlarged x."""
    a, b, c = kernel.unbind(dim)
    return torch.stack((a + b, c) if odd else (a, b + c), dim)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with 16 multiplications for 2 x 2 results in place of 36, of even h and w.

    Along a row, two results of four pixels d and three weights g:

        y0 = m0 + m1 + m2      m0 = (d0 - d2) g0      m1 = (d1 + d2) (g0 + g1 + g2) / 2
        y1 = m1 - m2 + m3      m3 = (d3 - d1) g2      m2 = (d2 - d1) (g0 - g1 + g2) / 2

    and the same along columns of that, so that each of 16 products is one of (B h/2 w/2, C) and
    (C, O). Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308. In float32 the error at the UNet's
    widths is smaller than with all multiplications, for each sum is shorter; in bfloat16, where the
    differences and the products are rounded, it would be three times as large.
    """
    B, _, h, w = x.shape
    out = torch.empty((B, h // 2, 2, w // 2, 2, len(weight)), dtype=x.dtype, device=x.device)
    kernels = of_weights(weight.permute(0, 2, 3, 1), 1)
    for i, (rows, kernel) in enumerate(zip(of_pixels(padded(x), 1), kernels)):
        d, g = list(of_pixels(rows, 2)), of_weights(kernel, 1)  # (B, h/2, w/2, C), (O, C)
        m1, m2 = product(d[1], g[1], bias if i == 1 else None), product(d[2], g[2], None)
        add = torch.ops.mkldnn._linear_pointwise.binary
        left = add(d[0], m1 + m2, g[0], None, "add")
        right = add(d[3], m1.sub_(m2), g[3], None, "add")
        for j, y in enumerate((left, right)):
            above, below = out[:, :, 0, :, j], out[:, :, 1, :, j]
            if i == 0:
                above.copy_(y)
            elif i == 1:
                above.add_(y)
                below.copy_(y)
            elif i == 2:
                above.add_(y)
                below.sub_(y)
            else:
                below.add_(y)
    return out.view(B, h, w, -1).permute(0, 3, 1, 2)


def of_pixels(x: Tensor, dim: int) -> Iterator[Tensor]:
    """What m0 to m3 take of the pixels, for every second place along `dim`, padded by 1."""
    before, n = (slice(None),) * dim, x.shape[dim] - 2
    d0, d1, d2, d3 = (x[(*before, slice(i, i + n, 2))] for i in range(4))
    yield d0 - d2
    yield d1 + d2
    yield d2 - d1
    yield d3 - d1


def of_weights(g: Tensor, dim: int) -> tuple[Tensor, ...]:
    """What m0 to m3 take of three weights along `dim`."""
    g0, g1, g2 = g.unbind(dim)
    even, odd = (g0 + g2).mul_(0.5), g1 * 0.5
    # oneDNN takes a thousand times as long for a matrix with gaps
    return g0.contiguous(), even + odd, even - odd, g2.contiguous()
