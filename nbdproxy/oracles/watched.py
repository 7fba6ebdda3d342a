"""`WatchedDevice` records which bytes of a device are read; `RangeSet` is an immutable set of them.

A reader that uses nothing but a device has the same result on every device that is the same in the
bytes that it read. So these say which states can share a result.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent

KEPT_MAX = 8192
ReadRange = tuple[int, int]
"""Start and end of a run of bytes, [start, end); plain tuples, as one is made for each read."""


class RangeSet:
    """An immutable set of bytes, or of block numbers; a query takes O(log n) for each extent."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[ReadRange]) -> None:
        """Make the union of ranges, in any order; they may overlap or be empty."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if start >= end:
                continue
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def __iter__(self) -> Iterator[Extent]:
        for start, end in zip(self._starts, self._ends, strict=True):
            yield Extent.between(start, end)

    def __len__(self) -> int:
        return len(self._starts)

    def total(self) -> int:
        """Return the bytes in the set."""
        return sum(self._ends) - sum(self._starts)

    def touches(self, extents: Iterable[Extent]) -> bool:
        """Tell whether any byte of the extents is in the set."""
        return any(self.meets(extent.offset, extent.offset + extent.length) for extent in extents)

    def meets(self, start: int, end: int) -> bool:
        """Tell whether any byte of [start, end) is in the set."""
        at = bisect_right(self._ends, start)
        return start < end and at < len(self._starts) and self._starts[at] < end

    def isdisjoint(self, other: RangeSet) -> bool:
        """Tell whether no byte is in both sets."""
        few, many = (self, other) if len(self) <= len(other) else (other, self)
        return not any(many.meets(start, end) for start, end in few.ranges())

    def moved(self, by: int, size: int) -> RangeSet:
        """Return the set moved by some bytes; what falls outside of [0, size) is dropped."""
        if by == 0 and (not self._ends or self._ends[-1] <= size):
            return self
        return RangeSet((max(0, a + by), min(size, b + by)) for a, b in self.ranges())

    def ranges(self) -> list[ReadRange]:
        """Return the set as disjoint ranges, ascending."""
        return list(zip(self._starts, self._ends, strict=True))


NOTHING = RangeSet(())
EVERYTHING = RangeSet([(0, 1 << 63)])


class WatchedDevice:
    """A device that appends to `ranges` what is read from it; both attributes may be replaced.

    With `keeps`, a range that was read before is returned as the same object, until `forget` drops
    it. Closing it leaves `base` open.
    """

    def __init__(self, base: ReadableDevice, *, keeps: bool = False) -> None:
        self.base = base
        self.ranges: list[ReadRange] = []
        self._kept: dict[ReadRange, bytes] | None = {} if keeps else None

    @property
    def size(self) -> int:
        """The size of `base` in bytes."""
        return self.base.size

    def note(self, offset: int, length: int) -> None:
        """Record a range as read."""
        self.ranges.append((offset, offset + length))

    def take(self) -> list[ReadRange]:
        """Return the ranges that were read since the last call."""
        found, self.ranges = self.ranges, []
        return found

    def forget(self, changed: RangeSet) -> None:
        """Drop the kept ranges that overlap with changed bytes."""
        if self._kept:
            for start, end in [part for part in self._kept if changed.meets(*part)]:
                del self._kept[start, end]

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        part = (offset, offset + length)
        self.ranges.append(part)
        if self._kept is None:
            return self.base.pread(offset, length)
        found = self._kept.get(part)
        if found is None:
            if len(self._kept) >= KEPT_MAX:
                self._kept.clear()
            found = self._kept[part] = self.base.pread(offset, length)
        return found

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; may block on a cold page."""
        self.note(offset, len(buffer))
        self.base.pread_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        self.note(offset, length)
        return self.base.data_extents(offset, length)

    def close(self) -> None:
        """Do nothing: the device below belongs to whoever opened it."""
