"""Compile the kernels ahead of time, no GPU needed, and print what each costs on the card.

    python -m bench.kernel_resources [--arch 90 ...] [--json FILE] [--all]

The kernels' own launch functions run with a stand-in for the driver, so what is compiled is what a launch on that card
would compile: same tiles, flags and alignment facts. Registers, stack and instructions are read from the cubin with
the cuobjdump that comes with Triton. LOCAL:0 there does not mean "no spills": STACK, and STL / LDL in the SASS, do.
Cannot share a process with Triton's interpreter.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

B, H = 4, 8  # guidance of a prompt-to-prompt pair: unconditional rows first, the last two are edited
S = 2
SELF = {40: 4096, 80: 1024, 160: 256}  # SD v1.x at 512x512: head dim -> queries at the widest site
UGLY = {40: 4140, 80: 1000, 160: 45}  # queries that no tile divides, of images of 360x736, 400x640 and 160x288
TEXT = 77
# CUDA C++ Programming Guide, table of compute capabilities
SHARED_PER_SM = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}
WARPS_PER_SM = {80: 64, 89: 48, 90: 64}

FORMS = {  # form: (op, edit fields)
    "fold": ("cross", ("source_row", "token_map", "blend", "reweight")),
    "flash": ("attention", ()),
    "flash routed": ("attention", ("source_row",)),
    "plain": ("cross", ()),
    "replace": ("cross", ("source_row",)),
    "two terms": ("cross", ("source_row", "blend")),
    "inject": ("cross", ("inject",)),
    "inject + blend": ("cross", ("inject", "blend")),
    "save": ("save", ("save",)),
    "save_mean": ("save", ("save_mean",)),
    "save, replace": ("save", ("source_row", "save")),
    "save_mean, replace": ("save", ("source_row", "save_mean")),
    "save, blend": ("save", ("source_row", "blend", "reweight", "save")),
    "save_mean, blend": ("save", ("source_row", "blend", "reweight", "save_mean")),
    "save, refine": ("save", ("source_row", "token_map", "blend", "reweight", "save")),
    "save_mean, refine": ("save", ("source_row", "token_map", "blend", "reweight", "save_mean")),
    "save, inject": ("save", ("inject", "token_map", "blend", "reweight", "save")),
}


FUSED = ("group_norm moments", "group_norm group", "group_norm apply", "layer_norm", "geglu")  # see fused.py


class Case(NamedTuple):
    arch: int
    form: str
    head_dim: int  # of a fused kernel: channels
    queries: int  # of a fused kernel: rows
    keys: int
    dtype: str
    batch: int = B


# "plain" and the like are "replace" and the like without the routing.
DISTINCT = ("fold", "flash routed", "replace", "two terms", "inject", "inject + blend", "save", "save_mean, replace", 
            "save, refine", "save_mean, refine", "save, inject")  # fmt: skip


def cases(archs, everything: bool) -> list[Case]:
    """The SD v1.x specialisations, one per head dim and without repetition; with `everything`, all forms in all dtypes.

    float16 of everything, the other dtypes of three forms, and sizes that are no multiple of the tile. sm_89 has the
    instructions and the tiles of sm_80: of it, one dtype of each form at the widest head dim, and the others at the
    narrowest.
    """
    out = []
    for arch in archs:
        short = arch == 89 and not everything
        for form, (op, _) in FORMS.items():
            if not everything and form not in DISTINCT:
                continue
            for D, N in SELF.items():
                keys = N if op == "attention" else TEXT
                if D == 160 or not short:
                    out.append(Case(arch, form, D, N, keys, "float16"))
                if everything or form in ("flash routed", "two terms", "save, refine") and (D == 40 or not short):
                    out += [Case(arch, form, D, N, keys, dtype) for dtype in ("bfloat16", "float32")]
        if not short:
            out.append(Case(arch, "flash", 40, 4096, 4096, "float16"))  # "flash routed" shares maps there
            for D, N in UGLY.items():
                out += [Case(arch, form, D, N, keys, "float16") for form, keys in (("flash", N), ("two terms", TEXT))]
        for form in FORMS if everything else ("flash routed", "two terms"):
            for D in (8, 48, 64, 96, 256):
                keys = 1000 if form.startswith("flash") else TEXT
                for dtype in ("float16", "float32"):
                    if everything or dtype == "float16" or D == 256 and not short:
                        out.append(Case(arch, form, D, 1000, keys, dtype))
        out += [Case(arch, form, C, 1024, 0, "float16") for form in FUSED for C in ((320,) if short else (320, 1280))]
    return out


class CompileOnly:
    """Stands in for Triton's driver: names a target, launches nothing."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device):
        return 0


def compile_case(case: Case):
    """The compiled kernel of one case: run its launch, stop before the launch."""
    import triton
    from triton.runtime.jit import JITFunction

    compiled, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: compiled.append(run(self, *args, **{**kwargs, "warmup": True}))
    triton.runtime.driver.set_active(CompileOnly(case.arch))
    try:
        (launch_fused if case.form in FUSED else launch_attention)(case)
    finally:
        JITFunction.run = run
    # a launch of several kernels: group_norm in three, fold before cross-attention
    return compiled[{"fold": 0, "group_norm moments": 0, "group_norm group": 1}.get(case.form, -1)]


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_fused(case: Case) -> None:
    from minisd_kernels import norms

    C, rows, dtype = case.head_dim, case.queries, getattr(torch, case.dtype)
    parameters = empty(C, dtype=dtype), empty(C, dtype=dtype)
    if case.form == "geglu":
        norms.launch_geglu(empty(rows, 2 * C, dtype=dtype), empty(rows, C, dtype=dtype))
    elif case.form == "layer_norm":
        x = empty(rows, C, dtype=dtype)
        norms.launch_layer_norm(x, *parameters, 1e-5, x)
    else:
        x = empty(2, C, rows, 1, dtype=dtype)
        norms.launch_group_norm_silu(x, 32, *parameters, 1e-5, x)


def launch_attention(case: Case) -> None:
    from minisd_kernels import attention, cross_attention, ops

    op, names = FORMS[case.form]
    N, L, D, dtype = case.queries, case.keys, case.head_dim, getattr(torch, case.dtype)
    q, k, v = (empty(case.batch, n, H, D, dtype=dtype).transpose(1, 2) for n in (N, L, L))
    out = ops.empty_out(q)
    edit = {
        "source_row": empty(S, dtype=torch.int64),
        "inject": empty(S, H, N, L, dtype=dtype),
        "token_map": empty(S, L, L, dtype=torch.float32),
        "blend": empty(S, L, dtype=torch.float32),
        "reweight": empty(S, L, dtype=torch.float32),
        "save": empty(S, H, N, L, dtype=dtype),
        "save_mean": empty(S, N, L, dtype=torch.float32),
    }
    edit = {name: x if name in names else None for name, x in edit.items()}
    if op == "attention":
        attention.launch(q, k, v, edit["source_row"], out)
    elif op == "cross":
        cross_attention.launch(q, k, v, *list(edit.values())[:5], out)
    else:
        cross_attention.launch_save(q, k, v, *edit.values(), out)


def measure(case: Case) -> dict:
    """What the cubin says: registers, stack bytes, spill and matrix instructions, shared memory, CTAs per SM."""
    import triton

    kernel = compile_case(case)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, f.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9.]*)", sass, re.M)
    count = {name: sum(op.split(".")[0] == name for op in opcodes) for name in ("STL", "LDL", "HGMMA", "HMMA")}
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared + found["SHARED"]
    registers = -(-found["REG"] // 8) * 8 * 32 * warps
    blocks = min(65536 // registers, SHARED_PER_SM[case.arch] // (shared + 1024), WARPS_PER_SM[case.arch] // warps)
    return {
        **case._asdict(),
        "warps": warps,
        "registers": found["REG"],
        "stack": found["STACK"],
        "spills": count["STL"] + count["LDL"],
        "shared": shared,
        "wgmma": count["HGMMA"],
        "mma": count["HMMA"],
        "instructions": len(opcodes),
        "ctas": blocks,
        "occupancy": blocks * warps / WARPS_PER_SM[case.arch],
        "tf32": kernel.asm["ptx"].count("tf32"),
        "narrow_loads": sum(op.startswith("LDG.E.U16") for op in opcodes),
    }


HEADER = (
    "arch form                 D     N    L dtype    warps  reg stack spill shared KiB"
    " wgmma  mma instr CTA/SM occupancy"
)


def line(r: dict) -> str:
    return (
        f"{r['arch']:>4} {r['form']:<18}{r['head_dim']:>4}{r['queries']:>6}{r['keys']:>5} {r['dtype']:<9}"
        f"{r['warps']:>5}{r['registers']:>5}{r['stack']:>6}{r['spills']:>6}{r['shared'] / 1024:>11.1f}"
        f"{r['wgmma']:>6}{r['mma']:>5}{r['instructions']:>6}{r['ctas']:>7}{r['occupancy']:>10.2f}"
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_resources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 89, 90], choices=[80, 89, 90])
    parser.add_argument("--all", action="store_true", help="every form in every dtype and head dim")
    parser.add_argument("--only", default="", help="only forms that contain this")
    parser.add_argument("--jobs", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    args = parser.parse_args(argv)
    wanted = [case for case in cases(args.arch, args.all) if args.only in case.form]
    print(HEADER)
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for row in pool.imap(measure, wanted):
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
