"""The Triton kernels compiled for sm_80, sm_89 and sm_90 without a GPU: spills, shared memory, matrix instructions.

The table is that of `python -m bench.kernel_resources`. Its compiles run in processes of their own, because they cannot
share one with the interpreter (test_kernels_interpreter.py), and from the start of the session to its end, which is
when these tests come (conftest.py): most other tests leave one core idle, and this takes twenty minutes of one.
"""

import itertools
import json

import pytest

from bench.kernel_resources import DISTINCT, DTYPES, FORMS, FUSED, OTHER, SHARED_PER_BLOCK

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def table(compiles):
    """One row for each specialisation."""
    process, folder = compiles
    process.wait()
    assert (folder / "table.json").exists(), (folder / "log").read_text()[-15000:]
    return json.loads((folder / "table.json").read_text())


def fail_with(rows, text):
    assert not rows, "\n".join([f"{text}:", *map(str, rows)])


def test_every_specialisation_is_there(table):
    """Every form at the head dims of SD v1.x, and each that is another kernel at the other head dims."""
    there = {(row["arch"], row["dtype"], row["form"], row["head_dim"]) for row in table}
    small = {(row["arch"], row["dtype"]) for row in table if row["keys"] == 64}
    assert small == {*itertools.product((80, 89, 90), DTYPES)} == {
        (row["arch"], row["dtype"]) for row in table if (row["head_dim"], row["batch"]) == (80, 2)
    }
    every = {*itertools.product((80, 89, 90), DTYPES, FORMS, (40, 80, 160))}
    every |= {*itertools.product((80, 89, 90), DTYPES, DISTINCT, OTHER)}
    for form, channels in FUSED.items():
        every |= {*itertools.product((80, 89, 90), DTYPES, (form,), channels)}
    assert there == every and len(every) == 3 * 3 * (22 * 3 + 11 * 5 + 33)


def test_nothing_spills(table):
    """Stack bytes and STL / LDL instructions; cuobjdump's LOCAL:0 would not show a spill."""
    fail_with([r for r in table if r["stack"] or r["spills"]], "registers are spilled")


def test_shared_memory_is_within_the_limit(table):
    """Compiling ahead of time never checks it."""
    fail_with([r for r in table if r["shared"] > SHARED_PER_BLOCK[r["arch"]]], "too much shared memory")


def test_half_precision_runs_on_tensor_cores(table):
    half = [r for r in table if r["dtype"] != "float32" and r["form"] not in FUSED]
    half = [r for r in half if FORMS[r["form"]][0] != "fold"]
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
