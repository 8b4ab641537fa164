"""How long until minisd draws: imports, the command's help, loading from disk, the first picture.

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

from bench import harness

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

    sd = harness.full_size("cpu", torch.float32 if device == "cpu" else torch.float16, small)
    for part in MODELS:
        model = getattr(sd, part)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(asdict(model.config)))
        save_file(model.state_dict(), folder / weights_file(part, None))
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


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = [
        harness.origin(record),
        "",
        "| what | seconds | quartiles | against |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        against = (
            f"{row['times']['ms'] / row['base_ms']:.2f} x {row['base']}" if row["base"] else ""
        )
        t = {key: value / 1e3 for key, value in row["times"].items()}
        lines.append(
            f"| {row['what']} | {t['ms']:.2f} | {t['low']:.2f} - {t['high']:.2f} | {against} |"
        )
    return "\n".join(lines)


def main() -> int:
    args = harness.options(__doc__, "bench.startup")
    rounds, device = args.rounds, torch.device(args.device).type
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), device, args.quick)
        load = "import minisd; minisd.load({!r}, device={!r})"
        ready = f"import torch, minisd.pipeline; torch.zeros(1, device={device!r})"  # on CUDA: makes the context
        cases = {  # what: (code, imports that are not counted, what it is measured against)
            "import torch": ("import torch", "", None),
            "import minisd": ("import minisd", "", "import torch"),
            "import minisd, every public name": (
                "import minisd; [getattr(minisd, name) for name in minisd.__all__]", "", "import torch"),
            "minisd --help": (
                "from minisd.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass", "", None),
            "read the files": (READ.format(folder=folder), "", None),
            "minisd.load of them": (load.format(folder, device), ready, "read the files"),
            "shapes: load and the first picture, imports included": (
                f"import minisd; minisd.load('shapes', device={device!r}).txt2img('a red circle', progress=False)",
                "", None),
        }  # fmt: skip
        times = {what: [] for what in cases}
        for i in range(rounds + 1):
            for what, (code, before, _) in cases.items():
                code = f"{before}\nstart = time.perf_counter()\n{code}"
                if (spent := seconds(code)) and i:  # the first fills the caches
                    times[what].append(spent * 1e3)
    quartiles = {what: harness.quartiles(ms) for what, ms in times.items()}
    rows = [
        {
            "what": what,
            "base": base,
            "base_ms": quartiles[base]["ms"] if base else None,
            "times": quartiles[what],
        }
        for what, (_, _, base) in cases.items()
    ]
    print(table({**harness.provenance(args.device), "rows": rows}))
    if not args.quick:
        print(f"wrote {harness.save('startup', rows, args.device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
