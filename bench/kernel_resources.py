"""Compile the kernels ahead of time, no GPU needed, and print what each costs on the card.

    python -m bench.kernel_resources [--arch 90 ...] [--json FILE] [--all]

The kernels' own launch functions run with a stand-in for the driver, so what is compiled is what a launch on that card
would compile: same tiles, flags and alignment facts. Registers, stack and instructions are read from the cubin with
cuobjdump and nvdisasm, which come with Triton. LOCAL:0 does not mean "no spills": STACK, and STL / LDL in the SASS, do.
Cannot share a process with Triton's interpreter.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

B, H = 4, 8  # guidance of a prompt-to-prompt pair: unconditional rows first, the last two are edited
S = 2
SELF = {40: 4096, 80: 1024, 160: 256}  # SD v1.x at 512x512: head dim -> queries at the widest site
OTHER = (8, 48, 64, 96, 256)  # head dims
UGLY = {40: 4140, 80: 1000, 160: 45}  # queries that no tile divides, of images of 360x736, 400x640 and 160x288
TEXT = 77
SMALL = (  # form, head dim, queries, keys, batch
    ("plain", 160, 64, 64, B), ("replace", 160, 64, 64, B),  # self-attention of the mid block: so few keys fit into a row
    ("flash", 80, 1024, 1024, 2), ("flash routed", 80, 1024, 1024, 2),  # one picture: too few programs for large tiles
)  # fmt: skip
# CUDA C++ Programming Guide, table of compute capabilities
SHARED_PER_BLOCK = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}

FORMS = {  # form: (op, edit fields)
    "fold": ("fold", ("source_row", "token_map", "blend", "reweight")),
    "fold, reweight": ("fold", ("reweight",)),
    "fold, blend": ("fold", ("source_row", "blend")),
    "fold, inject": ("fold", ("inject", "token_map", "blend")),
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


# "plain" and the like are "replace" and the like without the routing.
DISTINCT = ("fold", "flash routed", "replace", "two terms", "inject", "inject + blend", "save", "save_mean, replace",
            "save, refine", "save_mean, refine", "save, inject")  # fmt: skip
TOGETHER = 16  # kernels that one process compiles, then disassembles at once
DTYPES = ("float16", "bfloat16", "float32")
NORMED = (128, 256, 512, 320, 640, 960, 1280, 1920, 2560)  # channels of the VAE, of the UNet and of two of its halves
FUSED = {  # see norms.py; kernel: channels
    "group_norm moments": NORMED,
    "group_norm group": NORMED,
    "group_norm apply": NORMED,
    "layer_norm": (320, 640, 1280),
    "geglu": (1280, 2560, 5120),
}
KERNELS = {  # op: the kernel that is looked at
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


def cases(archs, everything: bool) -> list[Case]:
    """The specialisations: every form at the head dims of SD v1.x, what lies beside them, and the fused kernels.

    Beside them lie the small sizes, the other head dims, in the forms of DISTINCT (everything: in every form), and
    numbers of queries that no tile divides. Every one in each of DTYPES, but for the latter.
    """
    out = []
    for arch in archs:
        for form, (op, _) in FORMS.items():
            long = op == "attention"
            sizes = [Case(arch, form, D, N, N if long else TEXT, "") for D, N in SELF.items()]
            if everything or form in DISTINCT:
                sizes += [Case(arch, form, D, 1000, 1000 if long else TEXT, "") for D in OTHER]
            out += [case._replace(dtype=dtype) for case in sizes for dtype in DTYPES]
        for dtype in DTYPES:
            out += [Case(arch, *sizes, dtype, batch) for *sizes, batch in SMALL]
        for D, N in UGLY.items():
            out += [Case(arch, form, D, N, keys, "float16") for form, keys in (("flash", N), ("two terms", TEXT))]
        out += [Case(arch, form, C, 1024, 0, dtype) for form in FUSED for C in FUSED[form] for dtype in DTYPES]
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
    wanted = KERNELS[case.form if case.form in FUSED else FORMS[case.form][0]]

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
    from minisd_kernels import ops

    op, names = FORMS[case.form]
    N, L, D, dtype = case.queries, case.keys, case.head_dim, getattr(torch, case.dtype)
    q, k, v = (empty(case.batch, n, H, D, dtype=dtype).transpose(1, 2) for n in (N, L, L))
    edit = {
        "source_row": empty(S, dtype=torch.int64),
        "inject": empty(S, H, N, L, dtype=dtype),
        "token_map": empty(S, L, L, dtype=torch.float32),
        "blend": empty(S, L, dtype=torch.float32),
        "reweight": empty(S, L, dtype=torch.float32),
        "bias": empty(S, 1, N, L, dtype=dtype),
        "save": empty(S, H, N, L, dtype=dtype),
        "save_mean": empty(S, N, L, dtype=torch.float32),
    }
    edit = {name: x if name in names else None for name, x in edit.items()}
    save = {name: edit.pop(name) for name in ("save", "save_mean")}
    if op == "attention":
        name, args = "attention", (q, k, v, edit["source_row"], edit["bias"], None, None, None)
    elif op in ("cross", "fold"):
        name, args = "cross_attention", (q, k, v, *edit.values(), None)
    else:
        name, args = "cross_attention_save", (q, k, v, *edit.values(), *save.values(), None)
    out = ops.EMPTY[name](*args)
    ops.prepare(name, args, out)(*args, out)


def instructions(cubin: bytes) -> bytes:
    """The machine code of a cubin, which is an ELF file of one kernel: its section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = cubin[headers[of_names][4] :]
    (code,) = [cubin[at : at + length] for name, _, _, _, at, length in headers if names[name:].startswith(b".text.")]
    return code


def disassemble(arch: int, codes: list[bytes]) -> list[list[str]]:
    """The opcodes of each kernel. All of them in one file, because the disassembler takes 0.3 s to start."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        command = [nvidia("nvdisasm"), "--binary", f"SM{arch}{'a' * (arch == 90)}", f.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[\dT]+ )?([A-Z][A-Z0-9.]*)", listing, re.M)
    lengths = [len(code) // 16 for code in codes]  # an instruction has 16 bytes
    if len(opcodes) != sum(lengths):
        raise RuntimeError(f"nvdisasm listed {len(opcodes)} instructions, expected {sum(lengths)}")
    each = iter(opcodes)
    return [list(itertools.islice(each, length)) for length in lengths]


def nvidia(tool: str) -> Path:
    """One of the programs that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / tool


def measure(cases: list[Case]) -> list[dict]:
    """What the cubins of some cases on one arch say."""
    kernels = [compile_case(case) for case in cases]
    listings = disassemble(cases[0].arch, [instructions(kernel.asm["cubin"]) for kernel in kernels])
    return [row(*each) for each in zip(cases, kernels, listings)]


def row(case: Case, kernel, opcodes: list[str]) -> dict:
    """Registers, stack bytes, spill and matrix instructions, shared memory, CTAs per SM."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        command = [nvidia("cuobjdump"), "-res-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
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
    parser.add_argument("--all", action="store_true", help="every form at the other head dims, too")
    parser.add_argument("--only", default="", help="only forms that contain this")
    parser.add_argument("--jobs", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    args = parser.parse_args(argv)
    wanted = [[case for case in cases([arch], args.all) if args.only in case.form] for arch in args.arch]
    together = [of_arch[i : i + TOGETHER] for of_arch in wanted for i in range(0, len(of_arch), TOGETHER)]
    print(HEADER)
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for some in pool.imap(measure, together):
            rows += some
            print("\n".join(map(line, some)), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilled = sum(row["stack"] + row["spills"] > 0 for row in rows)
    large = sum(row["shared"] > SHARED_PER_BLOCK[row["arch"]] for row in rows)
    print(f"{len(rows)} kernels: {spilled} spill, {large} take more shared memory than the card has")
    return 1 if spilled or large else 0


if __name__ == "__main__":
    sys.exit(main())
