"""Compile the kernels ahead of time, no GPU needed: what each costs on the card, and whether its
code is right.

    python -m bench.kernel_resources [--arch 90 ...] [--matrix] [--json FILE]
                                     [--dump ptx,sass DIR] [--list-forms]

The kernels' own launch functions run with a stand-in for the driver, so what is compiled is what a
launch on that card would compile: same tiles, flags and alignment facts, by the ptxas that Triton
bundles or TRITON_PTXAS_PATH names. Registers, stack and instructions are read from the cubin with
cuobjdump and nvdisasm, which come with Triton. LOCAL:0 does not mean "no spills": STACK, and STL /
LDL in the SASS, do. The SASS is held against the PTX as bench/sass.py says. Exit status 1: a kernel
spills, takes more shared memory than the card has, or is wrong. Cannot share a process with
Triton's interpreter.
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
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import sass

B, H = (
    4,
    8,
)  # guidance of a prompt-to-prompt pair: unconditional rows first, the last two are edited
S = 2
SELF = {40: 4096, 80: 1024, 160: 256}  # SD v1.x at 512x512: head dim -> queries at the widest site
UGLY = {
    40: 4140,
    80: 1000,
    160: 45,
}  # queries that no tile divides, of images of 360x736, 400x640 and 160x288
TEXT = 77
SMALL = (  # form, head dim, queries, keys, batch
    ("plain", 160, 64, 64, B),
    ("replace", 160, 64, 64, B),  # self-attention of the mid block: so few keys fit a row
    ("flash", 80, 1024, 1024, 2),
    ("flash routed", 80, 1024, 1024, 2),  # one image: too few programs for large tiles
)
# CUDA C++ Programming Guide, table of compute capabilities
ARCHS = (80, 89, 90, 100, 120)
SHARED_PER_BLOCK = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}

FORMS = {  # form: (op, edit fields)
    "flash": ("attention", ()),
    "flash routed": ("attention", ("source_row",)),
    "plain": ("cross", ()),
    "replace": ("cross", ("source_row",)),
    "reweight": ("cross", ("reweight",)),
    "blend": ("cross", ("source_row", "blend")),
    "refine": ("cross", ("source_row", "token_map", "blend", "reweight")),
    "inject": ("cross", ("inject",)),
    "refine, inject": ("cross", ("inject", "token_map", "blend", "reweight")),
    "save": ("save", ("save",)),
    "save, replace": ("save", ("source_row", "save")),
    "save, blend": ("save", ("source_row", "blend", "reweight", "save")),
    "save, refine": ("save", ("source_row", "token_map", "blend", "reweight", "save")),
    "save, inject": ("save", ("inject", "token_map", "blend", "reweight", "save")),
    "flash, bias": ("attention", ("source_row", "bias")),
    "refine, bias": ("cross", ("source_row", "token_map", "blend", "reweight", "bias")),
    "save, bias": ("save", ("source_row", "token_map", "blend", "reweight", "bias", "save")),
    "backward, statistics": ("statistics", ("source_row", "blend")),
    "backward, queries": ("query", ("source_row", "blend")),
    "backward, keys": ("key", ("source_row", "blend")),
    "mean": ("mean", ("save_mean",)),  # save_mean is the mean of what "save" wrote
    "flash, joined": ("attention", ("source_row", "bias", "kv_row", "own_value")),
    "flash, causal": ("attention", ("source_row", "is_causal", "lse")),
    "flash, key heads": ("attention", ("source_row", "key heads")),
    "refine, key heads": ("cross", ("source_row", "token_map", "blend", "key heads")),
    "save, key heads": ("save", ("source_row", "token_map", "blend", "save", "key heads")),
    "backward, causal": ("key", ("source_row", "is_causal")),
}
# "plain" and the like are "replace" and the like without the routing.
DISTINCT = (
    "flash routed",
    "replace",
    "blend",
    "refine",
    "inject",
    "refine, inject",
    "save",
    "save, refine",
    "save, inject",
    "mean",
)
NEWER = (
    "flash, bias",
    "refine, bias",
    "save, bias",
    "backward, statistics",
    "backward, queries",
    "backward, keys",
    "flash, joined",
    "flash, causal",
)
KEY_HEADS = 2  # of k and v, in the forms that have fewer of them than of q
GROUPED = ("flash, key heads", "refine, key heads", "save, key heads")
LONG = (154, 256)  # keys of more than one prompt, and the most that there may be
WIDE = ("refine, bias", "save, bias")  # what takes most registers where the key row is wide
LARGE = (
    "flash routed",
    "refine",
    "save, refine",
    "save, inject",
)  # what takes most registers of each kernel
TOGETHER = 16  # kernels that one process compiles, then disassembles at once
DTYPES = ("float16", "bfloat16", "float32")
FUSED = {  # see norms.py; kernel: channels and rows, of the UNet, and of the VAE
    "group_norm": ((320, 1024), (2560, 256)),
    "group_norm shift": ((640, 1024), (1280, 256)),
    "group_norm moments": ((128, 2**16), (320, 2**13), (1280, 2**11)),
    "group_norm group": ((128, 2**16), (320, 2**13), (1280, 2**11)),
    "group_norm group shift": ((320, 2**13), (640, 2**11)),
    "group_norm apply": ((128, 2**16), (320, 2**13), (1280, 2**11)),
    "layer_norm": ((320, 1024), (1280, 1024)),
    "add_layer_norm": ((320, 1024), (1280, 1024)),
    "geglu": ((1280, 1024),),
}
KERNELS = {  # op: the kernel that is looked at
    "attention": "attention_kernel",
    "cross": "cross_attention_kernel",
    "save": "cross_attention_kernel",
    "mean": "mean_kernel",
    "statistics": "statistics_kernel",
    "query": "query_kernel",
    "key": "key_kernel",
    "group_norm": "group_norm_kernel",
    "group_norm shift": "group_norm_kernel",
    "group_norm moments": "moments_kernel",
    "group_norm group": "group_kernel",
    "group_norm group shift": "group_kernel",
    "group_norm apply": "apply_kernel",
    "layer_norm": "layer_norm_kernel",
    "add_layer_norm": "layer_norm_kernel",
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


def case(arch: int, form: str, D: int, N: int, L: int, dtype: str) -> Case:
    """The case with as many keys as queries if the form is self-attention."""
    return Case(arch, form, D, N, N if FORMS[form][0] == "attention" else L, dtype)


def suite(arch: int) -> list[Case]:
    """What the test suite compiles: each different kernel at the head dims of SD v1.x, and what
    lies beside them.

    That is other head dims, small and uneven sizes, bfloat16, and the fused kernels.
    """
    out = [case(arch, form, D, N, TEXT, "float16") for form in DISTINCT for D, N in SELF.items()]
    out += [case(arch, form, D, N, TEXT, "float16") for form in NEWER for D, N in SELF.items()]
    out += [case(arch, form, 40, 1000, TEXT, "float16") for form in (*GROUPED, "backward, causal")]
    long = itertools.product(WIDE, LONG)
    out += [case(arch, form, D, 1000, L, "float16") for form, L in long for D in (40, 160)]
    out += [case(arch, form, 40, 1000, 154, "float32") for form in WIDE]
    out += [case(arch, form, D, 1000, TEXT, "float32") for form in DISTINCT for D in (40, 160)]
    out += [case(arch, "backward, keys", 160, 1000, TEXT, "float32")]
    out += [case(arch, form, D, 1000, TEXT, "float16") for form in LARGE for D in (8, 72, 256)]
    out += [case(arch, form, 40, 4096, TEXT, "bfloat16") for form in LARGE]
    out += [Case(arch, *sizes, "float16", batch) for *sizes, batch in SMALL]
    out += [
        case(arch, form, D, N, TEXT, "float16")
        for D, N in UGLY.items()
        for form in ("flash", "refine")
    ]
    out += [Case(arch, form, *size, 0, "float16") for form in FUSED for size in FUSED[form]]
    return list(dict.fromkeys(out))


def matrix(arch: int) -> list[Case]:
    """The larger list, the same for every card, to be run by hand with each version of Triton."""
    out = suite(arch)
    every = itertools.product(FORMS, (8, 40, 72, 80, 96, 160, 256))
    out += [case(arch, form, D, 1000, TEXT, "float16") for form, D in every]
    keys = itertools.product(FORMS, (40, 80, 96, 160), (63, 128))
    out += [case(arch, form, D, 1024, L, "float16") for form, D, L in keys]
    out += [case(arch, form, D, 1000, TEXT, "bfloat16") for form in DISTINCT for D in (40, 80, 160)]
    crossing = [form for form in FORMS if FORMS[form][0] in ("cross", "save", "mean")]
    long = itertools.product(crossing, LONG, (40, 160), ("float16", "float32"))
    out += [case(arch, form, D, 1000, L, dtype) for form, L, D, dtype in long]
    return list(dict.fromkeys(out))


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
    from minisd_kernels import toolchain
    from triton.runtime.jit import JITFunction

    toolchain.choose = lambda arch: None  # what Triton bundles is the worst that a user may have
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
    C, rows, dtype = case.head_dim, case.queries, getattr(torch, case.dtype)
    parameters = empty(C, dtype=dtype), empty(C, dtype=dtype)
    if case.form == "geglu":
        launch("geglu", empty(rows, 2 * C, dtype=dtype))
    elif case.form.endswith("layer_norm"):
        x = empty(rows, C, dtype=dtype)
        launch(case.form, *([x, x] if case.form.startswith("add") else [x]), *parameters, 1e-5)
    else:
        x = empty(2, C, rows, 1, dtype=dtype).to(memory_format=torch.channels_last)
        shift = empty(1, C, dtype=dtype) if case.form.endswith("shift") else None
        launch("group_norm_silu", x, *parameters, shift, 32, 1e-5)


def launch(name: str, *args) -> None:
    """What the first call of an op launches."""
    from minisd_kernels import dispatch, fused  # noqa: F401  # fused makes its ops known

    out = dispatch.EMPTY[name](*args)
    dispatch.prepare(name, args, out)(*args[: dispatch.TENSORS[name]], out)


def launch_attention(case: Case) -> None:
    op, names = FORMS[case.form]
    N, L, D, dtype = case.queries, case.keys, case.head_dim, getattr(torch, case.dtype)
    heads = KEY_HEADS if "key heads" in names else H
    q = empty(case.batch, N, H, D, dtype=dtype).transpose(1, 2)
    k, v = (empty(case.batch, L, heads, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    joined = 2 if "kv_row" in names else 1
    edit = {
        "source_row": empty(S, dtype=torch.int64),
        "inject": empty(S, H, N, L, dtype=dtype),
        "token_map": empty(S, L, L, dtype=torch.float32),
        "blend": empty(S, L, dtype=torch.float32),
        "reweight": empty(S, L, dtype=torch.float32),
        "bias": empty(S, 1, N, joined * L, dtype=dtype),
        "kv_row": empty(S, joined, dtype=torch.int64),
        "own_value": empty(S, dtype=torch.float32),
        "save": empty(S, H, N, L, dtype=dtype),
        "save_mean": empty(S, N, L, dtype=torch.float32),
    }
    edit = {name: x if name in names else None for name, x in edit.items()}
    save = {name: edit.pop(name) for name in ("save", "save_mean")}
    own = {name: edit.pop(name) for name in ("kv_row", "own_value")}
    is_causal = "is_causal" in names
    if op == "attention":
        args = (q, k, v, edit["source_row"], edit["bias"], *own.values(), None, is_causal)
        name = "attention_lse" if "lse" in names else "attention"
    elif op in ("statistics", "query", "key"):
        v_source = None if is_causal else empty(S, L, H, D, dtype=dtype).transpose(1, 2)
        args = (q, q, k, v, v_source, edit["source_row"], edit["bias"], None, None, is_causal)
        name = "attention_backward"
    elif op == "cross":
        name, args = "cross_attention", (q, k, v, *edit.values(), None)
    else:
        name, args = "cross_attention_save", (q, k, v, *edit.values(), *save.values(), None)
    launch(name, *args)


def instructions(cubin: bytes) -> bytes:
    """The machine code of a cubin, which is an ELF file of one kernel: its section
    .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = cubin[headers[of_names][4] :]
    (code,) = [
        cubin[at : at + length]
        for name, _, _, _, at, length in headers
        if names[name:].startswith(b".text.")
    ]
    return code


def disassemble(arch: int, codes: list[bytes]) -> list[list[sass.Instruction]]:
    """The listing of each kernel. All of them in one file, because the disassembler takes 0.3 s to
    start."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        command = [nvidia("nvdisasm"), "--binary", f"SM{arch}{'a' * (arch >= 90)}", f.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = sass.parse(listing)
    lengths = [len(code) // 16 for code in codes]  # an instruction has 16 bytes
    if len(found) != sum(lengths):
        raise RuntimeError(f"nvdisasm listed {len(found)} instructions, expected {sum(lengths)}")
    each = iter(found)
    return [list(itertools.islice(each, length)) for length in lengths]


def nvidia(tool: str) -> Path:
    """One of the programs that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / tool


def measure(cases: list[Case], dump: tuple[list[str], Path] | None = None) -> list[dict]:
    """What the cubins of some cases on one arch say; dump: the listings to keep, and where."""
    kernels = [compile_case(case) for case in cases]
    listings = disassemble(cases[0].arch, [instructions(kernel.asm["cubin"]) for kernel in kernels])
    for case, kernel, code in zip(cases, kernels, listings) if dump else ():
        name = "-".join(map(str, case)).replace(", ", "_").replace(" ", "_")
        for kind in dump[0]:
            text = "\n".join(map(str, code)) + "\n" if kind == "sass" else kernel.asm[kind]
            (dump[1] / f"{name}.{kind}").write_text(text)
    return [row(*each) for each in zip(cases, kernels, listings)]


def row(case: Case, kernel, code: list[sass.Instruction]) -> dict:
    """Registers, stack bytes, spill and matrix instructions, shared memory, CTAs per SM; what is
    wrong."""
    opcodes, ptx = [ins.op for ins in code], kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        command = [nvidia("cuobjdump"), "-res-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    count = Counter(ins.base for ins in code)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared + found["SHARED"]
    registers = -(-found["REG"] // 8) * 8 * 32 * warps
    blocks = min(
        65536 // registers,
        SHARED_PER_SM[case.arch] // (shared + 1024),
        WARPS_PER_SM[case.arch] // warps,
    )
    return {
        **case._asdict(),
        "warps": warps,
        "registers": found["REG"],
        "stack": found["STACK"],
        "spills": count["STL"] + count["LDL"],
        "shared": shared,
        "wgmma": count["HGMMA"],
        "mma": count["HMMA"],
        "tcgen05": count["UTCHMMA"],
        "instructions": len(opcodes),
        "ctas": blocks,
        "occupancy": blocks * warps / WARPS_PER_SM[case.arch],
        "tf32": ptx.count("tf32"),
        "narrow_loads": sum(op.startswith("LDG.E.U16") for op in opcodes),
        "unwritten": sass.unwritten(code),
        "descriptors": sass.wrong_descriptors(code, ptx),
        "overwritten": sass.overwritten(code),
    }


HEADER = (
    "arch form                 D     N    L dtype    warps  reg stack spill shared KiB"
    " wgmma  mma instr CTA/SM occupancy"
)


def line(r: dict) -> str:
    return (
        f"{r['arch']:>4} {r['form']:<18}{r['head_dim']:>4}{r['queries']:>6}{r['keys']:>5} "
        f"{r['dtype']:<9}"
        f"{r['warps']:>5}{r['registers']:>5}{r['stack']:>6}{r['spills']:>6}"
        f"{r['shared'] / 1024:>11.1f}"
        f"{r['wgmma']:>6}{r['mma']:>5}{r['instructions']:>6}{r['ctas']:>7}{r['occupancy']:>10.2f}"
    )


# bytes a thread, of the float32 backward where a head is wide, and of a bias with more than 128
# keys: rare, slow anyway
SPILLED_AT_MOST = 32


def spills(r: dict) -> bool:
    """Whether a kernel keeps registers in memory, or one of those that may more than a few."""
    backward = r["form"].startswith("backward") and r["dtype"] == "float32"
    if backward or r["form"] in WIDE and r["keys"] > 128:
        return r["stack"] > SPILLED_AT_MOST
    return r["stack"] + r["spills"] > 0


SIGNS = ("unwritten", "descriptors", "overwritten")
FAULTS = {
    "wrong": lambda r: any(r[sign] for sign in SIGNS),
    "spilled": spills,
    "too much shared memory": lambda r: r["shared"] > SHARED_PER_BLOCK[r["arch"]],
    "TF32": lambda r: r["tf32"] > 0,
}


def ptxas(arch: int) -> str:
    """The version of the assembler that makes the kernels of this arch."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    return re.search(r"V(\d\S+)", get_ptxas_version(arch))[1]


def summary(rows: list[dict], archs: list[int]) -> dict:
    """What was looked at, and which kernels have which fault."""
    import triton

    def name(r):
        return (
            f"{r['form']} D{r['head_dim']} N{r['queries']} L{r['keys']} B{r['batch']} {r['dtype']}"
        )

    return {
        "triton": triton.__version__,
        "ptxas": {f"sm_{arch}": ptxas(arch) for arch in archs},
        "kernels": len(rows),
        **{
            fault: [f"sm_{r['arch']} {name(r)}" for r in rows if has(r)]
            for fault, has in FAULTS.items()
        },
        "kernels of each": {
            f"sm_{arch}": Counter(f"{r['form']} {r['dtype']}" for r in rows if r["arch"] == arch)
            for arch in archs
        },
        "looked at": {f"sm_{arch}": [name(r) for r in rows if r["arch"] == arch] for arch in archs},
    }


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel_resources", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=ARCHS)
    parser.add_argument(
        "--matrix", action="store_true", help="more sizes and forms than the test suite looks at"
    )
    parser.add_argument("--only", default="", help="only forms that contain this")
    parser.add_argument("--jobs", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument(
        "--summary", type=Path, help="write versions, counts and faults as JSON, every few kernels"
    )
    parser.add_argument(
        "--dump", nargs=2, metavar=("KINDS", "DIR"), help="keep listings: ptx,sass,ttgir DIR"
    )
    parser.add_argument(
        "--list-forms", action="store_true", help="print the forms and what they edit, and stop"
    )
    return parser


def main(argv=None) -> int:
    args = options().parse_args(argv)
    if args.list_forms:
        print(
            "\n".join(
                f"{form:<22} {op:<10} {', '.join(fields)}" for form, (op, fields) in FORMS.items()
            )
        )
        print("\n".join(FUSED))
        return 0
    dump = None
    if args.dump:
        dump = args.dump[0].split(","), Path(args.dump[1])
        dump[1].mkdir(parents=True, exist_ok=True)
    cases = matrix if args.matrix else suite
    wanted = [[case for case in cases(arch) if args.only in case.form] for arch in args.arch]
    if not any(wanted):
        print(f"nothing to look at: no form contains {args.only!r}")
        return 1
    together = [
        of_arch[i : i + TOGETHER] for of_arch in wanted for i in range(0, len(of_arch), TOGETHER)
    ]
    print(HEADER)
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for some in pool.imap(partial(measure, dump=dump), together):
            rows += some
            for r in some:
                print(
                    "\n    WRONG ".join(
                        [line(r), *(text for sign in SIGNS for text in r[sign][:3])]
                    ),
                    flush=True,
                )
            if args.summary:
                args.summary.write_text(json.dumps(summary(rows, args.arch), indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    counts = {fault: sum(map(has, rows)) for fault, has in FAULTS.items()}
    print(f"{len(rows)} kernels:", ", ".join(f"{count} {fault}" for fault, count in counts.items()))
    return 1 if any(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
