"""`SwapDisk`: a disk whose content is exchanged as a whole, behind the back of whoever reads it."""

from __future__ import annotations

from collections.abc import Iterator

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.extents import Extent, ExtentSet

_COMPARED = 4096


class SwapDisk:
    """A `BlockDevice` of a fixed size, at first all zeroes; what is written to it goes with `put`.

    The exchange is for moments in which nobody reads: a read under way may see either content.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._below: ReadableDevice = MemoryDisk(size)
        self._disk = OverlayDisk(self._below, owns=False)

    def put(self, below: ReadableDevice) -> None:
        """Show another disk of the same size, as it is; it stays the caller's."""
        assert below.size == self.size
        self._disk.close()
        self._below = below
        self._disk = OverlayDisk(below, owns=False)

    def changed(self) -> list[Extent]:
        """Return what was changed since `put`, in whole blocks of 4 KiB."""
        found = ExtentSet()
        for extent in self._disk.written():
            first, last = extent.offset // _COMPARED, -(-extent.end // _COMPARED)
            for block in range(first, last):
                start = block * _COMPARED
                length = min(_COMPARED, self.size - start)
                if self._disk.pread(start, length) != self._below.pread(start, length):
                    found.add(start, start + length)
        return list(found)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        return self._disk.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._disk.pread_into(offset, buffer)

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if all of it was written here; what is below may block."""
        return self._disk.try_pread_into(offset, buffer)

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        self._disk.pwrite(offset, data)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Make a range read as zeroes."""
        self._disk.zero(offset, length, may_punch=may_punch, fast=fast)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Give a range back; it reads as zeroes afterwards."""
        self._disk.trim(offset, length, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Do nothing: what is below may be no file at all."""

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        return self._disk.data_extents(offset, length)

    def sync(self) -> None:
        """Do nothing: it ends with its process."""

    def close(self) -> None:
        """Drop the changes."""
        self._disk.close()
