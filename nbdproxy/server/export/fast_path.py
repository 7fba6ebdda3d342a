"""What an export does with a batch of requests at once, in the event loop: the fast path.

A batch is what was read off one connection together. It is recorded as received, what the store
can do at once is done, recorded as completed and answered; what may block comes back as jobs for
`SlowPath`. A request that a rule matches goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import trio

from nbdproxy.errors import RecordingError
from nbdproxy.nbd.events import Refused
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.engine import Decision
from nbdproxy.recording.notes import NoteKind
from nbdproxy.requests import MODIFYING, Command, CommandFlag, Request
from nbdproxy.server.below.failures import LOST, NOT_RECORDED, RequestFailure, failure_of
from nbdproxy.server.below.store import Promise
from nbdproxy.server.export.active_policy import ActivePolicy, fault_note
from nbdproxy.server.export.jobs import Claims, Counters, Job, failure_by_rule
from nbdproxy.server.export.request_log import RequestLog
from nbdproxy.server.shared.power import Power

# Plain integers: operators of IntFlag are slow, and these are in the hot path.
_FUA = int(CommandFlag.FUA)
_READ, _WRITE, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.FLUSH)
_MODIFYING = frozenset(int(command) for command in MODIFYING)
_RECORDED = _MODIFYING | {_FLUSH}
_UNDONE = frozenset({ActionKind.ERROR, ActionKind.HANG, ActionKind.LIE, ActionKind.CUT})

Matched = Sequence[Decision | None]
"""What rules decided on each request of a batch; nothing if there are none."""


@dataclass(slots=True)
class _Batch:
    """A batch while it is handled: what was answered inline, with seq and what went wrong.

    policy  the number of the policy in force
    line    what a flush of the batch covers, as the store drew it
    """

    connection: int
    policy: int
    seq: int = 0
    line: int = 0
    answered: list[tuple[Request, int, RequestFailure | None]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


class FastPath:
    """The fast path of an export under the policy `active`."""

    def __init__(self, log: RequestLog, power: Power, active: ActivePolicy) -> None:
        self.counters = Counters()
        self.claims = Claims()
        self.before_flush: Callable[[], object] = lambda: None
        """Called before a batch with a flush in it is received: the last chance for a cut."""
        self._log = log
        self._durable = log.durable
        self._power = power
        self._began_s = float("inf")
        self.adopt(active)

    def adopt(self, active: ActivePolicy) -> None:
        """Let another policy come into force."""
        self._policy = active.number
        self._honest = active.honest
        self._engine = active.engine
        self._has_rules = bool(active.policy.layers)
        self._watches_qmp = active.engine.watches_qmp
        self._store = active.store
        # In the hot path, so they are at hand.
        self._waits = active.store.waits
        self._try_read, self._try_change = active.store.try_read, active.store.try_change

    def handle(
        self, connection: int, requests: Sequence[Request | Refused], replies: Replies
    ) -> list[Job]:
        """Do a batch that was read off one connection together; return what has to wait."""
        accepted = [r for r in requests if type(r) is Request]
        changing = [r for r in accepted if r.command in _RECORDED]
        flushes = any(r.command == _FLUSH for r in changing)
        if flushes or self._watches_qmp:
            self.before_flush()
        if self._power.off:
            return []
        matched: Matched = ()
        if self._has_rules:
            matched = list(self._match(connection, accepted))
            if len(matched) < len(accepted):  # a cut among them: what comes behind never arrived
                accepted = requests = accepted[: len(matched)]
                changing = [r for r in accepted if r.command in _RECORDED]
        batch = _Batch(connection, self._policy)
        batch.seq = self._log.received(connection, requests, changing)
        if self._log.failure is not None:
            for request in changing:
                replies.fail(request, *(NOT_RECORDED if self._log.full else LOST))
            accepted = [r for r in accepted if r.command not in _RECORDED]
            matched = ()
        elif flushes and self._covers(accepted, matched):
            # A flush covers what was completed before it was received: nothing of its own batch.
            batch.line = self._store.draw_line()
        self._do(accepted, matched, batch, replies)
        if self._power.off:
            return []
        self._answer(connection, batch, replies)
        for refused in requests:
            if type(refused) is Refused:
                replies.fail(*refused)
        return batch.jobs

    def _do(
        self, accepted: Sequence[Request], matched: Matched, batch: _Batch, replies: Replies
    ) -> None:
        """Do each request as a rule says, or as ever."""
        seq = batch.seq
        for request, decision in zip(accepted, matched or repeat(None), strict=False):
            if decision is not None:
                recorded = request.command in _RECORDED
                self._do_as_decided(request, seq if recorded else -1, decision, batch)
                seq += recorded
            elif request.command == _READ:
                self._read(request, replies, batch)
            elif request.command in _RECORDED:
                self._change(request, seq, batch)
                seq += 1
            else:
                batch.jobs.append(Job(request, policy=batch.policy))

    def begin(self) -> float:
        """Return when the serving began; the first call is when."""
        self._began_s = min(self._began_s, trio.current_time())
        return self._began_s

    def _match(self, connection: int, requests: Sequence[Request]) -> Iterator[Decision | None]:
        """Yield what rules decide on each request, up to one that cuts the power."""
        now_s = trio.current_time() - self.begin()
        for request in requests:
            decision = self._engine.decide(connection, request, now_s)
            yield decision
            if decision is not None and decision.kind is ActionKind.CUT:
                return

    def _covers(self, requests: Sequence[Request], matched: Matched) -> bool:
        """Tell whether a flush of a batch makes anything durable."""
        return self._honest and any(
            request.command == _FLUSH and (decision is None or decision.kind not in _UNDONE)
            for request, decision in zip(requests, matched or repeat(None), strict=False)
        )

    def _do_as_decided(self, request: Request, seq: int, decision: Decision, batch: _Batch) -> None:
        """Do to a request what a rule decided; the recording says so."""
        where = batch.connection
        self._log.note(NoteKind.FAULT, fault_note(request, seq, decision), connection=where)
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
            batch.jobs.append(Job(request, policy=batch.policy, decision=decision))
        else:
            honest = self._honest and kind is not ActionKind.LIE
            bare = Job(
                _without_payload(request),
                seq,
                batch.policy,
                decision=decision,
                honest=honest,
                line=batch.line,
            )
            if request.command == _FLUSH or kind is ActionKind.ERROR or bare.dropped_before:
                batch.jobs.append(bare)
            else:
                self._postpone(request, seq, batch, decision, honest=honest)

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
        if self._waits:
            batch.jobs.append(Job(request, policy=batch.policy))
            return
        place = replies.reserve_read(request)
        try:
            if self._try_read(request.offset, place):
                replies.finish_read(request)
                return
            batch.jobs.append(Job(request, policy=batch.policy))
        except (OSError, RecordingError) as error:
            batch.answered.append((request, -1, failure_of(error)))
        replies.take_back_read(request)

    def _change(self, request: Request, seq: int, batch: _Batch) -> None:
        if request.command == _FLUSH:
            self.counters.flushes += 1
            self._promise(request, seq, batch)
            return
        if request.command == _WRITE:
            self.counters.writes += 1
            self.counters.written += request.length
        if self.claims.overlap(request):
            self._postpone(request, seq, batch, honest=self._honest)
            return
        try:
            done = self._try_change(request, seq)
        except OSError as error:
            batch.answered.append((request, seq, failure_of(error, request)))
            return
        except RecordingError as full:  # its before-image could not be saved
            self._log.fail(full)
            batch.answered.append((request, seq, NOT_RECORDED))
            return
        if not done:
            self._postpone(request, seq, batch, honest=self._honest)
        elif request.flags & _FUA:
            self._promise(request, seq, batch)
        else:
            batch.answered.append((request, seq, None))

    def _promise(self, request: Request, seq: int, batch: _Batch) -> None:
        """Answer a FLUSH, or a FUA request that was done, when it is durable as far as it is to be.

        Where it is a lie, the record of it has to be durable all the same, if that is wanted.
        """
        promise: Promise | None = None
        if self._honest:
            record = partial(self._log.outcome, batch.connection, seq)
            if request.command == _FLUSH:
                promise = self._store.flush(batch.line, record, None)
            else:
                promise = self._store.fua(record)
        elif not self._durable:
            batch.answered.append((request, seq, None))
            return
        bare = _without_payload(request)
        batch.jobs.append(Job(bare, seq, batch.policy, promise=promise, honest=self._honest))

    def _postpone(
        self,
        request: Request,
        seq: int,
        batch: _Batch,
        decision: Decision | None = None,
        *,
        honest: bool,
    ) -> None:
        """Leave a change to a job, with a payload that outlives the receive buffer."""
        request = request._replace(payload=memoryview(bytes(request.payload)))
        claim = self.claims.claim(request)
        batch.jobs.append(Job(request, seq, batch.policy, claim, decision=decision, honest=honest))

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
            recorded &= self._log.completed(connection, run_first, run_count, run_error)
            run_first, run_count, run_error = seq, 1, error
        recorded &= self._log.completed(connection, run_first, run_count, run_error)
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
