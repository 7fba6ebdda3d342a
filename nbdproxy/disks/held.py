"""What a volatile cache holds: one write, and the history of all that were not destaged.

Among the held writes the order is that in which they came. A write that is destaged before an older
one covers it: that never comes over it any more, whoever destages it (rule 6 of the model).
Does not cover: where the data is, and what reads show; that is `nbdproxy.disks.volatile`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from nbdproxy.extents import ExtentMap

_PRUNE_AT_LEAST = 1024
"""Covering pieces below which looking for those that are not needed is not worth the while."""


class HeldKind(Enum):
    """What a held piece will do to the disk below."""

    DATA = auto()
    ZERO = auto()
    HOLE = auto()


class Held(NamedTuple):
    """One held piece: its place in the order of writes, and where its data is in the scratch."""

    order: int
    kind: HeldKind
    position: int


class Ticket(NamedTuple):
    """One whole write, as it was when it was held."""

    offset: int
    length: int
    held: Held

    @property
    def end(self) -> int:
        """The first byte behind the write."""
        return self.offset + self.length


def shift(held: Held, count: int) -> Held:
    """Return the piece without its first `count` bytes."""
    return held._replace(position=held.position + count)


def held_map() -> ExtentMap[Held]:
    """Return an empty map from places on the disk to held pieces."""
    return ExtentMap(shift)


class History:
    """Every held write of which something may still be destaged, overwritten ones included.

    `not_covered` may run in a thread beside `add`, `writes` and `find`.
    """

    def __init__(self) -> None:
        # By order number, ascending. Of a plain dict the first would be slow to find again after
        # many others went from its front.
        self._writes: OrderedDict[int, Ticket] = OrderedDict()
        # Where writes were destaged before older ones: the order number of the newest of them.
        self._covers: ExtentMap[int] = ExtentMap()
        self._prune_at = _PRUNE_AT_LEAST

    def add(self, ticket: Ticket) -> None:
        """Take up a write, which is newer than all others."""
        self._writes[ticket.held.order] = ticket

    def writes(self) -> list[Ticket]:
        """Return the writes of which something may still be destaged, oldest first: O(all)."""
        if len(self._covers):
            for ticket in [one for one in self._writes.values() if self._is_covered(one)]:
                del self._writes[ticket.held.order]
        return list(self._writes.values())

    def find(self, order: int) -> Ticket:
        """Return one of `writes`; raises KeyError if it is not among them."""
        ticket = self._writes[order]
        if self._is_covered(ticket):
            raise KeyError(order)
        return ticket

    def _is_covered(self, ticket: Ticket) -> bool:
        return next(self.not_covered(ticket, ticket.offset, ticket.end), None) is None

    def not_covered(self, ticket: Ticket, start: int, end: int) -> Iterator[tuple[int, int, Held]]:
        """Yield what of [start, end) of a write may be destaged, as pieces (start, end, held)."""
        order = ticket.held.order
        if order not in self._writes or start >= end:
            return
        for piece_start, piece_end, cover in self._covers.segments(start, end):
            if cover is None or cover < order:
                yield piece_start, piece_end, shift(ticket.held, piece_start - ticket.offset)

    def destaged(self, ticket: Ticket) -> bool:
        """Forget a write that was destaged, which covers older ones; False if it was not there."""
        order = ticket.held.order
        if self._writes.pop(order, None) is None:
            return False
        oldest = next(iter(self._writes), order)
        if oldest < order:
            for start, end, cover in list(self._covers.segments(ticket.offset, ticket.end)):
                if cover is None or cover < order:
                    self._covers.set(start, end, order)
            if len(self._covers) > self._prune_at:
                self._prune(oldest)
                self._prune_at = max(_PRUNE_AT_LEAST, 2 * len(self._covers))
        return True

    def forget_through(self, order: int) -> None:
        """Forget all writes up to `order`: they were destaged, or never will be."""
        while self._writes and next(iter(self._writes)) <= order:
            self._writes.popitem(last=False)
        if len(self._covers):
            self._prune(order)

    def _prune(self, order: int) -> None:
        """Drop the covers that are not newer than `order`: no older write is held any more."""
        pieces = [piece for piece in self._covers if piece[2] > order]
        self._covers.clear()
        for start, end, cover in pieces:
            self._covers.set(start, end, cover)

    def clear(self) -> None:
        """Forget everything."""
        self._writes.clear()
        self._covers.clear()
