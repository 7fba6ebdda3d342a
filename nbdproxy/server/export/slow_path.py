"""What an export does with requests that have to wait, beside the event loop: the slow path.

Cold reads, flushes, FUA, block status, slow zeroes, another server, and what a rule delays. Each
job's outcome is recorded before its reply is prepared.
"""

from __future__ import annotations

from functools import partial

import trio

from nbdproxy.errors import RecordingError
from nbdproxy.nbd.replies import Replies
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.below.failures import NOT_RECORDED, RequestFailure, failure_of
from nbdproxy.server.export.active_policy import ActivePolicy
from nbdproxy.server.export.jobs import Job, LinkDroppedError, RangeClaim, failure_by_rule
from nbdproxy.server.export.request_log import RequestLog
from nbdproxy.server.shared.complaints import disk_complaints
from nbdproxy.server.shared.power import Power

_FLUSH, _FUA = int(Command.FLUSH), int(CommandFlag.FUA)
_NOT_CHANGING = frozenset({Command.READ, Command.CACHE, Command.BLOCK_STATUS})


class SlowPath:
    """The slow path of an export under the policy `active`."""

    def __init__(self, log: RequestLog, power: Power, active: ActivePolicy) -> None:
        self._log = log
        self._power = power
        self.adopt(active)

    def adopt(self, active: ActivePolicy) -> None:
        """Let another policy come into force."""
        self._policy = active.number
        self._store = active.store

    async def finish(self, connection: int, job: Job, replies: Replies) -> bool:
        """Do a job and prepare its reply; False if the power went in between.

        Raises LinkDroppedError where a rule says so.
        """
        request = job.request
        if job.claim is None and job.decision is not None:
            await trio.sleep(job.decision.delay_s)
        if job.dropped_before:
            raise LinkDroppedError
        if job.decision is not None and job.fails:
            failure = self._outcome(connection, job, failure_by_rule(job.decision))
        elif request.command in _NOT_CHANGING:
            await self._answer(job, replies)
            return True
        else:
            failure = await self._change(connection, job)
            if failure is None and _promises(request) and not self._power.off:
                failure = await self._log.keep()
        if self._power.off:
            return False
        if failure is None:
            replies.done(request)
        else:
            replies.fail(request, *failure)
        return True

    def _outcome(
        self, connection: int, job: Job, failure: RequestFailure | None
    ) -> RequestFailure | None:
        if job.seq < 0 or self._power.off:
            return failure
        return self._log.outcome(connection, job.seq, failure)

    async def _change(self, connection: int, job: Job) -> RequestFailure | None:
        """Do a change, and make durable what it promises; return what the client is told."""
        if job.claim is not None:
            failure = await self._do(job, job.claim)
            if failure is not None or self._power.off:
                return self._outcome(connection, job, failure)
        if job.promise is not None:
            return await job.promise()
        # What came under another policy was made durable by the change of policy.
        if job.honest and job.policy == self._policy:
            record = partial(self._log.outcome, connection, job.seq)
            if job.request.command == _FLUSH:
                return await self._store.flush(job.line, record, job.drops)()
            if job.request.flags & _FUA:
                return await self._store.fua(record)()
        return self._outcome(connection, job, job.drops)

    async def _do(self, job: Job, claim: RangeClaim) -> RequestFailure | None:
        """Do a change that claims its range; return what went wrong."""
        begun = False
        try:
            if job.decision is not None:
                await trio.sleep(job.decision.delay_s)
            await claim.wait_turn()
            if self._power.off:
                return None
            begun = True  # from here on the store tells when it is over
            await self._store.change(
                job.request, job.seq, job.decision, lambda _done: claim.release()
            )
        except OSError as failed:
            return failure_of(failed, job.request)
        except RecordingError as full:  # a before-image could not be saved
            self._log.fail(full)
            return NOT_RECORDED
        finally:
            if not begun:
                claim.release()
        return None

    async def _answer(self, job: Job, replies: Replies) -> None:
        """Do what changes nothing."""
        request = job.request
        try:
            match request.command:
                case Command.READ:
                    await self._read(job, replies)
                case Command.BLOCK_STATUS:
                    replies.status(request, await self._store.status(request))
                case _:
                    await self._store.will_need(request.offset, request.length)
                    replies.done(request)
        except (OSError, RecordingError) as error:
            command = Command(request.command).name
            disk_complaints.warn(f"{command} failed", str(error), offset=request.offset)
            replies.fail(request, *failure_of(error))

    async def _read(self, job: Job, replies: Replies) -> None:
        request = job.request
        place = replies.reserve_read(request)
        try:
            await self._store.read(request.offset, place, job.decision)
        except BaseException:
            replies.take_back_read(request)
            raise
        replies.finish_read(request)


def _promises(request: Request) -> bool:
    """Tell whether a client that gets an answer may take what it wrote to be durable."""
    return request.command == _FLUSH or bool(request.flags & _FUA)
