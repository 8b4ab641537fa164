"""One guided step of SD v1.4's UNet, in this checkout and in another: are we slower, or larger?

    python -m bench.against PATH [--rounds 15] [--batch 1] [--dtype fp32] [--quick]

PATH is another checkout of minisd, of an older commit, say (`git worktree add PATH COMMIT`). Each
builds its own `bench.unet.ours`, the same random weights, in a process of its own that lives as
long as the measurement; the two take turns, one step each. Printed are the medians with their
quartiles, the peak memory of each process, weights included, and the median over the rounds of
this tree's time over the other's, in which a slow minute of the machine cancels out.
"""

import atexit
import importlib
import shutil
import statistics
import sys
from pathlib import Path

import torch

from bench import harness

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("bench", "minisd", "minisd_kernels", "minisd_weights")


def build(name: str, tree: Path, device: str, dtype: torch.dtype, batch: int, small: bool):
    """{name: the tree's guided step}: called in a fresh process, which then is the tree's."""
    for module in [module for module in sys.modules if module.split(".")[0] in OURS]:
        del sys.modules[module]
    links = harness.linked(tree)
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    sys.path.insert(0, str(links))
    importlib.invalidate_caches()
    step = importlib.import_module("bench.unet").ours(name, device, dtype, batch, small)
    found = Path(sys.modules["minisd"].__file__).resolve()
    if not found.is_relative_to(tree.resolve()):
        raise ImportError(f"minisd is {found}, expected it in {tree}")
    return step


def compare(times: dict[str, dict]) -> list[str]:
    """The lines to print of the contenders "this" and "other", the ratios in the last."""
    lines = []
    for name, t in times.items():
        ms, low, high = (harness.four_digits(t[key]) for key in ("ms", "low", "high"))
        lines.append(f"{name:6} {ms} ms ({low} - {high}), peak {harness.gigabytes(t['bytes'])}")
    this, other = times["this"], times["other"]
    pairs = [mine / theirs for mine, theirs in zip(this["samples"], other["samples"])]
    time, memory = statistics.median(pairs), this["bytes"] / other["bytes"]
    low, high = harness.quartiles(pairs)["low"], harness.quartiles(pairs)["high"]
    lines.append(f"this / other: time {time:.3f} ({low:.3f} - {high:.3f}), memory {memory:.3f}")
    return lines


def main(arguments=None) -> int:
    parser = harness.parser(__doc__, "bench.against", batch=int, dtype=str)
    parser.add_argument("path", type=Path, help="the root of the other checkout")
    args = harness.parsed(parser, arguments)
    if not (args.path / "bench" / "unet.py").is_file():
        parser.error(f"{args.path} is no checkout of minisd: it has no bench/unet.py")
    if args.dtype not in (None, *DTYPES):
        parser.error(f"got --dtype {args.dtype}, expected one of {', '.join(DTYPES)}")
    dtypes = [args.dtype] if args.dtype else ["fp32", "bf16"] if args.device == "cpu" else ["fp16"]
    for dtype in dtypes:
        given = (args.device, DTYPES[dtype], args.batch or 1, args.quick)
        trees = {"this": harness.ROOT, "other": args.path}
        builders = {name: (build, name, tree, *given) for name, tree in trees.items()}
        times = harness.contest(builders, args.device, args.rounds)
        if len(times) < len(trees):
            return 1
        print(dtype, *compare(times), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
