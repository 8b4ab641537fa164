"""How time and memory grow with the size of the picture and with the batch, at SD v1.4's size with
random weights.

    python -m bench.scaling [--device cuda] [--rounds 3] [--quick]

One guided step and one decoded picture, sizes 256 to 1024 and batches 1 to 16, in float16 on CUDA,
in bfloat16 on a CPU that has it. memory: at the peak above what was there. The exponent p of y ~
(pixels)^p or y ~ batch^p is the least-squares slope of the logarithms. Writes
bench/results/<device>/scaling.json.
"""

import sys

import numpy as np
import torch

from bench import harness
from minisd import DDIM, cfg
from minisd.pipeline import pick_dtype


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log y over log x; None for fewer than two points."""
    points = [(x, y) for x, y in points if y and y > 0]
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0]) if len(points) > 1 else None


def table(record: dict) -> str:
    """The Markdown table of a result file, the exponents in its last lines."""
    lines = [
        harness.origin(record),
        "",
        "| what | size | batch | ms | memory |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ms, memory = harness.four_digits(row["ms"]), harness.gigabytes(row["bytes"])
        lines.append(f"| {row['what']} | {row['size']} | {row['batch']} | {ms} | {memory} |")
    for what in dict.fromkeys(row["what"] for row in record["rows"]):
        for key, along in (("size", "pixels"), ("batch", "batch")):
            rows = [
                row
                for row in record["rows"]
                if row["what"] == what and row["along"] in (key, "both")
            ]
            power = 2 if key == "size" else 1
            time, memory = (
                exponent([(row[key] ** power, row[y]) for row in rows]) for y in ("ms", "bytes")
            )
            shown = ["-" if p is None else f"{p:.2f}" for p in (time, memory)]
            lines.append(f"| {what}: exponent of {along} | | | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def measure(device: str, dtype: torch.dtype, small: bool, rounds: int, sizes, batches):
    """The rows of the table: the sizes at batch 1, the batches at the smallest size."""
    sd = harness.as_loaded(harness.full_size(device, dtype, small))
    width = sd.unet.config.cross_attention_dim
    rows = []
    for size, batch in dict.fromkeys(
        [*((size, 1) for size in sizes), *((sizes[0], batch) for batch in batches)]
    ):
        side = size // sd.vae.factor
        x = torch.randn(batch, 4, side, side, device=device).to(dtype)
        uncond, cond = (torch.randn(n, 77, width, device=device).to(dtype) for n in (1, batch))
        step = harness.one_step(
            cfg(sd.unet, uncond, cond, 7.5), next(iter(DDIM(sd.schedule, 50))), x
        )
        along = "both" if (size, batch) == (sizes[0], 1) else "size" if batch == 1 else "batch"
        for what, function in (("step", step), ("decode", lambda: sd.decode(x, as_tensor=True))):
            if along == "both":
                function()  # the first call of all brings the weights into their order
            memory = harness.peak_memory(function, device)  # and a warm-up
            times = harness.quartiles(
                [harness.milliseconds(function, device) for _ in range(rounds)]
            )
            rows.append(
                {
                    "what": what,
                    "size": size,
                    "batch": batch,
                    "along": along,
                    "bytes": memory,
                    **times,
                }
            )
            print(
                f"{what} {size}x{size} batch {batch}: {harness.four_digits(times['ms'])} ms",
                flush=True,
            )
    return rows


def main() -> int:
    args = harness.options(__doc__, "bench.scaling")
    device = torch.device(args.device)
    sizes, batches = (
        ((256, 384), (1, 2)) if args.quick else ((256, 384, 512, 768, 1024), (1, 2, 4, 8, 16))
    )
    rows = measure(device.type, pick_dtype("auto", device), args.quick, args.rounds, sizes, batches)
    print(table({**harness.provenance(args.device), "rows": rows}))
    if not args.quick:
        print(f"wrote {harness.save('scaling', rows, args.device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
