"""A hostile server's stream into the client core.

The first byte chooses what the client wants, the second how the bytes are split, the third how many
requests it sends; their rows follow, and then what the server sends. Requests go out as soon as the
export is open, as a caller may send them: inside the export, and not longer than is allowed.

`Ledger` follows the events with its own bookkeeping: nothing is told of what was not asked, no byte
twice or outside, no success without all of it. Fed in any other way it must come to the same;
`needed` is bounded; behind a breach nothing is read; with TLS nothing is said before it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.events import (
    ClientEvent,
    DataReceived,
    Finished,
    HoleReceived,
    Ready,
    Send,
    StartTls,
    StatusReceived,
)
from tests.fuzz.server_target import step_of
from tests.nbd import spec

REQUEST = struct.Struct(">BBHH")
"""A row: command, flags, offset and length in sectors."""

REQUESTS_MAX = 8
TLS, DISCONNECTS, CONTEXTS = 1, 2, 4
"""Bits of the first byte; the best style is above them."""

_COMMANDS = sorted(spec.COMMANDS)
_NEEDED_MAX = 32 * 1024 * 1024 + 32 + 8
_ERRORS = {0, 1, 5, 12, 22, 28, 75, 95, 108}

Plain = tuple[object, ...]


class Wants(NamedTuple):
    """What an input makes of its client."""

    tls: bool
    disconnects: bool
    contexts: bool
    best: ReplyStyle
    rows: list[tuple[int, int, int, int]]

    def connection(self) -> ClientConnection:
        return ClientConnection("disk", tls=self.tls, best=self.best, contexts=self.contexts)


class Asked(NamedTuple):
    """A request that went out."""

    cookie: int
    command: int
    flags: int
    offset: int
    length: int
    header: bytes


class Outcome(NamedTuple):
    """All that must not depend on how the bytes arrived."""

    events: list[Plain]
    rest: bytes
    phase: ClientPhase
    breach: str
    in_flight: int


def outcome(data: bytes) -> Outcome:
    """What comes of a stream, fed unit by unit, with a ledger of it."""
    return _unit_by_unit(*_parsed(data))[1]


def run(data: bytes) -> None:
    """One server's stream, fed unit by unit and in another way."""
    if len(data) < 3 or len(data) < 3 + data[2] % (REQUESTS_MAX + 1) * REQUEST.size:
        return
    wants, stream = _parsed(data)
    parts, found = _unit_by_unit(wants, stream)
    assert _refed(wants, parts, step_of(data)) == found
    if ("StartTls",) in found.events:
        connection = wants.connection()
        connection.receive(memoryview(parts[0] + (parts[1] or b"\x16")))
        assert connection.breach is not None, "bytes behind STARTTLS were read as plaintext"


def _parsed(data: bytes) -> tuple[Wants, bytes]:
    begin = 3 + data[2] % (REQUESTS_MAX + 1) * REQUEST.size
    bits, rows = data[0], list(REQUEST.iter_unpack(data[3:begin]))
    tls, leaves, contexts = (bool(bits & bit) for bit in (TLS, DISCONNECTS, CONTEXTS))
    return Wants(tls, leaves, contexts, ReplyStyle((bits >> 3) % 3), rows), data[begin:]


def _unit_by_unit(wants: Wants, data: bytes) -> tuple[list[bytes], Outcome]:
    """Feed exactly what is needed; the parts between what we do, and what came of it."""
    connection, ledger = wants.connection(), Ledger(wants)
    meant: list[Plain] = []
    parts, begin, at, wanted = [], 0, 0, 0
    while connection.phase is not ClientPhase.CLOSED:
        assert wanted < connection.needed <= _NEEDED_MAX
        given = data[at : at + connection.needed]
        wanted = len(given)
        used, events = connection.receive(memoryview(given))
        assert used in {0, len(given)}
        assert used or not events
        at += used
        meant += map(plain, events)
        ledger.take(connection, events)
        if used:
            wanted = 0
        elif len(given) == len(data) - at:
            break
        done = _act(wants, connection, events)
        ledger.sent(connection, done)
        if done is not None:
            parts.append(data[begin:at])
            begin = at
            meant += done
    parts.append(data[begin:])
    assert connection.in_flight == len(ledger.flying)
    over = connection.phase is ClientPhase.CLOSED
    found = _outcome(connection, meant, b"" if over else data[at:])
    _end(connection)
    return parts, found


def _act(
    wants: Wants, connection: ClientConnection, events: list[ClientEvent]
) -> list[Plain] | None:
    """Do what a caller does next, if it is due: start TLS, or send the requests."""
    if connection.phase is ClientPhase.TLS:
        return [plain(event) for event in connection.tls_started()]
    if not events or type(events[-1]) is not Ready:
        return None
    export = connection.export
    assert export is not None
    done: list[Plain] = []
    for number, flags, sector, sectors in wants.rows:
        command = _COMMANDS[number % len(_COMMANDS)]
        says = spec.COMMANDS[command]
        legal = sum(says.flags) | spec.FUA
        offset, length = (512 * sector, 512 * (1 + sectors)) if says.ranged else (0, 0)
        if offset + length > export.size or (says.contexts and not connection.contexts):
            continue
        if says.payload and length > connection.longest:
            continue
        cookie, header = connection.request(command, offset, length, flags & legal)
        done.append(Asked(cookie, command, flags & legal, offset, length, header))
    if wants.disconnects:
        done.append(("disconnect", connection.disconnect()))
    return done


def _refed(wants: Wants, parts: list[bytes], step: int) -> Outcome:
    connection = wants.connection()
    meant: list[Plain] = []
    rest = b""
    events: list[ClientEvent] = []
    for number, part in enumerate(parts):
        if number:
            assert not rest
            done = _act(wants, connection, events)
            assert done is not None
            meant += done
        for at in range(0, len(part), step):
            rest += part[at : at + step]
            used, events = connection.receive(memoryview(rest))
            assert 0 <= used <= len(rest)
            meant += map(plain, events)
            rest = rest[used:]
            over = connection.phase in {ClientPhase.CLOSED, ClientPhase.TLS}
            assert over or len(rest) < connection.needed <= _NEEDED_MAX
    return _outcome(connection, meant, rest)


def _outcome(connection: ClientConnection, meant: list[Plain], rest: bytes) -> Outcome:
    breach = str(connection.breach or "")
    return Outcome(meant, rest, connection.phase, breach, connection.in_flight)


def _end(connection: ClientConnection) -> None:
    """The stream is over: that is a breach, unless there was one or we had said good-bye."""
    over, breach = connection.phase is ClientPhase.CLOSED, connection.breach
    assert breach is None or over
    if over:
        assert connection.receive(memoryview(b"more")) == (4, [])
    connection.server_closed()
    assert connection.phase is ClientPhase.CLOSED
    assert (connection.breach is breach) if over else (connection.breach is not None)


def plain(event: ClientEvent) -> Plain:
    """An event that stays what it is when the receive buffer goes."""
    if isinstance(event, DataReceived):
        return ("DataReceived", event.cookie, event.offset, bytes(event.data))
    if isinstance(event, StatusReceived):
        return ("StatusReceived", event.cookie, tuple(event.extents))
    return (type(event).__name__, *event)


class Flying(NamedTuple):
    """A request without its whole reply; `pieces` are (offset, length) of what came of a READ."""

    command: int
    flags: int
    offset: int
    length: int
    pieces: list[tuple[int, int]]
    statuses: list[int]


class Ledger:
    """Bookkeeping of what a client is told, independent of how it is done."""

    def __init__(self, wants: Wants) -> None:
        self.flying: dict[int, Flying] = {}
        self._wants = wants
        self._encrypted = False
        self._opened = False
        self._greeted = False

    def sent(self, connection: ClientConnection, done: list[Plain] | None) -> None:
        """Write down what the caller did."""
        for what in done or []:
            if isinstance(what, Asked):
                extended = connection.style is ReplyStyle.EXTENDED
                assert len(what.header) == (32 if extended else 28)
                self.flying[what.cookie] = Flying(*what[1:5], [], [])
            elif what[0] == "Send":
                self._encrypted = True

    def take(self, connection: ClientConnection, events: list[ClientEvent]) -> None:
        """Check what a client was told at once."""
        for event in events:
            match event:
                case Send(data):
                    self._said(data)
                case StartTls():
                    assert self._wants.tls
                    assert not self._encrypted
                case Ready():
                    self._ready(connection)
                case DataReceived(cookie, offset, data):
                    self._piece(self.flying[cookie], offset, len(data))
                case HoleReceived(cookie, offset, length):
                    self._piece(self.flying[cookie], offset, length)
                case StatusReceived(cookie, extents):
                    self._status(connection, self.flying[cookie], extents)
                case Finished(cookie, error, text):
                    self._finished(self.flying.pop(cookie), error, text)

    def _said(self, data: bytes) -> None:
        assert not self._opened
        if not self._greeted:
            self._greeted = True
            assert data in {b"\x00\x00\x00\x01", b"\x00\x00\x00\x03"}
            return
        magic, number, length = struct.unpack_from(">8sII", data)
        assert (magic, length) == (b"IHAVEOPT", len(data) - 16)
        if self._wants.tls and not self._encrypted:
            assert number in {2, 5}, "something is said before TLS"
        else:
            assert number in {1, 2, 7, 8, 10, 11}

    def _ready(self, connection: ClientConnection) -> None:
        export = connection.export
        assert export is not None
        assert not self._opened
        self._opened = True
        assert self._encrypted == self._wants.tls
        assert 0 <= export.size < 2**63
        assert export.flags & 1
        assert export.min_block <= 65_536
        assert max(512, export.min_block) <= export.preferred <= export.max_payload
        assert connection.style <= self._wants.best
        assert not connection.contexts or (self._wants.contexts and connection.style)
        assert 0 < connection.longest <= spec.MAX_PAYLOAD

    def _piece(self, flying: Flying, offset: int, length: int) -> None:
        assert flying.command == 0
        assert length > 0
        assert flying.offset <= offset
        assert offset + length <= flying.offset + flying.length
        for other, size in flying.pieces:
            assert offset + length <= other or other + size <= offset
        flying.pieces.append((offset, length))
        assert len(flying.pieces) == 1 or not flying.flags & spec.DF

    def _status(
        self, connection: ClientConnection, flying: Flying, extents: list[tuple[int, int]]
    ) -> None:
        assert connection.contexts
        assert connection.export is not None
        assert flying.command == 7
        assert not flying.statuses
        flying.statuses.append(len(extents))
        lengths = [length for length, _ in extents]
        assert lengths
        assert all(length > 0 for length in lengths)
        assert all(0 <= flags <= 3 for _, flags in extents)
        assert sum(lengths[:-1]) < flying.length
        assert flying.offset + sum(lengths) <= connection.export.size
        if flying.flags & spec.REQ_ONE:
            assert len(lengths) == 1
            assert lengths[0] <= flying.length

    def _finished(self, flying: Flying, error: int, text: str) -> None:
        assert error in _ERRORS
        assert len(text) <= spec.TEXT_MAX
        assert text.isprintable()
        if error:
            return
        assert not text
        if flying.command == 0:
            assert sum(length for _, length in flying.pieces) == flying.length
        assert len(flying.statuses) == (flying.command == 7)
