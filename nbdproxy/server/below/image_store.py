"""A disk of this machine as a store: a file, a block device, an overlay, memory.

What the page cache can do is done at once; all else is done in threads of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TypeVar

import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.extents import Extent
from nbdproxy.nbd.constants import MAX_EXTENTS, BlockState
from nbdproxy.policy.engine import Decision
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.below.failures import RequestFailure
from nbdproxy.server.below.store import Flushes, Over, Promise, Record, Store
from nbdproxy.server.shared.power import Power

# Plain integers, for speed: every change goes through `change_disk`.
_WRITE, _WRITE_ZEROES = int(Command.WRITE), int(Command.WRITE_ZEROES)
_NO_HOLE, _FAST_ZERO = int(CommandFlag.NO_HOLE), int(CommandFlag.FAST_ZERO)
_HOLE = int(BlockState.HOLE | BlockState.ZERO)
T = TypeVar("T")

_THREADS = 16
"""Threads that read, change and map one disk."""


class ImageStore(Store):
    """`disk`, which the caller owns; `power` is a supply of its own unless it is given."""

    def __init__(self, disk: BlockDevice, power: Power | None = None) -> None:
        self.disk = disk
        self.power = power or Power()
        self.try_read = disk.try_pread_into
        # Of its own: another disk that hangs must not take all threads there are.
        self._threads = trio.CapacityLimiter(_THREADS)
        self._syncing = trio.CapacityLimiter(1)
        self._flushes = Flushes(self._sync, self.power)

    def try_change(self, request: Request, _seq: int, /) -> bool:
        """Write, or have zeroes made; False where zeroes would have to be written."""
        if request.command == _WRITE:
            self.disk.pwrite(request.offset, request.payload)
            return True
        try:
            change_disk(self.disk, request, fast=True)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not request.flags & _FAST_ZERO:
                return False
            raise
        return True

    async def read(self, offset: int, buffer: memoryview, _decision: Decision | None, /) -> None:
        """Read in a thread."""
        await self._in_thread(self.disk.pread_into, offset, buffer)

    async def change(
        self, request: Request, _seq: int, _decision: Decision | None, over: Over, /
    ) -> None:
        """Do it in a thread."""
        done = False
        try:
            await self._in_thread(change_disk, self.disk, request)
            done = True
        finally:
            over(done)

    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Map the range in a thread."""
        most = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        data = self.disk.data_extents(request.offset, request.length)
        return await self._in_thread(allocation, data, request, most)

    async def will_need(self, offset: int, length: int) -> None:
        """Have it read ahead."""
        await self._in_thread(self.disk.will_need, offset, length)

    def flush(self, _line: int, record: Record, drops: RequestFailure | None, /) -> Promise:
        """Promise a sync."""
        return self._flushes.promise(record, drops)

    def fua(self, record: Record) -> Promise:
        """Promise a sync."""
        return self._flushes.promise(record)

    async def sync(self) -> None:
        """Sync the disk."""
        await self._flushes.sync()

    @property
    def in_threads(self) -> bool:
        """Whether a thread is at work on the disk."""
        return bool(self._threads.borrowed_tokens or self._syncing.borrowed_tokens)

    async def _sync(self) -> None:
        await trio.to_thread.run_sync(self.disk.sync, limiter=self._syncing)

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)


def change_disk(disk: BlockDevice, request: Request, *, fast: bool = False) -> None:
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
