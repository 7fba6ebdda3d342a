"""Does what has to wait: cold reads, flushes, FUA, block status, slow zeroes, another server.

Each job runs beside the event loop, in a thread or awaiting an upstream; its outcome is recorded
before its reply is prepared.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeVar

import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.errors import RecordingError
from nbdproxy.extents import Extent
from nbdproxy.nbd.constants import MAX_EXTENTS, BlockState
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.model import Handling
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.below.remote import Remote
from nbdproxy.server.complaints import disk_complaints
from nbdproxy.server.export.destage_queue import DestageQueue
from nbdproxy.server.export.faults import Faults
from nbdproxy.server.export.jobs import (
    NOT_RECORDED,
    Destage,
    Job,
    LinkDroppedError,
    RequestFailure,
    failure_by_rule,
    failure_of,
)
from nbdproxy.server.export.syncer import Syncer
from nbdproxy.server.power import Power

# Plain integers, for speed: every inline change goes through `apply`.
_WRITE, _WRITE_ZEROES = int(Command.WRITE), int(Command.WRITE_ZEROES)
_FLUSH, _FUA = int(Command.FLUSH), int(CommandFlag.FUA)
_NO_HOLE = int(CommandFlag.NO_HOLE)
_HOLE = int(BlockState.HOLE | BlockState.ZERO)
T = TypeVar("T")

_THREADS = 16
"""Threads that read, zero and map one export."""

_HOLDS = frozenset({Handling.HOLD, Handling.HOLD_AND_LAND})
_NOT_CHANGING = frozenset({Command.READ, Command.CACHE, Command.BLOCK_STATUS})


class SlowPath:
    """The slow half of an export.

    `complete(connection, seq, failure)` records an outcome and returns what the client is told;
    `keep` makes that record durable, if that is wanted, and returns what the client is told;
    `fail` is told of a recording that is full; `held(request, seq)` of each change that a volatile
    cache took late.
    """

    def __init__(
        self,
        disk: BlockDevice,
        remote: Remote | None,
        landings: DestageQueue | None,
        power: Power,
        *,
        regime: int = 0,
        faults: Faults | None = None,
        held: Callable[[Request, int], None] = lambda _request, _seq: None,
        complete: Callable[[int, int, RequestFailure | None], RequestFailure | None],
        keep: Callable[[], Awaitable[RequestFailure | None]],
        fail: Callable[[RecordingError], None],
    ) -> None:
        self._disk = disk
        self._remote = remote
        self._landings = landings
        self._power = power
        self._regime = regime
        self._faults = faults
        self._held = held
        self._complete = complete
        self._keep = keep
        self._fail = fail
        # Of our own: another export that hangs must not take all threads there are.
        self._threads = trio.CapacityLimiter(_THREADS)
        self._syncing = trio.CapacityLimiter(1)
        self._syncer = Syncer(remote.flush if remote else self._sync)

    @property
    def in_threads(self) -> bool:
        """Whether a thread is at work."""
        return bool(self._threads.borrowed_tokens or self._syncing.borrowed_tokens)

    async def _sync(self) -> None:
        await trio.to_thread.run_sync(self._disk.sync, limiter=self._syncing)

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)

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
                failure = await self._keep()
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
        return self._complete(connection, job.seq, failure)

    async def _change(self, connection: int, job: Job) -> RequestFailure | None:
        """Do a change, and make durable what it promises; return what the client is told."""
        if job.regime != self._regime:
            return self._made_durable_before(connection, job)
        failure = await self._apply(job) if job.claim is not None else None
        if failure is not None or self._power.off:
            return self._outcome(connection, job, failure)
        landing = job.landing or self._landing(connection, job)
        if landing is not None:
            assert self._landings is not None
            await self._landings.land(landing)
            return landing.failure
        if job.handling is Handling.PASS:
            failure = await self._make_durable(job.request)
        return self._outcome(connection, job, failure)

    def _made_durable_before(self, connection: int, job: Job) -> RequestFailure | None:
        """Answer what came under another policy: the change of policy made all of it durable."""
        assert job.claim is None
        if job.landing is not None:
            assert job.landing.over
            return job.landing.failure
        fails = job.decision is not None and job.action is ActionKind.FSYNCGATE
        failure = failure_by_rule(job.decision) if fails and job.decision is not None else None
        return self._outcome(connection, job, failure)

    def _landing(self, connection: int, job: Job) -> Destage | None:
        """Return what a late request has to land of the cache, if it has to."""
        if self._landings is None:
            return None
        if job.handling is Handling.LAND:
            drops = None
            if job.decision is not None and job.action is ActionKind.FSYNCGATE:
                drops = failure_by_rule(job.decision)
            return self._landings.add_flush(connection, job.seq, job.layer, drops=drops)
        if job.handling is Handling.HOLD_AND_LAND:
            return self._landings.add_fua(connection, job.seq)
        return None

    async def _make_durable(self, request: Request) -> RequestFailure | None:
        through = request.flags & CommandFlag.FUA and self._remote is None
        if request.command != Command.FLUSH and not through:
            return None
        try:
            await self._syncer.sync()
        except OSError as failed:
            return failure_of(failed, request)
        return None

    async def _apply(self, job: Job) -> RequestFailure | None:
        """Do a change that claims its place; return what went wrong."""
        assert job.claim is not None
        request, claim = job.request, job.claim
        ours = True
        try:
            if job.decision is not None:
                await trio.sleep(job.decision.delay_s)
            await claim.wait_turn()
            if self._power.off:
                return None
            old = None
            if self._faults is not None:
                old = await self._faults.before(request, job.decision, self._read_honest)
            over = partial(self._over, job, old)
            if self._remote is not None:
                ours = False  # the answer from below releases it, which may outlive this task
                await self._remote.change(request, over)
            elif self._landings is not None:
                # The cache belongs to the event loop. The power may have gone meanwhile.
                if not self._power.off:
                    apply(self._disk, request)
                    over()
                    if job.handling in _HOLDS:
                        self._held(request, job.seq)
            else:
                await self._in_thread(apply, self._disk, request)
                over()
        except OSError as failed:
            return failure_of(failed, request)
        except RecordingError as full:  # a before-image could not be saved
            self._fail(full)
            return NOT_RECORDED
        finally:
            if ours:
                claim.release()
        return None

    def _over(self, job: Job, old: bytes | None) -> None:
        """Let others go on with the place of a change that was done."""
        assert job.claim is not None
        if self._faults is not None:
            self._faults.after(job.request, job.decision, old)
        job.claim.release()

    async def _read_honest(self, offset: int, length: int) -> bytes:
        if self._remote is None:
            return await self._in_thread(self._disk.pread, offset, length)
        buffer = bytearray(length)
        await self._remote.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    async def _answer(self, job: Job, replies: Replies) -> None:
        request = job.request
        try:
            match request.command:
                case Command.READ:
                    await self._read(job, replies)
                case Command.BLOCK_STATUS:
                    replies.status(request, await self._status(request))
                case _:
                    await self._will_need(request)
                    replies.done(request)
        except (OSError, RecordingError) as error:
            command = Command(request.command).name
            disk_complaints.warn(f"{command} failed", str(error), offset=request.offset)
            replies.fail(request, *failure_of(error))

    async def _read(self, job: Job, replies: Replies) -> None:
        request = job.request
        place = replies.reserve_read(request)
        try:
            if self._remote is not None:
                await self._remote.read_into(request.offset, place)
            else:
                await self._in_thread(self._disk.pread_into, request.offset, place)
            if self._faults is not None:
                self._faults.patch(request, place, job.decision)
        except BaseException:
            replies.take_back_read(request)
            raise
        replies.finish_read(request)

    async def _status(self, request: Request) -> list[tuple[int, int]]:
        most = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        if self._faults is not None and self._faults.touches(request):
            return [(request.length, 0)]  # what is shown there may be anything
        if self._remote is not None:
            return (await self._remote.status(request))[:most]
        data = self._disk.data_extents(request.offset, request.length)
        return await self._in_thread(allocation, data, request, most)

    async def _will_need(self, request: Request) -> None:
        where = request.offset, request.length
        if self._remote is not None:
            await self._remote.will_need(*where)
        else:
            await self._in_thread(self._disk.will_need, *where)


def _promises(request: Request) -> bool:
    """Tell whether a client that gets an answer may take what it wrote to be durable."""
    return request.command == _FLUSH or bool(request.flags & _FUA)


def apply(disk: BlockDevice, request: Request, *, fast: bool = False) -> None:
    """Do a WRITE, WRITE_ZEROES or TRIM on a disk; `fast` as for `BlockDevice.zero`."""
    if request.command == _WRITE:
        disk.pwrite(request.offset, request.payload)
    elif request.command == _WRITE_ZEROES:
        punch = not request.flags & _NO_HOLE
        disk.zero(request.offset, request.length, may_punch=punch, fast=fast)
    else:
        disk.trim(request.offset, request.length, fast=fast)


def allocation(data: Iterable[Extent], request: Request, most: int) -> list[tuple[int, int]]:
    """Return a range's (length, flags of base:allocation), at most `most` of them.

    What holds no data is a hole and reads as zeroes; neighbours of one kind are one extent.
    """
    found: list[tuple[int, int]] = []
    at = request.offset
    for extent in data:
        for end, flags in ((extent.offset, _HOLE), (extent.end, 0)):
            if end <= at:
                continue
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + end - at, flags)
            elif len(found) == most:
                return found
            else:
                found.append((end - at, flags))
            at = end
    if at < request.end:
        if found and found[-1][1] == _HOLE:
            found[-1] = (found[-1][0] + request.end - at, _HOLE)
        elif len(found) < most:
            found.append((request.end - at, _HOLE))
    return found
