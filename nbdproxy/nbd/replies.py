"""Replies of a server, put together in place so that one system call sends a batch of them.

The form follows what was negotiated: simple replies; structured ones, where a success without data
stays simple; extended ones. READ data is read straight into its place behind the header. Where
replies come in chunks, what is all zero travels as a hole: blocks of 4096 bytes are looked at once
they are there, so that it works over every disk and never says more than what was read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from nbdproxy.nbd.codec import (
    DATA_HEAD,
    ERROR_HEAD,
    EXTENDED_REPLY,
    HOLE,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)
from nbdproxy.nbd.constants import (
    ALLOCATION_ID,
    CHUNK_DONE,
    EXTENDED_REPLY_MAGIC,
    MAX_ERROR_TEXT,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    ReplyStyle,
)
from nbdproxy.requests import CommandFlag, Request

ARENA = 1024 * 1024
"""Bytes of replies that are collected without allocating anew."""

_BLOCK = 4096
"""The grain of holes; a filesystem block, and far more than the headers that a hole costs."""

_SHORTEST_HOLE = HOLE.size - DATA_HEAD.size
"""A shorter hole would be longer on the wire than its data, for which there is room."""

_ZEROES = bytes(64 * 1024)
_ZERO_BLOCK = bytes(_BLOCK)
_DF = int(CommandFlag.DF)
_LONGEST_EXTENT = 2**32 - 65536
"""The longest extent of a structured reply; aligned, and below 2^32 (CVE-2025-47711)."""


class Replies:
    """Collects the replies of one connection. `arena` is how many bytes to have ready."""

    def __init__(self, style: ReplyStyle = ReplyStyle.SIMPLE, *, arena: int = ARENA) -> None:
        self._style = style
        self._chunked = style is not ReplyStyle.SIMPLE
        self._extended = style is ReplyStyle.EXTENDED
        self._header = (SIMPLE_REPLY, STRUCTURED_REPLY, EXTENDED_REPLY)[style].size
        self._before_data = self._header + (DATA_HEAD.size if self._chunked else 0)
        self._arena = bytearray(arena)
        self._current, self._start, self._used = self._arena, 0, 0
        self._full: list[memoryview] = []

    def done(self, request: Request) -> None:
        """Say that a request without data in its reply succeeded."""
        if self._extended:
            place = self._reserve(self._header)
            self._put_header(place, request, Chunk.NONE, 0)
        else:
            place = self._reserve(SIMPLE_REPLY.size)
            SIMPLE_REPLY.pack_into(self._current, place, SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def fail(self, request: Request, error: int, text: str) -> None:
        """Say that a request failed; the text goes along where replies have room for one."""
        if not self._chunked:
            place = self._reserve(SIMPLE_REPLY.size)
            SIMPLE_REPLY.pack_into(self._current, place, SIMPLE_REPLY_MAGIC, error, request.cookie)
            return
        words = text.encode(errors="replace")[:MAX_ERROR_TEXT].decode(errors="ignore").encode()
        length = ERROR_HEAD.size + len(words)
        place = self._reserve(self._header + length)
        self._put_header(place, request, Chunk.ERROR, length)
        ERROR_HEAD.pack_into(self._current, place + self._header, error, len(words))
        self._current[place + self._header + ERROR_HEAD.size : self._used] = words

    def reserve_read(self, request: Request) -> memoryview:
        """Return the place for a READ's data; `finish_read` or `take_back_read` come next."""
        place = self._reserve(self._before_data + request.length)
        if self._chunked:
            begin = place + self._before_data
            self._put_data(begin, request, request.offset, request.length, CHUNK_DONE)
        else:
            SIMPLE_REPLY.pack_into(self._current, place, SIMPLE_REPLY_MAGIC, 0, request.cookie)
        return memoryview(self._current)[place + self._before_data : self._used]

    def take_back_read(self, request: Request) -> None:
        """Drop the READ that was reserved last."""
        self._used -= self._before_data + request.length

    def finish_read(self, request: Request) -> None:
        """Say that the READ that was reserved last has its data: what is zero becomes holes."""
        if not self._chunked:
            return
        first, last = self._used - request.length, self._used
        if request.length >= _SHORTEST_HOLE and _is_zero(self._current, first, last):
            self._cut_into_pieces(request, [(first, last)])
        elif request.length > _BLOCK and not request.flags & _DF:
            runs = list(_zero_runs(self._current, first, last, request.offset))
            if runs:
                self._cut_into_pieces(request, runs)

    def status(self, request: Request, extents: Sequence[tuple[int, int]]) -> None:
        """Answer BLOCK_STATUS with (length in bytes, flags) of extents, from its offset on."""
        if self._extended:
            numbers = [number for extent in extents for number in extent]
            data = struct.pack(f">II{len(numbers)}Q", ALLOCATION_ID, len(extents), *numbers)
        else:
            numbers = [number for extent in _short(extents) for number in extent]
            data = struct.pack(f">I{len(numbers)}I", ALLOCATION_ID, *numbers)
        kind = Chunk.BLOCK_STATUS_EXT if self._extended else Chunk.BLOCK_STATUS
        place = self._reserve(self._header + len(data))
        self._put_header(place, request, kind, len(data))
        self._current[place + self._header : self._used] = data

    def take(self) -> list[memoryview]:
        """Return all there is to send and begin anew.

        The views are reused by the next batch: they must be sent before anything is added.
        """
        self._end_part(self._used)
        parts = self._full
        self._full = []
        self._current, self._start, self._used = self._arena, 0, 0
        return parts

    def _reserve(self, length: int) -> int:
        """Make room for `length` more bytes; return where they begin in `_current`."""
        if self._used + length > len(self._current):
            self._end_part(self._used)
            self._current = bytearray(max(length, len(self._arena)))
            self._start = self._used = 0
        place = self._used
        self._used += length
        return place

    def _end_part(self, end: int) -> None:
        if end > self._start:
            self._full.append(memoryview(self._current)[self._start : end])

    def _put_header(
        self, place: int, request: Request, kind: int, length: int, flags: int = CHUNK_DONE
    ) -> None:
        if self._extended:
            EXTENDED_REPLY.pack_into(
                self._current,
                place,
                EXTENDED_REPLY_MAGIC,
                flags,
                kind,
                request.cookie,
                request.offset,
                length,
            )
        else:
            STRUCTURED_REPLY.pack_into(
                self._current, place, STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length
            )

    def _put_data(self, end: int, request: Request, offset: int, length: int, flags: int) -> None:
        """Put the header of data that begins at `end` of the buffer in front of it."""
        place = end - self._before_data
        self._put_header(place, request, Chunk.OFFSET_DATA, DATA_HEAD.size + length, flags)
        DATA_HEAD.pack_into(self._current, end - DATA_HEAD.size, offset)

    def _cut_into_pieces(self, request: Request, holes: Sequence[tuple[int, int]]) -> None:
        """Turn the zeroes at `holes`, places in the buffer, into chunks without data.

        A hole's own zeroes are the room for its chunk and for the header of the data behind it,
        so nothing moves.
        """
        first, last = self._used - request.length, self._used
        where = request.offset - first
        if holes[0][0] > first:
            self._put_data(first, request, request.offset, holes[0][0] - first, 0)
        for (start, end), following in zip(holes, [*holes[1:], (last, last)], strict=True):
            place = start if start > first else first - self._before_data
            flags = CHUNK_DONE if end == last else 0
            self._put_header(place, request, Chunk.OFFSET_HOLE, HOLE.size, flags)
            HOLE.pack_into(self._current, place + self._header, start + where, end - start)
            self._used = place + self._header + HOLE.size
            if end < last:
                self._end_part(self._used)
                flags = CHUNK_DONE if following[0] == last else 0
                self._put_data(end, request, end + where, following[0] - end, flags)
                self._start, self._used = end - self._before_data, following[0]


def _short(extents: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield extents whose lengths fit into 32 bits, up to the first that is cut for that."""
    for length, flags in extents:
        yield min(length, _LONGEST_EXTENT), flags
        if length > _LONGEST_EXTENT:
            return


def _is_zero(buffer: bytearray, start: int, end: int) -> bool:
    while start < end:
        step = min(end - start, len(_ZEROES))
        if not buffer.startswith(_ZEROES[:step], start):
            return False
        start += step
    return True


def _zero_runs(buffer: bytearray, start: int, end: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of whole zero blocks in the buffer; `offset` is of `start` on the disk."""
    run = at = start + -offset % _BLOCK
    while at + _BLOCK <= end:
        if not buffer.startswith(_ZERO_BLOCK, at):
            if run < at:
                yield run, at
            run = at + _BLOCK
        at += _BLOCK
    if run < at:
        yield run, at
