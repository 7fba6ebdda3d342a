"""`TouchIndex`: which requests touch a range of the disk, the newest first.

Built once for a recording, in time n log n; asked in microseconds, however long the recording is.
Each request is entered in at most two cells of a grid whose cells are at least as long as it is: at
level k they are 4096 * 2^k bytes long. At most 24 bytes a request stay, 12 for most.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nbdproxy.recording.index import RequestTable, Rows

_BLOCK_BITS = 12
_LEVEL_BITS = 52
"""A key is the level above these bits, and the cell's number below."""
_TAKE = 64
"""So many of a cell's newest requests are looked at first; four times as many each time after."""


class TouchIndex:
    """The changing requests of a table by the places they touch; empty ones touch nothing."""

    def __init__(self, table: RequestTable) -> None:
        self._offset, self._length = table.offset, table.length
        rows = np.flatnonzero(table.is_changing).astype(np.int32)
        first = table.offset[rows] >> _BLOCK_BITS
        last = (table.offset[rows] + table.length[rows] - 1) >> _BLOCK_BITS
        # The least level whose cells are as long as the request's run of blocks.
        level = np.frexp((last - first).astype(np.float64))[1].astype(np.int64)
        first >>= level
        last >>= level
        two = np.flatnonzero(first != last)
        first += level << _LEVEL_BITS
        last += level << _LEVEL_BITS
        keys = np.concatenate((first, last[two]))
        del first, last
        entries = np.concatenate((rows, rows[two]))
        del rows
        # Stable, so that within a cell rows ascend; a row is entered in a cell only once.
        order = np.lexsort((entries, keys)) if len(two) else np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._rows = entries[order]
        self._levels = np.unique(level)

    def newest_first(self, start: int, end: int, before: int) -> Iterator[Rows]:
        """Yield the rows below `before` that touch [start, end), descending, in batches.

        What comes in the first batch is usually enough, and the rest is then never looked for.
        """
        spans = self._spans(start, end)
        take = _TAKE
        while spans:
            parts, floor = [], -1
            for low, end_of_cell, alone in spans:
                high = self._up_to(low, end_of_cell, alone, before)
                cut = max(low, high - take) if alone else low
                parts.append(self._rows[cut:high])
                if cut > low:
                    # What is left out of this cell is older than this; the rest comes later.
                    floor = max(floor, int(self._rows[cut]))
            found: Rows = np.unique(np.concatenate(parts))
            found = found[np.searchsorted(found, floor) : np.searchsorted(found, before)]
            offset = self._offset[found]
            found = found[(offset < end) & (offset + self._length[found] > start)]
            if len(found):
                yield found[::-1]
            if floor < 0:
                return
            before = floor
            take *= 4

    def _up_to(self, low: int, high: int, alone: bool, before: int) -> int:
        """Return where a span's rows from `before` on begin, if they are in order."""
        return low + int(np.searchsorted(self._rows[low:high], before)) if alone else high

    def _spans(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Return where the entries of each level stand, and whether they are of one cell."""
        levels = self._levels
        first = (start >> _BLOCK_BITS) >> levels
        last = ((end - 1) >> _BLOCK_BITS) >> levels
        lows = np.searchsorted(self._keys, first + (levels << _LEVEL_BITS), "left")
        highs = np.searchsorted(self._keys, last + (levels << _LEVEL_BITS), "right")
        alone = (first == last).tolist()
        spans = zip(lows.tolist(), highs.tolist(), alone, strict=True)
        return [span for span in spans if span[1] > span[0]]
