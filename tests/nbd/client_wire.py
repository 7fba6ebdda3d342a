"""Bytes as a server sends them, and three ways to feed them to a `ClientConnection`.

`feed` hands a case in whole, byte by byte, and with trailing bytes, checks that all three mean the
same, and returns what came of it with data as plain bytes. On the way it checks what a shell
relies on: never more is used than was given, `needed` is always more than what is left over, and
never more than the largest legal unit. The numbers of the protocol are written out once more, so
that the code and its tests cannot share a mistake.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.events import ClientEvent, DataReceived, StatusReceived

SIMPLE, STRUCTURED, EXTENDED = ReplyStyle
ACK, INFO, META_CONTEXT = 1, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN = (2**31 + n for n in (1, 2, 3, 5, 6, 7))
EXPORT_NAME, ABORT, STARTTLS, GO, STRUCTURED_REPLY, SET_META, EXTENDED_HEADERS = (
    *(1, 2, 5),
    *(7, 8, 10, 11),
)
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
READ, WRITE, FLUSH, TRIM, BLOCK_STATUS = 0, 1, 3, 4, 7
DF, REQ_ONE = 4, 8

SIZE = 1024 * 1024
FLAGS = 0b1_1110_1101
CONTEXT = 77
"""The number that the servers here give to base:allocation."""

LARGEST_UNIT = 32 + 8 + 32 * 1024 * 1024
TRAILING = b"\x00\x49\x25"
"""Shorter than any unit or magic, so it must stay unused."""

Plain = tuple[object, ...]
Make = Callable[[], ClientConnection]


def greeting(flags: int = 3) -> bytes:
    """The first 18 bytes."""
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)


def reply(option: int, kind: int = ACK, data: bytes = b"", *, length: int | None = None) -> bytes:
    """One reply to an option; `length` lies about its data."""
    announced = len(data) if length is None else length
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, announced) + data


def info_export(size: int = SIZE, flags: int = FLAGS) -> bytes:
    """The reply to GO that tells size and flags."""
    return reply(GO, INFO, struct.pack(">HQH", 0, size, flags))


def info_text(kind: int, text: bytes) -> bytes:
    """The reply to GO that tells the name (1) or the description (2)."""
    return reply(GO, INFO, struct.pack(">H", kind) + text)


def info_blocks(smallest: int, preferred: int, most: int) -> bytes:
    """The reply to GO that tells the block sizes."""
    return reply(GO, INFO, struct.pack(">HIII", 3, smallest, preferred, most))


def context(number: int = CONTEXT, name: bytes = b"base:allocation") -> bytes:
    """The reply to SET_META_CONTEXT that tells the number of a context."""
    return reply(SET_META, META_CONTEXT, struct.pack(">I", number) + name)


def opening(
    style: ReplyStyle = EXTENDED, *, contexts: bool = True, infos: bytes | None = None
) -> bytes:
    """All that a server says until transmission, if it can do so much and no more."""
    said = greeting()
    said += reply(EXTENDED_HEADERS, ACK if style is EXTENDED else UNSUP)
    if style is not EXTENDED:
        said += reply(STRUCTURED_REPLY, ACK if style is STRUCTURED else UNSUP)
    if style is not SIMPLE:
        said += (context() + reply(SET_META)) if contexts else reply(SET_META, UNSUP)
    return said + (info_export() if infos is None else infos) + reply(GO)


def simple(cookie: int = 1, error: int = 0, data: bytes = b"") -> bytes:
    """A simple reply."""
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(
    kind: int,
    body: bytes = b"",
    *,
    style: ReplyStyle = STRUCTURED,
    flags: int = 1,
    cookie: int = 1,
    offset: int = 0,
    length: int | None = None,
) -> bytes:
    """A chunk; `offset` is that of an extended header, `length` lies about the payload."""
    announced = len(body) if length is None else length
    if style is EXTENDED:
        fields = (0x6E8A278C, flags, kind, cookie, offset, announced)
        return struct.pack(">IHHQQQ", *fields) + body
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, announced) + body


def data(offset: int, content: bytes) -> bytes:
    """The payload of OFFSET_DATA."""
    return struct.pack(">Q", offset) + content


def hole(offset: int, length: int) -> bytes:
    """The payload of OFFSET_HOLE."""
    return struct.pack(">QI", offset, length)


def error(number: int, text: bytes = b"", tail: bytes = b"", *, length: int | None = None) -> bytes:
    """The payload of an error chunk; `length` lies about the text."""
    announced = len(text) if length is None else length
    return struct.pack(">IH", number, announced) + text + tail


def status(
    extents: Iterable[tuple[int, int]],
    *,
    style: ReplyStyle = STRUCTURED,
    number: int = CONTEXT,
    count: int | None = None,
) -> bytes:
    """The payload of a status chunk; `count` lies about the extents of an extended one."""
    numbers = [part for extent in extents for part in extent]
    if style is EXTENDED:
        announced = len(numbers) // 2 if count is None else count
        return struct.pack(f">II{len(numbers)}Q", number, announced, *numbers)
    return struct.pack(f">I{len(numbers)}I", number, *numbers)


class Outcome(NamedTuple):
    """What came of a stream: the events, and the breach of the protocol, "" if there is none."""

    events: list[Plain]
    breach: str
    connection: ClientConnection


def plain(event: ClientEvent) -> Plain:
    """An event that stays what it is when the receive buffer goes."""
    name = type(event).__name__
    if isinstance(event, DataReceived):
        return (name, *event[:2], bytes(event.data))
    if isinstance(event, StatusReceived):
        return (name, event.cookie, tuple(event.extents))
    return (name, *event)


def pour(connection: ClientConnection, stream: bytes, step: int) -> tuple[Outcome, bytes]:
    """Feed `step` bytes at a time; what came of it, and what was left over."""
    events: list[Plain] = []
    rest = b""
    for at in range(0, len(stream), step):
        rest += stream[at : at + step]
        used, found = connection.receive(memoryview(rest))
        assert 0 <= used <= len(rest)
        events += map(plain, found)
        rest = rest[used:]
        over = connection.phase in (ClientPhase.CLOSED, ClientPhase.TLS)
        assert over or len(rest) < connection.needed <= LARGEST_UNIT
        assert (connection.breach is None) or connection.phase is ClientPhase.CLOSED
    return Outcome(events, str(connection.breach or ""), connection), rest


def feed(make: Make, stream: bytes, *, slow: bool = True) -> Outcome:
    """Feed a stream to three connections, in all three ways; what came of it.

    Without `slow`, bytes do not come one by one but 997 at a time.
    """
    whole, rest = pour(make(), stream, max(len(stream), 1))
    # Long payloads go in pieces of an odd size: they prove no more byte by byte.
    pieces, left = pour(make(), stream, 1 if slow and len(stream) < 20_000 else 997)
    assert (pieces[:2], left, pieces.connection.phase) == (
        whole[:2],
        rest,
        whole.connection.phase,
    )
    if whole.connection.phase is not ClientPhase.TLS and not rest:
        more, left = pour(make(), stream + TRAILING, len(stream) + len(TRAILING))
        assert more[:2] == whole[:2]
        assert left == (b"" if more.connection.phase is ClientPhase.CLOSED else TRAILING)
    return whole


def ready(
    style: ReplyStyle = STRUCTURED, *, contexts: bool = True, infos: bytes | None = None
) -> ClientConnection:
    """A connection in transmission, with these replies."""
    connection = ClientConnection("disk")
    stream = opening(style, contexts=contexts, infos=infos)
    used, events = connection.receive(memoryview(stream))
    assert (used, type(events[-1]).__name__) == (len(stream), "Ready"), connection.breach
    assert (connection.style, connection.contexts) == (style, contexts and style is not SIMPLE)
    return connection


def asking(
    *requests: tuple[int, ...], style: ReplyStyle = STRUCTURED, contexts: bool = True
) -> Make:
    """A maker of connections that have sent requests of (command, offset, length[, flags])."""

    def make() -> ClientConnection:
        connection = ready(style, contexts=contexts)
        for number, request in enumerate(requests, 1):
            cookie, _ = connection.request(*request)
            assert cookie == number
        return connection

    return make


def fails(make: Make, stream: bytes, words: str) -> Outcome:
    """Feed a stream that must be a breach, with these words; what came of it."""
    outcome = feed(make, stream)
    assert words in outcome.breach, outcome
    return outcome
