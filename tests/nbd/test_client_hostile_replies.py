"""A hostile server in transmission: every rule it may break is a breach, and a prompt one.

Each stream is fed whole, byte by byte and with trailing bytes. Where a header or the first bytes
of a payload give a server away, the stream ends there: nothing more is waited for.
Not covered: rules that the specification leaves to the client, such as the grain of extents.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.nbd.constants import ReplyStyle
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
    asking,
    chunk,
    data,
    error,
    fails,
    feed,
    hole,
    pour,
    simple,
    status,
)

CHUNKED = (STRUCTURED, EXTENDED)
EIO = 5


def status_kind(style: ReplyStyle) -> int:
    return STATUS_EXT if style is EXTENDED else STATUS


# Magics and cookies


@pytest.mark.parametrize("style", ReplyStyle)
@pytest.mark.parametrize("magic", [0, 0x25609513, 0x67446699, 0x96744668, 0xFFFFFFFF])
def test_a_wrong_magic_is_seen_in_its_four_bytes(style: ReplyStyle, magic: int) -> None:
    make = asking((READ, 0, 512), style=style)
    fails(make, struct.pack(">I", magic), f"began with {magic:#x}")


@pytest.mark.parametrize(
    ("style", "reply"),
    [
        (SIMPLE, chunk(NONE)),
        (SIMPLE, chunk(NONE, style=EXTENDED)),
        (STRUCTURED, chunk(NONE, style=EXTENDED)),
        (EXTENDED, chunk(NONE)),
        (EXTENDED, simple()),
        (EXTENDED, simple(error=EIO)),
    ],
)
def test_replies_of_a_form_that_was_not_agreed_on(style: ReplyStyle, reply: bytes) -> None:
    fails(asking((WRITE, 0, 512), style=style), reply, "the server's reply began with")
    fails(asking((WRITE, 0, 512), style=style), reply[:4], "the server's reply began with")


@pytest.mark.parametrize("style", ReplyStyle)
@pytest.mark.parametrize("cookie", [0, 2, 2**64 - 1])
def test_a_cookie_of_nobody(style: ReplyStyle, cookie: int) -> None:
    reply = simple(cookie) if style is SIMPLE else chunk(NONE, style=style, cookie=cookie)
    fails(asking((WRITE, 0, 512), style=style), reply, f"answered request {cookie}, which is not")
    fails(asking(style=style), reply, f"answered request {cookie}, which is not")


@pytest.mark.parametrize("style", ReplyStyle)
def test_a_reply_behind_the_last(style: ReplyStyle) -> None:
    reply = simple(1) if style is SIMPLE else chunk(NONE, style=style)
    outcome = fails(asking((WRITE, 0, 512), style=style), reply * 2, "which is not in flight")
    assert outcome.events == [("Finished", 1, 0, "")]


@pytest.mark.parametrize("offset", [0, 511, 513, 2**64 - 1])
def test_an_extended_reply_at_another_offset(offset: int) -> None:
    reply = chunk(NONE, style=EXTENDED, offset=offset)
    fails(asking((WRITE, 512, 512), style=EXTENDED), reply, f"answered a request at {offset}")


# Simple replies where replies come in chunks


@pytest.mark.parametrize("number", [0, EIO])
def test_a_simple_reply_to_a_read(number: int) -> None:
    fails(asking((READ, 0, 4)), simple(1, number), "answered READ with a simple reply")


def test_a_simple_success_without_a_status() -> None:
    fails(asking((BLOCK_STATUS, 0, 512)), simple(), "BLOCK_STATUS without a status")


def test_a_simple_reply_in_the_midst_of_chunks() -> None:
    make = asking((BLOCK_STATUS, 0, 512), (WRITE, 0, 512))
    begun = chunk(STATUS, status([(512, 0)]), flags=0)
    fails(make, begun + simple(1, EIO), "ended a reply in chunks")
    begun = chunk(ERROR, error(EIO), flags=0, cookie=2)
    fails(make, begun + simple(2), "ended a reply in chunks")


# Chunks that do not belong


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        (READ, [STATUS, STATUS_EXT, 3, 4, 7, 0x7FFF]),
        (WRITE, [DATA, HOLE, STATUS, STATUS_EXT, 3, 0x7FFF]),
        (FLUSH, [DATA, HOLE, STATUS, STATUS_EXT, 3, 0x7FFF]),
        (BLOCK_STATUS, [DATA, HOLE, 3, 0x7FFF]),
        (99, [DATA, HOLE, STATUS, STATUS_EXT, 3, 0x7FFF]),
    ],
)
def test_chunks_that_do_not_answer_the_request(
    style: ReplyStyle, command: int, kinds: list[int]
) -> None:
    for kind in kinds:
        reply = chunk(kind, style=style, length=12)
        fails(asking((command, 0, 512), style=style), reply, f"with a chunk of type {kind}")


def test_a_status_in_the_form_of_the_other_style() -> None:
    for style, kind in ((STRUCTURED, STATUS_EXT), (EXTENDED, STATUS)):
        reply = chunk(kind, status([(512, 0)], style=style), style=style)
        fails(asking((BLOCK_STATUS, 0, 512), style=style), reply, f"with a chunk of type {kind}")


@pytest.mark.parametrize("style", CHUNKED)
def test_a_status_without_a_context(style: ReplyStyle) -> None:
    make = asking((BLOCK_STATUS, 0, 512), style=style, contexts=False)
    reply = chunk(status_kind(style), status([(512, 0)], style=style), style=style)
    fails(make, reply, "BLOCK_STATUS with a chunk of type")


@pytest.mark.parametrize("style", CHUNKED)
def test_an_empty_chunk_is_the_last_and_empty(style: ReplyStyle) -> None:
    make = asking((FLUSH, 0, 0), style=style)
    fails(make, chunk(NONE, style=style, flags=0), "that is not the last")
    fails(make, chunk(NONE, style=style, flags=2), "that is not the last")
    fails(make, chunk(NONE, style=style, length=1), "with a chunk of type 0 and 1 bytes")


# Lengths: judged by the header alone


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize(
    ("request_", "kind", "lengths"),
    [
        ((READ, 0, 512), DATA, [0, 7, 8, 521, 2**31, 2**32 - 1]),
        ((READ, 0, 512), HOLE, [0, 11, 13, 2**32 - 1]),
        ((READ, 0, 512), ERROR, [0, 5, 8193, 2**32 - 1]),
        ((READ, 0, 512), ERROR_OFFSET, [0, 6, 13, 8193, 2**32 - 1]),
        ((READ, 0, 512), 0xFFFF, [0, 5, 8193, 2**32 - 1]),
        ((WRITE, 0, 512), NONE, [1, 2**32 - 1]),
        ((BLOCK_STATUS, 0, 4), STATUS, [0, 4, 8, 11, 13, 44, 2**32 - 4]),
        ((BLOCK_STATUS, 0, 4), STATUS_EXT, [0, 8, 16, 23, 25, 88, 2**32 - 8]),
        ((BLOCK_STATUS, 0, SIZE * 2), STATUS, [4 + 8 * (2**20 + 1)]),
        ((BLOCK_STATUS, 0, SIZE * 2), STATUS_EXT, [8 + 16 * (2**20 + 1)]),
        ((BLOCK_STATUS, 0, 4, REQ_ONE), STATUS, [20]),
        ((BLOCK_STATUS, 0, 4, REQ_ONE), STATUS_EXT, [40]),
    ],
)
def test_lengths_that_no_such_chunk_has(
    style: ReplyStyle, request_: tuple[int, ...], kind: int, lengths: list[int]
) -> None:
    if (style is EXTENDED) == (kind == STATUS):
        return  # the other form, which is refused whatever its length
    huge = [2**32, 2**63, 2**64 - 1] if style is EXTENDED else []
    for length in lengths + huge:
        make = asking(request_, style=style)
        outcome = fails(make, chunk(kind, style=style, length=length), f"{length} bytes")
        assert outcome.connection.needed <= 32


@pytest.mark.parametrize("style", CHUNKED)
def test_data_beyond_what_is_still_missing_is_not_waited_for(style: ReplyStyle) -> None:
    make = asking((READ, 0, 1024), style=style)
    begun = chunk(HOLE, hole(0, 512), style=style, flags=0)
    fails(make, begun + chunk(DATA, style=style, length=8 + 513), "521 bytes")


# Content


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize("offset", [0, 511, 513, 1024, 2**63, 2**64 - 1, 2**64 - 512])
def test_content_outside_of_the_request(style: ReplyStyle, offset: int) -> None:
    make = asking((READ, 512, 512), style=style)
    begun = chunk(DATA, data(offset, b""), style=style, offset=512, length=8 + 512)
    fails(make, begun, f"512 bytes at {offset}, outside")
    whole = chunk(HOLE, hole(offset, 512), style=style, offset=512)
    fails(make, whole, f"512 bytes at {offset}, outside")


@pytest.mark.parametrize("size", [0, 513, 2**32 - 1])
def test_holes_of_a_size_that_cannot_be(size: int) -> None:
    fails(asking((READ, 512, 512)), chunk(HOLE, hole(512, size)), f"{size} bytes at 512, outside")


@pytest.mark.parametrize("first", [DATA, HOLE])
@pytest.mark.parametrize(("offset", "length"), [(512, 512), (0, 513), (1023, 1), (1023, 513)])
def test_content_that_came_before(first: int, offset: int, length: int) -> None:
    make = asking((READ, 0, 2048))
    body = hole(512, 512) if first == HOLE else data(512, b"x" * 512)
    begun = chunk(first, body, flags=0)
    # The place alone gives it away, so the data of the second chunk never comes.
    fails(make, begun + chunk(DATA, data(offset, b""), length=8 + length), "twice")
    fails(make, begun + chunk(HOLE, hole(offset, length)), "twice")


def test_content_behind_its_error() -> None:
    make = asking((READ, 0, 1024))
    told = chunk(ERROR_OFFSET, error(EIO, b"", struct.pack(">Q", 700)), flags=0)
    fails(make, told + chunk(DATA, data(512, b""), length=8 + 512), "after an error")


def test_content_when_there_is_none_missing() -> None:
    make = asking((READ, 0, 512), (READ, 0, 0))
    whole = chunk(DATA, data(0, b"x" * 512), flags=0)
    for kind in (DATA, HOLE):
        fails(make, whole + chunk(kind, length=12), "more data than was asked for")
        fails(make, chunk(kind, length=12, cookie=2), "more data than was asked for")


@pytest.mark.parametrize("second", [DATA, HOLE])
def test_a_read_that_must_not_be_cut(second: int) -> None:
    make = asking((READ, 0, 1024, DF))
    begun = chunk(DATA, data(0, b"x" * 512), flags=0)
    fails(make, begun + chunk(second, length=12), "into pieces that must not be")


@pytest.mark.parametrize("style", CHUNKED)
def test_a_success_without_all_of_the_data(style: ReplyStyle) -> None:
    make = asking((READ, 0, 1024), style=style)
    fails(make, chunk(NONE, style=style), "sent 0 bytes for a READ of 1024")
    fails(make, chunk(HOLE, hole(0, 1023), style=style), "sent 1023 bytes for a READ of 1024")
    part = chunk(DATA, data(1, b"x" * 512), style=style, flags=0)
    fails(make, part + chunk(NONE, style=style), "sent 512 bytes for a READ of 1024")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (range(0, 2**20, 2), "far too many pieces"),
        (range(0, 2**16, 2), ""),
        (range(40_000), ""),  # in order there is one piece, which grows
    ],
)
def test_data_in_a_million_pieces_is_not_kept_book_of(places: range, words: str) -> None:
    stream = b"".join(chunk(HOLE, hole(at, 1), flags=0) for at in places)
    outcome, _ = pour(asking((READ, 0, 2**20))(), stream, len(stream))
    assert words in outcome.breach
    assert bool(words) == bool(outcome.breach)


# Errors


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize("kind", [ERROR, ERROR_OFFSET, 0xFFFF])
def test_error_chunks_that_contradict_themselves(style: ReplyStyle, kind: int) -> None:
    make = asking((WRITE, 0, 512), style=style)
    tail = bytes(8) if kind == ERROR_OFFSET else b""
    for reply, words in (
        (error(0, b"all is well", tail), "without an error"),
        (error(EIO, b"text", tail, length=5), "a text of 5 bytes"),
        (error(EIO, b"text", tail, length=65535), "a text of 65535 bytes"),
        (error(EIO, b"x" * 4097, tail), "a text of 4097 bytes"),
    ):
        fails(make, chunk(kind, reply, style=style), words)


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, BLOCK_STATUS])
@pytest.mark.parametrize("offset", [0, 511, 1024, 2**63, 2**64 - 1])
def test_an_error_at_an_offset_outside_of_the_request(command: int, offset: int) -> None:
    reply = chunk(ERROR_OFFSET, error(EIO, b"here", struct.pack(">Q", offset)))
    fails(asking((command, 512, 512)), reply, f"an error at {offset}, outside")


def test_a_flush_has_no_offset_to_fail_at() -> None:
    reply = chunk(ERROR_OFFSET, error(EIO, b"", bytes(8)))
    fails(asking((FLUSH, 0, 0)), reply, "an error at 0, outside")


# Status: CVE-2023-5871, extents made to break whoever adds them up


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize("number", [0, 76, 2**32 - 1])
def test_the_status_of_a_context_never_agreed_on(style: ReplyStyle, number: int) -> None:
    make = asking((BLOCK_STATUS, 0, 1024), style=style)
    body = status([(512, 0), (512, 0)], style=style, number=number)
    head = 8 if style is EXTENDED else 4
    reply = chunk(status_kind(style), body[:head], style=style, length=len(body))
    fails(make, reply, f"context {number}, never agreed on")


@pytest.mark.parametrize("count", [0, 1, 3, 2**32 - 1])
def test_a_count_of_extents_that_lies(count: int) -> None:
    body = status([(512, 0), (512, 0)], style=EXTENDED, count=count)
    reply = chunk(STATUS_EXT, body[:8], style=EXTENDED, length=len(body))
    fails(asking((BLOCK_STATUS, 0, 1024), style=EXTENDED), reply, f"of {count} extents")


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize(
    ("extents", "words"),
    [
        ([(0, 0)], "of no length"),
        ([(512, 0), (0, 0), (512, 0)], "of no length"),
        ([(512, 0), (512, 0), (512, 0)], "behind what was asked for"),
        ([(1024, 0), (1, 0)], "behind what was asked for"),
        ([(2**32 - 1, 0), (1, 0)], "behind what was asked for"),
        ([(SIZE - 511, 0)], "ends behind the export"),
        ([(1, 0), (2**32 - 1, 0)], "ends behind the export"),
    ],
)
def test_cve_2023_5871_extents_that_cannot_be(
    style: ReplyStyle, extents: list[tuple[int, int]], words: str
) -> None:
    make = asking((BLOCK_STATUS, 512, 1024), style=style)
    reply = chunk(status_kind(style), status(extents, style=style), style=style, offset=512)
    outcome = fails(make, reply, words)
    assert outcome.events == []


@pytest.mark.parametrize(
    ("extents", "words"),
    [
        ([(2**63, 0)], "ends behind the export"),
        ([(2**63 - 1, 0)], "ends behind the export"),
        ([(2**64 - 1, 0)], "ends behind the export"),
        ([(2**64 - 512, 0)], "ends behind the export"),
        ([(1, 0), (2**64 - 1, 0)], "ends behind the export"),
        ([(2**63, 0), (2**63, 0), (512, 0)], "behind what was asked for"),
        ([(512, 2**32)], "0x100000000 as flags"),
        ([(512, 2**63 | 1)], "as flags"),
    ],
)
def test_cve_2023_5871_lengths_and_flags_of_64_bits(
    extents: list[tuple[int, int]], words: str
) -> None:
    make = asking((BLOCK_STATUS, 512, 1024), style=EXTENDED)
    reply = chunk(STATUS_EXT, status(extents, style=EXTENDED), style=EXTENDED, offset=512)
    fails(make, reply, words)


@pytest.mark.parametrize("style", CHUNKED)
def test_one_extent_was_asked_for(style: ReplyStyle) -> None:
    make = asking((BLOCK_STATUS, 0, 512, REQ_ONE), style=style)
    long = chunk(status_kind(style), status([(513, 0)], style=style), style=style)
    fails(make, long, "longer than asked for")


@pytest.mark.parametrize("style", CHUNKED)
def test_a_status_twice_or_never(style: ReplyStyle) -> None:
    make = asking((BLOCK_STATUS, 0, 512), style=style)
    told = chunk(status_kind(style), status([(512, 0)], style=style), style=style, flags=0)
    fails(make, told + told, "same context twice")
    fails(make, chunk(NONE, style=style), "without a status")


def test_what_came_before_a_breach_still_counts() -> None:
    make = asking((READ, 0, 4), (WRITE, 0, 512))
    outcome = feed(make, chunk(DATA, data(0, b"good")) + simple(2) + simple(2))
    assert outcome.events == [
        ("DataReceived", 1, 0, b"good"),
        *(("Finished", 1, 0, ""), ("Finished", 2, 0, "")),
    ]
    assert "which is not in flight" in outcome.breach
