"""`Presence`: which parts of which requests are on the disk in a crash state.

A state is the base with requests, or sectors of them, painted over it in seq order. That order
respects happens-before, so whatever subset is chosen of what may survive, the result is legal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nbdproxy.crash.states.naming import Choice, RequestPart, StateId
from nbdproxy.dice import key_of, mix
from nbdproxy.errors import UsageError
from nbdproxy.persistence.model import Durability
from nbdproxy.recording.index import Mask, RequestTable, Rows

ABSENT, WHOLE, TORN = 0, 1, 2

Fractions = NDArray[np.int8]

_DENSITIES = (1 / 2, 7 / 8, 1 / 8, 31 / 32, 1 / 32)
"""How likely a request that may survive is there in a drawn state; each state draws one."""
_TORN_OF = 8
"""One of so many requests of several sectors is torn in a drawn state."""


def sectors_of(table: RequestTable, row: int, sector: int) -> tuple[int, int]:
    """Return the first sector that a request touches, and the first behind it."""
    extent = table.extent(row)
    return extent.offset // sector, -(-extent.end // sector)


class Presence:
    """Answers for one state; `durability` are of its options."""

    def __init__(self, durability: Durability, state: StateId) -> None:
        """Raise UsageError if the state's parts name requests that the recording lacks."""
        self._durability = durability
        self._table = durability.table
        self._state = state
        self._parts = rows_of_parts(self._table, state)
        self._named = np.array(sorted(self._parts), np.int32)
        if state.choice is Choice.DRAW:
            self._key = key_of(state.seed, "state", state.number)
            draw = int(mix(np.zeros(1, np.uint64), self._key)[0])
            self._density = _DENSITIES[draw % len(_DENSITIES)]

    def of(self, rows: Rows) -> Fractions:
        """Tell for each row whether it is ABSENT, WHOLE or TORN."""
        state, durability = self._state, self._durability
        kept = durability.kept(rows, state.position, state.level)
        if state.choice is Choice.MUST:
            return kept.astype(np.int8)
        if state.choice is Choice.DRAW:
            found = self._drawn(rows)
            found[kept] = WHOLE
            return found
        if state.choice is Choice.ONLY:
            found = kept.astype(np.int8)
        else:
            found = (kept | durability.sent(rows, state.position)).astype(np.int8)
        if len(self._named):
            self._name(rows, found, kept)
        return found

    def _name(self, rows: Rows, found: Fractions, kept: Mask) -> None:
        """Enter what the state says of single requests."""
        for index in np.flatnonzero(np.isin(rows, self._named)).tolist():
            parts = self._parts[int(rows[index])]
            whole = any(part.first is None for part in parts)
            if self._state.choice is Choice.BUT:
                found[index] = ABSENT if whole else min(TORN, int(found[index]) * TORN)
            elif not kept[index]:
                found[index] = WHOLE if whole else TORN

    def _drawn(self, rows: Rows) -> Fractions:
        draws = mix(self._table.seq[rows].astype(np.uint64), self._key)
        found = (draws < np.uint64(int(self._density * 2**64))).astype(np.int8)
        first = self._table.offset[rows] // self._state.options.sector
        last = (self._table.offset[rows] + self._table.length[rows] - 1) // (
            self._state.options.sector
        )
        torn = (mix(draws, self._key) % np.uint64(_TORN_OF) == 0) & (last > first)
        found[torn] = TORN
        return found

    def sectors(self, row: int) -> Mask:
        """Tell for each sector of a TORN request whether it is there."""
        first, last = sectors_of(self._table, row, self._state.options.sector)
        if self._state.choice is Choice.DRAW:
            return self._torn(row, last - first)
        inside = np.zeros(last - first, np.bool_)
        for part in self._parts[row]:
            assert part.first is not None
            inside[part.first : part.last + 1] = True
        return ~inside if self._state.choice is Choice.BUT else inside

    def _torn(self, row: int, count: int) -> Mask:
        """A prefix, a suffix, or each sector for itself."""
        key = self._key ^ int(self._table.seq[row])
        how, place = mix(np.arange(2, dtype=np.uint64), key ^ 0x5EC7).tolist()
        numbers = np.arange(count)
        at = 1 + place % (count - 1)
        there: Mask = mix(numbers.astype(np.uint64), key) % np.uint64(2) == 1
        if how % 4 == 0:
            there = numbers < at
        elif how % 4 == 1:
            there = numbers >= at
        return there


def rows_of_parts(table: RequestTable, state: StateId) -> dict[int, list[RequestPart]]:
    """Return the requests that a state names, by row; UsageError for what is not there."""
    found: dict[int, list[RequestPart]] = {}
    for part in state.parts:
        row = row_of(table, state, part.seq)
        first, last = sectors_of(table, row, state.options.sector)
        if part.last >= last - first:
            raise UsageError(
                f"state {state} is of another recording: request {part.seq} has only "
                f"{last - first} sectors here"
            )
        found.setdefault(row, []).append(part)
    return found


def row_of(table: RequestTable, state: StateId, seq: int) -> int:
    """Return the row of a changing request that was received before a state's cut."""
    row = table.rows_before(seq)
    there = row < len(table) and table.seq[row] == seq and seq < state.position
    if not there or not table.length[row]:
        raise UsageError(
            f"state {state} is of another recording: there is no request {seq} here that changes "
            f"the disk before the cut"
        )
    return row
