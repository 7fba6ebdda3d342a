"""One client's connection: requests to the export in batches, and replies back.

One wake-up reads what has arrived, parses every whole request in it, lets the export do what it
can at once, and sends all replies with one call. Requests that have to wait run beside, as many as
`MAX_JOBS` and `MAX_JOB_BYTES` allow; then nothing more is read. A client that does not read its
replies is not read from either, so what one client can make us hold is bounded whatever it sends.
"""

from __future__ import annotations

import socket
from contextlib import suppress

import structlog
import trio

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd.codec import greeting
from nbdproxy.nbd.events import Opened, Refused, Send, ServerEvent, StartTls
from nbdproxy.nbd.replies import Replies
from nbdproxy.nbd.server import Phase, ServerConnection
from nbdproxy.recording.notes import NoteKind
from nbdproxy.requests import NbdErrno, Request
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.jobs import Job, LinkDroppedError
from nbdproxy.server.export.spoiling import spoiled
from nbdproxy.server.front.export_provider import ExportProvider
from nbdproxy.server.shared.budget import Budget
from nbdproxy.server.shared.complaints import complaints
from nbdproxy.server.shared.power import Power, PowerLostError
from nbdproxy.server.shared.tls import ServerTls
from nbdproxy.server.shared.wire import SocketWire, TlsWire, Wire

log = structlog.get_logger()

BUFFER = 1024 * 1024
"""Bytes of the receive buffer; it grows for a single larger request and shrinks again."""

NEGOTIATION_BUFFER = 4096
"""Bytes of it before an export is opened: idle clients must not cost memory."""

MAX_OWED = 8 * 1024 * 1024
"""Bytes of READs handled in one batch, give or take the last one."""

MAX_BATCH = 256
"""Requests handled in one batch."""

MAX_JOBS = 64
MAX_CHANGES = 2 * MAX_BATCH
MAX_JOB_BYTES = 32 * 1024 * 1024
"""Bytes that jobs of one client, and its changes, may hold at once: one of the largest requests."""

NEGOTIATION_S = 10
"""Seconds a client has to open an export; an idle one must not hold a place (CVE-2019-14850)."""

_LAST_S = 1.0
"""Seconds at the end in which requests that are on their way still get an answer."""

_GOODBYE_S = 1
"""Seconds that a peer has to take the end of a TLS connection."""

_BATCHES_IN_A_ROW = 16
"""Batches after which other clients get a turn though more has arrived."""


class Session:
    """One connection, from greeting to good-bye. Owns `sock`, a non-blocking stream socket."""

    def __init__(
        self,
        sock: socket.socket,
        number: int,
        client: str,
        exports: ExportProvider,
        *,
        power: Power,
        tls: ServerTls | None = None,
    ) -> None:
        self._socket_wire = SocketWire(sock, power)
        self._wire: Wire = self._socket_wire
        self._number = number
        self._client = client
        self._exports = exports
        self._power = power
        self._tls = tls or ServerTls()
        self._export: Export | None = None
        self._connection = ServerConnection(exports.infos, tls=self._tls.mode)
        self._replies = Replies(arena=0)
        self._sending = trio.Lock()
        self._jobs = Budget(MAX_JOBS)
        self._job_bytes = Budget(MAX_JOB_BYTES)
        self._changes = Budget(MAX_CHANGES)
        self._change_bytes = Budget(MAX_JOB_BYTES)
        self._stopping = False
        self._last = float("inf")  # when nothing more is read
        self._partial = False  # a part of a request has been read
        self._negotiating = trio.CancelScope()
        self._parked: trio.CancelScope | None = None
        self._all = trio.CancelScope()
        self._goodbye = NoteKind.EOF
        self._in_a_row = 0
        self._dropped = False

    @property
    def negotiating(self) -> bool:
        """Whether the client has not opened an export yet."""
        return self._export is None

    def stop_reading(self) -> None:
        """Take no more requests; what is in flight is finished and answered."""
        if not self._stopping:
            self._last = trio.current_time() + _LAST_S
        self._stopping = True
        if self._export is None:
            self._negotiating.cancel()
        if self._parked is not None:
            self._parked.cancel()

    def cut_off(self) -> None:
        """Drop the connection at once: the power is gone, or its place is needed."""
        self._all.cancel()

    async def run(self) -> None:
        """Serve the client until it leaves, breaks the protocol, or the power goes."""
        try:
            with self._all:
                async with trio.open_nursery() as jobs:
                    self._negotiating.deadline = trio.current_time() + NEGOTIATION_S
                    with self._negotiating:
                        await self._pump(jobs)
        except* PowerLostError:
            pass
        except* ProtocolError as broken:
            for error in broken.exceptions:
                complaints.warn("client broke the protocol", str(error), client=self._client)
        except* OSError as gone:
            log.debug("client is gone", client=self._client, reason=str(gone.exceptions[0]))
        finally:
            with trio.move_on_after(_GOODBYE_S, shield=True), suppress(OSError):
                await self._wire.close()
            self._socket_wire.sock.close()
            self._leave()

    def _leave(self) -> None:
        export = self._export
        if export is None:
            return
        if not self._power.off:
            export.note(self._goodbye, connection=self._number)
            if not self._stopping and not self._dropped:
                export.client_left(said=self._goodbye is NoteKind.DISC)
        self._exports.put_back(export)

    async def _pump(self, jobs: trio.Nursery) -> None:
        await self._send([memoryview(greeting())])
        buffer = memoryview(bytearray(NEGOTIATION_BUFFER))
        end = 0
        while count := await self._receive(buffer[end:]):
            end += count
            used = await self._digest(buffer[:end], jobs)
            if used is None:
                return
            buffer, end = self._make_room(buffer, used, end)
            self._partial = end > 0

    async def _digest(self, data: memoryview, jobs: trio.Nursery) -> int | None:
        """Do all that `data` means; return how much of it was used, None at the end."""
        connection = self._connection
        at = 0
        while True:
            used, events = connection.receive(data[at:], owed=MAX_OWED)
            at += used
            if events:
                await self._act(events, used, jobs)
            if connection.breach is not None:
                raise connection.breach
            if connection.phase is Phase.CLOSED:
                return None
            self._in_a_row += 1
            if self._in_a_row >= _BATCHES_IN_A_ROW:
                self._in_a_row = 0
                await trio.lowlevel.checkpoint()
            if not used or len(data) - at < connection.needed:
                return at

    def _make_room(self, buffer: memoryview, used: int, end: int) -> tuple[memoryview, int]:
        """Move what is left over to the front of a buffer of the right size."""
        rest = end - used
        usual = NEGOTIATION_BUFFER if self._export is None else BUFFER
        wanted = max(usual, self._connection.needed)
        if len(buffer) != wanted and rest < wanted:
            roomier = memoryview(bytearray(wanted))
            roomier[:rest] = buffer[used:end]
            return roomier, rest
        if rest and used:
            buffer[:rest] = buffer[used:end]
        return buffer, rest

    async def _act(self, events: list[ServerEvent], size: int, jobs: trio.Nursery) -> None:
        """Do what `size` bytes meant: negotiation first, then the requests in batches."""
        requests: list[Request | Refused] = []
        for event in events:
            if type(event) is Request or type(event) is Refused:
                requests.append(event)
            elif type(event) is Send:
                await self._send([memoryview(event.data)])
            elif type(event) is Opened:
                self._open(event.export)
            elif type(event) is StartTls:
                # With a breach, more came behind it: no handshake then (CVE-2021-3716).
                if self._connection.breach is None:
                    await self._start_tls()
            elif self._export is not None:
                self._goodbye = NoteKind.DISC
        for at in range(0, len(requests), MAX_BATCH):
            await self._batch(requests[at : at + MAX_BATCH], size, jobs)

    async def _start_tls(self) -> None:
        assert self._tls.context is not None
        try:
            self._wire = await TlsWire.start(
                self._socket_wire, self._tls.context, self._power, server_side=True
            )
        except OSError as error:
            complaints.warn("a client is turned away", str(error), client=self._client)
            raise
        self._connection.tls_started()

    def _open(self, name: str) -> None:
        assert self._connection.terms is not None
        self._replies = Replies(self._connection.terms.style)
        self._export = self._exports.take(name)
        self._negotiating.deadline = float("inf")
        self._export.note(NoteKind.CONNECT, self._client, connection=self._number)

    async def _batch(
        self, requests: list[Request | Refused], size: int, jobs: trio.Nursery
    ) -> None:
        """Do a batch. A change that has to wait is begun before anything is sent.

        Others may wait for the place it claims, and must not wait for this client to read. So
        there is room for all the batch's changes, whose payloads have at most `size` bytes,
        before they are handled.
        """
        export = self._export
        assert export is not None
        if export.paused:
            await export.passed()
        if self._stopping and export.failure is None:
            requests = [_refused(one) for one in requests]
        if export.request_log.records:
            await export.prepare(requests)
        if not self._changes.take(len(requests)):
            await self._changes.acquire(len(requests))
        if not self._change_bytes.take(size):
            await self._change_bytes.acquire(size)
        while export.paused:  # since it was looked at
            await export.passed()
        late = export.handle(self._number, requests, self._replies)
        changes = [job for job in late if job.claim is not None]
        for job in changes:
            jobs.start_soon(self._finish, export, job, self._changes, self._change_bytes)
        self._changes.release(len(requests) - len(changes))
        self._change_bytes.release(size - sum(job.cost for job in changes))
        await self._send_batch()
        for job in late:
            if job.claim is None:
                await self._jobs.acquire(1)
                await self._job_bytes.acquire(job.cost)
                jobs.start_soon(self._finish, export, job, self._jobs, self._job_bytes)

    async def _send_batch(self) -> None:
        parts = self._replies.take()
        if parts:
            await self._send(parts)
        elif self._power.off:
            raise PowerLostError

    async def _finish(self, export: Export, job: Job, count: Budget, size: Budget) -> None:
        assert self._connection.terms is not None
        replies = Replies(self._connection.terms.style, arena=0)
        try:
            if await export.finish(self._number, job, replies):
                parts, drops = spoiled(job.decision, replies.take())
                await self._send(parts, last=drops)
        except LinkDroppedError:
            self._drop_link()
        finally:
            count.release(1)
            size.release(job.cost)

    def _drop_link(self) -> None:
        """End the connection without a good-bye, as a broken link would."""
        self._dropped = True
        self._all.cancel()

    async def _receive(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 if the client is gone, or nothing more shall be read.

        When we stop, what has arrived by then is still read, to be refused: what is left unread
        would take the answers with it. Requests that have begun to arrive are waited for, and where
        the export failed, those that a client sends before it knows.
        """
        while not self._stopping or trio.current_time() < self._last:
            count = self._wire.receive_now(buffer)
            if count is not None:
                return count
            if self._stopping and not self._partial and not self._has_failed:
                return 0
            with trio.CancelScope(deadline=self._last) as self._parked:
                return await self._wire.receive(buffer)
            self._parked = None
        return 0

    @property
    def _has_failed(self) -> bool:
        return self._export is not None and self._export.failure is not None

    async def _send(self, parts: list[memoryview], *, last: bool = False) -> None:
        """Send all of `parts`, unless the power goes; whole replies only, but for the last."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if not self._dropped:
                self._dropped = last
                await self._wire.send(parts)
        finally:
            self._sending.release()
        if last:
            self._drop_link()


def _refused(one: Request | Refused) -> Refused:
    """Refuse a request that came when we were stopping."""
    if isinstance(one, Refused):
        return one
    return Refused(one, NbdErrno.ESHUTDOWN, "the server is shutting down")
