"""What all formats share: their names, how to tell them apart, what a conversion says of itself."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import data_path, events_path
from nbdproxy.recording.index import Numbers
from nbdproxy.recording.reader import no_recording

DM_MAGIC = struct.pack("<Q", 0x6A736677736872)
TRLOG_MAGICS = (struct.pack(">I", 0x25609514), struct.pack(">I", 0x25609513))
"""A transaction log begins with its switch for data, or, without data, with a request."""

ConversionProgress = Callable[[int, int], None]
"""Told how much of how much is done, in the unit that the conversion counts in."""


STEP = 1024
"""After so many entries, progress is told."""

ZEROES, TRIMMED = -1, -2
"""The `position` of zeroes that stand nowhere, and of what may read as anything."""


class LogFormat(StrEnum):
    """The formats, by the names that the command line has for them."""

    NBDPROXY = "nbdproxy"
    DM_LOG_WRITES = "dm-log-writes"
    NBD_TRLOG = "nbd-trlog"


def look(path: Path) -> LogFormat:
    """Tell by its first bytes which format `path` is of; RecordingError if it is of none."""
    if path.is_dir():
        if events_path(path).exists() and data_path(path).exists():
            return LogFormat.NBDPROXY
        raise no_recording(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(DM_MAGIC))
    except FileNotFoundError:
        raise RecordingError(f"there is nothing at {path}; check the path") from None
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror}") from None
    if start == DM_MAGIC:
        return LogFormat.DM_LOG_WRITES
    if start.startswith(TRLOG_MAGICS):
        return LogFormat.NBD_TRLOG
    raise RecordingError(
        f"{path} is neither a dm-log-writes log nor a transaction log of nbd-server, nor the "
        "folder of a recording; check the path"
    )


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion carried over, and what it has to say.

    counts     how many of each kind: write, write-zeroes, trim, flush, mark
    left_out   how many of each kind were not carried over, by a short name of the reason
    remarks    sentences about what the target lacks or cannot express
    missing    a sentence on what the source itself lacks, None if it is whole
    """

    counts: Mapping[str, int]
    left_out: Mapping[str, int]
    remarks: tuple[str, ...]
    missing: str | None


class Touches:
    """What a log leaves where: one row a write, in the log's order; 24 bytes each.

    `position` is where the data stands in the log's file, ZEROES for a write of zeroes, TRIMMED for
    a TRIM or DISCARD.
    """

    def __init__(self) -> None:
        self._offset, self._length, self._position = array("q"), array("q"), array("q")
        self.end = 0
        """The first byte behind all of them."""

    def __len__(self) -> int:
        return len(self._offset)

    def add(self, offset: int, length: int, position: int) -> None:
        """Append a row; an empty one is left away."""
        if length:
            self._offset.append(offset)
            self._length.append(length)
            self._position.append(position)
            self.end = max(self.end, offset + length)

    def columns(self) -> tuple[Numbers, Numbers, Numbers]:
        """Return offset, length and position; nothing may be added as long as they are in use."""
        offset, length, position = (
            np.frombuffer(column, np.int64) if column else np.empty(0, np.int64)
            for column in (self._offset, self._length, self._position)
        )
        return offset, length, position


class LogFile:
    """A file that is read by position. `size` is in bytes, of a block device too.

    Raises RecordingError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RecordingError(f"{path} cannot be read: {error.strerror}") from None
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def read(self, position: int, count: int) -> bytes:
        """Return up to `count` bytes from `position`."""
        try:
            return os.pread(self._fd, count, position)
        except OSError as error:
            raise RecordingError(
                f"{self.path} cannot be read at byte {position}: {error.strerror}; copy what can "
                "be read to a new file, and convert that"
            ) from None

    def read_into(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from `position`; RecordingError if the file ends before."""
        while buffer:
            got = os.preadv(self._fd, [buffer], position)
            if not got:
                raise RecordingError(f"{self.path} was cut off while it was read; convert again")
            buffer, position = buffer[got:], position + got

    def close(self) -> None:
        """Release the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def pieces(offset: int, length: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yield [offset, offset + length) as offset and length of pieces, none longer than `longest`.

    An empty range yields nothing.
    """
    for at in range(offset, offset + length, longest):
        yield at, min(longest, offset + length - at)


def said(count: int, one: str, many: str) -> str:
    """Return "1 write was" or "1,234 writes were", of the two wordings."""
    return f"{count:,} {one if count == 1 else many}"
