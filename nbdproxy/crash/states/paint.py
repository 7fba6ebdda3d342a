"""Which of many overlapping extents shows where, when each is painted over those before it.

Whole-array numpy: 12 bytes a segment stay, and a million extents take a second or two, however they
overlap and however large the disk is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nbdproxy.recording.index import BASE, Mask, Numbers, Rows

_CHUNK = 1 << 16
_Int = TypeVar("_Int", np.int64, np.int32)


class Painting:
    """The extents of `rows`, ascending, painted in that order; none of them may be empty."""

    def __init__(self, offsets: Numbers, lengths: Numbers, rows: Rows) -> None:
        self._starts, self._owners = _paint(offsets, lengths, rows)

    def segments(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield [start, end) and the row that shows there, or BASE, for all of [first, last)."""
        index = int(np.searchsorted(self._starts, first, side="right"))
        stop = int(np.searchsorted(self._starts, last, side="left"))
        at = first
        owner = int(self._owners[index - 1]) if index else BASE
        for low in range(index, stop, _CHUNK):
            high = min(low + _CHUNK, stop)
            starts, owners = self._starts[low:high].tolist(), self._owners[low:high].tolist()
            for start, following in zip(starts, owners, strict=True):
                if at < start:
                    yield at, start, owner
                at, owner = start, following
        if at < last:
            yield at, last, owner


def _paint(offsets: Numbers, lengths: Numbers, rows: Rows) -> tuple[Numbers, Rows]:
    """Return where segments start, ascending, and which row each shows; the last shows BASE.

    The distinct boundaries of the requests cut the disk into cells. Each cell shows the greatest
    row that covers it. A request covers the cells [a, b); that range is the union of two (mostly
    overlapping) runs of 2^k cells, so its row is entered at the head of both at level k. Going
    down, a run hands its row to its two halves, and at level 0 every cell has its own. All steps
    are whole-array maxima: n log n, however the requests overlap.
    """
    if not len(rows):
        return np.zeros(1, np.int64), np.full(1, BASE, np.int32)
    bounds = _bounds(offsets, lengths, rows)
    low, high = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
    level = np.empty(len(rows), np.int8)
    for part in _chunks(len(rows)):
        offset = offsets[rows[part]]
        low[part] = np.searchsorted(bounds, offset)
        high[part] = np.searchsorted(bounds, offset + lengths[rows[part]])
        level[part] = np.frexp(np.subtract(high[part], low[part], dtype=np.float64))[1] - 1
    owners = np.full(len(bounds), BASE, np.int32)
    for k in range(int(np.max(level)), -1, -1):
        for part in _chunks(len(rows)):
            at = np.flatnonzero(level[part] == k)
            np.maximum.at(owners, low[part][at], rows[part][at])
            np.maximum.at(owners, high[part][at] - (1 << k), rows[part][at])
        if k:
            _hand_down(owners, 1 << (k - 1))
    del low, high, level
    shown = _changes(owners)
    return _compact(bounds, shown), _compact(owners, shown)


def _bounds(offsets: Numbers, lengths: Numbers, rows: Rows) -> Numbers:
    """Return where the rows start and end, ascending, each position once."""
    bounds = np.empty(2 * len(rows), np.int64)
    for part in _chunks(len(rows)):
        offset = offsets[rows[part]]
        bounds[part] = offset
        bounds[len(rows) :][part] = offset + lengths[rows[part]]
    bounds.sort()
    return _compact(bounds, _changes(bounds))


def _hand_down(owners: Rows, half: int) -> None:
    """Give each run's row to its second half too; the first half starts where the run does."""
    for part in reversed(list(_chunks(len(owners) - half))):
        behind = slice(part.start + half, part.stop + half)
        np.maximum(owners[behind], owners[part], out=owners[behind])


def _changes(array: Numbers | Rows) -> Mask:
    """Mark each entry that differs from the one before it."""
    changes = np.empty(len(array), np.bool_)
    changes[0] = True
    np.not_equal(array[1:], array[:-1], out=changes[1:])
    return changes


def _compact(array: NDArray[_Int], keep: Mask) -> NDArray[_Int]:
    """Move the marked entries to the front, in place, and return them."""
    end = 0
    for part in _chunks(len(array)):
        kept_here = array[part][keep[part]]
        array[end : end + len(kept_here)] = kept_here
        end += len(kept_here)
    return array[:end].copy() if 2 * end < len(array) else array[:end]


def _chunks(length: int) -> Iterator[slice]:
    return (slice(at, min(at + _CHUNK, length)) for at in range(0, length, _CHUNK))
