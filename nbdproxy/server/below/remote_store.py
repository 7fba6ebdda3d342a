"""The disk of another NBD server as a store: every request is passed on, and waited for.

Flags go down as they came, FUA too, and errors come up as they were told.
"""

from __future__ import annotations

from functools import partial

from nbdproxy.disks.device import BlockDevice
from nbdproxy.nbd.constants import MAX_EXTENTS
from nbdproxy.policy.engine import Decision
from nbdproxy.requests import CommandFlag, Request
from nbdproxy.server.below.failures import RequestFailure
from nbdproxy.server.below.store import Flushes, Over, Promise, Record, Store
from nbdproxy.server.below.upstream import Upstream
from nbdproxy.server.shared.power import Power


class RemoteStore(Store):
    """What `upstream` serves; `disk` is the same for ordinary code in trio's threads."""

    waits = True

    def __init__(self, upstream: Upstream, disk: BlockDevice, power: Power) -> None:
        self.disk = disk
        self.power = power
        self.try_read = disk.try_pread_into
        self._upstream = upstream
        self._flushes = Flushes(upstream.flush, power)

    def try_change(self, _request: Request, _seq: int, /) -> bool:
        """Say no: another server is always waited for."""
        return False

    async def read(self, offset: int, buffer: memoryview, _decision: Decision | None, /) -> None:
        """Pass a READ on."""
        await self._upstream.read_into(offset, buffer)

    async def change(
        self, request: Request, _seq: int, _decision: Decision | None, over: Over, /
    ) -> None:
        """Pass it on; what a change that failed left there is not known, so it counts as done."""
        await self._upstream.change(request, partial(over, True))

    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Pass a BLOCK_STATUS on."""
        most = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        return (await self._upstream.status(request))[:most]

    async def will_need(self, offset: int, length: int) -> None:
        """Pass a CACHE on."""
        await self._upstream.will_need(offset, length)

    def flush(self, _line: int, record: Record, drops: RequestFailure | None, /) -> Promise:
        """Promise a FLUSH below."""
        return self._flushes.promise(record, drops)

    def fua(self, record: Record) -> Promise:
        """Do nothing more: FUA has gone down with the change."""
        return self._flushes.answer(record)

    async def sync(self) -> None:
        """Pass a FLUSH on."""
        await self._flushes.sync()
