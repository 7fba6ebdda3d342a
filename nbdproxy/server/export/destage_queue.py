"""What flushes, FUA requests and write-backs land of a volatile cache, one after the other.

They land in the order in which they were received, whatever becomes of their connections: so
nothing lands with a flush that is not completed yet, and an older write never lands over a newer
one. A cut lets the landing that is at work finish; after it nothing lands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import trio

from nbdproxy.disks.volatile import VolatileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.server.export.jobs import NOT_RECORDED, Destage, RequestFailure, failure_of
from nbdproxy.server.power import Power


class DestageQueue:
    """The queue of landings of one cache.

    `complete` records an outcome and returns what the client is told, which may be worse;
    `fail` is told of a recording that is full.
    """

    def __init__(
        self,
        volatile: VolatileDisk,
        power: Power,
        *,
        complete: Callable[[Destage, RequestFailure | None], RequestFailure | None],
        fail: Callable[[RecordingError], None],
    ) -> None:
        self._volatile = volatile
        self._power = power
        self._complete = complete
        self._fail = fail
        self._lock = trio.Lock()
        # Of its own: it must not wait for threads that wait for another server.
        self._thread = trio.CapacityLimiter(1)
        # Those that were received and are not down yet, in the order received.
        self._queue: deque[Destage] = deque()

    def add_flush(
        self, connection: int, seq: int, layer: int | None, *, drops: RequestFailure | None = None
    ) -> Destage:
        """Queue a flush that covers all layers up to `layer`, as `freeze` numbered them."""
        return self._add(Destage(connection, seq, layer=layer, drops=drops))

    def add_fua(self, connection: int, seq: int) -> Destage:
        """Queue the write that was held last."""
        return self._add(Destage(connection, seq, ticket=self._volatile.issue_ticket()))

    def add_write_back(self, order: int) -> Destage:
        """Queue the held write of this order number, if it is still held, as the cache's own."""
        return self._add(Destage(0, -1, ticket=self._volatile.issue_ticket(order)))

    def _add(self, landing: Destage) -> Destage:
        self._queue.append(landing)
        return landing

    async def land(self, landing: Destage) -> bool:
        """Land everything up to `landing`; False if the power went before.

        Whoever comes first lands what was received earlier, too, even if its client is gone.
        """
        async with self._lock:
            while not landing.over:
                if self._power.off:
                    return False
                await self._land_next()
        return True

    @property
    def in_thread(self) -> bool:
        """Whether a landing is at work."""
        return bool(self._thread.borrowed_tokens)

    async def sync(self) -> None:
        """Land what is queued and then all that is held, unless the power goes."""
        async with self._lock:
            while self._queue and not self._power.off:
                await self._land_next()
            if self._power.off:
                return
            layer = self._volatile.freeze()
            copy = partial(self._volatile.copy_down, layer)
            await trio.to_thread.run_sync(copy, limiter=self._thread)
            self._volatile.landed(layer)

    async def settled(self) -> int:
        """Wait for the landing that is at work, and return how many bytes are still held."""
        async with self._lock:
            return self._volatile.held_bytes

    async def _land_next(self) -> None:
        """Write through the cache what the oldest flush or FUA request covers.

        Its completion is recorded before the next landing, or a cut, may begin.
        """
        landing = self._queue[0]
        failure = landing.drops
        try:
            # Its client may go meanwhile: what is at work below must be over before the next.
            with trio.CancelScope(shield=True):
                await self._copy_down(landing)
        except OSError as failed:
            failure = failure_of(failed)
        except RecordingError as full:
            self._fail(full)
            failure = NOT_RECORDED
        promised = landing.seq >= 0
        landing.failure = self._complete(landing, failure) if promised else failure
        landing.over = True
        self._queue.popleft()

    async def _copy_down(self, landing: Destage) -> None:
        if landing.drops is not None:
            self._volatile.drop(landing.layer or 0)
        elif landing.ticket is not None:
            promised = landing.seq >= 0
            copy = partial(self._volatile.copy_ticket_down, landing.ticket, sync=promised)
            await trio.to_thread.run_sync(copy, limiter=self._thread)
            self._volatile.ticket_landed(landing.ticket)
        elif landing.layer is not None:
            copy = partial(self._volatile.copy_down, landing.layer)
            await trio.to_thread.run_sync(copy, limiter=self._thread)
            self._volatile.landed(landing.layer)
