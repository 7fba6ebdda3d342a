"""A disk with a volatile write cache: what was not flushed is held here, and a power cut drops it.

Reads see the newest write. `freeze` at the instant a flush is received puts a line under what it
covers; `copy_down` writes everything above the lines to the disk below and syncs it; `landed`
then forgets it here; the `ticket` calls do the same for a single FUA write. The copying and
`pread_into` may run in threads while reads and writes go on; everything else belongs to one
thread, and there is one landing (copying, then forgetting) at a time. Every write has an order
number, so that a FUA write that lands first removes what is older than it, and nothing newer, and
one whose flush landed first is not written again over what is newer.

A process that is killed leaves on the disk below what was landed: the held data is in an unnamed
scratch file. Does not cover: which writes a flush covers; that is decided by who calls `freeze`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.fallocate import punch_hole
from nbdproxy.disks.scratch import open_scratch, write_scratch
from nbdproxy.extents import Extent, ExtentMap


class Kind(Enum):
    """What a held piece will do to the disk below."""

    DATA = auto()
    ZERO = auto()
    HOLE = auto()


class Held(NamedTuple):
    """One held piece: its place in the order of writes, and where its data is in the scratch."""

    order: int
    kind: Kind
    position: int


class Ticket(NamedTuple):
    """One whole write, as it was when it was held."""

    offset: int
    length: int
    held: Held


def _shift(held: Held, count: int) -> Held:
    return held._replace(position=held.position + count)


def _held_map() -> ExtentMap[Held]:
    return ExtentMap(_shift)


@dataclass(slots=True)
class Layer:
    """The writes between two flushes, and the run of the scratch file that holds their data.

    `order` is that of the newest write at the flush.
    """

    start: int
    end: int = 0
    order: int = 0
    pieces: ExtentMap[Held] = field(default_factory=_held_map)


class VolatileDisk:
    """`below` behind a volatile cache, as a `BlockDevice` whose `sync` lands everything."""

    def __init__(self, below: BlockDevice) -> None:
        self._below = below
        self.size = below.size
        self._scratch = open_scratch()
        self._end = 0
        self._order = 0
        self._last: Ticket | None = None
        self._newest = _held_map()
        self._open = Layer(0)
        self._frozen: list[Layer] = []
        self._landed = 0
        # What each ticket still has to land, by its order.
        self._tickets: dict[int, ExtentMap[Held]] = {}
        # Guards _newest, and the scratch against being given back while it is read.
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """How many bytes of the disk a power cut would take back now."""
        return self._newest.total()

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the newest data."""
        with self._lock:
            segments = list(self._newest.segments(offset, offset + len(buffer)))
            self._fill(offset, buffer, [part for part in segments if part[2] is not None])
        self._fill(offset, buffer, [part for part in segments if part[2] is None])

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that does not block: what is held is, the rest asks below."""
        segments = list(self._newest.segments(offset, offset + len(buffer)))
        if any(
            held is None and not self._below.try_pread_into(a, buffer[a - offset : b - offset])
            for a, b, held in segments
        ):
            return False
        self._fill(offset, buffer, [part for part in segments if part[2] is not None])
        return True

    def _fill(
        self, offset: int, buffer: memoryview, segments: list[tuple[int, int, Held | None]]
    ) -> None:
        for start, end, held in segments:
            piece = buffer[start - offset : end - offset]
            if held is None:
                self._below.pread_into(start, piece)
            elif held.kind is Kind.DATA:
                os.preadv(self._scratch, [piece], held.position)
            else:
                piece[:] = bytes(len(piece))

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Hold `data` for `offset`."""
        position = self._end
        write_scratch(self._scratch, data, position)
        self._end += len(data)
        self._hold(offset, len(data), Kind.DATA, position)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_punch: bool,
        fast: bool = False,  # noqa: ARG002 - holding is
    ) -> None:
        """Hold zeroes for a range."""
        self._hold(offset, length, Kind.HOLE if may_punch else Kind.ZERO, 0)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:  # noqa: ARG002
        """Hold a trim of a range; it reads as zeroes."""
        self._hold(offset, length, Kind.HOLE, 0)

    def will_need(self, offset: int, length: int) -> None:
        """Hand the hint on."""
        self._below.will_need(offset, length)

    def _hold(self, offset: int, length: int, kind: Kind, position: int) -> None:
        self._order += 1
        held = Held(self._order, kind, position)
        self._last = Ticket(offset, length, held)
        with self._lock:
            self._newest.set(offset, offset + length, held)
        self._open.pieces.set(offset, offset + length, held)

    def issue_ticket(self) -> Ticket:
        """Return a ticket for the newest write, for landing it alone (FUA)."""
        ticket = self._last
        assert ticket is not None
        self._tickets[ticket.held.order] = _held_map()
        self._tickets[ticket.held.order].set(
            ticket.offset, ticket.offset + ticket.length, ticket.held
        )
        return ticket

    def freeze(self) -> int:
        """Put a line under all that is held; return the number of the newest layer above it."""
        if len(self._open.pieces):
            self._open.end, self._open.order = self._end, self._order
            self._frozen.append(self._open)
            self._open = Layer(self._end)
        return self._landed + len(self._frozen)

    def copy_down(self, layer: int) -> None:
        """Write all layers up to number `layer` to the disk below, in order, and sync it; blocks.

        Raises OSError from the disk below; nothing is forgotten here then.
        """
        for one in self._frozen[: max(0, layer - self._landed)]:
            for start, end, held in one.pieces:
                self._put(start, end - start, held)
        self._below.sync()

    def landed(self, layer: int) -> None:
        """Forget all layers up to number `layer`: they are on the disk below."""
        count = max(0, layer - self._landed)
        gone = self._frozen[:count]
        if not gone:
            return
        del self._frozen[:count]
        self._landed += count
        with self._lock:
            for one in gone:
                for start, end, held in one.pieces:
                    self._forget(self._newest, start, end, held.order)
            for order in [order for order in self._tickets if order <= gone[-1].order]:
                del self._tickets[order]
            self._give_back([(one.start, one.end) for one in gone])

    def _give_back(self, runs: list[tuple[int, int]]) -> None:
        """Free these runs of the scratch file, or all of it if nothing is held."""
        if not self._frozen and not len(self._newest):
            os.ftruncate(self._scratch, 0)
            self._end = 0
            self._open = Layer(0)
            self._tickets.clear()
            return
        for start, end in runs:
            if end > start:
                with suppress(OSError):  # only housekeeping: not every filesystem can
                    punch_hole(self._scratch, start, end - start)

    def copy_ticket_down(self, ticket: Ticket) -> None:
        """Write one write to the disk below, whatever was held over it since; blocks.

        What a flush, or a newer FUA write over it, has brought down before is left out.
        """
        for start, end, held in self._tickets.get(ticket.held.order, ()):
            self._put(start, end - start, held)
        self._below.sync()

    def ticket_landed(self, ticket: Ticket) -> None:
        """Forget that write, and within its range everything older."""
        held = ticket.held
        if self._tickets.pop(held.order, None) is None:
            return
        start, end = ticket.offset, ticket.offset + ticket.length
        with self._lock:
            for pieces in (self._newest, self._open.pieces, *(f.pieces for f in self._frozen)):
                self._forget(pieces, start, end, held.order)
            for order, pieces in self._tickets.items():
                if order < held.order:
                    pieces.remove(start, end)
            data = held.kind is Kind.DATA
            self._give_back([(held.position, held.position + ticket.length)] if data else [])

    def _put(self, offset: int, length: int, held: Held) -> None:
        if held.kind is Kind.ZERO:
            self._below.zero(offset, length, may_punch=False)
        elif held.kind is Kind.HOLE:
            self._below.trim(offset, length)
        else:
            while length:
                data = os.pread(self._scratch, min(length, 1 << 20), held.position)
                self._below.pwrite(offset, data)
                offset, length = offset + len(data), length - len(data)
                held = _shift(held, len(data))

    @staticmethod
    def _forget(pieces: ExtentMap[Held], start: int, end: int, order: int) -> None:
        """Remove from [start, end) what is not newer than `order`."""
        for piece_start, piece_end, held in list(pieces.overlapping(start, end)):
            if held.order <= order:
                pieces.remove(piece_start, piece_end)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what is held and what holds data below, ascending; may run in a thread."""
        with self._lock:
            segments = list(self._newest.segments(offset, offset + length))
        for start, end, held in segments:
            if held is None:
                yield from self._below.data_extents(start, end - start)
            elif held.kind is Kind.DATA:
                yield Extent(start, end - start)

    def sync(self) -> None:
        """Land everything that is held; blocks."""
        layer = self.freeze()
        self.copy_down(layer)
        self.landed(layer)

    def close(self) -> None:
        """Drop what is held and close the disk below."""
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1
        self._below.close()
