"""`ScratchCopy`: an image file to be written to and to grow, while the file itself stays as it is.

Copying a large file takes minutes and its room, so what is written goes to an unnamed sparse file
beside it, by blocks. Unlike `OverlayDisk` it costs the same however scattered the writes are: a
byte of memory, touched where something is written, for each block.
"""

from __future__ import annotations

import os

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.fallocate import punch_hole
from nbdproxy.disks.scratch import close_scratch, open_scratch, write_scratch

_BLOCK = 4096
_ZEROES = memoryview(bytes(1 << 20))


class ScratchCopy:
    """`below` with private changes and zeroes behind its end, `size` bytes in all.

    Owns `below`. Raises OSError as the files do. Belongs to one thread.
    """

    def __init__(self, below: ReadableDevice, size: int) -> None:
        self.size = size
        self._below = below
        self._scratch = open_scratch(size)
        self._is_here = bytearray(-(-size // _BLOCK))

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        at, end = offset, offset + len(buffer)
        while at < end:
            is_here = self._is_here[at // _BLOCK]
            other = self._is_here.find(not is_here, at // _BLOCK, -(-end // _BLOCK))
            stop = end if other < 0 else other * _BLOCK
            part = buffer[at - offset : stop - offset]
            if is_here:
                os.preadv(self._scratch, [part], at)
            else:
                self._from_below(at, part)
            at = stop

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        self._take(offset, offset + len(data))
        write_scratch(self._scratch, data, offset)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        self._take(offset, offset + length)
        try:
            punch_hole(self._scratch, offset, length)
        except OSError:  # not every filesystem can
            for at in range(offset, offset + length, len(_ZEROES)):
                write_scratch(self._scratch, _ZEROES[: offset + length - at], at)

    def close(self) -> None:
        """Drop the changes, and close the file below; closing twice is harmless."""
        scratch, self._scratch = self._scratch, -1
        close_scratch(scratch)
        self._below.close()

    def _take(self, start: int, end: int) -> None:
        """Take into the scratch file the blocks of a range that is going to be changed."""
        for edge in {start, end}:
            block = edge // _BLOCK
            if edge % _BLOCK and not self._is_here[block]:
                content = memoryview(bytearray(min(_BLOCK, self.size - block * _BLOCK)))
                self._from_below(block * _BLOCK, content)
                write_scratch(self._scratch, content, block * _BLOCK)
        first, last = start // _BLOCK, -(-end // _BLOCK)
        self._is_here[first:last] = b"\1" * (last - first)

    def _from_below(self, offset: int, buffer: memoryview) -> None:
        there = max(0, min(len(buffer), self._below.size - offset))
        if there:
            self._below.pread_into(offset, buffer[:there])
        buffer[there:] = bytes(len(buffer) - there)
