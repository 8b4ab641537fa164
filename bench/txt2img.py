"""Whole images at SD v1.4's size with random weights: minisd beside diffusers.

    python -m bench.txt2img [--device cuda] [--rounds 10] [--steps 2] [--compiled] [--quick]

CUDA: 512x512, 25 steps of DPM-Solver++ and 50 of DDIM in float16; --compiled adds what compiles the
whole UNet, which takes minutes each. CPU: --steps of each, 2 by default, in float32 and bfloat16.
Writes bench/results/<device>/txt2img.json, and prints what misses its target.
"""

import sys
import warnings
from functools import partial

import torch

from bench import harness, models

PROMPT = "a big red circle left of a small blue square on a white background"
STEPS = {"dpm++": 25, "ddim": 50}


def ours(name, device, dtype, sampler, steps, small, **options):
    sd = models.full_size(device, dtype, small, **options)
    return {name: lambda: sd.txt2img(PROMPT, steps=steps, sampler=sampler, progress=False)}


def theirs(name, device, dtype, sampler, steps, small, compile=None):
    """diffusers' pipeline on the same weights; compile: a mode of torch.compile."""
    pipe = pipeline(device, dtype, sampler, small)
    if compile:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet.fuse_qkv_projections()
        pipe.unet = torch.compile(pipe.unet, mode=compile, fullgraph=True)
    pipe.set_progress_bar_config(disable=True)
    warnings.filterwarnings("ignore")  # random weights make images that are not finite or not nice
    generator = torch.Generator()
    return {
        name: lambda: pipe(PROMPT, num_inference_steps=steps, generator=generator.manual_seed(0))
    }


def pipeline(device, dtype, sampler, small):
    """diffusers' StableDiffusionPipeline; a minisd model gives it its weights and is dropped."""
    import diffusers
    import transformers

    from minisd.checkpoints.load import SD_V1_SCHEDULE, bundled

    sd = models.full_size(device, dtype, small)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=sd.vae.config.block_out_channels,
            layers_per_block=2,
            sample_size=sd.vae.config.sample_size,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    text = transformers.CLIPTextConfig(**vars(sd.text_encoder.config))
    # not on meta: it holds position ids
    text_encoder = transformers.CLIPTextModel(text).to(device, dtype)
    for theirs, mine in ((vae, sd.vae), (text_encoder, sd.text_encoder)):
        theirs.load_state_dict(mine.state_dict(), assign=True)
        theirs.eval().requires_grad_(False)
    if sampler == "ddim":
        kind, more = diffusers.DDIMScheduler, {"clip_sample": False}
    else:
        kind, more = diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}
    folder = bundled()["shapes"] / "tokenizer"
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        unet=models.diffusers_unet(device, dtype, small),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        scheduler=kind.from_config(SD_V1_SCHEDULE | more),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def contenders(device: str) -> dict[str, tuple]:
    """name -> (function, dtype)."""
    if device == "cpu":
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        both = {"minisd": ours, "diffusers": theirs}
        return {f"{who} {d}": (f, dtype) for d, dtype in dtypes.items() for who, f in both.items()}
    functions = {
        "minisd": ours,
        "minisd graph": partial(ours, graph=True),
        "minisd compiled": partial(ours, compile=True),
        "diffusers": theirs,
        "diffusers compiled": partial(theirs, compile="max-autotune"),
        "diffusers reduce-overhead": partial(theirs, compile="reduce-overhead"),
    }
    return {name: (function, torch.float16) for name, function in functions.items()}


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = []
    for row in record["rows"]:
        what = f"{row['sampler']}, {row['steps']} steps"
        for name, t in row["times"].items():
            seconds, low, high = (f"{t[key] / 1e3:.3g}" for key in ("ms", "low", "high"))
            memory = (harness.gigabytes(t["bytes"]), harness.gigabytes(t.get("above")))
            lines.append((what, name, seconds, f"{low} - {high}", *memory))
    heads = ("image", "", "seconds", "quartiles", "peak memory", "above weights")
    return f"{harness.origin(record)}\n\n{harness.markdown(heads, lines)}"


def misses(rows: list[dict]) -> list[str]:
    """What misses its target: 50 steps of DDIM on CUDA, the quickest of ours; a step is an image
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
    device, rows = torch.device(args.device).type, []
    if args.compiled and device == "cpu":
        raise SystemExit("--compiled is of CUDA: here nothing is compiled (bench.unet compiles)")
    for sampler, full in list(STEPS.items())[: 1 if args.quick else None]:
        steps = args.steps or (2 if args.quick or device == "cpu" else full)
        builders = {
            name: (function, name, args.device, dtype, sampler, steps, args.quick)
            for name, (function, dtype) in contenders(device).items()
            if args.compiled or not {"compiled", "reduce-overhead"} & set(name.split())
        }
        times = harness.contest(builders, args.device, args.rounds)
        rows.append({"sampler": sampler, "steps": steps, "times": times})
        harness.finish("txt2img", rows, args, table, misses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
