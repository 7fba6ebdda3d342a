"""Audit: what a store has now, against what was acknowledged to its client.

Each sector that a recording changed is compared with the store. Where it is not what was sent last,
the rules say whether it may be that: a store may have lost what no flush covered, and nothing else.

Not covered: a store that was written to after the recording, which cannot be told from one that
errs; a recording that was cut off before its end, for what came later; and what a TRIM left, which
is up to the store and not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import BaseDisk, RecordedSource
from nbdproxy.crash.states.timeline import CrashDisk, Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent, runs
from nbdproxy.persistence.model import DEFAULTS, Level, Options
from nbdproxy.recording.index import BASE, Mask, Numbers, Rows
from nbdproxy.requests import Command

ZEROES = -2
"""What a place holds: zeroes that nobody wrote."""
UNKNOWN = -3
"""What a place holds: something that was never there by the recording."""

_PART = 1 << 20

Bytes = NDArray[np.uint8]


class Fate(StrEnum):
    """What became of a place."""

    AS_SENT = "as-sent"
    """It holds what was sent last."""
    UNFLUSHED = "unflushed"
    """What was sent last is not there, and no flush covered it: allowed."""
    TRIMMED = "trimmed"
    """A TRIM was the last thing that was sent, or may have come later: anything may be there."""
    BROKEN = "broken-promise"
    """What a flush had made durable is not there, but something older, or zeroes."""
    FOREIGN = "foreign"
    """It holds what it never may have: somebody else wrote there, or the store damaged it."""


_FATES = list(Fate)

FAULTS = frozenset({Fate.BROKEN, Fate.FOREIGN})
"""The fates that no store may leave behind."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A place that does not hold what was sent last.

    `durable` is the row of the request that must be there, BASE if there is none; `holds` is the
    row of the request whose data is there instead, or BASE, ZEROES or UNKNOWN.
    """

    extent: Extent
    fate: Fate
    durable: int = BASE
    holds: int = BASE


@dataclass(slots=True)
class Audit:
    """What was found; `sizes` is bytes of each fate, findings ascend on the disk."""

    findings: list[Finding] = field(default_factory=list)
    sizes: Counter[Fate] = field(default_factory=Counter)

    @property
    def compared(self) -> int:
        """Bytes that were compared: all that requests touched."""
        return self.sizes.total()

    def enter(self, finding: Finding) -> None:
        """Count a place, and list it; one that goes on where the last one ends is one with it."""
        self.sizes[finding.fate] += finding.extent.length
        if finding.fate is Fate.AS_SENT:
            return
        last = self.findings[-1] if self.findings else None
        joined = last.extent.joined(finding.extent) if last is not None else None
        if last is not None and joined is not None:
            both = replace(last, extent=joined)
            if both == replace(finding, extent=joined):
                self.findings[-1] = both
                return
        self.findings.append(finding)


def timeline_on(source: RecordedSource, store: ReadableDevice) -> Timeline:
    """Return the timeline of a disk that was, where nobody changed it, what the store has now."""
    return Timeline(source, base=BaseDisk(source, store, owned=False))


class Auditor:
    """Compares a store with a recording; the timeline, by `timeline_on`, is the caller's."""

    def __init__(
        self, timeline: Timeline, store: ReadableDevice, options: Options = DEFAULTS
    ) -> None:
        self._timeline = timeline
        self._store = store
        self._sector = options.sector
        end = timeline.source.events
        self._sent = timeline.open(StateId(end, Level.RECEIVED, Choice.ALL, options))
        self._must = timeline.open(StateId(end, Level.FLUSHED, Choice.MUST, options))
        self._ragged = _ragged_sectors(timeline, options.sector)

    def run(self, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Audit:
        """Compare all that was touched; `progress` gets bytes done, and of how many."""
        places = _touched(self._timeline, self._sector)
        total = sum(extent.length for extent in places)
        audit = Audit()
        for place in places:
            for part, trimmed in self._parts(place):
                if trimmed:
                    audit.enter(Finding(part, Fate.TRIMMED))
                else:
                    for finding in self._compare(part):
                        audit.enter(finding)
                progress(audit.compared, total)
        return audit

    def _parts(self, place: Extent) -> Iterator[tuple[Extent, bool]]:
        """Yield a place in parts: whole sectors that were trimmed last, of any size, and others."""
        command = self._timeline.table.command
        at = place.offset
        for start, end, row in self._sent.segments(place.offset, place.end):
            if row == BASE or command[row] != Command.TRIM:
                continue
            low = -(-start // self._sector) * self._sector
            high = end if end == place.end else end // self._sector * self._sector
            if low < high:
                yield from _pieces(at, low)
                yield Extent.between(low, high), True
                at = high
        yield from _pieces(at, place.end)

    def _compare(self, part: Extent) -> Iterator[Finding]:
        sent, now = (_read(disk, part) for disk in (self._sent, self._store))
        at = 0
        for low, high in _differing(sent, now, self._sector):
            yield from _as_sent(part.offset + at, part.offset + low)
            yield from self._judge(part.offset + low, now[low:high])
            at = high
        yield from _as_sent(part.offset + at, part.end)

    def _judge(self, start: int, now: Bytes) -> Iterator[Finding]:
        """Judge whole sectors none of which is what was sent."""
        for low, high, ragged in self._stretches(start, start + len(now)):
            stretch = _Stretch(
                self._timeline, low, now[low - start : high - start], 1 if ragged else self._sector
            )
            durable = stretch.shown(self._must)
            may, trimmed, holds = stretch.look(durable)
            kept = (holds != UNKNOWN) & (durable != BASE)
            fates = np.select([may, trimmed, kept], [1, 2, 3], default=4)
            if ragged:
                # The sector is as good as its worst byte.
                worst = slice(int(np.argmax(fates)), int(np.argmax(fates)) + 1)
                fates, durable, holds = fates[worst], durable[worst], holds[worst]
            size = high - low if ragged else self._sector
            told = np.stack((fates, durable, holds))
            heads = np.flatnonzero(np.append(True, (told[:, 1:] != told[:, :-1]).any(axis=0)))
            for first, last in pairwise([*heads.tolist(), len(fates)]):
                where = Extent(low + first * size, (last - first) * size)
                fate, *rows = told[:, first].tolist()
                yield Finding(where, _FATES[fate], *rows)

    def _stretches(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield [start, end) in pieces: a sector that requests cover in part, or none of these."""
        first, last = start // self._sector, -(-end // self._sector)
        low, high = np.searchsorted(self._ragged, (first, last)).tolist()
        at = start
        for sector in self._ragged[low:high].tolist():
            stop = min((sector + 1) * self._sector, end)
            if at < sector * self._sector:
                yield at, sector * self._sector, False
            yield sector * self._sector, stop, True
            at = stop
        if at < end:
            yield at, end, False


class _Stretch:
    """A piece of the store that is judged in units of some bytes: sectors, or single bytes."""

    def __init__(self, timeline: Timeline, start: int, now: Bytes, unit: int) -> None:
        self._timeline = timeline
        self._table = timeline.table
        self._start, self._end = start, start + len(now)
        self._unit = unit
        self._now = now.reshape(-1, unit)

    def shown(self, disk: CrashDisk) -> Rows:
        """Return which row shows in each unit of a state."""
        found = np.full(len(self._now), BASE, np.int32)
        for low, high, row in disk.segments(self._start, self._end):
            found[self._slice(low, high)] = row
        return found

    def look(self, durable: Rows) -> tuple[Mask, Mask, Rows]:
        """Return which units hold what they may, which may be trimmed, and what each of them holds.

        A request may show if it does not happen before the one that must be there.
        """
        may = np.zeros(len(durable), np.bool_)
        trimmed = may.copy()
        holds = np.full(len(may), UNKNOWN, np.int32)
        since = np.where(durable == BASE, BASE, self._table.seq[durable])
        rows = (
            row
            for batch in self._timeline.index.newest_first(self._start, self._end, len(self._table))
            for row in batch.tolist()
        )
        for row in rows:
            where, same = self._same(row)
            late = int(self._table.completed[row]) >= since[where]
            if self._table.command[row] == Command.TRIM:
                trimmed[where] |= late
            hit = same & ~may[where]
            may[where] |= hit & late
            fresh = hit & (late | (holds[where] == UNKNOWN))
            holds[where] = np.where(fresh, row, holds[where])
            if may.all():
                return may, trimmed, holds
        before = self._equal(_read(self._timeline.base(), Extent(self._start, self._now.size)))
        fresh = before & ~may & (holds == UNKNOWN)
        holds[fresh] = BASE
        may |= fresh & (durable == BASE)
        holds[(holds == UNKNOWN) & ~self._now.any(axis=1)] = ZEROES
        return may, trimmed, holds

    def _same(self, row: int) -> tuple[slice, Mask]:
        """Return the units that a request covers, and whether each holds what it wrote."""
        extent = self._table.extent(row)
        low, high = max(extent.offset, self._start), min(extent.end, self._end)
        where = self._slice(low, high)
        if self._table.command[row] != Command.WRITE:
            zeroes: Mask = ~np.any(self._now[where], axis=1)
            return where, zeroes
        payload = bytearray(high - low)
        position = int(self._table.position[row]) + low - extent.offset
        self._timeline.source.read_payload(position, memoryview(payload))
        wrote = np.frombuffer(payload, np.uint8).reshape(-1, self._unit)
        same: Mask = (self._now[where] == wrote).all(axis=1)
        return where, same

    def _equal(self, other: Bytes) -> Mask:
        found: Mask = (self._now == other.reshape(-1, self._unit)).all(axis=1)
        return found

    def _slice(self, low: int, high: int) -> slice:
        return slice((low - self._start) // self._unit, (high - self._start) // self._unit)


def _touched(timeline: Timeline, sector: int) -> list[Extent]:
    """Return all that requests touched, in whole sectors, ascending."""
    table, size = timeline.table, timeline.source.size
    rows = table.is_changing
    first = table.offset[rows] // sector
    last = -(-(table.offset[rows] + table.length[rows]) // sector)
    order = np.argsort(first, kind="stable")
    first, furthest = first[order], np.maximum.accumulate(last[order])
    heads = np.flatnonzero(np.append(True, first[1:] > furthest[:-1])) if len(first) else first
    ends = furthest[np.append(heads[1:], len(first)) - 1] if len(first) else first
    return [
        Extent.between(low * sector, min(high * sector, size))
        for low, high in zip(first[heads].tolist(), ends.tolist(), strict=True)
    ]


def _ragged_sectors(timeline: Timeline, sector: int) -> Numbers:
    """Return the sectors that a request covers in part, and the disk's last if it is cut short."""
    table, size = timeline.table, timeline.source.size
    rows = table.is_changing
    edges = np.concatenate(
        (table.offset[rows], table.offset[rows] + table.length[rows], np.array([size], np.int64))
    )
    found: Numbers = np.unique(edges[edges % sector != 0] // sector)
    return found


def _read(disk: ReadableDevice, extent: Extent) -> Bytes:
    return np.frombuffer(disk.pread(extent.offset, extent.length), np.uint8)


def _pieces(start: int, end: int) -> Iterator[tuple[Extent, bool]]:
    """Yield what is to be read and compared, in parts that fit in memory."""
    for at in range(start, end, _PART):
        yield Extent(at, min(_PART, end - at)), False


def _as_sent(start: int, end: int) -> Iterator[Finding]:
    if start < end:
        yield Finding(Extent.between(start, end), Fate.AS_SENT)


def _differing(one: Bytes, other: Bytes, sector: int) -> list[tuple[int, int]]:
    """Return where whole sectors differ, as runs of bytes; the last may be cut short."""
    sectors = np.unique(np.flatnonzero(one != other) // sector)
    return [(low * sector, min(high * sector, len(one))) for low, high in runs(sectors)]
