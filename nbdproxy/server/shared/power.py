"""The power supply of all exports that are served together: a simulated cut takes them all."""

from __future__ import annotations

import trio


class PowerLostError(Exception):
    """The power was cut while something was at work; ends that without an error to tell."""


class Power:
    """On until it is cut, once and for all. `off` is read in hot paths, so it is a plain flag."""

    def __init__(self) -> None:
        self.off = False
        self.reason = ""
        self._gone = trio.Event()

    def cut(self, reason: str) -> None:
        """Begin a cut: from now on no request is taken and no reply leaves."""
        if not self.off:
            self.off = True
            self.reason = reason
            self._gone.set()

    async def wait_off(self) -> None:
        """Return when the power is cut."""
        await self._gone.wait()
