"""A copy-on-write overlay: writes go to a scratch file, the disk below is never touched."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

from nbdproxy.disks import holes
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.fallocate import punch_hole
from nbdproxy.disks.scratch import close_scratch, open_scratch, write_scratch
from nbdproxy.extents import Extent, ExtentSet

_ZEROES = memoryview(bytes(1024 * 1024))


class OverlayDisk:
    """`below` with private changes, as a `BlockDevice`; the changes go with `close`.

    It `owns` the disk below, and closes it, unless told that it does not.
    """

    def __init__(self, below: ReadableDevice, *, owns: bool = True) -> None:
        self._below = below
        self._owns = owns
        self.size = below.size
        self._scratch = open_scratch(self.size)
        self._written = ExtentSet()
        # Cold reads run in threads, and the set may not change while it is looked through.
        self._lock = threading.Lock()

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        end = offset + len(buffer)
        with self._lock:
            written = list(self._written.overlapping(offset, end))
            missing = list(self._written.missing(offset, end))
        for part in written:
            os.preadv(
                self._scratch, [buffer[part.offset - offset : part.end - offset]], part.offset
            )
        for part in missing:
            piece = buffer[part.offset - offset : part.end - offset]
            self._below.pread_into(part.offset, piece)

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if all of it was written here; what is below may block."""
        if not self._written.covers(offset, offset + len(buffer)):
            return False
        self.pread_into(offset, buffer)
        return True

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        write_scratch(self._scratch, data, offset)
        self._add(offset, offset + len(data))

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_punch: bool,  # noqa: ARG002
        fast: bool = False,
    ) -> None:
        """Make a range read as zeroes; a scratch file has no use for keeping it allocated."""
        try:
            punch_hole(self._scratch, offset, length)
        except OSError:  # not every filesystem can
            if fast:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
            for at in range(offset, offset + length, len(_ZEROES)):
                part = _ZEROES[: min(len(_ZEROES), offset + length - at)]
                write_scratch(self._scratch, part, at)
        self._add(offset, offset + length)

    def _add(self, start: int, end: int) -> None:
        with self._lock:
            self._written.add(start, end)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Give a range back; it reads as zeroes afterwards."""
        self.zero(offset, length, may_punch=True, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Do nothing: what was written here is warm, and below may be no file at all."""

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what holds data here, where something was written, and below elsewhere."""
        with self._lock:
            written = list(self._written.overlapping(offset, offset + length))
        at = offset
        for part in written:
            if at < part.offset:
                yield from self._below.data_extents(at, part.offset - at)
            yield from holes.data_extents(self._scratch, part.offset, part.length)
            at = part.end
        if at < offset + length:
            yield from self._below.data_extents(at, offset + length - at)

    def written(self) -> list[Extent]:
        """Return what was written here, zeroes included."""
        with self._lock:
            return list(self._written)

    def sync(self) -> None:
        """Do nothing: an overlay ends with its process, so there is nothing to make durable."""

    def close(self) -> None:
        """Drop the changes, and close the disk below if it is owned."""
        scratch, self._scratch = self._scratch, -1
        close_scratch(scratch)
        if self._owns:
            self._below.close()
