"""What flushes, FUA requests and write-backs destage of a volatile cache, one after the other.

They go in the order in which they were received, whatever becomes of their connections: so
nothing is destaged with a flush that is not completed yet, and an older write never comes over a
newer one. A cut of the power lets the destaging that is at work finish; after it there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from nbdproxy.disks.volatile import Ticket, VolatileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.server.below.failures import NOT_RECORDED, RequestFailure, failure_of
from nbdproxy.server.below.store import Record
from nbdproxy.server.shared.power import Power


@dataclass(slots=True, eq=False)
class Destage:
    """What a flush (`line`), or a FUA request or write-back (`ticket`), has to destage.

    record    records how it ended, and returns what the client is told
    promised  False for a write-back, which nobody waits for: it need not be durable
    drops     set if the flush is to fail so, and the cache to forget what it had in hand
    over      it is done; `failure` says how that went
    """

    record: Record
    line: int = 0
    ticket: Ticket | None = None
    promised: bool = True
    drops: RequestFailure | None = None
    over: bool = False
    failure: RequestFailure | None = None


class DestageQueue:
    """The queue of one cache; `fail` is told of a recording that is full."""

    def __init__(
        self, volatile: VolatileDisk, power: Power, *, fail: Callable[[RecordingError], None]
    ) -> None:
        self._volatile = volatile
        self._power = power
        self._fail = fail
        self._lock = trio.Lock()
        # Of its own: it must not wait for threads that wait for another server.
        self._thread = trio.CapacityLimiter(1)
        # Those that were received and are not over yet, in the order received.
        self._queue: deque[Destage] = deque()

    def add_flush(
        self, line: int, record: Record, *, drops: RequestFailure | None = None
    ) -> Destage:
        """Queue a flush that covers all layers up to `line`, as `freeze` numbered them."""
        return self._add(Destage(record, line, drops=drops))

    def add_fua(self, record: Record) -> Destage:
        """Queue the write that was held last."""
        return self._add(Destage(record, ticket=self._volatile.issue_ticket()))

    def add_write_back(self, order: int) -> Destage:
        """Queue the held write of this order number, as the cache's own; KeyError if it is gone."""
        ticket = self._volatile.issue_ticket(order)
        return self._add(Destage(_as_it_ended, ticket=ticket, promised=False))

    def _add(self, destage: Destage) -> Destage:
        self._queue.append(destage)
        return destage

    async def finish(self, destage: Destage) -> RequestFailure | None:
        """Destage everything up to `destage`, unless the power goes before; return how it ended.

        Whoever comes first destages what was received earlier, too, even if its client is gone.
        """
        async with self._lock:
            while not destage.over and not self._power.off:
                await self._destage_next()
        return destage.failure

    @property
    def in_thread(self) -> bool:
        """Whether a thread is at work."""
        return bool(self._thread.borrowed_tokens)

    async def sync(self) -> None:
        """Destage what is queued and then all that is held, unless the power goes."""
        async with self._lock:
            while self._queue and not self._power.off:
                await self._destage_next()
            if self._power.off:
                return
            layer = self._volatile.freeze()
            copy = partial(self._volatile.copy_down, layer)
            await trio.to_thread.run_sync(copy, limiter=self._thread)
            self._volatile.destaged(layer)

    async def settled(self) -> int:
        """Wait for the destaging that is at work, and return how many bytes are still held."""
        async with self._lock:
            return self._volatile.held_bytes

    async def _destage_next(self) -> None:
        """Write through the cache what the oldest of the queue covers.

        Its completion is recorded before the next one, or a cut, may begin.
        """
        destage = self._queue[0]
        failure = destage.drops
        try:
            # Its client may go meanwhile: what is at work below must be over before the next.
            with trio.CancelScope(shield=True):
                await self._copy_down(destage)
        except OSError as failed:
            failure = failure_of(failed)
        except RecordingError as full:
            self._fail(full)
            failure = NOT_RECORDED
        destage.failure = destage.record(failure)
        destage.over = True
        self._queue.popleft()

    async def _copy_down(self, destage: Destage) -> None:
        if destage.drops is not None:
            self._volatile.drop(destage.line)
        elif destage.ticket is not None:
            copy = partial(self._volatile.copy_ticket_down, destage.ticket, sync=destage.promised)
            await trio.to_thread.run_sync(copy, limiter=self._thread)
            self._volatile.ticket_destaged(destage.ticket)
        else:
            copy = partial(self._volatile.copy_down, destage.line)
            await trio.to_thread.run_sync(copy, limiter=self._thread)
            self._volatile.destaged(destage.line)


def _as_it_ended(failure: RequestFailure | None) -> RequestFailure | None:
    """Record nothing."""
    return failure
