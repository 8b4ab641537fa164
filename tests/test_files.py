"""Files that are complete or not there, and the folders made for them."""

import stat

import pytest

from minisd.files import atomic_write, new_folder


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


def test_a_file_is_written_through_a_link_with_ordinary_rights(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_folders_that_are_in_use_stay(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
        raise OSError
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a",
        "a/kept",
    ]
