"""GroupNorm with SiLU on channels_last memory, LayerNorm and GEGLU, each without an intermediate
result in memory.

    group_norm:      y = (x - mean) / sqrt(var + eps) * weight + bias, or with silu silu(y)
                     mean and var over a group of one image
    layer_norm:      y = (x - mean) / sqrt(var + eps) * weight + bias
                     mean and var over the last dimension
    add_layer_norm:  x + h, and layer_norm of it
    geglu:           y = h * gelu(gate), where x = [h, gate]; the exact GELU, gate * Phi(gate)

Offsets are 64-bit before anything is multiplied, and the dimension of a grid that may be long is
its first: the other two end at 65535.

All sums in float32, of deviations from a mean and never of squares: mean(x^2) - mean^2 loses what
var is made of.

GroupNorm is one launch where a group of an image is short, a program each (`group_norm_kernel`).
A long one is a narrow column of channels_last memory, 10 channels of 320, whose rows lie far apart.
So there nobody reads group by group: `moments_kernel` takes mean and squared deviations of each
channel over a block of positions, all channels side by side; `group_kernel` combines them into
those of a group (Chan, Golub and LeVeque 1979); `apply_kernel` normalises. x is read twice and
written once.

Where a number for each channel is to be added to x first, `shift`, nobody adds it to x: it moves
the means, and x + shift - mean is x less the `center`, mean - shift.

Sources: Wu and He 2018 (GroupNorm), Ba et al. 2016 (LayerNorm), Shazeer 2020 (GEGLU).
"""

import torch
import triton
import triton.language as tl

from .launch import Launch


@triton.jit
def offsets(b, offs_p, offs_c, positions, channels):
    """Where (positions, channels) of image b lie in channels_last memory."""
    return (b.to(tl.int64) * positions + offs_p.to(tl.int64)[:, None]) * channels + offs_c[None, :]


@triton.jit
def column(
    b,
    g,
    start,
    positions,
    channels,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Where group g of image b lies at BLOCK_P positions from `start` on, and what of it is
    there."""
    offs_p, offs_w = start + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    m_x = (offs_p[:, None] < positions) & (offs_w[None, :] < WIDTH)
    return offsets(b, offs_p, g * WIDTH + offs_w, positions, channels), m_x


@triton.jit
def shift_of(shift, b, offs_c, m_c, rows, stride):
    """What is added to channels of image b, which takes row b % rows of shift; 0 without one."""
    value = tl.zeros(offs_c.shape, tl.float32)
    if shift is not None:
        p_row = shift + (b % rows).to(tl.int64) * stride
        value = tl.load(p_row + offs_c, m_c, 0.0).to(tl.float32)
    return value


@triton.jit
def group_norm_kernel(
    x,
    weight,
    bias,
    shift,
    out,
    positions,
    channels,
    eps,
    rows,
    stride,  # of shift, from row to row
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out = y or silu(y) of one group of one image, WIDTH channels at all positions: few, so that
    after the first time they are read from a cache."""
    groups = channels // WIDTH
    b, g = tl.program_id(0) // groups, tl.program_id(0) % groups
    offs_w = tl.arange(0, BLOCK_W)
    offs_c, m_w = g * WIDTH + offs_w, offs_w < WIDTH
    plus = shift_of(shift, b, offs_c, m_w, rows, stride)
    count = tl.cast(positions, tl.float32) * WIDTH

    total = tl.zeros([BLOCK_P, BLOCK_W], tl.float32)
    for start in range(0, positions, BLOCK_P):
        offs_x, m_x = column(b, g, start, positions, channels, WIDTH, BLOCK_P, BLOCK_W)
        total += tl.load(x + offs_x, m_x, 0.0).to(tl.float32)
    center = tl.sum(tl.sum(total, 1), 0) / count + (tl.sum(plus, 0) / WIDTH - plus)

    total = tl.zeros([BLOCK_P, BLOCK_W], tl.float32)
    for start in range(0, positions, BLOCK_P):
        offs_x, m_x = column(b, g, start, positions, channels, WIDTH, BLOCK_P, BLOCK_W)
        b_x = tl.load(x + offs_x, m_x, 0.0).to(tl.float32)
        deviation = tl.where(m_x, b_x - center[None, :], 0.0)
        total += deviation * deviation
    inverse = 1 / tl.sqrt(tl.sum(tl.sum(total, 1), 0) / count + eps)

    scale = tl.load(weight + offs_c, m_w, 0.0).to(tl.float32) * inverse
    add = tl.load(bias + offs_c, m_w, 0.0).to(tl.float32)
    for start in range(0, positions, BLOCK_P):
        offs_x, m_x = column(b, g, start, positions, channels, WIDTH, BLOCK_P, BLOCK_W)
        deviation = tl.load(x + offs_x, m_x, 0.0).to(tl.float32) - center[None, :]
        y = deviation * scale[None, :] + add[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out + offs_x, y.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def moments_kernel(x, moments, positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of BLOCK_C channels over one block of positions of image
    b.

    x: (B, positions, channels); moments: (B, blocks, 2, channels) float32.
    """
    blocks = tl.cdiv(positions, BLOCK_P)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    offs_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_x = (offs_p[:, None] < positions) & (offs_c[None, :] < channels)
    # (BLOCK_P, BLOCK_C)
    b_x = tl.load(x + offsets(b, offs_p, offs_c, positions, channels), mask=m_x, other=0.0).to(
        tl.float32
    )
    count = tl.minimum(BLOCK_P, positions - block * BLOCK_P)
    mean = tl.sum(b_x, 0) / count
    deviation = tl.where(m_x, b_x - mean[None, :], 0.0)
    p_moments = moments + (b.to(tl.int64) * blocks + block) * 2 * channels + offs_c
    tl.store(p_moments, mean, mask=offs_c < channels)
    tl.store(p_moments + channels, tl.sum(deviation * deviation, 0), mask=offs_c < channels)


@triton.jit
def group_kernel(
    moments,
    weight,
    shift,
    statistics,
    positions,
    channels,
    blocks,
    eps,
    rows,
    stride,  # of shift, from row to row
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Center and scale = weight / sqrt(var + eps) of the WIDTH channels of one group of image b.

    statistics: (B, 2, channels) float32.
    """
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_w = tl.arange(0, BLOCK_W)
    offs_c = g * WIDTH + offs_w
    plus = shift_of(shift, b, offs_c, offs_w < WIDTH, rows, stride)
    p_moments = moments + b * blocks * 2 * channels
    total = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    for start in range(0, blocks, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        count = tl.minimum(BLOCK_P, positions - offs_k * BLOCK_P)  # the last block is shorter
        m_k = (offs_k[:, None] < blocks) & (offs_w[None, :] < WIDTH)
        p_k = p_moments + offs_k.to(tl.int64)[:, None] * 2 * channels + offs_c[None, :]
        total += count[:, None] * tl.load(p_k, m_k, 0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / (tl.cast(positions, tl.float32) * WIDTH)
    center = mean + (tl.sum(plus, 0) / WIDTH - plus)

    total = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    for start in range(0, blocks, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        count = tl.minimum(BLOCK_P, positions - offs_k * BLOCK_P)
        m_k = (offs_k[:, None] < blocks) & (offs_w[None, :] < WIDTH)
        p_k = p_moments + offs_k.to(tl.int64)[:, None] * 2 * channels + offs_c[None, :]
        away = tl.load(p_k, m_k, 0.0) - center[None, :]
        total += tl.where(
            m_k, tl.load(p_k + channels, m_k, 0.0) + count[:, None] * away * away, 0.0
        )
    var = tl.sum(tl.sum(total, 1), 0) / (tl.cast(positions, tl.float32) * WIDTH)

    scale = tl.load(weight + offs_c, offs_w < WIDTH, 0.0).to(tl.float32) / tl.sqrt(var + eps)
    p_statistics = statistics + b * 2 * channels + offs_c
    tl.store(p_statistics, center, mask=offs_w < WIDTH)
    tl.store(p_statistics + channels, scale, mask=offs_w < WIDTH)


@triton.jit
def apply_kernel(
    x,
    statistics,
    bias,
    out,
    positions,
    channels,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = y or silu(y), y = (x - center) * scale + bias, of one block of positions and
    channels."""
    blocks = tl.cdiv(positions, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = offs_c < channels
    m_x = (offs_p[:, None] < positions) & m_c[None, :]
    offs_x = offsets(b, offs_p, offs_c, positions, channels)
    center = tl.load(statistics + b * 2 * channels + offs_c, m_c, 0.0)
    scale = tl.load(statistics + b * 2 * channels + channels + offs_c, m_c, 0.0)
    add = tl.load(bias + offs_c, m_c, 0.0).to(tl.float32)
    deviation = tl.load(x + offs_x, m_x, 0.0).to(tl.float32) - center[None, :]
    y = deviation * scale[None, :] + add[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + offs_x, y.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def layer_norm_kernel(
    x,
    weight,
    bias,
    out,
    h,
    total,
    rows,
    channels,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_R rows, each held whole: x is read once. With h, total = x + h, and the norm is of that
    as it is stored, rounded."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    m_c = offs_c < channels
    m_x = (offs_r[:, None] < rows) & m_c[None, :]
    offs_x = offs_r[:, None] * channels + offs_c[None, :]
    # (BLOCK_R, BLOCK_C)
    b_x = tl.load(x + offs_x, m_x, 0.0).to(tl.float32)
    if h is not None:
        b_x = (b_x + tl.load(h + offs_x, m_x, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + offs_x, b_x, mask=m_x)
        b_x = b_x.to(tl.float32)
    deviation = tl.where(m_c[None, :], b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(deviation * deviation, 1) / channels + eps)
    w, shift = (
        tl.load(weight + offs_c, m_c, 0.0).to(tl.float32),
        tl.load(bias + offs_c, m_c, 0.0).to(tl.float32),
    )
    y = deviation * inverse[:, None] * w[None, :] + shift[None, :]
    tl.store(out + offs_x, y.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def geglu_kernel(x, out, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x: (rows, 2 channels), out: (rows, channels)."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_x = (offs_r[:, None] < rows) & (offs_c[None, :] < channels)
    p_h = x + offs_r[:, None] * 2 * channels + offs_c[None, :]
    h = tl.load(p_h, m_x, 0.0).to(tl.float32)
    gate = tl.load(p_h + channels, m_x, 0.0).to(tl.float32)
    y = (
        h * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    )  # Phi(g) = (1 + erf(g / sqrt 2)) / 2
    p_out = out + offs_r[:, None] * channels + offs_c[None, :]
    tl.store(p_out, y.to(out.dtype.element_ty), mask=m_x)


# The launches: plain Python, for tensors like these. All checks are done in fused.py.

BLOCK_P, BLOCK_C = 64, 64  # positions and channels of a tile
SHORT, NARROW = 1024, 128  # positions and channels of a group up to which GroupNorm is one launch
TILE = 2**14  # numbers of one at a time, 16 in each of 1024 threads: many more are spilled


def prepare_group_norm(x, weight, bias, shift, groups, eps, out, silu=False):
    """x and out: (B, C, h, w) in channels_last memory; shift: None or (rows, C)."""
    B, C, h, w = x.shape
    positions, width = h * w, C // groups
    block_w = triton.next_power_of_2(width)
    of_shift = (1, 0) if shift is None else (len(shift), shift.stride(0))
    if positions <= SHORT and width <= NARROW:
        block_p = min(triton.next_power_of_2(positions), TILE // block_w)
        size = dict(WIDTH=width, BLOCK_P=block_p, BLOCK_W=block_w)
        size["num_warps"] = max(4, block_p * block_w // 512)
        numbers = positions, C, eps, *of_shift
        return Launch(group_norm_kernel, (B * groups,), numbers, SILU=silu, **size)
    blocks = triton.cdiv(positions, BLOCK_P)
    tiles, size = (blocks * B, triton.cdiv(C, BLOCK_C)), dict(BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C)
    take = Launch(moments_kernel, tiles, (positions, C), **size)
    block = dict(BLOCK_P=BLOCK_P, BLOCK_K=64, BLOCK_W=block_w)
    numbers = (positions, C, blocks, eps, *of_shift)
    combine = Launch(group_kernel, (B, groups), numbers, WIDTH=width, **block)
    apply = Launch(apply_kernel, tiles, (positions, C), SILU=silu, **size)

    def launch(x, weight, bias, shift, out):
        moments = x.new_empty(B * blocks * 2 * C, dtype=torch.float32)
        statistics = x.new_empty(B * 2 * C, dtype=torch.float32)
        take(x, moments)
        combine(moments, weight, shift, statistics)
        apply(x, statistics, bias, out)

    return launch


def prepare_group_norm_silu(*args):
    return prepare_group_norm(*args, silu=True)


def prepare_layer_norm(x, weight, bias, eps, out):
    return launch_layer_norm(x, eps, None, None)


def prepare_add_layer_norm(x, h, weight, bias, eps, out):
    """out: (total, its norm)."""
    launch = launch_layer_norm(x, eps)
    return lambda x, h, weight, bias, out: launch(x, weight, bias, out[1], h, out[0])


def launch_layer_norm(x, eps, *absent):
    """absent: None for h and total, which are no arguments of the launch then."""
    C = x.shape[-1]
    rows, block_c = x.numel() // C, triton.next_power_of_2(C)
    block_r = max(1, 4096 // block_c)
    grid, size = (triton.cdiv(rows, block_r),), dict(BLOCK_R=block_r, BLOCK_C=block_c)
    return Launch(layer_norm_kernel, grid, (*absent, rows, C, eps), **size)


def prepare_geglu(x, out):
    C = out.shape[-1]
    rows = out.numel() // C
    grid = (triton.cdiv(rows, 16), triton.cdiv(C, 128))
    return Launch(geglu_kernel, grid, (rows, C), BLOCK_R=16, BLOCK_C=128)
