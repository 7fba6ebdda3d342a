"""One request in flight, as the client sees it: its reply is checked chunk by chunk.

A `Flight` refuses what the specification forbids a server (proto.md, "Structured reply types"),
and does so before anything is waited for: `announce` judges a chunk by its header, `look` by the
first bytes of its payload, `take` turns it into an event once it is whole. After that a caller may
rely on this: data and holes lie inside the request and never overlap; a READ that ends without an
error was covered to the last byte; extents are not empty, follow each other and stay inside the
export.

Not covered: the order of replies, which is the server's choice; extents that are not multiples of
the smallest block, which the specification allows at the end of an export.
"""

from __future__ import annotations

from typing import NamedTuple

from nbdproxy.errors import ProtocolError
from nbdproxy.extents import ExtentSet
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import (
    CHUNK_DONE,
    CHUNK_ERROR_BIT,
    MAX_PIECES,
    MAX_REPLY_EXTENTS,
    MAX_STRING,
    BlockState,
    Chunk,
    ReplyStyle,
)
from nbdproxy.nbd.events import ClientEvent, DataReceived, Finished, HoleReceived, StatusReceived
from nbdproxy.requests import Command, CommandFlag, NbdErrno, Request

# Plain integers: operators of IntEnum and IntFlag are slow, and these are in the hot path.
_READ, _STATUS = int(Command.READ), int(Command.BLOCK_STATUS)
_DF, _REQ_ONE = int(CommandFlag.DF), int(CommandFlag.REQ_ONE)
_NONE, _DATA, _HOLE = int(Chunk.NONE), int(Chunk.OFFSET_DATA), int(Chunk.OFFSET_HOLE)
_ERROR_OFFSET = int(Chunk.ERROR_OFFSET)
_ALLOCATION_BITS = int(BlockState.HOLE | BlockState.ZERO)
_DATA_HEAD = codec.DATA_HEAD.size

_LONGEST_ERROR = 2 * MAX_STRING
"""Bytes of an error chunk: its text, and ample room for fields that nobody knows yet."""

_ERRORS = frozenset(map(int, NbdErrno))


class Agreed(NamedTuple):
    """What a reply depends on besides its request: the export's size in bytes, and the haggling."""

    size: int
    style: ReplyStyle
    context: int | None


class Flight:
    """A request in flight, and what of its reply has come."""

    __slots__ = (
        "_agreed",
        "_answered",
        "_error",
        "_got",
        "_pieces",
        "_text",
        "command",
        "cookie",
        "flags",
        "length",
        "offset",
    )

    def __init__(self, request: Request, agreed: Agreed) -> None:
        self.command, self.flags, self.cookie, self.offset, self.length, _ = request
        self._agreed = agreed
        self._answered = False
        """Whether there was a chunk that answers the request, rather than tell of an error."""
        self._got = 0
        """Bytes of a READ that have come."""
        self._pieces: ExtentSet | None = None
        """Where later content must not lie; None as long as all content is in one chunk."""
        self._error = 0
        self._text = ""

    def simple(self, error: int) -> Finished:
        """Return what a simple reply means; data of a READ comes before it."""
        if self._answered or self._error:
            raise ProtocolError("the server ended a reply in chunks with a simple one")
        if self._agreed.style is not ReplyStyle.SIMPLE:
            if self.command == _READ:
                raise ProtocolError("the server answered READ with a simple reply")
            if self.command == _STATUS and not error:
                raise ProtocolError("the server answered BLOCK_STATUS without a status")
        return Finished(self.cookie, _known(error), "")

    def announce(self, kind: int, flags: int, length: int) -> None:
        """Check the header of a chunk against the request and what of its reply has come."""
        shortest = longest = 0
        if kind & CHUNK_ERROR_BIT:
            tail = _DATA_HEAD if kind == _ERROR_OFFSET else 0
            shortest, longest = codec.ERROR_HEAD.size + tail, _LONGEST_ERROR
        elif kind == _NONE:
            if not flags & CHUNK_DONE:
                raise ProtocolError("the server sent an empty chunk that is not the last")
        elif kind in (_DATA, _HOLE) and self.command == _READ:
            self._announce_content()
            if kind == _HOLE:
                shortest = longest = codec.HOLE.size
            else:
                shortest, longest = _DATA_HEAD + 1, _DATA_HEAD + self.length - self._got
        elif kind == self._status_kind and self.command == _STATUS:
            if self._answered:
                raise ProtocolError("the server told the status of the same context twice")
            head, each = self._status_sizes
            most = 1 if self.flags & _REQ_ONE else max(1, min(MAX_REPLY_EXTENTS, self.length))
            shortest, longest = head + each, head + each * most
            if (length - head) % each:
                raise ProtocolError(f"the server sent a status of {length} bytes")
        else:
            raise ProtocolError(f"the server answered {self._what} with a chunk of type {kind}")
        if not shortest <= length <= longest:
            raise ProtocolError(
                f"the server answered {self._what} of {self.length} bytes "
                f"with a chunk of type {kind} and {length} bytes"
            )

    def look(self, kind: int, length: int, body: memoryview) -> None:
        """Check as much as there is of a chunk's payload, which will have `length` bytes."""
        if kind == _DATA and len(body) >= _DATA_HEAD:
            (offset,) = codec.DATA_HEAD.unpack_from(body)
            self._check_place(offset, length - _DATA_HEAD)
        elif kind == self._status_kind and len(body) >= self._status_sizes[0]:
            self._check_status_head(length, body)

    def take(self, kind: int, body: memoryview) -> ClientEvent | None:
        """Return what a whole chunk means; None for one that has no content."""
        self.look(kind, len(body), body)
        if kind & CHUNK_ERROR_BIT:
            self._take_error(kind, body)
            return None
        if kind == _NONE:
            return None
        self._answered = True
        if kind == _DATA:
            (offset,) = codec.DATA_HEAD.unpack_from(body)
            data = body[_DATA_HEAD:]
            self._cover(offset, len(data))
            return DataReceived(self.cookie, offset, data)
        if kind == _HOLE:
            offset, length = codec.HOLE.unpack(body)
            self._check_place(offset, length)
            self._cover(offset, length)
            return HoleReceived(self.cookie, offset, length)
        return StatusReceived(self.cookie, self._extents(body))

    def finish(self) -> Finished:
        """Return what the whole reply means, after its last chunk."""
        if not self._error:
            if self.command == _READ and self._got != self.length:
                raise ProtocolError(
                    f"the server sent {self._got} bytes for a READ of {self.length} bytes"
                )
            if self.command == _STATUS and not self._answered:
                raise ProtocolError("the server answered BLOCK_STATUS without a status")
        return Finished(self.cookie, self._error, self._text)

    @property
    def _what(self) -> str:
        known = self.command in Command.__members__.values()
        return Command(self.command).name if known else f"command {self.command}"

    @property
    def _status_kind(self) -> int | None:
        """The type of the one chunk that may tell a status on this connection."""
        if self._agreed.context is None:
            return None
        extended = self._agreed.style is ReplyStyle.EXTENDED
        return Chunk.BLOCK_STATUS_EXT if extended else Chunk.BLOCK_STATUS

    @property
    def _status_sizes(self) -> tuple[int, int]:
        """Bytes in front of the extents, and of each."""
        if self._agreed.style is ReplyStyle.EXTENDED:
            return codec.STATUS_EXT_HEAD.size, codec.STATUS_EXT_EXTENT.size
        return codec.STATUS_HEAD.size, codec.STATUS_EXTENT.size

    def _announce_content(self) -> None:
        if self._got >= self.length:
            raise ProtocolError("the server sent more data than was asked for")
        if self._answered and self.flags & _DF:
            raise ProtocolError("the server cut a READ into pieces that must not be")

    def _check_place(self, offset: int, length: int) -> None:
        end = offset + length
        if not length or offset < self.offset or end > self.offset + self.length:
            raise ProtocolError(
                f"the server sent {length} bytes at {offset}, outside of what was asked for"
            )
        if self._pieces is not None and next(self._pieces.overlapping(offset, end), None):
            raise ProtocolError(f"the server sent the bytes at {offset} twice, or after an error")

    def _cover(self, offset: int, length: int) -> None:
        self._got += length
        if length < self.length:
            self._add_piece(offset, offset + length)

    def _add_piece(self, start: int, end: int) -> None:
        if self._pieces is None:
            self._pieces = ExtentSet()
        self._pieces.add(start, end)
        if len(self._pieces) > MAX_PIECES:
            raise ProtocolError("the server sent a READ in far too many pieces")

    def _take_error(self, kind: int, body: memoryview) -> None:
        error, length = codec.ERROR_HEAD.unpack_from(body)
        if not error:
            raise ProtocolError("the server sent an error chunk without an error")
        begin = codec.ERROR_HEAD.size
        tail = _DATA_HEAD if kind == _ERROR_OFFSET else 0
        if length > min(MAX_STRING, len(body) - begin - tail):
            raise ProtocolError(f"the server sent an error with a text of {length} bytes")
        if tail:
            (offset,) = codec.DATA_HEAD.unpack_from(body, begin + length)
            if not self.offset <= offset < self.offset + self.length:
                raise ProtocolError(f"the server told of an error at {offset}, outside the request")
            if self.command == _READ:  # content may come before its error, not behind it
                self._add_piece(offset, offset + 1)
        if not self._error:
            self._error = _known(error)
            self._text = codec.printable(bytes(body[begin : begin + length]))

    def _check_status_head(self, length: int, body: memoryview) -> None:
        head, each = self._status_sizes
        if self._agreed.style is ReplyStyle.EXTENDED:
            context, count = codec.STATUS_EXT_HEAD.unpack_from(body)
            if count != (length - head) // each:
                raise ProtocolError(f"the server sent {length} bytes of {count} extents")
        else:
            (context,) = codec.STATUS_HEAD.unpack_from(body)
        if context != self._agreed.context:
            raise ProtocolError(f"the server told the status of context {context}, never agreed on")

    def _extents(self, body: memoryview) -> list[tuple[int, int]]:
        """Return the extents of a status; none is of length 0, none ends behind the export."""
        head, _ = self._status_sizes
        extended = self._agreed.style is ReplyStyle.EXTENDED
        form = codec.STATUS_EXT_EXTENT if extended else codec.STATUS_EXTENT
        extents, total = [], 0
        for length, flags in form.iter_unpack(body[head:]):
            if not length:
                raise ProtocolError("the server sent an extent of no length")
            # Integers do not wrap here, so no sum can be made small (CVE-2023-5871).
            if total and total >= self.length:
                raise ProtocolError("the server sent an extent behind what was asked for")
            if flags >> 32:
                raise ProtocolError(f"the server sent {flags:#x} as flags of an extent")
            total += length
            extents.append((length, flags & _ALLOCATION_BITS))
        if self.offset + total > self._agreed.size:
            raise ProtocolError("the server sent an extent that ends behind the export")
        if self.flags & _REQ_ONE and total > self.length:
            raise ProtocolError("the server sent an extent longer than asked for")
        return extents


def _known(error: int) -> int:
    """Return an error that the specification names; any other counts as EINVAL."""
    return error if error in _ERRORS else int(NbdErrno.EINVAL)
