"""Finds whose payload a position of the data stream is in, and remembers what was verified."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]


class PayloadIndex:
    """The payloads of one kind of event, in the order recorded; position -1 is none.

    Payloads are appended as their events are, so positions ascend. Nine bytes an event.
    """

    def __init__(self, seq: Column, position: Column, length: Column) -> None:
        self._seq = seq
        self._length = length
        self._reach = np.maximum.accumulate(position) if len(position) else position
        self._verified = bytearray(len(seq))

    def unverified(self, position: int) -> tuple[int, int] | None:
        """Return row and seq of the event whose payload `position` is in, if it is one of these.

        None also once the row was passed to `verified`.
        """
        last = int(np.searchsorted(self._reach, position, "right")) - 1
        if last < 0 or self._reach[last] < 0:
            return None
        row = int(np.searchsorted(self._reach, self._reach[last], "left"))
        inside = position < int(self._reach[row]) + int(self._length[row])
        if not inside or self._verified[row]:
            return None
        return row, int(self._seq[row])

    def verified(self, row: int) -> None:
        """Remember that a row's payload is what was recorded."""
        self._verified[row] = 1
