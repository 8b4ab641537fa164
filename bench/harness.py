"""Shared by the benchmarks: interleaved timing, peak memory, where the numbers come from, JSON.

Contenders are timed in turns, one call of each per round, so that a clock that drifts or a
neighbour on the machine hits all of them alike; the figure is the median over the rounds, with the
quartiles as spread.
"""

import argparse
import atexit
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import operator
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# pathspecs: what one benchmark writes is no change for the next
CODE = (".", ":!bench/results", ":!*.md", ":!docs")
RSS_RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of the resident memory


def use_checkout() -> None:
    """Make this checkout importable here and in child processes, unless minisd is installed.

    Called when the package `bench` is imported, before any module of it imports minisd.
    """
    if importlib.util.find_spec("minisd_kernels") is not None:
        return
    links = linked(ROOT)
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    sys.path.insert(0, str(links))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(links), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    importlib.invalidate_caches()


def linked(tree: Path) -> Path:
    """A new folder to put on the path: in it the packages of a checkout under their names."""
    links = Path(tempfile.mkdtemp(prefix="minisd-path-"))
    for name in ("minisd", "bench"):
        (links / name).symlink_to(tree.resolve() / name)
    for name in ("kernels", "weights"):
        (links / f"minisd_{name}").symlink_to(tree.resolve() / name)
    return links


def device_name(device: str) -> str:
    """The card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def processor() -> str:
    """What /proc/cpuinfo calls this CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None without git or outside of a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def assembler(device: str) -> str | None:
    """The version of the ptxas that makes the kernels for this card; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    from minisd_kernels import tiles
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(tiles.arch()).version  # arch() chooses it, as a launch does


def provenance(device: str) -> dict:
    """Device, versions, commit, command: what a figure is worth nothing without."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *CODE)
    module = ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])
    return {
        "device": device_name(device),
        "processor": processor() if device_name(device) == "cpu" else device_name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "ptxas": assembler(device),
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "commit": "unknown" if commit is None else commit + (" with changes" if changes else ""),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }


def interleave(
    functions: dict[str, Callable],
    device: str,
    rounds: int = 20,
    seconds: float = 2e-3,
    graph: bool = False,
) -> dict[str, dict]:
    """{name: {"ms", "low", "high"}}: median and quartiles of one call, taken in turns.

    A sample repeats the call until it lasts about `seconds`, so that the clock's resolution does
    not matter. With `graph`, on CUDA the repeated calls are captured once and replayed, so that
    Python's time for a call is not in it, nor in how often it is repeated.
    """
    cuda = torch.device(device).type == "cuda"
    repeats, samplers, times = {}, {}, {name: [] for name in functions}
    for name, function in functions.items():
        for _ in range(3):  # warm-up: compiles, allocates, raises the clock
            once = sample(function, 1, cuda)
        if graph and cuda:
            replay = captured(function, 1)
            once = min(sample(replay, 1, cuda) for _ in range(3))
        repeats[name] = max(1, min(1000, round(seconds * 1e3 / max(once, 1e-4))))
        if graph and cuda:  # one replay holds all repeats
            replay = captured(function, repeats[name])
            sample(replay, 1, cuda)
            samplers[name] = partial(lambda f, n: sample(f, 1, cuda) / n, replay, repeats[name])
        else:
            samplers[name] = partial(sample, function, repeats[name], cuda)
    for _ in range(rounds):
        for name in functions:
            times[name].append(samplers[name]())
    return {name: quartiles(ms) for name, ms in times.items()}


def sample(function: Callable, repeats: int, cuda: bool) -> float:
    """Milliseconds of one call, the mean of `repeats`; on CUDA by the device's own clock."""
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


def captured(function: Callable, repeats: int) -> Callable:
    """The replay of a CUDA graph of `repeats` calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    return graph.replay


def compiled(function: Callable) -> Callable:
    """torch.compile for the sizes of the next call alone.

    Otherwise sizes are symbolic from the second on, and at the ninth the function runs uncompiled,
    without a word.
    """
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def milliseconds(function: Callable, device: str) -> float:
    """The wall clock's time of one call, waited for."""
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return (time.perf_counter() - start) * 1e3


def quartiles(ms: list[float]) -> dict[str, float]:
    """{"ms": median, "low", "high": the quartiles}."""
    low, median, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {"ms": median, "low": low, "high": high}


def peak_memory(function: Callable, device: str) -> int | None:
    """Bytes at the peak of one call above what is there before: allocated on CUDA, resident on
    Linux, else None."""
    if torch.device(device).type != "cuda" and not RSS_RESET.exists():
        return None
    before = reset_peak(device)
    function()
    return peak_bytes(device) - before


def reset_peak(device: str) -> int:
    """Start the count of the peak anew; returns the bytes that are there now."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what is free
    RSS_RESET.write_text("5")
    return resident("VmRSS")


def peak_bytes(device: str) -> int:
    """The peak since `reset_peak`."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def resident(key: str) -> int:
    """Bytes of this process that are resident (VmRSS), or were at their peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def contest(
    builders: dict[str, tuple], device: str, rounds: int, results: dict | None = None
) -> dict[str, dict]:
    """{name: {"ms", "low", "high", "samples", "bytes", "above"}} of contenders that take turns.

    builders: process -> (function, *arguments); the function, of a module, is called in a process
    of its own and returns the contenders there, {name: what is timed}. One call of each warms up.
    bytes: at the peak of the calls, weights included, resident memory of the process on a CPU and
    allocated memory on CUDA; above: of it, what was not there before the call. On CUDA the first
    call counts, too: the replay of a graph allocates nothing, its capture does. (So does what a
    compiler's tuning takes.) A process that fails or dies is left out with a line that says so.
    results: gets what each contender, which returns a tensor, has computed.
    """
    workers = start(builders, device)
    samples = {name: [] for *_, names in workers for name in names}
    for _ in range(rounds):
        for worker in list(workers):
            _, here, names = worker
            try:
                for name in names:
                    here.send(name)
                    samples[name].append(here.recv())
            except (EOFError, ConnectionError):
                print(f"  the process of {', '.join(names)} died", flush=True)
                workers.remove(worker)
    for process, here, names in workers:
        for name in names if results is not None else ():
            here.send((name, "result"))
            results[name] = torch.from_numpy(here.recv())
        here.send(None)
        process.join()
    out = {}
    for name, of_name in samples.items():
        if len(of_name) == rounds:
            ms, peaks, above = zip(*of_name)
            out[name] = {**quartiles(list(ms)), "bytes": max(peaks), "above": max(above)}
            out[name]["samples"] = [round(t, 3) for t in ms]
    return out


def start(builders: dict[str, tuple], device: str) -> list[tuple]:
    """(process, connection, names of its contenders) of each builder that succeeds."""
    context, starting, workers = multiprocessing.get_context("spawn"), [], []
    for process_name, builder in builders.items():
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, device, *builder), daemon=True)
        process.start()
        there.close()
        starting.append((process_name, process, here))
    for process_name, process, here in starting:  # they import together, but build one by one
        try:
            here.send("build")
            names = here.recv()
        except (EOFError, ConnectionError):
            names = "its process died"
        if isinstance(names, str):
            print(f"  {process_name} left out: {names}", flush=True)
            process.join()
        else:
            print(f"  ready: {', '.join(names)}", flush=True)
            workers.append((process, here, names))
    return workers


def _work(connection, device, function, *arguments):
    """A process of `contest`."""
    first, cuda = {}, torch.device(device).type == "cuda"
    connection.recv()  # "build"
    try:
        contenders = function(*arguments)
        for name, contender in contenders.items():
            before = reset_peak(device)
            milliseconds(contender, device)
            peak = peak_bytes(device)
            first[name] = (peak, peak - before) if cuda else (0, 0)
    except Exception as error:  # whatever it is, the others go on
        connection.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return
    connection.send(list(contenders))
    while (name := connection.recv()) is not None:
        if isinstance(name, tuple):  # what it computes, not how quickly
            connection.send(contenders[name[0]]().double().cpu().numpy())
            continue
        before = reset_peak(device)
        ms = milliseconds(contenders[name], device)
        peak = peak_bytes(device)
        connection.send((ms, max(peak, first[name][0]), max(peak - before, first[name][1])))


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product: what fractions of the peak are fractions of."""
    n = 8192 if torch.device(device).type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    ms = interleave({"product": lambda: a @ b}, device, rounds=10)["product"]["ms"]
    return 2 * n**3 / (ms * 1e-3)


def parser(doc: str, prog: str, **more: type | bool) -> argparse.ArgumentParser:
    """The options that the benchmarks of the engine share.

    more: name -> type of further options, or the default of one that is on (--name) or off
    (--no-name).
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how_often = "how often each contender is timed (default: 3 on a CPU, else 10)"
    parser.add_argument("--rounds", type=int, help=how_often)
    trial = "a trial run of a small model: nothing is written"
    parser.add_argument("--quick", action="store_true", help=trial)
    for name, kind in more.items():
        switch = dict(action=argparse.BooleanOptionalAction, default=kind)
        parser.add_argument(f"--{name}", **(switch if isinstance(kind, bool) else {"type": kind}))
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None = None):
    """The arguments, with the number of rounds that suits the device."""
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (1 if args.quick else 3 if args.device == "cpu" else 10)
    return args


def options(doc: str, prog: str, arguments: list[str] | None = None, **more) -> argparse.Namespace:
    """`parser` and `parsed` in one."""
    return parsed(parser(doc, prog, **more), arguments)


def gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f} GB"


def four_digits(ms: float) -> str:
    """Milliseconds as tables show them: 5.213, 87.64, 8599."""
    return f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}"


def slow(bars: list[tuple[str, float, str, float]]) -> list[str]:
    """A line for each figure that misses its target; bars: (what, figure, ">=" or "<=", target)."""
    met = {">=": operator.ge, "<=": operator.le}
    return [
        f"SLOW  {what}: {x:.4g}, must be {sign} {bar}"
        for what, x, sign, bar in bars
        if not met[sign](x, bar)
    ]


def machine(record: dict) -> str:
    """The processor, the version of torch and the commit of a result file."""
    threads = f", {record['threads']} threads" if record["device"] == "cpu" else ""
    return (
        f"{record['processor']}{threads}, torch {record['torch']}, commit {record['commit'][:12]}"
    )


def origin(record: dict) -> str:
    """The line above a table: where its figures come from."""
    return f"{machine(record)}; `{record['command']}`"


def markdown(heads: Sequence, rows: Iterable[Sequence]) -> str:
    """A Markdown table; an empty cell is one blank wide."""
    lines = ["|" + "".join(f" {cell} |" for cell in cells) for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines).replace("|  ", "| ")


def spread(t: dict) -> list[str]:
    """Two cells, median and quartiles, of {"ms", "low", "high"}."""
    ms, low, high = (four_digits(t[key]) for key in ("ms", "low", "high"))
    return [ms, f"{low} - {high}"]


def save(name: str, rows: list[dict], device: str) -> Path:
    """Write bench/results/<device>/<name>.json and return its path."""
    folder = ROOT / "bench/results" / device_name(device).lower().replace(" ", "-")
    return write(folder / f"{name}.json", {**provenance(device), "rows": rows})


def write(path: Path, record: dict) -> Path:
    """Write a result file, its folder too where it is missing, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def finish(name: str, rows: list[dict], args, table: Callable, misses: Callable = lambda rows: []):
    """What each benchmark of the engine ends with: its table, its file, what misses its target."""
    print(table({**provenance(args.device), "rows": rows}), flush=True)
    if not args.quick:
        print(f"wrote {save(name, rows, args.device)}", *misses(rows), sep="\n", flush=True)


def put(text: str, name: str, table: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end ... -->` replaced."""
    block = re.compile(rf"(?<=<!-- {re.escape(name)} -->\n)(?:(?!<!--).)*(?=<!-- end)", re.DOTALL)
    if (found := len(block.findall(text))) != 1:
        raise ValueError(f"expected one block from <!-- {name} --> to <!-- end -->, found {found}")
    return block.sub(lambda _: f"{table}\n", text)
