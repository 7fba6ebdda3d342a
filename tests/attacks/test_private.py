"""What others own or can write to is refused; what is made beside it is ours, new and whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbdproxy.errors import UnsafeFolderError
from nbdproxy.private import check_folder, new_file, new_folder, open_folder
from tests.support.strangers import lay_open


def folder(path: Path, mode: int = 0o755) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def test_a_folder_of_ones_own_in_tmp_is_safe(tmp_path: Path) -> None:
    check_folder(folder(tmp_path / "mine"))
    check_folder(Path("/tmp"))  # others can add names to it, and no more


def test_a_folder_of_somebody_else_is_not_safe_nor_is_what_is_in_it(tmp_path: Path) -> None:
    mine = folder(tmp_path / "theirs" / "mine")
    theirs = lay_open(tmp_path / "theirs")
    for path in (theirs, mine):
        with pytest.raises(UnsafeFolderError, match=str(theirs)):
            check_folder(path)


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o757])
def test_a_folder_that_others_can_write_to_is_not_safe(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UnsafeFolderError, match=f"chmod go-w {tmp_path}/open"):
        check_folder(folder(tmp_path / "open", mode))


def test_a_group_that_may_write_is_others_unless_it_is_the_owners_own(tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", 0o775)
    os.chown(mine, -1, os.getgid())
    if os.geteuid() == 0:
        check_folder(mine)  # the group root has nobody in it but root
        os.chown(mine, -1, 1)
        with pytest.raises(UnsafeFolderError, match="can write"):
            check_folder(mine)


def test_in_a_sticky_folder_others_can_still_add_a_recordings_files(tmp_path: Path) -> None:
    sticky = folder(tmp_path / "sticky", 0o1777)
    check_folder(sticky)
    with pytest.raises(UnsafeFolderError, match=r"can write to .*; name a new folder in it"):
        check_folder(sticky, sticky=False)
    check_folder(folder(sticky / "mine"), sticky=False)


def test_links_are_followed_if_they_are_ours_and_lead_to_what_is_safe(tmp_path: Path) -> None:
    mine, theirs = folder(tmp_path / "mine"), lay_open(folder(tmp_path / "theirs"))
    (tmp_path / "link").symlink_to("mine/../mine")
    (tmp_path / "absolute").symlink_to(mine)
    (tmp_path / "bad").symlink_to(theirs)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "absolute"):
        fd = open_folder(tmp_path / name)
        assert os.path.sameopenfile(fd, fd)
        assert os.fstat(fd).st_ino == mine.stat().st_ino
        os.close(fd)
    with pytest.raises(UnsafeFolderError, match="theirs"):
        check_folder(tmp_path / "bad")
    with pytest.raises(UnsafeFolderError, match="too many links"):
        check_folder(tmp_path / "loop")


def test_a_link_of_somebody_else_is_not_followed(tmp_path: Path) -> None:
    folder(tmp_path / "mine")
    sticky = folder(tmp_path / "sticky", 0o1777)
    (sticky / "link").symlink_to(tmp_path / "mine")
    check_folder(sticky / "link")
    if os.geteuid() == 0:
        os.chown(sticky / "link", 65534, 65534, follow_symlinks=False)
        with pytest.raises(UnsafeFolderError, match="nobody"):
            check_folder(sticky / "link")


def test_what_is_missing_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_folder(tmp_path / "a" / "b")
    os.close(open_folder(tmp_path / "a" / "b", make=True))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_folder(tmp_path / "file")


def test_a_new_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_file(target) as made:
        os.write(made.fd, b"secret")
        assert made.path.read_bytes() == b"secret"
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
        assert not target.exists()
        made.finish()
    assert target.read_bytes() == b"secret"
    with new_file(tmp_path / "never") as made:
        pass
    with new_folder(tmp_path / "run") as made:
        (made.path / "events").touch()
        made.finish()
    with new_folder(tmp_path / "dropped") as made:
        (made.path / "events").touch()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "run"]
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_a_name_that_was_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with new_file(tmp_path / "out") as made:
        (tmp_path / "out").symlink_to("/etc/passwd")
        with pytest.raises(FileExistsError):
            made.finish()
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_nothing_is_made_in_a_folder_of_somebody_else(tmp_path: Path) -> None:
    theirs = lay_open(folder(tmp_path / "theirs"))
    with pytest.raises(UnsafeFolderError), new_file(theirs / "out"):
        pass
    assert not list(theirs.iterdir())
