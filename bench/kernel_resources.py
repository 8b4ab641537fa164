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
SHARED_PER_BLOCK = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
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
    "save + save_mean": ("save", ("source_row", "save", "save_mean")),
    "save, refine": ("save", ("source_row", "token_map", "blend", "reweight", "save")),
    "save_mean, refine": ("save", ("source_row", "token_map", "blend", "reweight", "save_mean")),
    "save, inject": ("save", ("inject", "token_map", "blend", "reweight", "save")),
    "save_mean, inject": ("save", ("inject", "token_map", "blend", "reweight", "save_mean")),
}


DTYPES = ("float16", "bfloat16", "float32")
FUSED = ("group_norm moments", "group_norm group", "group_norm apply", "layer_norm", "geglu")  # see fused.py
KERNELS = {  # op or form: the kernel that is looked at
    "attention": "attention_kernel",
    "cross": "cross_attention_kernel",
    "save": "cross_attention_save_kernel",
    "fold": "fold_kernel",
    "group_norm moments": "moments_kernel",
    "group_norm group": "group_kernel",
    "group_norm apply": "apply_kernel",
    "layer_norm": "layer_norm_kernel",
    "geglu": "geglu_kernel",
}


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


def in_suite(case: Case) -> bool:
    """Whether the test suite, which has two minutes for this, compiles a form at a head dim of SD v1.x.

    float16 of all. In float32 the forms that write maps, and in bfloat16, which has the tiles of float16, these at the
    widest head dim, where registers are short; of the others a few. sm_89 has the tiles and instructions of sm_80.
    """
    few = case.form in ("flash routed", "two terms", "save, refine")
    if case.form not in DISTINCT:
        return False
    if case.arch == 89:
        return case.head_dim == 160 if case.dtype == "float16" else case.head_dim == 40 and few
    writes = FORMS[case.form][0] == "save" and (case.head_dim == 160 or case.dtype == "float32")
    return case.dtype == "float16" or few or writes


def cases(archs, everything: bool) -> list[Case]:
    """The SD v1.x specialisations without repetition, one per head dim, and what lies beside them.

    That is sizes that no tile divides, other head dims, and the fused kernels. `everything`: every form at every head
    dim in every dtype; otherwise see in_suite, and two forms at the other head dims.
    """
    out = []
    for arch in archs:
        short = arch == 89 and not everything
        for form, (op, _) in FORMS.items():
            sizes = [Case(arch, form, D, N, N if op == "attention" else TEXT, "") for D, N in SELF.items()]
            sd = [case._replace(dtype=dtype) for case in sizes for dtype in DTYPES]
            out += [case for case in sd if everything or in_suite(case)]
        out.append(Case(arch, "flash", 40, 4096, 4096, "float16"))  # the routed one has other registers
        if not short:
            for D, N in UGLY.items():
                out += [Case(arch, form, D, N, keys, "float16") for form, keys in (("flash", N), ("two terms", TEXT))]
        for form in FORMS if everything else ("flash routed", "two terms"):
            for D in (8, 48, 64, 96, 256):
                keys = 1000 if form.startswith("flash") else TEXT
                dtypes = DTYPES if everything else ("float16", "float32") if D == 256 and not short else ("float16",)
                out += [Case(arch, form, D, 1000, keys, dtype) for dtype in dtypes]
        widths, dtypes = (320,) if short else (320, 1280), ("float16",)
        if everything:  # the widest norm of the UNet is of two halves together
            widths, dtypes = (320, 640, 1280, 2560), DTYPES
        out += [Case(arch, form, C, 1024, 0, dtype) for form in FUSED for C in widths for dtype in dtypes]
    return list(dict.fromkeys(out))  # "flash" at D = 40 is in everything, too


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
    wanted = KERNELS.get(case.form) or KERNELS[FORMS[case.form][0]]

    def compile_only(self, *args, **kwargs):
        if self.__name__ == wanted:  # a launch may be of several kernels
            compiled.append(run(self, *args, **{**kwargs, "warmup": True}))

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(CompileOnly(case.arch))
    try:
        (launch_fused if case.form in FUSED else launch_attention)(case)
    finally:
        JITFunction.run = run
    (kernel,) = compiled
    return kernel


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
        command = [cuobjdump, "-res-usage", "-sass", f.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9.]*)", listing, re.M)
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


def main(argv=None) -> int:
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
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilled = sum(row["stack"] + row["spills"] > 0 for row in rows)
    large = sum(row["shared"] > SHARED_PER_BLOCK[row["arch"]] for row in rows)
    print(f"{len(rows)} kernels: {spilled} spill, {large} take more shared memory than the card has")
    return 1 if spilled or large else 0


if __name__ == "__main__":
    sys.exit(main())
