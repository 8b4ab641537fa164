"""Everything that needs a GPU, on a machine with only this checkout, torch, triton, transformers and Pillow.

    python -m bench.gpu [PART ...] [--full]

Parts, in this order: tests (the GPU-marked ones), attention, editing, txt2img, unet, fused, scaling, startup; all of
them unless some are named, so that it can be split over several calls where the time of one is limited. Prints what is
wrong or misses its target, and the seconds of each part. Needs no installation: the checkout is put on the path. What
needs something that is not there is left out with a line saying so: the tests without pytest, a test file or a rival
without diffusers.

The whole is to end within ten minutes on an H200 where nothing has been compiled yet. That is an estimate and was never
measured, in minutes: tests 1.5 - 2 (about 240 compiles of a second in four processes), attention 1.5 - 2 (compiles and
FlexAttention), editing 1, txt2img 1 (6 processes), unet 1.5 - 2 (12 processes), fused 0.75, scaling 0.5, startup 1.
--full adds the other dtypes, batches and sizes of the kernels and what compiles the whole UNet, and takes longer.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import harness

PARTS = ("tests", "attention", "editing", "txt2img", "unet", "fused", "scaling", "startup")
MARK = "pytest.mark.gpu"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]


def collect(folder: Path) -> list[str]:
    """The GPU tests of a folder, as pytest calls them; a file that imports what is not there, itself or by a module of
    its own, is skipped with a line."""
    tests = []
    for file in sorted(folder.glob("test_*.py")):
        if MARK not in file.read_text():
            continue
        done = subprocess.run([*PYTEST, "--collect-only", str(file)], cwd=harness.ROOT, capture_output=True, text=True)
        lacks = re.search(r"ModuleNotFoundError: .*\b(diffusers|transformers)\b", done.stdout)
        if lacks:
            print(f"{file.name} skipped: {lacks[1]} is not installed", flush=True)
        elif done.returncode:  # pytest will say why
            tests.append(str(file))
        else:
            tests += [line for line in done.stdout.splitlines() if ".py::" in line]
    return tests


def run_tests(tests: list[str], processes: int = 4) -> bool:
    """Whether all tests pass; in several processes, because most of their time is compiling, on one core each."""
    running = [
        subprocess.Popen([*PYTEST, *share], cwd=harness.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for share in (tests[i::processes] for i in range(processes))
        if share
    ]
    for process in running:
        print(process.communicate()[0].decode(), flush=True)
    return not any(process.returncode for process in running)


def commands(full: bool) -> dict[str, list[str]]:
    """{part: its command}, of all parts but the tests."""
    kernels, compiled = [] if full else ["--quick"], "--compiled" if full else "--no-compiled"
    return {
        "attention": ["bench.attention", *kernels],
        "editing": ["bench.editing", "speed", "--rounds", "5"],
        "txt2img": ["bench.txt2img", "--rounds", "5", compiled],
        "unet": ["bench.unet", "--rounds", "5", compiled],
        "fused": ["bench.fused", *kernels],
        "scaling": ["bench.scaling", "--rounds", "5"],
        "startup": ["bench.startup", "--rounds", "2"],
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--full", action="store_true", help="all shapes of the kernels, and the UNet compiled as well")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing to run", file=sys.stderr)
        return 2
    failed, seconds = [], {}
    for part in [part for part in PARTS if part in (args.parts or PARTS)]:
        start = time.perf_counter()
        if part != "tests":
            done = subprocess.run([sys.executable, "-m", *commands(args.full)[part]], cwd=harness.ROOT)
            passed = done.returncode == 0
        elif importlib.util.find_spec("pytest") is None:
            print("GPU tests skipped: pytest is not installed")
            continue
        else:
            passed = run_tests(collect(harness.ROOT / "tests"))
        failed += [] if passed else [part]
        seconds[part] = time.perf_counter() - start
        print(f"{part}: {seconds[part]:.0f} s", flush=True)
    print(", ".join(f"{part} {spent:.0f} s" for part, spent in seconds.items()), f"= {sum(seconds.values()):.0f} s")
    print(f"failed: {', '.join(failed)}" if failed else "ran to the end; misses are the lines WRONG, FAILED and SLOW above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
