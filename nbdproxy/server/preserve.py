"""Saves what an image holds before it is changed for the first time.

Sits directly above the image, below every cache, so that what is saved is what the image held
when the recording began. Only what was data then has to be saved; holes were zeroes and are known
from the recording's META.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nbdproxy.disks.device import BlockDevice
from nbdproxy.extents import Extent
from nbdproxy.recording.writer import RecordingWriter

GRANULE = 4096
"""Bytes that are saved together: a filesystem block, which most writes are multiples of."""


_AT_ONCE = 256
"""Granules read at once: 1 MiB."""


class PreservingDisk:
    """`below`, as a `BlockDevice` that records before-images. Owns `below`.

    Memory is one byte for each granule that was data at the start. The event
    loop and a thread may save the same place at once: it is recorded twice then, and readers take
    the first, which is the one from before every change.
    """

    def __init__(self, below: BlockDevice, recorder: RecordingWriter) -> None:
        self._below = below
        self._recorder = recorder
        self.size = below.size
        self._unsaved = bytearray(-(-below.size // GRANULE))
        for start, length in recorder.meta.data:
            first, last = start // GRANULE, -(-(start + length) // GRANULE)
            self._unsaved[first:last] = b"\x01" * (last - first)

    def unsaved(self, offset: int, length: int) -> bool:
        """Tell whether a change of this range has something to save first."""
        first, last = offset // GRANULE, -(-(offset + length) // GRANULE)
        return self._unsaved.find(1, first, last) >= 0

    def save(self, offset: int, length: int, *, wait: bool = True) -> bool:
        """Record what is in the range and not saved yet.

        Without `wait`, False says that a cold page stopped it: call again from a thread.
        """
        first, last = offset // GRANULE, -(-(offset + length) // GRANULE)
        while (first := self._unsaved.find(1, first, last)) >= 0:
            limit = min(last, first + _AT_ONCE)
            end = self._unsaved.find(0, first, limit)
            end = limit if end < 0 else end
            start = first * GRANULE
            content = bytearray(min(end * GRANULE, self.size) - start)
            if wait:
                self._below.pread_into(start, memoryview(content))
            elif not self._below.try_pread_into(start, memoryview(content)):
                return False
            self._recorder.before(start, content)
            self._unsaved[first:end] = bytes(end - first)
            first = end
        return True

    def save_warm(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Save what is in the page cache, if it is little; return what is left for a thread."""
        left, room = [], _AT_ONCE * GRANULE
        for offset, length in ranges:
            if not self.unsaved(offset, length):
                continue
            if length <= room and self.save(offset, length, wait=False):
                room -= length
            else:
                left.append((offset, length))
        return left

    def save_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Record what is in all these ranges and not saved yet; blocks."""
        for offset, length in ranges:
            self.save(offset, length)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        return self._below.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._below.pread_into(offset, buffer)

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that does not block."""
        return self._below.try_pread_into(offset, buffer)

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Save what is there, then write."""
        if self.unsaved(offset, len(data)):
            self.save(offset, len(data))
        self._below.pwrite(offset, data)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Save what is there, then zero."""
        if self.unsaved(offset, length):
            self.save(offset, length)
        self._below.zero(offset, length, may_punch=may_punch, fast=fast)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Save what is there, then trim."""
        if self.unsaved(offset, length):
            self.save(offset, length)
        self._below.trim(offset, length, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Hand the hint on."""
        self._below.will_need(offset, length)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what holds data."""
        return self._below.data_extents(offset, length)

    def sync(self) -> None:
        """Make everything written so far durable."""
        self._below.sync()

    def close(self) -> None:
        """Close the disk below."""
        self._below.close()
