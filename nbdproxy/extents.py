"""Interval algebra over byte ranges: `Extent`, `ExtentMap`, `ExtentSet`, neighbours joined.

All extents are half-open, [offset, offset + length), in bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
V = TypeVar("V")


class Extent(NamedTuple):
    """A run of bytes; `length` is never negative."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind the extent."""
        return self.offset + self.length

    @classmethod
    def between(cls, start: int, end: int) -> Self:
        """Return the bytes [start, end)."""
        return cls(start, end - start)

    def joined(self, behind: Extent) -> Extent | None:
        """Return both as one; None if there is a gap. `behind` begins where this does, or later."""
        if behind.offset > self.end:
            return None
        return Extent.between(self.offset, max(self.end, behind.end))


def join_neighbours(items: Iterable[T], join: Callable[[T, T], T | None]) -> Iterator[T]:
    """Yield items in order, neighbours as one; `join` returns two as one, or None if they stay two.

    Of extents that ascend `Extent.joined` makes the disjoint ones that cover the same bytes.
    """
    pending: T | None = None
    for item in items:
        both = join(pending, item) if pending is not None else item
        if both is None:
            assert pending is not None
            yield pending
        pending = item if both is None else both
    if pending is not None:
        yield pending


def runs(numbers: Iterable[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return whole numbers, each given once, as runs [first, end) without gaps, ascending."""
    array = numbers if isinstance(numbers, np.ndarray) else np.fromiter(numbers, np.int64)
    found = np.sort(array)
    if not len(found):
        return []
    gaps = np.flatnonzero(np.diff(found) != 1)
    starts = np.concatenate((found[:1], found[gaps + 1])).tolist()
    lasts = np.concatenate((found[gaps], found[-1:])).tolist()
    return [(start, last + 1) for start, last in zip(starts, lasts, strict=True)]


def expand(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ... for each start, `count` of them, one after the other."""
    total = int(counts.sum())
    skipped = np.cumsum(counts) - counts
    found: NDArray[np.int64] = np.arange(total) + np.repeat(starts - skipped, counts)
    return found


class ExtentMap(Generic[V]):
    """A map from disjoint byte ranges to values; a later `set` replaces what it overlaps.

    A piece that is cut keeps its value, moved by `shift(value, bytes)` when its front is cut off
    (a value that names a position elsewhere moves along with the bytes). Look-ups and changes
    are O(log n) plus what they touch.
    """

    def __init__(self, shift: Callable[[V, int], V] = lambda value, _: value) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []
        self._shift = shift

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        return zip(list(self._starts), list(self._ends), list(self._values), strict=True)

    def clear(self) -> None:
        """Forget everything."""
        self._starts.clear()
        self._ends.clear()
        self._values.clear()

    def total(self) -> int:
        """Return the bytes covered."""
        return sum(self._ends) - sum(self._starts)

    def overlapping(self, start: int, end: int) -> Iterator[tuple[int, int, V]]:
        """Yield the pieces within [start, end), cut to it, ascending."""
        first, last = self._touched(start, end)
        for i in range(first, last):
            piece, stop, value = self._starts[i], self._ends[i], self._values[i]
            if piece < start:
                value = self._shift(value, start - piece)
                piece = start
            yield piece, min(stop, end), value

    def segments(self, start: int, end: int) -> Iterator[tuple[int, int, V | None]]:
        """Yield all of [start, end) in order; gaps have the value None."""
        at = start
        for piece, stop, value in self.overlapping(start, end):
            if at < piece:
                yield at, piece, None
            yield piece, stop, value
            at = stop
        if at < end:
            yield at, end, None

    def set(self, start: int, end: int, value: V) -> None:
        """Map [start, end) to `value`."""
        self._splice(start, end, [(start, end, value)])

    def remove(self, start: int, end: int) -> None:
        """Forget [start, end)."""
        self._splice(start, end, [])

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        first = bisect_right(self._ends, start)
        last = bisect_right(self._starts, end - 1, lo=first)
        return first, last

    def _splice(self, start: int, end: int, middle: list[tuple[int, int, V]]) -> None:
        if start >= end:
            return
        first, last = self._touched(start, end)
        pieces = middle
        if first < last:
            before, stop = self._starts[first], self._ends[last - 1]
            if before < start:
                pieces = [(before, start, self._values[first]), *pieces]
            if stop > end:
                moved = self._shift(self._values[last - 1], end - self._starts[last - 1])
                pieces = [*pieces, (end, stop, moved)]
        self._starts[first:last] = [piece[0] for piece in pieces]
        self._ends[first:last] = [piece[1] for piece in pieces]
        self._values[first:last] = [piece[2] for piece in pieces]


class ExtentSet:
    """A set of bytes, kept as disjoint, merged extents; at first those of `extents`."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for extent in extents:
            self.add(extent.offset, extent.end)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        for start, end in zip(list(self._starts), list(self._ends), strict=True):
            yield Extent.between(start, end)

    def total(self) -> int:
        """Return the bytes in the set."""
        return sum(self._ends) - sum(self._starts)

    def add(self, start: int, end: int) -> None:
        """Put [start, end) into the set, merging with what it touches."""
        if start >= end:
            return
        first = bisect_right(self._ends, start - 1)
        last = bisect_right(self._starts, end, lo=first)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def covers(self, start: int, end: int) -> bool:
        """Tell whether all of [start, end) is in the set."""
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and self._ends[index] >= end

    def overlapping(self, start: int, end: int) -> Iterator[Extent]:
        """Yield the parts of the set within [start, end), ascending."""
        first = bisect_right(self._ends, start)
        last = bisect_right(self._starts, end - 1, lo=first)
        for i in range(first, last):
            yield Extent.between(max(start, self._starts[i]), min(end, self._ends[i]))

    def missing(self, start: int, end: int) -> Iterator[Extent]:
        """Yield the parts of [start, end) that are not in the set, ascending."""
        at = start
        for part in self.overlapping(start, end):
            if at < part.offset:
                yield Extent.between(at, part.offset)
            at = part.end
        if at < end:
            yield Extent.between(at, end)
