"""Editing given pictures, measured on rendered scenes, whose truth is known: the part `real` of
bench.editing.

    python -m bench.editing real [--only blend erase ...] [--n 50] [--sheets docs]

What is measured is said in the file of each part. Its figures take the place of its older ones in
the JSON file, and `python -m bench.report` writes the tables of the README from that.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import minisd
from bench import harness

RESULTS = harness.ROOT / "bench/results/cpu/editing_real.json"
# part -> its module and function there, function(sd, n) -> (figures, contact sheet), and the file
# name of the sheet
PARTS = {
    "blend": ("bench.real_blend", "blend", "blended.png"),
    "erase": ("bench.real_blend", "erase", "erasure.png"),
    "invert": ("bench.real_invert", "invert", "inversion.png"),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.editing real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all parts"
    )
    parser.add_argument(
        "--model", default="shapes", help="a bundled model or a checkpoint folder (default: shapes)"
    )
    parser.add_argument("--n", type=int, default=50, help="scenes of each part (default: 50)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--sheets", type=Path, help="write a contact sheet of each part into this folder"
    )
    args = parser.parse_args(arguments)

    sd = minisd.load(args.model)
    for part in args.only:
        module, function, sheet = PARTS[part]
        started = time.time()
        figures, page = getattr(importlib.import_module(module), function)(sd, args.n)
        about = harness.provenance(str(sd.device)) | {
            "dtype": str(sd.dtype),
            "attention": sd.unet.attention,
        }
        record = json.loads(args.json.read_text()) if args.json.exists() else {}
        record[part] = about | {"seconds": round(time.time() - started)} | figures
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            page.save(args.sheets / sheet)
