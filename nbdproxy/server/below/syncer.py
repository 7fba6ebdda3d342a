"""Shares one sync among all who asked for it before it began."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Syncer:
    """Makes a disk durable as seldom as is correct; `sync` is what really does it."""

    def __init__(self, sync: Callable[[], Awaitable[None]]) -> None:
        self._really = sync
        self._lock = trio.Lock()
        self._asked = 0
        self._done = 0
        self._failed = 0
        self._error = OSError()

    def ask(self) -> int:
        """Ask for everything written so far to become durable; return the number of the wish."""
        self._asked += 1
        return self._asked

    async def done(self, asked: int) -> None:
        """Return when what was asked for is durable.

        Raises OSError if it could not be made so; everybody who shared the attempt gets it,
        because the kernel reports such an error only once.
        """
        async with self._lock:
            if asked <= self._failed:
                raise self._error
            if asked <= self._done:
                return
            covered = self._asked
            try:
                await self._really()
            except OSError as error:
                self._failed, self._error = covered, error
                raise
            self._done = covered

    async def sync(self) -> None:
        """Return when everything written before this call is durable; raises OSError."""
        await self.done(self.ask())
