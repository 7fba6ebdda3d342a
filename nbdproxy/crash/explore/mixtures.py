"""`Mixtures`: what a sector may hold of several requests that end inside it.

Such requests change their own bytes of the sector, all of them or none, and what is beside them is
of others. So whichever of those that may be there is there, beside all that must be, in any order
that respects happens-before, is one content; a TRIM may have done nothing to any of its bytes (rule
9). All of them are tried, for one sector after the other.

Guarantees: with `is_complete`, no content that the rules allow is left out. Without, a sector is
touched by too many requests, or too many sectors are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nbdproxy.crash.explore.contents import sector_digests
from nbdproxy.crash.explore.crash_space import Mixture, Values
from nbdproxy.crash.states.cells import Cells
from nbdproxy.crash.states.naming import Pin, StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.recording.index import BASE, Mask, Numbers, Rows
from nbdproxy.requests import Command

SECTORS_MAX = 64
"""So many sectors are looked at; each takes milliseconds."""
REQUESTS_MAX = 10
ORDERS_MAX = 4096
"""Steps of the search in one sector."""


class _Item(NamedTuple):
    """What a request, or a piece of a TRIM, does to units [low, high) of a sector."""

    row: int
    low: int
    high: int
    needed: bool


class Mixtures:
    """Finds the mixtures of a recording, at one cut after the other."""

    def __init__(self, timeline: Timeline, cells: Cells) -> None:
        self._timeline = timeline
        self._table = timeline.table
        self._sector = cells.sector
        self._cells = cells

    @cached_property
    def _ragged(self) -> tuple[Numbers, Rows]:
        """The sectors inside which requests end, and the first request that touches each."""
        cells = np.flatnonzero(self._cells.ragged)
        first = np.full(len(self._cells), len(self._table), np.int32)
        if len(cells):
            rows = np.flatnonzero(self._table.is_changing).astype(np.int32)
            touched, entries = self._cells.pairs(rows)
            np.minimum.at(first, touched, entries)
        return self._cells.bounds[cells], first[cells]

    def find(self, state: StateId, values: Values, kept: Mask) -> tuple[list[Mixture], bool]:
        """Return the mixtures of undecided sectors, and whether these are all that there are.

        `kept` are the rows that must be there.
        """
        end = self._table.rows_before(state.position)
        sectors, first = self._ragged
        sectors = sectors[first < end]
        if len(sectors) > SECTORS_MAX:
            return [], False
        found: list[Mixture] = []
        for sector in sectors.tolist():
            pins = self._pins(sector, end, kept)
            if pins is None:
                return [], False
            index = int(np.searchsorted(values.sectors, sector))
            is_open = index < len(values.sectors) and values.sectors[index] == sector
            known = set()
            if is_open:
                known.update(values.digests[values.start[index] : values.start[index + 1]].tolist())
            else:
                known.add(self._digest(state, sector))
            for pin in pins:
                digest = self._digest(state, sector, pin)
                if digest in known:
                    continue
                if not is_open:
                    return [], False
                known.add(digest)
                found.append(Mixture(index, pin, np.uint64(digest)))
        return found, True

    def _digest(self, state: StateId, sector: int, *pins: Pin) -> int:
        disk = self._timeline.open(replace(state, pins=pins))
        return int(sector_digests(disk, np.array([sector]), self._sector)[0])

    def _pins(self, sector: int, end: int, kept: Mask) -> list[Pin] | None:
        """Return a pin for each content of a sector, None if there are too many to try."""
        start = sector * self._sector
        stop = min(start + self._sector, self._timeline.source.size)
        batches = list(self._timeline.index.newest_first(start, stop, end))
        rows = np.sort(np.concatenate([np.empty(0, np.int32), *batches]))
        if len(rows) > REQUESTS_MAX:
            return None
        spans = {
            row: (max(extent.offset, start), min(extent.end, stop))
            for row, extent in zip(rows.tolist(), self._table.extents(rows), strict=True)
        }
        edges = sorted({start, stop, *(edge for span in spans.values() for edge in span)})
        unit = {edge: number for number, edge in enumerate(edges)}
        items: list[_Item] = []
        for row, (low, high) in spans.items():
            if self._table.command[row] == Command.TRIM:
                pieces = range(unit[low], unit[high])
                items += [_Item(row, piece, piece + 1, needed=False) for piece in pieces]
            else:
                items.append(_Item(row, unit[low], unit[high], bool(kept[row])))
        contents = self._contents(items, len(edges) - 1)
        if contents is None:
            return None
        return [self._pin(sector, content, edges) for content in sorted(contents)]

    def _contents(self, items: list[_Item], units: int) -> set[tuple[int, ...]] | None:
        """Return which row shows in each unit, in every way that the rules allow."""
        seq, completed = self._table.seq, self._table.completed
        # Done before an item, by the rules, is never done after it.
        late = [
            sum(
                1 << other
                for other, later in enumerate(items)
                if completed[item.row] < seq[later.row]
            )
            for item in items
        ]
        needed = sum(1 << number for number, item in enumerate(items) if item.needed)
        seen = {(0, (BASE,) * units)}
        todo = list(seen)
        while todo:
            done, content = todo.pop()
            for number, item in enumerate(items):
                if done >> number & 1 or done & late[number]:
                    continue
                new = (item.row,) * (item.high - item.low)
                state = done | 1 << number, content[: item.low] + new + content[item.high :]
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
            if len(seen) > ORDERS_MAX:
                return None
        return {content for done, content in seen if done & needed == needed}

    def _pin(self, sector: int, content: tuple[int, ...], edges: list[int]) -> Pin:
        parts: list[tuple[int, int]] = []
        for row, (low, high) in zip(content, pairwise(edges), strict=True):
            value = self._table.seq_of(row)
            if parts and parts[-1][0] == value:
                parts[-1] = value, parts[-1][1] + high - low
            else:
                parts.append((value, high - low))
        *mix, (last, _) = parts
        return Pin(sector, sector, last, None, tuple(mix))
