"""Shared by the benchmarks: interleaved timing, peak memory, where the numbers come from, JSON.

Contenders are timed in turns, one call of each per round, so that a clock that drifts or a neighbour on the machine
hits all of them alike; the figure is the median over the rounds, with the quartiles as spread.
"""

import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def use_checkout() -> None:
    """Make minisd_kernels and the rest importable from this checkout, here and in child processes, unless installed."""
    if importlib.util.find_spec("minisd_kernels") is not None:
        return
    links = Path(tempfile.mkdtemp(prefix="minisd-path-"))
    folders = {"minisd": "minisd", "minisd_kernels": "kernels", "minisd_weights": "weights", "bench": "bench"}
    for name, folder in folders.items():
        (links / name).symlink_to(ROOT / folder)
    sys.path.insert(0, str(links))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(links), *filter(None, [os.environ.get("PYTHONPATH")])])
    importlib.invalidate_caches()


def device_name(device: str) -> str:
    """The card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def provenance(device: str) -> dict:
    """Device, versions, commit, command: what a figure is worth nothing without."""

    def git(*args):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    triton = importlib.util.find_spec("triton") and __import__("triton")
    return {
        "device": device_name(device),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if triton else None,
        "commit": git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else ""),
        "command": " ".join(["python -m", ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:]), *sys.argv[1:]]),
    }


def interleave(
    functions: dict[str, Callable], device: str, rounds: int = 20, seconds: float = 2e-3, graph: bool = False
) -> dict[str, dict]:
    """{name: {"ms", "low", "high"}}: median and quartiles of one call, the functions taken in turns.

    A sample repeats the call until it lasts about `seconds`, so that the clock's resolution does not matter. With
    `graph`, on CUDA the repeated calls are captured once and replayed, so that Python's time for a call is not in it.
    """
    cuda = torch.device(device).type == "cuda"

    def sample(function, repeats):
        if not cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            return (time.perf_counter() - start) * 1e3 / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    repeats, times, replays = {}, {name: [] for name in functions}, {}
    for name, function in functions.items():
        for _ in range(3):  # warm-up: compiles, allocates, raises the clock
            once = sample(function, 1)
        repeats[name] = max(1, min(1000, round(seconds * 1e3 / max(once, 1e-4))))
        if graph and cuda:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                for _ in range(repeats[name]):
                    function()
            replays[name] = captured.replay
            sample(captured.replay, 1)
    for _ in range(rounds):
        for name, function in functions.items():
            if name in replays:
                times[name].append(sample(replays[name], 1) / repeats[name])
            else:
                times[name].append(sample(function, repeats[name]))
    out = {}
    for name, ms in times.items():
        low, median, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
        out[name] = {"ms": median, "low": low, "high": high}
    return out


def peak_memory(function: Callable, device: str) -> int | None:
    """Bytes that one call allocates at its peak above what is there before; None on a CPU, which does not count."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product: what fractions of the peak are fractions of."""
    n = 8192 if torch.device(device).type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / (interleave({"product": lambda: a @ b}, device, rounds=10)["product"]["ms"] * 1e-3)


def save(name: str, rows: list[dict], device: str) -> Path:
    """Write bench/results/<device>/<name>.json and return its path."""
    path = ROOT / "bench/results" / device_name(device).lower().replace(" ", "-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(device), "rows": rows}, indent=1) + "\n")
    return path


def put(text: str, name: str, table: str) -> str:
    """`text` with what stands between the lines `<!-- name -->` and `<!-- end ... -->` replaced by the table."""
    block = re.compile(rf"(?<=<!-- {re.escape(name)} -->\n).*?(?=<!-- end)", re.DOTALL)
    if len(block.findall(text)) != 1:
        raise ValueError(f"expected one block from <!-- {name} --> to <!-- end -->, found {len(block.findall(text))}")
    return block.sub(lambda _: f"{table}\n", text)
