"""How time and memory grow with the size of the image and with the batch, at SD v1.4's size with
random weights.

    python -m bench.scaling [--device cuda] [--rounds 3] [--quick]

One guided step and one decoded image, sizes 256 to 1024 and batches 1 to 16, in float16 on CUDA,
in bfloat16 on a CPU that has it. memory: at the peak above what was there. TFLOP: of convolutions
and products as PyTorch's own layers would do them, two for a multiplication and a sum. The exponent
p of y ~ (pixels)^p or y ~ batch^p is the least-squares slope of the logarithms. Writes
bench/results/<device>/scaling.json.
"""

import sys

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import harness, models
from minisd import DDIM, cfg
from minisd.pipeline import pick_dtype


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log y over log x; None for fewer than two points."""
    points = [(x, y) for x, y in points if y and y > 0]
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0]) if len(points) > 1 else None


def table(record: dict) -> str:
    """The Markdown table of a result file, the exponents in its last lines."""
    rows = record["rows"]
    lines = [
        (
            r["what"],
            r["size"],
            r["batch"],
            harness.four_digits(r["ms"]),
            harness.gigabytes(r["bytes"]),
            f"{r['flops'] / 1e12:.3g}",
        )
        for r in rows
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        for key, along, power in (("size", "pixels", 2), ("batch", "batch", 1)):
            some = [r for r in rows if r["what"] == what and r["along"] in (key, "both")]
            measured = ("ms", "bytes", "flops")
            found = (exponent([(r[key] ** power, r[y]) for r in some]) for y in measured)
            shown = ("-" if p is None else f"{p:.2f}" for p in found)
            lines.append((f"{what}: exponent of {along}", "", "", *shown))
    table = harness.markdown(("what", "size", "batch", "ms", "memory", "TFLOP"), lines)
    return f"{harness.origin(record)}\n\n{table}"


def cases(sd, device: str, dtype: torch.dtype, size: int, batch: int) -> dict:
    """{"step": a guided step, "decode": a batch of latents decoded}."""
    side, width = size // sd.vae.factor, sd.unet.config.cross_attention_dim
    x = torch.randn(batch, 4, side, side, device=device).to(dtype)
    uncond, cond = (torch.randn(n, 77, width, device=device).to(dtype) for n in (1, batch))
    first = next(iter(DDIM(sd.schedule, 50)))
    step = models.one_step(cfg(sd.network, uncond, cond, 7.5), first, x)
    return {"step": step, "decode": lambda: sd.decode(x, as_tensor=True)}


def flops(function) -> int:
    """FLOPs of a call, of models on the meta device, which compute nothing."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure(device: str, dtype: torch.dtype, small: bool, rounds: int, sizes, batches):
    """The rows of the table: the sizes at batch 1, the batches at the smallest size."""
    sd, rows, smallest = models.full_size(device, dtype, small), [], (sizes[0], 1)
    shapes = models.full_size("meta", dtype, small)
    shapes.unet.attention = "reference"  # whose products the counter sees
    grid = [(size, 1) for size in sizes] + [(sizes[0], batch) for batch in batches]
    for size, batch in dict.fromkeys(grid):
        along = "both" if (size, batch) == smallest else "size" if batch == 1 else "batch"
        counted = cases(shapes, "meta", dtype, size, batch)
        for what, function in cases(sd, device, dtype, size, batch).items():
            if along == "both":
                function()  # the first call of all
            memory = harness.peak_memory(function, device)  # and a warm-up
            ms = [harness.milliseconds(function, device) for _ in range(rounds)]
            about = {"what": what, "size": size, "batch": batch, "along": along, "bytes": memory}
            about["flops"] = flops(counted[what])
            rows.append(about | harness.quartiles(ms))
            shown = harness.four_digits(rows[-1]["ms"])
            print(f"{what} {size}x{size} batch {batch}: {shown} ms", flush=True)
    return rows


def main() -> int:
    args = harness.options(__doc__, "bench.scaling")
    device = torch.device(args.device)
    sizes, batches = (256, 384, 512, 768, 1024), (1, 2, 4, 8, 16)
    if args.quick:
        sizes, batches = sizes[:2], batches[:2]
    rows = measure(device.type, pick_dtype("auto", device), args.quick, args.rounds, sizes, batches)
    harness.finish("scaling", rows, args, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
