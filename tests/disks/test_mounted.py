"""A disk that this machine has mounted is told from what its kernel shows in /sys and /proc.

The files here are laid out as a kernel shows them: a real mount needs root and a loop device. Not
covered: a kernel that shows them otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.mounted import mounted_at
from nbdproxy.errors import ImageError

LOOP = "36 27 7:0 / /mnt/a\\040disk rw,noatime shared:1 - ext4 /dev/loop0 rw,errors=remount-ro"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


def machine(folder: Path, image: Path, mounts: str, *, partition: str = "") -> Path:
    """Lay out a machine where loop0 shows the image, perhaps with a partition."""
    device = folder / "sys/dev/block/7:0"
    (device / "loop").mkdir(parents=True)
    (device / "loop/backing_file").write_text(f"{image}\n")
    if partition:
        (device / "loop0p1").mkdir()
        (device / "loop0p1/partition").write_text("1\n")
        (device / "loop0p1/dev").write_text(f"{partition}\n")
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mountinfo").write_text(f"{mounts}\n")
    return folder


def test_a_file_that_a_loop_device_shows_and_is_mounted(tmp_path: Path, image: Path) -> None:
    root = machine(tmp_path / "root", image, LOOP)
    assert mounted_at(image.stat(), root) == "/mnt/a disk"


def test_a_partition_of_it(tmp_path: Path, image: Path) -> None:
    root = machine(tmp_path / "root", image, LOOP.replace("7:0", "259:3"), partition="259:3")
    assert mounted_at(image.stat(), root) == "/mnt/a disk"


@pytest.mark.parametrize(
    "mounts", [LOOP.replace("7:0", "7:1"), LOOP.replace("loop0 rw", "loop0 ro")]
)
def test_another_disk_or_one_that_is_only_read(tmp_path: Path, image: Path, mounts: str) -> None:
    assert mounted_at(image.stat(), machine(tmp_path / "root", image, mounts)) is None


def test_mount_points_of_any_name_and_sources_that_others_chose(
    tmp_path: Path, image: Path
) -> None:
    odd = LOOP.replace("a\\040disk", "a\r\x0b\x85b")
    fuse = "37 27 0:60 / /mnt/x rw - fuse.bindfs /dev/loop0 rw,user_id=1000"
    root = machine(tmp_path / "root", image, f"{fuse}\n{odd}")
    assert mounted_at(image.stat(), root) == "/mnt/a\r\x0b\x85b"


def test_another_file_of_the_loop_device(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert mounted_at(image.stat(), machine(tmp_path / "root", other, LOOP)) is None


def test_this_machine_has_it_mounted_nowhere(image: Path) -> None:
    assert mounted_at(image.stat()) is None


def test_a_disk_that_is_mounted_is_not_opened(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(status: os.stat_result) -> str | None:
        return "/mnt" if os.path.samestat(status, image.stat()) else None

    monkeypatch.setattr("nbdproxy.disks.file.mounted_at", here)
    for read_only in (False, True):
        with pytest.raises(ImageError, match="is mounted at /mnt, where this machine changes it"):
            FileDisk(image, read_only=read_only)


def test_a_machine_without_proc(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nbdproxy.disks.file.mounted_at", lambda status: mounted_at(status, tmp_path)
    )
    with pytest.raises(ImageError, match=r"whether .* is mounted cannot be told .* mount /proc"):
        FileDisk(image)
