"""Editing given images, measured on rendered scenes, whose truth is known: the part `real` of
bench.editing.

    python -m bench.editing real [--only blend erase ...] [--n 50] [--sheets docs]

What is measured is said in the file of each part. Its figures take the place of its older ones in
the JSON file, and `python -m bench.report` writes the tables of docs/benchmarks.md from that.
"""

import argparse
import json
import time
from pathlib import Path

import minisd
from bench import harness, real_blend, real_invert

RESULTS = harness.ROOT / "bench/results/cpu/editing_real.json"
# part -> function(sd, n) -> (figures, contact sheet), and the file name of the sheet
PARTS = {
    "blend": (real_blend.blend, "blended.png"),
    "erase": (real_blend.erase, "erasure.png"),
    "invert": (real_invert.invert, "inversion.png"),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.editing real", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all parts")
    add("--model", default="shapes", help="a bundled model or a checkpoint folder")
    add("--n", type=int, default=50, help="scenes of each part (default: 50)")
    add("--json", type=Path, default=RESULTS, help="default: %(default)s")
    add("--sheets", type=Path, help="write a contact sheet of each part into this folder")
    args = parser.parse_args(arguments)

    sd = minisd.load(args.model)
    for part in args.only:
        function, sheet = PARTS[part]
        started = time.time()
        figures, page = function(sd, args.n)
        about = harness.provenance(str(sd.device)) | {"dtype": str(sd.dtype)}
        about |= {"attention": sd.unet.attention, "seconds": round(time.time() - started)}
        record = json.loads(args.json.read_text()) if args.json.exists() else {}
        harness.write(args.json, record | {part: about | figures})
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            page.save(args.sheets / sheet)
