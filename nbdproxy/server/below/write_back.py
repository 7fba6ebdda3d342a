"""A volatile cache that writes back on its own: what is over its window, or older than its age.

Which write goes next depends on the order of requests and on the seed only; just the age looks at
the clock. A write-back promises nothing: it is not synced, and no reply tells of it.
"""

from __future__ import annotations

from collections import deque

import trio

from nbdproxy.dice import draw_below
from nbdproxy.disks.volatile import VolatileDisk
from nbdproxy.policy.model import VolatileCache, WriteBackOrder
from nbdproxy.server.below.destage_queue import Destage, DestageQueue
from nbdproxy.server.shared.complaints import disk_complaints


class NoWriteBack:
    """That of a cache which only flushes and FUA requests destage."""

    def held(self, length: int) -> None:
        """Do nothing."""

    def covered(self) -> None:
        """Do nothing."""

    async def run(self) -> None:
        """Do nothing."""


NO_WRITE_BACK = NoWriteBack()


class WriteBack(NoWriteBack):
    """The write-backs of one cache."""

    def __init__(
        self, volatile: VolatileDisk, queue: DestageQueue, cache: VolatileCache, seed: int
    ) -> None:
        self._volatile = volatile
        self._destages = queue
        self._cache = cache
        self._seed = seed
        # Bytes, and when it was held, of each write that nothing covers, by ascending order.
        self._pending: dict[int, tuple[int, float]] = {}
        self._bytes = 0
        self._queued: deque[Destage] = deque()
        self._turn = 0
        self._wake = trio.Event()

    def held(self, length: int) -> None:
        """Take note of the write that was held last, and queue what is over the window."""
        self._pending[self._volatile.newest_order] = (length, trio.current_time())
        self._bytes += length
        while self._cache.window is not None and self._bytes > self._cache.window:
            self._queue(self._pick())
        if self._cache.age_s is not None:
            self._wake.set()

    def covered(self) -> None:
        """Take note that a flush covers all that is held."""
        self._pending.clear()
        self._bytes = 0

    def _pick(self) -> int:
        match self._cache.order:
            case WriteBackOrder.OLDEST:
                return next(iter(self._pending))
            case WriteBackOrder.NEWEST:
                return next(reversed(self._pending))
            case WriteBackOrder.RANDOM:
                self._turn += 1
                orders = list(self._pending)
                return orders[draw_below(len(orders), self._seed, "write-back", self._turn)]

    def _queue(self, order: int) -> None:
        length, _ = self._pending.pop(order)
        self._bytes -= length
        try:
            self._queued.append(self._destages.add_write_back(order))
        except KeyError:  # a FUA write over it was destaged
            return
        self._wake.set()

    async def run(self) -> None:
        """Write back, until cancelled or the power goes."""
        while True:
            with trio.move_on_after(self._patience()):
                await self._wake.wait()
            self._wake = trio.Event()
            now = trio.current_time()
            age = self._cache.age_s
            while age is not None and self._pending:
                order, (_, since) = next(iter(self._pending.items()))
                if since + age > now:
                    break
                self._queue(order)
            if not await self.settle():
                return

    async def settle(self) -> bool:
        """Write back all that is queued; False if the power went before."""
        while self._queued:
            destage = self._queued[0]
            failure = await self._destages.finish(destage)
            if not destage.over:
                return False
            self._queued.popleft()
            if failure is not None:
                # It stays held, and goes with the next flush.
                disk_complaints.warn("a write-back failed", failure.text)
        return True

    def _patience(self) -> float:
        """Return the seconds until the oldest write is of age."""
        if self._cache.age_s is None or not self._pending:
            return float("inf")
        _, since = next(iter(self._pending.values()))
        return max(0.0, since + self._cache.age_s - trio.current_time())
