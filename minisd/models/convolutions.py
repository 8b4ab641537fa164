"""3x3 convolutions written as products or 2x2 convolutions by oneDNN, some of them with fewer
multiplications.

Everything reads the weights as they lie in channels_last memory, at each call: there is no copy of
them that could be stale. models/ops.py chooses among these functions, for values alone, without
gradients. x: (B, C, h, w), weight: (O, C, 3, 3) -> channels_last memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

Edges = tuple[int, int]  # rows of zeros above and below x
BOTH: Edges = (1, 1)

MANY = 1024  # positions of an image from which on bringing the weights in order costs little
CACHED = 2**20  # bytes of a weight for each input and output: nine times that stays in the cache


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", how: str = ""
) -> Tensor:
    """x W^T + b by oneDNN, or gelu of it. x: (..., in), weight: (out, in).

    then, how: "none", or "gelu" and the approximation as F.gelu calls it.

    A single row is computed as the first of two: for one row oneDNN has other code.
    """
    single = x.numel() == x.shape[-1]
    rows = x.reshape(1, -1).expand(2, -1) if single else x
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


def padded(x: Tensor, edges: Edges = BOTH) -> Tensor:
    """(B, C, h, w) -> (B, h + 2, w + 2, C), zeros around it; h + 1 or h rows without an edge."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, *edges)).contiguous()


def windows(x: Tensor, side: int) -> Tensor:
    """The squares of side x side positions: (B, H, W, C) -> (B, h, w, side^2 C), h = H - side + 1.

    x may be a part of a larger tensor.
    """
    (B, H, W, C), (b, row, column, channel) = x.shape, x.stride()
    h, w = H - side + 1, W - side + 1
    all_of_them = x.as_strided((B, h, w, side, side, C), (b, row, column, row, column, channel))
    return all_of_them.reshape(B, h, w, side * side * C)


def windows_3x3(x: Tensor, edges: Edges = BOTH) -> Tensor:
    """The 3x3 window around each position, zeros outside: (B, C, h, w) -> (B, h, w, 9 C)."""
    return windows(padded(x, edges), 3)


def by_windows(x: Tensor, weight: Tensor, bias: Tensor | None, edges: Edges = BOTH) -> Tensor:
    """The convolution as one product of windows and weights."""
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 9 C), a view
    return product(windows_3x3(x, edges), matrix, bias).permute(0, 3, 1, 2)


def upsampled(x: Tensor, weight: Tensor, bias: Tensor | None, bands: Sequence[slice]) -> Tensor:
    """The convolution of x with each pixel repeated in a square of 2 x 2: (B, O, 2h, 2w).

    Three neighbours in a row of the enlarged image are copies of two pixels, (a, b, b) or
    (a, a, b), so

        w0 a + w1 b + w2 b = w0 a + (w1 + w2) b,     w0 a + w1 a + w2 b = (w0 + w1) a + w2 b

    and likewise along columns: four convolutions of x by 2x2 in place of one of 3x3 with four times
    the positions, 4/9 of the multiplications.

    bands: the rows of x, so many at a time where it has many.
    """
    kernel, around = weight.permute(0, 2, 3, 1), padded(x)  # (O, 3, 3, C), (B, h + 2, w + 2, C)
    B, _, h, w = x.shape
    out = torch.empty((B, h, 2, w, 2, len(weight)), dtype=x.dtype, device=x.device)
    few = h * w < MANY
    for i in (0, 1):
        rows_of_i = around[:, i : i + h + 1]
        near = [windows(rows_of_i[:, :, j : j + w + 1], 2) if few else rows_of_i for j in (0, 1)]
        for some in outputs(weight):
            b, two_rows = None if bias is None else bias[some], folded(kernel[some], 1, i)
            for j in (0, 1):
                matrix = folded(two_rows, 2, j)  # (outputs, 2, 2, C)
                if few:
                    out[:, :, i, :, j, some] = product(near[j], matrix.flatten(1), b)
                    continue
                for rows in bands:
                    y = convolved(near[j][:, rows.start : rows.stop + 1], matrix, b)
                    # A column too many costs less than a copy without it.
                    out[:, rows, i, :, j, some] = y[:, :, j : j + w]
    return out.view(B, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's convolution, without zeros around: (B, H, W, C), (O, h, w, C) -> (B, H - h + 1,
    W - w + 1, O)."""
    x, kernel = x.permute(0, 3, 1, 2), kernel.permute(0, 3, 1, 2)
    op, once = torch.ops.mkldnn._convolution_pointwise, [1, 1]
    return op(x, kernel, bias, [0, 0], once, once, 1, "none", [], "").permute(0, 2, 3, 1)


def outputs(weight: Tensor) -> Iterator[slice]:
    """Channels of the result, so many at a time that their weights stay in the cache."""
    step = max(64, CACHED // (weight.shape[1] * weight.element_size()) // 64 * 64)
    return (slice(start, start + step) for start in range(0, len(weight), step))


def folded(kernel: Tensor, dim: int, odd: int) -> Tensor:
    """Three weights along `dim` to the two of an even or odd row or column of the enlarged x."""
    a, b, c = kernel.unbind(dim)
    return torch.stack((a + b, c) if odd else (a, b + c), dim)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, edges: Edges = BOTH) -> Tensor:
    """The convolution with 16 multiplications for 2 x 2 results in place of 36, of even h and w.

    Along a row, two results of four pixels d and three weights g:

        y0 = m0 + m1 + m2      m0 = (d0 - d2) g0      m1 = (d1 + d2) (g0 + g1 + g2) / 2
        y1 = m1 - m2 + m3      m3 = (d3 - d1) g2      m2 = (d2 - d1) (g0 - g1 + g2) / 2

    and the same along columns of that, so that each of 16 products is one of (B h/2 w/2, C) and
    (C, O). Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308. In float32 the error at the UNet's
    widths is 0.6 to 0.9 of oneDNN's convolution's, for each sum is shorter, and at 16x16 1.6 times
    that of one product of windows (6.1e-7 beside 3.9e-7); in bfloat16, where the differences and
    the products are rounded, it would be three times as large.
    """
    kernel, around = weight.permute(0, 2, 3, 1), padded(x, edges)  # (O, 3, 3, C)
    B, h, w = len(x), around.shape[1] - 2, x.shape[3]
    out = torch.empty((B, h // 2, 2, w // 2, 2, len(weight)), dtype=x.dtype, device=x.device)
    for i, rows in enumerate(of_pixels(around, 1)):
        d = list(of_pixels(rows, 2))  # each (B, h/2, w/2, C)
        for some in outputs(weight):
            g = of_weights(kernel[some], 1, i)  # (outputs, 3, C)
            b = bias[some] if bias is not None and i == 1 else None
            m1, m2 = product(d[1], of_weights(g, 1, 1), b), product(d[2], of_weights(g, 1, 2), None)
            left = product_plus(d[0], of_weights(g, 1, 0), m1 + m2)
            right = product_plus(d[3], of_weights(g, 1, 3), m1.sub_(m2))
            add_row(out[:, :, 0, :, :, some], out[:, :, 1, :, :, some], i, left, right)
    return out.view(B, h, w, -1).permute(0, 3, 1, 2)


def add_row(above: Tensor, below: Tensor, i: int, *m: Tensor) -> None:
    """y0 = m0 + m1 + m2, y1 = m1 - m2 + m3 of rows, the i-th m at a time, its two columns in m."""
    for column, y in enumerate(m):
        y0, y1 = above[..., column, :], below[..., column, :]
        if i == 0:
            y0.copy_(y)
        elif i == 1:
            y0.add_(y)
            y1.copy_(y)
        elif i == 2:
            y0.add_(y)
            y1.sub_(y)
        else:
            y1.add_(y)


def product_plus(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """x W^T + y in one pass over the result."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")


def of_pixels(x: Tensor, dim: int) -> Iterator[Tensor]:
    """What m0 to m3 take of the pixels, for every second place along `dim`, padded by 1."""
    before, n = (slice(None),) * dim, x.shape[dim] - 2
    d0, d1, d2, d3 = (x[(*before, slice(i, i + n, 2))] for i in range(4))
    yield d0 - d2
    yield d1 + d2
    yield d2 - d1
    yield d3 - d1


def of_weights(g: Tensor, dim: int, i: int) -> Tensor:
    """What m_i takes of three weights along `dim`."""
    g0, g1, g2 = g.unbind(dim)
    if i in (0, 3):  # without gaps, for which oneDNN takes a thousand times as long
        return (g2 if i else g0).contiguous()
    return (g0 + g2).add_(g1, alpha=1 if i == 1 else -1).mul_(0.5)
