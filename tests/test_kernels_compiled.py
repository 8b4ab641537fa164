"""The Triton kernels compiled for sm_80, sm_89 and sm_90 without a GPU: spills, shared memory, matrix instructions.

The compiles run in a process of their own, which the interpreter (test_kernels_interpreter.py) cannot share; the table
is that of `python -m bench.kernel_resources`.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernel_resources import DISTINCT, FUSED, SHARED_PER_BLOCK

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """One row for each specialisation that SD v1.x uses, deduplicated."""
    file = tmp_path_factory.mktemp("resources") / "table.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernel_resources", "--jobs", "2", "--json", str(file)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert file.exists(), done.stdout[-5000:] + done.stderr[-10000:]
    return json.loads(file.read_text())


def fail_with(rows, text):
    assert not rows, "\n".join([f"{text}:", *map(str, rows)])


def test_every_specialisation_is_there(table):
    for name, least in (
        ("arch", {80, 89, 90}),
        ("head_dim", {8, 40, 48, 64, 80, 96, 160, 256}),
        ("dtype", {"float16", "bfloat16", "float32"}),
    ):
        assert {row[name] for row in table if row["form"] not in FUSED} == least
    for form in FUSED:
        assert {row["arch"] for row in table if row["form"] == form} == {80, 89, 90}
    sd = {(row["arch"], row["dtype"], row["form"], row["head_dim"]) for row in table}
    maps = [form for form in DISTINCT if form.startswith("save")]
    every = [*itertools.product((80, 90), ("float16",), DISTINCT, (40, 80, 160))]
    every += itertools.product((80, 90), ("float32",), maps, (40, 80, 160))
    every += itertools.product((80, 90), ("bfloat16",), maps, (160,))
    every += itertools.product((89,), ("float16",), DISTINCT, (160,))
    every += itertools.product((80, 89, 90), ("float16",), ("flash",), (40,))
    assert sd >= {*every}


def test_nothing_spills(table):
    """Stack bytes and STL / LDL instructions; cuobjdump's LOCAL:0 would not show a spill."""
    fail_with([r for r in table if r["stack"] or r["spills"]], "registers are spilled")


def test_shared_memory_is_within_the_limit(table):
    """Compiling ahead of time never checks it."""
    fail_with([r for r in table if r["shared"] > SHARED_PER_BLOCK[r["arch"]]], "too much shared memory")


def test_half_precision_runs_on_tensor_cores(table):
    half = [r for r in table if r["dtype"] != "float32" and r["form"] not in ("fold", *FUSED)]
    fail_with([r for r in half if not r["wgmma"] + r["mma"]], "no matrix instruction")
    fail_with([r for r in half if r["arch"] == 90 and not r["wgmma"]], "no wgmma on sm_90")


def test_float32_is_not_tf32(table):
    """input_precision="ieee", which the interpreter cannot tell from Triton's default."""
    single = [r for r in table if r["dtype"] == "float32"]
    assert single
    fail_with([r for r in table if r["tf32"]] + [r for r in single if r["mma"] + r["wgmma"]], "TF32")


def test_loads_are_wide(table):
    """A head stride of 40 must not turn loads of q, k, v into 2-byte loads, nor 77 tokens those of a token map.

    Rows of stored maps are odd by nature.
    """
    forms = ("flash", "flash routed", "replace", "two terms", "save", "save, refine")
    forms += ("geglu", "group_norm moments", "group_norm apply")
    no_maps = [r for r in table if r["form"] in forms and r["dtype"] != "float32"]
    fail_with([r for r in no_maps if r["narrow_loads"]], "2-byte loads")
