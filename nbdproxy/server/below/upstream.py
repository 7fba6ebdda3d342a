"""The disk of another NBD server: we are its client, and pass requests on.

One connection, with as many requests in flight as our own clients have. Flags go down as they came
and errors come up as they were told. The server below is not trusted: the protocol core checks all
it says, and the first thing that is wrong ends the connection. Then every request fails with EIO,
and `on_lost` is told; there is no reconnecting, because what the server had not made durable would
be gone unnoticed.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog
import trio

from nbdproxy.errors import ImageError, ProtocolError, UnsafeFolderError
from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.constants import MAX_EXPORT_SIZE, ReplyStyle, TransmissionFlag
from nbdproxy.nbd.events import (
    ClientEvent,
    DataReceived,
    Finished,
    HoleReceived,
    Send,
    StartTls,
    StatusReceived,
)
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.nbd.uri import NbdUri
from nbdproxy.peers import TrustedPeers, user_number
from nbdproxy.requests import Command, CommandFlag, NbdErrno, Request, error_name
from nbdproxy.server.below.failures import LOST, RequestFailure, ToldError
from nbdproxy.server.shared.budget import Budget
from nbdproxy.server.shared.power import Power
from nbdproxy.server.shared.tls import client_context
from nbdproxy.server.shared.wire import SocketWire, TlsWire, Wire

log = structlog.get_logger()

CONNECT_S = 10
"""Seconds a server has to let us in."""

_BUFFER = 1024 * 1024
_GOODBYE_S = 1
_MOST_IN_FLIGHT = 128 * 1024 * 1024
"""Bytes of data in requests that the server has not answered."""

_LONGEST = 1 << 30
"""The longest request without a payload that a server with 32-bit lengths is sent; aligned."""

_NOTHING = memoryview(bytearray())

_HUNG_UP = (BrokenPipeError, ConnectionResetError)
"""How it shows that the server closed the connection, if we were sending or it had not read all."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A request that is not answered yet, and where its answer goes."""

    offset: int
    buffer: memoryview
    on_done: Callable[[], None]
    extents: list[tuple[int, int]] = field(default_factory=list)
    failure: RequestFailure | None = None
    done: trio.Event = field(default_factory=trio.Event)

    def finish(self, failure: RequestFailure | None) -> None:
        """Wake whoever waits."""
        self.failure = failure
        self.on_done()
        self.done.set()


class Upstream:
    """A connection to another server. What it is asked and cannot do raises `ToldError`."""

    def __init__(self, uri: NbdUri, wire: SocketWire, connection: ClientConnection) -> None:
        self._uri = uri
        self._wire: Wire = wire
        self._socket_wire = wire
        self._connection = connection
        self._pending: dict[int, _Pending] = {}
        # What is to be sent, in order: a client that goes never leaves half a request behind.
        self._outbox: list[memoryview] = []
        self._posted = trio.Event()
        # Given back by answers, not by those who asked, who may have gone.
        self._room = Budget(_MOST_IN_FLIGHT)
        self._ready = False
        self.lost: str | None = None
        """Why the server is gone, if it is."""
        self.on_lost: Callable[[str], None] = lambda _: None

    @property
    def info(self) -> ExportInfo:
        """What the server told of the export."""
        assert self._connection.export is not None
        return self._connection.export

    async def negotiate(self) -> None:
        """Agree on an export; raises ProtocolError or OSError."""
        try:
            await self._negotiate()
        except _HUNG_UP:
            if self._uri.tls:
                raise  # what TLS has to do with it is said with the error
            raise self._closed() from None

    async def _negotiate(self) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        end = 0
        while not self._ready:
            count = await self._wire.receive(buffer[end:])
            if not count:
                raise self._closed()
            end += count
            used, events = self._connection.receive(buffer[:end])
            for event in events:
                await self._take_option(event)
            if self._connection.breach is not None:
                raise self._connection.breach
            if self._ready and used < end:
                raise ProtocolError("it sent more than was asked for")
            buffer[: end - used] = buffer[used:end]
            end -= used

    async def _take_option(self, event: ClientEvent) -> None:
        if isinstance(event, Send):
            await self._wire.send([memoryview(event.data)])
        elif isinstance(event, StartTls):
            if self._connection.breach is not None:
                return  # plaintext came behind it: no handshake then (CVE-2021-3716)
            folder = Path(self._uri.certificates) if self._uri.certificates else None
            context = client_context(folder, verify_peer=self._uri.verify_peer)
            name = self._uri.tls_hostname or self._uri.host
            self._wire = await TlsWire.start(
                self._socket_wire, context, Power(), server_hostname=name
            )
            for following in self._connection.tls_started():
                await self._take_option(following)
        else:
            self._ready = True

    async def take_replies(self) -> None:
        """Take replies until cancelled or the server is gone."""
        try:
            await self._take_replies()
        except _HUNG_UP:
            self.lose(str(self._closed()))
        except (OSError, ProtocolError) as error:
            self.lose(str(error))

    async def send_requests(self) -> None:
        """Send what is posted until cancelled or the server is gone."""
        try:
            while True:
                await self._posted.wait()
                self._posted = trio.Event()
                parts, self._outbox = self._outbox, []
                await self._wire.send(parts)
        except _HUNG_UP:
            self.lose(str(self._closed()))
        except OSError as error:
            self.lose(str(error))

    async def _take_replies(self) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        end = 0
        while True:
            count = await self._wire.receive(buffer[end:])
            if not count:
                raise self._closed()
            end += count
            used, events = self._connection.receive(buffer[:end])
            for event in events:
                if self.lost is not None:
                    return  # nobody waits for these answers any more
                self._take(event)
            if self._connection.breach is not None:
                raise self._connection.breach
            rest = end - used
            wanted = max(_BUFFER, self._connection.needed)
            if len(buffer) != wanted and rest < wanted:
                roomier = memoryview(bytearray(wanted))
                roomier[:rest] = buffer[used:end]
                buffer = roomier
            elif rest and used:
                buffer[:rest] = buffer[used:end]
            end = rest

    def _closed(self) -> ProtocolError:
        """Return what it means that the stream has ended here."""
        self._connection.server_closed()
        assert self._connection.breach is not None, "we had not said good-bye"
        return self._connection.breach

    def _take(self, event: ClientEvent) -> None:
        match event:
            case DataReceived(cookie, offset, data):
                one = self._pending[cookie]
                at = offset - one.offset
                one.buffer[at : at + len(data)] = data
            case HoleReceived(cookie, offset, length):
                one = self._pending[cookie]
                at = offset - one.offset
                one.buffer[at : at + length] = bytes(length)
            case StatusReceived(cookie, extents):
                self._pending[cookie].extents = extents
            case Finished(cookie, error, text):
                failure = RequestFailure(error, text or _error_text(error)) if error else None
                self._pending.pop(cookie).finish(failure)
                if error == NbdErrno.ESHUTDOWN:
                    raise ConnectionError("it is shutting down")

    def lose(self, reason: str) -> None:
        """Give the server up: what it has not answered fails with `LOST`, and all that comes."""
        if self.lost is None:
            self.lost = reason
            while self._pending:
                self._pending.popitem()[1].finish(LOST)
            self.on_lost(reason)

    async def _ask(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        payload: memoryview = _NOTHING,
        buffer: memoryview = _NOTHING,
        on_done: Callable[[], None] = lambda: None,
    ) -> _Pending:
        """Send a request and wait for its answer; raises ToldError."""
        if self.lost is not None:
            on_done()
            raise ToldError(LOST)
        size = len(payload) + len(buffer)
        if not self._room.take(size):
            await self._room.acquire(size)
            if self.lost is not None:
                self._room.release(size)
                on_done()
                raise ToldError(LOST)
        cookie, header = self._connection.request(command, offset, length, flags)
        one = self._pending[cookie] = _Pending(
            offset, buffer, partial(self._answered, size, on_done)
        )
        self._outbox += [memoryview(header), payload] if payload else [memoryview(header)]
        self._posted.set()
        try:
            await one.done.wait()
        except trio.Cancelled:
            if one.buffer:  # nobody's any more, but the answer is still to come
                one.buffer = memoryview(bytearray(len(one.buffer)))
            raise
        if one.failure is not None:
            raise ToldError(one.failure)
        return one

    def _answered(self, size: int, on_done: Callable[[], None]) -> None:
        self._room.release(size)
        on_done()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        await self._ask(Command.READ, offset, len(buffer), buffer=buffer)

    async def change(self, request: Request, release: Callable[[], None]) -> None:
        """Pass a change on; a long one goes in pieces where lengths have 32 bits.

        `release` is called when it is over there; that may be after the caller was cancelled.
        """
        at_work = ended = False

        def answered() -> None:
            """Note that the piece at work is over, whoever still waits for it."""
            nonlocal at_work
            at_work = False
            if ended:
                release()

        try:
            pieces = self._pieces(request.offset, request.length)
            if len(pieces) > 1 and request.flags & CommandFlag.FAST_ZERO:
                words = "so long a range takes several requests"
                raise ToldError(RequestFailure(NbdErrno.ENOTSUP, words))
            for offset, length in pieces:
                at_work = True
                await self._ask(
                    request.command,
                    offset,
                    length,
                    flags=request.flags,
                    payload=request.payload,
                    on_done=answered,
                )
        finally:
            # Whoever is cancelled leaves a piece at work: its answer releases then.
            ended = True
            if not at_work:
                release()

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        if self._connection.style is ReplyStyle.EXTENDED:
            return [(offset, length)]
        end = offset + length
        return [(at, min(_LONGEST, end - at)) for at in range(offset, end, _LONGEST)]

    async def flush(self) -> None:
        """Pass a FLUSH on; a server without one has nothing to make durable, or cannot."""
        if self.info.flags & TransmissionFlag.SEND_FLUSH:
            await self._ask(Command.FLUSH, 0, 0)

    async def will_need(self, offset: int, length: int) -> None:
        """Pass a CACHE on."""
        for at, count in self._pieces(offset, length):
            await self._ask(Command.CACHE, at, count)

    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Pass a BLOCK_STATUS on; all is data where the server cannot tell."""
        offset, length = self._pieces(request.offset, request.length)[0]
        if not self._connection.contexts:
            return [(length, 0)]
        one = await self._ask(Command.BLOCK_STATUS, offset, length, flags=request.flags)
        return one.extents

    async def close(self) -> None:
        """Say good-bye, if anybody is there."""
        with trio.move_on_after(_GOODBYE_S, shield=True), suppress(OSError):
            # Behind half a request a good-bye would be taken for its payload.
            whole = self.lost is None and not self._pending
            if whole and self._connection.phase is not ClientPhase.CLOSED:
                await self._wire.send([memoryview(self._connection.disconnect())])
            await self._wire.close()
        self._socket_wire.sock.close()


@asynccontextmanager
async def connected(uri: NbdUri, text: str) -> AsyncIterator[Upstream]:
    """Connect to a server for as long as the block runs; `text` is what the user calls it.

    Raises ImageError if it cannot be reached, or has nothing that can be served.
    """
    upstream = None
    try:
        with trio.fail_after(CONNECT_S):
            sock = await _connect(uri)
            connection = ClientConnection(uri.export, tls=uri.tls)
            upstream = Upstream(uri, SocketWire(sock, Power()), connection)
            await upstream.negotiate()
        _check(upstream.info)
    except (OSError, ProtocolError, ValueError, UnsafeFolderError, trio.TooSlowError) as error:
        if upstream is not None:
            await upstream.close()
        slow = isinstance(error, trio.TooSlowError)
        reason = (
            f"it did not let us in within {CONNECT_S} s; see whether it hangs"
            if slow
            else _words(error, uri)
        )
        raise ImageError(f"the NBD server {text} cannot be used: {reason}") from None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upstream.take_replies)
            nursery.start_soon(upstream.send_requests)
            yield upstream
            nursery.cancel_scope.cancel()
    finally:
        await upstream.close()


def _believed(uri: NbdUri) -> TrustedPeers:
    """Return which users' servers are trusted on a Unix socket without a certificate."""
    user = None if uri.peer_user is None else user_number(uri.peer_user)
    advice = (
        "use a socket in a folder of your own, or write peer-user=USER into the URI if that user's "
        "server is meant"
    )
    return TrustedPeers(user, advice)


async def _connect(uri: NbdUri) -> socket.socket:
    if uri.socket is not None:
        path = None if uri.socket.startswith("\0") else Path(uri.socket)
        believed = None if uri.tls and uri.verify_peer else _believed(uri)
        if believed is not None and path is not None:
            believed.check_path(path)
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await sock.connect(uri.socket)
            if believed is not None:
                believed.check_listener(sock, uri.socket)
        except BaseException:
            sock.close()
            raise
    else:
        stream = await trio.open_tcp_stream(uri.host, uri.port)
        sock = stream.socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain


def _check(info: ExportInfo) -> None:
    if not 0 < info.size <= MAX_EXPORT_SIZE or info.size % info.min_block:
        raise ProtocolError(
            f"its export has {info.size} bytes, and must have a multiple of {info.min_block}, "
            "which is not 0"
        )


def _error_text(error: int) -> str:
    return f"the NBD server below says {error_name(error)}"


def _words(error: Exception, uri: NbdUri) -> str:
    causes = [error, error.__cause__]
    if isinstance(error.__cause__, BaseExceptionGroup):  # one for each address that was tried
        causes += error.__cause__.exceptions
    if any(isinstance(one, ConnectionRefusedError | FileNotFoundError) for one in causes):
        return "nobody listens there; start it first, and check the address"
    if uri.tls and isinstance(error, ConnectionError):
        return f"{error}; its authority, and your own certificate, are in tls-certificates=DIR"
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error)
