"""A whole picture, text encoding and decoding included, at SD v1.4's size with random weights:
minisd beside diffusers.

    python -m bench.txt2img [--device cuda] [--rounds 10] [--steps 2] [--compiled] [--quick]

CUDA: 512x512, 25 steps of DPM-Solver++ and 50 of DDIM in float16; --compiled adds what compiles the
whole UNet, which takes minutes each. CPU: --steps of each, 2 by default, in float32 and bfloat16.
Writes bench/results/<device>/txt2img.json, and prints what misses its target.
"""

import sys
import warnings
from functools import partial

import torch

from bench import harness

PROMPT = "a big red circle left of a small blue square on a white background"
STEPS = {"dpm++": 25, "ddim": 50}


def ours(name, device, dtype, sampler, steps, small, **options):
    sd = harness.as_loaded(harness.full_size(device, dtype, small), **options)
    return {name: lambda: sd.txt2img(PROMPT, steps=steps, sampler=sampler, progress=False)}


def theirs(name, device, dtype, sampler, steps, small, compile=False):
    """diffusers' pipeline on the same weights, which it shares with a minisd model that is then
    dropped."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from bench.unet import FULL, SMALL
    from minisd.checkpoints.load import SD_V1_SCHEDULE, bundled

    sd = harness.full_size(device, dtype, small)
    widths, text = sd.vae.config.block_out_channels, vars(sd.text_encoder.config)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, sample_size=sd.vae.config.sample_size,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        unet = UNet2DConditionModel(attention_head_dim=8, **(SMALL if small else FULL))
    text_encoder = CLIPTextModel(CLIPTextConfig(**text)).to(
        device, dtype
    )  # not on meta: it holds position ids
    for theirs, mine in ((vae, sd.vae), (unet, sd.unet), (text_encoder, sd.text_encoder)):
        theirs.load_state_dict(mine.state_dict(), assign=True)
        theirs.eval().requires_grad_(False)
    kind, extra = (
        (DDIMScheduler, {"clip_sample": False})
        if sampler == "ddim"
        else (DPMSolverMultistepScheduler, {})
    )
    tokenizer = CLIPTokenizer.from_pretrained(bundled()["shapes"] / "tokenizer")
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, unet=unet, tokenizer=tokenizer,
        scheduler=kind.from_config(SD_V1_SCHEDULE | extra | ({} if sampler == "ddim" else {"use_karras_sigmas": True})),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    if compile:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet.fuse_qkv_projections()
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
    pipe.set_progress_bar_config(disable=True)
    warnings.filterwarnings(
        "ignore"
    )  # random weights make pictures that are not finite or not nice
    generator = torch.Generator()
    return {
        name: lambda: pipe(PROMPT, num_inference_steps=steps, generator=generator.manual_seed(0))
    }


def contenders(device: str) -> dict[str, tuple]:
    if device == "cpu":
        return {
            "minisd fp32": (ours, torch.float32), "diffusers fp32": (theirs, torch.float32),
            "minisd bf16": (ours, torch.bfloat16), "diffusers bf16": (theirs, torch.bfloat16),
        }  # fmt: skip
    half = torch.float16
    return {
        "minisd": (ours, half), "minisd graph": (partial(ours, graph=True), half),
        "minisd compiled, graph": (partial(ours, compile=True, graph=True), half),
        "diffusers": (theirs, half), "diffusers compiled": (partial(theirs, compile=True), half),
    }  # fmt: skip


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = [
        harness.origin(record),
        "",
        "| picture | | seconds | quartiles | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        for name, t in row["times"].items():
            lines.append(
                f"| {row['sampler']}, {row['steps']} steps | {name} | {t['ms'] / 1e3:.3g} "
                f"| {t['low'] / 1e3:.3g} - {t['high'] / 1e3:.3g} | {harness.gigabytes(t['bytes'])} |"
            )
    return "\n".join(lines)


def misses(rows: list[dict]) -> list[str]:
    """What misses its target: 50 steps of DDIM on CUDA, the quickest of ours; a step is a picture
    over its steps."""
    bars = []
    for times in (row["times"] for row in rows if (row["sampler"], row["steps"]) == ("ddim", 50)):
        ours = {name: t["ms"] for name, t in times.items() if name.startswith("minisd")}
        if "minisd graph" not in ours:  # a CPU has no target
            continue
        name = min(ours, key=ours.get)
        bars.append((f"{name}, ms a step", ours[name] / 50, "<=", 6.5))
        for rival, bar in (("diffusers", 2.5), ("diffusers compiled", 1.25)):
            if rival in times:
                bars.append((f"{rival} / {name}", times[rival]["ms"] / ours[name], ">=", bar))
    return harness.slow(bars)


def main() -> int:
    args = harness.options(__doc__, "bench.txt2img", steps=int, compiled=False)
    cpu, rows = torch.device(args.device).type == "cpu", []
    if args.compiled and cpu:
        raise SystemExit(
            "--compiled is of CUDA: on a CPU nothing here is compiled (bench.unet compiles there)"
        )
    for sampler, full in list(STEPS.items())[: 1 if args.quick else None]:
        steps = args.steps or (2 if args.quick or cpu else full)
        builders = {
            name: (function, name, args.device, dtype, sampler, steps, args.quick)
            for name, (function, dtype) in contenders(torch.device(args.device).type).items()
            if args.compiled or "compiled" not in name
        }
        rows.append(
            {
                "sampler": sampler,
                "steps": steps,
                "times": harness.contest(builders, args.device, args.rounds),
            }
        )
        print(table({**harness.provenance(args.device), "rows": rows[-1:]}), flush=True)
        if not args.quick:
            print(
                f"wrote {harness.save('txt2img', rows, args.device)}",
                *misses(rows[-1:]),
                sep="\n",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
