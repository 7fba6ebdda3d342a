"""A disk with a volatile write cache: what was not flushed is held here, and a power cut drops it.

Reads see the newest write. `freeze` at the instant a flush is received puts a line under what it
covers; `copy_down` writes everything above the lines to the disk below and syncs it; `destaged`
then forgets it here, or `drop` keeps it from ever being destaged and lets reads show it; the
`ticket` calls destage a single write, for FUA or because the cache writes it back on its own. The
copying and `pread_into` may run in threads while reads and writes go on; everything else belongs to
one thread, and there is one destaging (copying, then forgetting) at a time, whose place `drop` and
`destage_pieces` take. Every write has an order number, so that a write that is destaged first
removes what is older than it, and nothing newer, and one whose flush was destaged first is not
written again over what is newer.

With a history every held write that was not destaged is known, also what others of its layer have
overwritten, and a power cut can let any part of any of them survive: `destage_pieces`. It costs
memory for each write until that is destaged, so nothing of it is kept without.

A process that is killed leaves on the disk below what was destaged: the held data is in an unnamed
scratch file. Does not cover: which writes a flush covers; that is decided by who calls `freeze`;
nor what a destaging that failed half-way left below: that is on the disk, and still held.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.fallocate import punch_hole
from nbdproxy.disks.held import Held, HeldKind, History, Ticket, held_map, shift
from nbdproxy.disks.scratch import close_scratch, open_scratch, write_scratch
from nbdproxy.extents import Extent, ExtentMap, ExtentSet

__all__ = ["HeldKind", "Layer", "Ticket", "VolatileDisk"]


@dataclass(slots=True)
class Layer:
    """The writes between two flushes, and the run of the scratch file that holds their data.

    `order` is that of the newest write at the flush.
    """

    start: int
    end: int = 0
    order: int = 0
    pieces: ExtentMap[Held] = field(default_factory=held_map)


class VolatileDisk:
    """`below` behind a volatile cache, as a `BlockDevice` whose `sync` destages everything.

    `history` keeps all held writes, for `writes`, for `destage_pieces`, and for writing back.
    """

    def __init__(self, below: BlockDevice, *, history: bool = False) -> None:
        self._below = below
        self.size = below.size
        self._scratch = open_scratch()
        self._end = 0
        self._order = 0
        self._last: Ticket | None = None
        self._newest = held_map()
        self._open = Layer(0)
        self._frozen: list[Layer] = []
        # Layers that were destaged or dropped.
        self._over = 0
        # What each FUA ticket still has to write below, by its order.
        self._tickets: dict[int, ExtentMap[Held]] = {}
        self._history = History() if history else None
        # The newest write that was dropped, and the runs of the scratch file that hold the data.
        self._dropped_order = 0
        self._dropped = ExtentSet()
        # Guards _newest, and the scratch against being given back while it is read.
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """How many bytes of the disk a power cut would take back now, those dropped included."""
        return self._newest.total()

    @property
    def newest_order(self) -> int:
        """The order number of the write that was held last, 0 before the first."""
        return self._order

    def writes(self) -> list[Ticket]:
        """Return the held writes of which something may still be destaged, ascending.

        Overwritten ones are among them, and one that is on its way down until it is there. Needs a
        history.
        """
        assert self._history is not None
        return self._history.writes()

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
            elif held.kind is HeldKind.DATA:
                os.preadv(self._scratch, [piece], held.position)
            else:
                piece[:] = bytes(len(piece))

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Hold `data` for `offset`."""
        position = self._end
        write_scratch(self._scratch, data, position)
        self._end += len(data)
        self._hold(offset, len(data), HeldKind.DATA, position)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_punch: bool,
        fast: bool = False,  # noqa: ARG002 - holding is
    ) -> None:
        """Hold zeroes for a range."""
        self._hold(offset, length, HeldKind.HOLE if may_punch else HeldKind.ZERO, 0)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:  # noqa: ARG002
        """Hold a trim of a range; it reads as zeroes."""
        self._hold(offset, length, HeldKind.HOLE, 0)

    def will_need(self, offset: int, length: int) -> None:
        """Hand the hint on."""
        self._below.will_need(offset, length)

    def _hold(self, offset: int, length: int, kind: HeldKind, position: int) -> None:
        self._order += 1
        held = Held(self._order, kind, position)
        self._last = ticket = Ticket(offset, length, held)
        if self._history is not None:
            self._history.add(ticket)
        with self._lock:
            self._newest.set(offset, offset + length, held)
        self._open.pieces.set(offset, offset + length, held)

    def issue_ticket(self, order: int | None = None) -> Ticket:
        """Return a ticket for destaging one write alone: the newest one, right after it came (FUA).

        With `order` it is that one of `writes`, for writing it back; raises KeyError if it is not
        among them any more. FUA tickets outlive `drop`, the others do not.
        """
        if order is not None:
            assert self._history is not None
            return self._history.find(order)
        ticket = self._last
        assert ticket is not None
        self._tickets[ticket.held.order] = held_map()
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
        return self._over + len(self._frozen)

    def copy_down(self, layer: int) -> None:
        """Write all layers up to number `layer` to the disk below, in order, and sync it; blocks.

        Raises OSError from the disk below; nothing is forgotten here then.
        """
        for one in self._frozen[: max(0, layer - self._over)]:
            for start, end, held in one.pieces:
                self._put(start, end - start, held)
        self._below.sync()

    def destaged(self, layer: int) -> None:
        """Forget all layers up to number `layer`: they are on the disk below."""
        gone = self._take_layers(layer)
        if not gone:
            return
        outliving = [one for order, one in self._tickets.items() if order <= self._dropped_order]
        with self._lock:
            for one in gone:
                for start, end, held in one.pieces:
                    self._forget(self._newest, start, end, held.order)
                    for pieces in outliving:
                        pieces.remove(start, end)
            for order in [order for order in self._tickets if order <= gone[-1].order]:
                if order > self._dropped_order:
                    del self._tickets[order]
            self._give_back([(one.start, one.end) for one in gone])

    def drop(self, layer: int) -> None:
        """Keep all layers up to number `layer` from ever being destaged: the flush of them failed.

        Reads show what is in them until it is overwritten. FUA tickets stay valid. Takes the
        place of a destaging: none may be at work, but one whose copying failed is over.
        """
        gone = self._take_layers(layer)
        if not gone:
            return
        self._dropped_order = gone[-1].order
        for one in gone:
            self._dropped.add(one.start, one.end)
        with self._lock:
            self._give_back(self._take_unshown())

    def _take_layers(self, layer: int) -> list[Layer]:
        """Remove all layers up to number `layer` from what will be destaged, and return them."""
        count = max(0, layer - self._over)
        gone = self._frozen[:count]
        del self._frozen[:count]
        self._over += len(gone)
        if gone and self._history is not None:
            self._history.forget_through(gone[-1].order)
        return gone

    def _take_unshown(self) -> list[tuple[int, int]]:
        """Return the runs of dropped data that nobody can see any more, and forget them.

        Only drops look for them, which are few; what is overwritten meanwhile waits for the next.
        """
        needed = ExtentSet()
        for pieces in (self._newest, *self._tickets.values()):
            for start, end, held in pieces:
                if held.kind is HeldKind.DATA:
                    needed.add(held.position, held.position + end - start)
        runs, self._dropped = self._dropped, ExtentSet()
        unshown = []
        for run in runs:
            unshown += [(gap.offset, gap.end) for gap in needed.missing(run.offset, run.end)]
            for part in needed.overlapping(run.offset, run.end):
                self._dropped.add(part.offset, part.end)
        return unshown

    def _give_back(self, runs: list[tuple[int, int]]) -> None:
        """Free these runs of the scratch file, or all of it if nothing is held."""
        if not self._frozen and not len(self._newest):
            os.ftruncate(self._scratch, 0)
            self._end = 0
            self._open = Layer(0)
            self._tickets.clear()
            if len(self._dropped):
                self._dropped = ExtentSet()
            if self._history is not None:
                # Where a write is held and nothing is to be read, a newer one was destaged.
                self._history.clear()
            return
        for start, end in runs:
            if end > start:
                with suppress(OSError):  # only housekeeping: not every filesystem can
                    punch_hole(self._scratch, start, end - start)

    def copy_ticket_down(self, ticket: Ticket, *, sync: bool = True) -> None:
        """Write one write to the disk below, whatever was held over it since; blocks.

        What a flush, or a newer write over it, has brought down before is left out. `sync` makes
        it durable there; a write that is only written back need not be.
        """
        pieces: Iterable[tuple[int, int, Held]] | None = self._tickets.get(ticket.held.order)
        if pieces is None and self._history is not None:
            pieces = self._history.not_covered(ticket, ticket.offset, ticket.end)
        for start, end, held in pieces or ():
            self._put(start, end - start, held)
        if sync:
            self._below.sync()

    def ticket_destaged(self, ticket: Ticket) -> None:
        """Forget that write, and within its range everything older."""
        held = ticket.held
        known = self._tickets.pop(held.order, None) is not None
        if self._history is not None and self._history.destaged(ticket):
            known = True
        if not known:
            return
        start, end = ticket.offset, ticket.offset + ticket.length
        with self._lock:
            for pieces in (self._newest, self._open.pieces, *(f.pieces for f in self._frozen)):
                self._forget(pieces, start, end, held.order)
            for order, pieces in self._tickets.items():
                if order < held.order:
                    pieces.remove(start, end)
            data = held.kind is HeldKind.DATA
            self._give_back([(held.position, held.position + ticket.length)] if data else [])

    def destage_pieces(self, pieces: Iterable[tuple[Ticket, int, int]]) -> None:
        """Destage what survives a power cut: of each of these writes bytes [start, end); blocks.

        It happens in the order of the writes, and nothing comes over a newer write that was
        destaged before; what was dropped stays dropped. The cache must not be used afterwards.
        Needs a history. Raises OSError from the disk below.
        """
        assert self._history is not None
        for ticket, start, end in sorted(pieces, key=lambda piece: piece[0].held.order):
            assert ticket.offset <= start and end <= ticket.end
            for piece_start, piece_end, held in self._history.not_covered(ticket, start, end):
                self._put(piece_start, piece_end - piece_start, held)
        self._below.sync()

    def _put(self, offset: int, length: int, held: Held) -> None:
        if held.kind is HeldKind.ZERO:
            self._below.zero(offset, length, may_punch=False)
        elif held.kind is HeldKind.HOLE:
            self._below.trim(offset, length)
        else:
            while length:
                data = os.pread(self._scratch, min(length, 1 << 20), held.position)
                assert data, "held data was given back too early"
                self._below.pwrite(offset, data)
                offset, length = offset + len(data), length - len(data)
                held = shift(held, len(data))

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
            elif held.kind is HeldKind.DATA:
                yield Extent.between(start, end)

    def sync(self) -> None:
        """Destage everything that is held; blocks."""
        layer = self.freeze()
        self.copy_down(layer)
        self.destaged(layer)

    def release(self) -> None:
        """Drop what is held, and leave the disk below to its owner."""
        scratch, self._scratch = self._scratch, -1
        close_scratch(scratch)

    def close(self) -> None:
        """Drop what is held and close the disk below."""
        self.release()
        self._below.close()
