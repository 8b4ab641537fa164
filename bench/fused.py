"""Time GroupNorm + SiLU, LayerNorm and GEGLU of minisd_kernels beside PyTorch's, and check them in
the same run; the norms also with the sum before them, of the time or of the residual.

    python -m bench.fused [--quick] [--device cuda]

The shapes are those of SD v1.x at 512x512. The rivals: PyTorch's own ops, and the same under
torch.compile. Writes bench/results/<device>/fused.json, of which `python -m bench.report` makes the
table in kernels/README.md. The models use them on CUDA; this says whether they should on a card.
"""

import argparse
import itertools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from minisd_kernels import fused, reference

from bench import harness

GRID = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # channels, height and width of the latents
GROUPS = 32


def group_norm_silu(x, weight, bias):
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def shifted_group_norm_silu(x, weight, bias, shift):
    return group_norm_silu(x + shift[:, :, None, None], weight, bias)


def add_layer_norm(x, h, weight, bias):
    return x + h, layer_norm(x + h, weight, bias)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def geglu(x):
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


def case(
    op: str, B: int, C: int, side: int, dtype, device
) -> tuple[Callable, Callable, Callable, tuple]:
    """(ours, PyTorch's, the oracle, the arguments) of one op at one site of the UNet."""
    weight, bias = (torch.randn(C, device=device).to(dtype) for _ in range(2))
    if op.endswith("group_norm_silu"):
        x = torch.randn(B, C, side, side, device=device).to(
            dtype, memory_format=torch.channels_last
        )
        shift = [torch.randn(1, C, device=device).to(dtype)] if op.startswith("shifted") else []
        return (
            lambda x, w, b, *shift: fused.group_norm_silu(x, GROUPS, w, b, 1e-5, *shift),
            shifted_group_norm_silu if shift else group_norm_silu,
            lambda x, w, b, *shift: reference.group_norm_silu(x, GROUPS, w, b, 1e-5, *shift),
            (x, weight, bias, *shift),
        )
    if op.endswith("layer_norm"):
        x, h = (torch.randn(B, side * side, C, device=device).to(dtype) for _ in range(2))
        if op == "add_layer_norm":
            args = x, h, weight, bias
            return fused.add_layer_norm, add_layer_norm, reference.add_layer_norm, args
        return fused.layer_norm, layer_norm, reference.layer_norm, (x, weight, bias)
    x = torch.randn(B, side * side, 8 * C, device=device).to(dtype)
    return fused.geglu, geglu, reference.geglu, (x,)


def error_ratio(got, eager, exact) -> float:
    """Error against float64 over the budget, max(2 x PyTorch's, 4 eps x max|reference|); above 1 is
    wrong."""
    budget = max(
        2 * (eager - exact).abs().max(), 4 * torch.finfo(eager.dtype).eps * exact.abs().max()
    )
    return ((got - exact).abs().max() / budget).item()


@torch.no_grad()
def bench_case(op: str, B: int, C: int, side: int, dtype, device: str, rounds: int) -> dict:
    ours, torch_op, oracle, args = case(op, B, C, side, dtype, device)
    row = {
        "op": op,
        "B": B,
        "C": C,
        "side": side,
        "dtype": str(dtype)[6:],
        "error_over_budget": None,
    }
    functions = {"torch": lambda: torch_op(*args)}
    if torch.device(device).type == "cuda":
        compiled = harness.compiled(torch_op)
        functions = {
            "minisd": lambda: ours(*args),
            **functions,
            "torch.compile": lambda: compiled(*args),
        }
        exact = oracle(*(x.double() for x in args))
        results = (ours(*args), torch_op(*args), exact)
        if op == "add_layer_norm":  # the norm: tests compare the sum's bits
            results = tuple(y for _, y in results)
        row["error_over_budget"] = error_ratio(*results)
    row["times"] = harness.interleave(functions, device, rounds, graph=True)
    print(f"{op:<24} B{B} C{C:<5}{side}x{side} {row['dtype']:<9}", end="")
    print(*(f"{name} {t['ms']:.4f} ms" for name, t in row["times"].items()), sep="  ", flush=True)
    return row


def misses(rows: list[dict]) -> list[str]:
    """What is wrong, and where PyTorch is quicker, one line each."""
    out, bars = [], []
    for row in rows:
        name = f"{row['op']} B{row['B']} C{row['C']} {row['side']}x{row['side']} {row['dtype']}"
        if (
            row["error_over_budget"] is not None and not row["error_over_budget"] <= 1
        ):  # nan is wrong, too
            out.append(f"WRONG error over budget {row['error_over_budget']:.2f}: {name}")
        times = {contender: t["ms"] for contender, t in row["times"].items()}
        bars += [
            (f"{rival} / minisd, {name}", ms / times["minisd"], ">=", 1)
            for rival, ms in times.items()
            if "minisd" in times and rival != "minisd"
        ]
    return out + harness.slow(bars)


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    origin = f"{harness.origin(record)}; triton {record['triton']}"
    lines = [
        origin,
        "",
        "| op | B | C | side | dtype | minisd ms | torch ms | torch.compile ms "
        "| best rival | error/budget |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        times = {name: t["ms"] for name, t in row["times"].items()}
        if "minisd" not in times:  # a CPU
            continue
        ratio = min(times["torch"], times["torch.compile"]) / times["minisd"]
        shape = f"{row['op']} | {row['B']} | {row['C']} | {row['side']} | {row['dtype']}"
        ms = " | ".join(f"{times[name]:.4f}" for name in ("minisd", "torch", "torch.compile"))
        lines.append(f"| {shape} | {ms} | {ratio:.2f}x | {row['error_over_budget']:.2f} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fused", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="batch 2, float16")
    args = parser.parse_args(argv)
    if torch.device(args.device).type != "cuda":
        print("no GPU: the Triton kernels are left out, only PyTorch's ops are timed")
    norms = "group_norm_silu", "shifted group_norm_silu", "layer_norm", "add_layer_norm"
    ops, rows = (*norms, "geglu"), []
    dtypes, batches = (
        ((torch.float16,), (2,)) if args.quick else ((torch.float16, torch.bfloat16), (2, 8))
    )
    for op, dtype, B in itertools.product(ops, dtypes, batches):
        rows += [bench_case(op, B, C, side, dtype, args.device, args.rounds) for C, side in GRID]
        path = harness.save("fused-quick" if args.quick else "fused", rows, args.device)
    print(f"wrote {path}")
    missed = misses(rows)
    print("\n".join(missed))
    return int(any(text.startswith("WRONG") for text in missed))


if __name__ == "__main__":
    sys.exit(main())
