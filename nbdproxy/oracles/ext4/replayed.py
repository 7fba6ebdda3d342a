"""`ReplayedDevice`: a disk with the blocks of its journal laid over it, in memory, read-only.

Cheap to make: nothing is copied but the replayed blocks. The disk below is never written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from copy import copy

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent, ExtentSet


class ReplayedDevice:
    """`base` with its `blocks`, by number, replaced; closing it leaves `base` open."""

    def __init__(self, base: ReadableDevice, block_size: int, blocks: Mapping[int, bytes]) -> None:
        assert all(len(block) == block_size for block in blocks.values())
        self._base = base
        self.block_size = block_size
        self.blocks = blocks
        self._order = sorted(blocks)

    def over(self, base: ReadableDevice) -> ReplayedDevice:
        """Return the same blocks over another disk of the same size, which costs nothing."""
        result = copy(self)
        result._base = base
        return result

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._base.size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        first, last = self._touched(offset, length)
        if first == last:
            return self._base.pread(offset, length)
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; may block on a cold page."""
        self._base.pread_into(offset, buffer)
        first, last = self._touched(offset, len(buffer))
        for number in self._order[first:last]:
            start = number * self.block_size
            low, high = max(start, offset), min(start + self.block_size, offset + len(buffer))
            piece = self.blocks[number][low - start : high - start]
            buffer[low - offset : high - offset] = piece

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        found = ExtentSet()
        for extent in self._base.data_extents(offset, length):
            found.add(extent.offset, extent.end)
        first, last = self._touched(offset, length)
        for number in self._order[first:last]:
            start = number * self.block_size
            found.add(max(start, offset), min(start + self.block_size, offset + length))
        return iter(found)

    def close(self) -> None:
        """Do nothing: the disk below belongs to whoever opened it."""

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        first = bisect_left(self._order, offset // self.block_size)
        last = bisect_left(self._order, -(-(offset + length) // self.block_size), lo=first)
        return first, last
