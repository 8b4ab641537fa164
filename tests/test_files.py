"""Files and folders that are complete or not there, and the folders made for them."""

import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from minisd.files import atomic_folder, atomic_write, new_folder, write_new


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, SystemExit])
def test_a_file_is_complete_or_as_it_was(tmp_path, failure):
    def write(path, fail=False):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            if fail:
                raise failure
            temporary.write_text("complete")

    with pytest.raises(failure):
        write(tmp_path / "a" / "b" / "new.txt", fail=True)
    assert list(tmp_path.iterdir()) == []  # nor the folders made for it
    write(tmp_path / "a" / "b" / "file.txt")
    with pytest.raises(failure):
        write(tmp_path / "a" / "b" / "file.txt", fail=True)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file.txt"]
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "complete"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_written_through_a_link_with_ordinary_rights(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "fresh") as temporary:
        temporary.write_text("new")
    assert mode(tmp_path / "old") == mode(tmp_path / "plain") == mode(tmp_path / "fresh")
    assert write_new([tmp_path / "next"], lambda path: path.write_text("")) == tmp_path / "next"
    assert mode(tmp_path / "next") == mode(tmp_path / "plain")


@pytest.mark.parametrize("rights", [0o600, 0o664, 0o444, 0o755])
def test_a_file_that_is_overwritten_keeps_its_mode(tmp_path, rights):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(rights)
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert mode(tmp_path / "a") == rights and (tmp_path / "a").read_text() == "new"


def test_a_file_that_somebody_has_open_stays_what_it_was(tmp_path):
    """What is mapped, a checkpoint say, is never written into."""
    (tmp_path / "a").write_text("old")
    with open(tmp_path / "a") as file:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("new")
        assert file.read() == "old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    before = tree(tmp_path)
    for name in ("pipe", "link", "null"):
        with (
            pytest.raises(ValueError, match=f"{name} is a pipe or a device, expected a file"),
            atomic_write(tmp_path / name),
        ):
            raise AssertionError("begun")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and tree(tmp_path) == before
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_folders_that_are_in_use_stay(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
        raise OSError
    assert tree(tmp_path) == ["a", "a/kept"]


# a name that is free


WRITER = """
import sys
from pathlib import Path
from minisd.files import write_new
folder, who = Path(sys.argv[1]), sys.argv[2]
for i in range(25):
    names = (folder / f"{n:05}" for n in range(1000))
    print(write_new(names, lambda path: path.write_text(f"{who} {i} " * 1000)))
"""


def test_four_processes_that_take_the_next_free_name_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "new")]
    running = [
        subprocess.Popen([*command, str(who)], stdout=subprocess.PIPE, text=True)
        for who in range(4)
    ]
    printed = [process.communicate()[0].splitlines() for process in running]
    assert sorted(itertools.chain(*printed)) == [f"{tmp_path}/new/{n:05}" for n in range(100)]
    contents = {path.read_text() for path in (tmp_path / "new").iterdir()}
    assert contents == {f"{who} {i} " * 1000 for who in range(4) for i in range(25)}


def test_threads_that_write_the_same_names_leave_whole_files(tmp_path):
    """Names of 60 characters that begin alike: temporary names were cut, and collided."""

    def write(job):
        name, who = job % 5, job
        with atomic_write(tmp_path / f"{'n' * 60}{name}") as temporary:
            for _ in range(50):
                with open(temporary, "a") as file:
                    file.write(f"{who} ")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(200)))
    assert len(tree(tmp_path)) == 5
    for path in tmp_path.iterdir():
        words = path.read_text().split()
        assert len(words) == 50 and len(set(words)) == 1


def test_a_name_that_is_taken_is_left_alone_without_hard_links_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    names = [tmp_path / name for name in ("a", "dangling", "b")]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for link in (os.link, no_links):
        monkeypatch.setattr(os, "link", link)
        (tmp_path / "a").write_text("theirs")
        assert write_new(names, lambda path: path.write_text("ours")) == tmp_path / "b"
        assert (tmp_path / "a").read_text() == "theirs" and not (tmp_path / "nowhere").exists()
        assert (tmp_path / "b").read_text() == "ours"
        with pytest.raises(FileExistsError, match="a is there already"):
            write_new(names, lambda path: path.write_text("ours"))
        (tmp_path / "b").unlink()
    assert tree(tmp_path) == ["a", "dangling"]


# folders


def fill(temporary):
    for name in ("unet/config.json", "model_index.json", "vae/config.json", "a"):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text("whole")


FILLED = ["a", "model_index.json", "unet", "unet/config.json", "vae", "vae/config.json"]


def places(tmp_path):
    """Names under which a folder may be asked for -> the folder it is."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("elsewhere/nothing")
    return {
        "new/folder": "new/folder",
        "empty": "empty",
        "link": "empty",
        "dangling": "elsewhere/nothing",
        "empty/.": "empty",
        ".": ".",
    }


@pytest.mark.parametrize("name", ["new/folder", "empty", "link", "dangling", "empty/.", "."])
def test_a_folder_is_filled_where_its_name_leads(tmp_path, monkeypatch, name):
    real = places(tmp_path)[name]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here" if name == "." else tmp_path)
    real = tmp_path / "here" if name == "." else tmp_path / real
    before = tree(tmp_path)
    for failure in (KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, OSError)), atomic_folder(name, "a") as temporary:
            fill(temporary)
            raise failure
        assert tree(tmp_path) == before
    with atomic_folder(name, "model_index.json") as temporary:
        fill(temporary)
    assert tree(real) == FILLED and mode(real) == mode(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        with atomic_folder(name, "a"):
            raise AssertionError("it was begun")


def test_an_empty_folder_is_filled_last_entry_last_or_not_at_all(tmp_path, monkeypatch):
    moved, rename = [], os.rename

    def logged(old, new):
        moved.append(new.name)
        if len(moved) == 3:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", logged)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path, "model_index.json") as temporary:
        fill(temporary)
    assert tree(tmp_path) == []
    with atomic_folder(tmp_path, "model_index.json") as temporary:
        fill(temporary)
    assert moved[-1] == "model_index.json" and tree(tmp_path) == FILLED


def test_two_that_fill_one_empty_folder_do_not_take_from_each_other(tmp_path):
    """The later one fails, and what is there is the other's, whole."""
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(OSError, match="target"), atomic_folder(target, "model_index.json") as mine:
        fill(mine)
        (mine / "vae" / "config.json").write_text("mine")
        with atomic_folder(target, "model_index.json") as theirs:
            fill(theirs)
            (theirs / "a").unlink()
        (mine / "a").unlink()
    assert tree(target) == [name for name in FILLED if name != "a"]
    assert (target / "vae" / "config.json").read_text() == "whole"


def test_what_a_killed_process_left_is_nothing(tmp_path):
    (tmp_path / ".abcdefgh.part").mkdir()
    (tmp_path / ".abcdefgh.part" / "half").write_text("")
    with atomic_folder(tmp_path, "a") as temporary:
        fill(temporary)
    assert tree(tmp_path)[2:] == FILLED


# mount points and full disks


MOUNTED = """
set -e
mount -t tmpfs -o size=200k none disk
touch disk/outside.png file.png
mount --bind disk/outside.png file.png
rm disk/outside.png
mkdir disk/empty
mount -t tmpfs none point
exec "$@"
"""
ON_MOUNTS = """
from pathlib import Path
from minisd.files import atomic_folder, atomic_write, write_new
with atomic_write("file.png") as temporary:
    temporary.write_text("image")
assert Path("file.png").read_text() == "image"
with atomic_folder("point", "last") as temporary:
    (temporary / "last").write_text("whole")
for write in (lambda p: atomic_write(p), lambda p: atomic_folder(p, "a")):
    try:
        with write("disk/big") as temporary:
            (temporary / "a" if temporary.is_dir() else temporary).write_bytes(bytes(10**6))
        raise AssertionError("there was room")
    except OSError as error:
        assert str(error) == "[Errno 28] No space left on device: 'disk/big'", error
try:
    write_new([Path("disk/a.png")], lambda path: path.write_bytes(bytes(10**6)))
except OSError as error:
    assert str(error) == "[Errno 28] No space left on device: 'disk/a.png'", error
assert [path.name for path in Path("disk").iterdir()] == ["empty"]
"""


def has_mounts():
    if not shutil.which("unshare"):
        return False
    run = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(run, capture_output=True).returncode == 0


@pytest.mark.skipif(not has_mounts(), reason="mounts need rights that this process does not have")
def test_mount_points_and_a_full_disk(tmp_path):
    for name in ("disk", "point"):
        (tmp_path / name).mkdir()
    command = ["unshare", "-m", "bash", "-c", MOUNTED, "bash", sys.executable, "-c", ON_MOUNTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_write_that_fails_names_the_path(tmp_path):
    path = tmp_path / "out.png"
    failures = [
        (OSError(errno.EIO, "Input/output error"), f"[Errno 5] Input/output error: '{path}'"),
        (OSError("encoder error -2"), f"{path} cannot be written: encoder error -2"),
    ]
    for failure, message in failures:
        with pytest.raises(OSError) as caught, atomic_write(path):
            raise failure
        assert str(caught.value) == message
    with pytest.raises(FileNotFoundError, match=f"'{path}'"), atomic_write(path):
        pass  # nothing was written
    with pytest.raises(FileNotFoundError, match="'/nowhere'"), atomic_write(path):
        open("/nowhere")  # of another file
    assert tree(tmp_path) == []
