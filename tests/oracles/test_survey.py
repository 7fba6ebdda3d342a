"""What is on a disk: each filesystem by the names that blkid gives it, and what hides files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.filesystems import FilesystemKind
from nbdproxy.oracles.survey import Survey, survey

MIB = 1 << 20
Run = Callable[..., str]
Load = Callable[[Path], MemoryDisk]
UUID = "0b5dfd6e-b7b7-4c94-b1b9-9f1a6cbf1c52"


@pytest.fixture
def blank(tmp_path: Path) -> Callable[[int], Path]:
    """A file of so many MiB that reads all zeroes."""

    def make(size: int) -> Path:
        path = tmp_path / f"blank{len(list(tmp_path.iterdir()))}"
        path.touch()
        os.truncate(path, size * MIB)
        return path

    return make


def blkid(run: Run, path: Path) -> dict[str, str]:
    """What util-linux sees."""
    said = run("blkid", "--probe", "--output", "export", path, check=False)
    return dict(line.split("=", 1) for line in said.replace("\\", "").splitlines() if "=" in line)


MADE = {
    "ext4": (8, FilesystemKind.EXT, ("mke2fs", "-q", "-F", "-L", "a b")),
    "xfs": (320, FilesystemKind.XFS, ("mkfs.xfs", "-q", "-L", "a b")),
    "btrfs": (128, FilesystemKind.BTRFS, ("mkfs.btrfs", "-q", "-L", "a b")),
    "fat16": (16, FilesystemKind.FAT, ("mkfs.fat", "-F16", "-n", "A B")),
    "fat32": (64, FilesystemKind.FAT, ("mkfs.fat", "-F32", "-n", "A B")),
    "fat without a label": (16, FilesystemKind.FAT, ("mkfs.fat",)),
    "exfat": (16, FilesystemKind.EXFAT, ("mkfs.exfat", "-L", "a b")),
    "ntfs": (16, FilesystemKind.NTFS, ("mkntfs", "-q", "-F", "-L", "a b")),
}


@pytest.mark.parametrize("name", MADE)
def test_a_filesystem_has_the_names_that_blkid_prints(
    name: str, run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    size, kind, command = MADE[name]
    path = blank(size)
    run(*command, path)
    (part,) = survey(load(path)).parts
    seen = blkid(run, path)
    assert (part.kind, part.slice.number) == (kind, 0)
    assert [f"UUID={seen['UUID']}" in part.specs, f"LABEL={seen.get('LABEL')}" in part.specs] == [
        True,
        "LABEL" in seen,
    ]
    assert f"/dev/disk/by-uuid/{seen['UUID']}" in part.specs
    assert (r"/dev/disk/by-label/a\x20b" in part.specs) == (seen.get("LABEL") == "a b")
    assert len(part.specs) == (4 if "LABEL" in seen else 2)


HIDES = {
    "LUKS1": (8, "cryptsetup -q luksFormat --type luks1 --iter-time 1", "LUKS1"),
    "LUKS2": (32, "cryptsetup -q luksFormat --type luks2 --iter-time 1 --label top", "LUKS2"),
    "F2FS": (64, "mkfs.f2fs -q", "F2FS"),
    "MINIX": (16, "mkfs.minix", "MINIX"),
    "squashfs": (1, "mksquashfs {key} {image} -noappend -quiet", "squashfs"),
}


@pytest.mark.parametrize("name", HIDES)
def test_what_cannot_be_read_is_named(
    name: str, run: Run, blank: Callable[[int], Path], load: Load, tmp_path: Path
) -> None:
    size, command, what = HIDES[name]
    path, key = blank(size), tmp_path / "key"
    key.write_text("secret")
    words = f"{command} {{image}} {{key}}" if "{key}" not in command else command
    if "cryptsetup" not in command:
        words = words.removesuffix(" {key}")
    run(*(word.format(image=path, key=key) for word in words.split()))
    found = survey(load(path))
    assert [str(hidden) for hidden in found.hidden] == [f"whole disk is {what}"]
    assert not found.parts
    if (ident := blkid(run, path).get("UUID")) is not None:
        assert f"UUID={ident}" in found.hidden[0].specs
    if what.startswith("LUKS"):
        assert f"/dev/mapper/luks-{ident}" in found.hidden[0].specs
        assert ("LABEL=top" in found.hidden[0].specs) == (what == "LUKS2")


def test_nothing_hides_in_swap_and_in_what_reads_zeroes(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    path = blank(8)
    assert survey(load(path)) == Survey((), ())
    run("mkswap", "-q", path)
    assert survey(load(path)) == Survey((), ())


PARTS = """label: gpt
start=2048, size=16384, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI System"
start=18432, size=16384, uuid=0B5DFD6E-B7B7-4C94-B1B9-9F1A6CBF1C52
start=34816, size=2048, type=21686148-6449-6E6F-744E-656564454649
start=36864, size=2048
start=38912, size=2048
"""


def test_partitions_have_their_own_names_and_unknown_data_is_hidden(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    path, inside, efi = blank(32), blank(8), blank(8)
    run("sfdisk", "--quiet", path, stdin=PARTS)
    run("mke2fs", "-q", "-F", "-U", UUID, inside)
    run("mkfs.fat", efi)
    disk = load(path)
    disk.pwrite(2048 * 512, efi.read_bytes())
    disk.pwrite(18432 * 512, inside.read_bytes())
    disk.pwrite(34816 * 512 + 5, b"a boot loader")
    disk.pwrite(36864 * 512 + 5, b"who knows")
    found = survey(disk)
    assert [(part.slice.number, part.kind) for part in found.parts] == [(1, "fat"), (2, "ext")]
    assert {"PARTLABEL=EFI System", r"/dev/disk/by-partlabel/EFI\x20System"} <= found.parts[0].specs
    own = {f"{tag}={UUID}" for tag in ("UUID", "PARTUUID")}
    nodes = {f"/dev/disk/by-{tag}/{UUID}" for tag in ("uuid", "partuuid")}
    assert found.parts[1].specs == own | nodes
    (hidden,) = found.hidden
    assert str(hidden) == "partition 4 is something unknown"


def test_what_an_older_filesystem_left_is_not_taken_for_one(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    path = blank(16)
    run("mke2fs", "-q", "-F", path)
    old = path.read_bytes()[1024:2048]
    run("mkfs.fat", path)
    disk = load(path)
    disk.pwrite(1024, old)
    assert [str(one) for one in survey(disk).hidden] == [
        "whole disk is ext2, ext3 or ext4 and FAT at once"
    ]
