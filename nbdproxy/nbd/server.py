"""The server's end of an NBD connection, without I/O.

`ServerConnection.receive` takes what has arrived and returns how many bytes of it were used and
the events they meant. It keeps no bytes: what was not used must be handed in again with more
behind it, so payloads are never copied. Fed whole, byte by byte or with trailing bytes it gives
the same events.

Theory of operation: a connection is in one phase (client flags, options, transmission, closed)
and each phase has one function that reads one unit. Whatever can be answered is answered; what
cannot (a wrong magic, a length beyond every limit) is a breach, and the connection is over.

Not covered: anything but fixed newstyle with simple replies. Structured replies, meta contexts,
extended headers and TLS are answered as unsupported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import (
    IHAVEOPT,
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    MAX_PAYLOAD,
    MAX_STRING,
    REQUEST_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdproxy.nbd.events import Closed, Event, Opened, Refused, Send
from nbdproxy.nbd.tables import refusal
from nbdproxy.requests import Command, Request

NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the negotiation tells of an export; `size` in bytes."""

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""


class Phase(Enum):
    """Where a connection stands."""

    CLIENT_FLAGS = auto()
    OPTIONS = auto()
    TRANSMISSION = auto()
    CLOSED = auto()


class ServerConnection:
    """One connection, seen from the server. `exports` maps names to what they are.

    The empty name is the default export: the first of `exports`.
    """

    def __init__(self, exports: Mapping[str, ExportInfo]) -> None:
        self.phase = Phase.CLIENT_FLAGS
        self.needed = codec.CLIENT_FLAGS.size
        """How many bytes the next unit has in all; a receive buffer must hold that many."""
        self.breach: ProtocolError | None = None
        """How the client broke the protocol, if it did."""
        self._exports = exports
        self._export: ExportInfo | None = None
        self._zeroes = True
        self._options = 0
        self._answers: dict[int, Callable[[bytes], list[Event]]] = {
            Option.EXPORT_NAME: self._export_name,
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.INFO: self._info,
            Option.GO: self._go,
        }

    def receive(self, data: memoryview) -> tuple[int, list[Event]]:
        """Return how many bytes of `data` were used, and what they meant, in order.

        Payloads of the events are views into `data`. When the stream cannot be followed any
        further, `breach` is set and the connection is closed; the events before that still count.
        """
        events: list[Event] = []
        try:
            return self._receive(data, events), events
        except ProtocolError as breach:
            self.breach = breach
            self.phase = Phase.CLOSED
            return len(data), events

    def _receive(self, data: memoryview, events: list[Event]) -> int:
        used = 0
        while True:
            if self.phase is Phase.TRANSMISSION:
                return used + self._requests(data[used:], events)
            if self.phase is Phase.CLOSED:
                return len(data)
            if self.phase is Phase.CLIENT_FLAGS:
                step = self._client_flags(data[used:])
            else:
                step = self._option(data[used:], events)
            if not step:
                return used
            used += step

    def _client_flags(self, data: memoryview) -> int:
        if len(data) < codec.CLIENT_FLAGS.size:
            return 0
        (flags,) = codec.CLIENT_FLAGS.unpack_from(data)
        # As an integer: the complement of an IntFlag has no bits that the enum does not name.
        known = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        if flags & ~known:
            raise ProtocolError(f"the client sent unknown handshake flags {flags:#x}")
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("the client does not speak fixed newstyle negotiation")
        self._zeroes = not flags & HandshakeFlag.NO_ZEROES
        self.phase = Phase.OPTIONS
        self.needed = codec.OPTION.size
        return codec.CLIENT_FLAGS.size

    def _option(self, data: memoryview, events: list[Event]) -> int:
        self.needed = codec.OPTION.size
        if len(data) < codec.OPTION.size:
            return 0
        magic, option, length = codec.OPTION.unpack_from(data)
        if magic != IHAVEOPT:
            raise ProtocolError(f"an option began with {magic:#x} instead of IHAVEOPT")
        if length > MAX_OPTION_DATA:
            raise ProtocolError(f"option {option} announces {length} bytes of data")
        if self._options >= MAX_OPTIONS:
            raise ProtocolError(f"more than {MAX_OPTIONS} options before transmission")
        self.needed = codec.OPTION.size + length
        if len(data) < self.needed:
            return 0
        used = self.needed
        self._options += 1
        body = bytes(data[codec.OPTION.size : used])
        answer = self._answers.get(option)
        if answer is None:
            events.append(_reply(option, OptionReply.ERR_UNSUP, b"this option is not supported"))
        else:
            events.extend(answer(body))
        self.needed = codec.REQUEST.size if self.phase is Phase.TRANSMISSION else codec.OPTION.size
        return used

    def _find(self, name: bytes) -> ExportInfo | None:
        text = name.decode(errors="surrogateescape")
        if text in self._exports:
            return self._exports[text]
        return next(iter(self._exports.values()), None) if not text else None

    def _open(self, export: ExportInfo) -> Opened:
        self._export = export
        self.phase = Phase.TRANSMISSION
        return Opened(export.name)

    def _export_name(self, body: bytes) -> list[Event]:
        export = self._find(body) if len(body) <= MAX_STRING else None
        if export is None:
            raise ProtocolError("EXPORT_NAME asked for an export that does not exist")
        hello = codec.export_name_reply(export.size, export.flags, zeroes=self._zeroes)
        return [Send(hello), self._open(export)]

    def _abort(self, _body: bytes) -> list[Event]:
        self.phase = Phase.CLOSED
        return [_reply(Option.ABORT, OptionReply.ACK), Closed()]

    def _list(self, body: bytes) -> list[Event]:
        if body:
            return [_reply(Option.LIST, OptionReply.ERR_INVALID, b"LIST carries no data")]
        replies = [_reply(Option.LIST, OptionReply.SERVER, _listed(e)) for e in self._all()]
        return [*replies, _reply(Option.LIST, OptionReply.ACK)]

    def _all(self) -> list[ExportInfo]:
        return list(self._exports.values())

    def _info(self, body: bytes) -> list[Event]:
        return self._describe(Option.INFO, body)[1]

    def _go(self, body: bytes) -> list[Event]:
        export, replies = self._describe(Option.GO, body)
        return [*replies, self._open(export)] if export else replies

    def _describe(self, option: Option, body: bytes) -> tuple[ExportInfo | None, list[Event]]:
        asked = _parse_info(body)
        if asked is None:
            return None, [_reply(option, OptionReply.ERR_INVALID, b"malformed INFO or GO")]
        name, infos = asked
        export = self._find(name) if len(name) <= MAX_STRING else None
        if export is None:
            # The name is not repeated: a long one would make the error itself an attack.
            return None, [_reply(option, OptionReply.ERR_UNKNOWN, b"no export has this name")]
        told = [codec.info_export(export.size, export.flags)]
        if Info.NAME in infos:
            told.append(codec.info_text(Info.NAME, export.name))
        if Info.DESCRIPTION in infos and export.description:
            told.append(codec.info_text(Info.DESCRIPTION, export.description))
        told.append(codec.info_block_size(MAX_PAYLOAD))
        replies: list[Event] = [_reply(option, OptionReply.INFO, data) for data in told]
        return export, [*replies, _reply(option, OptionReply.ACK)]

    def _requests(self, data: memoryview, events: list[Event]) -> int:
        """Read as many whole requests as there are; the hot loop of the server."""
        assert self._export is not None
        size, can = self._export.size, int(self._export.flags)
        unpack, header, write = codec.REQUEST.unpack_from, codec.REQUEST.size, int(Command.WRITE)
        at, end = 0, len(data)
        self.needed = header
        while end - at >= header:
            magic, flags, command, cookie, offset, length = unpack(data, at)
            if magic != REQUEST_MAGIC:
                raise ProtocolError(f"a request began with {magic:#x}")
            body = at + header
            payload = NOTHING
            if command == write:
                if length > MAX_PAYLOAD:
                    raise ProtocolError(f"a write announces {length} bytes, more than the maximum")
                if end - body < length:
                    self.needed = header + length
                    return at
                payload = data[body : body + length]
                body += length
            elif command == Command.DISC:
                self.phase = Phase.CLOSED
                events.append(Closed())
                return end
            request = Request(command, flags, cookie, offset, length, payload)
            error = refusal(command, flags, offset, length, size=size, can=can)
            events.append(Refused(request, error) if error else request)
            at = body
        return at


def _reply(option: int, kind: OptionReply, data: bytes = b"") -> Send:
    return Send(codec.option_reply(option, kind, data))


def _listed(export: ExportInfo) -> bytes:
    name = export.name.encode(errors="surrogateescape")
    return struct.pack(">I", len(name)) + name + export.description.encode(errors="surrogateescape")


def _parse_info(body: bytes) -> tuple[bytes, set[int]] | None:
    """Return the name and the infos that INFO or GO asks for, None if the lengths disagree."""
    if len(body) < 6:
        return None
    (length,) = struct.unpack_from(">I", body)
    if length > len(body) - 6:
        return None
    name = body[4 : 4 + length]
    (count,) = struct.unpack_from(">H", body, 4 + length)
    if len(body) != 6 + length + 2 * count:
        return None
    return name, set(struct.unpack_from(f">{count}H", body, 6 + length))


WRITABLE = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
)
"""The flags of a writable export: its volatile cache belongs to the export, so MULTI_CONN holds."""
