"""The commands about models: `minisd models`, `fetch`, `export` and `check`."""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .options import SOURCE, AddCommand, Call, ModelRequest, add_model_options, number
from .output import check_place

if TYPE_CHECKING:
    from ..checkpoints.check import Finding


def add_commands(command: AddCommand) -> None:
    command("models", models, "list the models at hand: bundled, and in the local Hub cache")

    what = "download a model from the Hub, the files that are needed and no other"
    parser = command("fetch", fetch, what)
    parser.add_argument("repo", help="Hub repo id, or sd-v1-4 or sd-v1-5")
    parser.add_argument("--to", metavar="DIR", help="a folder for it; without it, the Hub's cache")
    most = "give up after so long; without it, never, as long as something comes"
    parser.add_argument("--deadline", metavar="SECONDS", type=seconds, help=most)
    add_model_options(parser, local=False, tokenizer=False)

    what = "write a model in diffusers layout, or as one file in CompVis' layout"
    parser = command("export", export, what)
    add = parser.add_argument
    add("--model", default="sd-v1-4", help=SOURCE)
    where = "a new folder, or a new .safetensors file"
    add("--to", metavar="PATH", required=True, help=where)
    one = "one .safetensors file in CompVis' layout"
    add("--single-file", action="store_true", help=one)
    dtypes = ("float16", "bfloat16", "float32", "float64")
    add("--dtype", choices=dtypes, help="without it, that of the files")
    add_model_options(parser)

    what = "verify a model's files, names, shapes and values, and draw an image with it"
    parser = command("check", check, what)
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one")
    add_model_options(parser)


def seconds(text: str) -> float:
    if not 0 < (value := number(text)) <= 10**8:
        raise ArgumentTypeError(f"got {text}, expected seconds, more than 0")
    return value


def models(args: Namespace, call: Call) -> None:
    """One line for each model: what to give to --model, where it is, how large it is, its
    folder."""
    from ..checkpoints import sources

    for name, folder in sources.bundled().items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}\tbundled\t{in_bytes(size)}\t{folder}")
    cached = sources.cached()
    for model in cached:
        print(f"{model.source}\tHub cache\t{in_bytes(model.size)}\t{model.folder}")
    here = {model.source.split()[0] for model in cached}
    for name, repo in sources.SHORT_NAMES.items():
        if repo not in here:
            print(f"{name}\tnot here\t{sources.SIZES[None]}\tminisd fetch {name}")


def in_bytes(size: float) -> str:
    """1719125304 -> "1.7 GB"."""
    if size < 1000:
        return f"{size} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def fetch(args: Namespace, call: Call) -> None:
    from ..checkpoints import sources

    if (repo := sources.hub_repo(args.repo)) is None:
        expected = f"owner/name, or {', '.join(sources.SHORT_NAMES)}"
        raise ValueError(f"{args.repo!r} is no Hub repo: expected {expected}")
    to = None if args.to is None else Path(args.to)
    call.before_writing()
    with deadline(args.deadline):
        pipeline, commit = sources.pipeline_of(repo, args.revision)
        if pipeline == "DiTPipeline":
            folder = fetch_dit(repo, args, commit, to)
        else:
            folder = sources.download(repo, args.variant, commit, to=to, repair=True)
    expect_readable(folder)
    print(folder)


def fetch_dit(repo: str, args: Namespace, commit: str, to: Path | None) -> Path:
    """The folder, and a line that says what draws with it, and of facebook's under what licence."""
    from ..checkpoints.dit import LICENCE, download_dit, locate_dit

    folder = download_dit(repo, args.variant, commit, to=to, repair=True)
    locate_dit(folder, variant=args.variant)
    told = f"; {LICENCE}" if repo.startswith("facebook/DiT") else ""
    print(f"it is a DiT, for `minisd dit --model {to or repo}`{told}", file=sys.stderr)
    return folder


def expect_readable(folder: Path) -> None:
    """CheckpointError for what came and is no config, no vocabulary or no weights; whether they go
    together is for `minisd check`."""
    from ..checkpoints.header import read_header
    from ..checkpoints.kinds import kind_of_bytes, kind_of_tensors
    from ..checkpoints.sources import (
        CONFIGS,
        INDEX,
        VOCABULARY_FILES,
        WEIGHTS,
        CheckpointError,
    )

    small = [f"tokenizer/{name}" for name in (*VOCABULARY_FILES, "tokenizer.json")]
    for path in [folder / name for name in (*CONFIGS, INDEX, *small)]:
        if path.is_file() and path.suffix == ".json":
            try:
                is_config = isinstance(json.loads(path.read_bytes()), dict)
            except (ValueError, RecursionError):
                is_config = False
            if not is_config:
                raise CheckpointError(f"{path} came, and is no JSON object")
        elif path.is_file() and (kind := kind_of_bytes(path.read_bytes()[:64])):  # merges.txt
            raise CheckpointError(f"{path} came, and {kind}")
    for path in [path for part in WEIGHTS for path in sorted(folder.glob(f"{part}/*.safetensors"))]:
        shapes = {name: entry.shape for name, entry in read_header(path).items()}
        kind = kind_of_tensors(shapes)
        if kind is not None and not kind.endswith("alone"):
            raise CheckpointError(f"{path} came, and is {kind}")


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """TimeoutError when what is inside takes longer."""
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer"):
        raise ValueError("--deadline: this system has no timer for it")

    class Late(BaseException):
        """No Exception, which the library takes for a connection that broke, and tries again."""

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Late:
        kept = "what came is kept, and the next fetch goes on from there"
        raise TimeoutError(f"not all of it came in {seconds:g} seconds; {kept}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def export(args: Namespace, call: Call) -> None:
    from ..checkpoints.export import export, export_single_file

    check_place("--to", Path(args.to))
    write = export_single_file if args.single_file else export
    checkpoint = ModelRequest.of(args, args.model).locate()
    call.before_writing()
    write(checkpoint, args.to, args.dtype)
    print(args.to)


def check(args: Namespace, call: Call) -> None:
    from ..checkpoints.check import check_files, check_image, digests, is_v1_4
    from ..checkpoints.load import load_parts
    from ..checkpoints.sources import CheckpointError, hub_repo
    from ..pipeline import StableDiffusion, pick_device, pick_dtype

    device = pick_device(args.device)
    checkpoint = ModelRequest.of(args, args.source).locate()
    sums = digests(checkpoint)
    wrong = report(check_files(checkpoint, sums, hub_repo(args.source)))
    if not wrong:
        sd = StableDiffusion(*load_parts(checkpoint, device, pick_dtype(None, device)))
        wrong = report(check_image(sd, is_v1_4(sums)))
    if wrong:
        raise CheckpointError(f"{args.source}: {wrong} of these are wrong")


def report(findings: Iterable[Finding]) -> int:
    """Print each as it is found; how many are wrong."""
    wrong = 0
    for verdict, line in findings:
        wrong += verdict is False
        print(f"{'-' if verdict is None else 'ok' if verdict else 'WRONG':6}{line}", flush=True)
    return wrong
