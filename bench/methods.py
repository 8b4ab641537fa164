"""Does each method on attention do what it is for? Scored by pixels on the bundled model.

    python -m bench.methods [--n 50] [--only NAME ...] [--json bench/results/cpu/methods.json]

Of each method n scenes, each drawn with the method and without it from the same noise: what counts
as right is said in METHODS, and bench/scorer.py reads it from the pixels. Beside that: the lines of
code of its file (without docstrings, comments and imports), how far it is from its formula on eager
maps (tests/test_methods.py), and its time and memory over plain drawing of the same rows at 4096
positions. Where a method is no better than doing nothing, the table says so.
"""

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import minisd
from bench import harness
from bench.editing import Pair, alike, measure
from bench.scorer import judge, read
from minisd.editing.perturbed import perturbed
from minisd.training import scenes
from minisd.training.scenes import Description, Thing
from minisd.viewing.visualize import contact_sheet

SEED, STEPS, EACH = 4001, 10, 1
HOW = {"steps": STEPS, "progress": False}
FREEU = (1.2, 1.2), (1.0, 1.0)  # b, s; the published ones are Stable Diffusion's
ORACLES = ("test_methods", "test_perturbed", "test_feature_methods")
PARTS = ("error", "score", "cost")
SIDE = 256  # pixels, of the measurement of time and memory: 4096 positions
Scored = list[tuple[Image.Image, bool]]  # the EACH images of a caption, and whether each is right
Trial = tuple[str, Scored, Scored]  # what is drawn, without the method, with it


def thing(rng: random.Random, **fixed) -> Thing:
    """A big thing with a texture."""
    said = {"shape": rng.choice(scenes.SHAPES), "colour": rng.choice(list(scenes.COLOURS))}
    return Thing(**said | {"size": "big", "texture": rng.choice(scenes.TEXTURES[1:])} | fixed)


def background(rng: random.Random) -> str:
    return rng.choice(list(scenes.BACKGROUNDS))


def two(rng: random.Random) -> Description:
    """A held-out caption of two things that differ in shape and colour."""
    while True:
        said = scenes.describe(rng)
        if len(said.things) == 2 and scenes.split(said) == "heldout":
            a, b = said.things
            if a.shape != b.shape and a.colour != b.colour:
                return said


def of_seed(seed: int) -> dict:
    """EACH images, drawn with seeds of their own."""
    return HOW | {"seed": EACH * seed, "num_images": EACH}


def judged(
    text: str, without: list[Image.Image], drawn: list[Image.Image], right: Callable
) -> Trial:
    before, after = ([(each, bool(right(each))) for each in some] for some in (without, drawn))
    return text, before, after


def has(said: Description, *names: str) -> Callable[[Image.Image], bool]:
    """Whether an image has these attributes of the description."""

    def right(image: Image.Image) -> bool:
        found = judge(read(image), said)
        return all(found[name] for name in names)

    return right


# the trials


def perturbing(rule, sd, rng, seed) -> Trial:
    """Without a text and without guidance: one or two things, each whole, on a background."""
    how = of_seed(seed) | {"guidance": 1}

    def right(image: Image.Image) -> bool:
        found = read(image)
        whole = all(each.shape and each.colour and each.size for each in found.objects)
        return 1 <= len(found.objects) <= 2 and whole and found.background is not None

    images = (sd.txt2img("", rule=each, **how) for each in (minisd.cfg, rule))
    return judged("no text, no guidance", *images, right)


def freeu(sd, rng, seed) -> Trial:
    """Two things, with little guidance."""
    said, how = two(rng), of_seed(seed) | {"guidance": 1.5}
    rules = (minisd.cfg, partial(minisd.cfg, edits=minisd.freeu(sd.unet, *FREEU)))
    images = (sd.txt2img(str(said), rule=rule, **how) for rule in rules)
    return judged(str(said), *images, has(said, "all"))


def deep_cache(sd, rng, seed) -> Trial:
    """Two things: as right as in full, in less time."""
    said, how = two(rng), of_seed(seed) | {"steps": 2 * STEPS}
    rules = (minisd.cfg, partial(minisd.deep_cache, unet=sd.unet))
    images = (sd.txt2img(str(said), rule=rule, **how) for rule in rules)
    return judged(str(said), *images, has(said, "all"))


def plug_and_play(sd, rng, seed) -> Trial:
    """One of two things in another colour, and both in their places."""
    said, edited = two(rng), rng.randrange(2)
    used, things = [each.colour for each in said.things], list(said.things)
    colour = rng.choice([c for c in scenes.COLOURS if c not in used])
    things[edited] = replace(things[edited], colour=colour)
    prompts = str(said), str(replace(said, things=tuple(things)))
    pair = Pair("colour swap", said, replace(said, things=tuple(things)), edited, seed)
    how = of_seed(seed)
    alone, drawn = (f(sd, *prompts, **how) for f in (minisd.seed_baseline, minisd.plug_and_play))

    def verdicts(images: list[Image.Image]) -> Scored:
        figures = [measure(pair, *each) for each in zip(images[:EACH], images[EACH:])]
        kept = [min(f["other_iou"] or 0, f["edited_iou"] or 0) > 0.8 for f in figures]
        return [
            (image, bool(f["right"] and ok)) for image, f, ok in zip(images[EACH:], figures, kept)
        ]

    return " / ".join(prompts), verdicts(alone), verdicts(drawn)


def masactrl(sd, rng, seed) -> Trial:
    """One thing in its own place, which the target says, on the source's background."""
    a, behind, (here, there) = thing(rng), background(rng), rng.sample(list(scenes.POSITIONS), 2)
    source, target = str(Description((a,), here, behind)), f"a {a.shape} {there}"
    without = minisd.seed_baseline(sd, source, target, **of_seed(seed))[EACH:]
    drawn = minisd.masactrl(sd, source, target, start=1, **of_seed(seed))[EACH:]
    right = has(Description((a,), there, behind), "count", "shape", "place", "background")
    return judged(f"{source} / {target}", without, drawn, right)


def style_aligned(sd, rng, seed) -> Trial:
    """A thing of its own shape and colour, on the reference's background, which it does not say."""
    a, other, behind = thing(rng), thing(rng), background(rng)
    prompts = str(Description((a,), None, behind)), f"a {other.colour} {other.shape}"
    how = of_seed(seed) | {"seed": 2 * EACH * seed, "sampler": "dpm++"}
    without, drawn = sd.txt2img(prompts, **how), minisd.style_aligned(sd, *prompts, **how)
    said = Description((replace(other, size=None),), None, behind)
    right = has(said, "count", "shape", "colour", "background")
    return judged(" / ".join(prompts), without[EACH:], drawn[EACH:], right)


def excite(sd, rng, seed) -> Trial:
    """A second thing in given images that show the first: both, and no third.

    Both ways draw from the given images' inversion by the caption of one thing, whose noise speaks
    against a second, with little guidance.
    """
    said = two(rng)
    source = replace(said, things=said.things[:1], place=None)
    given = [scenes.render(scenes.draw(source, rng), 64) for _ in range(EACH)]
    latents = minisd.invert(sd, given, str(source), **HOW).latents
    how = HOW | {"latents": latents, "num_images": EACH, "guidance": 2.0, "sampler": "ddim"}
    words, without = [each.shape for each in said.things], sd.txt2img(str(said), **how)
    gently = {"scale": 10.0, "until": 1.0, "refinements": 0}
    drawn = minisd.attend_and_excite(sd, str(said), words, **gently, **how)

    def right(image: Image.Image) -> bool:
        found = [(each.shape, each.colour) for each in read(image).objects]
        return sorted(found, key=str) == sorted((each.shape, each.colour) for each in said.things)

    return judged(f"{source} / {said}", without, drawn, right)


def diffedit(sd, rng, seed) -> Trial:
    """Given images, one of whose two things gets another colour; all else stays as it is."""
    said, edited = two(rng), rng.randrange(2)
    given = [scenes.render(scenes.draw(said, rng), 64) for _ in range(EACH)]
    used, things = [each.colour for each in said.things], list(said.things)
    colour = rng.choice([c for c in scenes.COLOURS if c not in used])
    things[edited] = replace(things[edited], colour=colour)
    target = replace(said, things=tuple(things))
    pair, how = Pair("colour swap", said, target, edited, seed), {"guidance": 5.0}
    inversion = minisd.invert(sd, given, str(said), skip=STEPS // 5, **HOW)
    without = minisd.redraw(sd, inversion, str(target), progress=False, **how)
    drawn = minisd.diffedit(sd, given, str(said), str(target), noises=6, **how, **HOW)

    def verdicts(images: list[Image.Image]) -> Scored:
        figures = [measure(pair, before, after) for before, after in zip(given, images)]
        kept = [f["right"] and (f["other_iou"] or 0) > 0.9 and f["psnr"] > 35 for f in figures]
        return [(image, bool(ok)) for image, ok in zip(images, kept)]

    return f"{said} / {target}", verdicts(without), verdicts(drawn)


def regional(sd, rng, seed) -> Trial:
    """A thing in one quarter of the image, a place that no caption can say."""
    a, behind = thing(rng), f"on a {background(rng)} background"
    row, column = rng.randrange(2), rng.randrange(2)
    mask = np.zeros((64, 64), bool)
    mask[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = True

    def right(image: Image.Image) -> bool:
        found = read(image).objects
        inside = len(found) == 1 and (found[0].y > 32, found[0].x > 32) == (bool(row), bool(column))
        return inside and (found[0].shape, found[0].colour) == (a.shape, a.colour)

    text, where = f"{a} {behind}", f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
    without = sd.txt2img(text, **of_seed(seed))
    drawn = minisd.regional(sd, behind, {text: mask}, **of_seed(seed))
    return judged(f"{a} in the {where} quarter", without, drawn, right)


def long(sd, rng, seed) -> Trial:
    """A thing behind 80 tokens that say no more than the background; others may be there."""
    a, behind = thing(rng), f"on a {background(rng)} background "
    text, how = behind * 20 + str(a), of_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is cut
        without, drawn = sd.txt2img(text, **how), minisd.long_prompt(sd, text, **how)

    def right(image: Image.Image) -> bool:
        wanted = a.shape, a.colour, a.texture
        return wanted in [(o.shape, o.colour, o.texture) for o in read(image).objects]

    return judged(f"{behind}... {a}", without, drawn, right)


def weights(by: str, weight: float, sd, rng, seed) -> Trial:
    """Two colours of one thing: the one that weighs more."""
    colours, shape, heavy = rng.sample(list(scenes.COLOURS), 2), rng.choice(scenes.SHAPES), seed % 2
    weighed = [f"({c}:{weight:g})" if i == heavy else c for i, c in enumerate(colours)]
    plain, text = (f"a {' '.join(words)} {shape}" for words in (colours, weighed))

    def right(image: Image.Image) -> bool:
        return [found.colour for found in read(image).objects] == [colours[heavy]]

    drawn = minisd.long_prompt(sd, text, by, **of_seed(seed))
    return judged(text, sd.txt2img(plain, **of_seed(seed)), drawn, right)


def daam(sd, rng, seed) -> Trial:
    """The greatest value of the map of a thing's shape lies within it; without: any place does."""
    said = two(rng)
    images, maps = minisd.heatmap(sd, str(said), **of_seed(seed))
    a, whole, chance = said.things[0], minisd.daam(maps), np.random.default_rng(seed)
    without, drawn = [], []
    for i, image in enumerate(images):
        inside = np.zeros((64, 64), bool)
        for found in alike(read(image), a, "shape"):
            inside |= found.mask
        y, x = divmod(whole.word(a.shape, row=i).argmax().item(), 16)
        without.append((image, bool(inside[tuple(chance.integers(64, size=2))])))
        drawn.append((image, bool(inside[4 * y + 2, 4 * x + 2])))
    return str(said), without, drawn


@dataclass(frozen=True)
class Method:
    """name: of its row. file: that holds it. test: what tests/test_methods.py calls it. trial:
    (sd, rng, seed) -> what is drawn without it and with it. right: what is scored."""

    name: str
    file: str
    test: str
    trial: Callable[..., Trial]
    right: str


METHODS = [
    Method(
        "PAG", "perturbed", "PAG", partial(perturbing, minisd.pag), "whole things, without a text"
    ),
    Method(
        "SEG", "smoothed", "SEG", partial(perturbing, minisd.seg), "whole things, without a text"
    ),
    Method("FreeU", "freeu", "FreeU", freeu, "two things, little guidance"),
    Method(
        "Plug-and-Play",
        "plug_and_play",
        "Plug-and-Play",
        plug_and_play,
        "the new colour, both things in place",
    ),
    Method("DeepCache", "deep_cache", "DeepCache", deep_cache, "two things, all attributes"),
    Method("MasaCtrl", "masactrl", "MasaCtrl", masactrl, "its own place, the source's background"),
    Method(
        "StyleAligned",
        "style_aligned",
        "StyleAligned",
        style_aligned,
        "its own thing, the reference's background",
    ),
    Method(
        "Attend-and-Excite",
        "attend_and_excite",
        "Attend-and-Excite",
        excite,
        "a second thing, where the noise is of one",
    ),
    Method("DiffEdit", "diffedit", "DiffEdit", diffedit, "the new colour, and the rest as it was"),
    Method(
        "regional prompts", "regional", "regional prompts", regional, "the thing in its quarter"
    ),
    Method("long prompts", "long_prompts", "long prompts", long, "the thing behind 80 tokens"),
    Method(
        "weights: embedding",
        "long_prompts",
        "long prompts",
        partial(weights, "embedding", 1.5),
        "the heavier of two colours",
    ),
    Method(
        "weights: bias",
        "long_prompts",
        "weights as a bias",
        partial(weights, "bias", 10.0),
        "the heavier of two colours",
    ),
    Method("DAAM", "daam", "DAAM", daam, "the maximum within the thing"),
]


# the other columns


def lines_of(path: Path) -> int:
    """Lines of code: no docstrings, comments, blank lines or imports."""
    source = path.read_text(encoding="utf-8")
    tree, counted = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr | ast.arg | ast.keyword | ast.alias):
            counted |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            counted -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    text = source.splitlines()
    return sum(bool(text[i - 1].split("#")[0].strip()) for i in counted)


def oracle_errors() -> dict[str, float]:
    """{method: the greatest relative error} of the tests in ORACLES."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [f"tests/{name}.py" for name in ORACLES]
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=harness.ROOT, check=True, stdout=sys.stderr)
        worst: dict[str, float] = {}
        for each in ElementTree.parse(report).iter("property"):
            if found := re.fullmatch(r"(.*) against its formula, relative", each.get("name") or ""):
                worst[found[1]] = max(float(each.get("value") or 0), worst.get(found[1], 0.0))
    return worst


def costs(sd) -> dict[str, tuple[Callable, Callable]]:
    """{method: (it, plain drawing of the same rows)}, 2 steps (DiffEdit 4), without the decoder."""
    sd = replace(sd)
    sd.decode = lambda z: [Image.new("RGB", (SIDE, SIDE))] * len(z)
    how = {"height": SIDE, "width": SIDE, "steps": 2, "sampler": "ddim", "progress": False}
    one, two = "a big red circle on a white background", "a big blue square on a black background"
    image = Image.new("RGB", (SIDE, SIDE), "white")
    image.paste("red", (64, 64, 128, 128))
    mask = np.pad(np.ones((SIDE, SIDE // 2), bool), ((0, 0), (0, SIDE // 2)))
    undisturbed = partial(perturbed, perturbed_scale=3.0, disturb=lambda rows: {})
    own = {"height": SIDE, "width": SIDE, "steps": 4, "progress": False}

    def there_and_back():
        inversion = minisd.invert(sd, image, one, skip=1, **own)
        return minisd.redraw(sd, inversion, two, guidance=7.5, progress=False)

    drawn = partial(sd.txt2img, one, **how)
    words = {"refinements": 0, **how}
    return {
        "PAG": (partial(drawn, rule=minisd.pag), partial(drawn, rule=undisturbed)),
        "SEG": (partial(drawn, rule=minisd.seg), partial(drawn, rule=undisturbed)),
        "FreeU": (partial(drawn, rule=partial(minisd.cfg, edits=minisd.freeu(sd.unet))), drawn),
        "Plug-and-Play": (
            partial(minisd.plug_and_play, sd, one, two, **how),
            partial(minisd.seed_baseline, sd, one, two, **how),
        ),
        "DeepCache": (
            partial(drawn, rule=partial(minisd.deep_cache, unet=sd.unet, every=2)),
            drawn,
        ),
        "MasaCtrl": (
            partial(minisd.masactrl, sd, one, two, start=0, **how),
            partial(minisd.seed_baseline, sd, one, two, **how),
        ),
        "StyleAligned": (
            partial(minisd.style_aligned, sd, one, two, **how),
            partial(sd.txt2img, [one, two], **how),
        ),
        "Attend-and-Excite": (
            partial(minisd.attend_and_excite, sd, one, ["circle", "red"], **words),
            drawn,
        ),
        "DiffEdit": (partial(minisd.diffedit, sd, image, one, two, **own), there_and_back),
        "regional prompts": (partial(minisd.regional, sd, one, {two: mask}, **how), drawn),
        "long prompts": (partial(minisd.long_prompt, sd, "a " * 80 + one, **how), drawn),
        "weights: embedding": (partial(minisd.long_prompt, sd, f"({one}:1.5)", **how), drawn),
        "weights: bias": (partial(minisd.long_prompt, sd, f"({one}:1.5)", "bias", **how), drawn),
        "DAAM": (lambda: minisd.daam(minisd.heatmap(sd, one, **how)[1]), drawn),
    }


def measured(sd, names: list[str], rounds: int) -> dict[str, dict]:
    """{method: {"time": over plain; "ms", "low", "high": of both; "memory": bytes over plain}}."""
    found = {}
    for name, pair in costs(sd).items():
        if name not in names:
            continue
        own, plain = (torch.no_grad()(each) for each in pair)
        times = harness.interleave({"own": own, "plain": plain}, "cpu", rounds)
        memory = [harness.peak_memory(each, "cpu") or 0 for each in (own, plain)]
        spread = {key: [times[way][key] for way in times] for key in ("ms", "low", "high")}
        ms = spread["ms"]
        found[name] = {"time": ms[0] / ms[1], **spread, "memory": memory[0] - memory[1]}
    return found


def scored(sd, method: Method, n: int) -> tuple[dict, Trial]:
    """{"without": share right, "with": the same, "n"}, and the first trial."""
    rng, trials = random.Random(f"{SEED} {method.name}"), []
    for i in tqdm(range(-(-n // EACH)), desc=method.name, file=sys.stderr):
        trials.append(method.trial(sd, rng, i))
    shares = [np.mean([ok for trial in trials for _, ok in trial[way]]).item() for way in (1, 2)]
    return {"without": shares[0], "with": shares[1], "n": EACH * len(trials)}, trials[0]


def table(record: dict) -> str:
    """The Markdown table of a result file; -: not measured."""
    lines = []
    for row in record["methods"]:
        if "lines" not in row:
            continue  # nothing of it is measured
        score, cost = row.get("score"), row.get("cost")
        shares = [f"{100 * score[key]:.0f} %" if score else "-" for key in ("without", "with")]
        over = [f"{cost['time']:.2f}", f"{cost['memory'] / 1e6:.0f} MB"] if cost else ["-", "-"]
        error = f"{row['error']:.1e}" if "error" in row else "-"
        lines.append((row["name"], f"{row['lines']}", error, row["right"], *shares, *over))
    heads = ("method", "lines", "from its formula", "right is", "without", "with")
    heads += ("time / plain", "memory over plain")
    return f"{harness.origin(record)}\n\n{harness.markdown(heads, lines)}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, names = parser.add_argument, [method.name for method in METHODS]
    add("--model", default="shapes", help="a bundled model or a checkpoint folder")
    add("--n", type=int, default=50, help="scenes for each method (default: 50)")
    add("--only", nargs="*", default=names, choices=names, help="default: all")
    add("--parts", nargs="*", default=PARTS, choices=PARTS, help="default: all; others stay")
    add("--rounds", type=int, default=3, help="of the measurement of time (default: 3)")
    add("--json", type=Path, help="write all figures here; what is not measured stays")
    add("--sheet", type=Path, help="write a contact sheet here (PNG)")
    args = parser.parse_args(arguments)

    rows = {name: {"name": name} for name in names}
    if args.json and args.json.exists():
        rows |= {row["name"]: row for row in json.loads(args.json.read_text())["methods"]}
    sd, chosen = minisd.load(args.model, device="cpu"), [m for m in METHODS if m.name in args.only]
    errors = oracle_errors() if "error" in args.parts else {}
    found = measured(sd, args.only, args.rounds) if "cost" in args.parts else {}
    images, captions = [], []
    for method in chosen:
        row, lines = rows[method.name], harness.ROOT / f"minisd/editing/{method.file}.py"
        row |= {"lines": lines_of(lines), "right": method.right}
        row |= {"error": errors[method.test]} if errors else {}
        row |= {"cost": found[method.name]} if found else {}
        if "score" in args.parts:
            row["score"], (text, *ways) = scored(sd, method, args.n)
            for way, some in zip(("without", "with"), ways):
                images += [image for image, _ in some]
                captions += [f"{way}: {text}"] * EACH
    record = {**harness.provenance("cpu"), "seed": SEED, "steps": STEPS}
    record["methods"] = list(rows.values())
    print(table(record))
    if args.json:
        harness.write(args.json, record)
    if args.sheet and images:
        contact_sheet(images, captions, 2 * EACH).save(args.sheet)


if __name__ == "__main__":
    main()
