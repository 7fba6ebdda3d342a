"""Finds whose payload a position of the data stream is in, and remembers what was verified."""

from __future__ import annotations

import numpy as np

from nbdproxy.recording.index import Numbers, Positions

_STEP = 1024
"""Rows between two entries of the index."""


class PayloadIndex:
    """The payloads of one kind of event, in the order recorded; position -1 is none.

    Payloads are appended as their events are, so positions ascend. One byte an event.
    """

    def __init__(self, seq: Positions, position: Numbers, length: Numbers) -> None:
        self._seq = seq
        self._length = length
        self._position = position
        # The greatest position up to the end of each step.
        starts = np.arange(0, len(position), _STEP)
        self._most = (
            np.maximum.accumulate(np.maximum.reduceat(position, starts))
            if len(position)
            else position
        )
        self._verified = bytearray(len(seq))

    def unverified(self, position: int) -> tuple[int, int] | None:
        """Return row and seq of the event whose payload `position` is in, if it is one of these.

        None also once the row was passed to `verified`.
        """
        row = self._last_from(position)
        if row is None or self._verified[row]:
            return None
        inside = position < int(self._position[row]) + int(self._length[row])
        return (row, int(self._seq[row])) if inside else None

    def _last_from(self, position: int) -> int | None:
        """Return the last row whose payload begins at `position` or before."""
        step = int(np.searchsorted(self._most, position, "right"))
        if step < len(self._most):
            part = self._position[step * _STEP : (step + 1) * _STEP]
            fits = np.flatnonzero((part >= 0) & (part <= position))
            if len(fits):
                return step * _STEP + int(fits[-1])
        if step == 0 or self._most[step - 1] < 0:
            return None
        step = int(np.searchsorted(self._most, self._most[step - 1], "left"))
        return step * _STEP + int(np.argmax(self._position[step * _STEP : (step + 1) * _STEP]))

    def verified(self, row: int) -> None:
        """Remember that a row's payload is what was recorded."""
        self._verified[row] = 1
