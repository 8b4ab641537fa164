"""Files and folders that are complete or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic_write(path) as temporary`: write the file `temporary`; then it becomes `path`.

    If that fails or is interrupted, nothing is left behind, and an older file of that name is as it
    was.
    """
    target = Path(os.path.realpath(path))  # through a link: replace what it points to
    # Shortened, because a name may be as long as the system allows.
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.part")
    with new_folder(target.parent):
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; if what follows fails, remove those of them that are empty."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in new:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
        raise
