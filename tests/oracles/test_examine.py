"""What the quick oracle says of a filesystem as a whole, against e2fsck."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.examine import Fsck
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.filesystems import FilesystemKind, kind_of
from nbdproxy.oracles.fsck import e2fsck
from nbdproxy.oracles.quick import QUICK

Run = Callable[..., str]
Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]
Load = Callable[[Path], MemoryDisk]
BLOCK = 1024


@pytest.fixture
def dirty(make_image: Make, debugfs: Debugfs, tmp_path: Path) -> Path:
    """An image whose journal has two blocks to write, one of them as it is already."""
    image = make_image("-t", "ext4", "-b", str(BLOCK), "-J", "size=1", size="8192k")
    data = tmp_path / "data"
    data.write_bytes(b"y" * BLOCK + bytes(BLOCK))
    debugfs(image, ["jo -c -v 3", f"jw -b 8000,8001 {data}", "jc"])
    return image


def test_what_the_replay_changes_is_what_e2fsck_changes(
    dirty: Path, load: Load, run: Run, tmp_path: Path
) -> None:
    before = load(dirty)
    found = QUICK.examine(before, partition=None)
    assert found.mounts
    assert found.fsck == Fsck(True, found.fsck.said if isinstance(found.fsck, Fsck) else "")
    copy = Path(shutil.copy(dirty, tmp_path / "copy"))
    run("e2fsck", "-y", "-E", "journal_only", copy)
    after = copy.read_bytes()
    filesystem = Filesystem(before)
    journal = filesystem.runs(filesystem.inode(8))[0].physical
    changed = {
        at // BLOCK
        for at in range(0, len(after), BLOCK)
        if before.pread(at, BLOCK) != after[at : at + BLOCK]
    }
    ours = {at // BLOCK for e in found.replayed for at in range(e.offset, e.end, BLOCK)}
    # Both superblocks say that there is nothing more to replay.
    assert ours == changed - {1, journal} == {8000}


def test_a_journal_that_e2fsck_makes_anew_is_an_error(make_image: Make, debugfs: Debugfs) -> None:
    image = make_image("-t", "ext4", size="8192k")
    debugfs(image, ["clri <8>"])
    found = e2fsck(FileDisk(image, read_only=True))
    assert found.clean is False
    assert "journal" in found.said


def test_without_e2fsck_the_rest_is_told(
    dirty: Path, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nbdproxy.oracles.fsck.FOLDERS", os.fspath(tmp_path))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    found = QUICK.examine(load(dirty), partition=None)
    assert found.mounts
    assert isinstance(found.fsck, Fsck) and found.fsck.clean is None
    assert "apt-get install e2fsprogs" in found.fsck.said


def test_a_journal_that_only_a_kernel_can_judge(dirty: Path, load: Load) -> None:
    disk = load(dirty)
    filesystem = Filesystem(disk)
    at = filesystem.runs(filesystem.inode(8))[0].physical * BLOCK
    disk.pwrite(at, b"?")
    found = QUICK.examine(disk, partition=None)
    assert found.mounts is None
    assert found.reason is not None and "refuse" in found.reason
    assert found.replayed == ()


SIGNATURES = [
    (FilesystemKind.XFS, 0, b"XFSB"),
    (FilesystemKind.BTRFS, 0x10040, b"_BHRfS_M"),
    (FilesystemKind.NTFS, 3, b"NTFS    "),
    (FilesystemKind.EXFAT, 3, b"EXFAT   "),
]


@pytest.mark.parametrize(("kind", "offset", "signature"), SIGNATURES)
def test_filesystems_are_known_by_their_signatures(
    kind: FilesystemKind, offset: int, signature: bytes
) -> None:
    disk = MemoryDisk(1 << 20)
    assert kind_of(disk) is None
    disk.pwrite(offset, signature)
    assert kind_of(disk) is kind
    assert kind_of(MemoryDisk(disk.pread(0, offset + len(signature) - 1))) is None


def test_made_filesystems_are_known_and_a_partition_table_is_none(
    run: Run, tmp_path: Path, make_image: Make, load: Load
) -> None:
    fat = tmp_path / "fat"
    for bits, size in (("12", 1 << 20), ("16", 16 << 20), ("32", 40 << 20)):
        with fat.open("wb") as file:
            file.truncate(size)
        run("mkfs.fat", "-F", bits, fat)
        assert kind_of(load(fat)) is FilesystemKind.FAT
    assert kind_of(load(make_image("-t", "ext2"))) is FilesystemKind.EXT
    for table in ("dos", "gpt"):
        disk = tmp_path / table
        disk.write_bytes(bytes(4 << 20))
        run("sfdisk", "-q", disk, stdin=f"label: {table}\nstart=2048, size=2048\n")
        assert kind_of(load(disk)) is None
