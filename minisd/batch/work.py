"""Drawing a piece of the rows: skip what is there, draw the rest, write each image at once.

An image is written into a folder of the worker's own and then moved to its name, so that a file
which has its name is whole, and a worker that was killed leaves nothing but its folder, which
`clean` removes.
"""

import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..editing.perturbed import pag
from ..editing.prompt_to_prompt import edit_prompt
from ..recipes import save
from .rows import INTERVALS, Failure, Job

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion

OWN = ".worker-"  # folders of workers: .worker-HOST-SPACE-PID


@dataclass(frozen=True)
class Done:
    """What became of a piece: ids that were drawn, ids that were there, failures."""

    drawn: list[str]
    there: list[str]
    failed: list[Failure]


def work(sd: "StableDiffusion", piece: Sequence[Job], folder: Path) -> Done:
    """Draw what is missing of a piece. Where a call fails, its rows are drawn one by one, so that
    one of them does not take the others with it."""
    missing = [job for job in piece if not place(folder, job).exists()]
    there = [job.id for job in piece if job not in missing]
    if not missing:
        return Done([], there, [])
    try:
        # The whole piece: the last bits of its images depend on each other.
        images = dict(zip((job.id for job in piece), draw(sd, piece)))
    except Exception as error:  # whatever it is, the other rows do not depend on it
        if len(piece) > 1:
            each = [work(sd, [job], folder) for job in missing]
            drawn = [id for done in each for id in done.drawn]
            return Done(drawn, there, [failure for done in each for failure in done.failed])
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        [job] = piece
        failure = Failure(job.row, job.id, reason, {"method": job.method, **job.arguments})
        write_failure(folder, failure)
        return Done([], there, [failure])
    for job in missing:
        write(folder, job, images[job.id])
    return Done([job.id for job in missing], there, [])


def draw(sd: "StableDiffusion", piece: Sequence[Job]) -> list[Image.Image]:
    """The images of jobs of equal shapes, in one call."""
    jobs = [dict(job.arguments) for job in piece]
    method, how = piece[0].method, dict(jobs[0], progress=False)
    if (scale := how.pop("pag", None)) is not None:
        how["rule"] = partial(pag, pag_scale=scale)
    if len(piece) > 1:
        how["prompt"] = [job["prompt"] for job in jobs]
        how["seed"] = [job.get("seed", 0) for job in jobs]
        how["negative_prompt"] = [job.get("negative_prompt", "") for job in jobs]
    if method == "txt2img":
        return sd.txt2img(**how)
    if method == "img2img":
        return sd.img2img(**how)
    for name in INTERVALS:
        if name in how:
            how[name] = as_interval(how[name])
    return edit_prompt(sd, how.pop("source"), how.pop("target"), **how)[-1:]


def as_interval(value: Any) -> Any:
    """JSON's [0.2, 0.8] as (0.2, 0.8), in the values of a dict, too."""
    if isinstance(value, dict):
        return {word: as_interval(each) for word, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


# files


def place(folder: Path, job: Job) -> Path:
    return folder / f"{job.id}.png"


def write(folder: Path, job: Job, image: Image.Image) -> None:
    own = own_folder(folder)
    own.mkdir(exist_ok=True)
    save(image, own / place(folder, job).name)
    os.replace(own / place(folder, job).name, place(folder, job))
    (folder / f"{job.id}.error.json").unlink(missing_ok=True)


def write_failure(folder: Path, failure: Failure) -> None:
    own = own_folder(folder)
    own.mkdir(exist_ok=True)
    temporary = own / f"{failure.id}.error.json"
    temporary.write_text(failure.as_json() + "\n", encoding="utf-8")
    os.replace(temporary, folder / temporary.name)


def own_folder(folder: Path, pid: int | None = None) -> Path:
    """Where the worker of that process writes, this one's without a pid."""
    return folder / f"{OWN}{host()}-{os.getpid() if pid is None else pid}"


def host() -> str:
    """What a pid belongs to: this machine, and its space of pids, of which containers that share
    the machine's name have one each."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # Linux: pid:[4026531836]
    except OSError:
        space = ""
    return f"{socket.gethostname()}-{''.join(filter(str.isdecimal, space))}"


def clean(folder: Path) -> None:
    """Remove what workers of this host left that are no more."""
    for own in folder.glob(f"{OWN}{host()}-*"):
        pid = own.name.rpartition("-")[2]
        if pid.isdecimal() and not is_alive(int(pid)):
            shutil.rmtree(own, ignore_errors=True)


def close(folder: Path) -> None:
    """Remove this process's own folder."""
    shutil.rmtree(own_folder(folder), ignore_errors=True)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
