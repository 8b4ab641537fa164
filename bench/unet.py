"""One guided denoising step of SD v1.4's UNet with random weights: minisd beside diffusers.

    python -m bench.unet [--device cuda] [--rounds 3] [--batch 1] [--no-compiled] [--quick]

A step is the UNet on the unconditional and the conditional rows of `batch` latents, guidance and
the update of DDIM. Contenders have processes of their own, take turns, and compute with the same
weights. Batches 1, 2 and 8, what is compiled at batch 1 only (that takes minutes each;
--no-compiled: not at all). CPU: float32 and bfloat16, in groups that fit into memory together;
CUDA: float16, also as a CUDA graph. Writes bench/results/<device>/unet.json, and prints what misses
its target.
"""

import sys
from functools import partial

import torch

from bench import harness

SMALL = dict(block_out_channels=(64, 128, 256, 256), sample_size=32, cross_attention_dim=192)
FULL = dict(sample_size=64, cross_attention_dim=768)


def inputs(device: str, dtype: torch.dtype, batch: int, small: bool):
    """x (batch, 4, h, w), uncond (1, 77, D), cond (batch, 77, D)."""
    generator, numbers = torch.Generator().manual_seed(0), SMALL if small else FULL
    shapes = ((batch, 4, numbers["sample_size"], numbers["sample_size"]),) + tuple(
        (rows, 77, numbers["cross_attention_dim"]) for rows in (1, batch)
    )
    return (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def ours(name: str, device: str, dtype: torch.dtype, batch: int, small: bool, **options):
    """minisd's step as `minisd.load` would have it computed; options: compile, graph."""
    from minisd import DDIM, NoiseSchedule, StableDiffusion, UNet, UNetConfig, cfg
    from minisd.checkpoints.load import SD_V1_SCHEDULE

    unet = harness.random_model(UNet, UNetConfig(**(SMALL if small else FULL)), device, dtype)
    schedule, nothing = NoiseSchedule.from_dict(SD_V1_SCHEDULE), torch.nn.Linear(1, 1)
    harness.as_loaded(StableDiffusion(None, nothing, unet, nothing, schedule), **options)
    x, uncond, cond = inputs(device, dtype, batch, small)
    return {name: harness.one_step(cfg(unet, uncond, cond, 7.5), next(iter(DDIM(schedule, 50))), x)}


def theirs(
    name: str,
    device: str,
    dtype: torch.dtype,
    batch: int,
    small: bool,
    channels_last=False,
    compile=False,
):
    """diffusers' step, as its pipeline writes it."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from minisd.checkpoints.load import SD_V1_SCHEDULE

    with torch.device("meta"):
        unet = UNet2DConditionModel(attention_head_dim=8, **(SMALL if small else FULL))
    unet.load_state_dict(harness.random_weights(unet.state_dict(), device, dtype), assign=True)
    unet.eval().requires_grad_(False)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compile:
        unet.fuse_qkv_projections()
        cpu = torch.device(device).type == "cpu"  # there tuning takes longer than all else here
        mode = "default" if cpu else "max-autotune"
        unet = torch.compile(unet, mode=mode, fullgraph=True)
    scheduler = DDIMScheduler(clip_sample=False, **SD_V1_SCHEDULE)
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[0]
    x, uncond, cond = inputs(device, dtype, batch, small)
    context = torch.cat([uncond.expand_as(cond), cond])

    @torch.no_grad()
    def step():
        eps_u, eps_c = unet(torch.cat([x, x]), t, encoder_hidden_states=context, return_dict=False)[
            0
        ].chunk(2)
        return scheduler.step(eps_u + 7.5 * (eps_c - eps_u), t, x).prev_sample

    return {name: step}


def groups(device: str, compiled: bool) -> list[dict[str, tuple]]:
    """Contenders that are in memory together: name -> (function(name, device, dtype, batch, small),
    dtype)."""
    channels_last = partial(theirs, channels_last=True)
    compiled_theirs = partial(channels_last, compile=True)
    if device == "cpu":
        fp32, bf16 = torch.float32, torch.bfloat16
        rival = {"diffusers fp32": (theirs, fp32)}
        together = [
            {"minisd fp32": (ours, fp32), **rival},
            {
                "minisd bf16": (ours, bf16),
                "diffusers bf16 channels_last": (channels_last, bf16),
                **rival,
            },
            {"minisd fp32": (ours, fp32), "diffusers fp32 channels_last": (channels_last, fp32)},
        ]
        also = [
            {"minisd fp32": (ours, fp32), "diffusers fp32 compiled": (compiled_theirs, fp32)},
            {"minisd bf16": (ours, bf16), "diffusers bf16 compiled": (compiled_theirs, bf16)},
        ]
        return together + also if compiled else together
    half = torch.float16
    eager = {
        "minisd": (ours, half), "minisd graph": (partial(ours, graph=True), half), "diffusers": (theirs, half),
        "diffusers channels_last": (channels_last, half),
    }  # fmt: skip
    also = {
        "minisd compiled, graph": (partial(ours, compile=True, graph=True), half),
        "diffusers compiled": (compiled_theirs, half),
    }
    return [eager | also if compiled else eager]


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = [harness.origin(record), ""]
    for row in record["rows"]:
        times = row["times"]
        rivals = [name for name in times if not name.startswith("minisd")]
        heads = [
            f"batch {row['batch']}",
            "ms a step",
            "quartiles",
            "peak memory",
            *(f"x {name}" for name in rivals),
        ]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for name, t in times.items():
            ms, low, high = (harness.four_digits(t[key]) for key in ("ms", "low", "high"))
            ratios = [f"{times[rival]['ms'] / t['ms']:.2f}" for rival in rivals]
            lines.append(
                f"| {' | '.join([name, ms, f'{low} - {high}', harness.gigabytes(t['bytes']), *ratios])} |"
            )
        lines.append("")
    return "\n".join(lines[:-1])


def misses(rows: list[dict]) -> list[str]:
    """What misses its target at batch 1 on a CPU (on CUDA whole pictures have targets:
    bench.txt2img)."""
    must = {  # (ours, theirs): how many times as fast, at least
        ("minisd fp32", "diffusers fp32"): 1.03,
        ("minisd fp32", "diffusers fp32 channels_last"): 1.03,
        ("minisd bf16", "diffusers fp32"): 1.7,
        ("minisd bf16", "diffusers bf16 channels_last"): 1.1,
    }
    bars = []
    for times in (row["times"] for row in rows if row["batch"] == 1):
        for (ours, theirs), bar in must.items():
            if ours in times and theirs in times:
                bars += [
                    (f"{theirs} / {ours}", times[theirs]["ms"] / times[ours]["ms"], ">=", bar),
                    (
                        f"memory of {ours} / {theirs}",
                        times[ours]["bytes"] / times[theirs]["bytes"],
                        "<=",
                        1.0,
                    ),
                ]
    return harness.slow(bars)


def main() -> int:
    args = harness.options(__doc__, "bench.unet", batch=int, compiled=True)
    device = torch.device(args.device).type
    rows = []
    for batch in [args.batch] if args.batch else [1] if args.quick else [1, 2, 8]:
        together = groups(device, args.compiled and batch == 1 and not args.quick)
        if args.quick:  # small ones fit into memory all at once
            together = [
                {name: contender for group in together for name, contender in group.items()}
            ]
        for group in together:
            builders = {
                name: (function, name, args.device, dtype, batch, args.quick)
                for name, (function, dtype) in group.items()
            }
            rows.append(
                {"batch": batch, "times": harness.contest(builders, args.device, args.rounds)}
            )
            print(table({**harness.provenance(args.device), "rows": rows[-1:]}), flush=True)
            if not args.quick:
                path = harness.save("unet", rows, args.device)
    if not args.quick:
        print("\n".join([f"wrote {path}", *misses(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
