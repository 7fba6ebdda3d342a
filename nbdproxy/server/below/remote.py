"""What an export needs of a disk behind another NBD server, which is always waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.requests import Request


class Remote(Protocol):
    """A disk to which requests are passed on with their flags; errors are `ToldError`."""

    @property
    def info(self) -> ExportInfo:
        """What its server told of it."""
        ...

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        ...

    async def change(self, request: Request, release: Callable[[], None]) -> None:
        """Pass a WRITE, WRITE_ZEROES or TRIM on; `release` is called when it is over there.

        That may be later than the return, if the caller is cancelled.
        """
        ...

    async def flush(self) -> None:
        """Pass a FLUSH on."""
        ...

    async def will_need(self, offset: int, length: int) -> None:
        """Pass a CACHE on."""
        ...

    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Pass a BLOCK_STATUS on; return (length in bytes, flags of base:allocation)."""
        ...
