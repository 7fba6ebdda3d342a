"""Warnings of the log that may come with every request, at a bounded rate.

A client or a failing disk must not fill the disk that the log is on.
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
        """Log a warning with its reason and where; count it where there are too many."""
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
"""Warnings of what clients do."""
disk_complaints = Complaints()
"""Warnings of disks: no flood of those of clients hides them."""
