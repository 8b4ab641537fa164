"""How far two folders of images are from one another.

    python -m bench.distance A B [--only features|pixels] [--masks FOLDER] [--json FILE]

Of the two sets: the Frechet distance in EfficientNet-Lite0 features. It is no FID, which is the
same formula in features of Inception, and the two cannot be compared. Of pairs, where files of A
and B have one name: PIE-Bench's pixel metrics, PSNR, MSE and SSIM of the background and the
distance of the layouts (bench/metrics.py), each the mean over the pairs; --masks holds masks of
those names, white where the edit belongs.

    |ma - mb|^2 + Tr(Sa + Sb - 2 (Sa Sb)^(1/2)),      means m and covariances S of the features

Intervals are of 95 %, from bootstraps. The distance of finite sets is too large, and with fewer
images than the 1280 features most of it may be that. Its interval [2 d - high, 2 d - low], of the
quantiles low and high of resampled sets, takes off what resampling adds, which is enough only of
sets much larger than 1280. So what sets of these sizes have that do not differ stands beside it:
the 2.5 % and 97.5 % quantiles of the distance where A and B are mixed and dealt out again.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench import features as network, harness, metrics
from minisd.viewing.images import read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNITS = {"psnr": "dB", "mse": "", "ssim": "", "structure": ""}


def factor(x: np.ndarray) -> np.ndarray:
    """R with R^T R = the covariance of the rows of x (n, d), divided by n - 1; (min(n, d), d)."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|ma - mb|^2 + Tr(Sa + Sb - 2 (Sa Sb)^(1/2)) of samples a (n, d) and b (m, d).

    With S = R^T R, Sa Sb has the eigenvalues of (Ra Rb^T)(Ra Rb^T)^T, and others that are 0: the
    trace of its root is the sum of the singular values of Ra Rb^T. No root of a matrix is taken,
    and there may be fewer samples than features.
    """
    for name, x in (("A", a), ("B", b)):
        if len(x) < 2:
            raise ValueError(f"{name} has {len(x)} images, expected at least 2")
    Ra, Rb = factor(a), factor(b)
    root = np.linalg.svd(Ra @ Rb.T, compute_uv=False).sum()
    difference = a.mean(0) - b.mean(0)
    distance = difference @ difference + (Ra**2).sum() + (Rb**2).sum() - 2 * root
    return float(max(distance, 0.0))  # of equal sets rounding leaves +- 1e-13 of the trace


def bootstrap(
    statistic: Callable[..., float], sets: Sequence[np.ndarray], samples: int, seed: int, name: str
) -> tuple[float, float]:
    """The quantiles 2.5 % and 97.5 % of the statistic of sets that are drawn from `sets`."""
    rng, found = np.random.default_rng(seed), []
    for _ in tqdm(range(samples), f"bootstraps of {name}"):
        drawn = [x[rng.integers(len(x), size=len(x))] for x in sets]
        found.append(statistic(*drawn))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def feature_distance(a: np.ndarray, b: np.ndarray, samples: int = 200, seed: int = 0) -> dict:
    """{"value", "low", "high"} of `frechet`, and "mixed", (low, high); see above about both."""
    value = frechet(a, b)
    low, high = bootstrap(frechet, (a, b), samples, seed, "the distance")
    interval = {"low": max(2 * value - high, 0.0), "high": max(2 * value - low, 0.0)}
    return {"value": value, **interval, "mixed": mixed(a, b, samples, seed)}


def mixed(a: np.ndarray, b: np.ndarray, samples: int, seed: int) -> tuple[float, float]:
    """The quantiles 2.5 % and 97.5 % of the distance of two sets of these sizes, each image of A
    and B in one of them, by chance."""
    rng, together, found = np.random.default_rng(seed), np.concatenate([a, b]), []
    for _ in tqdm(range(samples), "A and B mixed"):
        dealt = together[rng.permutation(len(together))]
        found.append(frechet(dealt[: len(a)], dealt[len(a) :]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def pixel_metrics(
    pairs: Sequence[tuple[Path, Path]], masks: Path | None, samples: int = 200, seed: int = 0
) -> dict[str, dict]:
    """name -> {"value", "low", "high", "n"}; a metric of which no pair has a value is left out.

    A mask that covers everything leaves no background, and its pair counts for the layout alone.
    """
    rows = []
    for a, b in tqdm(pairs, "pairs"):
        mask = None if masks is None else read_mask(masks / f"{a.stem}.png")
        try:
            rows.append(metrics.field(read_image(a), read_image(b), mask))
        except ValueError as error:
            raise ValueError(f"{a} and {b}: {error}") from error
    found = {}
    for name in UNITS:
        values = np.array([row[name] for row in rows if row[name] is not None])
        if len(values):
            low, high = bootstrap(np.mean, (values,), samples, seed, name)
            found[name] = {"value": values.mean(), "low": low, "high": high, "n": len(values)}
    return found


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool, True where the image is white rather than black."""
    return np.asarray(read_image(path).convert("L")) >= 128


def images_of(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix; ValueError: none, or two of a name."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in found:
                raise ValueError(f"{folder} has {found[path.stem].name} and {path.name}")
            found[path.stem] = path
    if not found:
        raise ValueError(f"{folder} has no image: expected files {', '.join(SUFFIXES)}")
    return found


def compare(args: argparse.Namespace) -> dict:
    """All figures of two folders."""
    a, b = images_of(args.a), images_of(args.b)
    record: dict = {"folders": [args.a.name, args.b.name], "a": len(a), "b": len(b)}
    record |= {"samples": args.samples, "seed": args.seed}
    if args.only != "pixels":
        sets = [
            network.features(map(read_image, files.values()), len(files), folder.name)
            for files, folder in ((a, args.a), (b, args.b))
        ]
        record["features"] = network.NAME
        record["frechet"] = feature_distance(*sets, args.samples, args.seed)
    if args.only != "features":
        names = sorted(a.keys() & b.keys())
        if not names and (args.only or args.masks):
            raise ValueError(f"{args.a} and {args.b} have no file name in common: no pairs")
        record["pairs"] = len(names)
        pairs = [(a[name], b[name]) for name in names]
        record["pixels"] = pixel_metrics(pairs, args.masks, args.samples, args.seed)
    return record


def told(record: dict) -> str:
    """The figures for a reader."""
    lines = [f"{record['a']} and {record['b']} images"]

    def add(what: str, figure: dict, unit: str = "") -> None:
        interval = f"(95 %: {figure['low']:.4g} to {figure['high']:.4g})"
        lines.append(" ".join(filter(None, [f"{what}: {figure['value']:.4g}", unit, interval])))

    if "frechet" in record:
        add(f"Frechet distance in {record['features']} features", record["frechet"])
        low, high = record["frechet"]["mixed"]
        lines.append(f"the same where A and B are mixed: {low:.4g} to {high:.4g}")
    if "pairs" in record:
        left = record["a"] + record["b"] - 2 * record["pairs"]
        lines.append(f"{record['pairs']} pairs of one name, {left} images without a partner")
        for name, figure in record["pixels"].items():
            add(f"{name} of {figure['n']} pairs", figure, UNITS[name])
    return "\n".join(lines)


def table(*records: dict) -> str:
    """The Markdown table of result files, a line for each."""
    span = lambda low, high: f"{low:.1f} to {high:.1f}"
    lines = []
    for record in records:
        f, pairs = record["frechet"], record.get("pixels", {})
        distance = f"{f['value']:.1f} ({span(f['low'], f['high'])})"
        both = (f"{pairs[name]['value']:.4g}" if name in pairs else "-" for name in UNITS)
        what = " and ".join(record["folders"])
        lines.append((what, record["a"], record["b"], distance, span(*f["mixed"]), *both))
    heads = ("folders", "A", "B", "Frechet distance (95 %)", "A and B mixed")
    names = ("PSNR in dB", "MSE", "SSIM", "structure")
    origins = dict.fromkeys(harness.machine(record) for record in records)
    return f"{'; '.join(origins)}\n\n{harness.markdown((*heads, *names), lines)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.distance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="a folder of images; of pairs, the sources")
    add("b", type=Path, metavar="B", help="another; of pairs, the edits")
    add("--only", choices=("features", "pixels"), help="without it, both")
    add("--masks", type=Path, help="a folder of .png masks, of the names of the pairs")
    add("--samples", type=int, default=200, help="bootstraps (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the bootstraps (default: %(default)s)")
    add("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(arguments)
    if args.masks and args.only == "features":
        parser.error("--masks: it has no effect with --only features")
    if args.samples < 2:
        parser.error(f"--samples is {args.samples}, expected at least 2")
    try:
        record = compare(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"bench.distance: error: {error}", file=sys.stderr)
        return 2
    print(told(record))
    if args.json:
        harness.write(args.json, {**harness.provenance("cpu"), **record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
