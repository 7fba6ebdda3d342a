"""A client core and a server core that talk in memory, in pieces of any size.

`Served` is a server on a bytearray: it answers with the product's own `Replies`, in any order, and
can be made old by options that it denies. `Pair` carries bytes to and fro, follows STARTTLS on
both ends, and puts the client's parts of replies together. Both check what a shell relies on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.events import (
    ClientEvent,
    DataReceived,
    Finished,
    HoleReceived,
    Opened,
    Ready,
    Refused,
    Send,
    ServerEvent,
    StartTls,
    StatusReceived,
)
from nbdproxy.nbd.replies import Replies
from nbdproxy.nbd.server import Phase, ServerConnection
from nbdproxy.requests import Command, CommandFlag, Request

SECTOR = 512
UNSUP = 2**31 + 1


class Asked(NamedTuple):
    """A request that a client is to send; `fill` is the byte that a WRITE repeats."""

    command: int
    offset: int
    length: int
    flags: int = 0
    fill: int = 0


@dataclass
class Result:
    """What came back for one request."""

    data: bytearray
    got: int = 0
    extents: list[tuple[int, int]] | None = None
    error: int = 0
    text: str = ""
    done: bool = False


def states(disk: bytes | bytearray, offset: int, end: int) -> list[tuple[int, int]]:
    """Extents of a disk in steps of a sector: 3 where it is zero, 0 elsewhere."""
    found: list[tuple[int, int]] = []
    for at in range(offset, end, SECTOR):
        size = min(SECTOR, end - at)
        flags = 0 if any(disk[at : at + size]) else 3
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + size, flags)
        else:
            found.append((size, flags))
    return found


@dataclass
class Served:
    """A server on `disk`. `order` sorts what came in together; `fault` may give an error.

    Options in `deny` are answered with ERR_UNSUP, as by a server that does not know them.
    """

    core: ServerConnection
    disk: bytearray
    order: Callable[[list[Request | Refused]], None] = lambda _: None
    fault: Callable[[Request], int] = lambda _: 0
    deny: frozenset[int] = frozenset()
    done: list[tuple[int, int]] = field(default_factory=list)
    """(cookie, error) in the order in which they were executed."""
    _rest: bytes = b""
    _shim: bytes | None = b""
    _flagged: bool = False
    _replies: Replies = field(default_factory=Replies)

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the client; return what to send back."""
        said = b""
        if self._shim is not None:
            data, said = self._denied(data)
        self._rest += data
        used, events = self.core.receive(memoryview(self._rest))
        assert self.core.breach is None, self.core.breach
        waiting: list[Request | Refused] = []
        for event in events:
            match event:
                case Send(sent):
                    said += sent
                case Opened():
                    self._shim = None
                    assert self.core.terms is not None
                    self._replies = Replies(self.core.terms.style, arena=100_000)
                case Request() | Refused():
                    waiting.append(event)
        self.order(waiting)
        for one in waiting:
            self._execute(one)
        self._rest = self._rest[used:]
        assert self.core.phase is Phase.CLOSED or len(self._rest) < self.core.needed
        return said + b"".join(self._replies.take())

    def _denied(self, data: bytes) -> tuple[bytes, bytes]:
        """Answer the options that are denied; return what is for the core, and the answers."""
        assert self._shim is not None
        self._shim += data
        passed = said = b""
        if not self._flagged and len(self._shim) >= 4:
            passed, self._shim, self._flagged = self._shim[:4], self._shim[4:], True
        while self._flagged and len(self._shim) >= 16:
            _, option, length = struct.unpack_from(">QII", self._shim)
            whole, rest = self._shim[: 16 + length], self._shim[16 + length :]
            if len(whole) < 16 + length:
                break
            self._shim = rest
            if option in self.deny:
                said += struct.pack(">QIII", 0x3E889045565A9, option, UNSUP, 0)
            else:
                passed += whole
        return passed, said

    def _execute(self, one: Request | Refused) -> None:
        if isinstance(one, Refused):
            self._fail(one.request, one.error, one.text)
            return
        error = self.fault(one)
        if error:
            self._fail(one, error, "a fault of the test")
            return
        self.done.append((one.cookie, 0))
        match one.command:
            case Command.READ:
                self._replies.reserve_read(one)[:] = self.disk[one.offset : one.end]
                self._replies.finish_read(one)
            case Command.BLOCK_STATUS:
                only = bool(one.flags & CommandFlag.REQ_ONE)
                extents = states(self.disk, one.offset, one.end)
                self._replies.status(one, extents[:1] if only else extents)
            case _:
                apply(one.command, self.disk, one.offset, bytes(one.payload), one.length)
                self._replies.done(one)

    def _fail(self, request: Request, error: int, text: str) -> None:
        self.done.append((request.cookie, error))
        self._replies.fail(request, error, text)


def apply(command: int, disk: bytearray, offset: int, payload: bytes, length: int) -> None:
    """Do to a disk what a request asks for."""
    if command == Command.WRITE:
        disk[offset : offset + length] = payload
    elif command in (Command.TRIM, Command.WRITE_ZEROES):
        disk[offset : offset + length] = bytes(length)


def sent_by(events: Sequence[ClientEvent] | Sequence[ServerEvent]) -> bytes:
    """What the events of either core say is to be sent."""
    return b"".join(event.data for event in events if isinstance(event, Send))


class Pair:
    """A client and a server; `steps` says how many bytes go over at a time."""

    def __init__(self, client: ClientConnection, served: Served, steps: Iterator[int]) -> None:
        self.client = client
        self.served = served
        self.ready = False
        self.results: dict[int, Result] = {}
        self.asked: dict[int, Asked] = {}
        self._steps = steps
        self._to_server = b""
        self._to_client = b"NBDMAGICIHAVEOPT\x00\x03"
        self._rest = b""

    def ask(self, one: Asked) -> None:
        """Send a request; its result is in `results` once it is done."""
        cookie, header = self.client.request(one.command, one.offset, one.length, one.flags)
        payload = bytes([one.fill]) * one.length if one.command == Command.WRITE else b""
        self._to_server += header + payload
        self.asked[cookie] = one
        self.results[cookie] = Result(bytearray(b"?") * one.length)

    def disconnect(self) -> None:
        """Say good-bye."""
        self._to_server += self.client.disconnect()

    def run(self) -> None:
        """Carry bytes until both ends are silent."""
        while self._to_server or self._to_client:
            sent, self._to_server = self._cut(self._to_server)
            if sent:
                self._to_client += self.served.receive(sent)
            came, self._to_client = self._cut(self._to_client)
            if came:
                self._receive(came)

    def _cut(self, pending: bytes) -> tuple[bytes, bytes]:
        """Return what goes over next, and the rest; much data does not go byte by byte."""
        step = max(next(self._steps), len(pending) // 40)
        return pending[:step], pending[step:]

    def _receive(self, data: bytes) -> None:
        self._rest += data
        used, events = self.client.receive(memoryview(self._rest))
        assert self.client.breach is None, self.client.breach
        for event in events:
            match event:
                case Send(sent):
                    self._to_server += sent
                case StartTls():
                    assert not self._to_client
                    self.served.core.tls_started()
                    self._to_server += sent_by(self.client.tls_started())
                case Ready():
                    self.ready = True
                case _:
                    self._collect(event)
        self._rest = self._rest[used:]
        over = self.client.phase is ClientPhase.CLOSED
        assert over or len(self._rest) < self.client.needed

    def _collect(self, event: DataReceived | HoleReceived | StatusReceived | Finished) -> None:
        result = self.results[event.cookie]
        assert not result.done
        begin = self.asked[event.cookie].offset
        match event:
            case DataReceived(_, offset, data):
                result.data[offset - begin : offset - begin + len(data)] = data
                result.got += len(data)
            case HoleReceived(_, offset, length):
                result.data[offset - begin : offset - begin + length] = bytes(length)
                result.got += length
            case StatusReceived(_, extents):
                result.extents = extents
            case Finished(_, error, text):
                result.error, result.text, result.done = error, text, True
