"""`CrashSpaceBuilder`: finds the crash space of one cut after the other.

Rule 6 in whole arrays: a sector may hold what the latest request that must be there left in it, or
what any request left that may be there and does not happen before one that must; where nothing must
be there, what was there before the recording. A TRIM that must be there may also have done nothing
(rule 9).

Guarantees: what the spaces allow equals `tests.support.persistence_reference.allowed`.

Where requests end inside a sector (`ragged`), each of them beside what must be there is a value;
combinations of several are `nbdproxy.crash.explore.mixtures`. Not covered: garbage after TRIM.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nbdproxy.crash.explore.contents import Contents, mixed, sector_digests
from nbdproxy.crash.explore.crash_space import CrashSpace, Values, first_of_content
from nbdproxy.crash.explore.mixtures import Mixtures
from nbdproxy.crash.states.cells import Cells, concurrent_pairs
from nbdproxy.crash.states.naming import Choice, Pin, RequestPart, StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import UsageError
from nbdproxy.extents import expand
from nbdproxy.persistence.model import Level, Options
from nbdproxy.recording.index import BASE, Numbers, Rows
from nbdproxy.requests import Command

ENTRIES_MAX = 1 << 25
"""Values of sectors that one cut may have: beyond that the memory for them would be gigabytes."""


class CrashSpaceBuilder:
    """Makes the crash spaces of a recording, cut after cut; cheapest if the cuts ascend."""

    def __init__(self, timeline: Timeline, level: Level, options: Options) -> None:
        self.timeline = timeline
        self.level = level
        self.options = options
        table = timeline.table
        base = timeline.base()
        self.cells = Cells(table, options.sector, base.size, base.data_extents(0, base.size))
        self.contents = Contents(timeline, self.cells)
        self._mixtures = Mixtures(timeline, self.cells)
        self._earlier, self._later = concurrent_pairs(table)
        self._is_trim = np.equal(table.command, Command.TRIM)
        self._durability = timeline.durability(options)
        self._reset()

    def _reset(self) -> None:
        self._kept = np.zeros(len(self.timeline.table), np.bool_)
        self._owners = np.full(len(self.cells), BASE, np.int32)
        self._writers = self._owners.copy()  # TRIMs left out
        self._hash = 0
        self._ragged: dict[int, np.uint64] = {}

    def at(self, position: int) -> CrashSpace:
        """Return the space of a cut; UsageError if it is too large to be listed."""
        state = StateId(position, self.level, Choice.MUST, self.options)
        self._keep(state)
        table = self.timeline.table
        end = table.rows_before(position)
        may = np.flatnonzero((~self._kept & table.is_changing)[:end]).astype(np.int32)
        values = self._values(state, may)
        durable = np.unique(self._owners[self._owners != BASE])
        return CrashSpace(
            state,
            self.timeline,
            values,
            (may, durable),
            must_hash=self._hash,
            find_mixtures=partial(self._mixtures.find, kept=self._kept),
        )

    def _keep(self, state: StateId) -> None:
        """Bring what must be there, and its hash, up to a cut."""
        table = self.timeline.table
        kept = self._durability.kept(slice(0, len(table)), state.position, self.level)
        kept &= table.length > 0
        if (self._kept & ~kept).any():
            self._reset()
        rows = np.flatnonzero(kept & ~self._kept).astype(np.int32)
        self._kept = kept
        touched = np.unique(self.cells.pairs(rows)[0])
        before = self._owners[touched]
        self.cells.raise_owners(self._owners, rows)
        self.cells.raise_owners(self._writers, rows[~self._is_trim[rows]])
        ragged = self.cells.ragged[touched]
        for cell in touched[ragged].tolist():
            self._hash_ragged(state, cell)
        moved = ~ragged & (self._owners[touched] != before)
        self._hash_whole(touched[moved], before[moved])

    def _hash_whole(self, cells: Numbers, before: Rows) -> None:
        data = self.cells.writes_data(before, cells)
        data |= self.cells.writes_data(self._owners[cells], cells)
        cells, before = cells[data], before[data]
        counts = self.cells.lengths[cells]
        sectors = expand(self.cells.bounds[cells], counts)
        where = np.repeat(cells, counts)
        old = self.contents.of(np.repeat(before, counts), where, sectors)
        new = self.contents.of(self._owners[where], where, sectors)
        with np.errstate(over="ignore"):
            moved = (mixed(sectors, new) - mixed(sectors, old)).sum(dtype=np.uint64)
            self._hash = int(np.uint64(self._hash) + moved)

    def _hash_ragged(self, state: StateId, cell: int) -> None:
        sector = int(self.cells.bounds[cell])
        old = self._ragged.get(sector)
        if old is None:
            old = self._read(StateId(0, Level.NOTHING, Choice.MUST, self.options), sector)
        new = self._ragged[sector] = self._read(state, sector)
        place = np.array([sector])
        with np.errstate(over="ignore"):
            moved = mixed(place, np.array([new])) - mixed(place, np.array([old]))
            self._hash = int(np.uint64(self._hash) + moved[0])

    def _read(self, state: StateId, sector: int) -> np.uint64:
        disk = self.timeline.open(state)
        return np.uint64(sector_digests(disk, np.array([sector]), self.options.sector)[0])

    def _values(self, state: StateId, may: Rows) -> Values:
        cells, rows = self._candidates(may)
        # Beside what covers a sector in part, older data shows.
        data = self.cells.writes_data(rows, cells) | self.cells.ragged[cells]
        # Cells with one value, or where all values are zeroes, are decided.
        kinds, index, counts = np.unique(cells, return_inverse=True, return_counts=True)
        open_ = (counts > 1) & (np.bincount(index, data, len(kinds)) > 0)
        cells, rows = cells[open_[index]], rows[open_[index]]
        kinds, counts = kinds[open_], counts[open_]
        begins = np.cumsum(counts) - counts
        lengths = self.cells.lengths[kinds]
        if int((counts * lengths).sum()) > ENTRIES_MAX:
            raise UsageError(
                f"at cut {state.position} chance decides on {int(lengths.sum()):,} sectors, too "
                f"many to explore them one by one: choose a failure that keeps more, such as "
                f"host-power-loss with a mode that flushes"
            )
        per_sector = np.repeat(counts, lengths)
        sectors = expand(self.cells.bounds[kinds], lengths)
        source = expand(np.repeat(begins, lengths), per_sector)
        start = np.concatenate((np.zeros(1, np.int64), np.cumsum(per_sector)))
        entry_rows, where = rows[source], cells[source]
        place = np.repeat(sectors, per_sector)
        digests = self.contents.of(entry_rows, where, place)
        for entry in np.flatnonzero(self.cells.ragged[where]).tolist():
            row, sector = int(entry_rows[entry]), int(place[entry])
            digests[entry] = self._read(self._ragged_state(state, sector, row), sector)
        owners = np.repeat(self._owners[kinds], lengths)
        must = np.flatnonzero(entry_rows == np.repeat(owners, per_sector))
        ragged = np.repeat(self.cells.ragged[kinds], lengths)
        return _drop_settled(Values(sectors, start, entry_rows, digests, must, ragged))

    def _ragged_state(self, state: StateId, sector: int, row: int) -> StateId:
        """Return the state that shows what a request makes of a sector that it covers in part."""
        if row == int(self._owners[np.searchsorted(self.cells.bounds, sector)]):
            return state
        if row == BASE or self._kept[row]:
            value = self.timeline.table.seq_of(row)
            return replace(state, pins=(Pin(sector, sector, value),))
        return replace(
            state, choice=Choice.ONLY, parts=(RequestPart(int(self.timeline.table.seq[row])),)
        )

    def _candidates(self, may: Rows) -> tuple[Numbers, Rows]:
        """Return each value of each cell that may be undecided: cells, and rows or BASE."""
        table = self.timeline.table
        cells, rows = self.cells.pairs(may)
        writer = self._writers[cells]
        late = table.completed[rows] >= np.where(writer == BASE, BASE, table.seq[writer])
        # What came before a request that covers a part of its sector may still show beside it.
        late |= self.cells.ragged[cells]
        cells, rows = cells[late], rows[late]
        trimmed = np.flatnonzero(self._owners != self._writers)
        both = self._kept[self._earlier] & self._kept[self._later]
        earlier, later = self._earlier[both], self._later[both]
        low = np.maximum(self.cells.low[earlier], self.cells.low[later])
        counts = np.minimum(self.cells.high[earlier], self.cells.high[later]) - low
        beside = expand(low, counts)
        shown = self._writers[beside] == np.repeat(later, counts)
        beside, beside_rows = beside[shown], np.repeat(earlier, counts)[shown]
        open_cells = np.unique(np.concatenate((cells, trimmed, beside)))
        all_cells = np.concatenate((cells, beside, open_cells, open_cells))
        all_rows = np.concatenate(
            (rows, beside_rows, self._owners[open_cells], self._writers[open_cells])
        ).astype(np.int32)
        order = np.lexsort((all_rows, all_cells))
        all_cells, all_rows = all_cells[order], all_rows[order]
        fresh = np.ones(len(order), np.bool_)
        fresh[1:] = (all_cells[1:] != all_cells[:-1]) | (all_rows[1:] != all_rows[:-1])
        return all_cells[fresh], all_rows[fresh]


def _drop_settled(values: Values) -> Values:
    """Leave out the sectors whose values have all the same content."""
    counts = np.diff(values.start)
    if not len(counts):
        return values
    first = first_of_content(values.start, values.digests)
    open_: NDArray[np.bool_] = np.add.reduceat(first, values.start[:-1]) > 1
    keep = np.repeat(open_, counts)
    moved = np.cumsum(keep) - 1
    start = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts[open_])))
    return Values(
        values.sectors[open_],
        start,
        values.rows[keep],
        values.digests[keep],
        moved[values.must[open_]],
        values.ragged[open_],
    )
