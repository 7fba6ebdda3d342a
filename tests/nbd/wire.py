"""Bytes as a client sends them, and three ways to feed them to a `ServerConnection`.

`feed` hands a case in whole, byte by byte, and with trailing bytes, checks that all three mean the
same, and returns the events with payloads as plain bytes. On the way it checks what a shell relies
on: never more is used than was given, and `needed` is always more than what is left over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from nbdproxy.nbd.constants import IHAVEOPT, OPTION_REPLY_MAGIC, REQUEST_MAGIC, Info, Option
from nbdproxy.nbd.events import Closed, Event, Opened, Refused, Send
from nbdproxy.nbd.server import WRITABLE, ExportInfo, Phase, ServerConnection
from nbdproxy.requests import Request

SIZE = 1024 * 1024
EXPORTS = {
    "disk": ExportInfo("disk", SIZE, WRITABLE, "the first"),
    "other": ExportInfo("other", 2 * SIZE, WRITABLE),
}
FLAGS = struct.pack(">I", 3)
TRAILING = b"\x00\x49\x25"
"""Shorter than any unit, so it must stay unused; not the beginning of one."""

Plain = tuple[object, ...]


def option(number: int, body: bytes = b"", *, length: int | None = None) -> bytes:
    """One option; `length` lies about its body."""
    announced = len(body) if length is None else length
    return struct.pack(">QII", IHAVEOPT, number, announced) + body


def go(name: bytes = b"", infos: Iterable[int] = (), *, number: int = Option.GO) -> bytes:
    """A GO, or an INFO, for an export."""
    return option(number, info_body(name, infos))


def info_body(name: bytes, infos: Iterable[int] = ()) -> bytes:
    """What GO and INFO carry."""
    asked = list(infos)
    count = struct.pack(f">H{len(asked)}H", len(asked), *asked)
    return struct.pack(">I", len(name)) + name + count


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 7,
    payload: bytes = b"",
) -> bytes:
    """One request."""
    header = struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length)
    return header + payload


def plain(event: Event) -> Plain:
    """An event that stays what it is when the receive buffer goes."""
    if isinstance(event, Request):
        return ("request", *event[:5], bytes(event.payload))
    if isinstance(event, Refused):
        return ("refused", event.error, *event.request[:5], bytes(event.request.payload))
    if isinstance(event, Send):
        return ("send", event.data)
    if isinstance(event, Opened):
        return ("opened", event.export)
    assert isinstance(event, Closed)
    return ("closed",)


def pour(
    data: bytes, step: int, exports: Mapping[str, ExportInfo] = EXPORTS
) -> tuple[list[Plain], bytes, Phase]:
    """Feed `step` bytes at a time; the events, what was left over, and the phase at the end.

    Raises the breach of the protocol if there is one.
    """
    events: list[Plain] = []
    rest, connection = pour_into(events, data, step, exports)
    if connection.breach is not None:
        raise connection.breach
    return events, rest, connection.phase


def pour_into(
    events: list[Plain], data: bytes, step: int, exports: Mapping[str, ExportInfo] = EXPORTS
) -> tuple[bytes, ServerConnection]:
    """Feed `step` bytes at a time, adding to `events`; what was left over, and the connection."""
    connection = ServerConnection(exports)
    rest = b""
    for at in range(0, len(data), step):
        rest += data[at : at + step]
        used, found = connection.receive(memoryview(rest))
        assert 0 <= used <= len(rest)
        events += [plain(event) for event in found]
        rest = rest[used:]
        assert connection.phase is Phase.CLOSED or connection.needed > len(rest)
    return rest, connection


def feed(data: bytes, exports: Mapping[str, ExportInfo] = EXPORTS) -> list[Plain]:
    """Feed whole units in all three ways; the events."""
    events, rest, phase = pour(data, max(len(data), 1), exports)
    assert rest == b""
    # Long payloads go in pieces of an odd size: they prove no more byte by byte.
    assert pour(data, 1 if len(data) < 20_000 else 997, exports) == (events, b"", phase)
    left = b"" if phase is Phase.CLOSED else TRAILING
    assert pour(data + TRAILING, len(data) + len(TRAILING), exports) == (events, left, phase)
    return events


def negotiate(data: bytes, exports: Mapping[str, ExportInfo] = EXPORTS) -> list[Plain]:
    """Feed client flags and `data`; the events, with replies to options taken apart."""
    return [opened_reply(event) for event in feed(FLAGS + data, exports)]


def opened_reply(event: Plain) -> Plain:
    """("reply", option, kind, data) for an event that sends one reply to an option."""
    if event[0] != "send":
        return event
    data = event[1]
    assert isinstance(data, bytes)
    if len(data) < 20 or data[:8] != struct.pack(">Q", OPTION_REPLY_MAGIC):
        return event
    number, kind, length = struct.unpack_from(">III", data, 8)
    assert len(data) == 20 + length
    return ("reply", number, kind, data[20:])


def transmit(data: bytes, export: ExportInfo = EXPORTS["disk"]) -> list[Plain]:
    """Feed requests to an export that was just opened; the events they meant."""
    exports = {export.name: export}
    hello = FLAGS + go(export.name.encode())
    before = len(pour(hello, len(hello), exports)[0])
    return feed(hello + data, exports)[before:]


def told(replies: list[Plain], option_number: int) -> dict[int, bytes]:
    """What the INFO replies to an option told, by kind of information."""
    found: dict[int, bytes] = {}
    for _, number, kind, data in (reply for reply in replies if reply[0] == "reply"):
        if number == option_number and kind == 3:
            assert isinstance(data, bytes)
            found[Info(struct.unpack_from(">H", data)[0])] = data[2:]
    return found
