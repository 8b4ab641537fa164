"""Who draws the pieces: processes of this machine, Ray's actors, or the ranks of torchrun.

Each is a function of the pieces that yields what became of each, in any order; a worker loads the
model once. What is drawn is the same with each of them: a piece is one call, whoever makes it, and
who dies is replaced, its piece drawn by another.
"""

import multiprocessing as mp
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .rows import Failure, Job
from .work import Done, clean, close, place, work, write_failure

Load = Callable[[str | None], Any]  # device -> StableDiffusion; it is pickled
Piece = Sequence[Job]
TRIES = 5  # deaths of workers over one piece, after which its rows have failed
MOST_BLOCKS = 10_000  # of Ray Data's table of pieces
LOADS = 20  # deaths of workers one after the other before they are ready, after which all ends


@dataclass
class Worker:
    """A process that draws pieces; ready: it has loaded the model; has: the piece that it draws."""

    process: Any
    pipe: Connection
    number: int
    ready: bool = False
    has: tuple[int, Piece] | None = None


@dataclass
class Local:
    """Processes of this machine, `workers` of them; `restarts` counts those that died."""

    load: Load
    folder: Path
    workers: int
    devices: Sequence[str | None]
    restarts: int = 0
    loads: int = 0  # deaths while loading, since a worker was last ready
    deaths: dict[int, int] = field(default_factory=dict)  # over each piece

    def __call__(self, pieces: Sequence[Piece]) -> Iterator[Done]:
        todo = deque(enumerate(pieces))
        crew = [self.start(i) for i in range(min(self.workers, len(pieces)))]
        try:
            while todo or any(worker.has for worker in crew):
                for worker in crew:
                    if worker.ready and worker.has is None and todo:
                        worker.has = todo.popleft()
                        with suppress(OSError):  # it is dead, which its pipe will tell
                            worker.pipe.send(worker.has[1])
                ready = wait([worker.pipe for worker in crew])
                for i, worker in enumerate(crew):
                    if worker.pipe in ready:
                        answer = heard(worker)
                        if isinstance(answer, Exception):
                            raise answer
                        if answer is None:
                            yield from self.lost(worker, todo)
                            crew[i] = self.start(worker.number)
                        else:
                            worker.ready, worker.has, self.loads = True, None, 0
                            yield from [answer] if isinstance(answer, Done) else []
        finally:
            for worker in crew:
                worker.process.kill()
                worker.process.join()
            clean(self.folder)

    def start(self, number: int) -> Worker:
        ours, theirs = mp.get_context("spawn").Pipe()
        device = self.devices[number % len(self.devices)]
        threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // self.workers))
        arguments = theirs, self.load, device, str(self.folder), threads
        process = mp.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        return Worker(process, ours, number)

    def lost(self, worker: Worker, todo: "deque[tuple[int, Piece]]") -> Iterator[Done]:
        """A worker has died: its piece goes to another, unless it kills them all."""
        worker.process.join()
        self.restarts += 1
        clean(self.folder)
        code = worker.process.exitcode
        if not worker.ready:
            self.loads += 1
            if self.loads >= LOADS:
                raise RuntimeError(f"{LOADS} workers died as they loaded, with exit code {code}")
        if worker.has is None:
            return
        i, piece = worker.has
        self.deaths[i] = self.deaths.get(i, 0) + 1
        if self.deaths[i] < TRIES:
            todo.appendleft((i, piece))
            return
        reason = f"{TRIES} workers died over it, the last with exit code {code}"
        missing = [job for job in piece if not place(self.folder, job).exists()]
        failed = [Failure(job.row, job.id, reason, dict(job.arguments)) for job in missing]
        for failure in failed:
            write_failure(self.folder, failure)
        yield Done([], [], failed)


def heard(worker: Worker) -> Any:
    """What a worker says: that it is ready, a Done, or its error; None: it is dead."""
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        return None


def serve(pipe: Connection, load: Load, device: str | None, folder: str, threads: int) -> None:
    """A worker: load the model, then draw pieces until nobody asks any more."""
    torch.set_num_threads(threads)
    try:
        sd = load(device)
        pipe.send("ready")
        while True:
            pipe.send(work(sd, pipe.recv(), Path(folder)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(error)


def torchrun(load: Load, folder: Path, pieces: Sequence[Piece]) -> Iterator[Done]:
    """The pieces of this rank, under `torchrun --nproc-per-node N`: each N-th one.

    The ranks do not talk to each other. Where one dies, torchrun starts all anew, and what is there
    is skipped.
    """
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as error:
        expected = "expected the command to be started by torchrun"
        raise ValueError(f"--engine torchrun: {error} is not set, {expected}") from error
    local = int(os.environ.get("LOCAL_RANK", rank))
    sd = load(f"cuda:{local}" if torch.cuda.is_available() else None)
    for piece in pieces[rank::world]:
        yield work(sd, piece, folder)


def ray(load: Load, folder: Path, pieces: Sequence[Piece], workers: int) -> Iterator[Done]:
    """Ray Data: a pool of actors over the pieces. An actor that dies is started again, and its
    pieces are handed out again, of which it finds what it drew.

    Pieces and answers travel pickled, since what Ray keeps are Arrow tables. Ray's own progress is
    silent. One block is one task: few pieces each, so that little is asked for twice.
    """
    try:
        _ray: Any = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray[data]: pip install it") from error

    class Actor:
        def __init__(self) -> None:
            self.sd = load(None)

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            done = [work(self.sd, pickle.loads(piece), folder) for piece in rows["piece"]]
            close(folder)
            return {"done": [pickle.dumps(each) for each in done]}

    ours = not _ray.is_initialized()
    if ours:
        _ray.init(include_dashboard=False, logging_level="warning")
    try:
        _ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
        blocks = min(len(rows), MOST_BLOCKS)
        gpus = {"num_gpus": 1} if torch.cuda.is_available() else {}
        pool = _ray.data.ActorPoolStrategy(size=workers)  # restarts and retries without end
        found = _ray.data.from_items(rows, override_num_blocks=blocks)
        for row in found.map_batches(Actor, batch_size=1, compute=pool, **gpus).iter_rows():
            yield pickle.loads(row["done"])
    finally:
        if ours:
            _ray.shutdown()
        clean(folder)
