"""The end of a foreign log, read from the log itself, and whether an image is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbdproxy.crash.states.paint import Painting
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.extents import Extent
from nbdproxy.recording.foreign.dm_log_writes import DmLog
from nbdproxy.recording.foreign.formats import TRIMMED
from nbdproxy.recording.foreign.nbd_trlog import TransactionLog
from nbdproxy.recording.index import BASE

_PART = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Compared:
    """How the end of a log compares with an image.

    `offset` is that of the first byte that differs, `pair` what it is in the log and in the image;
    None if they are equal. `trimmed` bytes before that differ only where a TRIM was the last.
    """

    offset: int | None
    pair: tuple[int, int]
    trimmed: int


def compare(log: DmLog | TransactionLog, recording: RecordedSource, image: Path) -> Compared:
    """Compare what the log leaves on the base with an image; the shorter ends in zeroes.

    What a trimmed place reads as is up to the store, so there nothing is a difference.
    """
    trimmed = 0
    with ExitStack() as stack:
        stack.enter_context(closing(recording))
        end = _End(log, stack.enter_context(closing(recording.base())))
        disk = stack.enter_context(closing(FileDisk(image, read_only=True)))
        for offset in range(0, max(end.size, disk.size), _PART):
            ours, theirs = (_part(one, offset) for one in (end, disk))
            if ours == theirs:
                continue
            differs = np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8)
            for start, stop in end.trimmed(offset, offset + _PART):
                part = slice(start - offset, stop - offset)
                trimmed += int(np.count_nonzero(differs[part]))
                differs[part] = False
            if differs.any():
                at = int(np.argmax(differs))
                return Compared(offset + at, (ours[at], theirs[at]), trimmed)
    return Compared(None, (0, 0), trimmed)


def _part(disk: ReadableDevice, offset: int) -> bytes:
    """Return a part of a disk; behind its end are zeroes."""
    count = max(min(_PART, disk.size - offset), 0)
    if not any(True for _ in disk.data_extents(offset, count)):
        return bytes(_PART)
    return disk.pread(offset, count).ljust(_PART, b"\0")


class _End:
    """The disk after all that a log says, as a `ReadableDevice`."""

    def __init__(self, log: DmLog | TransactionLog, base: ReadableDevice) -> None:
        self.size = base.size
        self._log = log
        self._base = base
        self._offset, length, self._position = log.touches().columns()
        self._painting = Painting(self._offset, length, np.arange(len(length), dtype=np.int32))

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        for start, stop, row in self._painting.segments(offset, offset + len(buffer)):
            part = buffer[start - offset : stop - offset]
            if row == BASE:
                self._base.pread_into(start, part)
            elif self._position[row] < 0:
                part[:] = bytes(len(part))
            else:
                self._log.read_into(int(self._position[row] + start - self._offset[row]), part)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what may hold anything but zeroes."""
        for start, stop, row in self._painting.segments(offset, offset + length):
            if row == BASE:
                yield from self._base.data_extents(start, stop - start)
            elif self._position[row] >= 0:
                yield Extent.between(start, stop)

    def trimmed(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of the parts of [first, last) where a TRIM was the last."""
        for start, stop, row in self._painting.segments(first, last):
            if row != BASE and self._position[row] == TRIMMED:
                yield start, stop

    def close(self) -> None:
        """Do nothing: log and base are the caller's."""
