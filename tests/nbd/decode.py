"""A strict reader of a server's replies in all three styles; shares nothing with the product.

`decode` takes the whole stream and the requests it answers, and returns what each was told. Every
MUST of the specification that can be seen in a reply is checked on the way, and some SHOULDs:
lengths are multiples of the minimum block, an error's text is short enough for QEMU.

Not covered: the negotiation; replies that are interleaved are, though our server sends none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.nbd import spec

SIMPLE_MAGIC, STRUCTURED_MAGIC, EXTENDED_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C
DONE = 1
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
READ, BLOCK_STATUS = 0, 7
ERRORS = {1, 5, 12, 22, 28, 75, 95, 108}


class Sent(NamedTuple):
    """A request that was answered."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


@dataclass
class Answer:
    """What a request was told. `pieces` are (kind, offset, length) of its content chunks."""

    error: int = 0
    text: str = ""
    data: bytearray = field(default_factory=bytearray)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)
    done: bool = False


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        assert self.at + count <= len(self.data), "the stream ends within a reply"
        self.at += count
        return self.data[self.at - count : self.at]

    def fields(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))


def decode(
    stream: bytes, style: int, sent: Iterable[Sent], *, min_block: int = 1
) -> dict[int, Answer]:
    """What the requests, whose cookies differ, were told; AssertionError for a wrong stream."""
    asked = {request.cookie: request for request in sent}
    answers: dict[int, Answer] = {cookie: Answer() for cookie in asked}
    rest = _Stream(stream)
    while rest.at < len(stream):
        (magic,) = rest.fields(">I")
        if magic == SIMPLE_MAGIC:
            error, cookie = rest.fields(">IQ")
            _simple(rest, style, asked[cookie], answers[cookie], error)
            continue
        assert magic == (0, STRUCTURED_MAGIC, EXTENDED_MAGIC)[style], f"magic {magic:#x}"
        flags, kind, cookie = rest.fields(">HHQ")
        request, answer = asked[cookie], answers[cookie]
        if style == spec.EXTENDED:
            offset, length = rest.fields(">QQ")
            assert offset == request.offset, "the offset is not the request's"
        else:
            (length,) = rest.fields(">I")
        assert flags in {0, DONE}, f"reply flags {flags}"
        assert not answer.done, "a reply goes on behind its end"
        answer.done = bool(flags & DONE)
        _chunk(_Stream(rest.take(length)), kind, request, answer, style)
    for cookie, request in asked.items():
        _whole(request, answers[cookie], style, min_block)
    return answers


def _simple(rest: _Stream, style: int, request: Sent, answer: Answer, error: int) -> None:
    assert style != spec.EXTENDED, "a simple reply with extended headers"
    assert style == spec.SIMPLE or request.command != READ, "a READ was answered by a simple reply"
    assert not answer.done, "a request was answered twice"
    answer.done, answer.error = True, error
    assert error == 0 or error in ERRORS
    if request.command == READ and not error:
        answer.data[:] = rest.take(request.length)
        answer.pieces.append((DATA, request.offset, request.length))


def _chunk(body: _Stream, kind: int, request: Sent, answer: Answer, style: int) -> None:
    length = len(body.data)
    if kind == NONE:
        assert length == 0, "NONE with a payload"
        assert answer.done, "NONE must be the last chunk"
    elif kind in {DATA, HOLE}:
        assert request.command == READ
        _content(body, kind, request, answer)
    elif kind in {STATUS, STATUS_EXT}:
        assert kind == (STATUS_EXT if style == spec.EXTENDED else STATUS)
        assert request.command == BLOCK_STATUS
        assert not answer.extents, "more than one chunk of the one context"
        answer.extents = _extents(body, kind)
    else:
        assert kind in {ERROR, ERROR_OFFSET}, f"chunk of kind {kind:#x}"
        _error(body, kind, request, answer)
    assert body.at == length, "a chunk is longer than what it says"


def _content(body: _Stream, kind: int, request: Sent, answer: Answer) -> None:
    (offset,) = body.fields(">Q")
    if kind == DATA:
        content = body.take(len(body.data) - 8)
    else:
        (length,) = body.fields(">I")
        assert length <= request.length, "a hole that is longer than the request"
        content = bytes(length)
    assert content, "a chunk that describes nothing"
    begin = offset - request.offset
    assert 0 <= begin <= begin + len(content) <= request.length, "content outside the request"
    for _, other, length in answer.pieces:
        assert offset + len(content) <= other or other + length <= offset, "chunks overlap"
    answer.pieces.append((kind, offset, len(content)))
    if not answer.data:
        answer.data = bytearray(request.length)
    answer.data[begin : begin + len(content)] = content


def _extents(body: _Stream, kind: int) -> list[tuple[int, int]]:
    (context,) = body.fields(">I")
    assert context == spec.CONTEXT_ID
    if kind == STATUS_EXT:
        (count,) = body.fields(">I")
        return [_pair(body.fields(">QQ")) for _ in range(count)]
    return [_pair(body.fields(">II")) for _ in range((len(body.data) - 4) // 8)]


def _pair(fields: Sequence[int]) -> tuple[int, int]:
    length, flags = fields
    assert length > 0, "an empty extent"
    assert flags < 2**32, "base:allocation has 32 bits"
    return length, flags


def _error(body: _Stream, kind: int, request: Sent, answer: Answer) -> None:
    error, length = body.fields(">IH")
    assert error in ERRORS, f"error {error} has no name"
    assert length <= spec.TEXT_MAX
    text = body.take(length).decode()
    assert "\x00" not in text
    if kind == ERROR_OFFSET:
        (offset,) = body.fields(">Q")
        assert request.offset <= offset < request.offset + request.length
    answer.error, answer.text = error, text


def _whole(request: Sent, answer: Answer, style: int, min_block: int) -> None:
    assert answer.done, f"the request {request} was not answered to the end"
    if request.flags & spec.DF:
        assert len(answer.pieces) <= 1, "DF, and more than one content chunk"
    if answer.error:
        return
    if request.command == READ:
        told = sum(length for _, _, length in answer.pieces)
        assert told == request.length, "success without all data"
        for _, offset, length in answer.pieces:
            assert offset % min_block == length % min_block == 0
    if request.command == BLOCK_STATUS:
        assert style != spec.SIMPLE
        lengths = [length for length, _ in answer.extents]
        assert 1 <= len(lengths) <= 2**20
        assert all(length % min_block == 0 for length in lengths)
        assert sum(lengths[:-1]) < request.length
        if request.flags & spec.REQ_ONE:
            assert len(lengths) == 1
            assert lengths[0] <= request.length
