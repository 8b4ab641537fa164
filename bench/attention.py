"""Time the attention kernels beside everything that could take their place, and check them in the
same run.

    python -m bench.attention [--quick] [--shape B,H,N,L,D ...] [--only FORM] [--device cuda]
                              [--contender module:function] [--json FILE]

The shapes are those of SD v1.x: 8 heads, self- and cross-attention (77 keys) at 512x512,
self-attention at 768x768. q, k and v of self-attention are views of one tensor (B, N, 3 * H * D),
as the models have them on CUDA, for all alike. The rivals: each SDPA backend by itself,
FlexAttention compiled, eager matmul + softmax + matmul, and for edits folded SDPA (two calls on V_A
and V_B) and eager. On CUDA, calls are captured in a graph and replayed: what is timed is the
device, not Python. Writes bench/results/<device>/attention.json after every shape (attention-quick,
attention-shape), of which `python -m bench.report` makes the table in kernels/README.md; or FILE. A
contender, function(q, k, v, edit) -> out that writes the edit's saves, is held to the same error
budget. Exit status 1: ours or the contender failed or was wrong, or nothing was measured.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench import harness
from minisd.models.attention import AttentionEdit, attention

H, TEXT = 8, 77
GRID_512 = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # (queries, head dim)
GRID_768 = ((9216, 40), (2304, 80), (576, 160), (144, 160))
SHAPES = (
    [(N, N, D) for N, D in GRID_512]
    + [(N, TEXT, D) for N, D in GRID_512]
    + [(N, N, D) for N, D in GRID_768]
)
CROSS_EDITS = ("replace", "reweight", "refine", "inject", "save_mean", "save", "refine, save_mean")
SELF_EDITS = ("self-injection",)
LARGEST_MAP = (
    8e9  # bytes of a float32 map beyond which what holds several of them at once is not tried
)
MAPS_AT_ONCE = 2**26  # numbers of a map, half a GB in float64, that are compared at a time

# What the design asks for, as ratios of time. Rival / ours, at least; edited / plain, at most;
# eager / ours, at least.
MUST_SELF = {(4096, 40): 1.0, (1024, 80): 0.95, (256, 160): 1.3, (64, 160): 1.3}
MUST_CROSS = 1.5
MUST_EDIT = {
    "self-injection": 1.0,
    "replace": 1.05,
    "reweight": 1.05,
    "refine": 1.3,
    "save_mean": 1.3,
    "save": 1.3,
}
MUST_EAGER = {"self-injection": 5, "replace": 4, "reweight": 4, "refine": 3, "save_mean": 1}


def make_edit(
    form: str, B: int, heads: int, N: int, L: int, D: int, dtype, device
) -> AttentionEdit | None:
    """The edit of prompt-to-prompt pairs: the last B / 2 rows, at least one pair; the first of a
    pair is the source."""
    S = min(B, max(2, B // 2))

    def weights(*shape):
        return torch.rand(*shape, device=device)

    row = torch.arange(S, device=device) // 2 * 2

    def refine(**more):
        return AttentionEdit(
            source_row=row, token_map=weights(S, L, L) / L, blend=weights(S, L), **more
        )

    edit = {
        "plain": lambda: None,
        "self-injection": lambda: AttentionEdit(source_row=row),
        "replace": lambda: AttentionEdit(source_row=row),
        "reweight": lambda: AttentionEdit(reweight=weights(S, L)),
        "refine": refine,
        "inject": lambda: AttentionEdit(
            inject=torch.softmax(weights(S, heads, N, L), -1).to(dtype)
        ),
        "save_mean": lambda: AttentionEdit(save_mean=torch.zeros(S, N, L, device=device)),
        "save": lambda: AttentionEdit(save=torch.empty(S, heads, N, L, dtype=dtype, device=device)),
        "refine, save_mean": lambda: refine(save_mean=torch.zeros(S, N, L, device=device)),
    }[form]()
    return edit and edit.check_rows()


def needs(
    edit: AttentionEdit | None, B: int, heads: int, N: int, L: int, D: int, itemsize: int
) -> tuple[int, int]:
    """(FLOPs, bytes) that a form needs at the least: each tensor once through memory, of the maps
    those that are given or asked for.

    An edit folds into V, so it costs a second map and product where it blends, and the product
    with a token map: of V, (L, L) @ (L, D) a head, or of the map where P' itself is asked for.
    """
    product, fields = 2 * heads * N * L * D, edit or AttentionEdit()
    S = next((x.shape[0] for x in fields if torch.is_tensor(x)), 0)
    saves = fields.save is not None or fields.save_mean is not None
    two = fields.blend is not None
    maps = B + two * S - (fields.inject is not None) * S
    products = B + (two and not saves) * S
    flop = product * (maps + products)
    if fields.token_map is not None:
        flop += 2 * S * heads * L * L * (N if saves else D)
    moved = 2 * B * heads * (N + L) * D * itemsize  # q, k, v and the output
    for name in ("inject", "token_map", "blend", "reweight", "save", "save_mean"):
        x = getattr(fields, name)
        if x is not None:
            moved += x.numel() * x.element_size() * (2 if name == "save_mean" else 1)  # += reads
    return flop, moved


def bandwidth(device: str) -> float:
    """Bytes/s of a large copy, read and written."""
    n = 2**30 if torch.device(device).type == "cuda" else 2**22
    x, y = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    ms = harness.interleave({"copy": lambda: y.copy_(x)}, device, rounds=10)["copy"]["ms"]
    return 2 * n / (ms * 1e-3)


def loaded(name: str) -> tuple[str, Callable]:
    """The name and the function that "module:function" names; ValueError if there is none."""
    module, _, function = name.partition(":")
    try:
        return name, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        expected = "expected module:function, function(q, k, v, edit) -> out"
        raise ValueError(f"argument --contender: {name!r}: {error}; {expected}") from error


def numbers(text: str) -> tuple[int, ...]:
    """ "2,8,4096,77,40" -> (2, 8, 4096, 77, 40); ArgumentTypeError for anything else."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){4}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected B,H,N,L,D, five numbers above 0")
    return tuple(map(int, text.split(",")))


def inputs(B: int, heads: int, N: int, L: int, D: int, dtype, device):
    """Random q, k, v; of self-attention (N == L) views of one tensor, as one product for all three
    leaves them."""
    if N == L:
        qkv = torch.randn(B, N, 3 * heads * D, device=device).to(dtype)
        return [x.unflatten(-1, (heads, D)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]
    return [torch.randn(B, n, heads, D, device=device).to(dtype).transpose(1, 2) for n in (N, L, L)]


def rivals(q, k, v, edit, triton: bool) -> dict[str, Callable]:
    """Contenders by name, ours first; what would need tens of GB is left out with a line saying
    so."""
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
        flex = harness.compiled(flex_attention)
        functions["FlexAttention"] = lambda: flex(q, k, v)
    else:
        functions["SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if (size := 4 * q[..., 0].numel() * k.shape[2]) > LARGEST_MAP:
        for name in [name for name in ("eager", "SDPA math") if name in functions]:
            print(f"  {name} left out: it holds several maps, {size * 1e-9:.0f} GB each in float32")
            del functions[name]
    return functions


def measure(functions: dict[str, Callable], device: str, rounds: int) -> tuple[dict, dict, dict]:
    """(times, bytes at the peak, errors) by name of contender.

    One that fails, in a plain call or while a graph is captured, is left out with a line that says
    so, and the rest is measured again.
    """
    functions, errors, running = dict(functions), {}, None

    def noted(name, function):
        def call():
            nonlocal running
            running = name
            return function()

        return call

    while True:
        calls = {name: noted(name, function) for name, function in functions.items()}
        try:
            times = harness.interleave(calls, device, rounds, graph=True)
            return (
                times,
                {name: harness.peak_memory(call, device) for name, call in calls.items()},
                errors,
            )
        except (
            Exception
        ) as error:  # no such backend for this shape, too little memory, whatever it is
            errors[running] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"  {running} left out: {errors[running]}", flush=True)
        del functions[running]


def by_formula(q, k, v, edit, queries: slice) -> dict[str, torch.Tensor]:
    """What kernels/reference.py makes of some of the queries: "out", and what the edit saves."""
    saved = {}
    if edit is not None:
        if edit.inject is not None:
            edit = edit._replace(inject=edit.inject[:, :, queries])
        if edit.save is not None:
            saved["save"] = torch.zeros_like(edit.save[:, :, queries], dtype=q.dtype)
        if edit.save_mean is not None:
            saved["save_mean"] = torch.zeros_like(edit.save_mean[:, queries])
        edit = edit._replace(**saved)
    return {"out": attention(q[:, :, queries], k, v, edit, "reference"), **saved}


def ours(q, k, v, edit):
    return attention(q, k, v, edit, "triton")


def error_ratio(q, k, v, edit, compute: Callable = ours) -> float:
    """Error of what `compute` returns and saves against float64 over the budget, max(2 x same-dtype
    eager, 4 eps x max|reference|); above 1 or nan: wrong.

    The largest of the output's and of the saved maps', of one call on fresh buffers. All rows,
    heads and queries, some queries at a time, so that float64 maps of 9216 x 9216 fit.
    """
    saved = {}
    if edit is not None:
        if edit.save is not None:
            saved["save"] = torch.full_like(edit.save, float("nan"))
        if edit.save_mean is not None:
            saved["save_mean"] = torch.zeros_like(edit.save_mean)
        edit = edit._replace(**saved)
    got = {"out": compute(q, k, v, edit), **saved}

    low, high = (q, k, v), [x.double() for x in (q, k, v)]
    worst, step = {}, max(1, MAPS_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        queries = slice(start, start + step)
        eager, exact = (by_formula(*x, edit, queries) for x in (low, high))
        for name, want in exact.items():
            differences = (got[name][..., queries, :] - want, eager[name] - want, want)
            largest = torch.stack([x.abs().max() for x in differences]).double()
            worst[name] = torch.maximum(worst.get(name, largest), largest)
    eps = 4 * torch.finfo(q.dtype).eps
    ratios = [
        error / torch.maximum(2 * of_eager, eps * scale)
        for error, of_eager, scale in worst.values()
    ]
    return torch.stack(ratios).max().item()


@torch.no_grad()
def bench_shape(
    B, heads, N, L, D, dtype, device, forms, rounds, peak, rate=float("inf"), contender=None
) -> list[dict]:
    """All contenders on one shape, one row for each form of edit. peak: FLOP/s; rate: bytes/s;
    contender: (name, function) or None."""
    q, k, v = inputs(B, heads, N, L, D, dtype, device)
    rows = []
    for form in forms:
        edit = make_edit(form, B, heads, N, L, D, dtype, device)
        functions = rivals(q, k, v, edit, triton=torch.device(device).type == "cuda")
        if form != "plain" and "minisd" in functions:
            functions["minisd plain"] = lambda: attention(q, k, v, None, "triton")
        if contender is not None:
            functions[contender[0]] = partial(contender[1], q, k, v, edit)
        times, memory, errors = measure(functions, device, rounds)
        flop, moved = needs(edit, B, heads, N, L, D, dtype.itemsize)
        row = {
            "B": B,
            "H": heads,
            "N": N,
            "L": L,
            "D": D,
            "dtype": str(dtype)[6:],
            "form": form,
            "failed": errors,
            "flop": flop,
            "bytes": moved,
        }
        row["error_over_budget"] = error_ratio(q, k, v, edit) if "minisd" in times else None
        if contender is not None:
            name, function = contender
            ratio = error_ratio(q, k, v, edit, function) if name in times else None
            row["contender"] = {"name": name, "error_over_budget": ratio}
        row["times"] = {
            name: {
                **t,
                "tflops": flop / t["ms"] * 1e-9,
                "of_peak": flop / t["ms"] * 1e3 / peak,
                "of_roofline": max(flop / peak, moved / rate) / (t["ms"] * 1e-3),
                "bytes": memory[name],
            }
            for name, t in times.items()
        }
        rows.append(row)
        print(describe(row), flush=True)
    return rows


def best_rival(row: dict) -> tuple[str, float]:
    """The quickest contender that is not ours, and its time over ours; ("nothing", nan) if none
    ran."""
    times = {name: t["ms"] for name, t in row["times"].items() if not name.startswith("minisd")}
    name = min(times, key=times.get, default="nothing")
    return name, times.get(name, float("nan")) / row["times"]["minisd"]["ms"]


def describe(row: dict) -> str:
    sizes = " ".join(f"{name}{row[name]}" for name in "BHNLD")
    text = f"{sizes} {row['dtype']:<9}{row['form']:<18}"
    for contender, t in row["times"].items():
        text += f" {contender} {t['ms']:.4f} ms"
    if "minisd" in row["times"]:
        name, ratio = best_rival(row)
        text += f" | {ratio:.2f}x of {name}, error {row['error_over_budget']:.2f}"
    return text


def misses(rows: list[dict]) -> list[str]:
    """What is wrong or slower than the design asks for, one line each."""
    out, bars = [], []
    for row in rows:
        contender = row.get("contender", {"name": None, "error_over_budget": None})
        for name, error in row["failed"].items():
            if name.startswith("minisd") or name == contender["name"]:  # these must work
                out.append(f"FAILED {name}: {error}: {describe(row)}")
        ratio = contender["error_over_budget"]
        if ratio is not None and not ratio <= 1:
            out.append(f"WRONG {contender['name']}, error over budget {ratio:.2f}: {describe(row)}")
        if "minisd" not in row["times"]:
            continue
        if not row["error_over_budget"] <= 1:  # nan is wrong, too
            out.append(f"WRONG {describe(row)}")
        form, times = row["form"], {contender: t["ms"] for contender, t in row["times"].items()}
        if form == "plain":
            name, ratio = best_rival(row)
            must = (
                MUST_CROSS if is_cross(row["N"], row["L"]) else MUST_SELF.get((row["N"], row["D"]))
            )
            bars += (
                [(f"{name} / minisd, {describe(row)}", ratio, ">=", must)]
                if must and name != "nothing"
                else []
            )
            continue
        if form in MUST_EDIT and "minisd plain" in times:
            over = times["minisd"] / times["minisd plain"]
            bars.append((f"minisd / its plain, {describe(row)}", over, "<=", MUST_EDIT[form]))
        if form in MUST_EAGER and "eager" in times:
            bars.append(
                (
                    f"eager / minisd, {describe(row)}",
                    times["eager"] / times["minisd"],
                    ">=",
                    MUST_EAGER[form],
                )
            )
    return out + harness.slow(bars)


def is_cross(N: int, L: int) -> bool:
    """Whether a shape is one of a cross-attention site."""
    return L <= 128 and L != N


def table(result: dict) -> str:
    """The Markdown table of a result file."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, commit "
        f"{result['commit'][:12]}; "
        f"`{result['command']}`",
        "",
        "| B | H | N | L | D | dtype | form | ms | quartiles | TFLOP/s | of roofline | MB | "
        "rival | ratio | of plain "
        "| error/budget |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "minisd" not in row["times"]:
            continue
        t, (name, ratio) = row["times"]["minisd"], best_rival(row)
        plain = row["times"].get(
            "minisd" if row["form"] == "plain" else "minisd plain", {"ms": float("nan")}
        )["ms"]
        lines.append(
            f"| {row['B']} | {row['H']} | {row['N']} | {row['L']} | {row['D']} | {row['dtype']} | "
            f"{row['form']} | {t['ms']:.4f} "
            f"| {t['low']:.4f} - {t['high']:.4f} | {t['tflops']:.0f} | {t['of_roofline']:.2f} | "
            f"{t['bytes'] / 1e6:.1f} "
            f"| {name} | {ratio:.2f} | {t['ms'] / plain:.2f} | {row['error_over_budget']:.2f} |"
        )
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--shape",
        type=numbers,
        action="append",
        metavar="B,H,N,L,D",
        help="time this shape only; may be repeated",
    )
    names = ["float16", "bfloat16", "float32"]
    parser.add_argument("--dtype", nargs="+", default=names[:2], choices=names)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="batch 2, float16, the 512x512 shapes")
    parser.add_argument("--only", default="", metavar="FORM", help="forms whose name contains this")
    parser.add_argument("--contender", metavar="MODULE:FUNCTION", help="one rival more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there, not to results/")
    args = parser.parse_args(argv)
    try:
        contender = args.contender and loaded(args.contender)
    except ValueError as error:
        parser.error(str(error))
    if torch.device(args.device).type != "cuda":
        print("no GPU: the Triton kernels are left out, only what runs on this device is timed")
    dtypes = [getattr(torch, name) for name in (args.dtype[:1] if args.quick else args.dtype)]
    grid, batches = (SHAPES[:8], args.batch[:1]) if args.quick else (SHAPES, args.batch)
    shapes = args.shape or [(B, H, *shape) for B in batches for shape in grid]
    rows, suffix = [], "-shape" if args.shape else "-quick" if args.quick else ""
    rate, path = bandwidth(args.device), args.json
    print(f"measured bandwidth {rate * 1e-9:.0f} GB/s")
    for dtype in dtypes:
        peak = harness.matrix_peak(dtype, args.device)
        print(f"{str(dtype)[6:]}: measured matrix peak {peak * 1e-12:.1f} TFLOP/s")
        for B, heads, N, L, D in shapes:
            forms = ("plain", *(CROSS_EDITS if is_cross(N, L) else SELF_EDITS))
            forms = [form for form in forms if args.only in form]
            shape = (B, heads, N, L, D, dtype, args.device, forms, args.rounds, peak, rate)
            rows += bench_shape(*shape, contender)
            if rows and args.json:
                harness.write(args.json, {**harness.provenance(args.device), "rows": rows})
            elif rows:
                path = harness.save(f"attention{suffix}", rows, args.device)
    if not rows:
        print(f"nothing was measured: no form contains {args.only!r}")
        return 1
    print(f"wrote {path}")
    missed = misses(rows)
    print("\n".join(missed))
    return int(any(text.startswith(("WRONG", "FAILED")) for text in missed))


if __name__ == "__main__":
    sys.exit(main())
