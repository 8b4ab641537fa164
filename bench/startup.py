"""How long until minisd draws: imports, the command's help, loading from disk, the first image.

    python -m bench.startup [--device cuda] [--rounds 3] [--quick]

Each figure is of fresh processes, in turns; the first round is not counted. Loading is of a folder
of SD v1.4's size with random weights (float32 on a CPU, else float16) that lies in the page cache,
beside reading its files into memory. Writes bench/results/<device>/startup.json.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from bench import harness, models

TIMED = """
import sys, time
start = time.perf_counter()
{code}
print("seconds", time.perf_counter() - start)
"""
READ = """
import glob, os
kept = []
for path in glob.glob({folder!r} + "/*/*.safetensors"):
    with open(path, "rb") as file:
        kept.append(bytearray(os.path.getsize(path)))
        file.readinto(kept[-1])
"""


def write_folder(folder: Path, device: str, small: bool) -> None:
    """A checkpoint in diffusers' folder layout."""
    from safetensors.torch import save_file

    from minisd.checkpoints.load import MODELS, SD_V1_SCHEDULE, bundled, weights_file

    sd = models.full_size("cpu", torch.float32 if device == "cpu" else torch.float16, small)
    for part in MODELS:
        model = getattr(sd, part)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(asdict(model.config)))
        tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
        save_file(tensors, folder / weights_file(part, None))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_V1_SCHEDULE))
    (folder / "tokenizer").symlink_to(bundled()["shapes"] / "tokenizer")


def seconds(code: str) -> float:
    """What the code takes in a fresh interpreter, the interpreter's own start left out."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(code=code)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def cases(folder: str, device: str) -> dict[str, tuple]:
    """What is timed: (code, imports that are not counted, what it is measured against)."""
    ready = f"import torch, minisd.pipeline; torch.zeros(1, device={device!r})"  # CUDA: a context
    load = f"import minisd; minisd.load({folder!r}, device={device!r})"
    names = "import minisd; [getattr(minisd, name) for name in minisd.__all__]"
    help = "from minisd.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    draw = f"minisd.load('shapes', device={device!r}).txt2img('a red circle', progress=False)"
    return {
        "import torch": ("import torch", "", None),
        "import minisd": ("import minisd", "", "import torch"),
        "import minisd, every public name": (names, "", "import torch"),
        "minisd --help": (help, "", None),
        "read the files": (READ.format(folder=folder), "", None),
        "minisd.load of them": (load, ready, "read the files"),
        "shapes: load and the first image, imports included": (f"import minisd; {draw}", "", None),
    }


def measure(folder: str, device: str, rounds: int) -> list[dict]:
    """The rows of the table."""
    named = cases(folder, device)
    ms = {what: [] for what in named}
    for i in range(rounds + 1):
        for what, (code, before, _) in named.items():
            spent = seconds(f"{before}\nstart = time.perf_counter()\n{code}")
            if i:  # the first fills the caches
                ms[what].append(spent * 1e3)
    times = {what: harness.quartiles(each) for what, each in ms.items()}
    return [
        {"what": what, "base": base, "base_ms": base and times[base]["ms"], "times": times[what]}
        for what, (_, _, base) in named.items()
    ]


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = []
    for row in record["rows"]:
        seconds, low, high = (f"{row['times'][key] / 1e3:.2f}" for key in ("ms", "low", "high"))
        base = row["base"]
        against = f"{row['times']['ms'] / row['base_ms']:.2f} x {base}" if base else ""
        lines.append((row["what"], seconds, f"{low} - {high}", against))
    heads = ("what", "seconds", "quartiles", "against")
    return f"{harness.origin(record)}\n\n{harness.markdown(heads, lines)}"


def main() -> int:
    args = harness.options(__doc__, "bench.startup")
    device = torch.device(args.device).type
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), device, args.quick)
        rows = measure(folder, device, args.rounds)
    harness.finish("startup", rows, args, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
