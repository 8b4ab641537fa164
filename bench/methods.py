"""Does each method on attention or features do what it is for? Scored by pixels, on `shapes`.

    python -m bench.methods [--n 50] [--only NAME ...] [--json bench/results/cpu/methods.json]

Of each method n scenes, each drawn with the method and without it from the same noise: what counts
as right is said in METHODS, and bench/scorer.py reads it from the pixels. Beside that: the lines of
code of its file (without docstrings, comments and imports), how far it is from its formula on eager
maps (the tests in ORACLES), and its time and memory over plain drawing of the same rows at 4096
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
from bench.editing import Pair, alike, measure, other
from bench.scorer import judge, read
from minisd.editing.perturbed import perturbed
from minisd.training import scenes
from minisd.training.scenes import Description, Thing
from minisd.viewing.visualize import contact_sheet

SEED, STEPS = 4001, 12
HOW = {"steps": STEPS, "progress": False}
FREEU = (1.1, 1.2), (0.9, 0.9)  # b, s: the published ones are Stable Diffusion's
ORACLES = ("test_methods", "test_perturbed", "test_feature_methods")
SIDE = 256  # pixels, of the measurement of time and memory: 4096 positions
Trial = list[tuple[str, Image.Image, bool]]  # what is drawn, the image, whether it is right


def thing(rng: random.Random, **fixed) -> Thing:
    """A big thing with a texture."""
    said = {"shape": rng.choice(scenes.SHAPES), "colour": rng.choice(list(scenes.COLOURS))}
    return Thing(**said | {"size": "big", "texture": rng.choice(scenes.TEXTURES[1:])} | fixed)


def background(rng: random.Random) -> str:
    return rng.choice(list(scenes.BACKGROUNDS))


def is_all(image: Image.Image, said: Description) -> bool:
    return judge(read(image), said)["all"]


def two(rng: random.Random) -> Description:
    """A held-out caption of two things that differ in shape and colour."""
    while True:
        said = scenes.describe(rng)
        if len(said.things) == 2 and scenes.split(said) == "heldout":
            a, b = said.things
            if a.shape != b.shape and a.colour != b.colour:
                return said


# the trials: [without the method, with it]


def perturbing(rule, sd, rng, seed) -> Trial:
    """Without a text and without guidance: one or two things, each whole, on a background."""
    how = HOW | {"guidance": 1, "seed": seed}
    images = [sd.txt2img("", rule=each, **how)[0] for each in (minisd.cfg, rule)]

    def right(image: Image.Image) -> bool:
        found = read(image)
        whole = all(each.shape and each.colour and each.size for each in found.objects)
        return 1 <= len(found.objects) <= 2 and whole and found.background is not None

    return [("no text, no guidance", image, right(image)) for image in images]


def freeu(sd, rng, seed) -> Trial:
    """Two things, with little guidance."""
    said = two(rng)
    edits = minisd.freeu(sd.unet, b=FREEU[0], s=FREEU[1])
    how = HOW | {"steps": 8, "guidance": 1.5, "seed": seed}
    rules = (minisd.cfg, partial(minisd.cfg, edits=edits))
    images = [sd.txt2img(str(said), rule=rule, **how)[0] for rule in rules]
    return [(str(said), image, is_all(image, said)) for image in images]


def deep_cache(sd, rng, seed) -> Trial:
    """Two things: as right as in full, in less time."""
    said = two(rng)
    rules = (minisd.cfg, partial(minisd.deep_cache, unet=sd.unet))
    images = [sd.txt2img(str(said), rule=rule, seed=seed, **HOW)[0] for rule in rules]
    return [(str(said), image, is_all(image, said)) for image in images]


def plug_and_play(sd, rng, seed) -> Trial:
    """One of two things in another colour; both in their places."""
    said, edited = two(rng), rng.randrange(2)
    things = list(said.things)
    used = [each.colour for each in things]
    colour = rng.choice([c for c in scenes.COLOURS if c not in used])
    things[edited] = replace(things[edited], colour=colour)
    target = replace(said, things=tuple(things))
    pair, prompts = Pair("colour swap", said, target, edited, seed), (str(said), str(target))
    source, alone = minisd.seed_baseline(sd, *prompts, **HOW | {"seed": seed})
    images = [alone, minisd.plug_and_play(sd, *prompts, **HOW | {"seed": seed})[1]]
    figures = [measure(pair, source, each) for each in images]
    kept = [min(f["other_iou"] or 0, f["edited_iou"] or 0) > 0.8 for f in figures]
    right = [bool(f["right"] and ok) for f, ok in zip(figures, kept)]
    return [(f"{said} / {target}", each, ok) for each, ok in zip(images, right)]


def masactrl(sd, rng, seed) -> Trial:
    """One thing in its own place, which the target says, on the source's background."""
    a, behind, (here, there) = thing(rng), background(rng), rng.sample(list(scenes.POSITIONS), 2)
    source, target = str(Description((a,), here, behind)), f"a {a.shape} {there}"
    how = HOW | {"seed": seed}
    images = [
        minisd.seed_baseline(sd, source, target, **how)[1],
        minisd.masactrl(sd, source, target, start=1, **how)[1],
    ]
    wanted = Description((a,), there, behind)

    def right(image: Image.Image) -> bool:
        found = judge(read(image), wanted)
        return all(found[name] for name in ("count", "shape", "place", "background"))

    return [(f"{source} / {target}", image, right(image)) for image in images]


def style(sd, rng, seed) -> Trial:
    """A thing of another shape, of which nothing else is said: all else is the reference's."""
    a, behind = thing(rng), background(rng)
    shape = other(scenes.SHAPES, a.shape, rng)
    reference, prompt = str(Description((a,), None, behind)), f"a {shape}"
    how = HOW | {"seed": [seed, seed + 1000]}
    images = [
        sd.txt2img([reference, prompt], sampler="ddim", **how)[1],
        minisd.style_aligned(sd, reference, prompt, **how)[1],
    ]
    wanted = Description((replace(a, shape=shape),), None, behind)
    return [(f"{reference} / {prompt}", image, is_all(image, wanted)) for image in images]


def excite(sd, rng, seed) -> Trial:
    said = two(rng)
    words = [word for each in said.things for word in (each.colour, each.shape)]
    how = HOW | {"steps": 10, "guidance": 1.5, "seed": seed}
    images = [
        sd.txt2img(str(said), sampler="ddim", **how)[0],
        minisd.attend_and_excite(sd, str(said), words, scale=5.0, refinements=3, **how)[0],
    ]
    return [(str(said), image, is_all(image, said)) for image in images]


def diffedit(sd, rng, seed) -> Trial:
    """A given image, one of whose two things gets another colour; the other stays in its place."""
    said, edited = two(rng), rng.randrange(2)
    scene = scenes.draw(said, rng)
    image, things = scenes.render(scene, 64), list(said.things)
    used = [each.colour for each in things]
    colour = rng.choice([c for c in scenes.COLOURS if c not in used])
    things[edited] = replace(things[edited], colour=colour)
    target = replace(said, things=tuple(things))
    pair = Pair("colour swap", said, target, edited, seed)
    inversion = minisd.invert(sd, image, str(said), skip=3, **HOW)
    images = [
        minisd.redraw(sd, inversion, str(target), guidance=5.0, progress=False)[0],
        minisd.diffedit(sd, image, str(said), str(target), guidance=5.0, noises=6, **HOW)[0],
    ]
    figures = [measure(pair, image, each) for each in images]
    right = [bool(f["right"] and (f["other_iou"] or 0) > 0.8 and f["psnr"] > 30) for f in figures]
    return [(f"{said} / {target}", each, ok) for each, ok in zip(images, right)]


def regional(sd, rng, seed) -> Trial:
    """A thing in one quarter of the image, a place that no caption can say."""
    a, behind = thing(rng), f"on a {background(rng)} background"
    row, column = rng.randrange(2), rng.randrange(2)
    mask = np.zeros((64, 64), bool)
    mask[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = True
    how = HOW | {"seed": seed}
    images = [
        sd.txt2img(f"{a} {behind}", **how)[0],
        minisd.regional(sd, behind, {f"{a} {behind}": mask}, **how)[0],
    ]

    def right(image: Image.Image) -> bool:
        found = read(image).objects
        inside = len(found) == 1 and (found[0].y > 32, found[0].x > 32) == (bool(row), bool(column))
        return inside and (found[0].shape, found[0].colour) == (a.shape, a.colour)

    where = f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
    return [(f"{a} in the {where} quarter", image, right(image)) for image in images]


def long(sd, rng, seed) -> Trial:
    """A caption behind 80 tokens that say no more than its background."""
    said = replace(two(rng), background=background(rng))
    before = f"on a {said.background} background "
    text, how = before * 20 + str(said), HOW | {"seed": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is cut
        images = [sd.txt2img(text, **how)[0], minisd.long_prompt(sd, text, **how)[0]]
    return [(f"{before}... {said}", image, is_all(image, said)) for image in images]


def weights(by: str, weight: float, sd, rng, seed) -> Trial:
    """Two colours of one thing: the one that weighs more."""
    first, second = rng.sample(list(scenes.COLOURS), 2)
    shape, heavy = rng.choice(scenes.SHAPES), rng.randrange(2)
    colours, wanted = [first, second], (first, second)[heavy]
    plain = f"a {first} {second} {shape}"
    colours[heavy] = f"({wanted}:{weight:g})"
    text, how = f"a {colours[0]} {colours[1]} {shape}", HOW | {"seed": seed}
    images = [sd.txt2img(plain, **how)[0], minisd.long_prompt(sd, text, by, **how)[0]]

    def right(image: Image.Image) -> bool:
        return [found.colour for found in read(image).objects] == [wanted]

    return [(text, image, right(image)) for image in images]


def daam(sd, rng, seed) -> Trial:
    """The greatest value of the map of a thing's shape lies within it; without: any place does."""
    said = two(rng)
    [image], maps = minisd.heatmap(sd, str(said), **HOW | {"seed": seed})
    a = said.things[0]
    inside = np.zeros((64, 64), bool)
    for found in alike(read(image), a, "shape"):
        inside |= found.mask
    at = np.unravel_index(minisd.daam(maps).word(a.shape).argmax().item(), (16, 16))
    place = [4 * i + 2 for i in at]
    chance = np.random.default_rng(seed).integers(64, size=2)
    return [(str(said), image, bool(inside[tuple(where)])) for where in (chance, place)]


@dataclass(frozen=True)
class Method:
    """name: of its row. file: that holds it. test: what tests/test_methods.py calls it. trial:
    (sd, rng, seed) -> [without it, with it]. right: what is scored. cost: 'plain' rows or what it
    costs beside them."""

    name: str
    file: str
    test: str
    trial: Callable[..., Trial]
    right: str


METHODS = [
    Method(
        "PAG", "perturbed", "PAG", partial(perturbing, minisd.pag), "whole things, without a text"
    ),
    Method("SEG", "smoothed", "SEG", partial(perturbing, minisd.seg), "the same"),
    Method("FreeU", "freeu", "FreeU", freeu, "two things, all attributes, little guidance"),
    Method(
        "Plug-and-Play",
        "plug_and_play",
        "Plug-and-Play",
        plug_and_play,
        "the new colour, both things in their places",
    ),
    Method("DeepCache", "deep_cache", "DeepCache", deep_cache, "two things, all attributes"),
    Method("MasaCtrl", "masactrl", "MasaCtrl", masactrl, "its own place, the source's background"),
    Method(
        "Attend-and-Excite",
        "attend_and_excite",
        "Attend-and-Excite",
        excite,
        "two things, all attributes",
    ),
    Method("DiffEdit", "diffedit", "DiffEdit", diffedit, "the new colour, and the rest as it was"),
    Method(
        "regional prompts", "regional", "regional prompts", regional, "the thing in its quarter"
    ),
    Method("long prompts", "long_prompts", "long prompts", long, "what stands behind 80 tokens"),
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
    """{method: (it, plain drawing of the same rows)}, 4 steps, latents in place of images."""
    sd.decode = lambda z: z
    how = {"height": SIDE, "width": SIDE, "steps": 4, "sampler": "ddim", "progress": False}
    one, two = "a big red circle on a white background", "a big blue square on a black background"
    image = Image.new("RGB", (SIDE, SIDE), "white")
    image.paste("red", (64, 64, 128, 128))
    mask = np.pad(np.ones((SIDE, SIDE // 2), bool), ((0, 0), (0, SIDE // 2)))
    undisturbed = partial(perturbed, perturbed_scale=3.0, disturb=lambda rows: {})
    own = {name: value for name, value in how.items() if name != "sampler"}

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
        "DeepCache": (partial(drawn, rule=partial(minisd.deep_cache, unet=sd.unet)), drawn),
        "MasaCtrl": (
            partial(minisd.masactrl, sd, one, two, start=0, **how),
            partial(minisd.seed_baseline, sd, one, two, **how),
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
    """{method: {"time": over plain, "ms": of both, "memory": over plain's, in bytes}}."""
    found = {}
    for name, pair in costs(sd).items():
        if name not in names:
            continue
        own, plain = (torch.no_grad()(each) for each in pair)
        times = harness.interleave({"own": own, "plain": plain}, "cpu", rounds)
        memory = [harness.peak_memory(each, "cpu") or 0 for each in (own, plain)]
        ms = [times[key]["ms"] for key in ("own", "plain")]
        found[name] = {"time": ms[0] / ms[1], "ms": ms, "memory": memory[0] - memory[1]}
    return found


def scored(sd, method: Method, n: int, shown: int) -> tuple[dict, list[Trial]]:
    """{"without": share right, "with": the same, "n"}, and the first trials."""
    rng, trials = random.Random(f"{SEED} {method.name}"), []
    right = np.zeros((n, 2), bool)
    for i in tqdm(range(n), desc=method.name, file=sys.stderr):
        trial = method.trial(sd, rng, i)
        right[i] = [ok for _, _, ok in trial]
        trials += [trial] if i < shown else []
    share = right.mean(0)
    return {"without": float(share[0]), "with": float(share[1]), "n": n}, trials


def table(record: dict) -> str:
    """The Markdown table of a result file."""
    lines = []
    for row in record["methods"]:
        score, cost = row["score"], row["cost"]
        shares = [f"{100 * score[key]:.0f} %" for key in ("without", "with")]
        cells = [f"{row['lines']}", f"{row['error']:.1e}", row["right"], *shares]
        lines.append((row["name"], *cells, f"{cost['time']:.2f}", f"{cost['memory'] / 1e6:.0f} MB"))
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
    add("--rounds", type=int, default=5, help="of the measurement of time (default: 5)")
    add("--json", type=Path, help="write all figures here; methods that are not drawn stay")
    add("--sheet", type=Path, help="write a contact sheet here (PNG)")
    args = parser.parse_args(arguments)

    sd, errors, images, captions = minisd.load(args.model, device="cpu"), oracle_errors(), [], []
    rows = {}
    if args.json and args.json.exists():
        rows = {row["name"]: row for row in json.loads(args.json.read_text())["methods"]}
    for method in METHODS:
        if method.name in args.only:
            score, trials = scored(sd, method, args.n, shown=3)
            lines = lines_of(harness.ROOT / f"minisd/editing/{method.file}.py")
            about = {"name": method.name, "lines": lines, "right": method.right}
            rows[method.name] = about | {"error": errors[method.test], "score": score}
            for trial in trials:
                images += [image for _, image, _ in trial]
                captions += [
                    f"{way}: {text}" for way, (text, _, _) in zip(("without", "with"), trial)
                ]
    for name, cost in measured(sd, args.only, args.rounds).items():
        rows[name]["cost"] = cost
    record = {**harness.provenance("cpu"), "seed": SEED, "steps": STEPS}
    record["methods"] = [rows[name] for name in names if name in rows]
    print(table(record))
    if args.json:
        harness.write(args.json, record)
    if args.sheet:
        contact_sheet(images, captions, 6).save(args.sheet)


if __name__ == "__main__":
    main()
