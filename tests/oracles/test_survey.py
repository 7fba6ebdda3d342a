"""What is on a disk: each filesystem by the names that blkid gives it, and what hides files."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.filesystems import FilesystemKind
from nbdproxy.oracles.guest_disks import GuestDisks
from nbdproxy.oracles.quick import QUICK
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
    name: str, run: Run, blank: Callable[[int], Path]
) -> None:
    size, kind, command = MADE[name]
    path = blank(size)
    run(*command, path)
    (part,) = survey(FileDisk(path, read_only=True)).filesystems
    seen = blkid(run, path)
    assert (part.kind, part.slice.number) == (kind, 0)
    assert [f"UUID={seen['UUID']}" in part.specs, f"LABEL={seen.get('LABEL')}" in part.specs] == [
        True,
        "LABEL" in seen,
    ]
    assert f"/dev/disk/by-uuid/{seen['UUID']}" in part.specs
    assert (r"/dev/disk/by-label/a\x20b" in part.specs) == (seen.get("LABEL") == "a b")
    assert len(part.specs) == (4 if "LABEL" in seen else 2)


QUICK_LUKS = "cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --type"
HIDES = {
    "LUKS1": (8, f"{QUICK_LUKS} luks1", "LUKS1"),
    "LUKS2": (32, f"{QUICK_LUKS} luks2 --label top", "LUKS2"),
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
    assert [str(unreadable) for unreadable in found.unreadable] == [f"whole disk is {what}"]
    assert not found.filesystems
    if (ident := blkid(run, path).get("UUID")) is not None:
        assert f"UUID={ident}" in found.unreadable[0].specs
    if what.startswith("LUKS"):
        assert f"/dev/mapper/luks-{ident}" in found.unreadable[0].specs
        assert ("LABEL=top" in found.unreadable[0].specs) == (what == "LUKS2")


def test_luks2_is_known_by_its_second_header(
    run: Run, blank: Callable[[int], Path], load: Load, tmp_path: Path
) -> None:
    path, key = blank(32), tmp_path / "key"
    key.write_text("secret")
    run(*QUICK_LUKS.split(), "luks2", path, key)
    disk = load(path)
    whole = survey(disk)
    disk.pwrite(0, bytes(4096))
    assert survey(disk) == whole
    disk.pwrite(16384, bytes(4096))
    assert [unreadable.what for unreadable in survey(disk).unreadable] == ["something unknown"]


def test_a_seed_beside_the_btrfs_that_grew_from_it(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    seed, one, two, disk = blank(128), blank(128), blank(128), blank(260)
    run("mkfs.btrfs", "-q", seed)
    run("btrfstune", "-S", "1", seed)
    run("mkfs.btrfs", "-q", one, two)  # on two devices, as one that grew from a seed
    run("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=128MiB\nsize=128MiB\n")
    both = load(disk)
    both.pwrite(MIB, seed.read_bytes())
    assert [part.slice.name for part in survey(both).filesystems] == ["partition 1"]
    both.pwrite(129 * MIB, one.read_bytes())
    assert sorted(unreadable.words for unreadable in GuestDisks(QUICK, [both]).unreadable) == [
        "partition 1 is a seed of Btrfs",
        "partition 2 is Btrfs, but it has a part on another device",
    ]
    apart = GuestDisks(QUICK, [load(seed), load(one)])
    assert [one.words for one in apart.unreadable if "seed" in one.words] == [
        "whole disk of disk 1 is a seed of Btrfs"
    ]
    assert not apart.filesystems
    assert "seed" not in str(GuestDisks(QUICK, [load(seed)]).unreadable)


OLD_MD = struct.pack("<III16xi12xI", 0xA92B4EFC, 0, 90, 5, 3)
SIGNS = {
    "a member of an md array (RAID5)": ("linux_raid_member", -65536, OLD_MD),
    "a member of an Intel RAID": ("isw_raid_member", -1024, b"Intel Raid ISM Cfg Sig. 1.3.00"),
    "a member of a DDF RAID": ("ddf_raid_member", -512, b"\xde\x11\xde\x11\0\0\0\x0001.00.00"),
    "part of a DRBD": ("drbd", -4096, bytes(60) + b"\x83\x74\x02\x6d"),
    "VDO": ("vdo", 0, b"dmvdo001"),
    "an LVM snapshot, which is kept as differences": ("DM_snapshot_cow", 0, b"SnAp"),
    "a volume of VMFS": ("VMFS_volume_member", MIB, b"\x0d\xd0\x01\xc0"),
    "zonefs": ("zonefs", 0, b"SFOZ"),
    "UFS": ("ufs", 65536 + 1372, b"\x19\x01\x54\x19"),
    "ReFS": ("ReFS", 0, b"\0\0\0ReFS\0"),
    "cramfs": ("cramfs", 0, b"\x45\x3d\xcd\x28"),
}


NEED_MORE = {"part of a DRBD", "zonefs"}
"""Of these util-linux 2.41 wants more than the magic."""


@pytest.mark.parametrize("what", SIGNS)
def test_signatures_are_those_of_blkid(what: str, run: Run, blank: Callable[[int], Path]) -> None:
    path = blank(4)
    kind, at, raw = SIGNS[what]
    disk = MemoryDisk(4 * MIB)
    disk.pwrite(at % disk.size, raw)
    path.write_bytes(disk.pread(0, disk.size))
    seen = blkid(run, path).get("TYPE")
    assert seen in ({kind, None} if what in NEED_MORE else {kind})
    assert [unreadable.what for unreadable in survey(disk).unreadable] == [what]


def test_nothing_hides_in_swap_and_in_what_reads_zeroes(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    path = blank(8)
    assert survey(load(path)) == Survey((), ())
    run("mkswap", "-q", path)
    assert survey(load(path)) == Survey((), ())


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1500, 5000, MIB])
def test_what_is_too_small_for_signatures_is_looked_at_all_the_same(size: int) -> None:
    assert survey(MemoryDisk(size)) == Survey((), ())
    if size:
        disk = MemoryDisk(size)
        disk.pwrite(0, b"?")
        assert [str(unreadable) for unreadable in survey(disk).unreadable] == [
            "whole disk is something unknown"
        ]


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
    assert [(part.slice.number, part.kind) for part in found.filesystems] == [
        (1, "fat"),
        (2, "ext"),
    ]
    assert {"PARTLABEL=EFI System", r"/dev/disk/by-partlabel/EFI\x20System"} <= found.filesystems[
        0
    ].specs
    own = {f"{tag}={UUID}" for tag in ("UUID", "PARTUUID")}
    nodes = {f"/dev/disk/by-{tag}/{UUID}" for tag in ("uuid", "partuuid")}
    assert found.filesystems[1].specs == own | nodes
    (unreadable,) = found.unreadable
    assert str(unreadable) == "partition 4 is something unknown"


def test_what_an_older_filesystem_left_is_not_taken_for_one(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    path = blank(16)
    run("mke2fs", "-q", "-F", path)
    old = path.read_bytes()[1024:2048]
    run("mkfs.fat", path)
    disk = load(path)
    disk.pwrite(1024, old)
    assert [str(one) for one in survey(disk).unreadable] == [
        "whole disk is ext2, ext3 or ext4 and FAT at once"
    ]


def md_member(size: int) -> tuple[int, bytes]:
    """What mdadm writes at the end of a member of a RAID1 of version 1.0, and where."""
    at = (size // 512 - 16 & ~7) * 512
    raw = bytearray(256)
    struct.pack_into("<II8x16s32s8xi", raw, 0, 0xA92B4EFC, 1, b"\x11" * 16, b"host:0", 1)
    struct.pack_into("<I32xQ8xQ", raw, 92, 2, 0, at // 512)
    struct.pack_into("<I", raw, 216, sum(struct.unpack("<64I", raw)) & 0xFFFFFFFF)
    return at, bytes(raw)


def test_one_copy_of_an_array_is_not_what_a_guest_reads(
    run: Run, blank: Callable[[int], Path], load: Load
) -> None:
    path = blank(16)
    run("mke2fs", "-q", "-F", "-U", UUID, path)
    disk = load(path)
    disk.pwrite(*md_member(disk.size))
    path.write_bytes(disk.pread(0, disk.size))
    # util-linux 2.41 wants more of a superblock than this one has.
    assert blkid(run, path)["TYPE"] in {"linux_raid_member", "ext2"}
    found = survey(disk)
    assert not found.filesystems
    assert [str(unreadable) for unreadable in found.unreadable] == [
        "whole disk is a member of an md array (RAID1)"
    ]
    assert {f"UUID={UUID}", "/dev/md/0"} <= found.unreadable[0].specs


def partitioned(run: Run, path: Path, table: str, inside: bytes, at: int = MIB) -> MemoryDisk:
    """A disk with a table, and a filesystem at a place."""
    run("sfdisk", "--quiet", path, stdin=table)
    disk = MemoryDisk(path.read_bytes())
    disk.pwrite(at, inside)
    return disk


@pytest.fixture
def small(run: Run, blank: Callable[[int], Path]) -> bytes:
    """An ext2 of 1 MiB."""
    path = blank(1)
    run("mke2fs", "-q", "-F", "-U", UUID, path)
    return path.read_bytes()


GPT = "label: gpt\nstart=2048, size=2048\n"
MBR = "label: dos\nlabel-id: 0x1234abcd\nstart=2048, size=2048, type=83\n"


def test_partitions_of_an_array_are_copies(
    run: Run, blank: Callable[[int], Path], small: bytes
) -> None:
    disk = partitioned(run, blank(16), MBR, small)
    assert {f"UUID={UUID}", "PARTUUID=1234abcd-01"} < survey(disk).filesystems[0].specs
    disk.pwrite(*md_member(disk.size))
    found = survey(disk)
    assert not found.filesystems
    assert [str(unreadable) for unreadable in found.unreadable] == [
        "whole disk is a member of an md array (RAID1)",
        "partition 1 is on a disk that is a member of an md array (RAID1)",
    ]
    assert f"UUID={UUID}" in found.unreadable[1].specs


AT_THE_START = {
    "a member of an md array (RAID5)": (
        4096,
        struct.pack("<II24x32s8xi68xQ", 0xA92B4EFC, 1, b"", 5, 8),
    ),
    "part of a bcache": (4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    "F2FS": (1024, b"\x10\x20\xf5\xf2"),
    "a physical volume of LVM": (
        1024,
        b"LABELONE" + (2).to_bytes(8, "little") + bytes(8) + b"LVM2 001",
    ),
}


@pytest.mark.parametrize("what", AT_THE_START)
def test_a_disk_that_is_more_than_its_partitions_hides_files(
    what: str, run: Run, blank: Callable[[int], Path], small: bytes
) -> None:
    disk = partitioned(run, blank(16), MBR, small)
    disk.pwrite(*AT_THE_START[what])
    found = survey(disk)
    assert [part.slice.number for part in found.filesystems] == [1]
    assert [str(unreadable) for unreadable in found.unreadable] == [
        f"whole disk is {what}, and has partitions"
    ]


def test_what_is_in_front_of_partitions_and_holds_no_files_hides_none(
    run: Run, blank: Callable[[int], Path], small: bytes
) -> None:
    disk = partitioned(run, blank(16), MBR, small)
    disk.pwrite(4086, b"SWAPSPACE2")
    disk.pwrite(512, b"a boot loader")
    assert not survey(disk).unreadable


def test_a_partition_of_a_windows_dynamic_disk_is_not_read_as_it_begins(
    run: Run, blank: Callable[[int], Path], small: bytes
) -> None:
    disk = partitioned(run, blank(16), MBR.replace("type=83", "type=42"), small)
    assert [str(unreadable) for unreadable in survey(disk).unreadable] == [
        "partition 1 is part of a Windows dynamic disk"
    ]


def test_partitions_that_only_the_backup_names_are_not_what_linux_sees(
    run: Run, blank: Callable[[int], Path], small: bytes
) -> None:
    disk = partitioned(run, blank(16), GPT, small)
    assert len(survey(disk).filesystems) == 1
    disk.pwrite(512, bytes(512))
    found = survey(disk)
    assert not found.filesystems
    assert "copy of its GPT at the end" in str(found.unreadable[0])


@pytest.mark.parametrize(
    ("places", "readable"),
    [
        ((MIB,), [MIB]),
        ((8 * MIB,), [8 * MIB]),  # the same table in sectors of 4096 bytes
        ((MIB, 8 * MIB), []),
        ((), []),
    ],
)
def test_the_unit_of_an_mbr_is_told_by_where_filesystems_begin(
    places: tuple[int, ...],
    readable: list[int],
    run: Run,
    blank: Callable[[int], Path],
    small: bytes,
) -> None:
    disk = partitioned(run, blank(32), MBR, b"")
    for at in places:
        disk.pwrite(at, small)
    found = survey(disk)
    assert [part.slice.offset for part in found.filesystems] == readable
    doubts = [str(unreadable) for unreadable in found.unreadable]
    if len(places) == 2:
        assert "512 or of 4096 bytes" in doubts[0]
    else:
        assert doubts == []


def test_a_table_within_a_partition_and_a_table_without_partitions(
    run: Run, blank: Callable[[int], Path]
) -> None:
    inner = blank(1)
    run("sfdisk", "--quiet", inner, stdin="label: dos\nstart=64, size=64, type=83\n")
    disk = partitioned(run, blank(16), GPT, inner.read_bytes())
    assert [str(unreadable) for unreadable in survey(disk).unreadable] == [
        "partition 1 is divided by a partition table"
    ]
    empty = blank(16)
    run("sfdisk", "--quiet", empty, stdin="label: gpt\n")
    assert survey(MemoryDisk(empty.read_bytes())) == Survey((), ())


def test_a_physical_volume_without_readable_metadata_is_hidden() -> None:
    disk = MemoryDisk(8 * MIB)
    disk.pwrite(512, b"LABELONE" + (1).to_bytes(8, "little") + bytes(8) + b"LVM2 001")
    assert [str(unreadable) for unreadable in survey(disk).unreadable] == [
        "whole disk is a physical volume of LVM whose metadata cannot be read"
    ]
