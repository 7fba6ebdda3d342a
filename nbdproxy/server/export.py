"""One disk as its clients see it: where requests meet policy, recording and disk.

`handle` does a whole batch inline: record *received*, do what the page cache can do at once, record
*completed*, prepare the replies. What may block comes back as jobs that `Waiting` does beside the
event loop (`server/waiting.py`).

Guarantees: a request is in the recording before it touches the disk, and its completion before the
reply leaves. A flush makes durable what was completed before it was received, in whichever
connection. Changes of the same place are done in the order received. After a cut no reply leaves
and nothing lands. If the recording cannot grow, no modification succeeds any more, and `failed` is
set.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.volatile import VolatileDisk
from nbdproxy.errors import NbdproxyError, RecordingError
from nbdproxy.nbd.events import Refused
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.model import CutEvent, Decision, Policy, decide
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import MODIFYING, Command, CommandFlag, Request
from nbdproxy.server.jobs import (
    LOST,
    NOT_RECORDED,
    NOT_SAVED,
    Claims,
    Counters,
    Failure,
    Job,
    failure_of,
)
from nbdproxy.server.landings import Landings
from nbdproxy.server.offer import offer
from nbdproxy.server.power import Power
from nbdproxy.server.preserve import PreservingDisk
from nbdproxy.server.remote import Remote
from nbdproxy.server.waiting import Waiting, apply

log = structlog.get_logger()

# Plain integers: operators of IntFlag are slow, and these are in the hot path.
_FUA = int(CommandFlag.FUA)
_FAST_ZERO = int(CommandFlag.FAST_ZERO)
_READ, _WRITE, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.FLUSH)
_RECORDED = frozenset(int(command) for command in (*MODIFYING, Command.FLUSH))


@dataclass(slots=True)
class _Batch:
    """A batch while it is handled: what was answered inline, with seq and what went wrong.

    `layer` is the newest one of the volatile cache that a flush of the batch covers.
    """

    connection: int
    layer: int | None = None
    answered: list[tuple[Request, int, Failure | None]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


class Export:
    """A disk under a policy, recorded or not. Owns `disk`, and the recording until `close`.

    `offered` is what the disk below can do, if that is less than everything; `remote` is set where
    changes are passed on to another server.
    """

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
        power: Power | None = None,
        offered: ExportInfo | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.info = offer(name, disk.size, description, offered, read_only=read_only)
        self.policy = policy
        self.recorder = recorder
        self.power = power or Power()
        self.before_flush: Callable[[], object] = lambda: None
        """Called before a batch with a flush in it is received: the last chance for a cut."""
        self.counters = Counters()
        self.failed = trio.Event()
        self.failure: NbdproxyError | None = None
        self.held_at_cut = 0
        """Bytes that the cut took back."""
        self.ending = trio.Event()
        """The serving is about to end: what hangs has little time left."""
        self.ended = "nbdproxy failed"
        """How the serving ended, for the recording."""
        self._volatile = VolatileDisk(disk) if policy.holds else None
        self._disk: BlockDevice = self._volatile or disk
        self._preserver = preserver
        self._cut_noted = False
        self._claims = Claims()
        self._remote = remote if self._volatile is None else None
        self._landings: Landings | None = None
        if self._volatile is not None:
            self._landings = Landings(
                self._volatile,
                self.power,
                complete=lambda one, how: self._outcome(one.connection, one.seq, how),
                fail=self.fail,
            )
        self._waiting = Waiting(
            *(self._disk, self._remote, self._landings, self.power),
            complete=self._outcome,
            fail=self.fail,
        )
        self._seq = 0
        self._decisions: dict[tuple[int, int], Decision] = {
            (command, fua): decide(policy, command, fua)
            for command in _RECORDED
            for fua in (0, _FUA)
        }

    async def prepare(self, requests: Sequence[Request | Refused]) -> None:
        """Wait for what `handle` would block on: cold before-images, a slow recording.

        What fails here fails again in `handle`, and is answered there.
        """
        if self.recorder is None or self.power.off or self.failure is not None:
            return
        try:
            await self._prepare(self.recorder, requests)
        except RecordingError as full:
            self.fail(full)
        except OSError as error:
            log.warning("a before-image cannot be read", reason=str(error))

    async def _prepare(
        self, recorder: RecordingWriter, requests: Sequence[Request | Refused]
    ) -> None:
        payload = sum(len(r.payload) for r in requests if type(r) is Request)
        if not recorder.has_room(payload):
            await trio.to_thread.run_sync(recorder.wait_for_room, payload)
        if self._preserver is not None and self._volatile is None:
            changing = [
                (r.offset, r.length)
                for r in requests
                if type(r) is Request and r.command in MODIFYING
            ]
            if cold := self._preserver.save_warm(changing):
                await trio.to_thread.run_sync(self._preserver.save_all, cold)

    def handle(
        self, connection: int, requests: Sequence[Request | Refused], replies: Replies
    ) -> list[Job]:
        """Do a batch that was read off one connection together; return what has to wait."""
        accepted = [r for r in requests if type(r) is Request]
        changing = [r for r in accepted if r.command in _RECORDED]
        if any(r.command == _FLUSH for r in changing):
            self.before_flush()
        if self.power.off:
            return []
        batch = _Batch(connection)
        try:
            seq = self._receive(connection, requests, changing)
        except RecordingError as error:
            self.fail(error)
        if self.failure is not None:
            for request in changing:
                replies.fail(request, *(NOT_RECORDED if self._recording_failed else LOST))
            accepted = [r for r in accepted if r.command not in _RECORDED]
            seq = 0
        # A flush covers what was completed before it was received: nothing of its own batch.
        batch.layer = self._freeze(changing)
        for request in accepted:
            if request.command == _READ:
                self._read(request, replies, batch)
            elif request.command in _RECORDED:
                self._change(request, seq, batch)
                seq += 1
            else:
                batch.jobs.append(Job(request))
        self._answer(connection, batch, replies)
        for refused in requests:
            if type(refused) is Refused:
                replies.fail(*refused)
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
        if self._remote is not None:
            batch.jobs.append(Job(request))
            return
        place = replies.reserve_read(request)
        try:
            if self._disk.try_pread_into(request.offset, place):
                replies.finish_read(request)
                return
            batch.jobs.append(Job(request))
        except (OSError, RecordingError) as error:
            batch.answered.append((request, -1, failure_of(error)))
        replies.take_back_read(request)

    def _flush(self, request: Request, seq: int, batch: _Batch) -> None:
        self.counters.flushes += 1
        decision = self._decide(request)
        if decision is Decision.PASS:
            batch.jobs.append(Job(request, seq))
        elif decision is Decision.LAND and self._landings is not None:
            landing = self._landings.add_flush(batch.connection, seq, batch.layer)
            batch.jobs.append(Job(request, seq, landing))
        else:
            batch.answered.append((request, seq, None))

    def _change(self, request: Request, seq: int, batch: _Batch) -> None:
        if request.command == _FLUSH:
            self._flush(request, seq, batch)
            return
        if request.command == _WRITE:
            self.counters.writes += 1
            self.counters.written += request.length
        decision = self._decide(request)
        if decision is Decision.PASS and (self._remote or self._claims.overlap(request)):
            self._postpone(request, seq, batch)
            return
        try:
            apply(self._disk, request, fast=True)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not request.flags & _FAST_ZERO:
                self._postpone(request, seq, batch)
            else:
                batch.answered.append((request, seq, failure_of(error, request)))
            return
        except RecordingError as full:  # its before-image could not be saved
            self.fail(full)
            batch.answered.append((request, seq, NOT_RECORDED))
            return
        if decision is Decision.HOLD_AND_LAND and self._landings is not None:
            landing = self._landings.add_fua(batch.connection, seq)
            batch.jobs.append(Job(_without_payload(request), seq, landing))
        elif decision is Decision.PASS and request.flags & _FUA:
            batch.jobs.append(Job(_without_payload(request), seq))
        else:
            batch.answered.append((request, seq, None))

    def _postpone(self, request: Request, seq: int, batch: _Batch) -> None:
        """Leave a change to a job, with a payload that outlives the receive buffer."""
        saved = self._preserver
        if self._remote and saved is not None and saved.unsaved(request.offset, request.length):
            batch.answered.append((request, seq, NOT_SAVED))
            return
        request = request._replace(payload=memoryview(bytes(request.payload)))
        batch.jobs.append(Job(request, seq, claim=self._claims.claim(request)))

    def _answer(self, connection: int, batch: _Batch, replies: Replies) -> None:
        """Record what was done inline as completed, and only then prepare its replies."""
        run_first, run_count, run_error = -1, 0, 0
        recorded = True
        for _, seq, failure in batch.answered:
            error = failure.error if failure is not None else 0
            if seq < 0:
                continue
            if run_count and seq == run_first + run_count and error == run_error:
                run_count += 1
                continue
            recorded &= self._complete(connection, run_first, run_count, run_error)
            run_first, run_count, run_error = seq, 1, error
        recorded &= self._complete(connection, run_first, run_count, run_error)
        for request, seq, failure in batch.answered:
            if not recorded and seq >= 0:
                replies.fail(request, *NOT_RECORDED)
            elif failure is not None:
                replies.fail(request, *failure)
            else:
                replies.done(request)

    def _complete(self, connection: int, first: int, count: int, error: int) -> bool:
        if self.recorder is None or not count:
            return True
        try:
            self.recorder.completed(connection, first, count, error)
        except RecordingError as full:
            self.fail(full)
            return False
        return True

    def _outcome(self, connection: int, seq: int, failure: Failure | None) -> Failure | None:
        """Record how a job ended; return what the client is told."""
        error = failure.error if failure is not None else 0
        if self._recording_failed or not self._complete(connection, seq, 1, error):
            return NOT_RECORDED
        return failure

    async def finish(self, connection: int, job: Job, replies: Replies) -> bool:
        """Do a job and prepare its reply; False if the power went in between."""
        return await self._waiting.finish(connection, job, replies)

    async def cut(self) -> None:
        """Finish a cut of the power: return when no landing is at work any more."""
        assert self.power.off
        held = await self._landings.settled() if self._landings is not None else 0
        if not self._cut_noted:
            self._cut_noted = True
            self.held_at_cut = held
            self.note(NoteKind.CUT, self.power.reason)

    def cuts_at(self, event: CutEvent) -> bool:
        """Tell whether the policy cuts at this event."""
        return event in self.policy.cut_at

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> None:
        """Put an event that is not a request into the recording, if there is one."""
        if self.recorder is not None and not self._recording_failed:
            try:
                self.recorder.note(kind, text, connection=connection)
            except RecordingError as error:
                self.fail(error)

    def fail(self, error: NbdproxyError) -> None:
        """Stop for good: the recording is full, or the server below is gone."""
        if self.failure is None:
            log.error("the export stops", reason=str(error))
            self.failure = error
            self.failed.set()

    @property
    def _recording_failed(self) -> bool:
        return isinstance(self.failure, RecordingError)

    def sync(self) -> None:
        """Make everything durable, held or not: an orderly end; blocks."""
        self._disk.sync()

    def close(self) -> None:
        """Close the disk, dropping what is held."""
        self._disk.close()


def _without_payload(request: Request) -> Request:
    """A job outlives its batch, the payload does not."""
    return request._replace(payload=memoryview(b""))
