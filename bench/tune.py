"""Find tiles that are quicker on this card than those that the attention kernels choose by rule.

    python -m bench.tune [--device cuda] [--rounds 20]

For each kind of launch and each head dim, some tiles and the rule's take turns at the sites of SD
v1.x, batch 2 and 8, plain and edited, in float16. The one with the least time, as a fraction of the
rule's and in the mean over the sites, is kept if it is quicker by more than the spread: its upper
quartiles below the rule's lower ones. What is kept becomes this card's entry in kernels/tuned.json,
which bfloat16 uses, too; float32 stays with the rule.
"""

import argparse
import json
import statistics
import sys
from functools import partial

import torch
from minisd_kernels import dispatch, tuned

from bench import harness
from bench.attention import (
    GRID_512,
    GRID_768,
    TEXT,
    H,
    attention,
    error_ratio,
    inputs,
    make_edit,
    measure,
)

FLASH = [
    (64, 32, 4, 2),
    (64, 64, 4, 1),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 32, 8, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
]
CROSS = [
    dict(zip(("BLOCK_N", "STEP", "num_warps", "num_stages"), tile))
    for tile in [
        (64, 64, 4, 1),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 64, 8, 3),
        # not (128, 64, 8, 3): of refine at D 40 ptxas 12.8 makes wrong code
        (128, 32, 8, 3),
    ]
]
TILES = {
    "attention": [
        dict(zip(("BLOCK_N", "BLOCK_L", "num_warps", "num_stages"), tile)) for tile in FLASH
    ],
    "cross_attention": CROSS,
    "cross_attention, save": CROSS,
}
FORMS = {
    "attention": ("plain", "self-injection"),
    "cross_attention": ("plain", "refine"),
    "cross_attention, save": ("save", "save_mean", "refine, save_mean"),
}


def cases(op: str, D: int) -> list[tuple[int, int, int, str]]:
    """(B, N, L, form) of the sites of SD v1.x that launch this op at this head dim."""
    if op == "attention":
        sizes = [(N, N) for N, d in GRID_512 + GRID_768 if d == D and N > 128]
    else:
        sizes = [(N, TEXT) for N, d in GRID_512 if d == D]
    return [(B, N, L, form) for B in (2, 8) for N, L in sizes for form in FORMS[op]]


@torch.no_grad()
def against_rule(
    op: str, D: int, case: tuple, tiles: dict, device: str, rounds: int
) -> dict[str, tuple]:
    """{tile: (its time over the rule's, its upper quartile over the rule's lower one)} of those
    with right results."""
    B, N, L, form = case
    q, k, v = inputs(B, H, N, L, D, torch.float16, device)
    edit = make_edit(form, B, H, N, L, D, torch.float16, device)
    entry, key = (
        tuned.table().setdefault(harness.device_name(device), {}),
        tuned.key(op, D, q.element_size()),
    )

    def launched(name, call, *args):
        if entry.get(key) != tiles[name]:
            entry[key] = tiles[name]  # where the launch looks, once
            dispatch.KNOWN.clear()
        return call(*args)

    functions = {
        name: partial(launched, name, attention, q, k, v, edit, "triton") for name in tiles
    }
    times, _, _ = measure(functions, device, rounds)
    right = [name for name in times if launched(name, error_ratio, q, k, v, edit) <= 1]
    del entry[key]
    dispatch.KNOWN.clear()
    rule = times["rule"]
    return {
        name: (times[name]["ms"] / rule["ms"], times[name]["high"] / rule["low"]) for name in right
    }


def quickest(op: str, D: int, device: str, rounds: int) -> dict:
    """The tile that beats the rule's, {} if none does."""
    tiles = {"rule": {}} | {str(tile): tile for tile in TILES[op]}
    sites = [against_rule(op, D, case, tiles, device, rounds) for case in cases(op, D)]
    everywhere = [name for name in tiles if all(name in site for site in sites)]
    ratios = {
        name: [statistics.fmean(x) for x in zip(*(site[name] for site in sites))]
        for name in everywhere
    }
    name = min(ratios, key=lambda name: ratios[name][0])
    of_rule, with_spread = ratios[name]
    print(
        f"{op}, D {D}: {name}, {of_rule:.3f} of the rule's time, {with_spread:.3f} with the spread"
    )
    return tiles[name] if ratios[name][1] < 1 else {}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    if torch.device(args.device).type != "cuda" or not torch.cuda.is_available():
        print("no CUDA device: nothing to tune", file=sys.stderr)
        return 2
    found = {}
    for op in TILES:
        for D in (40, 80, 160):
            if tile := quickest(op, D, args.device, args.rounds):
                found[tuned.key(op, D, 2)] = tile
    path = harness.ROOT / "kernels/tuned.json"
    entries = json.loads(path.read_text()) | {harness.device_name(args.device): found}
    path.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"wrote {path}: {len(found)} tiles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
