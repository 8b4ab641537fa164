"""A tenth of what soak.py runs for long, by seed; and what the fuzz once found."""

import os
import subprocess
import sys

import fuzz_readers
import pytest
import soak

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_part_of_the_fuzz_of_every_reader(record_property):
    figures, failures = fuzz_readers.run(1350, seed=1, keep=False)
    record_property("fuzz of every reader: inputs", sum(figures.values()))
    record_property("fuzz of every reader: failures", len(failures))
    assert failures == [] and sum(figures.values()) == 1350
    for reader in fuzz_readers.READERS:  # each is tried, and refuses some
        assert figures[f"{reader} refused"] > 5, figures
    read = [reader for reader in fuzz_readers.READERS if figures.get(f"{reader} read", 0) > 5]
    assert len(read) == len(fuzz_readers.READERS), figures


FOUND = [
    (reader, path)
    for reader in fuzz_readers.READERS
    for path in sorted((fuzz_readers.CORPUS / reader).glob("found-*"))
]


def test_what_the_fuzz_found(tmp_path):
    for reader, path in FOUND:
        (tmp_path / reader).mkdir(exist_ok=True)
        fuzz_readers.read_or_refused(reader, path.read_bytes(), tmp_path / reader)


@pytest.mark.full
def test_a_tenth_of_the_fuzz():
    figures, fine = soak.fuzz(0.1, seed=2)
    assert fine, figures


@pytest.mark.full
@only_linux
def test_one_process_draws_on_and_on():
    figures, fine = soak.draw(0.1, seed=0)
    assert fine, figures


@pytest.mark.full
def test_many_draw_into_one_folder():
    figures, fine = soak.share_folder(0.1, seed=0)
    assert fine, figures


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
def test_killed_processes_leave_no_half_file():
    """In a process of its own: here other tests have started threads."""
    done = subprocess.run(
        [sys.executable, soak.__file__, "kill", "--share", "0.1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "half files: []" in done.stdout
