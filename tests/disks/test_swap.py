"""A disk that begins with whatever was put there."""

from __future__ import annotations

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.swap import SwapDisk
from nbdproxy.extents import Extent

SIZE = 1 << 40
SMALL, LARGE = b"a" * 1000, b"b" * 9000


@pytest.fixture
def disk() -> SwapDisk:
    return SwapDisk(SIZE)


def test_behind_what_was_put_there_are_zeroes(disk: SwapDisk) -> None:
    assert disk.pread(SIZE - 10, 10) == bytes(10)
    for content in (SMALL, LARGE, SMALL):
        disk.put(MemoryDisk(content))
        assert disk.pread(0, 10_000) == content + bytes(10_000 - len(content))
        assert disk.pread(len(content) - 1, 3) == content[-1:] + bytes(2)
        assert list(disk.data_extents(0, SIZE)) == [Extent(0, len(content))]


def test_what_was_written_goes_and_nothing_is_written_behind(disk: SwapDisk) -> None:
    below = MemoryDisk(LARGE)
    disk.put(below)
    disk.pwrite(8999, b"x")
    with pytest.raises(OSError, match="No space"):
        disk.pwrite(8999, b"xy")
    disk.zero(4096, SIZE - 4096, may_punch=True)
    assert disk.changed() == [Extent.between(4096, 9000)]
    assert disk.pread(4090, 20) == b"b" * 6 + bytes(14)
    disk.put(below)
    assert (disk.changed(), disk.pread(0, 9000)) == ([], LARGE)


class Broken(MemoryDisk):
    """One whose reads fail, and not as a disk's should."""

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        raise ValueError(f"no block at {offset} for {len(buffer)} bytes")


def test_a_read_that_fails_is_an_error_of_the_disk_and_is_known(disk: SwapDisk) -> None:
    disk.put(Broken(4096))
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            disk.pread(512, 10)
    assert disk.failure == "no block at 512 for 10 bytes"
    disk.put(MemoryDisk(SMALL))
    assert disk.failure is None
