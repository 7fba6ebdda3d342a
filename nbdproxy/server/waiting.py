"""Does what has to wait: cold reads, flushes, FUA, block status, slow zeroes, another server.

Each job runs beside the event loop, in a thread or awaiting an upstream; its outcome is recorded
before its reply is prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import structlog
import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.errors import RecordingError
from nbdproxy.extents import Extent
from nbdproxy.nbd.constants import MAX_EXTENTS, BlockState
from nbdproxy.nbd.replies import Replies
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.jobs import NOT_RECORDED, Claim, Failure, Job, failure_of
from nbdproxy.server.landings import Landings
from nbdproxy.server.power import Power
from nbdproxy.server.remote import Remote
from nbdproxy.server.syncer import Syncer

log = structlog.get_logger()

# Plain integers, for speed: every inline change goes through `apply`.
_WRITE, _WRITE_ZEROES = int(Command.WRITE), int(Command.WRITE_ZEROES)
_NO_HOLE = int(CommandFlag.NO_HOLE)
_HOLE = int(BlockState.HOLE | BlockState.ZERO)
T = TypeVar("T")

_THREADS = 16
"""Threads that read, zero and map one export."""

_NOT_CHANGING = frozenset({Command.READ, Command.CACHE, Command.BLOCK_STATUS})


class Waiting:
    """The slow half of an export.

    `complete(connection, seq, failure)` records an outcome and returns what the client is told;
    `fail` is told of a recording that is full.
    """

    def __init__(
        self,
        disk: BlockDevice,
        remote: Remote | None,
        landings: Landings | None,
        power: Power,
        *,
        complete: Callable[[int, int, Failure | None], Failure | None],
        fail: Callable[[RecordingError], None],
    ) -> None:
        self._disk = disk
        self._remote = remote
        self._landings = landings
        self._power = power
        self._complete = complete
        self._fail = fail
        # Of our own: another export that hangs must not take all threads there are.
        self._threads = trio.CapacityLimiter(_THREADS)
        self._syncing = trio.CapacityLimiter(1)
        self._syncer = Syncer(remote.flush if remote else self._sync)

    async def _sync(self) -> None:
        await trio.to_thread.run_sync(self._disk.sync, limiter=self._syncing)

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)

    async def finish(self, connection: int, job: Job, replies: Replies) -> bool:
        """Do a job and prepare its reply; False if the power went in between."""
        request = job.request
        if request.command in _NOT_CHANGING:
            await self._answer(request, replies)
            return True
        if job.landing is not None:
            assert self._landings is not None
            if not await self._landings.land(job.landing):
                return False
            failure = job.landing.failure
        else:
            failure = await self._change(job.request, job.claim)
            if self._power.off:
                return False
            failure = self._complete(connection, job.seq, failure)
        if failure is None:
            replies.done(request)
        else:
            replies.fail(request, *failure)
        return True

    async def _change(self, request: Request, claim: Claim | None) -> Failure | None:
        """Do a change and make it durable, or only the latter; return what went wrong."""
        try:
            if claim is not None:
                await self._apply(request, claim)
            if request.command == Command.FLUSH or (
                request.flags & CommandFlag.FUA and self._remote is None
            ):
                await self._syncer.sync()
        except OSError as failed:
            return failure_of(failed, request)
        except RecordingError as full:  # a before-image could not be saved
            self._fail(full)
            return NOT_RECORDED
        return None

    async def _apply(self, request: Request, claim: Claim) -> None:
        ours = True
        try:
            await claim.wait_turn()
            if self._power.off:
                return
            if self._remote is not None:
                ours = False  # the answer from below releases it, which may outlive this task
                await self._remote.change(request, claim.release)
            else:
                await self._in_thread(apply, self._disk, request)
        finally:
            if ours:
                claim.release()

    async def _answer(self, request: Request, replies: Replies) -> None:
        try:
            match request.command:
                case Command.READ:
                    await self._read(request, replies)
                case Command.BLOCK_STATUS:
                    replies.status(request, await self._status(request))
                case _:
                    await self._will_need(request)
                    replies.done(request)
        except (OSError, RecordingError) as error:
            command = Command(request.command).name
            log.error(f"{command} failed", offset=request.offset, reason=str(error))
            replies.fail(request, *failure_of(error))

    async def _read(self, request: Request, replies: Replies) -> None:
        place = replies.reserve_read(request)
        try:
            if self._remote is not None:
                await self._remote.read_into(request.offset, place)
            else:
                await self._in_thread(self._disk.pread_into, request.offset, place)
        except BaseException:
            replies.take_back_read(request)
            raise
        replies.finish_read(request)

    async def _status(self, request: Request) -> list[tuple[int, int]]:
        most = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
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
