"""A disk behind a volatile write cache: what no flush covered is held, and a power cut takes it.

Reads see what is held. FLUSH and FUA requests destage what they cover in the order in which they
were received (`destage_queue.py`), and the cache may write back on its own (`write_back.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.volatile import VolatileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.policy.engine import Decision
from nbdproxy.policy.model import Policy, Survivors
from nbdproxy.policy.survival import surviving
from nbdproxy.requests import Request
from nbdproxy.server.below.destage_queue import DestageQueue
from nbdproxy.server.below.failures import RequestFailure
from nbdproxy.server.below.image_store import ImageStore, change_disk
from nbdproxy.server.below.store import Over, Promise, Record
from nbdproxy.server.below.write_back import NO_WRITE_BACK, WriteBack
from nbdproxy.server.shared.power import Power

_MANY = 4096
"""Positions in the recording that are remembered before those of destaged writes are dropped."""

_LISTED = 1000
"""Surviving pieces that are listed one by one in the recording."""


class CachedStore(ImageStore):
    """The cache of `policy` over `disk`, which the caller owns.

    `fail` is told of a recording that is full; `metadata` is what an adversary among `Survivors`
    takes for metadata.
    """

    def __init__(
        self,
        disk: BlockDevice,
        policy: Policy,
        power: Power,
        *,
        seed: int = 0,
        metadata: ExtentSet,
        fail: Callable[[RecordingError], None],
    ) -> None:
        self._survives = policy.cut.survives
        self._history = policy.cache.writes_back or self._survives is not Survivors.FLUSHED
        self._volatile = VolatileDisk(disk, history=self._history)
        super().__init__(self._volatile, power)
        self._seed = seed
        self._metadata = metadata
        self._queue = DestageQueue(self._volatile, power, fail=fail)
        self._write_back = (
            WriteBack(self._volatile, self._queue, policy.cache, seed)
            if policy.cache.writes_back
            else NO_WRITE_BACK
        )
        # Where the recording has each held write, by its order in the cache.
        self._seqs: dict[int, int] = {}

    def try_change(self, request: Request, seq: int, /) -> bool:
        """Hold the change; that never blocks."""
        change_disk(self._volatile, request)
        if self._history:
            self._remember(request, seq)
        return True

    async def change(
        self, request: Request, seq: int, _decision: Decision | None, over: Over, /
    ) -> None:
        """Hold the change, in the event loop, unless the power went meanwhile."""
        done = False
        try:
            done = not self.power.off and self.try_change(request, seq)
        finally:
            over(done)

    def _remember(self, request: Request, seq: int) -> None:
        """Take note of where the recording has the change that is held since just now."""
        self._seqs[self._volatile.newest_order] = seq
        if len(self._seqs) > _MANY:
            left = {ticket.held.order for ticket in self._volatile.writes()}
            if len(left) < _MANY // 2:
                self._seqs = {order: seq for order, seq in self._seqs.items() if order in left}
        self._write_back.held(request.length)

    def draw_line(self) -> int:
        """Freeze what is held."""
        self._write_back.covered()
        return self._volatile.freeze()

    def flush(self, line: int, record: Record, drops: RequestFailure | None, /) -> Promise:
        """Queue the destaging of all above the line, or the dropping of it."""
        return partial(self._queue.finish, self._queue.add_flush(line, record, drops=drops))

    def fua(self, record: Record) -> Promise:
        """Queue the destaging of the change that was held last."""
        return partial(self._queue.finish, self._queue.add_fua(record))

    async def sync(self) -> None:
        """Destage all that is queued, and then all that is held."""
        await self._queue.sync()

    async def run(self) -> None:
        """Write back, as long as the power is on."""
        await self._write_back.run()
        await trio.sleep_forever()

    @property
    def in_threads(self) -> bool:
        """Whether a thread is at work on the disk, for destaging too."""
        return super().in_threads or self._queue.in_thread

    @property
    def held_bytes(self) -> int:
        """How many bytes a cut of the power would take back now."""
        return self._volatile.held_bytes

    async def settled(self) -> int:
        """After a cut: wait for the destaging that is at work; return how many bytes are held."""
        return await self._queue.settled()

    async def leave_survivors(self) -> str:
        """After a cut: destage what survives it, as the policy draws; return that as JSON."""
        if self._survives is Survivors.FLUSHED:
            return ""
        tickets = self._volatile.writes()
        writes = [Extent(ticket.offset, ticket.length) for ticket in tickets]
        pieces = surviving(self._survives, writes, self._seed, self._metadata)
        chosen = [(tickets[piece.write], piece.start, piece.end) for piece in pieces]
        await trio.to_thread.run_sync(self._volatile.destage_pieces, chosen)
        listed = [
            [self._seqs.get(ticket.held.order), start, end - start]
            for ticket, start, end in chosen[:_LISTED]
        ]
        facts = {"action": "survive", "survives": self._survives.value, "held": len(writes)}
        facts |= {"pieces": len(pieces), "seq_offset_length": listed}
        return json.dumps(facts)

    def close(self) -> None:
        """Drop what is held."""
        self._volatile.release()
