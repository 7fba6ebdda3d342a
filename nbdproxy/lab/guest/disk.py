"""Formats the target disk on the host, without root, so that the guest only has to mount it.

Guarantees: the same arguments give the same bytes with the same e2fsprogs (fixed UUIDs, fixed
times), and the kernel finds nothing left to initialise, so a recording holds the workload only.
Covers ext2, ext3 and ext4, and xfs, btrfs, vfat and ntfs if their tools are installed, each bare or
in the one partition of a GPT or MBR table. The tools of btrfs, vfat and ntfs do not give the same
bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import LabError
from nbdproxy.lab.guest import tools
from nbdproxy.private import open_anew

FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs")
PARTITION_TABLES = ("gpt", "mbr")

PARTITION_START = 1 << 20
"""Where the one partition begins, in bytes; the same room is left behind it."""

_UUID = "6e626470-726f-7879-6c61-620000000001"
_TABLE_UUID = "6e626470-726f-7879-6c61-620000000002"
_PARTITION_UUID = "6e626470-726f-7879-6c61-620000000003"
_TIME = "1700000000"  # seconds since 1970; any fixed moment before the guest's clock will do
_SECTOR = 512
_KIB = 1024


def make_sparse(path: Path, size: int) -> None:
    """Make `path` an empty file of `size` bytes; LabError if it cannot be."""
    try:
        with open(open_anew(path), "r+b") as image:  # noqa: PTH123 - a descriptor
            image.truncate(size)
    except OSError as error:
        raise LabError(f"{path} cannot be made: {error.strerror}; name another file") from None


def format_disk(
    path: Path,
    size: int,
    *,
    fs: str = "ext4",
    partition_table: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Make `path` a raw image of `size` bytes with an empty filesystem; what it held is lost.

    `options` go to mke2fs, mkfs.xfs or mkfs.btrfs as they are, say ("-O", "fast_commit").
    """
    if fs not in FILESYSTEMS:
        raise LabError(f"the lab formats {', '.join(FILESYSTEMS)}, not {fs!r}; choose one of them")
    if partition_table is not None and partition_table not in PARTITION_TABLES:
        raise LabError(f"a partition table is gpt or mbr, not {partition_table!r}")
    if size % PARTITION_START or size < 16 * PARTITION_START:
        raise LabError(f"a disk for the lab has whole MiB, at least 16, not {size} bytes")
    if path.exists() and not path.is_file():
        raise LabError(f"{path} is not a regular file; the lab formats only image files")
    make_sparse(path, size)
    start = 0
    if partition_table is not None:
        start = PARTITION_START
        _write_table(path, size, partition_table)
    if fs.startswith("ext"):
        _make_ext(path, start, size - 2 * start, fs, options)
    elif not start:
        _make_other(path, fs, options)
    else:
        _make_inside(path, start, size - 2 * start, fs, options)


def _write_table(path: Path, size: int, table: str) -> None:
    sfdisk = tools.require(["sfdisk"])["sfdisk"]
    start, length = PARTITION_START // _SECTOR, (size - 2 * PARTITION_START) // _SECTOR
    if table == "gpt":
        script = (
            f"label: gpt\nlabel-id: {_TABLE_UUID}\n"
            f"start={start}, size={length}, type=linux, uuid={_PARTITION_UUID}\n"
        )
    else:
        script = f"label: dos\nlabel-id: 0x6e626470\nstart={start}, size={length}, type=83\n"
    tools.run_tool([sfdisk, "--quiet", path], stdin=script)


def _make_ext(path: Path, start: int, length: int, fs: str, options: Sequence[str]) -> None:
    mke2fs = tools.require(["mke2fs"])["mke2fs"]
    # Without the two lazy ones the kernel would go on writing inode tables after the mount.
    extended = f"hash_seed={_UUID},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    if start:
        extended += f",offset={start}"
    tools.run_tool(
        [mke2fs, "-F", "-q", "-t", fs, "-U", _UUID, "-E", extended, *options, path,
         f"{length // _KIB}k"],
        env={"E2FSPROGS_FAKE_TIME": _TIME},
    )  # fmt: skip


def _make_other(path: Path, fs: str, options: Sequence[str]) -> None:
    name = "mkfs.fat" if fs == "vfat" else f"mkfs.{fs}"
    program = tools.require([name])[name]
    own = {
        "xfs": ("-q", "-f", "-m", f"uuid={_UUID}"),
        "btrfs": ("-q", "-f", "-U", _UUID),
        "vfat": ("-F", "32", "-i", "6e626470"),
        "ntfs": ("-q", "-F", "-Q"),
    }[fs]
    tools.run_tool([program, *own, *options, path])


def _make_inside(path: Path, start: int, length: int, fs: str, options: Sequence[str]) -> None:
    """Make a filesystem in a file of its own, and put what it holds into the partition."""
    with tempfile.NamedTemporaryFile(prefix="nbdproxy-lab-", dir=path.parent) as made:
        made.truncate(length)
        _make_other(Path(made.name), fs, options)
        disk = FileDisk(Path(made.name), read_only=True)
        with path.open("r+b") as image:
            for extent in disk.data_extents(0, length):
                image.seek(start + extent.offset)
                image.write(disk.pread(extent.offset, extent.length))
        disk.close()
