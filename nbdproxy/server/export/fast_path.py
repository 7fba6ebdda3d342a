"""What an export does with a batch of requests, at once: the fast half of it.

A batch is what was read off one connection together. It is recorded as received, what the page
cache can do at once is done, recorded as completed and answered; what may block comes back as jobs
that `Waiting` does beside the event loop. A request that a rule strikes goes its own way.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import trio

from nbdproxy.errors import RecordingError
from nbdproxy.nbd.events import Refused
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.engine import Decision
from nbdproxy.policy.model import Handling
from nbdproxy.recording.notes import NoteKind
from nbdproxy.requests import MODIFYING, Command, CommandFlag, Request
from nbdproxy.server.export.active_policy import ActivePolicy, fault_note
from nbdproxy.server.export.jobs import (
    LOST,
    NOT_RECORDED,
    NOT_SAVED,
    Claims,
    Counters,
    Destage,
    Job,
    RequestFailure,
    failure_by_rule,
    failure_of,
)
from nbdproxy.server.export.preserve import PreservingDisk
from nbdproxy.server.export.request_log import RequestLog
from nbdproxy.server.export.slow_path import apply
from nbdproxy.server.power import Power

# Plain integers: operators of IntFlag are slow, and these are in the hot path.
_FUA = int(CommandFlag.FUA)
_FAST_ZERO = int(CommandFlag.FAST_ZERO)
_READ, _WRITE, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.FLUSH)
_MODIFYING = frozenset(int(command) for command in MODIFYING)
_RECORDED = _MODIFYING | {_FLUSH}
_UNDONE = frozenset({ActionKind.ERROR, ActionKind.HANG, ActionKind.LIE, ActionKind.CUT})

Matched = Sequence[Decision | None]
"""What rules decided on each request of a batch."""


@dataclass(slots=True)
class _Batch:
    """A batch while it is handled: what was answered inline, with seq and what went wrong.

    `layer` is the newest one of the volatile cache that a flush of the batch covers.
    """

    connection: int
    regime: int
    seq: int = 0
    layer: int | None = None
    answered: list[tuple[Request, int, RequestFailure | None]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def wait(self, request: Request, seq: int = -1, landing: Destage | None = None) -> None:
        """Leave a request to a job."""
        self.jobs.append(Job(request, seq, landing, regime=self.regime))


class FastPath:
    """The fast half of an export. `before_flush` is called before a batch with a flush in it is
    received: the last chance for a cut.
    """

    def __init__(
        self,
        ledger: RequestLog,
        power: Power,
        preserver: PreservingDisk | None,
        regime: ActivePolicy,
    ) -> None:
        self.counters = Counters()
        self.claims = Claims()
        self.before_flush: Callable[[], object] = lambda: None
        self._ledger = ledger
        self._durable = ledger.durable
        self._power = power
        self._preserver = preserver
        self._began_s: float | None = None
        self.adopt(regime)

    def adopt(self, regime: ActivePolicy) -> None:
        """Let another policy come into force."""
        self._regime = regime
        # In the hot path, so they are at hand.
        self._disk, self._remote, self._landings = regime.disk, regime.remote, regime.landings
        self._handling, self._engine, self._faults = regime.handling, regime.engine, regime.faults
        self._watches_qmp = self._engine is not None and self._engine.watches_qmp

    def handle(
        self, connection: int, requests: Sequence[Request | Refused], replies: Replies
    ) -> list[Job]:
        """Do a batch that was read off one connection together; return what has to wait."""
        accepted = [r for r in requests if type(r) is Request]
        changing = [r for r in accepted if r.command in _RECORDED]
        if self._watches_qmp or any(r.command == _FLUSH for r in changing):
            self.before_flush()
        if self._power.off:
            return []
        struck: Matched = ()
        if self._engine is not None:
            struck = list(self._strikes(connection, accepted))
            if len(struck) < len(accepted):  # a cut among them: what comes behind never arrived
                accepted = requests = accepted[: len(struck)]
                changing = [r for r in accepted if r.command in _RECORDED]
        batch = _Batch(connection, self._regime.number)
        batch.seq = self._ledger.received(connection, requests, changing)
        if self._ledger.failure is not None:
            for request in changing:
                replies.fail(request, *(NOT_RECORDED if self._ledger.full else LOST))
            accepted = [r for r in accepted if r.command not in _RECORDED]
            struck = ()
        # A flush covers what was completed before it was received: nothing of its own batch.
        batch.layer = self._freeze(accepted, struck)
        self._do(accepted, struck, batch, replies)
        if self._power.off:
            return []
        self._answer(connection, batch, replies)
        for refused in requests:
            if type(refused) is Refused:
                replies.fail(*refused)
        return batch.jobs

    def _do(
        self, accepted: Sequence[Request], struck: Matched, batch: _Batch, replies: Replies
    ) -> None:
        """Do each request as a rule says, or as ever."""
        seq = batch.seq
        for request, decision in zip(accepted, struck or repeat(None), strict=False):
            if decision is not None:
                recorded = request.command in _RECORDED
                self._strike(request, seq if recorded else -1, decision, batch)
                seq += recorded
            elif request.command == _READ:
                self._read(request, replies, batch)
            elif request.command in _RECORDED:
                self._change(request, seq, batch)
                seq += 1
            else:
                batch.wait(request)

    def begin(self) -> float:
        """Return when the serving began; the first call is when."""
        if self._began_s is None:
            self._began_s = trio.current_time()
        return self._began_s

    def _strikes(self, connection: int, requests: Sequence[Request]) -> Iterator[Decision | None]:
        """Yield what rules decide on each request, up to one that cuts the power."""
        assert self._engine is not None
        now_s = trio.current_time() - self.begin()
        for request in requests:
            decision = self._engine.decide(connection, request, now_s)
            yield decision
            if decision is not None and decision.kind is ActionKind.CUT:
                return

    def _freeze(self, requests: Sequence[Request], struck: Matched) -> int | None:
        if self._landings is None or self._ledger.failure is not None:
            return None
        for index, request in enumerate(requests):
            decision = struck[index] if struck else None
            if (
                request.command == _FLUSH
                and self._handling[_FLUSH, 0] is Handling.LAND
                and (decision is None or decision.kind not in _UNDONE)
            ):
                return self._regime.freeze()
        return None

    def _handle_as(self, request: Request) -> Handling:
        return self._handling[request.command, request.flags & _FUA]

    def _strike(self, request: Request, seq: int, decision: Decision, batch: _Batch) -> None:
        """Do to a request what a rule decided; the recording says so."""
        where = batch.connection
        self._ledger.note(NoteKind.FAULT, fault_note(request, seq, decision), connection=where)
        kind = decision.kind
        if kind is not ActionKind.CUT:
            self._count(request)
        if kind is ActionKind.HANG:
            return
        if kind is ActionKind.CUT:
            if request.command in _MODIFYING:
                self._change(request, seq, batch)
            self._power.cut(f"the policy's rule {decision.draw_key.rule}")
        elif kind is ActionKind.ERROR and not decision.delay_s:
            batch.answered.append((request, seq, failure_by_rule(decision)))
        elif request.command not in _RECORDED:
            batch.jobs.append(Job(request, decision=decision, regime=batch.regime))
        else:
            handling = self._handle_as(request)
            if kind is ActionKind.LIE:
                flush = request.command == _FLUSH
                handling = Handling.ANSWER if flush else Handling.HOLD
            bare = Job(
                _without_payload(request),
                seq,
                decision=decision,
                handling=handling,
                layer=batch.layer,
                regime=batch.regime,
            )
            if request.command == _FLUSH or kind is ActionKind.ERROR or bare.dropped_before:
                batch.jobs.append(bare)
            else:
                self._postpone(request, seq, batch, handling, decision)

    def _count(self, request: Request) -> None:
        if request.command == _READ:
            self.counters.reads += 1
        elif request.command == _WRITE:
            self.counters.writes += 1
            self.counters.written += request.length
        elif request.command == _FLUSH:
            self.counters.flushes += 1

    def _read(self, request: Request, replies: Replies, batch: _Batch) -> None:
        self.counters.reads += 1
        if self._remote is not None:
            batch.wait(request)
            return
        place = replies.reserve_read(request)
        try:
            if self._disk.try_pread_into(request.offset, place):
                if self._faults is not None:
                    self._faults.patch(request, place)
                replies.finish_read(request)
                return
            batch.wait(request)
        except (OSError, RecordingError) as error:
            batch.answered.append((request, -1, failure_of(error)))
        replies.take_back_read(request)

    def _flush(self, request: Request, seq: int, batch: _Batch) -> None:
        self.counters.flushes += 1
        handling = self._handle_as(request)
        if handling is Handling.PASS:
            batch.wait(request, seq)
        elif handling is Handling.LAND and self._landings is not None:
            landing = self._landings.add_flush(batch.connection, seq, batch.layer)
            batch.wait(request, seq, landing)
        elif self._durable:
            self._answer_later(request, seq, batch, handling)
        else:
            batch.answered.append((request, seq, None))

    def _answer_later(self, request: Request, seq: int, batch: _Batch, handling: Handling) -> None:
        """Leave to a job what was done: it, or the record of it, has to be durable first."""
        bare = _without_payload(request)
        batch.jobs.append(Job(bare, seq, handling=handling, regime=batch.regime))

    def _change(self, request: Request, seq: int, batch: _Batch) -> None:
        if request.command == _FLUSH:
            self._flush(request, seq, batch)
            return
        if request.command == _WRITE:
            self.counters.writes += 1
            self.counters.written += request.length
        handling = self._handle_as(request)
        if self._has_to_wait(request):
            self._postpone(request, seq, batch, handling)
            return
        try:
            apply(self._disk, request, fast=True)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not request.flags & _FAST_ZERO:
                self._postpone(request, seq, batch, handling)
            else:
                batch.answered.append((request, seq, failure_of(error, request)))
            return
        except RecordingError as full:  # its before-image could not be saved
            self._ledger.fail(full)
            batch.answered.append((request, seq, NOT_RECORDED))
            return
        if self._faults is not None:
            self._faults.written(request)
        if self._landings is not None:
            self._regime.held(request, seq)
        if handling is Handling.HOLD_AND_LAND and self._landings is not None:
            landing = self._landings.add_fua(batch.connection, seq)
            batch.wait(_without_payload(request), seq, landing)
        elif request.flags & _FUA and (self._durable or handling is Handling.PASS):
            self._answer_later(request, seq, batch, handling)
        else:
            batch.answered.append((request, seq, None))

    def _has_to_wait(self, request: Request) -> bool:
        """Tell whether a change cannot be done at once: for others, or for what is below."""
        return (
            self._remote is not None
            or self.claims.overlap(request)
            or (self._faults is not None and self._faults.needs_old)
        )

    def _postpone(
        self,
        request: Request,
        seq: int,
        batch: _Batch,
        handling: Handling,
        decision: Decision | None = None,
    ) -> None:
        """Leave a change to a job, with a payload that outlives the receive buffer."""
        saved = self._preserver
        if self._remote and saved is not None and saved.unsaved(request.offset, request.length):
            batch.answered.append((request, seq, NOT_SAVED))
            return
        request = request._replace(payload=memoryview(bytes(request.payload)))
        claim = self.claims.claim(request)
        batch.jobs.append(Job(request, seq, None, claim, decision, handling, regime=batch.regime))

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
            recorded &= self._ledger.completed(connection, run_first, run_count, run_error)
            run_first, run_count, run_error = seq, 1, error
        recorded &= self._ledger.completed(connection, run_first, run_count, run_error)
        for request, seq, failure in batch.answered:
            if not recorded and seq >= 0:
                replies.fail(request, *NOT_RECORDED)
            elif failure is not None:
                replies.fail(request, *failure)
            else:
                replies.done(request)


def _without_payload(request: Request) -> Request:
    """A job outlives its batch, the payload does not."""
    return request._replace(payload=memoryview(b""))
