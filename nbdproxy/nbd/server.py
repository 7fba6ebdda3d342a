"""The server's end of an NBD connection, without I/O.

`ServerConnection.receive` takes what has arrived and returns how many bytes of it were used and
the events they meant. It keeps no bytes: what was not used must be handed in again with more
behind it, so payloads are never copied. Fed whole, byte by byte or with trailing bytes it gives
the same events.

Theory of operation: a connection is in one phase (client flags, options, TLS handshake,
transmission, closed) and each phase has one function that reads one unit. What an option does is
in `haggling`, what is legal in `tables`. Whatever can be answered is answered; what cannot (a
wrong magic, a length beyond every limit) is a breach, and the connection is over.

Not covered: oldstyle.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import (
    ALLOCATION_ID,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    MAX_OPTIONS_PER_EXPORT,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    HandshakeFlag,
    ReplyStyle,
    TlsMode,
    TransmissionFlag,
)
from nbdproxy.nbd.events import Closed, Refused, ServerEvent, StartTls
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.nbd.haggling import Haggling
from nbdproxy.nbd.tables import BAD_FILTER, UNEXPECTED_PAYLOAD, Refusal, Terms
from nbdproxy.requests import Command, CommandFlag, Request

NOTHING = memoryview(b"")

# Plain integers: operators of IntEnum and IntFlag are slow, and these are in the hot path.
_READ, _WRITE, _DISC, _STATUS = (
    int(Command.READ),
    int(Command.WRITE),
    int(Command.DISC),
    int(Command.BLOCK_STATUS),
)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)


class Phase(Enum):
    """Where a connection stands."""

    CLIENT_FLAGS = auto()
    OPTIONS = auto()
    TLS = auto()
    TRANSMISSION = auto()
    CLOSED = auto()


class ServerConnection:
    """One connection, seen from the server. `exports` maps names to what they are.

    The empty name is the default export: the first of `exports`.
    """

    def __init__(self, exports: Mapping[str, ExportInfo], *, tls: TlsMode = TlsMode.OFF) -> None:
        self.phase = Phase.CLIENT_FLAGS
        self.needed = codec.CLIENT_FLAGS.size
        """How many bytes the next unit has in all; a receive buffer must hold that many."""
        self.breach: ProtocolError | None = None
        """How the client broke the protocol, if it did."""
        self.terms: Terms | None = None
        """What holds in transmission."""
        self._haggling = Haggling(exports, tls)
        self._options = 0
        self._most = max(MAX_OPTIONS, MAX_OPTIONS_PER_EXPORT * len(exports))

    def receive(self, data: memoryview, *, owed: int = 1 << 62) -> tuple[int, list[ServerEvent]]:
        """Return how many bytes of `data` were used, and what they meant, in order.

        Payloads of the events are views into `data`. When the stream cannot be followed any
        further, `breach` is set and the connection is closed; the events before that still count.
        No request is taken any more once the replies to those before it hold `owed` bytes of data.
        """
        events: list[ServerEvent] = []
        try:
            return self._receive(data, events, owed), events
        except ProtocolError as breach:
            self.breach = breach
            self.phase = Phase.CLOSED
            return len(data), events

    def tls_started(self) -> None:
        """Go on with the options: the TLS handshake is done."""
        assert self.phase is Phase.TLS
        self.phase = Phase.OPTIONS

    def _receive(self, data: memoryview, events: list[ServerEvent], owed: int) -> int:
        used = 0
        while True:
            match self.phase:
                case Phase.TRANSMISSION:
                    assert self.terms is not None
                    if self.terms.style is ReplyStyle.EXTENDED:
                        return used + self._extended(data[used:], events, owed)
                    return used + self._compact(data[used:], events, owed)
                case Phase.CLOSED:
                    return len(data)
                case Phase.TLS:
                    if used < len(data):
                        raise ProtocolError("the client sent more before STARTTLS was answered")
                    return used
                case Phase.CLIENT_FLAGS:
                    step = self._client_flags(data[used:])
                case Phase.OPTIONS:
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
        self._haggling.fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._haggling.zeroes = not flags & HandshakeFlag.NO_ZEROES
        self.phase = Phase.OPTIONS
        self.needed = codec.OPTION.size
        return codec.CLIENT_FLAGS.size

    def _option(self, data: memoryview, events: list[ServerEvent]) -> int:
        self.needed = codec.OPTION.size
        if len(data) < codec.OPTION.size:
            return 0
        magic, option, length = codec.OPTION.unpack_from(data)
        if magic != IHAVEOPT:
            raise ProtocolError(f"an option began with {magic:#x} instead of IHAVEOPT")
        if length > MAX_OPTION_DATA:
            raise ProtocolError(f"option {option} announces {length} bytes of data")
        if self._options >= self._most:
            raise ProtocolError(f"more than {self._most} options before transmission")
        self.needed = codec.OPTION.size + length
        if len(data) < self.needed:
            return 0
        used = self.needed
        self._options += 1
        events += self._haggling.answer(option, bytes(data[codec.OPTION.size : used]))
        self.needed = codec.OPTION.size
        self.terms = self._haggling.terms
        if self.terms is not None:
            self.phase = Phase.TRANSMISSION
            self.needed = codec.REQUEST.size
        elif self._haggling.closed:
            self.phase = Phase.CLOSED
        elif type(events[-1]) is StartTls:
            self.phase = Phase.TLS
        return used

    def _compact(self, data: memoryview, events: list[ServerEvent], owed: int) -> int:
        """Read as many whole requests as there are; the hot loop of the server."""
        assert self.terms is not None
        refusal, unpack, header = self.terms.refusal, codec.REQUEST.unpack_from, codec.REQUEST.size
        at, end = 0, len(data)
        self.needed = header
        while end - at >= header and owed > 0:
            magic, flags, command, cookie, offset, length = unpack(data, at)
            if magic != REQUEST_MAGIC:
                raise ProtocolError(f"a request began with {magic:#x}")
            body = at + header
            payload = NOTHING
            if command == _WRITE:
                if length > MAX_PAYLOAD:
                    raise ProtocolError(f"a write announces {length} bytes, more than the maximum")
                if end - body < length:
                    self.needed = header + length
                    return at
                payload = data[body : body + length]
                body += length
            elif command == _DISC:
                return self._disconnect(events, end)
            request = Request(command, flags, cookie, offset, length, payload)
            error = refusal(command, flags, offset, length)
            if error is not None:
                events.append(Refused(request, *error))
            else:
                events.append(request)
                if command == _READ:
                    owed -= length
            at = body
        return at

    def _extended(self, data: memoryview, events: list[ServerEvent], owed: int) -> int:
        """The same with extended headers, where any request may have a payload."""
        unpack, header = codec.EXTENDED_REQUEST.unpack_from, codec.EXTENDED_REQUEST.size
        at, end = 0, len(data)
        self.needed = header
        while end - at >= header and owed > 0:
            magic, flags, command, cookie, offset, length = unpack(data, at)
            if magic != EXTENDED_REQUEST_MAGIC:
                raise ProtocolError(f"an extended request began with {magic:#x}")
            body = at + header
            payload: memoryview | None = None
            # QEMU's client (10.0) leaves the flag out of a WRITE, which has a payload all the same.
            if flags & _PAYLOAD_LEN or command == _WRITE:
                if length > MAX_PAYLOAD:
                    raise ProtocolError(f"a payload of {length} bytes is more than the maximum")
                if end - body < length:
                    self.needed = header + length
                    return at
                payload = data[body : body + length]
                body += length
            if command == _DISC:
                return self._disconnect(events, end)
            flags &= ~_PAYLOAD_LEN
            request = Request(command, flags, cookie, offset, length, payload or NOTHING)
            request, error = self._judge(request, has_payload=payload is not None)
            if error is not None:
                events.append(Refused(request, *error))
            else:
                events.append(request)
                if command == _READ:
                    owed -= length
            at = body
        return at

    def _judge(self, request: Request, *, has_payload: bool) -> tuple[Request, Refusal | None]:
        """Return an extended request, its length being of the disk, and why it is refused."""
        assert self.terms is not None
        if request.command == _STATUS and has_payload:
            if not self.terms.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
                return request, UNEXPECTED_PAYLOAD
            asked = codec.parse_status_filter(request.payload)
            if asked is None or asked[1] != (ALLOCATION_ID,):
                return request, BAD_FILTER
            request = request._replace(length=asked[0], payload=NOTHING)
        elif has_payload and request.command != _WRITE:
            return request, UNEXPECTED_PAYLOAD
        return request, self.terms.refusal(*request[:2], *request[3:5])

    def _disconnect(self, events: list[ServerEvent], end: int) -> int:
        self.phase = Phase.CLOSED
        events.append(Closed())
        return end
