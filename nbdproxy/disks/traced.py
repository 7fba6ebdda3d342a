"""`TracedDisk`: a disk that remembers what was read of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent, ExtentSet


class TracedDisk:
    """`below`, read-only; `reads` is every byte that an answer of it depended on.

    A question for data and holes counts as reading the range that was asked for. Several threads
    may read.
    """

    def __init__(self, below: ReadableDevice) -> None:
        self._below = below
        self.size = below.size
        self._reads = ExtentSet()
        self._lock = threading.Lock()

    @property
    def reads(self) -> ExtentSet:
        """What was read so far; a copy."""
        with self._lock:
            return ExtentSet(self._reads)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        self._note(offset, length)
        return self._below.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._note(offset, len(buffer))
        self._below.pread_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        self._note(offset, length)
        return self._below.data_extents(offset, length)

    def close(self) -> None:
        """Close the disk below."""
        self._below.close()

    def _note(self, offset: int, length: int) -> None:
        with self._lock:
            self._reads.add(offset, offset + length)
