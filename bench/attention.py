"""Time the attention kernels beside everything that could take their place, and check them in the same run.

    python -m bench.attention [--quick] [--shape B,H,N,L,D ...] [--device cuda] [--readme]

The shapes are those of SD v1.x: 8 heads, self- and cross-attention (77 keys) at 512x512, self-attention at 768x768.
The rivals: each SDPA backend by itself, FlexAttention compiled, eager matmul + softmax + matmul, and for edits folded
SDPA (two calls on V_A and V_B) and eager. On CUDA, calls are captured in a graph and replayed: what is timed is the
device, not Python. Writes bench/results/<device>/attention.json; --readme puts the table into kernels/README.md.
"""

import argparse
import json
import sys
from collections.abc import Callable

import torch

from bench import harness

harness.use_checkout()

from minisd.attention import AttentionEdit, attention  # noqa: E402

H, TEXT = 8, 77
GRID_512 = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # (queries, head dim)
GRID_768 = ((9216, 40), (2304, 80), (576, 160), (144, 160))
SHAPES = [(N, N, D) for N, D in GRID_512] + [(N, TEXT, D) for N, D in GRID_512] + [(N, N, D) for N, D in GRID_768]
CROSS_EDITS = ("replace", "reweight", "refine", "inject", "save_mean", "save", "refine, save_mean")
SELF_EDITS = ("self-injection",)

# What the design asks for, as ratios of time. Rival / ours, at least; edited / plain, at most; eager / ours, at least.
MUST_SELF = {(4096, 40): 1.15, (1024, 80): 1.0, (256, 160): 0.95, (64, 160): 0.95}
MUST_CROSS = 1.5
MUST_EDIT = {"self-injection": 0.85, "replace": 1.05, "reweight": 1.05, "refine": 1.3, "save_mean": 1.05, "save": 1.3}
MUST_EAGER = {"self-injection": 5, "replace": 4, "reweight": 4, "refine": 3}


def make_edit(form: str, B: int, heads: int, N: int, L: int, D: int, dtype, device) -> AttentionEdit | None:
    """The edit of prompt-to-prompt pairs: the last B / 2 rows, at least one pair; the first of a pair is the source."""
    S = min(B, max(2, B // 2))

    def weights(*shape):
        return torch.rand(*shape, device=device)

    row = torch.arange(S, device=device) // 2 * 2
    def refine(**more):
        return AttentionEdit(source_row=row, token_map=weights(S, L, L) / L, blend=weights(S, L), **more)

    edit = {
        "plain": lambda: None,
        "self-injection": lambda: AttentionEdit(source_row=row),
        "replace": lambda: AttentionEdit(source_row=row),
        "reweight": lambda: AttentionEdit(reweight=weights(S, L)),
        "refine": refine,
        "inject": lambda: AttentionEdit(inject=torch.softmax(weights(S, heads, N, L), -1).to(dtype)),
        "save_mean": lambda: AttentionEdit(save_mean=torch.zeros(S, N, L, device=device)),
        "save": lambda: AttentionEdit(save=torch.empty(S, heads, N, L, dtype=dtype, device=device)),
        "refine, save_mean": lambda: refine(save_mean=torch.zeros(S, N, L, device=device)),
    }[form]()
    return edit and edit.check_rows()


def rivals(q, k, v, edit, triton: bool) -> dict[str, Callable]:
    """Contenders by name, ours first; one that cannot take the shape is left out with a line saying so."""
    functions = {"minisd": lambda: attention(q, k, v, edit, "triton")} if triton else {}
    functions["eager"] = lambda: attention(q, k, v, edit, "reference")
    if edit is not None:
        functions["folded SDPA"] = lambda: attention(q, k, v, edit, "sdpa")
    elif q.is_cuda:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.flex_attention import flex_attention

        def by_backend(backend):
            def function():
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            return function

        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            functions[f"SDPA {name.split('_')[0].lower()}"] = by_backend(getattr(SDPBackend, name))
        flex = torch.compile(flex_attention)
        functions["FlexAttention"] = lambda: flex(q, k, v)
    else:
        functions["SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for name in functions.keys() - {"minisd"}:  # ours must work
        try:
            functions[name]()
        except RuntimeError as error:  # a backend that does not take the shape, or too little memory
            print(f"  {name} left out: {str(error).splitlines()[0]}")
            del functions[name]
    return functions


def error_ratio(ours: torch.Tensor, q, k, v, edit) -> float:
    """Error against float64 over the budget, max(2 x same-dtype eager, 4 eps x max|reference|); above 1 is wrong.

    Of the last head only, so that float64 maps of 9216 x 9216 fit; the GPU tests look at all.
    """
    ours, q, k, v = (x[:, -1:] for x in (ours, q, k, v))
    if edit is not None:
        edit = edit._replace(inject=None if edit.inject is None else edit.inject[:, -1:], save=None, save_mean=None)
    eager = attention(q, k, v, edit, "reference")
    exact = attention(q.double(), k.double(), v.double(), edit, "reference")
    budget = max(2 * (eager - exact).abs().max(), 4 * torch.finfo(q.dtype).eps * exact.abs().max())
    return ((ours - exact).abs().max() / budget).item()


def bench_shape(B, heads, N, L, D, dtype, device, forms, rounds, peak) -> list[dict]:
    """All contenders on one shape, one row for each form of edit."""
    q, k, v = (torch.randn(B, n, heads, D, device=device).to(dtype).transpose(1, 2) for n in (N, L, L))
    rows = []
    for form in forms:
        edit = make_edit(form, B, heads, N, L, D, dtype, device)
        functions = rivals(q, k, v, edit, triton=torch.device(device).type == "cuda")
        if form != "plain" and "minisd" in functions:
            functions["minisd plain"] = lambda: attention(q, k, v, None, "triton")
        with torch.no_grad():
            times = harness.interleave(functions, device, rounds, graph=True)
            memory = {name: harness.peak_memory(function, device) for name, function in functions.items()}
            wrong = error_ratio(functions["minisd"](), q, k, v, edit) if "minisd" in functions else None
        flop = 4 * B * heads * N * L * D
        row = {"B": B, "H": heads, "N": N, "L": L, "D": D, "dtype": str(dtype)[6:], "form": form}
        row["error_over_budget"] = wrong
        row["times"] = {
            name: {**t, "tflops": flop / t["ms"] * 1e-9, "of_peak": flop / t["ms"] * 1e3 / peak, "bytes": memory[name]}
            for name, t in times.items()
        }
        rows.append(row)
        print(describe(row), flush=True)
    return rows


def best_rival(row: dict) -> tuple[str, float]:
    """The quickest contender that is not ours, and its time over ours."""
    times = {name: t["ms"] for name, t in row["times"].items() if not name.startswith("minisd")}
    name = min(times, key=times.get)
    return name, times[name] / row["times"].get("minisd", row["times"][name])["ms"]


def describe(row: dict) -> str:
    name, ratio = best_rival(row)
    text = f"B{row['B']} N{row['N']} L{row['L']} D{row['D']} {row['dtype']:<9}{row['form']:<18}"
    for contender, t in row["times"].items():
        text += f" {contender} {t['ms']:.4f} ms"
    if "minisd" in row["times"]:
        text += f" | {ratio:.2f}x of {name}, error {row['error_over_budget']:.2f}"
    return text


def misses(rows: list[dict]) -> list[str]:
    """What is wrong or slower than PERFORMANCE section 5 asks for, one line each."""
    out = []
    for row in rows:
        if "minisd" not in row["times"]:
            continue
        if row["error_over_budget"] > 1:
            out.append(f"WRONG {describe(row)}")
        times, (name, ratio) = {contender: t["ms"] for contender, t in row["times"].items()}, best_rival(row)
        if row["form"] == "plain":
            must = MUST_CROSS if is_cross(row["N"], row["L"]) else MUST_SELF.get((row["N"], row["D"]), 0)
            if ratio < must:
                out.append(f"SLOW  {ratio:.2f}x of {name}, must be >= {must}: {describe(row)}")
            continue
        over, must = times["minisd"] / times["minisd plain"], MUST_EDIT.get(row["form"], float("inf"))
        if over > must:
            out.append(f"SLOW  {over:.2f}x the time of plain, must be <= {must}: {describe(row)}")
        if "eager" in times and times["eager"] / times["minisd"] < MUST_EAGER.get(row["form"], 0):
            out.append(f"SLOW  {times['eager'] / times['minisd']:.2f}x of eager, must be >= "
                       f"{MUST_EAGER[row['form']]}: {describe(row)}")  # fmt: skip
    return out


def is_cross(N: int, L: int) -> bool:
    """Whether a shape is one of a cross-attention site."""
    return L <= 128 and L != N


def table(result: dict) -> str:
    """The Markdown table of a result file."""
    lines = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}, commit {result['commit'][:12]}; "
             f"`{result['command']}`", "",
             "| B | N | L | D | dtype | form | ms | quartiles | TFLOP/s | of peak | MB | rival | ratio | of plain "
             "| error/budget |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["rows"]:
        if "minisd" not in row["times"]:
            continue
        t, (name, ratio) = row["times"]["minisd"], best_rival(row)
        plain = row["times"].get("minisd plain", t)["ms"]
        lines.append(
            f"| {row['B']} | {row['N']} | {row['L']} | {row['D']} | {row['dtype']} | {row['form']} | {t['ms']:.4f} "
            f"| {t['low']:.4f} - {t['high']:.4f} | {t['tflops']:.0f} | {t['of_peak']:.2f} | {t['bytes'] / 1e6:.1f} "
            f"| {name} | {ratio:.2f} | {t['ms'] / plain:.2f} | {row['error_over_budget']:.2f} |"
        )
    return "\n".join(lines)


def write_readme(result: dict) -> None:
    """Replace what stands between the two markers in kernels/README.md by the table."""
    path = harness.ROOT / "kernels/README.md"
    path.write_text(harness.put(path.read_text(), "bench.attention", table(result)))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", action="append", metavar="B,H,N,L,D", help="time this shape only; may be repeated")
    names = ["float16", "bfloat16", "float32"]
    parser.add_argument("--dtype", nargs="+", default=names[:2], choices=names)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="batch 2, float16, the 512x512 shapes")
    parser.add_argument("--readme", action="store_true", help="put the table into kernels/README.md")
    args = parser.parse_args(argv)
    if torch.device(args.device).type != "cuda":
        print("no GPU: the Triton kernels are left out, only what runs on this device is timed")
    dtypes = [getattr(torch, name) for name in (args.dtype[:1] if args.quick else args.dtype)]
    if args.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in args.shape]
    else:
        grid = SHAPES[:8] if args.quick else SHAPES
        shapes = [(B, H, *shape) for B in (args.batch[:1] if args.quick else args.batch) for shape in grid]
    rows = []
    for dtype in dtypes:
        peak = harness.matrix_peak(dtype, args.device)
        print(f"{str(dtype)[6:]}: measured matrix peak {peak * 1e-12:.1f} TFLOP/s")
        for B, heads, N, L, D in shapes:
            forms = ("plain", *(CROSS_EDITS if is_cross(N, L) else SELF_EDITS))
            rows += bench_shape(B, heads, N, L, D, dtype, args.device, forms, args.rounds, peak)
    suffix = "-shape" if args.shape else "-quick" if args.quick else ""
    path = harness.save(f"attention{suffix}", rows, args.device)
    print(f"wrote {path}")
    if args.readme:
        write_readme(json.loads(path.read_text()))
    missed = misses(rows)
    print("\n".join(missed))
    return int(any(text.startswith("WRONG") for text in missed))


if __name__ == "__main__":
    sys.exit(main())
