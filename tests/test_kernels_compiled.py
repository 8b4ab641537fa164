"""The Triton kernels compiled for sm_80 and sm_90 without a GPU: right code, no spills, shared
memory, tensor cores.

The table is that of `python -m bench.kernel_resources`. Its compiles run in processes of their own,
because they cannot share one with the interpreter (test_kernels_interpreter.py). The larger list
(`--matrix`), with sm_89, sm_100 and sm_120 and with other versions of Triton, is run by hand; its
results are in bench/results/sass/.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import sass
from bench.kernel_resources import (
    FAULTS,
    FORMS,
    FUSED,
    KERNELS,
    SHARED_PER_BLOCK,
    WIDE,
    Case,
    main,
    matrix,
    suite,
)

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """One row for each specialisation; compiled on the processors that other processes of this
    session (pytest-xdist) leave."""
    path = tmp_path_factory.mktemp("kernels") / "table.json"
    sessions = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    jobs = max(1, (os.cpu_count() or 1) // sessions)
    command = [sys.executable, "-m", "bench.kernel_resources", "--jobs", str(jobs)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert path.exists(), done.stdout[-15000:] + done.stderr[-5000:]
    return json.loads(path.read_text())


def fail_with(rows, text):
    assert not rows, "\n".join([f"{text}:", *map(str, rows)])


def test_every_specialisation_is_there(table):
    """Every kernel, and the list itself: each head dim of SD v1.x, 72 and 256, uneven queries,
    every dtype."""
    assert [Case(**{name: row[name] for name in Case._fields}) for row in table] == [
        *suite(80),
        *suite(90),
    ]
    assert {FORMS[r["form"]][0] for r in table if r["form"] in FORMS} | {*FUSED} == {*KERNELS}
    for form in ("flash routed", "refine", "save, refine"):
        mine = [row for row in table if row["form"] == form and row["arch"] == 90]
        assert {8, 40, 72, 80, 160, 256} == {
            row["head_dim"] for row in mine if row["dtype"] == "float16"
        }
        assert {"float16", "bfloat16", "float32"} == {row["dtype"] for row in mine}
    assert set(suite(90)) < set(matrix(90)) and len(table) <= 270  # seconds of CI


def test_no_register_is_read_before_it_is_written(table):
    fail_with([r for r in table if r["unwritten"]], "reads of registers that nothing has written")


def test_the_descriptors_of_products_are_those_of_the_ptx(table):
    assert any(r["wgmma"] for r in table)
    fail_with(
        [r for r in table if r["descriptors"]], "wgmma descriptors that the PTX does not have"
    )


def test_no_factor_is_overwritten_while_it_is_read(table):
    fail_with([r for r in table if r["overwritten"]], "registers of a wgmma that are written early")


def test_kernels_that_are_known_to_be_wrong_are_found():
    """Those of split_tiles.py were wrong on a card with ptxas 12.8: one by a register that nothing
    has written, one by registers that hold something else. What a newer ptxas makes is right."""
    from triton import knobs

    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env.pop("TRITON_INTERPRET", None)

    def look(**more):
        command = [sys.executable, str(Path(__file__).with_name("split_tiles.py"))]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    if knobs.nvidia.ptxas.version == "12.8":
        found = look()
        unwritten, _ = found["split_kernel"]
        assert unwritten and "UIADD3" in unwritten[0] and "<- UR" in unwritten[0]
        unwritten, wrong = found["stored_kernel"]
        assert not unwritten and any("64x32x16" in text for text in wrong)
    blackwell = knobs.nvidia.ptxas_blackwell
    if blackwell.version != "12.8":
        found = look(TRITON_PTXAS_PATH=blackwell.path)
        assert found == {"split_kernel": [[], []], "stored_kernel": [[], []]}


def test_what_nvdisasm_notes_beside_an_instruction_is_left_out():
    text = """
        /*0010*/                   LDG.E R2, desc[UR4][R2.64]          &req={3} &wr=0x1  ?trans7 ;
        /*0020*/              @!P0 BRA 0x710                  ?WAIT15_END_GROUP;
    """
    assert [str(ins) for ins in sass.parse(text)] == [
        "0x0010  LDG.E R2, desc[UR4][R2.64]",
        "0x0020 @!P0 BRA 0x710",
    ]


def listing(*lines):
    """Lines of code as nvdisasm prints them."""
    return sass.parse(
        "".join(f"        /*{16 * i:04x}*/                   {x} ;\n" for i, x in enumerate(lines))
    )


@pytest.mark.parametrize(
    "lines, found",
    [
        (["UMOV UR4, 0x1", "UIADD3 UR5, UR4, UR6, URZ", "EXIT"], ["UR6"]),
        (["ULDC.64 UR4, c[0x0][0x208]", "LDG.E R2, desc[UR4][R2.64]", "EXIT"], ["R2, R3"]),
        (["@P0 BRA 0x20", "UMOV UR4, 0x1", "UMOV UR5, UR4", "EXIT"], ["UR4"]),  # on one path only
        (
            ["@P0 BRA 0x20", "MOV R4, 0x1", "MOV R5, R4", "EXIT"],
            [],
        ),  # legal, if the same branch uses it
        (["BRA 0x20", "UMOV UR5, UR4", "EXIT"], []),  # never reached
        (["UMOV UR4, 0x0", "@!P0 BRA 0x0", "UMOV UR5, UR4", "EXIT"], []),
        (
            ["BSSY B0, 0x40", "@P0 BRA 0x30", "UMOV UR4, 0x1", "BSYNC B0", "UMOV UR5, UR4", "EXIT"],
            ["UR4"],
        ),
        (
            ["CALL.REL.NOINC 0x30", "MOV R5, R4", "EXIT", "MOV R4, RZ", "RET.REL.NODEC R2 0x0"],
            ["R2"],
        ),
        (
            [
                "UMOV UR4, 0x1",
                "UMOV UR5, 0x1",
                "HGMMA.64x64x16.F32 R24, R24, gdesc[UR4].tnspB, RZ",
                "EXIT",
            ],
            ["R24, UR6, UR7"],
        ),
        (
            [
                "ULDC.128 UR4, c[0x0][0x0]",
                "HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ, !UPT",
                "FADD R0, R55, R56",
            ],
            ["R56"],
        ),
    ],
)
def test_what_is_read_before_it_is_written(lines, found):
    assert [text.split("<- ")[1] for text in sass.unwritten(listing(*lines))] == found


PTX = """
    mov.b32 %r1, global_smem;
    bfe.u32 %r2, %r1, 4, 14;
    cvt.u64.u32 %rd1, %r2;
    or.b64 %rd2, %rd1, -9223371899415822336;
    wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%r3,%r4}, {%r5,%r6}, %rd2, %p1, 1, 1, 0, 1;
"""


@pytest.mark.parametrize("high, right", [("-0x7fffffe0", True), ("-0x7ffffbe0", False)])
def test_a_descriptor_that_is_written_but_wrong(high, right):
    """Registers that hold something else: the PTX says 0x80000020 above 0x40."""
    code = listing(
        "UMOV UR4, 0x400",
        "USHF.R.U32.HI UR4, URZ, 0x4, UR4",
        "USGXT.U32 UR6, UR4, 0xe",
        f"UIADD3 UR7, URZ, {high}, URZ",
        "HGMMA.64x32x16.F32 R24, R4, gdesc[UR4].tnspB, RZ",
        "EXIT",
    )
    found = sass.wrong_descriptors(code, PTX)
    assert (found == []) == right


@pytest.mark.parametrize(
    "lines, found",
    [
        (["MOV R25, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], ["MOV"]),
        (["WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R25, R2"], []),
        (["WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R27, R2"], ["MOV"]),  # one may still be running
        (["MOV R28, R2"], []),
        (["@P0 BRA 0x30", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R26, R2"], ["MOV"]),  # on one path
        (["HGMMA.64x32x16.F32 R16, R40, gdesc[UR4], R16"], ["HGMMA"]),  # the sum, over a factor
    ],
)
def test_what_is_overwritten_while_a_product_reads_it(lines, found):
    """The factor of the first product is R24 to R27."""
    code = listing("HGMMA.64x32x16.F32 R64, R24, gdesc[UR4], RZ", *lines, "EXIT")
    assert [text.split()[1].split(".")[0] for text in sass.overwritten(code)] == found


def test_a_jump_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="a jump that is not understood: 0x0000  BRX R2"):
        sass.unwritten(listing("BRX R2 -0x10", "EXIT"))


def test_nothing_spills(table):
    """Stack bytes and STL / LDL instructions; cuobjdump's LOCAL:0 would not show a spill."""
    fail_with([r for r in table if FAULTS["spilled"](r)], "registers are spilled")


def test_shared_memory_is_within_the_limit(table):
    """Compiling ahead of time never checks it. Where sm_80's kernels go, those of sm_89 and sm_120
    go, too."""
    fail_with(
        [r for r in table if r["shared"] > SHARED_PER_BLOCK[r["arch"]]], "too much shared memory"
    )
    fail_with(
        [r for r in table if r["arch"] == 80 and r["shared"] > SHARED_PER_BLOCK[120]],
        "too much for sm_120",
    )


def test_half_precision_runs_on_tensor_cores(table):
    half = [r for r in table if r["dtype"] != "float32" and r["form"] not in FUSED]
    half = [r for r in half if FORMS[r["form"]][0] != "mean"]
    fail_with([r for r in half if not r["wgmma"] + r["mma"]], "no matrix instruction")
    small = [
        r for r in half if r["form"].startswith("backward") and r["head_dim"] > 64
    ]  # tiles of 32 rows
    wide = [r for r in half if r["form"] in WIDE and r["keys"] > 128]  # of 16 rows
    hopper = [r for r in half if r["arch"] == 90 and r not in small + wide]
    fail_with([r for r in hopper if not r["wgmma"]], "no wgmma on sm_90")


def test_float32_is_not_tf32(table):
    """input_precision="ieee", which the interpreter cannot tell from Triton's default."""
    single = [r for r in table if r["dtype"] == "float32"]
    assert single
    fail_with(
        [r for r in table if r["tf32"]] + [r for r in single if r["mma"] + r["wgmma"]], "TF32"
    )


def test_nothing_becomes_tf32_on_sm_100(tmp_path):
    """Its compiler made TF32 products of float16 numbers that a kernel had widened, in spite of
    "ieee". A stored map is widened, moved by a float32 table and multiplied with V."""
    path = tmp_path / "table.json"
    command = [sys.executable, "-m", "bench.kernel_resources", "--arch", "100"]
    command += ["--only", "refine, inject", "--json", str(path)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert path.exists(), done.stdout[-15000:] + done.stderr[-5000:]
    rows = json.loads(path.read_text())
    assert {r["dtype"] for r in rows} == {"float16", "float32"}
    fail_with([r for r in rows if r["tf32"]], "TF32")
    for r in rows:
        assert (r["tcgen05"] + r["mma"] > 0) == (r["dtype"] == "float16"), r


def test_loads_are_wide(table):
    """A head stride of 40 must not turn loads of q, k, v into 2-byte loads, nor 77 tokens those of
    a token map.

    Rows of stored maps are odd by nature.
    """
    forms = ("flash", "flash routed", "replace", "refine", "save", "save, refine")
    forms += ("geglu", "group_norm moments", "group_norm apply")
    no_maps = [r for r in table if r["form"] in forms and r["dtype"] != "float32"]
    fail_with([r for r in no_maps if r["narrow_loads"]], "2-byte loads")


def test_forms_are_listed(capsys):
    assert main(["--list-forms"]) == 0
    assert {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()} == {
        *FORMS,
        *FUSED,
    }
