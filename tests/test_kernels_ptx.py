"""What the compiled PTX computes, below Triton's own level, where an emulator of PTX is at hand.

MINISD_PTX_EMULATOR names a Python file with run_kernel(kernel, args, grid), which runs a compiled
kernel on the memory of CPU tensors; args: every argument by its name. None comes with minisd.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EMULATOR = os.environ.get("MINISD_PTX_EMULATOR")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not EMULATOR, reason="MINISD_PTX_EMULATOR names no emulator of PTX"),
]

RUN = """
import importlib.util, json, os, sys
import torch, triton
from kernel_cases import check, edit_tensors, tensors
from minisd_kernels import dispatch, ops, reference, toolchain
from triton.runtime.jit import JITFunction
from bench.kernel_resources import CompileOnly

path = os.environ["MINISD_PTX_EMULATOR"]
sys.path.insert(0, os.path.dirname(path))
spec = importlib.util.spec_from_file_location("emulator", path)
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)
toolchain.choose = lambda arch: None
dispatch.refuse_cpu = lambda q: None
triton.runtime.driver.set_active(CompileOnly(int(sys.argv[2])))
run, launched = JITFunction.run, []

def emulate(self, *args, grid, **kwargs):
    kwargs.pop("warmup")
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    emulator.run_kernel(kernel, dict(zip(self.arg_names, args)) | kwargs, grid)
    launched.append(self.__name__)

JITFunction.run = emulate

def three(n, keys, d, key_heads=2):
    q, _, _ = tensors(3, 2, n, keys, d, torch.float16, n)
    _, k, v = tensors(3, key_heads, n, keys, d, torch.float16, n + 1)
    return q, k, v

def edited(*mix, keys=77, source="source_row"):
    return edit_tensors(source, mix, 2, 65, keys, torch.float16, 0)

row = torch.tensor([1, 0])
CASES = {
    "self-injection": ("attention", three(130, 130, 40), {"source_row": row}),
    "causal, fewer key heads, lse": (
        "attention", three(70, 70, 80, 1), {"is_causal": True, "return_lse": True}
    ),
    "refine": ("cross_attention", three(65, 77, 40), edited("token_map", "blend", "reweight")),
    "inject": ("cross_attention", three(65, 77, 96), edited("blend", source="inject")),
    "a long prompt": (
        "cross_attention", three(65, 154, 40), edited("token_map", "blend", keys=154)
    ),
    "save": ("cross_attention", three(65, 77, 40), edited("token_map", "blend") | {"save": 77}),
    "save a long prompt": (
        "cross_attention", three(33, 154, 40), {"source_row": row, "save": 154}
        | {"token_map": torch.rand(2, 154, 154) / 154}
    ),
}
name, (q, k, v), edit = CASES[sys.argv[1]]

def call(op, q, k, v):
    given = dict(edit)
    if "inject" in given:
        given["inject"] = given["inject"].to(q.dtype)
    if "save" in given:
        given["save"] = torch.full((2, 2, q.shape[2], edit["save"]), torch.nan, dtype=q.dtype)
        given["save_mean"] = torch.zeros(2, q.shape[2], edit["save"])
    out = op(q, k, v, **given)
    saved = [given[n] for n in ("save", "save_mean") if n in given]
    return [*(out if isinstance(out, tuple) else (out,)), *saved]

with torch.no_grad():
    got = call(getattr(ops, name), q, k, v)
formula = getattr(reference, name)
eager, want = call(formula, q, k, v), call(formula, q.double(), k.double(), v.double())
errors = []
for mine, theirs, exact in zip(got, eager, want):
    check(mine, theirs, exact.double(), torch.float16, sys.argv[1])
    errors.append([(x.double() - exact).abs().max().item() for x in (mine, theirs)])
print(json.dumps([launched, errors]))
"""


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "case, kernels",
    [
        ("self-injection", 1),
        ("causal, fewer key heads, lse", 1),
        ("refine", 1),
        ("inject", 1),
        ("a long prompt", 1),
        ("save", 2),
        ("save a long prompt", 2),
    ],
)
def test_the_ptx_computes_the_formula(case, kernels, arch, capsys):
    """Within the error budget of the interpreter's tests; NaN where nothing is written."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), *sys.path])
    command = [sys.executable, "-c", RUN, case, str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched, errors = json.loads(done.stdout.splitlines()[-1])
    assert len(launched) == kernels
    with capsys.disabled():
        print(f"\n{case}, sm_{arch}: {launched}, (error, eager's) {errors}")
