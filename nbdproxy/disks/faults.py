"""What a faulty disk shows in place of what it holds: an overlay of bytes that can be lifted.

The disk below stays pristine: an honest write goes there, and what reads shall show instead stands
here until it is overwritten or lifted (as tigerbeetle's storage fuzzer keeps its faults apart).
Belongs to one thread. The bytes are in an unnamed scratch file, which is given back when all are
gone.
"""

from __future__ import annotations

import os

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.scratch import close_scratch, open_scratch, write_scratch
from nbdproxy.extents import ExtentMap

_PIECE = 1 << 20


class FaultOverlay:
    """Ranges of a disk of `size` bytes that read otherwise than they are; none at the start."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scratch = -1
        self._end = 0
        self._shown: ExtentMap[int] = ExtentMap(lambda position, count: position + count)

    def __len__(self) -> int:
        return len(self._shown)

    @property
    def shown_bytes(self) -> int:
        """How many bytes of the disk read otherwise than they are."""
        return self._shown.total()

    def show(self, offset: int, data: bytes) -> None:
        """Let reads show `data` from `offset` on; what is not on the disk is left out."""
        start, end = max(0, offset), min(self._size, offset + len(data))
        if start >= end:
            return
        if self._scratch < 0:
            self._scratch = open_scratch()
        write_scratch(self._scratch, data[start - offset : end - offset], self._end)
        self._shown.set(start, end, self._end)
        self._end += end - start

    def hide(self, offset: int, length: int) -> None:
        """Let reads show what a range holds: it was written."""
        self._shown.remove(offset, offset + length)
        if not len(self._shown):
            self.lift()

    def touches(self, offset: int, length: int) -> bool:
        """Tell whether anything in a range is shown otherwise."""
        return any(True for _ in self._shown.overlapping(offset, offset + length))

    def patch(self, offset: int, buffer: memoryview) -> None:
        """Put what is shown into `buffer`, which was read from `offset` below."""
        for start, end, position in self._shown.overlapping(offset, offset + len(buffer)):
            os.preadv(self._scratch, [buffer[start - offset : end - offset]], position)

    def lift(self) -> None:
        """Show what the disk holds, everywhere."""
        self._shown.clear()
        if self._scratch >= 0:
            os.ftruncate(self._scratch, 0)
            self._end = 0

    def bake(self, disk: BlockDevice) -> None:
        """Write what is shown to the disk itself; blocks."""
        for start, end, position in self._shown:
            for at in range(0, end - start, _PIECE):
                count = min(_PIECE, end - start - at)
                disk.pwrite(start + at, os.pread(self._scratch, count, position + at))

    def close(self) -> None:
        """Drop everything; closing twice is harmless."""
        scratch, self._scratch = self._scratch, -1
        close_scratch(scratch)
        self._shown.clear()
