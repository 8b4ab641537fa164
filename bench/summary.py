"""The short tables of README.md, from the JSON files of the long ones of docs/benchmarks.md."""

from bench import harness

FP32, BF16 = ("minisd fp32", "diffusers fp32"), ("minisd bf16", "diffusers bf16")
LAST = ("minisd bf16", "diffusers bf16 channels_last")
HALF, GRAPH = ("minisd", "diffusers"), ("minisd graph", "diffusers")  # on a card


def equality(record: dict) -> str:
    """What is compared with the reference: a row for each figure that the tests print."""
    keys = "what", "bar", "measured"
    rows = [(*(row[key] for key in keys), f"`{row['command']}`") for row in record["rows"]]
    return harness.markdown((*keys, "command"), rows)


def fidelity(record: dict) -> str:
    """The same, of the parts and of whole images alone."""
    chosen = [row for row in record["rows"] if row["summary"]]
    rows = [(row["summary"], row["bar"], row["measured"]) for row in chosen]
    return harness.markdown(("what", "bar", "measured"), rows)


def speed(unet: dict, txt2img: dict, editing: dict, startup: dict) -> str:
    """minisd beside diffusers, where both were measured in turns."""
    first, rows = [row for row in unet["rows"] if row["batch"] == 1], []
    for names in (FP32, LAST, HALF, GRAPH):
        rows += row("one guided step", first, *names)
    for drawn in txt2img["rows"]:
        for names in (FP32, BF16, HALF, GRAPH):
            what = f"an image, {drawn['steps']} steps of {drawn['sampler']}"
            rows += row(what, [drawn], *names)
    for suffix in (" fp32", ""):
        what = "one guided step of prompt-to-prompt, two prompts"
        rows += row(what, editing["rows"], f"lockstep{suffix}", f"eager{suffix}", "above")
    heads = ("full size, 512 x 512", "minisd", "diffusers", "times as fast")
    shapes = next(row for row in startup["rows"] if row["what"].startswith("shapes"))
    seconds = f"{shapes['times']['ms'] / 1e3:.1f} s"
    said = "seconds, and memory at the peak (of prompt-to-prompt, whose rival are the usual"
    said += "\nattention processors that form every map: above the weights)"
    shown = f"{harness.machine(unet)};\n{said}:\n\n{harness.markdown(heads, rows)}"
    others = {"images": txt2img, "prompt-to-prompt": editing, "the first image": startup}
    older = ", ".join(f"{what} {x['commit'][:7]}" for what, x in others.items())
    shown += f"\n\nImporting, loading `shapes` and drawing the first image take {seconds}."
    return f"{shown}\nMeasured at other commits: {older}."


def row(what: str, rows: list[dict], ours: str, theirs: str, memory: str = "bytes") -> list[tuple]:
    """The row of the first of the measured ones that has both contenders, if there is one."""
    times = next((r["times"] for r in rows if {ours, theirs} <= r["times"].keys()), None)
    if times is None:
        return []
    pair = times[ours], times[theirs]
    cells = [f"{t['ms'] / 1e3:.3g} s, {harness.gigabytes(t[memory])}" for t in pair]
    name = theirs.removeprefix("diffusers ").removeprefix("eager ")
    return [(f"{what}, {name}", *cells, f"{pair[1]['ms'] / pair[0]['ms']:.2f}")]
