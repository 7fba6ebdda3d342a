"""One client: bytes from its socket to the export in batches, and replies back.

One wake-up reads what has arrived, parses every whole request in it, lets the export do what it
can at once, and sends all replies with one call. The raw socket is tried before the event loop is
asked to wait. Requests that have to wait for the disk run beside, at most `MAX_JOBS` of them; then
nothing more is read. A client that does not read its replies is not read from either.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

import structlog
import trio

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd.codec import greeting, simple_reply
from nbdproxy.nbd.events import Closed, Opened, Refused, Send
from nbdproxy.nbd.server import Phase, ServerConnection
from nbdproxy.policy.model import CutEvent
from nbdproxy.recording.notes import NoteKind
from nbdproxy.requests import Request
from nbdproxy.server.export import Export
from nbdproxy.server.jobs import Job
from nbdproxy.server.replies import Replies

log = structlog.get_logger()

BUFFER = 1024 * 1024
"""Bytes of the receive buffer; it grows for a single larger request and shrinks again."""

MAX_JOBS = 64
MAX_COLD_READS = 8
"""Cold reads at once; each holds a buffer of up to 32 MiB."""

NEGOTIATION_S = 10
"""Seconds a client has to open an export; an idle one must not hold a place (CVE-2019-14850)."""

_BATCHES_IN_A_ROW = 16
"""Batches after which other clients get a turn though more has arrived."""


class _PowerLost(Exception):  # noqa: N818 - not an error: it only unwinds the session
    """The export was cut while this session was at work."""


class Session:
    """One connection, from greeting to good-bye. Owns `sock`, a non-blocking stream socket."""

    def __init__(
        self, sock: socket.socket, number: int, client: str, exports: Mapping[str, Export]
    ) -> None:
        self._sock = sock
        self._number = number
        self._client = client
        self._exports = exports
        self._export: Export | None = None
        infos = {name: export.info for name, export in exports.items()}
        self._connection = ServerConnection(infos)
        self._replies = Replies()
        self._sending = trio.Lock()
        self._slots = trio.Semaphore(MAX_JOBS)
        self._cold_reads = trio.Semaphore(MAX_COLD_READS)
        self._stopping = False
        self._negotiating = trio.CancelScope()
        self._parked: trio.CancelScope | None = None
        self._all = trio.CancelScope()
        self._goodbye = NoteKind.EOF

    def stop_reading(self) -> None:
        """Take no more requests; what is in flight is finished and answered."""
        self._stopping = True
        if self._export is None:
            self._negotiating.cancel()
        if self._parked is not None:
            self._parked.cancel()

    def cut_off(self) -> None:
        """Drop the connection at once: the power is gone."""
        self._all.cancel()

    async def run(self) -> None:
        """Serve the client until it leaves, breaks the protocol, or the power goes."""
        try:
            with self._all:
                async with trio.open_nursery() as jobs:
                    self._negotiating.deadline = trio.current_time() + NEGOTIATION_S
                    with self._negotiating:
                        await self._pump(jobs)
        except* _PowerLost:
            pass
        except* ProtocolError as broken:
            for error in broken.exceptions:
                log.warning("client broke the protocol", client=self._client, reason=str(error))
        except* OSError as gone:
            log.debug("client is gone", client=self._client, reason=str(gone.exceptions[0]))
        finally:
            self._sock.close()
            self._leave()

    def _leave(self) -> None:
        export = self._export
        if export is None or export.fenced:
            return
        export.note(self._goodbye, connection=self._number)
        if export.cuts_at(CutEvent.DISCONNECT):
            said = self._goodbye is NoteKind.DISC
            export.fence("the client said DISC" if said else "the client went away")

    async def _pump(self, jobs: trio.Nursery) -> None:
        await self._send([memoryview(greeting())])
        connection = self._connection
        buffer = memoryview(bytearray(BUFFER))
        end = 0
        in_a_row = 0
        while True:
            count = await self._receive(buffer[end:])
            if not count:
                return
            end += count
            used, events = connection.receive(buffer[:end])
            if events:
                await self._act(events, jobs)
            if connection.breach is not None:
                raise connection.breach
            if connection.phase is Phase.CLOSED:
                return
            rest = end - used
            if connection.needed > len(buffer) or (len(buffer) > BUFFER and rest < BUFFER):
                roomier = memoryview(bytearray(max(BUFFER, connection.needed)))
                roomier[:rest] = buffer[used:end]
                buffer = roomier
            elif rest and used:
                buffer[:rest] = buffer[used:end]
            end = rest
            in_a_row += 1
            if in_a_row >= _BATCHES_IN_A_ROW:
                in_a_row = 0
                await trio.lowlevel.checkpoint()

    async def _act(
        self, events: list[Request | Refused | Send | Opened | Closed], jobs: trio.Nursery
    ) -> None:
        """Do what one receive meant: negotiation first, then all requests as one batch."""
        requests: list[Request | Refused] = []
        for event in events:
            if type(event) is Request or type(event) is Refused:
                requests.append(event)
            elif type(event) is Send:
                await self._send([memoryview(event.data)])
            elif type(event) is Opened:
                self._open(event.export)
            elif self._export is not None:
                self._goodbye = NoteKind.DISC
        if requests:
            await self._batch(requests, jobs)

    def _open(self, name: str) -> None:
        self._export = self._exports[name]
        self._negotiating.deadline = float("inf")
        self._export.note(NoteKind.CONNECT, self._client, connection=self._number)

    async def _batch(self, requests: list[Request | Refused], jobs: trio.Nursery) -> None:
        export = self._export
        assert export is not None
        if export.recorder is not None:
            await export.prepare(requests)
        waiting = export.handle(self._number, requests, self._replies)
        parts = self._replies.take()
        if parts:
            await self._send(parts)
        elif export.fenced:
            raise _PowerLost
        for job in waiting:
            await self._slots.acquire()
            jobs.start_soon(self._finish, export, job)

    async def _finish(self, export: Export, job: Job) -> None:
        try:
            if job.seq < 0:
                async with self._cold_reads:
                    await self._finish_one(export, job)
            else:
                await self._finish_one(export, job)
        finally:
            self._slots.release()

    async def _finish_one(self, export: Export, job: Job) -> None:
        result = await export.finish(self._number, job)
        if result is not None:
            error, data = result
            header = memoryview(simple_reply(error, job.request.cookie))
            await self._send([header, data] if data else [header])

    async def _receive(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 if the client is gone, or nothing more shall be read."""
        while not self._stopping:
            try:
                return self._sock.recv_into(buffer)
            except BlockingIOError:
                with trio.CancelScope() as self._parked:
                    await trio.lowlevel.wait_readable(self._sock)
                self._parked = None
        return 0

    async def _send(self, parts: list[memoryview]) -> None:
        """Send all of `parts`, whole replies only, unless the power goes."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            for part in parts:
                while part:
                    if self._export is not None and self._export.fenced:
                        raise _PowerLost
                    try:
                        part = part[self._sock.send(part) :]  # noqa: PLW2901
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._sock)
        finally:
            self._sending.release()
