"""What a disk showed before the last write of each place, for reads that get stale data.

Only kept where a policy asks for it. Belongs to one thread.
"""

from __future__ import annotations

import os

from nbdproxy.disks.scratch import close_scratch, open_scratch, write_scratch
from nbdproxy.extents import ExtentMap


class Past:
    """The version before the present one, wherever there was a write."""

    def __init__(self) -> None:
        self._scratch = open_scratch()
        self._end = 0
        self._old: ExtentMap[int] = ExtentMap(lambda position, count: position + count)

    def keep(self, offset: int, old: bytes) -> None:
        """Remember what a place showed until now."""
        write_scratch(self._scratch, old, self._end)
        self._old.set(offset, offset + len(old), self._end)
        self._end += len(old)

    def patch(self, offset: int, buffer: memoryview) -> bool:
        """Put the version before into `buffer`, read from `offset`; tell whether there is any."""
        changed = False
        for start, end, position in self._old.overlapping(offset, offset + len(buffer)):
            os.preadv(self._scratch, [buffer[start - offset : end - offset]], position)
            changed = True
        return changed

    def close(self) -> None:
        """Forget everything; closing twice is harmless."""
        scratch, self._scratch = self._scratch, -1
        close_scratch(scratch)


class NoPast:
    """That of a disk of which no read gets stale data: nothing is kept."""

    def keep(self, offset: int, old: bytes) -> None:
        """Do nothing."""

    def patch(self, offset: int, buffer: memoryview) -> bool:  # noqa: ARG002 - as `Past`
        """Put nothing into it."""
        return False

    def close(self) -> None:
        """Do nothing."""
