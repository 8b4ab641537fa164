"""Everything that needs a GPU, on a machine with only this checkout, torch, triton and
transformers.

    python -m bench.gpu [PART ...] [--full] [--minutes 9.5]

Parts, in this order: tests (the GPU-marked ones, in as many processes as there are cores), then
attention, the kernels' own figures, then the tables of the README, editing, unet, txt2img and
startup, then fused and scaling, and in the end bundled, the kernels' tests once more with the ptxas
that Triton bundles and minisd_kernels/toolchain.py may have replaced; all of them unless some are
named, so that it can be split over several calls where the time of one is limited. Each part writes
its results as soon as it has them. Prints what is wrong or misses its target, how each part ended
and after how many seconds, and in the end what was skipped and why. Needs no installation: the
checkout is put on the path. What needs something that is not there is left out with a line saying
so: the tests without pytest, what draws without Pillow, a test file or a rival without diffusers.

The whole ends within ten minutes: when --minutes (9.5) are over, what runs is interrupted, and the
parts that did not end are named; what they had saved stays. On an H200 where nothing has been
compiled yet all of it should fit, but that is an estimate and was never measured, in minutes: tests
1.5 - 2.25 (about 260 compiles of a second, on four cores), attention 1.5 - 2 (compiles and
FlexAttention), editing 0.75, unet 1 - 1.5 (12 processes), txt2img 0.75 (6 processes), startup 1,
fused 0.75, scaling 0.5, bundled as long as tests, if anything is left. --full adds the other
dtypes, batches and sizes of the kernels and what compiles the whole UNet, diffusers' too; it takes
as long as it takes, unless --minutes says otherwise.
"""

import argparse
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import harness
from bench.kernel_resources import nvidia

PARTS = (
    "tests",
    "attention",
    "editing",
    "unet",
    "txt2img",
    "startup",
    "fused",
    "scaling",
    "bundled",
)
NEEDS = {"tests": ("pytest",), "bundled": ("pytest", "triton")} | dict.fromkeys(
    ("editing", "txt2img", "unet", "scaling", "startup"), ("PIL",)
)
TESTS = {"tests": "test_*.py", "bundled": "test_kernels*.py"}  # part: which files
MARK = "pytest.mark.gpu"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
PASSED, FAILED, LATE = (
    "passed",
    "failed",
    "not done in time",
)  # how a process ended; LATE: it was interrupted


def left(deadline: float) -> float | None:
    """Seconds until the deadline (of time.monotonic), as subprocess takes them: None where it is
    math.inf."""
    return None if deadline == math.inf else max(0, deadline - time.monotonic())


def collect(folder: Path, deadline: float, files: str) -> list[str]:
    """The GPU tests of some files in a folder, as pytest calls them; a file that imports what is
    not there, itself or by a module of its own, is skipped with a line.

    subprocess.TimeoutExpired at the deadline.
    """
    tests = []
    for file in sorted(folder.glob(files)):
        if MARK not in file.read_text():
            continue
        command = [*PYTEST, "--collect-only", str(file)]
        done = subprocess.run(
            command, cwd=harness.ROOT, capture_output=True, text=True, timeout=left(deadline)
        )
        lacks = re.search(r"ModuleNotFoundError: .*\b(diffusers|transformers|PIL)\b", done.stdout)
        if lacks:
            print(f"{file.name} skipped: {lacks[1]} is not installed", flush=True)
        elif done.returncode:  # pytest will say why
            tests.append(str(file))
        else:
            tests += [line for line in done.stdout.splitlines() if ".py::" in line]
    return tests


def run_tests(
    tests: list[str],
    deadline: float,
    processes: int | None = None,
    env: dict[str, str] | None = None,
) -> set[str]:
    """How the tests end, in as many processes as there are cores: most of their time is compiling,
    on one core each."""
    processes = processes or os.cpu_count() or 1
    running = [
        subprocess.Popen(
            [*PYTEST, *share],
            cwd=harness.ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for share in (tests[i::processes] for i in range(processes))
        if share
    ]
    return {finish(process, deadline, patience=3) for process in running}


def finish(process: subprocess.Popen, deadline: float, patience: float = 10) -> str:
    """How it ends: PASSED, FAILED, or LATE, interrupted at the deadline. Prints what it piped.

    patience: seconds that it has for tidying up.
    """
    late = False
    try:
        out, _ = process.communicate(timeout=left(deadline))
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(
            signal.SIGINT
        )  # like Ctrl-C: pytest says what it found, temporary files go
        try:
            out, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    if out:
        print(out.decode(), flush=True)
    return LATE if late else FAILED if process.returncode else PASSED


def why_not(part: str) -> str | None:
    """What keeps a part from being run on this machine; None: nothing."""
    for module in NEEDS.get(part, ()):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if part == "bundled" and torch.cuda.get_device_capability()[0] != 9:
        return "only on sm_90 may another ptxas than Triton's have been chosen"
    return None


def commands(full: bool) -> dict[str, list[str]]:
    """{part: its command}, of all parts that are no tests."""
    kernels, compiled = [] if full else ["--quick"], "--compiled" if full else "--no-compiled"
    return {
        "attention": ["bench.attention", *kernels],
        "editing": ["bench.editing", "speed", "--rounds", "5"],
        "unet": ["bench.unet", "--rounds", "5", compiled],
        "txt2img": ["bench.txt2img", "--rounds", "5", compiled],
        "fused": ["bench.fused", *kernels],
        "scaling": ["bench.scaling", "--rounds", "5"],
        "startup": ["bench.startup", "--rounds", "2"],
    }


def run(part: str, full: bool, deadline: float) -> set[str]:
    """How its processes end."""
    if part not in TESTS:
        command = [sys.executable, "-m", *commands(full)[part]]
        return {finish(subprocess.Popen(command, cwd=harness.ROOT), deadline)}
    try:
        tests = collect(harness.ROOT / "tests", deadline, TESTS[part])
    except subprocess.TimeoutExpired:
        return {LATE}
    if part == "tests":
        return run_tests(tests, deadline)
    return run_tests(tests, deadline, env={**os.environ, "TRITON_PTXAS_PATH": str(nvidia("ptxas"))})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all shapes of the kernels, and the UNet compiled as well",
    )
    parser.add_argument(
        "--minutes", type=float, help="interrupt what has not ended then (9.5; --full: no limit)"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing to run", file=sys.stderr)
        return 2
    ends, seconds, skipped = {}, {}, []
    minutes = args.minutes if args.minutes is not None else math.inf if args.full else 9.5
    deadline = time.monotonic() + 60 * minutes
    for part in [part for part in PARTS if part in (args.parts or PARTS)]:
        start = time.monotonic()
        if reason := why_not(part):
            skipped.append(f"{part} skipped: {reason}")
            print(skipped[-1], flush=True)
            continue
        if start >= deadline:
            ends[part] = {LATE}
            continue
        ends[part] = run(part, args.full, deadline)
        seconds[part] = time.monotonic() - start
        print(f"{part}: {', '.join(sorted(ends[part]))}, {seconds[part]:.0f} s", flush=True)
    print(*skipped, sep="\n", end="\n" if skipped else "")
    print(
        ", ".join(f"{part} {spent:.0f} s" for part, spent in seconds.items()),
        f"= {sum(seconds.values()):.0f} s",
    )
    wrong = [end for end in (FAILED, LATE) if any(end in each for each in ends.values())]
    for end in wrong:
        print(f"{end}: {', '.join(part for part in ends if end in ends[part])}")
    if not wrong:
        print("ran to the end; misses are the lines WRONG, FAILED and SLOW above")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
