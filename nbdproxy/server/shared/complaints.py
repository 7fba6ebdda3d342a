"""What is said in the log of clients and of a disk that fails, for every request perhaps.

A flood of that must not fill the disk that the log is on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Complaints:
    """Warnings: `burst` of them at once, and then one a second, which says how many were not."""

    def __init__(self, burst: int = 200, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._clock = clock
        self._left = float(burst)
        self._at = clock()
        self._unsaid = 0

    def warn(self, what: str, reason: str, **where: object) -> None:
        """Say what is wrong, and with which client or place; or count it."""
        now = self._clock()
        self._left, self._at = min(self._burst, self._left + now - self._at), now
        if self._left < 1:
            self._unsaid += 1
            return
        self._left -= 1
        more = {"unsaid": self._unsaid} if self._unsaid else {}
        self._unsaid = 0
        log.warning(what, **where, reason=reason, **more)


complaints = Complaints()
"""What this process says of clients."""
disk_complaints = Complaints()
"""What it says of disks: no flood of clients' faults hides that."""
