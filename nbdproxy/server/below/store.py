"""`Store`, what an export asks of what is below it; `StackedStore`, which stands on another one.

A request is tried at once, in the event loop (`try_read`, `try_change`: what the page cache can
do); where that would block it is awaited (`read`, `change`). Stores stack as nbdkit's filters do:

    FaultyStore             reads show other bytes than the store below holds
    CachedStore             a volatile cache over a disk
    CopyBeforeWriteStore    what is there is recorded before it is changed
    ImageStore              a disk of this machine: a file, an overlay, memory
    RemoteStore             the disk of another NBD server

Offsets and lengths are bytes. All methods belong to the event loop, but for those that say that
they block. A read or change that fails raises OSError, or RecordingError for a before-image that
could not be recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.policy.engine import Decision
from nbdproxy.requests import Request
from nbdproxy.server.below.failures import RequestFailure, failure_of
from nbdproxy.server.below.syncer import Syncer
from nbdproxy.server.shared.power import Power

Record = Callable[[RequestFailure | None], RequestFailure | None]
"""Records how a request ended; returns what the client is told, which may be worse."""

Promise = Callable[[], Awaitable[RequestFailure | None]]
"""Makes durable what a FLUSH or FUA request covers and records how that ended, unless the power
went before; returns what the client is told."""

Over = Callable[[bool], None]
"""Is told when a change is over, and whether it was done."""


class Store(ABC):
    """A disk as an export sees it. The defaults are those of a store with nothing held or hidden.

    disk      the same disk for ordinary code, whose calls block
    power     the supply that cuts it off
    try_read  fills a buffer from an offset if that does not block; False leaves it undefined
    waits     True where nothing can be done at once, so that trying is not worth the while
    """

    disk: BlockDevice
    power: Power
    try_read: Callable[[int, memoryview], bool]
    waits = False

    @abstractmethod
    def try_change(self, request: Request, seq: int, /) -> bool:
        """Do a WRITE, WRITE_ZEROES or TRIM if that does not block; False changes nothing.

        `seq` is its place in the recording.
        """

    @abstractmethod
    async def read(self, offset: int, buffer: memoryview, decision: Decision | None, /) -> None:
        """Fill `buffer` from `offset`; `decision` is what a rule decided on the READ."""

    @abstractmethod
    async def change(
        self, request: Request, seq: int, decision: Decision | None, over: Over, /
    ) -> None:
        """Do a WRITE, WRITE_ZEROES or TRIM.

        `over` is called as soon as a later change of the range may begin, whatever becomes of this
        one; that may be after the caller was cancelled.
        """

    @abstractmethod
    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Return a BLOCK_STATUS's (length, flags of base:allocation)."""

    @abstractmethod
    async def will_need(self, offset: int, length: int) -> None:
        """Take the hint that a range is going to be read."""

    @abstractmethod
    def flush(self, line: int, record: Record, drops: RequestFailure | None, /) -> Promise:
        """Take a FLUSH that covers what is above `line`; `drops` is how it is to fail, if it is."""

    @abstractmethod
    def fua(self, record: Record) -> Promise:
        """Take note that the change that was done last is to be durable."""

    @abstractmethod
    async def sync(self) -> None:
        """Make everything durable, held or not, without a FLUSH of a client."""

    def draw_line(self) -> int:
        """Draw the line under what a FLUSH that was received just now covers; return its number."""
        return 0

    async def prepare(self, changes: Sequence[Request]) -> None:  # noqa: B027 - the default
        """Wait for what `try_change` would block on; may fail as that would."""

    async def run(self) -> None:
        """Do what the store does on its own, until cancelled."""
        await trio.sleep_forever()

    @property
    def in_threads(self) -> bool:
        """Whether a thread is at work on the disk."""
        return False

    @property
    def held_bytes(self) -> int:
        """How many bytes a cut of the power would take back now."""
        return 0

    @property
    def shown_bytes(self) -> int:
        """How many bytes of the disk read otherwise than they are."""
        return 0

    async def settled(self) -> int:
        """After a cut: return how many bytes are held, when nothing is destaged any more."""
        return 0

    async def leave_survivors(self) -> str:
        """After a cut: let on the disk what survives it; return what the recording says of it."""
        return ""

    def lift(self) -> bool:
        """Let reads show what the disk holds; False for a store that never shows anything else."""
        return False

    def bake(self, disk: BlockDevice) -> None:  # noqa: B027 - the default
        """Write what reads show otherwise to a disk; blocks."""

    def close(self) -> None:  # noqa: B027 - the default
        """Forget what is held and shown; the disk is its owner's."""


class StackedStore(Store):
    """A store on another one, to which it hands on all that it does not do itself."""

    def __init__(self, below: Store) -> None:
        self._below = below
        self.disk = below.disk
        self.power = below.power
        self.waits = below.waits
        self.try_read = below.try_read

    def try_change(self, request: Request, seq: int, /) -> bool:
        """Hand it on."""
        return self._below.try_change(request, seq)

    async def read(self, offset: int, buffer: memoryview, decision: Decision | None, /) -> None:
        """Hand it on."""
        await self._below.read(offset, buffer, decision)

    async def change(
        self, request: Request, seq: int, decision: Decision | None, over: Over, /
    ) -> None:
        """Hand it on."""
        await self._below.change(request, seq, decision, over)

    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Hand it on."""
        return await self._below.status(request)

    async def will_need(self, offset: int, length: int) -> None:
        """Hand it on."""
        await self._below.will_need(offset, length)

    def flush(self, line: int, record: Record, drops: RequestFailure | None, /) -> Promise:
        """Hand it on."""
        return self._below.flush(line, record, drops)

    def fua(self, record: Record) -> Promise:
        """Hand it on."""
        return self._below.fua(record)

    async def sync(self) -> None:
        """Hand it on."""
        await self._below.sync()

    def draw_line(self) -> int:
        """Hand it on."""
        return self._below.draw_line()

    async def prepare(self, changes: Sequence[Request]) -> None:
        """Hand it on."""
        await self._below.prepare(changes)

    async def run(self) -> None:
        """Hand it on."""
        await self._below.run()

    @property
    def in_threads(self) -> bool:
        """Whether a thread is at work below."""
        return self._below.in_threads

    @property
    def held_bytes(self) -> int:
        """What is held below."""
        return self._below.held_bytes

    async def settled(self) -> int:
        """Hand it on."""
        return await self._below.settled()

    async def leave_survivors(self) -> str:
        """Hand it on."""
        return await self._below.leave_survivors()

    def close(self) -> None:
        """Hand it on."""
        self._below.close()


class Flushes:
    """The promises of a store without a cache: `sync` makes durable what was done, for all at once.

    A promise covers what was done before it was made, so that a sync begun later keeps it.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]], power: Power) -> None:
        self._syncer = Syncer(sync)
        self._power = power
        self.sync = self._syncer.sync

    def promise(self, record: Record, drops: RequestFailure | None = None) -> Promise:
        """Return the promise to make durable what was done by now.

        `drops` is how a FLUSH is to fail: nothing is held that it could drop, so it only fails.
        """
        if drops is not None:
            return self.answer(record, drops)
        return partial(self._keep, self._syncer.ask(), record)

    def answer(self, record: Record, failure: RequestFailure | None = None) -> Promise:
        """Return one for which nothing has to be done."""
        return partial(self._answer, record, failure)

    async def _keep(self, asked: int, record: Record) -> RequestFailure | None:
        failure = None
        try:
            await self._syncer.done(asked)
        except OSError as error:
            failure = failure_of(error)
        return await self._answer(record, failure)

    async def _answer(
        self, record: Record, failure: RequestFailure | None
    ) -> RequestFailure | None:
        return failure if self._power.off else record(failure)
