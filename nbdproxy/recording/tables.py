"""Builds a `RequestTable` from a recording's slots, chunk by chunk, in bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nbdproxy.extents import expand
from nbdproxy.recording.format import NONE, SlotKind
from nbdproxy.recording.index import NEVER, RequestTable

_COLUMNS = {
    "seq": np.int64,
    "command": np.uint8,
    "flags": np.uint16,
    "connection": np.uint32,
    "offset": np.int64,
    "length": np.int64,
    "position": np.int64,
    "completed": np.int64,
    "error": np.uint16,
}


_FIRST = 1 << 20
"""Rows that there is room for at first; a file may say that it is larger than any memory."""


class TableBuilder:
    """Collects requests, `about` so many; memory is touched only as rows are filled."""

    def __init__(self, about: int) -> None:
        room = min(about, _FIRST)
        self._columns = {name: np.empty(room, kind) for name, kind in _COLUMNS.items()}
        self._rows = 0

    def add(self, slots: NDArray[np.void], first: int) -> None:
        """Take in a chunk of slots; `first` is the seq of the chunk's first."""
        kinds = slots["kind"]
        received = np.flatnonzero(kinds == SlotKind.RECEIVED)
        chosen = slots[received]
        rows = slice(self._rows, self._rows + len(received))
        self._rows = rows.stop
        columns = self._columns
        if rows.stop > len(columns["seq"]):
            self._grow_to(rows.stop + rows.stop // 4)
        columns["seq"][rows] = received + first
        for name in ("command", "flags", "connection", "offset", "length"):
            columns[name][rows] = chosen[name]
        columns["position"][rows] = np.where(
            chosen["position"] == NONE, -1, chosen["position"].astype(np.int64)
        )
        columns["completed"][rows] = NEVER
        columns["error"][rows] = 0
        done = np.flatnonzero(kinds == SlotKind.COMPLETED)
        if len(done):
            self._complete(slots[done], done + first)

    def _complete(self, slots: NDArray[np.void], seqs: NDArray[np.int64]) -> None:
        """Enter completions; each may answer a run of consecutive requests."""
        if not self._rows:
            return  # whatever was answered so far had been refused
        counts = slots["length"].astype(np.int64)
        asked = expand(slots["offset"].astype(np.int64), counts)
        known = self._columns["seq"][: self._rows]
        rows = np.searchsorted(known, asked)
        # The completion of a refused request finds no row: it never reached the disk.
        found = (rows < len(known)) & (known[np.minimum(rows, len(known) - 1)] == asked)
        self._columns["completed"][rows[found]] = np.repeat(seqs, counts)[found]
        self._columns["error"][rows[found]] = np.repeat(slots["flags"], counts)[found]

    def _grow_to(self, rows: int) -> None:
        for column in self._columns.values():
            column.resize(rows, refcheck=False)

    def finish(self) -> RequestTable:
        """Return the table; the builder is used up."""
        self._grow_to(self._rows)
        return RequestTable(**self._columns)
