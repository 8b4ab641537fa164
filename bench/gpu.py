"""Everything that needs a GPU, in under ten minutes, on a machine with only this checkout, torch and triton.

    python -m bench.gpu [--full]

Runs the GPU-marked tests, then bench.attention, bench.fused and the engine's benchmarks, and prints what is wrong or
misses its target. Needs no installation: the checkout is put on the path. Tests that import something that is not there
(diffusers) are skipped with a line saying so.
"""

import argparse
import importlib.util
import subprocess
import sys

import torch

from bench import harness


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="both dtypes, both batches, 768x768 as well")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing to run", file=sys.stderr)
        return 2
    harness.use_checkout()
    failed = []
    if importlib.util.find_spec("pytest") is None:
        print("GPU tests skipped: pytest is not installed")
    else:
        missing = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
        files = []
        for file in sorted((harness.ROOT / "tests").glob("test_*.py")):
            text = file.read_text()
            lacks = [name for name in missing if f"import {name}" in text or f"from {name}" in text]
            if lacks and "mark.gpu" in text:
                print(f"{file.name} skipped: {', '.join(lacks)} is not installed")
            elif "mark.gpu" in text:
                files.append(str(file))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files], cwd=harness.ROOT)
        failed += ["GPU tests"] if done.returncode else []
    quick, five = [] if args.full else ["--quick"], ["--rounds", "5"]
    commands = [["bench.attention", *quick], ["bench.fused", *quick], ["bench.editing", "speed", *five]]
    commands += [[f"bench.{name}", *five] for name in ("unet", "txt2img", "scaling", "startup")]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], cwd=harness.ROOT)
        failed += [" ".join(command)] if done.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "ran to the end; misses are the lines WRONG and SLOW above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
