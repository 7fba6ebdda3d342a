"""One disk as its clients see it: where requests meet policy, recording and disk.

`handle` does a whole batch inline: record *received*, do what the page cache can do at once, record
*completed*, prepare the replies. What may block comes back as jobs that `finish` does in a thread.

Guarantees: a request is in the recording before it touches the disk, and its completion before the
reply leaves. A flush makes durable what was completed before it was received, in whichever
connection. Flushes and FUA requests land in the order in which they were received, whatever becomes
of their connections: so nothing lands with a flush that is not completed yet, and an older write
never lands over a newer one. A cut lets a landing that is at work finish; after it no reply leaves
and nothing lands. If the recording cannot grow, no modification succeeds any more, and `failed` is
set.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.volatile import VolatileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.nbd.constants import TransmissionFlag
from nbdproxy.nbd.events import Refused
from nbdproxy.nbd.server import WRITABLE, ExportInfo
from nbdproxy.policy.model import CutEvent, Decision, Policy, decide
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import MODIFYING, Command, CommandFlag, NbdErrno, Request
from nbdproxy.server.jobs import Counters, Job, Landing
from nbdproxy.server.preserve import PreservingDisk
from nbdproxy.server.replies import Replies
from nbdproxy.server.syncer import Syncer

log = structlog.get_logger()

# Plain integers: operators of IntFlag are slow, and these are in the hot path.
_FUA = int(CommandFlag.FUA)
_NO_HOLE = int(CommandFlag.NO_HOLE)
_NBD_ERRNO = {
    errno.EPERM: NbdErrno.EPERM,
    errno.ENOMEM: NbdErrno.ENOMEM,
    errno.ENOSPC: NbdErrno.ENOSPC,
    errno.EDQUOT: NbdErrno.ENOSPC,
    errno.EFBIG: NbdErrno.ENOSPC,
}


@dataclass(slots=True)
class _Batch:
    """A batch while it is handled: what was answered inline, as (cookie, seq, error)."""

    connection: int
    answered: list[tuple[int, int, int]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


class Export:
    """A disk under a policy, recorded or not. Owns `disk`, and the recording until `close`."""

    def __init__(
        self,
        name: str,
        disk: BlockDevice,
        policy: Policy,
        *,
        description: str = "",
        read_only: bool = False,
        recorder: RecordingWriter | None = None,
        preserver: PreservingDisk | None = None,
    ) -> None:
        flags = WRITABLE
        if read_only:
            flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
            flags |= TransmissionFlag.SEND_FLUSH | TransmissionFlag.CAN_MULTI_CONN
        self.info = ExportInfo(name, disk.size, flags, description)
        self.policy = policy
        self.recorder = recorder
        self.before_flush: Callable[[], None] = lambda: None
        """Called before a batch with a flush in it is received: the last chance for a cut."""
        self.counters = Counters()
        self.fenced = False
        """The power is going, or gone: no reply leaves any more."""
        self.fence_reason = ""
        self.fence_event = trio.Event()
        self.failed = trio.Event()
        self.failure: RecordingError | None = None
        self.held_at_cut = 0
        """Bytes that the cut took back."""
        self._volatile = VolatileDisk(disk) if policy.holds else None
        self._disk: BlockDevice = self._volatile or disk
        self._preserver = preserver
        self._cut_noted = False
        self._syncer = Syncer(self._disk)
        self._landing = trio.Lock()
        self._landings: deque[Landing] = deque()
        # Those that were received and are not down yet, in the order received.
        self._seq = 0
        self._decisions: dict[tuple[int, int], Decision] = {
            (int(command), fua): decide(policy, command, fua)
            for command in (*MODIFYING, Command.READ, Command.FLUSH)
            for fua in (0, _FUA)
        }

    async def prepare(self, requests: Sequence[Request | Refused]) -> None:
        """Wait for what `handle` would block on: cold before-images, a slow recording.

        What fails here fails again in `handle`, and is answered there.
        """
        if self.recorder is None or self.fenced or self.failure is not None:
            return
        try:
            await self._prepare(self.recorder, requests)
        except RecordingError as full:
            self._fail(full)
        except OSError as error:
            log.warning("a before-image cannot be read", reason=str(error))

    async def _prepare(
        self, recorder: RecordingWriter, requests: Sequence[Request | Refused]
    ) -> None:
        payload = sum(len(r.payload) for r in requests if type(r) is Request)
        if not recorder.has_room(payload):
            await trio.to_thread.run_sync(recorder.wait_for_room, payload)
        if self._preserver is not None and self._volatile is None:
            cold = [
                (r.offset, r.length)
                for r in requests
                if type(r) is Request
                and r.command in MODIFYING
                and not self._preserver.save(r.offset, r.length, wait=False)
            ]
            if cold:
                await trio.to_thread.run_sync(self._preserver.save_all, cold)

    def handle(
        self, connection: int, requests: Sequence[Request | Refused], replies: Replies
    ) -> list[Job]:
        """Do a batch that was read off one connection together; return what has to wait."""
        accepted = [r for r in requests if type(r) is Request]
        changing = [r for r in accepted if r.command != Command.READ]
        if any(r.command == Command.FLUSH for r in changing):
            self.before_flush()
        if self.fenced:
            return []
        batch = _Batch(connection)
        try:
            seq = self._receive(connection, requests, changing)
        except RecordingError as error:
            self._fail(error)
        if self.failure is not None:
            for request in changing:
                replies.add(request.cookie, NbdErrno.ENOSPC)
            accepted = [r for r in accepted if r.command == Command.READ]
            seq = 0
        # A flush covers what was completed before it was received: nothing of its own batch.
        layer = self._freeze(changing)
        for request in accepted:
            if request.command == Command.READ:
                self._read(request, replies, batch)
            else:
                self._change(request, seq, layer, batch)
                seq += 1
        self._answer(connection, batch, replies)
        for refused in requests:
            if type(refused) is Refused:
                replies.add(refused.request.cookie, refused.error)
        return batch.jobs

    def _receive(
        self,
        connection: int,
        requests: Sequence[Request | Refused],
        changing: Sequence[Request],
    ) -> int:
        """Record the batch; return the seq of its first request that changes something."""
        if self.recorder is None or self.failure is not None:
            self._seq += len(changing)
            return self._seq - len(changing)
        if len(changing) < len(requests):
            for refused in requests:
                if type(refused) is Refused:
                    self.recorder.refused(connection, refused.request, refused.error)
        return self.recorder.received(connection, changing) if changing else 0

    def _freeze(self, changing: Sequence[Request]) -> int | None:
        if self._volatile is None or self.failure is not None:
            return None
        if not any(self._decide(r) is Decision.LAND for r in changing):
            return None
        return self._volatile.freeze()

    def _decide(self, request: Request) -> Decision:
        return self._decisions[request.command, request.flags & _FUA]

    def _read(self, request: Request, replies: Replies, batch: _Batch) -> None:
        self.counters.reads += 1
        place = replies.reserve_read(request.cookie, request.length)
        try:
            if self._disk.try_pread_into(request.offset, place):
                return
            batch.jobs.append(Job(request, -1))
        except (OSError, RecordingError) as error:
            batch.answered.append((request.cookie, -1, nbd_errno(error)))
        replies.take_back_read(request.length)

    def _change(self, request: Request, seq: int, layer: int | None, batch: _Batch) -> None:
        command = request.command
        decision = self._decide(request)
        try:
            if command == Command.WRITE:
                self.counters.writes += 1
                self.counters.written += request.length
                self._disk.pwrite(request.offset, request.payload)
            elif command == Command.WRITE_ZEROES:
                punch = not request.flags & _NO_HOLE
                self._disk.zero(request.offset, request.length, may_punch=punch)
            elif command == Command.TRIM:
                self._disk.trim(request.offset, request.length)
            else:
                self.counters.flushes += 1
        except OSError as error:
            batch.answered.append((request.cookie, seq, nbd_errno(error)))
            return
        except RecordingError as full:  # its before-image could not be saved
            self._fail(full)
            batch.answered.append((request.cookie, seq, NbdErrno.ENOSPC))
            return
        if decision is Decision.LAND:
            batch.jobs.append(self._job(request, Landing(batch.connection, seq, layer=layer)))
        elif decision is Decision.HOLD_AND_LAND:
            assert self._volatile is not None
            ticket = self._volatile.issue_ticket()
            batch.jobs.append(self._job(request, Landing(batch.connection, seq, ticket=ticket)))
        elif decision is Decision.PASS and (command == Command.FLUSH or request.flags & _FUA):
            batch.jobs.append(Job(_without_payload(request), seq))
        else:
            batch.answered.append((request.cookie, seq, 0))

    def _job(self, request: Request, landing: Landing) -> Job:
        self._landings.append(landing)
        return Job(_without_payload(request), landing.seq, landing)

    def _answer(self, connection: int, batch: _Batch, replies: Replies) -> None:
        """Record what was done inline as completed, and only then prepare its replies."""
        run_first, run_count, run_error = -1, 0, 0
        failed = False
        for _, seq, error in batch.answered:
            if seq < 0:
                continue
            if run_count and seq == run_first + run_count and error == run_error:
                run_count += 1
                continue
            failed |= not self._complete(connection, run_first, run_count, run_error)
            run_first, run_count, run_error = seq, 1, error
        failed |= not self._complete(connection, run_first, run_count, run_error)
        for cookie, seq, error in batch.answered:
            replies.add(cookie, NbdErrno.ENOSPC if failed and seq >= 0 else error)

    def _complete(self, connection: int, first: int, count: int, error: int) -> bool:
        if self.recorder is None or not count:
            return True
        try:
            self.recorder.completed(connection, first, count, error)
        except RecordingError as full:
            self._fail(full)
            return False
        return True

    async def finish(self, connection: int, job: Job) -> tuple[int, memoryview] | None:
        """Do a job; return its error and data, None if the power went in between."""
        if job.request.command == Command.READ:
            return await self._finish_read(job.request)
        if job.landing is not None:
            error = await self._land(job.landing)
            return None if error is None else (error, memoryview(b""))
        try:
            await self._syncer.sync()
            error = 0
        except OSError as failed:
            error = nbd_errno(failed)
        if self.fenced:
            return None
        if not self._complete(connection, job.seq, 1, error):
            error = NbdErrno.ENOSPC
        return error, memoryview(b"")

    async def _land(self, landing: Landing) -> int | None:
        """Land everything up to `landing`; return its error, None if the power went before.

        Whoever comes first lands what was received earlier, too, even if its client is gone.
        """
        async with self._landing:
            while landing.error is None:
                if self.fenced:
                    return None
                await self._land_next()
        return landing.error

    async def _land_next(self) -> None:
        """Write through the cache what the oldest flush or FUA request covers.

        Its completion is recorded before the next landing, or a cut, may begin.
        """
        assert self._volatile is not None
        landing = self._landings[0]
        error = 0
        try:
            if landing.ticket is not None:
                await trio.to_thread.run_sync(self._volatile.copy_ticket_down, landing.ticket)
                self._volatile.ticket_landed(landing.ticket)
            elif landing.layer is not None:
                await trio.to_thread.run_sync(self._volatile.copy_down, landing.layer)
                self._volatile.landed(landing.layer)
        except OSError as failed:
            error = nbd_errno(failed)
        except RecordingError as full:
            self._fail(full)
            error = NbdErrno.ENOSPC
        if self.failure is not None or not self._complete(
            landing.connection, landing.seq, 1, error
        ):
            error = NbdErrno.ENOSPC
        landing.error = error
        self._landings.popleft()

    async def _finish_read(self, request: Request) -> tuple[int, memoryview]:
        data = memoryview(bytearray(request.length))
        try:
            await trio.to_thread.run_sync(self._disk.pread_into, request.offset, data)
        except (OSError, RecordingError) as error:
            log.error("a read failed", offset=request.offset, reason=str(error))
            return nbd_errno(error), memoryview(b"")
        return 0, data

    async def cut(self) -> None:
        """Finish the cut that `fence` began: return when no landing is at work any more."""
        assert self.fenced
        async with self._landing:
            if not self._cut_noted:
                self._cut_noted = True
                if self._volatile is not None:
                    self.held_at_cut = self._volatile.held_bytes
                self.note(NoteKind.CUT, self.fence_reason)

    def fence(self, reason: str) -> None:
        """Begin a cut: from now on no request is taken and no reply leaves."""
        if not self.fenced:
            self.fenced = True
            self.fence_reason = reason
            self.fence_event.set()

    def cuts_at(self, event: CutEvent) -> bool:
        """Tell whether the policy cuts at this event."""
        return event in self.policy.cut_at

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> None:
        """Put an event that is not a request into the recording, if there is one."""
        if self.recorder is not None and self.failure is None:
            try:
                self.recorder.note(kind, text, connection=connection)
            except RecordingError as error:
                self._fail(error)

    def _fail(self, error: RecordingError) -> None:
        if self.failure is None:
            log.error("the recording stops, so the export stops", reason=str(error))
            self.failure = error
            self.failed.set()

    def sync(self) -> None:
        """Make everything durable, held or not: an orderly end; blocks."""
        self._disk.sync()

    def close(self) -> None:
        """Close the disk, dropping what is held."""
        self._disk.close()


def nbd_errno(error: Exception) -> int:
    """Return how a disk's error is told to the client (proto.md, "Error values").

    A damaged recording, which is what a crash state's disk reads from, is EIO.
    """
    number = error.errno if isinstance(error, OSError) else None
    return _NBD_ERRNO.get(number or 0, NbdErrno.EIO)


def _without_payload(request: Request) -> Request:
    """A job outlives its batch, the payload does not."""
    return request._replace(payload=memoryview(b""))
