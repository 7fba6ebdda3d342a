"""Partition tables as sfdisk writes them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.partitions import slices

MIB = 1 << 20
SIZE = 64 * MIB
Run = Callable[..., str]

GPT = "label: gpt\nstart=2048, size=8192\nstart=20480, size=16384\n"
MBR = (
    "label: dos\n"
    "start=2048, size=8192, type=83\n"
    "start=12288, size=40960, type=5\n"
    "start=14336, size=4096, type=83\n"
    "start=20480, size=8192, type=83\n"
    "start=30720, size=2048, type=83\n"
)


@pytest.fixture
def disk(run: Run, tmp_path: Path) -> Callable[[str], MemoryDisk]:
    def make(table: str) -> MemoryDisk:
        image = tmp_path / "disk"
        image.write_bytes(b"")
        run("truncate", "-s", str(SIZE), image)
        run("sfdisk", "--quiet", image, stdin=table)
        return MemoryDisk(image.read_bytes())

    return make


def found(device: MemoryDisk) -> list[tuple[int, int, int]]:
    return [(part.number, part.offset // 512, part.length // 512) for part in slices(device)]


WHOLE = (0, 0, SIZE // 512)
GPT_FOUND = [WHOLE, (1, 2048, 8192), (2, 20480, 16384)]


def test_gpt(disk: Callable[[str], MemoryDisk]) -> None:
    assert found(disk(GPT)) == GPT_FOUND


@pytest.mark.parametrize("at", [512, 512 + 40, 1024, 1024 + 200])
def test_a_broken_gpt_is_read_from_its_backup(disk: Callable[[str], MemoryDisk], at: int) -> None:
    device = disk(GPT)
    device.pwrite(at, b"\xa5")
    assert found(device) == GPT_FOUND
    device.pwrite(SIZE - 512, bytes(512))
    assert found(device) == [WHOLE]


def test_gpt_with_large_sectors(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "large"
    run("truncate", "-s", str(SIZE), image)
    steps = "g\nn\n1\n2048\n+8191\nw\n"
    run("fdisk", "--sector-size", "4096", image, stdin=steps)
    assert found(MemoryDisk(image.read_bytes())) == [WHOLE, (1, 2048 * 8, 8192 * 8)]


def test_mbr_with_logical_partitions(disk: Callable[[str], MemoryDisk]) -> None:
    assert found(disk(MBR)) == [
        WHOLE,
        (1, 2048, 8192),
        (5, 14336, 4096),
        (6, 20480, 8192),
        (7, 30720, 2048),
    ]


def test_a_loop_of_logical_partitions_ends_where_linux_ends_it(
    disk: Callable[[str], MemoryDisk],
) -> None:
    device = disk(MBR)
    # The first extended record's link, in its second entry, now leads to itself.
    device.pwrite(12288 * 512 + 462 + 8, bytes(4))
    logical = [(number, 14336, 4096) for number in range(5, 256)]
    assert found(device) == [WHOLE, (1, 2048, 8192), *logical]
    device.pwrite(12288 * 512 + 446, bytes(16))  # and now it is a loop without partitions
    assert found(device) == [WHOLE, (1, 2048, 8192)]


@pytest.mark.parametrize(
    ("first", "length", "is_there"),
    [
        (9000, 100, True),
        (9000, 40961 - 9000, False),  # one sector behind the extended partition's end
        (9000, 40960 - 9000, True),
        (1 << 30, 100, False),
    ],
)
def test_the_last_two_entries_of_an_extended_record_count_if_they_are_within_it(
    first: int, length: int, is_there: bool, disk: Callable[[str], MemoryDisk]
) -> None:
    device = disk(MBR)
    raw = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", first, length)
    device.pwrite(12288 * 512 + 446 + 3 * 16, raw)
    third = [(6, 12288 + first, length)] if is_there else []
    behind = 6 + len(third)
    assert found(device) == [
        WHOLE,
        (1, 2048, 8192),
        (5, 14336, 4096),
        *third,
        (behind, 20480, 8192),
        (behind + 1, 30720, 2048),
    ]


def test_no_table_and_no_room(disk: Callable[[str], MemoryDisk]) -> None:
    assert found(MemoryDisk(SIZE)) == [WHOLE]
    assert [part.number for part in slices(MemoryDisk(100))] == [0]
    assert [part.number for part in slices(MemoryDisk(0))] == [0]


def test_a_slice_reads_its_own_part(disk: Callable[[str], MemoryDisk]) -> None:
    device = disk(GPT)
    device.pwrite(2048 * 512 + 7, b"here")
    part = slices(device)[1].device
    buffer = bytearray(4)
    part.pread_into(7, memoryview(buffer))
    assert part.pread(7, 4) == bytes(buffer) == b"here"
    assert part.size == 8192 * 512
    assert [tuple(extent) for extent in part.data_extents(5, 10)] == [(5, 10)]
