"""The command `minisd batch`: many images, of a file of rows."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    DTYPES,
    SOURCE,
    AddCommand,
    Call,
    ModelRequest,
    add_adapter_options,
    add_model_options,
    positive,
)

if TYPE_CHECKING:
    from ..batch.rows import Failure
    from ..batch.work import Done
    from ..pipeline import StableDiffusion

ENGINES = ("local", "ray", "torchrun")


def add_commands(command: AddCommand) -> None:
    parser = command("batch", batch, "draw many images, each a row of a file of JSON lines")
    add = parser.add_argument
    add("rows", help="a file with an object in each line: its prompt, options, method")
    add("--to", metavar="DIR", required=True, help="the folder of the images")
    who = "processes of this machine, Ray's actors, or the ranks of torchrun"
    add("--engine", choices=ENGINES, default="local", help=who)
    how_many = "processes or actors; without it one for each GPU, or 1"
    add("--workers", type=positive, metavar="N", help=how_many)
    together = "images of equal shapes that are drawn in one call"
    add("--batch-size", type=positive, default=1, metavar="N", help=together)
    add("--model", default="sd-v1-4", help=SOURCE)
    add("--device", help="cpu, cuda, ...; without it, cuda if there is one")
    add("--dtype", choices=DTYPES, help="without it, float16 on CUDA and float32 elsewhere")
    add_model_options(parser)
    add_adapter_options(parser)


@dataclass(frozen=True)
class LoadModel:
    """How a worker loads the model: load(device), picklable."""

    model: ModelRequest
    device: str | None
    dtype: str | None

    def __call__(self, device: str | None) -> StableDiffusion:
        from .output import load_request

        return load_request(self.model, device or self.device, self.dtype)


def batch(args: Namespace, call: Call) -> None:
    from ..batch.rows import Failure, Job, pieces, read
    from ..batch.work import Done, clean, close, place, write_failure
    from ..files import atomic_write

    model, folder = ModelRequest.of(args, args.model), Path(args.to)
    found = list(read(Path(args.rows), {**model.told(), "dtype": args.dtype}))
    jobs: dict[str, Job] = {}
    for each in found:
        if isinstance(each, Job):
            jobs.setdefault(each.id, each)  # equal rows are one image
    failed = [each for each in found if isinstance(each, Failure)]
    engine = engine_of(args, LoadModel(model, args.device, args.dtype), folder)
    call.before_writing()
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    try:
        for failure in failed:
            write_failure(folder, failure)
        with atomic_write(folder / "index.jsonl") as temporary:
            lines = [json.dumps({"row": each.row, "id": each.id}) + "\n" for each in found]
            temporary.write_text("".join(lines), encoding="utf-8")
        if all(place(folder, job).exists() for job in jobs.values()):  # the model is not needed
            done: Iterable[Done] = [Done([], list(jobs), [])]
        else:
            done = engine(pieces(list(jobs.values()), args.batch_size))
        draw_all(done, len(jobs), failed, engine)
    finally:
        close(folder)


def draw_all(done: Iterable[Done], images: int, failed: list[Failure], engine: Any) -> None:
    """Under a progress bar what becomes of the rows, then in a line what became of all."""
    from tqdm import tqdm

    start, drawn, there = time.monotonic(), 0, 0
    with tqdm(total=images, unit="image") as bar:
        for each in done:
            drawn, there = drawn + len(each.drawn), there + len(each.there)
            failed.extend(each.failed)
            bar.update(len(each.drawn) + len(each.there) + len(each.failed))
    seconds = time.monotonic() - start
    rate = f" in {seconds:.0f} s, {drawn / seconds:.2f} images/s" if drawn else ""
    restarts = getattr(engine, "restarts", 0)
    died = f", {restarts} workers died and were replaced" if restarts else ""
    print(f"{drawn} drawn{rate}, {there} there already, {len(failed)} failed{died}")
    if failed:
        first = failed[0]
        why = f"row {first.row}: {first.error}"
        raise ValueError(f"{len(failed)} rows failed, each with its ID.error.json; {why}")


def engine_of(args: Namespace, load: LoadModel, folder: Path) -> Any:
    """The engine as a function of the pieces."""
    import torch

    from ..batch import engines

    gpus = torch.cuda.device_count() if args.device in (None, "cuda") else 0
    workers = args.workers or max(gpus, 1)
    if args.engine == "ray":
        return lambda pieces: engines.ray(load, folder, pieces, workers)
    if args.engine == "torchrun":
        return lambda pieces: engines.torchrun(load, folder, pieces)
    devices = [f"cuda:{i}" for i in range(gpus)] or [args.device]
    return engines.Local(load, folder, workers, devices)
