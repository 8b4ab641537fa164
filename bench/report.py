"""Writes every table of the READMEs and of docs/ that is measured or counted.

    python -m bench.report [--check]

A table stands between the lines `<!-- NAME -->` and `<!-- end -->`. TABLES says for each which JSON
files of bench/results it comes from and which function makes Markdown of them; devices that have
measured it follow one another. Of a device that has no X.json, X-quick.json is shown. Where no JSON
is there, the block's own text stays. --check writes nothing, and exits with 1 if a table is
not what its JSON says.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import (
    api,
    attention,
    distance,
    dit,
    editing,
    editing_speed,
    emoji,
    fused,
    harness,
    labels,
    methods,
    photographs,
    real_blend,
    real_invert,
    scaling,
    shapes,
    startup,
    summary,
    txt2img,
    unet,
)


class Table(NamedTuple):
    """file: the page that holds it. name: of its block. results: the files it needs,
    bench/results/<device>/<name>.json or <name>-quick.json. table: their contents -> Markdown."""

    file: str
    name: str
    results: tuple[str, ...]
    table: Callable[..., str]


README, REPORT, KERNELS = "README.md", "docs/benchmarks.md", "kernels/README.md"
SPEED = ("unet", "txt2img", "editing_speed", "startup")
TABLES = [
    Table(README, "fidelity", ("equality",), summary.fidelity),
    Table(README, "speed", SPEED, summary.speed),
    Table(REPORT, "equality", ("equality",), summary.equality),
    Table(REPORT, "bench.editing", ("editing",), editing.table),
    Table(REPORT, "bench.editing real: invert", ("editing_real",), real_invert.table),
    Table(REPORT, "bench.editing real: blend", ("editing_real",), real_blend.blend_table),
    Table(REPORT, "bench.editing real: erase", ("editing_real",), real_blend.erase_table),
    Table(REPORT, "bench.photographs", ("photographs",), photographs.table),
    Table(REPORT, "bench.methods", ("methods",), methods.table),
    Table(REPORT, "bench.distance", ("distance_decoded", "distance_drawn"), distance.table),
    Table("docs/dit.md", "bench.labels", ("labels",), labels.table),
    Table("docs/dit.md", "bench.dit", ("dit",), dit.table),
    Table("docs/dit.md", "bench.dit guided", ("dit",), dit.guided_table),
    Table(REPORT, "bench.unet", ("unet",), unet.table),
    Table(REPORT, "bench.unet --batch 2", ("unet_batch2",), unet.table),
    Table(REPORT, "bench.unet --batch 8", ("unet_batch8",), unet.table),
    Table(REPORT, "bench.editing speed", ("editing_speed",), editing_speed.table),
    Table(REPORT, "bench.startup", ("startup",), startup.table),
    Table(REPORT, "bench.txt2img", ("txt2img",), txt2img.table),
    Table(REPORT, "bench.scaling", ("scaling",), scaling.table),
    Table(KERNELS, "bench.attention", ("attention",), attention.table),
    Table(KERNELS, "bench.fused", ("fused",), fused.table),
    Table("weights/README.md", "bench.shapes", ("shapes",), shapes.report),
    Table("weights/README.md", "bench.emoji", ("emoji",), emoji.report),
    Table("weights/README.md", "bench.labels", ("labels",), labels.table),
    Table("docs/api.md", "bench.api", (), api.table),
]


def made(table: Table, results: Path) -> list[str]:
    """The table's Markdown, once for each device that has measured it."""
    if not table.results:
        return [table.table()]
    found = []
    for folder in sorted(results.glob("*/")):
        either = [
            (folder / f"{name}.json", folder / f"{name}-quick.json") for name in table.results
        ]
        paths = [next(filter(Path.exists, both), None) for both in either]
        if None not in paths:
            records = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
            found.append(table.table(*records))
    return found


def rewritten(text: str, file: str, results: Path = harness.ROOT / "bench/results") -> str:
    """The text of a page with its tables made anew; ValueError: a table has no block there."""
    for table in TABLES:
        if table.file == file and (tables := made(table, results)):
            text = harness.put(text, table.name, "\n\n".join(tables))
    return text


def main(argv=None) -> int:
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=about)
    check = "write nothing, exit with 1 if a table is out of date"
    parser.add_argument("--check", action="store_true", help=check)
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
