"""Bytes as a client sends them, and ways to feed them to a `ServerConnection`.

`feed` hands a case in whole, byte by byte, and with trailing bytes, checks that all three mean the
same, and returns the events with payloads as plain bytes; `breach` does so for what breaks the
protocol. On the way they check what a shell relies on: never more is used than was given, and
`needed` is always more than what is left over.

A case is bytes, or several: between two of them lies the TLS handshake.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from nbdproxy.nbd.constants import TlsMode
from nbdproxy.nbd.events import Closed, Opened, Refused, Send, ServerEvent, StartTls
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from nbdproxy.nbd.server import Phase, ServerConnection
from nbdproxy.requests import Request
from tests.nbd import spec

IHAVEOPT, OPTION_REPLY_MAGIC = 0x49484156454F5054, 0x0003E889045565A9
REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC = 0x25609513, 0x21E41C71
WRITE = 1
SIZE = 1024 * 1024
EXPORTS = {
    "disk": ExportInfo("disk", SIZE, WRITABLE, "the first"),
    "other": ExportInfo("other", 2 * SIZE, WRITABLE),
}
FLAGS = struct.pack(">I", 3)
TRAILING = b"\x00\x49\x25"
"""Shorter than any unit, so it must stay unused; not the beginning of one."""

Plain = tuple[object, ...]


class Server(NamedTuple):
    """What a connection is made from."""

    exports: Mapping[str, ExportInfo] = EXPORTS
    tls: TlsMode = TlsMode.OFF


PLAIN = Server()


class Poured(NamedTuple):
    """What came of a stream: the events, what was left over, and the connection."""

    events: list[Plain]
    rest: bytes
    connection: ServerConnection

    @property
    def outcome(self) -> tuple[list[Plain], bytes, Phase, str]:
        """All that must not depend on how the bytes arrived."""
        return self.events, self.rest, self.connection.phase, str(self.connection.breach or "")


def option(number: int, body: bytes = b"", *, length: int | None = None) -> bytes:
    """One option; `length` lies about its body."""
    announced = len(body) if length is None else length
    return struct.pack(">QII", IHAVEOPT, number, announced) + body


def go(name: bytes = b"", infos: Iterable[int] = (), *, number: int = 7) -> bytes:
    """A GO, or an INFO, for an export."""
    return option(number, info_body(name, infos))


def info_body(name: bytes, infos: Iterable[int] = ()) -> bytes:
    """What GO and INFO carry."""
    asked = list(infos)
    return counted(name) + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def contexts(number: int, name: bytes = b"", *queries: bytes) -> bytes:
    """A LIST_META_CONTEXT or a SET_META_CONTEXT."""
    return option(number, query_body(name, *queries))


def query_body(name: bytes, *queries: bytes) -> bytes:
    """What the options for contexts carry."""
    return counted(name) + struct.pack(">I", len(queries)) + b"".join(map(counted, queries))


def counted(text: bytes) -> bytes:
    """A string behind its length."""
    return struct.pack(">I", len(text)) + text


def opening(style: int, *, with_contexts: bool = False, name: bytes = b"") -> bytes:
    """Client flags and options that open an export with these replies."""
    chosen = contexts(10, name, spec.CONTEXT) if with_contexts else b""
    return FLAGS + (b"", option(8), option(11))[style] + chosen + go(name)


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 7,
    payload: bytes = b"",
    style: int = spec.SIMPLE,
) -> bytes:
    """One request. With extended headers the caller sets PAYLOAD_LEN."""
    extended = style == spec.EXTENDED
    magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    form = ">IHHQQQ" if extended else ">IHHQQI"
    return struct.pack(form, magic, flags, command, cookie, offset, length) + payload


def plain(event: ServerEvent) -> Plain:
    """An event that stays what it is when the receive buffer goes."""
    match event:
        case Request():
            return ("request", *event[:5], bytes(event.payload))
        case Refused(refused, error, text):
            assert 0 < len(text.encode()) <= 900
            return ("refused", error, *refused[:5], bytes(refused.payload))
        case Send(data):
            return ("send", data)
        case StartTls():
            return ("starttls",)
        case Opened(export):
            return ("opened", export)
        case Closed():
            return ("closed",)


def pour(parts: tuple[bytes, ...], step: int, server: Server = PLAIN) -> Poured:
    """Feed `step` bytes at a time."""
    connection = ServerConnection(server.exports, tls=server.tls)
    events: list[Plain] = []
    rest = b""
    for number, part in enumerate(parts):
        if number:
            if connection.breach is not None:  # one option too many, before STARTTLS
                break
            assert connection.phase is Phase.TLS
            assert rest == b""
            connection.tls_started()
        for at in range(0, len(part), step):
            rest += part[at : at + step]
            used, found = connection.receive(memoryview(rest))
            assert 0 <= used <= len(rest)
            events += [plain(event) for event in found]
            rest = rest[used:]
            assert connection.phase is Phase.CLOSED or connection.needed > len(rest)
            assert connection.needed <= spec.MAX_PAYLOAD + 32
    return Poured(events, rest, connection)


def feed(*parts: bytes, server: Server = PLAIN) -> list[Plain]:
    """Feed whole units in all three ways; the events."""
    whole = pour(parts, max(len(part) for part in parts) or 1, server)
    if whole.connection.breach is not None:
        raise whole.connection.breach
    assert whole.rest == b""
    assert pour(parts, _small_step(parts), server).outcome == whole.outcome
    longer = (*parts[:-1], parts[-1] + TRAILING)
    trailed = pour(longer, max(map(len, longer)), server)
    assert trailed.events == whole.events
    if whole.connection.phase is Phase.TLS:
        assert "before STARTTLS was answered" in str(trailed.connection.breach)
    else:
        left = b"" if whole.connection.phase is Phase.CLOSED else TRAILING
        assert (trailed.rest, trailed.connection.breach) == (left, None)
        assert trailed.connection.phase is whole.connection.phase
    return whole.events


def breach(*parts: bytes, words: str, server: Server = PLAIN) -> list[Plain]:
    """Feed what breaks the protocol, in all three ways; the events before that.

    Behind a breach nothing is read.
    """
    whole = pour(parts, max(map(len, parts)), server)
    assert words in str(whole.connection.breach)
    assert (whole.rest, whole.connection.phase) == (b"", Phase.CLOSED)
    assert pour(parts, _small_step(parts), server).outcome == whole.outcome
    longer = (*parts[:-1], parts[-1] + TRAILING)
    assert pour(longer, max(map(len, longer)), server).outcome == whole.outcome
    return whole.events


def _small_step(parts: tuple[bytes, ...]) -> int:
    # What is long goes in pieces of an odd size: it proves no more byte by byte.
    return 1 if sum(map(len, parts)) < 20_000 else 997


def negotiate(*parts: bytes, server: Server = PLAIN) -> list[Plain]:
    """Feed client flags and options; the events, with replies to options taken apart."""
    return taken_apart(feed(FLAGS + parts[0], *parts[1:], server=server))


def taken_apart(events: list[Plain]) -> list[Plain]:
    """Events with ("reply", option, kind, data) for each that sends one reply to an option."""
    return [_reply(event) for event in events]


def _reply(event: Plain) -> Plain:
    if event[0] != "send":
        return event
    data = event[1]
    assert isinstance(data, bytes)
    if len(data) < 20 or data[:8] != struct.pack(">Q", OPTION_REPLY_MAGIC):
        return event
    number, kind, length = struct.unpack_from(">III", data, 8)
    assert len(data) == 20 + length
    assert kind in spec.may_answer(number), f"option {number} was answered with {kind:#x}"
    return ("reply", number, kind, data[20:])


def kinds(events: list[Plain]) -> list[object]:
    """The kinds of the replies; the names of other events."""
    return [event[2] if event[0] == "reply" else event[0] for event in events]


def transmit(
    data: bytes,
    export: ExportInfo = EXPORTS["disk"],
    *,
    style: int = spec.SIMPLE,
    with_contexts: bool = False,
) -> list[Plain]:
    """Feed requests to an export that was just opened; the events they meant."""
    server = Server({export.name: export})
    hello = opening(style, with_contexts=with_contexts, name=export.name.encode())
    before = len(feed(hello, server=server))
    return feed(hello + data, server=server)[before:]


def told(replies: list[Plain], option_number: int) -> dict[int, bytes]:
    """What the INFO replies to an option told, by kind of information."""
    found: dict[int, bytes] = {}
    for _, number, kind, data in (reply for reply in replies if reply[0] == "reply"):
        if number == option_number and kind == spec.INFO:
            assert isinstance(data, bytes)
            found[struct.unpack_from(">H", data)[0]] = data[2:]
    return found
