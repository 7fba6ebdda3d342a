"""The client's end of an NBD connection, without I/O; nothing that a server says is trusted.

`ClientConnection.receive` takes what has arrived and returns how many bytes of it were used and
the events they meant. It keeps no bytes: what was not used must be handed in again with more
behind it, so data is never copied. Fed whole, byte by byte or with trailing bytes it gives the
same events. `needed` never exceeds the largest legal unit, a READ of 32 MiB in one chunk; a length
is judged before it is waited for.

Theory of operation: a connection is in one phase (greeting, options, TLS handshake, the answer to
EXPORT_NAME, transmission, leaving, closed) and each phase has one function that reads one unit.
What is asked and agreed on is in `client_haggling`, what a reply may hold in `chunks`. The first
rule that the server breaks is the `breach`, and the connection is over. It is over as well when
the server declines (`ServerRefusedError`) or hangs up (`ServerGoneError`), which are errors of
their own because nobody broke a rule, and another try may succeed.

Not covered: oldstyle, and newstyle that is not fixed; filters of BLOCK_STATUS. How long to wait
for a server that is silent is the shell's business.
"""

from __future__ import annotations

import struct
from enum import Enum, auto

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.chunks import Agreed, Flight
from nbdproxy.nbd.client_haggling import ClientHaggling, ServerRefusedError
from nbdproxy.nbd.constants import (
    CHUNK_DONE,
    EXTENDED_REPLY_MAGIC,
    IHAVEOPT,
    MAX_PAYLOAD,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    HandshakeFlag,
    Option,
    ReplyStyle,
)
from nbdproxy.nbd.events import ClientEvent, DataReceived, Ready, Send
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.requests import Command, CommandFlag, Request

# Plain integers: operators of IntEnum and IntFlag are slow, and these are in the hot path.
_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_NOTHING = memoryview(b"")
_MAGIC = struct.Struct(">I")
_SMALLEST_REPLY = (
    codec.SIMPLE_REPLY.size,
    codec.SIMPLE_REPLY.size,  # structured replies leave room for simple ones
    codec.EXTENDED_REPLY.size,
)
_CHUNK = {
    STRUCTURED_REPLY_MAGIC: codec.STRUCTURED_REPLY,
    EXTENDED_REPLY_MAGIC: codec.EXTENDED_REPLY,
}
_MAGICS = (
    (SIMPLE_REPLY_MAGIC,),
    (STRUCTURED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC),
    (EXTENDED_REPLY_MAGIC,),
)


class ClientPhase(Enum):
    """Where a connection stands."""

    GREETING = auto()
    OPTIONS = auto()
    TLS = auto()
    EXPORT_NAME = auto()
    TRANSMISSION = auto()
    LEAVING = auto()
    CLOSED = auto()


class ServerGoneError(ProtocolError):
    """The server closed the connection while it owed an answer, or before we were done."""


class ClientConnection:
    """One connection to a server, and to one of its exports; the name "" is its default.

    tls       nothing but STARTTLS is said before TLS, and no answer but ACK will do
    best      the richest form of replies to ask for
    contexts  whether to ask for `base:allocation`, which BLOCK_STATUS needs
    """

    def __init__(
        self,
        export: str,
        *,
        tls: bool = False,
        best: ReplyStyle = ReplyStyle.EXTENDED,
        contexts: bool = True,
    ) -> None:
        self.phase = ClientPhase.GREETING
        self.needed = codec.GREETING.size
        """How many bytes the next unit has in all; a receive buffer must hold that many."""
        self.breach: ProtocolError | None = None
        """Why the connection is over, if it is not by our own wish."""
        self.export: ExportInfo | None = None
        """What the server told, from `Ready` on; its texts are raw, see `codec.printable`."""
        self.style = ReplyStyle.SIMPLE
        """The form of replies that was agreed on, from `Ready` on."""
        self.contexts = False
        """Whether BLOCK_STATUS may be asked, from `Ready` on."""
        self.longest = MAX_PAYLOAD
        """The most bytes that one READ or WRITE may have: the server's limit, or our own."""
        self._tls = tls
        self._haggling = ClientHaggling(export, tls=tls, best=best, contexts=contexts)
        self._zeroes = codec.EXPORT_NAME_ZEROES
        self._agreed = Agreed(0, ReplyStyle.SIMPLE, None)
        self._flights: dict[int, Flight] = {}
        self._cookie = 0

    @property
    def in_flight(self) -> int:
        """How many requests have no complete reply yet."""
        return len(self._flights)

    def receive(self, data: memoryview) -> tuple[int, list[ClientEvent]]:
        """Return how many bytes of `data` were used, and what they meant, in order.

        Data of the events are views into `data`. When the connection cannot go on, `breach` is
        set and it is closed; the events before that still count, and what is to be sent, be it
        only a good-bye, is still to be sent. Only a `StartTls` counts no more: who sent plaintext
        behind it must not be offered a handshake.
        """
        events: list[ClientEvent] = []
        try:
            return self._receive(data, events), events
        except ServerRefusedError as refusal:
            # Nobody broke a rule, so the specification wants a good-bye before we hang up.
            events.append(Send(codec.option(Option.ABORT)))
            self._end(refusal)
        except ProtocolError as breach:
            self._end(breach)
        return len(data), events

    def tls_started(self) -> list[ClientEvent]:
        """Go on with the options: the TLS handshake is done. Returns what is to be sent."""
        assert self.phase is ClientPhase.TLS
        self.phase = ClientPhase.OPTIONS
        return [self._haggling.ask()]

    def server_closed(self) -> None:
        """Say that the stream has ended; `breach` is set unless we had said good-bye."""
        match self.phase:
            case ClientPhase.CLOSED:
                return
            case ClientPhase.GREETING:
                words = "before it said anything: see whether it lets this client in"
            case ClientPhase.TLS:
                words = "instead of a TLS handshake: see its log"
            case ClientPhase.EXPORT_NAME:
                words = (
                    f"when asked for the export {self._haggling.shown_name}: "
                    "most likely it has none of this name"
                )
            case ClientPhase.OPTIONS:
                assert self._haggling.asked is not None
                words = f"when asked for {self._haggling.asked.name}: see its log"
            case _:
                words = f"with {self.in_flight} requests in flight: see its log"
        self._end(ServerGoneError(f"the server closed the connection {words}"))

    def request(self, command: int, offset: int, length: int, flags: int = 0) -> tuple[int, bytes]:
        """Return a new cookie and the header of a request, which is in flight from now on.

        The `length` bytes of a WRITE are to be sent behind it. Whether the export can do what is
        asked is for the caller to know; a server answers what it does not like with an error.
        """
        assert self.phase is ClientPhase.TRANSMISSION
        assert command != Command.DISC, "disconnect() says good-bye"
        assert command not in (_READ, _WRITE) or length <= self.longest, "too long for one request"
        assert not flags & _PAYLOAD_LEN, "this flag is set where it belongs"
        self._cookie += 1
        cookie = self._cookie
        asked = Request(command, flags, cookie, offset, length, _NOTHING)
        self._flights[cookie] = Flight(asked, self._agreed)
        extended = self.style is ReplyStyle.EXTENDED
        if extended and command == _WRITE:
            flags |= _PAYLOAD_LEN
        return cookie, codec.request(command, flags, cookie, offset, length, extended=extended)

    def disconnect(self) -> bytes:
        """Return the bytes that say good-bye, empty if there is nobody to say it to.

        What is in flight is still answered: the phase is LEAVING until then, and no request may
        follow.
        """
        match self.phase:
            case ClientPhase.OPTIONS:
                self.phase = ClientPhase.CLOSED
                return codec.option(Option.ABORT)
            case ClientPhase.TRANSMISSION:
                self.phase = ClientPhase.LEAVING if self._flights else ClientPhase.CLOSED
                extended = self.style is ReplyStyle.EXTENDED
                return codec.request(Command.DISC, 0, 0, 0, 0, extended=extended)
            case ClientPhase.LEAVING:
                return b""
        self.phase = ClientPhase.CLOSED
        return b""

    def _end(self, breach: ProtocolError) -> None:
        self.breach = breach
        self.phase = ClientPhase.CLOSED

    def _receive(self, data: memoryview, events: list[ClientEvent]) -> int:
        used = 0
        while True:
            match self.phase:
                case ClientPhase.TRANSMISSION | ClientPhase.LEAVING:
                    step = self._reply(data[used:], events)
                case ClientPhase.CLOSED:
                    return len(data)
                case ClientPhase.TLS:
                    if used < len(data):
                        # Whoever sits in between would have it taken for what TLS protects
                        # (CVE-2021-3716).
                        raise ProtocolError("the server sent plaintext where TLS begins")
                    return used
                case ClientPhase.GREETING:
                    step = self._greeting(data[used:], events)
                case ClientPhase.OPTIONS:
                    step = self._option_reply(data[used:], events)
                case ClientPhase.EXPORT_NAME:
                    step = self._export_name_reply(data[used:], events)
            if not step:
                return used
            used += step

    def _greeting(self, data: memoryview, events: list[ClientEvent]) -> int:
        if len(data) < codec.GREETING.size:
            return 0
        magic, style, offered = codec.GREETING.unpack_from(data)
        if magic != NBD_MAGIC:
            raise ProtocolError("this is not an NBD server: it does not begin with NBDMAGIC")
        if style not in (IHAVEOPT, OLDSTYLE_MAGIC):
            raise ProtocolError(f"the server's second magic is {style:#x} instead of IHAVEOPT")
        if style == OLDSTYLE_MAGIC or not offered & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError(
                "the server does not speak fixed newstyle negotiation: "
                "start it without --oldstyle, or use a newer one"
            )
        flags = offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        if flags & HandshakeFlag.NO_ZEROES:
            self._zeroes = 0
        events.append(Send(codec.CLIENT_FLAGS.pack(flags)))
        events.append(self._haggling.ask())
        self.phase = ClientPhase.OPTIONS
        self.needed = codec.OPTION_REPLY.size
        return codec.GREETING.size

    def _option_reply(self, data: memoryview, events: list[ClientEvent]) -> int:
        self.needed = codec.OPTION_REPLY.size
        if len(data) < codec.OPTION_REPLY.size:
            return 0
        magic, option, kind, length = codec.OPTION_REPLY.unpack_from(data)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"the server's reply to an option began with {magic:#x}")
        self._haggling.expect(option, kind, length)
        self.needed = codec.OPTION_REPLY.size + length
        if len(data) < self.needed:
            return 0
        used = self.needed
        events += self._haggling.answer(kind, bytes(data[codec.OPTION_REPLY.size : used]))
        self.needed = codec.OPTION_REPLY.size
        if self._haggling.export is not None:
            self._open(self._haggling.export, events)
        elif self._haggling.asked is None:
            self.phase = ClientPhase.TLS
        elif self._haggling.asked is Option.EXPORT_NAME:
            self.phase = ClientPhase.EXPORT_NAME
            self.needed = codec.EXPORT_NAME_REPLY.size + self._zeroes
        return used

    def _export_name_reply(self, data: memoryview, events: list[ClientEvent]) -> int:
        used = codec.EXPORT_NAME_REPLY.size + self._zeroes
        if len(data) < used:
            return 0
        self._open(self._haggling.open_by_name(*codec.EXPORT_NAME_REPLY.unpack_from(data)), events)
        return used

    def _open(self, export: ExportInfo, events: list[ClientEvent]) -> None:
        self.export = export
        self.style = self._haggling.style
        self.contexts = self._haggling.context is not None
        self.longest = min(export.max_payload, MAX_PAYLOAD)
        self._agreed = Agreed(export.size, self.style, self._haggling.context)
        self.phase = ClientPhase.TRANSMISSION
        self.needed = _SMALLEST_REPLY[self.style]
        events.append(Ready())

    def _reply(self, data: memoryview, events: list[ClientEvent]) -> int:
        """Read a simple reply, or one chunk of another."""
        self.needed = _SMALLEST_REPLY[self.style]
        if len(data) < _MAGIC.size:
            return 0
        # The magic alone is judged at once: a wrong one may belong to a shorter header.
        (magic,) = _MAGIC.unpack_from(data)
        if magic not in _MAGICS[self.style]:
            raise ProtocolError(f"the server's reply began with {magic:#x}")
        form = _CHUNK.get(magic)
        used = self._simple(data, events) if form is None else self._chunk(form, data, events)
        if self.phase is ClientPhase.LEAVING and not self._flights:
            self.phase = ClientPhase.CLOSED
        return used

    def _flight(self, cookie: int) -> Flight:
        flight = self._flights.get(cookie)
        if flight is None:
            raise ProtocolError(f"the server answered request {cookie}, which is not in flight")
        return flight

    def _simple(self, data: memoryview, events: list[ClientEvent]) -> int:
        header = codec.SIMPLE_REPLY.size
        if len(data) < header:
            return 0
        _, error, cookie = codec.SIMPLE_REPLY.unpack_from(data)
        flight = self._flight(cookie)
        finished = flight.simple(error)
        if flight.command == _READ and not error:
            self.needed = header + flight.length
            if len(data) < self.needed:
                return 0
            events.append(DataReceived(cookie, flight.offset, data[header : self.needed]))
            header = self.needed
        events.append(finished)
        del self._flights[cookie]
        return header

    def _chunk(self, form: struct.Struct, data: memoryview, events: list[ClientEvent]) -> int:
        header = self.needed = form.size
        if len(data) < header:
            return 0
        _, flags, kind, cookie, *where, length = form.unpack_from(data)
        flight = self._flight(cookie)
        if where and where[0] != flight.offset:
            raise ProtocolError(f"the server answered a request at {where[0]}, which is elsewhere")
        flight.announce(kind, flags, length)
        self.needed = header + length
        body = data[header : self.needed]
        if len(body) < length:
            flight.look(kind, length, body)
            return 0
        event = flight.take(kind, body)
        if event is not None:
            events.append(event)
        if flags & CHUNK_DONE:
            events.append(flight.finish())
            del self._flights[cookie]
        return self.needed
