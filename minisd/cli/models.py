"""The commands about models: `minisd models`, `fetch`, `export` and `check`."""

from pathlib import Path

SOURCE = "bundled name, Hub repo id or sd-v1-4 or sd-v1-5, folder or .safetensors file"


def add_commands(command) -> None:
    """command(name, run, help) -> the parser of a new command."""
    command("models", models, "list the models at hand: bundled, and in the local Hub cache")

    parser = command(
        "fetch", fetch, "download a model from the Hub, the files that are needed and no other"
    )
    parser.add_argument("repo", help="Hub repo id, or sd-v1-4 or sd-v1-5")
    parser.add_argument("--to", metavar="DIR", help="a folder for it; without it, the Hub's cache")
    add_source_options(parser, local=False)

    parser = command(
        "export", export, "write a model in diffusers layout, or as one file in CompVis' layout"
    )
    parser.add_argument("--model", default="sd-v1-4", help=SOURCE)
    parser.add_argument(
        "--to", metavar="PATH", required=True, help="a new folder, or a new .safetensors file"
    )
    parser.add_argument(
        "--single-file", action="store_true", help="one .safetensors file in CompVis' layout"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="without it, that of the files"
    )
    add_source_options(parser)
    add_tokenizer_option(parser)

    parser = command(
        "check",
        check,
        "verify a model's files, names, shapes and values, and draw a picture with it",
    )
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one")
    add_source_options(parser)
    add_tokenizer_option(parser)


def add_source_options(parser, local=True) -> None:
    parser.add_argument("--variant", help="weight files of that variant, e.g. fp16")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    if local:
        parser.add_argument(
            "--local-files-only",
            action="store_true",
            help="do not ask the Hub, use its local cache",
        )


def add_tokenizer_option(parser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with vocab.json and merges.txt, for a single file",
    )


def models(args) -> None:
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


def in_bytes(size: int) -> str:
    """1719125304 -> "1.7 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            break
        size /= 1000
    return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"


def fetch(args) -> None:
    from ..checkpoints import sources

    if (repo := sources.hub_repo(args.repo)) is None:
        raise ValueError(
            f"{args.repo!r} is no Hub repo: expected owner/name, or {', '.join(sources.SHORT_NAMES)}"
        )
    print(
        sources.download(
            repo, args.variant, args.revision, to=None if args.to is None else Path(args.to)
        )
    )


def located(args, source: str):
    from ..checkpoints.load import locate

    return locate(
        source,
        variant=args.variant,
        revision=args.revision,
        local_files_only=args.local_files_only,
        tokenizer=args.tokenizer,
    )


def export(args) -> None:
    from ..checkpoints.export import export, export_single_file
    from .main import check_place

    check_place("--to", Path(args.to))
    write = export_single_file if args.single_file else export
    found = located(args, args.model)
    args.before_writing()
    write(found, args.to, args.dtype)
    print(args.to)


def check(args) -> None:
    from ..checkpoints.check import check_files, check_image, digests, is_v1_4
    from ..checkpoints.load import CheckpointError, load_parts
    from ..checkpoints.sources import hub_repo
    from ..pipeline import StableDiffusion, pick_device, pick_dtype

    device = pick_device(args.device)
    found = located(args, args.source)
    failures = 0

    def report(findings) -> None:
        nonlocal failures
        for verdict, line in findings:
            failures += verdict is False
            print(f"{'-' if verdict is None else 'ok' if verdict else 'WRONG':6}{line}", flush=True)

    of_files = digests(found)
    report(check_files(found, of_files, hub_repo(args.source)))
    if not failures:
        sd = StableDiffusion(*load_parts(found, device, pick_dtype(None, device)))
        report(check_image(sd, is_v1_4(of_files)))
    if failures:
        raise CheckpointError(f"{args.source}: {failures} of these are wrong")
