"""A kernel that ptxas 12.8 miscompiles for sm_90, kept to try bench/sass.py on; the project does
not use it.

out = softmax(q k^T) v with head dim 40 cut into tiles of 32 and 16 columns, and 77 keys into 64 and
16. On an H200 such kernels returned errors of order 0.5 (Triton 3.6.0, ptxas 12.8.93). Run as a
program, it compiles itself for sm_90 and prints what is found, as JSON: [unwritten, wrong
descriptors].
"""

import json

import torch
import triton
import triton.language as tl

HEAD, KEYS = ((0, 32), (32, 16)), ((0, 64), (64, 16))


@triton.jit
def columns(CUT: tl.constexpr, i: tl.constexpr):
    return CUT[i][0] + tl.arange(0, CUT[i][1])


@triton.jit
def load(p, rows, cols, width, limit: tl.constexpr, WIDTH: tl.constexpr):
    mask = (rows[:, None] < limit) & (cols[None, :] < WIDTH)
    return tl.load(p + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def split_kernel(
    q, k, v, out, D: tl.constexpr, L: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr
):
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    s = ()
    for j in tl.static_range(2):
        acc = zeros(64, KEYS[j][1])
        for i in tl.static_range(2):
            b_q = load(q, rows, columns(HEAD, i), D, 4096, D)
            acc = tl.dot(b_q, load(k, columns(KEYS, j), columns(HEAD, i), D, L, D).T, acc)
        s = s + (tl.where(columns(KEYS, j)[None, :] < L, acc, float("-inf")),)
    m = tl.maximum(tl.max(s[0], 1), tl.max(s[1], 1))
    p = (tl.exp2(s[0] - m[:, None]), tl.exp2(s[1] - m[:, None]))
    total = tl.sum(p[0], 1) + tl.sum(p[1], 1)
    for i in tl.static_range(2):
        cols = columns(HEAD, i)
        acc = zeros(64, HEAD[i][1])
        for j in tl.static_range(2):
            acc = tl.dot(p[j].to(tl.float16), load(v, columns(KEYS, j), cols, D, L, D), acc)
        tl.store(
            out + rows[:, None] * D + cols[None, :],
            (acc / total[:, None]).to(tl.float16),
            cols[None, :] < D,
        )


def main():
    from bench import sass
    from bench.kernel_resources import CompileOnly, disassemble, instructions

    triton.runtime.driver.set_active(CompileOnly(90))
    tensors = (torch.empty(4096, 40, dtype=torch.float16, device="meta") for _ in range(4))
    kernel = split_kernel.warmup(*tensors, D=40, L=77, HEAD=HEAD, KEYS=KEYS, grid=(64,))
    (code,) = disassemble(90, [instructions(kernel.asm["cubin"])])
    print(json.dumps([sass.unwritten(code), sass.wrong_descriptors(code, kernel.asm["ptx"])]))


if __name__ == "__main__":
    main()
