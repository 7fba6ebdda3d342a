"""Stops an export for a while: nothing new is begun, and what was begun is finished first."""

from __future__ import annotations

import trio


class Gate:
    """Open until `close`. `shut` is read in hot paths, so it is a plain flag."""

    def __init__(self) -> None:
        self.shut = False
        self._opened = trio.Event()
        self._inside = 0
        self._empty = trio.Event()

    async def passed(self) -> None:
        """Return when the gate is open."""
        while self.shut:
            await self._opened.wait()

    def enter(self) -> None:
        """Count one more that has to be finished before a pause."""
        self._inside += 1

    def leave(self) -> None:
        """Count one less."""
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    def close(self) -> None:
        """Let what comes from now on wait in `passed`."""
        if not self.shut:
            self.shut = True
            self._opened = trio.Event()

    async def emptied(self) -> None:
        """Return when all that was begun is finished."""
        while self._inside:
            self._empty = trio.Event()
            await self._empty.wait()

    def open(self) -> None:
        """Let what waits go on."""
        self.shut = False
        self._opened.set()
