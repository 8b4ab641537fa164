"""What a launch asks the compiler for, without a card: sizes past 2^31 and 65535, and no compile
for a row of a table.

In processes of their own, because Triton's driver is replaced and the interpreter must be off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

START = """
import json, torch, triton
from triton.runtime.jit import JITFunction
from bench.kernel_resources import CompileOnly
from minisd_kernels import dispatch, fused, toolchain

toolchain.choose = lambda arch: None
triton.runtime.driver.set_active(CompileOnly(80))
grids, kernels, run = [], {}, JITFunction.run

def compile_only(self, *args, grid, **kwargs):
    kwargs.pop("warmup")
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    grids.append(grid(kwargs) if callable(grid) else grid)
    kernels.setdefault(self.__name__, set()).add(kernel.hash)

JITFunction.run = compile_only

def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(name, *args):
    # as the first call of an op does
    out = dispatch.EMPTY[name](*args)
    dispatch.prepare(name, args, out)(*args[: dispatch.TENSORS[name]], out)
"""


def run(code):
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", START + code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rows_of_a_table_do_not_compile_anew():
    """Row i of a table of 77 weights begins 308 i bytes after the first: 16 bytes divide that, or
    not."""
    counts = run("""
q, k = empty(2, 8, 64, 40), empty(2, 8, 77, 40)
blend, reweight = (empty(4, 1, 77, dtype=torch.float32) for _ in range(2))
token_map, mean = empty(4, 1, 77, 77, dtype=torch.float32), empty(4, 1, 64, 77, dtype=torch.float32)
source, save = empty(4, 1, dtype=torch.int32), empty(1, 8, 64, 77)
aligned = set()
for i in range(4):
    edit = source[i], None, token_map[i], blend[i], reweight[i]
    assert all(x.is_contiguous() for x in edit if x is not None)
    aligned.add(tuple(x.storage_offset() * 4 % 16 == 0 for x in edit if x is not None))
    launch('attention', q, q, q, source[i], *[None] * 4, False)
    launch('cross_attention', q, k, k, *edit, None, None)
    launch('cross_attention_save', q, k, k, *edit, None, save, mean[i], None)
assert len(aligned) == 2, aligned
print(json.dumps({name: len(hashes) for name, hashes in kernels.items()}))
""")
    assert counts == dict.fromkeys(
        (
            "attention_kernel",
            "mean_kernel",
        ),
        1,
    ) | {"cross_attention_kernel": 2}  # with and without a save


def test_more_than_65535_rows_or_heads_are_launched():
    grids = run("""
for B, H in ((65536, 2), (2, 65536)):
    q, k = empty(B, H, 64, 8), empty(B, H, 5, 8)
    row, blend = empty(1, dtype=torch.int32), empty(1, 5, dtype=torch.float32)
    launch('attention', q, q, q, *[None] * 5, False)
    launch('cross_attention', q, k, k, row, None, None, blend, *[None] * 3)
    launch('cross_attention_save', q, k, k, *[None] * 7, empty(1, 64, 5, dtype=torch.float32), None)
for side in (4, 256):  # in one launch, and in three
    x = empty(65536, 64, side, side).to(memory_format=torch.channels_last)
    launch("group_norm_silu", x, empty(64), empty(64), empty(2, 64), 32, 1e-5)
print(json.dumps(grids))
""")
    assert len(grids) == 2 * 4 + 1 + 3
    assert all(max([0, *grid[1:]]) <= 65535 and grid[0] < 2**31 for grid in grids)
    assert sum(grid[0] >= 65536 for grid in grids) == 2 * 3 + 1 + 3  # the mean is of one edited row


def test_strides_are_widened_before_they_are_multiplied():
    """No 32-bit product but of a block's number and its size: a stride, or UNIT (8), meets 64
    bits."""
    products = run("""
last = {}
def keep(self, *args, grid, **kwargs):
    kwargs.pop("warmup")
    name = f"{self.__name__} {len(last)}"
    last[name] = run(self, *args, grid=grid, warmup=True, **kwargs).asm["ttir"]

JITFunction.run = keep
q, k = empty(4, 2, 64, 40), empty(4, 2, 77, 40)
maps, mean = empty(2, 2, 64, 77), empty(2, 64, 77, dtype=torch.float32)
launch('attention', q, q, q, *[None] * 5, False)
launch('cross_attention', q, k, k, None, maps, None, empty(2, 77, dtype=torch.float32), *[None] * 3)
launch('cross_attention_save', q, k, k, *[None] * 6, maps, mean, None)
for side in (9, 64):  # in one launch, and in three
    x = empty(2, 1024, side, side).to(memory_format=torch.channels_last)
    for shift in (None, empty(2, 1024)):
        launch("group_norm_silu", x, empty(1024), empty(1024), shift, 32, 1e-5)
rows = empty(8, 320)
launch("layer_norm", rows, empty(320), empty(320), 1e-5)
launch("add_layer_norm", rows, rows, empty(320), empty(320), 1e-5)
launch("geglu", rows)
import re
found = {}
for name, text in last.items():
    blocks = re.findall(r"(%\\w+) = arith.constant (?:16|32|64|128) : i32", text)
    by_block = re.compile("|".join([r"%cst\\w*", *blocks]) + r"\\b")
    found[name] = [line.strip() for line in text.splitlines()
                   if re.search(r"arith.muli .*i32", line) and not by_block.search(line)]
print(json.dumps(found))
""")
    assert len(products) == 15 and not sum(products.values(), []), products
