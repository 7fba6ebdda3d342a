"""Partition tables, whole, odd and broken: what a real kernel makes of each, we make of it, too."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.lab import run as guest
from nbdproxy.lab.guest.build import build_lab
from nbdproxy.lab.workloads.workloads import End, RunEnd, Workload
from nbdproxy.oracles.partition_table import read_table

pytestmark = pytest.mark.lab

MIB = 1 << 20
SIZE = 16 * MIB
SUPERBLOCK = (1024 + 0x38, b"\x53\xef")
"""What stands where a filesystem begins."""

Change = Callable[[MemoryDisk], None]
GPT = "label: gpt\nstart=2048, size=4096\nstart=8192, size=2048\n"
MBR = (
    "label: dos\nstart=2048, size=4096, type=83\nstart=8192, size=16384, type=5\n"
    "start=10240, size=2048, type=83\nstart=14336, size=2048, type=83\n"
)


def entry(number: int, *fields: int) -> Change:
    """Give an MBR entry other fields: active, type, first sector, sectors."""
    active, kind, first, count = fields
    raw = struct.pack("<B3sB3sII", active, b"", kind, b"", first, count)
    return lambda disk: disk.pwrite(446 + 16 * (number - 1), raw)


def wipe(offset: int) -> Change:
    """Break a sector; from the end if it is negative."""
    return lambda disk: disk.pwrite(offset % disk.size, b"\xa5" * 8)


def gpt_range(first: int, last: int) -> Change:
    """Move the second GPT partition, with checksums that are right."""

    def change(disk: MemoryDisk) -> None:
        header = bytearray(disk.pread(512, 92))
        disk.pwrite(1024 + 128 + 32, struct.pack("<QQ", first, last))
        header[88:92] = zlib.crc32(disk.pread(1024, 128 * 128)).to_bytes(4, "little")
        header[16:20] = bytes(4)
        header[16:20] = zlib.crc32(bytes(header)).to_bytes(4, "little")
        disk.pwrite(512, bytes(header))

    return change


def logical(number: int, *fields: int) -> Change:
    """Give the first extended record of MBR another entry: type, first sector, sectors."""
    raw = struct.pack("<B3sB3sII", 0, b"", fields[0], b"", *fields[1:])
    return lambda disk: disk.pwrite(8192 * 512 + 446 + 16 * (number - 1), raw)


TABLES: dict[str, tuple[str, Change | None]] = {
    "GPT": (GPT, None),
    "GPT that is broken at the start": (GPT, wipe(512)),
    "GPT that is broken at the end": (GPT, wipe(-512)),
    "GPT whose second partition is beyond the disk": (GPT, gpt_range(8192, 1 << 40)),
    "GPT whose partitions overlap": (GPT, gpt_range(4096, 8191)),
    "GPT without its protective MBR": (GPT, entry(1, 0, 0, 0, 0)),
    "GPT whose protective MBR begins elsewhere": (GPT, entry(1, 0, 0xEE, 2, 9)),
    "GPT with a hybrid MBR": (GPT, entry(2, 0x80, 0x0C, 2048, 4096)),
    "MBR": (MBR, None),
    "MBR with a partition that goes beyond the disk": (MBR, entry(1, 0, 0x83, 2048, 1 << 20)),
    "MBR with a partition beyond the disk": (MBR, entry(3, 0, 0x83, 1 << 20, 8)),
    "MBR with a partition of no type": (MBR, entry(3, 0, 0, 30000, 100)),
    "MBR with two extended partitions": (MBR, entry(3, 0, 0x0F, 8192, 16384)),
    "MBR whose extended record has a third partition": (MBR, logical(3, 0x83, 4096, 512)),
    "MBR whose extended record has garbage at its end": (MBR, logical(4, 0x83, 4096, 1 << 20)),
    "MBR with a wrong boot flag": (MBR, entry(4, 0x11, 0x83, 30000, 100)),
}
LARGE = {
    "GPT with sectors of 4096 bytes": "g\nn\n1\n256\n+255\nn\n2\n1024\n+255\nw\n",
    "MBR with sectors of 4096 bytes": (
        "o\nn\np\n1\n256\n+255\nn\ne\n2\n1024\n+2047\nn\nl\n1536\n+255\nn\nl\n2048\n+255\nw\n"
    ),
}


def run(*command: str | Path, stdin: str) -> None:
    """Run one of Debian's partitioning tools."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(command, input=stdin.encode(), check=True, capture_output=True, env=environment)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The disks, by what is with them."""
    folder = tmp_path_factory.mktemp("tables")
    found = {}
    for number, name in enumerate([*TABLES, *LARGE]):
        path = found[name] = folder / f"{number}.img"
        path.touch()
        os.truncate(path, SIZE)
        if name in LARGE:
            run("fdisk", "--sector-size", "4096", path, stdin=LARGE[name])
            with path.open("r+b") as file:
                file.seek(256 * 4096 + SUPERBLOCK[0])
                file.write(SUPERBLOCK[1])
            continue
        table, change = TABLES[name]
        run("sfdisk", "--quiet", path, stdin=table)
        if change is not None:
            disk = MemoryDisk(path.read_bytes())
            change(disk)
            path.write_bytes(disk.pread(0, SIZE))
    return found


@pytest.fixture(scope="module")
def seen(disks: dict[str, Path]) -> dict[str, set[tuple[int, int, int]]]:
    """What the kernel makes of them: number, first byte, bytes; an extended one is two sectors."""
    extra = ["-device", "virtio-scsi-pci,id=many"]
    for number, path in enumerate(disks.values()):
        unit = 4096 if number >= len(TABLES) else 512
        extra += ["-drive", f"if=none,id=t{number},format=raw,file={path}", "-device"]
        extra += [f"scsi-hd,bus=many.0,lun={number},drive=t{number},logical_block_size={unit}"]
        extra[-1] += f",physical_block_size={unit}"
    script = (
        "for d in /sys/block/sd*; do for p in $d/sd*; do [ -e $p/start ] &&"
        " echo part $(ls $d/device/scsi_device) $(cat $p/partition $p/start $p/size); done; done"
        "; true"
    )
    workload = Workload("tables", "tables", script, mount_options="-", needs_mount=False)
    target = next(iter(disks.values()))
    done = guest.run(
        build_lab(), workload, target, ending=RunEnd(End.SYNC), time_limit_s=90,
        extra=(*extra, "-snapshot"),
    )  # fmt: skip
    names = list(disks)
    found: dict[str, set[tuple[int, int, int]]] = {name: set() for name in names}
    for lun, number, start, size in re.findall(
        r"part \d+:\d+:\d+:(\d+) (\d+) (\d+) (\d+)", done.serial
    ):
        found[names[int(lun)]].add((int(number), int(start) * 512, int(size) * 512))
    return found


@pytest.mark.parametrize("name", [*TABLES, *LARGE])
def test_partitions_are_those_of_the_kernel(
    name: str, disks: dict[str, Path], seen: dict[str, set[tuple[int, int, int]]]
) -> None:
    disk = MemoryDisk(disks[name].read_bytes())

    def begins(_: object, offset: int) -> bool:
        return disk.pread(offset + SUPERBLOCK[0], len(SUPERBLOCK[1])) == SUPERBLOCK[1]

    table = read_table(disk, begins)
    ours = {(part.number, part.offset, part.length) for part in table.partitions}
    whole = {part for part in seen[name] if part[2] > 8192}  # without the extended ones
    if table.doubt is None:
        assert ours == whole
    else:
        assert whole == set()
        assert name == "GPT that is broken at the start"
