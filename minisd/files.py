"""Files and folders that are complete or not there.

What is being written lies in a folder of its own, `.xxxxxxxx.part`, beside where it will be: no two
threads, processes or containers get the same one. It takes its name when it is complete. Nothing
that has a name is written into, so a file that another process has mapped stays what it was.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic_write(path) as temporary`: write the file `temporary`; then it becomes `path`.

    If that fails or is interrupted, nothing is left behind, and an older file of that name is as it
    was; else the new file has the older one's mode. An OSError names `path`. ValueError for a pipe
    or a device, which nothing can take the place of.
    """
    target = Path(os.path.realpath(path))  # through a link: replace what it points to
    if target.exists():
        expect_file(path)
    with new_folder(target.parent), _unfinished(path, target.parent) as folder:
        yield (temporary := folder / target.name)
        if target.exists():
            shutil.copymode(target, temporary)
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # A file that is a mount point, as in a container, can only be written into.
            shutil.copyfile(temporary, target)


def write_new(names: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """write(temporary) a file, then give it the first of `names` that is free -> that name.

    names: of one folder. Who takes names from the same series at the same time gets others, for a
    name is taken together with its file. FileExistsError if none is free.
    """
    names = iter(names)
    first = next(names)
    with new_folder(first.parent), _unfinished(first, first.parent) as folder:
        write(temporary := folder / first.name)
        for path in chain([first], names):
            with suppress(FileExistsError):
                _claim(temporary, path)
                return path
    raise FileExistsError(f"{first} is there already")


def _claim(temporary: Path, path: Path) -> None:
    """Name a file; FileExistsError if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: first an empty file, which nobody else gets
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """`with atomic_folder(path, last) as temporary`: fill the folder `temporary`; then it becomes
    `path`.

    FileExistsError unless `path` is new or an empty folder. An empty one that is there stays, for
    it may be a mount point or the working folder: what was written moves into it, the entry named
    `last` after all others. If that fails or is interrupted, nothing is left behind.
    """
    target = Path(os.path.realpath(path))  # through a link, be there something behind it or not
    is_there = os.path.lexists(target)
    if is_there and not (target.is_dir() and all(map(_is_unfinished, target.iterdir()))):
        raise FileExistsError(f"{path} is there already, expected a new or an empty folder")
    place = target if is_there else target.parent
    with new_folder(place), _unfinished(path, place) as folder:
        (temporary := folder / "new").mkdir()
        yield temporary
        if not is_there:
            os.rename(temporary, target)
            return
        entries = sorted(temporary.iterdir(), key=lambda each: (each.name == last, each.name))
        try:
            for each in entries:
                os.rename(each, target / each.name)  # fails on what another process has moved there
        except BaseException:
            for each in entries:
                if not each.exists():  # it was moved, and is ours
                    (target / each.name).rename(each)  # to where all of it goes
            raise


def expect_file(path: str | os.PathLike[str]) -> None:
    """OSError or ValueError unless a path leads to a file: a pipe would be waited for."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise ValueError(f"{os.fspath(path)} is a pipe or a device, expected a file")


def _is_unfinished(path: Path) -> bool:
    """Whether it is what a process that was killed has left, or another is writing."""
    return path.name.startswith(".") and path.suffix == ".part"


@contextmanager
def _unfinished(path: str | os.PathLike[str], parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for what will be `path`; an OSError inside says that, and no name
    in it."""
    try:
        # Cleaned up also where an interrupt comes before `with` has begun.
        with tempfile.TemporaryDirectory(
            prefix=".", suffix=".part", dir=parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        hidden = os.path.join(os.path.abspath(parent), ".")
        own = error.filename is None or str(error.filename).startswith(hidden)
        if not own or isinstance(error, FileExistsError):
            raise
        if error.errno is None:  # Pillow's own
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; if what follows fails, remove those of them that are empty."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in new:
            with suppress(OSError):  # it is in use, or was not made
                each.rmdir()
        raise
