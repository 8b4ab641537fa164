"""What prompt-to-prompt costs: one guided step of two prompts at SD v1.4's size with random
weights.

    python -m bench.editing speed [--device cuda] [--rounds 3] [--size 512] [--quick]

    plain          the engine's own run of the same two prompts, not edited
    lockstep       prompt-to-prompt: cross maps refined and reweighted, self maps injected at 16x16
    with maps      the same, and the mean maps summed that a local blend reads
    record, replay the first prompt alone with its maps kept; the second alone with them injected
    eager          diffusers with attention processors that form every map: bmm, softmax, edit, bmm

In turns, eager in a process of its own; memory is resident on a CPU, allocated on CUDA. Writes
bench/results/<device>/editing_speed.json, and prints what misses its target.
"""

import sys
from functools import partial

import torch

from bench import harness

PROMPTS = ("a red circle on a white background", "a big red square on a white background")
EDIT = dict(cross_steps=0.8, self_steps=0.4, reweight={"red": 2.0})


def ours(
    suffix: str,
    device: str,
    dtype: torch.dtype,
    small: bool,
    size,
    kinds: tuple[str, ...],
    **options,
):
    """minisd's steps of these kinds, on one copy of the weights."""
    from minisd import DDIM, PromptToPrompt, cfg
    from minisd.editing.recording import Recorder, Replay

    sd = harness.as_loaded(harness.full_size(device, dtype, small), **options)
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt(list(PROMPTS))
    step = next(iter(DDIM(sd.schedule, 50)))
    sd.text_encoder, sd.vae = None, sd.vae.to("meta")  # not timed, and not to count as memory
    p2p, with_maps = (
        PromptToPrompt(sd, *PROMPTS, steps=50, height=size, width=size, **EDIT) for _ in range(2)
    )
    with_maps.maps  # summed from the first time on that they are read

    def timed(edits, rows, store=lambda x, step: x):
        x = sd.noise(0, height=size, width=size).repeat(len(rows), 1, 1, 1)
        run = harness.one_step(cfg(sd.unet, uncond, rows, 7.5, edits), step, x)
        return lambda: store(run(), step)

    steps = {
        "plain": timed(None, cond),
        "lockstep": timed(p2p, cond),
        "with maps": timed(with_maps, cond),
    }
    if "record" in kinds:
        recorder = Recorder(sd, PROMPTS[0], 1, height=size, width=size)
        recorder.recording.t[0] = step.t
        steps["record"] = timed(recorder, cond[:1], recorder.store)
        steps["replay"] = timed(Replay(sd, recorder.recording, PROMPTS[1], **EDIT), cond[1:])
    return {f"{kind}{suffix}": steps[kind] for kind in kinds}


class EagerProcessor:
    """Prompt-to-prompt on a diffusers UNet as it is usually written: the maps of all heads, edited
    in the open."""

    def __init__(self, p2p, site: str):
        self.p2p, self.is_cross, self.injects = p2p, site in p2p.cross_sites, site in p2p.self_sites

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = encoder_hidden_states if self.is_cross else x
        q, k, v = (
            attn.head_to_batch_dim(y)
            for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        P = (
            torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=attn.scale)
            .softmax(-1)
            .unflatten(0, (len(x), -1))
        )
        source, own = P[2:]  # (heads, N, L) each; the first two rows are unconditional
        if self.is_cross:
            p2p = self.p2p
            M, blend, factors = (
                t[1].to(P.dtype) for t in (p2p.token_map, p2p.blend[0], p2p.reweight[0])
            )
            P[3] = factors * (blend * (source @ M) + (1 - blend) * own)
        elif self.injects:
            P[3] = source
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(P.flatten(0, 1), v)))


def eager(name: str, device: str, dtype: torch.dtype, small: bool, size):
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from bench.unet import FULL, SMALL
    from minisd import PromptToPrompt
    from minisd.checkpoints.load import SD_V1_SCHEDULE

    sd = harness.full_size(device, dtype, small)
    cond, x = (
        sd.encode_prompt(list(PROMPTS)),
        sd.noise(0, height=size, width=size).repeat(2, 1, 1, 1),
    )
    context = torch.cat([sd.encode_prompt([""]).expand_as(cond), cond])
    p2p = PromptToPrompt(sd, *PROMPTS, steps=50, height=size, width=size, **EDIT)
    with torch.device("meta"):
        unet = UNet2DConditionModel(attention_head_dim=8, **(SMALL if small else FULL))
    unet.load_state_dict(sd.unet.state_dict(), assign=True)
    unet.eval().requires_grad_(False)
    sites = [name.removesuffix(".processor") for name in unet.attn_processors]
    unet.set_attn_processor({f"{site}.processor": EagerProcessor(p2p, site) for site in sites})
    p2p.sd = sd = None  # the memory of the other two models
    scheduler = DDIMScheduler(clip_sample=False, **SD_V1_SCHEDULE)
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[0]

    @torch.no_grad()
    def step():
        eps_u, eps_c = unet(torch.cat([x, x]), t, encoder_hidden_states=context, return_dict=False)[
            0
        ].chunk(2)
        return scheduler.step(eps_u + 7.5 * (eps_c - eps_u), t, x).prev_sample

    return {name: step}


def processes(device: str, small: bool, size: int | None) -> dict[str, tuple]:
    """What `harness.contest` takes."""
    kinds = ("plain", "lockstep", "with maps", "record", "replay")
    if device == "cpu":
        fp32, bf16 = torch.float32, torch.bfloat16
        return {
            "minisd fp32": (ours, " fp32", device, fp32, small, size, kinds[:2]),
            "eager fp32": (eager, "eager fp32", device, fp32, small, size),
            "minisd bf16": (ours, " bf16", device, bf16, small, size, kinds),
        }
    half = torch.float16
    return {
        "minisd": (partial(ours, graph=True), "", device, half, small, size, kinds),
        "eager": (eager, "eager", device, half, small, size),
    }


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    times = record["rows"][0]["times"]
    plain = {
        name.removeprefix("plain"): t["ms"] for name, t in times.items() if name.startswith("plain")
    }
    eager = next((t["ms"] for name, t in times.items() if name.startswith("eager")), None)
    size = record["rows"][0]["size"]
    heads = [
        f"{size} x {size}",
        "ms a step",
        "quartiles",
        "peak above the weights",
        "time / plain",
        "eager / time",
    ]
    lines = [harness.origin(record), "", f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for name, t in times.items():
        own = next((ms for suffix, ms in plain.items() if name.endswith(suffix)), None)
        ratios = [
            None if own is None else t["ms"] / own,
            None if eager is None else eager / t["ms"],
        ]
        ms, low, high = (harness.four_digits(t[key]) for key in ("ms", "low", "high"))
        cells = [name, ms, f"{low} - {high}", harness.gigabytes(t["above"])]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def misses(rows: list[dict]) -> list[str]:
    """What misses its target: lockstep beside the plain run and beside eager (on a CPU, eager in
    float32)."""
    times, bars = rows[0]["times"], []
    for suffix, rival, must in (
        ("", "eager", 4),
        (" fp32", "eager fp32", 1.25),
        (" bf16", "eager fp32", 2),
    ):
        own, plain, eager = (
            times.get(name) for name in (f"lockstep{suffix}", f"plain{suffix}", rival)
        )
        if own and plain:
            bars.append((f"lockstep{suffix} / plain{suffix}", own["ms"] / plain["ms"], "<=", 1.1))
        if own and eager:
            bars.append((f"{rival} / lockstep{suffix}", eager["ms"] / own["ms"], ">=", must))
        if own and eager and not suffix:  # CUDA
            bars.append(
                (
                    "memory above the weights, eager / lockstep",
                    eager["above"] / own["above"],
                    ">=",
                    8,
                )
            )
    return harness.slow(bars)


def main(arguments=None) -> int:
    args = harness.options(__doc__, "bench.editing speed", arguments, size=int)
    contenders = processes(args.device, args.quick, args.size)
    rows = [
        {"size": args.size or 512, "times": harness.contest(contenders, args.device, args.rounds)}
    ]
    print(table({**harness.provenance(args.device), "rows": rows}))
    if not args.quick:
        print(
            "\n".join([f"wrote {harness.save('editing_speed', rows, args.device)}", *misses(rows)])
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
