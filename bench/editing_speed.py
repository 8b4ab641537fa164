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

from bench import harness, models

PROMPTS = ("a red circle on a white background", "a big red square on a white background")
EDIT = dict(cross_steps=0.8, self_steps=0.4, reweight={"red": 2.0})
KINDS = ("plain", "lockstep", "with maps", "record", "replay")


def ours(suffix, device, dtype, small, size, kinds: tuple[str, ...], **options):
    """minisd's steps of these kinds, on one copy of the weights."""
    from minisd import DDIM, PromptToPrompt, cfg
    from minisd.editing.recording import Injection, Recorder

    sd = models.full_size(device, dtype, small, **options)
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt(list(PROMPTS))
    step = next(iter(DDIM(sd.schedule, 50)))
    sd.text_encoder, sd.vae = None, sd.vae.to("meta")  # not timed, and not to count as memory
    edit = partial(PromptToPrompt, sd, *PROMPTS, steps=50, height=size, width=size, **EDIT)

    def timed(edits, rows, store=lambda x, step: x):
        x = sd.noise(0, height=size, width=size).repeat(len(rows), 1, 1, 1)
        run = models.one_step(cfg(sd.network, uncond, rows, 7.5, edits), step, x)
        return lambda: store(run(), step)

    steps = {"plain": timed(None, cond), "lockstep": timed(edit(), cond)}
    steps["with maps"] = timed(edit(collect_maps=True), cond)
    if "record" in kinds:
        recorder = Recorder(sd, PROMPTS[0], 1, height=size, width=size)
        recorder.recording.t[0] = step.t
        steps["record"] = timed(recorder, cond[:1], recorder.store)
        steps["replay"] = timed(Injection(sd, recorder.recording, PROMPTS[1], **EDIT), cond[1:])
    return {f"{kind}{suffix}": steps[kind] for kind in kinds}


class EagerProcessor:
    """Prompt-to-prompt on a diffusers UNet as it is usually written, all maps in the open."""

    def __init__(self, p2p, site: str):
        self.p2p, self.is_cross, self.injects = p2p, site in p2p.cross_sites, site in p2p.self_sites

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = encoder_hidden_states if self.is_cross else x
        projected = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = map(attn.head_to_batch_dim, projected)
        P = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=attn.scale).softmax(-1)
        P = P.unflatten(0, (len(x), -1))
        source, own = P[2:]  # (heads, N, L) each; the first two rows are unconditional
        if self.is_cross:
            tables = self.p2p.token_map, self.p2p.blend[0], self.p2p.reweight[0]
            M, blend, factors = (table[1].to(P.dtype) for table in tables)
            P[3] = factors * (blend * (source @ M) + (1 - blend) * own)
        elif self.injects:
            P[3] = source
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(P.flatten(0, 1), v)))


def eager(name: str, device: str, dtype: torch.dtype, small: bool, size):
    """diffusers' step with these processors."""
    from minisd import PromptToPrompt

    sd = models.full_size(device, dtype, small)
    uncond, cond = sd.encode_prompt([""]), sd.encode_prompt(list(PROMPTS))
    x = sd.noise(0, height=size, width=size).repeat(2, 1, 1, 1)
    p2p = PromptToPrompt(sd, *PROMPTS, steps=50, height=size, width=size, **EDIT)
    p2p.sd = sd = None  # the memory of its models
    unet = models.diffusers_unet(device, dtype, small)
    sites = [name.removesuffix(".processor") for name in unet.attn_processors]
    unet.set_attn_processor({f"{site}.processor": EagerProcessor(p2p, site) for site in sites})
    return {name: models.diffusers_step(unet, x, uncond, cond)}


def processes(device: str, small: bool, size: int | None) -> dict[str, tuple]:
    """What `harness.contest` takes."""
    if device != "cpu":
        half = torch.float16
        return {
            "minisd": (partial(ours, graph=True), "", device, half, small, size, KINDS),
            "eager": (eager, "eager", device, half, small, size),
        }
    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "minisd fp32": (ours, " fp32", device, fp32, small, size, KINDS[:2]),
        "eager fp32": (eager, "eager fp32", device, fp32, small, size),
        "minisd bf16": (ours, " bf16", device, bf16, small, size, KINDS),
    }


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    [row] = record["rows"]
    times, size = row["times"], row["size"]
    plain = {name.removeprefix("plain"): t for name, t in times.items() if name.startswith("plain")}
    eager = next((t for name, t in times.items() if name.startswith("eager")), None)
    lines = []
    for name, t in times.items():
        own = next((each for suffix, each in plain.items() if name.endswith(suffix)), None)
        slower = f"{t['ms'] / own['ms']:.2f}" if own else "-"
        quicker = f"{eager['ms'] / t['ms']:.2f}" if eager else "-"
        cells = (*harness.spread(t), harness.gigabytes(t["above"]), slower, quicker)
        lines.append((name, *cells))
    heads = ("ms a step", "quartiles", "peak above the weights", "time / plain", "eager / time")
    return f"{harness.origin(record)}\n\n{harness.markdown((f'{size} x {size}', *heads), lines)}"


def misses(rows: list[dict]) -> list[str]:
    """What misses its target: lockstep beside plain and beside eager (on a CPU in float32)."""
    times, bars = rows[0]["times"], []
    for suffix, rival, must in (
        ("", "eager", 4),
        (" fp32", "eager fp32", 1.25),
        (" bf16", "eager fp32", 2),
    ):
        names = f"lockstep{suffix}", f"plain{suffix}", rival
        own, plain, eager = map(times.get, names)
        if own and plain:
            bars.append((" / ".join(names[:2]), own["ms"] / plain["ms"], "<=", 1.1))
        if own and eager:
            bars.append((f"{rival} / {names[0]}", eager["ms"] / own["ms"], ">=", must))
        if own and eager and not suffix:  # CUDA
            memory = eager["above"] / own["above"]
            bars.append(("memory above the weights, eager / lockstep", memory, ">=", 8))
    return harness.slow(bars)


def main(arguments=None) -> int:
    args = harness.options(__doc__, "bench.editing speed", arguments, size=int)
    contenders = processes(args.device, args.quick, args.size)
    times = harness.contest(contenders, args.device, args.rounds)
    rows = [{"size": args.size or 512, "times": times}]
    harness.finish("editing_speed", rows, args, table, misses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
