"""Kernels that ptxas 12.8 miscompiles for sm_90, kept to try bench/sass.py on; the project does not
use them.

out = P v with 77 keys cut into tiles of 64 and 16 columns. On an H200 such kernels returned errors
of order 0.5 (Triton 3.6.0, ptxas 12.8.93). `split_kernel`: P = softmax(q k^T), head dim 40 = 32 +
8 (16); it reads a register that nothing has written. `stored_kernel`: P of some rows is stored,
head dim 96 = 64 + 32; its registers are written, but with something else. Run as a program, it
compiles both for sm_90 and prints what is found, as JSON: {name: [unwritten, wrong descriptors]}.
"""

import json

import torch
import triton
import triton.language as tl

KEYS = ((0, 64), (64, 16))
HEAD_40, HEAD_96 = ((0, 32), (32, 16)), ((0, 64), (64, 32))


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


@triton.jit
def add_product(
    acc, p, v, D: tl.constexpr, L: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr
):
    for j in tl.static_range(2):
        longer = ()
        for i in tl.static_range(2):
            b_v = load(v, columns(KEYS, j), columns(HEAD, i), D, L, D)
            longer = longer + (tl.dot(p[j].to(tl.float16), b_v, acc[i]),)
        acc = longer
    return acc


@triton.jit
def stored_kernel(
    q,
    k,
    v,
    v_source,
    maps,
    out,
    first,
    queries,
    D: tl.constexpr,
    L: tl.constexpr,
    HEAD: tl.constexpr,
    KEYS: tl.constexpr,
):
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    acc = (zeros(64, HEAD[0][1]), zeros(64, HEAD[1][1]))
    if tl.program_id(1) < first:
        s = ()
        for j in tl.static_range(2):
            product = zeros(64, KEYS[j][1])
            for i in tl.static_range(2):
                b_q = load(q, rows, columns(HEAD, i), D, 4096, D)
                b_k = load(k, columns(KEYS, j), columns(HEAD, i), D, L, D)
                product = tl.dot(b_q, b_k.T, product)
            s = s + (tl.where(columns(KEYS, j)[None, :] < L, product, float("-inf")),)
        m = tl.maximum(tl.max(s[0], 1), tl.max(s[1], 1))
        p = (tl.exp2(s[0] - m[:, None]), tl.exp2(s[1] - m[:, None]))
        inverse = 1 / (tl.sum(p[0], 1) + tl.sum(p[1], 1))
        p = (p[0] * inverse[:, None], p[1] * inverse[:, None])
        acc = add_product(acc, p, v, D, L, HEAD, KEYS)
    if tl.program_id(1) >= first:
        p = ()
        for j in tl.static_range(2):
            p = p + (load(maps, rows, columns(KEYS, j), L, 4096, L).to(tl.float32),)
        acc = add_product(acc, p, v_source, D, L, HEAD, KEYS)
    for i in tl.static_range(2):
        cols = columns(HEAD, i)
        mask = (rows[:, None] < queries) & (cols[None, :] < D)
        tl.store(out + rows[:, None] * D + cols[None, :], acc[i].to(tl.float16), mask)


def main():
    from bench import sass
    from bench.kernel_resources import CompileOnly, disassemble, instructions

    triton.runtime.driver.set_active(CompileOnly(90))
    found = {}
    for kernel, D, HEAD, tensors, numbers in (
        (split_kernel, 40, HEAD_40, 4, ()),
        (stored_kernel, 96, HEAD_96, 6, (2, 1000)),
    ):
        x = [torch.empty(4096, D, dtype=torch.float16, device="meta") for _ in range(tensors)]
        done = kernel.warmup(*x, *numbers, D=D, L=77, HEAD=HEAD, KEYS=KEYS, grid=(64, 4))
        (code,) = disassemble(90, [instructions(done.asm["cubin"])])
        wrong = sass.wrong_descriptors(code, done.asm["ptx"])
        found[kernel.__name__] = [sass.unwritten(code), wrong]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
