"""Logs of the kernel's dm-log-writes target, version 1, which QEMU's blklogwrites writes too.

Little-endian, in units of the log's own sector size:

    sector 0     u64 magic 0x6a736677736872, u64 version 1, u64 entries, u32 sector size, zeroes
    an entry     one sector: u64 sector, u64 sectors, u64 flags, u64 data length, zeroes; behind
                 it the data, as many sectors as it says; none for DISCARD
    a mark       an entry of flags exactly MARK, no sectors, the text's length as data length, and
                 the text from byte 32

An entry with FLUSH and data is the flush, and then the write. The data length of anything but a
mark says nothing that the number of sectors does not.

The reader guarantees never to take for an entry what none of the writers can have written: unknown
flags, bytes where zeroes belong, nothing at all, data beyond the file's end. It stops there and
says so in `missing`. It does not read behind the last entry that the superblock counts unless it is
told to, because what stands there may be the rest of an older log, and looks the same.

Sources: Linux, Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md; xfstests,
src/log-writes; QEMU, block/blklogwrites.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntFlag
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nbdproxy.errors import RecordingError
from nbdproxy.recording.foreign.formats import DM_MAGIC, TRIMMED, LogFile, Touches, pieces

VERSION = 1
SECTOR = 512
"""The sector size of the logs that are written here, in bytes."""
END_MARK = "dm-log-writes-end"
"""The text of the mark that the kernel ends a log with."""
ZERO_PIECE = 8 * 1024 * 1024
"""The longest entry of zeroes in bytes: a replayer takes an entry into memory as a whole."""

DISCARD_PIECE = 128 * 1024 * 1024
"""The longest discard in bytes: `replay-log` leaves longer ones out, and says nothing, where its
disk cannot discard and it has to write zeroes."""

_SUPER = struct.Struct("<8sQQI")
_ENTRY = struct.Struct("<QQQQ")
_SECTOR_MAX = 1 << 23
_BYTES_MAX = 1 << 62


class LogFlag(IntFlag):
    """What an entry is."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


_KNOWN = int(LogFlag.FLUSH | LogFlag.FUA | LogFlag.DISCARD | LogFlag.METADATA)
"""The flags that may stand together."""


class LogEntry(NamedTuple):
    """One entry; `offset` and `length` in bytes of the disk.

    `position` is where its data begins in the log, TRIMMED for a DISCARD; `text` is a mark's, None
    of anything else; `end` is where the next entry begins in the log.
    """

    flags: int
    offset: int
    length: int
    position: int
    text: str | None
    end: int


class DmLog:
    """A log that is open for reading; RecordingError if its superblock cannot be.

    With `uncounted` what stands behind the counted entries is read as well, as far as it looks like
    entries.
    """

    def __init__(self, path: Path, *, uncounted: bool = False) -> None:
        self.path = path
        self.missing: str | None = None
        """After a pass: what of the log is not there, in a sentence, None if all is."""
        self.beyond = 0
        """After a pass: how many entries seem to stand behind the counted ones."""
        self.uncounted = uncounted
        self._file = LogFile(path)
        try:
            self.sector, self.counted = self._read_super()
            self._padding = bytes(self.sector - _ENTRY.size)
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> int:
        """The log's own size in bytes."""
        return self._file.size

    def _read_super(self) -> tuple[int, int]:
        start = self._file.read(0, _SUPER.size)
        if len(start) < _SUPER.size:
            raise RecordingError(f"{self.path} ends within its superblock: nothing of it is left")
        magic, version, counted, sector = _SUPER.unpack(start)
        if magic != DM_MAGIC:
            raise RecordingError(f"{self.path} is not a dm-log-writes log; check the path")
        if version != VERSION:
            raise RecordingError(
                f"{self.path} is a dm-log-writes log of version {version}, and only {VERSION} can "
                "be read; log again with a kernel that writes it"
            )
        if sector < SECTOR or sector > _SECTOR_MAX or sector & (sector - 1):
            raise RecordingError(
                f"{self.path} says that its sectors have {sector} bytes: its superblock is damaged"
            )
        return sector, counted

    def entries(self) -> Iterator[LogEntry]:
        """Yield the entries in the log's order; afterwards `missing` and `beyond` are right."""
        self.missing, self.beyond = None, 0
        at, number = self.sector, 0
        while number < self.counted:
            entry = self._entry(at)
            if entry is None:
                self.missing = (
                    f"entry {number} of {self.counted}, at byte {at:,} of {self.path}, is cut off "
                    "or damaged: it and all behind it is left out"
                )
                return
            yield entry
            at, number = entry.end, number + 1
        while (entry := self._entry(at)) is not None:
            self.beyond += 1
            if self.uncounted:
                yield entry
            at = entry.end

    def _entry(self, at: int) -> LogEntry | None:
        """Return the entry at a position; None if none can be there."""
        block = self._file.read(at, self.sector)
        if len(block) < self.sector:
            return None
        sector, sectors, flags, data = _ENTRY.unpack_from(block)
        end = at + self.sector
        if flags == LogFlag.MARK:
            text = block[_ENTRY.size : _ENTRY.size + data]
            if sectors or len(text) < data or any(block[_ENTRY.size + data :]):
                return None
            return LogEntry(flags, 0, 0, TRIMMED, text.decode(errors="surrogateescape"), end)
        length, offset = sectors * self.sector, sector * self.sector
        known = not flags & ~_KNOWN and bool(flags or sectors)
        if not known or data > length or block[_ENTRY.size :] != self._padding:
            return None
        stored = 0 if flags & LogFlag.DISCARD else length
        if offset + length > _BYTES_MAX or end + stored > self.size:
            return None
        return LogEntry(flags, offset, length, end if stored else TRIMMED, None, end + stored)

    def touches(self) -> Touches:
        """Return what the log leaves where, in its order."""
        touches = Touches()
        for entry in self.entries():
            touches.add(entry.offset, entry.length, entry.position)
        return touches

    def read_into(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from `position` of the log; RecordingError if it ends before."""
        self._file.read_into(position, buffer)

    def close(self) -> None:
        """Release the file; closing twice is harmless."""
        self._file.close()


class DmLogWriter:
    """Writes a log with sectors of `SECTOR` bytes to a new seekable file, which stays the caller's.

    Until `finish` the superblock counts no entry. Offsets and lengths are bytes and multiples of
    SECTOR. Raises OSError as the file does.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0
        """Entries so far."""
        self._super()
        self._file.seek(SECTOR)

    def flush(self) -> None:
        """Append a flush."""
        self._entry(LogFlag.FLUSH, 0, 0)

    def discard(self, offset: int, length: int, *, fua: bool) -> None:
        """Append discards, in pieces."""
        for at, count in pieces(offset, length, DISCARD_PIECE):
            self._entry(LogFlag.DISCARD | (LogFlag.FUA if fua else 0), at, count)

    def write(self, offset: int, length: int, data: Iterator[memoryview], *, fua: bool) -> None:
        """Append a write; the parts of `data` have `length` bytes together."""
        self._entry(LogFlag.FUA if fua else 0, offset, length)
        for part in data:
            self._file.write(part)

    def zeroes(self, offset: int, length: int, *, fua: bool) -> None:
        """Append writes of zeroes, in pieces; the log's file has holes for them."""
        for at, count in pieces(offset, length, ZERO_PIECE):
            self._entry(LogFlag.FUA if fua else 0, at, count)
            self._file.seek(count, 1)

    def mark(self, text: str) -> bool:
        """Append a mark; False if the text had to be cut to what an entry holds."""
        raw = text.encode(errors="surrogateescape")
        fits = raw[: SECTOR - _ENTRY.size - 1]
        self._entry(LogFlag.MARK, 0, 0, fits)
        return fits == raw

    def finish(self) -> None:
        """Append the mark that ends a log, and let the superblock count all entries."""
        self.mark(END_MARK)
        self._file.truncate()
        self._super()
        self._file.flush()

    def _entry(self, flags: int, offset: int, length: int, text: bytes = b"") -> None:
        assert not (offset | length) % SECTOR
        header = _ENTRY.pack(offset // SECTOR, length // SECTOR, flags, len(text))
        self._file.write((header + text).ljust(SECTOR, b"\0"))
        self.count += 1

    def _super(self) -> None:
        self._file.seek(0)
        self._file.write(_SUPER.pack(DM_MAGIC, VERSION, self.count, SECTOR).ljust(SECTOR, b"\0"))
