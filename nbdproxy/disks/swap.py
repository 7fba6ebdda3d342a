"""`SwapDisk`: a disk whose content is exchanged as a whole, behind the back of whoever reads it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.extents import Extent, ExtentSet

_COMPARED = 4096


class SwapDisk:
    """A `BlockDevice` of a fixed size that begins with what was `put`; behind that are zeroes.

    What is written to it goes with the next `put`, and nothing can be written behind what was put.
    The exchange is for moments in which nobody reads: a read under way may see either content.

    failure  why what was put could not be read, if that happened: the error of the first such read
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.failure: str | None = None
        self._below: ReadableDevice = MemoryDisk(0)
        self._disk = OverlayDisk(self._below, owns=False)

    def put(self, below: ReadableDevice) -> None:
        """Show another disk, no larger than this, as it is; it stays the caller's."""
        assert below.size <= self.size
        self._disk.close()
        self.failure = None
        self._below = below
        self._disk = OverlayDisk(below, owns=False)

    def changed(self) -> list[Extent]:
        """Return what was changed since `put`, in whole blocks of 4 KiB."""
        found = ExtentSet()
        for extent in self._disk.written():
            first, last = extent.offset // _COMPARED, -(-extent.end // _COMPARED)
            for block in range(first, last):
                start = block * _COMPARED
                length = min(_COMPARED, self._below.size - start)
                if self._disk.pread(start, length) != self._below.pread(start, length):
                    found.add(start, start + length)
        return list(found)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raises OSError, whatever the disk below raised."""
        inside = self._inside(offset, len(buffer))
        buffer[inside:] = bytes(len(buffer) - inside)
        if not inside:
            return
        try:
            self._disk.pread_into(offset, buffer[:inside])
        except Exception as error:
            self.failure = self.failure or str(error) or type(error).__name__
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if all of it was written here; what is below may block."""
        is_inside = self._inside(offset, len(buffer)) == len(buffer)
        return is_inside and self._disk.try_pread_into(offset, buffer)

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        if self._inside(offset, len(data)) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._disk.pwrite(offset, data)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Make a range read as zeroes."""
        inside = self._inside(offset, length)
        if inside:
            self._disk.zero(offset, inside, may_punch=may_punch, fast=fast)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Give a range back; it reads as zeroes afterwards."""
        self.zero(offset, length, may_punch=True, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Do nothing: what is below may be no file at all."""

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        inside = self._inside(offset, length)
        return self._disk.data_extents(offset, inside) if inside else iter(())

    def sync(self) -> None:
        """Do nothing: it ends with its process."""

    def close(self) -> None:
        """Drop the changes."""
        self._disk.close()

    def _inside(self, offset: int, length: int) -> int:
        """Return how many bytes of a range lie in what was put."""
        return max(0, min(length, self._below.size - offset))
