"""`Timeline`: a recording as a disk that can be opened at any cut, in any crash state.

Opening is a matter of microseconds, whatever the length of the recording: nothing is copied or
painted, and what shows in a place is found when it is read. What is built once for a recording is
an index of which requests touch what, and when each became durable.

`CrashDisk` equals, byte for byte, the base with the state's requests written over it in seq order;
WRITE_ZEROES and TRIM write zeroes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np

from nbdproxy.crash.states.naming import Choice, Pin, StateId
from nbdproxy.crash.states.paint import Painting
from nbdproxy.crash.states.presence import ABSENT, TORN, Presence, row_of, sectors_of
from nbdproxy.crash.states.source import Source
from nbdproxy.crash.states.touches import TouchIndex
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent, ExtentSet, join_neighbours
from nbdproxy.persistence.model import Durability, Level, Options
from nbdproxy.recording.index import BASE
from nbdproxy.requests import Command

_FEW = 64
"""Up to so many pieces are laid over each other one by one, more of them by whole arrays."""

Segment = tuple[int, int, int]
"""[start, end) in bytes, and the row that shows there, or BASE."""


class Timeline:
    """All states of a recording, by default on the source's own base.

    The source stays the caller's; `close` closes the base.

    Several threads may read its disks at once.
    """

    def __init__(self, source: Source, *, base: ReadableDevice | None = None) -> None:
        self.source = source
        self.table = source.table
        self._durability: dict[Options, Durability] = {}
        self._base = base
        self._lock = threading.Lock()

    @cached_property
    def index(self) -> TouchIndex:
        """Which requests touch what."""
        return TouchIndex(self.table)

    def durability(self, options: Options) -> Durability:
        """Return when each request became durable, in a reading of the model."""
        with self._lock:
            if options not in self._durability:
                self._durability[options] = Durability(self.table, options)
            return self._durability[options]

    def base(self) -> ReadableDevice:
        """Return the disk as it was at the start; it belongs to the timeline."""
        with self._lock:
            if self._base is None:
                self._base = self.source.base()
            return self._base

    def open(self, state: StateId) -> CrashDisk:
        """Return a state's disk; UsageError if it is of another recording."""
        return CrashDisk(self, state)

    def at(self, position: int) -> CrashDisk:
        """Return the disk with all that had been sent at a cut."""
        return self.open(StateId(position, Level.RECEIVED, Choice.ALL))

    def after_flushes(self, before: int) -> list[int]:
        """Return the positions right after flushes, the last first, and the beginning."""
        done = self.table.completed[self.table.is_flush & (self.table.completed < before)]
        return [*(np.sort(done)[::-1] + 1).tolist(), 0]

    def close(self) -> None:
        """Close the base; the disks that were opened cannot be read any more."""
        with self._lock:
            if self._base is not None:
                self._base.close()
                self._base = None


def open_state(source: Source, state: StateId) -> CrashDisk:
    """Open a single crash state; closing the disk closes the base that it opened."""
    timeline = Timeline(source)
    disk = timeline.open(state)
    disk.on_close = timeline.close
    timeline.base()
    return disk


class CrashDisk:
    """The disk that a state names, read-only."""

    def __init__(self, timeline: Timeline, state: StateId) -> None:
        events = timeline.source.events
        if state.position > events:
            raise UsageError(
                f"state {state} is of another recording: this one has {events} events; "
                f"run `nbdproxy replay` on it to see its own states"
            )
        self.state = state
        self.on_close: Callable[[], None] | None = None
        self._timeline = timeline
        self._table = timeline.table
        self._presence = Presence(timeline.durability(state.options), state)
        self._before = timeline.table.rows_before(state.position)
        self._pins = [_Pinned(timeline, state, pin) for pin in state.pins]

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._timeline.source.size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        table, source = self._table, self._timeline.source
        for start, end, row in self.segments(offset, offset + len(buffer)):
            part = buffer[start - offset : end - offset]
            if row == BASE:
                self._timeline.base().pread_into(start, part)
            elif table.command[row] == Command.WRITE:
                source.read_payload(int(table.position[row]) + start - int(table.offset[row]), part)
            else:
                part[:] = bytes(len(part))

    def segments(self, start: int, end: int) -> Iterator[Segment]:
        """Yield all of [start, end), ascending: where which request shows."""
        at = start
        for pin in self._pins:
            if pin.end <= at or pin.start >= end:
                continue
            yield from self._painted(at, pin.start)
            for low, high, row in pin.segments(max(at, pin.start), min(end, pin.end)):
                if row is None:
                    yield from self._painted(low, high)
                else:
                    yield low, high, row
            at = min(end, pin.end)
        yield from self._painted(at, end)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        return join_neighbours(self._data(offset, offset + length), Extent.joined)

    def close(self) -> None:
        """Do what `on_close` says, if it says anything: what serves many states stays open."""
        if self.on_close is not None:
            self.on_close()

    def _data(self, first: int, last: int) -> Iterator[Extent]:
        for start, end, row in self.segments(first, last):
            if row == BASE:
                yield from self._timeline.base().data_extents(start, end - start)
            elif self._table.command[row] == Command.WRITE:
                yield Extent.between(start, end)

    def _painted(self, start: int, end: int) -> Iterator[Segment]:
        """Yield what shows where, pins aside: the newest of the requests that are there."""
        if start >= end:
            return
        covered = ExtentSet()
        found: list[Segment] = []
        bare = end - start
        for number, (row, low, high) in enumerate(self._newest_first(start, end)):
            if number == _FEW:
                yield from self._many(start, end)
                return
            for part in list(covered.missing(low, high)):
                found.append((part.offset, part.end, row))
                bare -= part.length
            if not bare:
                break
            covered.add(low, high)
        if bare:
            found += [(part.offset, part.end, BASE) for part in covered.missing(start, end)]
        found.sort()
        yield from found

    def _newest_first(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield what is there in [start, end): rows and their bytes, the newest request first."""
        for rows in self._timeline.index.newest_first(start, end, self._before):
            how = self._presence.of(rows)
            there = np.flatnonzero(how)
            for row, fraction in zip(rows[there].tolist(), how[there].tolist(), strict=True):
                for low, high in self._ranges(row, fraction):
                    if low < end and high > start:
                        yield row, max(low, start), min(high, end)

    def _many(self, start: int, end: int) -> Iterator[Segment]:
        """The same by whole arrays."""
        batches = list(self._timeline.index.newest_first(start, end, self._before))
        rows = np.concatenate(batches)[::-1]
        how = self._presence.of(rows)
        rows, how = rows[how != ABSENT], how[how != ABSENT]
        offset, length = self._table.offset[rows], self._table.length[rows]
        order = np.arange(len(rows), dtype=np.int32)
        if torn := np.flatnonzero(how == TORN).tolist():
            pieces = [
                (low, high - low, index)
                for index in torn
                for low, high in self._ranges(int(rows[index]), TORN)
            ]
            whole = np.flatnonzero(how != TORN)
            columns = np.array(pieces, np.int64).reshape(-1, 3)
            owner = np.concatenate((whole, columns[:, 2]))
            ascending = np.argsort(owner, kind="stable")
            offset = np.concatenate((offset[whole], columns[:, 0]))[ascending]
            length = np.concatenate((length[whole], columns[:, 1]))[ascending]
            rows = rows[owner[ascending]]
            order = np.arange(len(rows), dtype=np.int32)
        for low, high, index in Painting(offset, length, order).segments(start, end):
            yield low, high, BASE if index == BASE else int(rows[index])

    def _ranges(self, row: int, fraction: int) -> Iterator[tuple[int, int]]:
        """Yield the bytes that a request has on the disk."""
        if fraction == ABSENT:
            return
        extent = self._table.extent(row)
        low, high = extent.offset, extent.end
        if fraction != TORN:
            yield low, high
            return
        sector = self.state.options.sector
        first, _ = sectors_of(self._table, row, sector)
        there = self._presence.sectors(row)
        edges = np.flatnonzero(np.diff(there, prepend=False, append=False)).tolist()
        for begin, stop in pairwise(edges):
            if there[begin]:
                yield max(low, (first + begin) * sector), min(high, (first + stop) * sector)


class _Pinned:
    """A `Pin`, in bytes and rows of one recording."""

    def __init__(self, timeline: Timeline, state: StateId, pin: Pin) -> None:
        self._sector = state.options.sector
        self._table = timeline.table
        self.start = pin.first * self._sector
        self.end = (pin.last + 1) * self._sector
        if self.end > -(-timeline.source.size // self._sector) * self._sector:
            raise UsageError(f"state {state} is of another recording: its disk was larger")
        self.end = min(self.end, timeline.source.size)
        half = self._sector // 2
        parts = [*pin.mix] if pin.back is None else [(pin.front, half)]
        parts.append((pin.front if pin.back is None else pin.back, self._sector))
        self._parts: list[Segment] = []
        at = 0
        for value, count in parts:
            row = BASE if value == BASE else row_of(timeline.table, state, value)
            self._parts.append((at, min(at + count, self._sector), row))
            at += count
        if at >= 2 * self._sector:
            raise UsageError(f"state {state} has more bytes than a sector in {pin}")

    def segments(self, start: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield all of [start, end) within the pin; None where the request's bytes end."""
        if len(self._parts) == 1:
            yield from self._value(start, end, self._parts[0][2])
            return
        for sector in range(start // self._sector * self._sector, end, self._sector):
            for low, high, row in self._parts:
                first, last = max(start, sector + low), min(end, sector + high)
                if first < last:
                    yield from self._value(first, last, row)

    def _value(self, start: int, end: int, row: int) -> Iterator[tuple[int, int, int | None]]:
        low, high = start, end
        if row != BASE:
            extent = self._table.extent(row)
            low = min(max(start, extent.offset), end)
            high = max(min(end, extent.end), low)
        for first, last, value in ((start, low, None), (low, high, row), (high, end, None)):
            if first < last:
                yield first, last, value
