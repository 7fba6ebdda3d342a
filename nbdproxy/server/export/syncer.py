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
        self._error: OSError | None = None

    async def sync(self) -> None:
        """Return when everything written before this call is durable.

        Raises OSError if it could not be made so; everybody who shared the attempt gets it,
        because the kernel reports such an error only once.
        """
        self._asked += 1
        mine = self._asked
        async with self._lock:
            if mine <= self._failed and self._error is not None:
                raise self._error
            if mine <= self._done:
                return
            covered = self._asked
            try:
                await self._really()
            except OSError as error:
                self._failed, self._error = covered, error
                raise
            self._done = covered
