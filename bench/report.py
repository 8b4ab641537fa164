"""Writes every measured table of the READMEs from the JSON files in bench/results.

    python -m bench.report [--check]

A table stands between the lines `<!-- NAME -->` and `<!-- end -->`. TABLES says for each which JSON
files it comes from and which function makes Markdown of one of them; devices that have measured it
follow one another. Of a device that has no X.json, X-quick.json is shown. Where no JSON is there,
the block's own text stays. --check writes nothing, and exits with 1 if a table is not what its JSON
says.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import (
    attention,
    editing,
    editing_speed,
    fused,
    harness,
    real_blend,
    real_invert,
    scaling,
    shapes,
    startup,
    txt2img,
    unet,
)


class Table(NamedTuple):
    file: str  # the README that holds it
    name: str  # of its block
    results: str  # bench/results/<device>/<results>.json, or <results>-quick.json
    table: Callable[[dict], str]  # one such file's contents -> Markdown


TABLES = [
    Table("kernels/README.md", "bench.attention", "attention", attention.table),
    Table("kernels/README.md", "bench.fused", "fused", fused.table),
    Table("README.md", "bench.unet", "unet", unet.table),
    Table("README.md", "bench.editing speed", "editing_speed", editing_speed.table),
    Table("README.md", "bench.txt2img", "txt2img", txt2img.table),
    Table("README.md", "bench.startup", "startup", startup.table),
    Table("README.md", "bench.scaling", "scaling", scaling.table),
    Table("README.md", "prompt-to-prompt table: bench/editing.py", "editing", editing.table),
    Table("README.md", "bench.editing real: invert", "editing_real", real_invert.table),
    Table("README.md", "bench.editing real: blend", "editing_real", real_blend.blend_table),
    Table("README.md", "bench.editing real: erase", "editing_real", real_blend.erase_table),
    Table(
        "weights/README.md", "bench.shapes", "shapes", lambda record: shapes.table(record["scores"])
    ),
]


def rewritten(text: str, file: str, results: Path = harness.ROOT / "bench/results") -> str:
    """The text of a README with its tables made anew from the JSON files; ValueError: a table has
    no block there."""
    for table in TABLES:
        both = [results.glob(f"*/{table.results}{suffix}.json") for suffix in ("-quick", "")]
        by_device = {path.parent: path for paths in both for path in paths}  # the full run counts
        paths = [by_device[folder] for folder in sorted(by_device)] if table.file == file else []
        if paths:
            made = (table.table(json.loads(path.read_text(encoding="utf-8"))) for path in paths)
            text = harness.put(text, table.name, "\n\n".join(made))
    return text


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit with 1 if a table is out of date"
    )
    args = parser.parse_args(argv)
    stale = []
    for file in sorted({table.file for table in TABLES}):
        path = harness.ROOT / file
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, file)
        if new != old:
            stale.append(file)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
