"""Replies that keep to the specification, in every form that was agreed on.

Each stream is fed whole, byte by byte and with trailing bytes. Not covered: replies that break a
rule, see test_client_hostile_replies.py.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.nbd.client import ClientPhase
from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.events import DataReceived, StatusReceived
from tests.nbd.client_wire import (
    BLOCK_STATUS,
    DATA,
    DF,
    ERROR,
    ERROR_OFFSET,
    EXTENDED,
    FLUSH,
    HOLE,
    NONE,
    READ,
    REQ_ONE,
    SIMPLE,
    SIZE,
    STATUS,
    STATUS_EXT,
    STRUCTURED,
    TRIM,
    WRITE,
    Make,
    Plain,
    asking,
    chunk,
    data,
    error,
    feed,
    hole,
    simple,
    status,
)

CHUNKED = (STRUCTURED, EXTENDED)
EIO, EINVAL, ESHUTDOWN = 5, 22, 108


def events(make: Make, stream: bytes) -> list[Plain]:
    """What a stream of whole replies meant; none was a breach and all is answered."""
    outcome = feed(make, stream)
    assert outcome.breach == ""
    assert outcome.connection.in_flight == 0
    assert outcome.connection.phase is ClientPhase.TRANSMISSION
    return outcome.events


# Simple replies


def test_simple_replies_in_any_order() -> None:
    make = asking((READ, 0, 4), (WRITE, 0, 512), (READ, 8, 3), (FLUSH, 0, 0), style=SIMPLE)
    stream = simple(3, 0, b"abc") + simple(2) + simple(4, EIO) + simple(1, 0, b"defg")
    assert events(make, stream) == [
        *(("DataReceived", 3, 8, b"abc"), ("Finished", 3, 0, "")),
        ("Finished", 2, 0, ""),
        ("Finished", 4, EIO, ""),
        *(("DataReceived", 1, 0, b"defg"), ("Finished", 1, 0, "")),
    ]


def test_a_simple_error_of_a_read_has_no_data() -> None:
    make = asking((READ, 0, 4), (READ, 4, 2), style=SIMPLE)
    assert events(make, simple(1, ESHUTDOWN) + simple(2, 0, b"ok")) == [
        ("Finished", 1, ESHUTDOWN, ""),
        *(("DataReceived", 2, 4, b"ok"), ("Finished", 2, 0, "")),
    ]


def test_simple_replies_among_structured_ones() -> None:
    make = asking((WRITE, 0, 512), (BLOCK_STATUS, 0, 512), (TRIM, 0, 512))
    stream = simple(1) + simple(2, EINVAL) + chunk(NONE, cookie=3)
    assert events(make, stream) == [
        ("Finished", 1, 0, ""),
        ("Finished", 2, EINVAL, ""),
        ("Finished", 3, 0, ""),
    ]


@pytest.mark.parametrize("number", [2, 17, 2**32 - 1])
def test_an_unknown_error_counts_as_einval(number: int) -> None:
    assert events(asking((FLUSH, 0, 0), style=SIMPLE), simple(1, number))[0][2] == EINVAL
    for style in CHUNKED:
        stream = chunk(ERROR, error(number, b"odd"), style=style)
        make = asking((FLUSH, 0, 0), style=style)
        assert events(make, stream) == [("Finished", 1, EINVAL, "odd")]


# Chunks


@pytest.mark.parametrize("style", CHUNKED)
def test_a_read_in_one_chunk(style: ReplyStyle) -> None:
    stream = chunk(DATA, data(512, b"x" * 1024), style=style, offset=512)
    make = asking((READ, 512, 1024, DF), style=style)
    assert events(make, stream) == [
        ("DataReceived", 1, 512, b"x" * 1024),
        ("Finished", 1, 0, ""),
    ]


@pytest.mark.parametrize("style", CHUNKED)
def test_a_read_in_many_chunks_in_any_order(style: ReplyStyle) -> None:
    parts = [
        chunk(HOLE, hole(1536, 512), style=style, flags=0, offset=512),
        chunk(DATA, data(512, b"a"), style=style, flags=0, offset=512),
        chunk(NONE, style=style, cookie=2),
        chunk(DATA, data(1024, b"b" * 512), style=style, flags=0xFFFE, offset=512),
        chunk(HOLE, hole(513, 511), style=style, flags=0, offset=512),
        chunk(NONE, style=style, offset=512),
    ]
    make = asking((READ, 512, 1536), (FLUSH, 0, 0), style=style)
    assert events(make, b"".join(parts)) == [
        ("HoleReceived", 1, 1536, 512),
        ("DataReceived", 1, 512, b"a"),
        ("Finished", 2, 0, ""),
        ("DataReceived", 1, 1024, b"b" * 512),
        ("HoleReceived", 1, 513, 511),
        ("Finished", 1, 0, ""),
    ]


@pytest.mark.parametrize("style", CHUNKED)
def test_a_read_may_be_one_hole(style: ReplyStyle) -> None:
    make = asking((READ, 512, 1024, DF), style=style)
    assert events(make, chunk(HOLE, hole(512, 1024), style=style, offset=512)) == [
        ("HoleReceived", 1, 512, 1024),
        ("Finished", 1, 0, ""),
    ]


@pytest.mark.parametrize("style", CHUNKED)
def test_the_first_error_is_the_one_that_counts(style: ReplyStyle) -> None:
    parts = [
        chunk(DATA, data(0, b"x" * 512), style=style, flags=0),
        chunk(ERROR_OFFSET, error(EIO, b"bad\x00spot", struct.pack(">Q", 3)), style=style, flags=0),
        chunk(0xFFFF, error(ESHUTDOWN, b"later", b"whatever else"), style=style, flags=0),
        chunk(DATA, data(512, b"y" * 512), style=style, flags=0),
        chunk(NONE, style=style),
    ]
    assert events(asking((READ, 0, 1024), style=style), b"".join(parts)) == [
        ("DataReceived", 1, 0, b"x" * 512),
        ("DataReceived", 1, 512, b"y" * 512),
        ("Finished", 1, EIO, "bad?spot"),
    ]


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, TRIM, BLOCK_STATUS, 99])
def test_any_request_may_fail_with_a_text(style: ReplyStyle, command: int) -> None:
    length = 0 if command == FLUSH else 512
    make = asking((command, 0, length), style=style)
    stream = chunk(ERROR, error(ESHUTDOWN, b"we close"), style=style)
    assert events(make, stream) == [("Finished", 1, ESHUTDOWN, "we close")]


@pytest.mark.parametrize("offset", [512, 1023])
def test_an_error_may_be_at_the_first_and_the_last_byte(offset: int) -> None:
    stream = chunk(ERROR_OFFSET, error(EIO, b"", struct.pack(">Q", offset)))
    for command in (READ, WRITE):
        assert events(asking((command, 512, 512)), stream) == [("Finished", 1, EIO, "")]


def test_the_longest_text_of_an_error_is_cut_when_it_is_shown() -> None:
    ((_, _, number, text),) = events(
        asking((WRITE, 0, 512)), chunk(ERROR, error(EIO, "é".encode() * 2048))
    )
    assert number == EIO
    assert text == "é" * 199 + "…"


def test_a_read_of_nothing_succeeds_without_data() -> None:
    assert events(asking((READ, 0, 0)), chunk(NONE)) == [("Finished", 1, 0, "")]


# Status


@pytest.mark.parametrize("style", CHUNKED)
def test_status(style: ReplyStyle) -> None:
    # The last extent may go beyond what was asked; bits that nobody knows are ignored.
    extents = [(512, 0), (256, 3), (SIZE - 512 - 768, 0xFF02)]
    kind = STATUS_EXT if style is EXTENDED else STATUS
    stream = chunk(kind, status(extents, style=style), style=style, offset=512)
    assert events(asking((BLOCK_STATUS, 512, 1024), style=style), stream) == [
        ("StatusReceived", 1, ((512, 0), (256, 3), (SIZE - 512 - 768, 2))),
        ("Finished", 1, 0, ""),
    ]


@pytest.mark.parametrize("style", CHUNKED)
def test_status_of_one_extent(style: ReplyStyle) -> None:
    kind = STATUS_EXT if style is EXTENDED else STATUS
    stream = chunk(kind, status([(512, 1)], style=style), style=style, flags=0)
    stream += chunk(NONE, style=style)
    assert events(asking((BLOCK_STATUS, 0, 512, REQ_ONE), style=style), stream) == [
        ("StatusReceived", 1, ((512, 1),)),
        ("Finished", 1, 0, ""),
    ]


@pytest.mark.parametrize("style", CHUNKED)
def test_a_status_may_still_end_in_an_error(style: ReplyStyle) -> None:
    kind = STATUS_EXT if style is EXTENDED else STATUS
    stream = chunk(kind, status([(512, 1)], style=style), style=style, flags=0)
    stream += chunk(ERROR, error(EIO), style=style)
    assert events(asking((BLOCK_STATUS, 0, 512), style=style), stream)[1:] == [
        ("Finished", 1, EIO, "")
    ]


def test_as_many_extents_as_a_server_should_send_are_taken() -> None:
    make = asking((BLOCK_STATUS, 0, SIZE))
    stream = chunk(STATUS, status([(1, 0), (1, 1)] * (SIZE // 2)))
    assert len(stream) == 20 + 4 + 8 * 2**20
    connection = make()
    used, (told, finished) = connection.receive(memoryview(stream))
    assert used == len(stream)
    assert isinstance(told, StatusReceived)
    assert told.extents == [(1, 0), (1, 1)] * (SIZE // 2)
    assert finished == (1, 0, "")


def test_a_status_of_nothing_may_have_an_extent() -> None:
    stream = chunk(STATUS, status([(512, 0)]))
    assert events(asking((BLOCK_STATUS, 0, 0)), stream)[1:] == [("Finished", 1, 0, "")]


# Buffers


@pytest.mark.parametrize("style", ReplyStyle)
def test_needed_is_the_whole_of_a_large_read(style: ReplyStyle) -> None:
    most = 32 * 1024 * 1024
    connection = asking((READ, 0, most), style=style)()
    head = simple(1) if style is SIMPLE else chunk(DATA, data(0, b""), style=style, length=most + 8)
    assert connection.receive(memoryview(head)) == (0, [])
    assert connection.needed == len(head) + most
    stream = memoryview(head + bytes(most))
    assert connection.receive(stream[:-1]) == (0, [])
    used, (got, finished) = connection.receive(stream)
    assert used == len(stream)
    assert isinstance(got, DataReceived)
    assert got.data.obj is stream.obj, "data is a view, not a copy"
    assert finished == (1, 0, "")
    assert connection.needed == {SIMPLE: 16, STRUCTURED: 16, EXTENDED: 32}[style]
