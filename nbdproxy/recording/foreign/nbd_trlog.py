"""Transaction logs of nbd-server (`transactionlog`, with `datalog`), as nbd-trplay replays them.

Big-endian records, one behind the other:

    switch   u32 0x25609514, u32 type 1, u64 0, u64 0x4a93ba39a54f31b6, u32 on: whether the writes
             that follow have their data in the log; a log with data begins with one
    request  u32 0x25609513, u16 flags, u16 command, u64 cookie, u64 offset, u32 length, as it came
             from the client; behind a WRITE its data, if that is on
    reply    u32 0x67446698, u32 error, u64 cookie; without the data of a READ
    chunk    u32 0x668e33ef, u16 flags, u16 type, u64 cookie, u32 length: the head of a structured
             reply without its payload (servers from 3.25 on; flag 1 ends the reply, types from
             0x8000 are errors)

A request stands where the server read it, its reply where it was about to send it.

The reader stops at the first record that is not wholly there, or that is none, and says so in
`missing`. Not covered: which client a record is of. The server keeps one log for all, and each
client's own position in it, so the records of several clients lie over each other.

Sources: nbd 3.24, nbd-server.c, nbd-helper.h, nbd.h, nbd-trplay.c; logs of that server.
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from nbdproxy.errors import RecordingError
from nbdproxy.recording.foreign.formats import TRIMMED, ZEROES, LogFile, Touches
from nbdproxy.requests import MODIFYING, Command, CommandFlag, NbdErrno

LENGTH_MAX = (1 << 32) - 1
"""The longest request that a record can tell of, in bytes."""
FLAGS = CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO
"""The flags of a request that mean something to a disk."""

_SWITCH_MAGIC = 0x25609514
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF
_DATA_SWITCH = 1
_SWITCH_FROM = 0x4A93BA39A54F31B6

_SWITCH = struct.Struct(">IIQQI")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_ERROR_MAX = 1 << 16
_BYTES_MAX = 1 << 62
_LAST_CHUNK, _FIRST_ERROR = 1, 0x8000
_AHEAD = 64 * 1024

V = TypeVar("V")


class Asked(NamedTuple):
    """A request; `position` is where a WRITE's data begins in the log, ZEROES for the others."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    position: int

    @property
    def end(self) -> int:
        """The first byte behind the request."""
        return self.offset + self.length


class Answered(NamedTuple):
    """A reply; `error` is an NBD number, 0 for success."""

    cookie: int
    error: int


@dataclass(frozen=True, slots=True)
class LogSurvey:
    """What a pass over a log found.

    errors     the error of each request that got one, by its number among the log's requests
    touches    what the others leave where, in the order of the requests
    unanswered how many requests, DISC aside, got no reply
    stray      how many replies belong to no request
    """

    errors: dict[int, int]
    touches: Touches
    unanswered: int
    stray: int


class TransactionLog:
    """A log that is open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing: str | None = None
        """After a pass: what of the log is not there, in a sentence, None if all is."""
        self._file = LogFile(path)
        self._ahead = b""
        self._ahead_at = 0

    @property
    def size(self) -> int:
        """The log's own size in bytes."""
        return self._file.size

    def records(self) -> Iterator[Asked | Answered]:
        """Yield requests and replies in the log's order.

        Afterwards `missing` is right. Raises RecordingError at a WRITE that is logged without data.
        """
        self.missing = None
        at, with_data = 0, False
        while at < self.size:
            size, record = self._record(at, with_data=with_data)
            if not size or at + size > self.size:
                self._stop(at)
                return
            if isinstance(record, bool):
                with_data = record
            elif record is not None:
                yield record
            at += size

    def _record(self, at: int, *, with_data: bool) -> tuple[int, Asked | Answered | bool | None]:
        """Return a record's size and what it says; a bool is the switch's, size 0 is none."""
        head = self._peek(at, _SWITCH.size)
        magic = int.from_bytes(head[:4], "big")
        if magic == _REQUEST_MAGIC and len(head) >= _REQUEST.size:
            return self._request(at, head, with_data=with_data)
        if magic == _REPLY_MAGIC and len(head) >= _REPLY.size:
            _, error, cookie = _REPLY.unpack_from(head)
            # NBD's errors are small; a number that no recording can hold is one all the same.
            return _REPLY.size, Answered(cookie, error if error < _ERROR_MAX else NbdErrno.EIO)
        if magic == _SWITCH_MAGIC and len(head) >= _SWITCH.size:
            _, kind, _, origin, on = _SWITCH.unpack_from(head)
            known = kind == _DATA_SWITCH and origin == _SWITCH_FROM
            return _SWITCH.size, bool(on) if known else None
        if magic == _CHUNK_MAGIC and len(head) >= _CHUNK.size:
            _, flags, kind, cookie, _ = _CHUNK.unpack_from(head)
            # The number of the error stands in the payload, which is not in the log.
            error = int(NbdErrno.EIO) if kind >= _FIRST_ERROR else 0
            return _CHUNK.size, Answered(cookie, error) if flags & _LAST_CHUNK else None
        return 0, None

    def _request(self, at: int, head: bytes, *, with_data: bool) -> tuple[int, Asked]:
        _, flags, command, cookie, offset, length = _REQUEST.unpack_from(head)
        if command != Command.WRITE:
            return _REQUEST.size, Asked(flags, command, cookie, offset, length, ZEROES)
        if not with_data:
            raise RecordingError(
                f"{self.path} was made without the data of its writes; log again with the line "
                "datalog = true beside transactionlog"
            )
        position = at + _REQUEST.size
        return _REQUEST.size + length, Asked(flags, command, cookie, offset, length, position)

    def _stop(self, at: int) -> None:
        self.missing = (
            f"the record at byte {at:,} of {self.path} is cut off, or none that is known: it and "
            f"the {self.size - at:,} bytes from there on are left out"
        )

    def _peek(self, at: int, count: int) -> bytes:
        start = at - self._ahead_at
        if start < 0 or start + count > len(self._ahead):
            self._ahead, self._ahead_at = self._file.read(at, _AHEAD), at
            start = 0
        return self._ahead[start : start + count]

    def survey(self) -> LogSurvey:
        """Pass over all of the log but the data."""
        errors: dict[int, int] = {}
        asked: defaultdict[int, deque[int]] = defaultdict(deque)
        number = stray = 0
        for record in self.records():
            if isinstance(record, Asked):
                if record.command != Command.DISC:
                    asked[record.cookie].append(number)
                number += 1
            elif record.cookie not in asked:
                stray += 1
            else:
                answered = take(asked, record.cookie)
                if record.error:
                    errors[answered] = record.error
        touches = Touches()
        requests = (record for record in self.records() if isinstance(record, Asked))
        for number, request in enumerate(requests):
            if request.command in MODIFYING and number not in errors:
                if request.end > _BYTES_MAX:
                    raise RecordingError(
                        f"{self.path} has a request for byte {request.end:,}, which no disk has: "
                        "it is damaged; log again"
                    )
                trimmed = request.command == Command.TRIM
                touches.add(*request[3:5], TRIMMED if trimmed else request.position)
        return LogSurvey(errors, touches, sum(map(len, asked.values())), stray)

    def touches(self) -> Touches:
        """Return what the log leaves where; what was answered with an error leaves nothing."""
        return self.survey().touches

    def read_into(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from `position` of the log; RecordingError if it ends before."""
        self._file.read_into(position, buffer)

    def close(self) -> None:
        """Release the file; closing twice is harmless."""
        self._file.close()


def take(asked: defaultdict[int, deque[V]], cookie: int) -> V:
    """Take out what waits longest for a reply to `cookie`; clients use cookies again."""
    waiting = asked[cookie]
    oldest = waiting.popleft()
    if not waiting:
        del asked[cookie]
    return oldest


class TransactionLogWriter:
    """Writes a log with data to a new file, which stays the caller's.

    Raises OSError as the file does.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.write(_SWITCH.pack(_SWITCH_MAGIC, _DATA_SWITCH, 0, _SWITCH_FROM, 1))

    def request(self, asked: Asked, data: Iterator[memoryview]) -> None:
        """Append a request; the parts of a WRITE's `data` have its length together."""
        flags, command, cookie, offset, length, _ = asked
        self._file.write(_REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length))
        for part in data:
            self._file.write(part)

    def reply(self, cookie: int, error: int) -> None:
        """Append a reply."""
        self._file.write(_REPLY.pack(_REPLY_MAGIC, error, cookie))
