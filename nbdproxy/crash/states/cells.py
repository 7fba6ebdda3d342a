"""`Cells`: the disk, cut at every boundary of a request, and which request shows in each piece.

All sectors of a cell were touched by the same requests. Cells are runs of whole sectors; where a
request begins or ends inside a sector, that sector is a cell of its own, and `ragged`. There are at
most four cells a request, however large the disk is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nbdproxy.extents import Extent, expand
from nbdproxy.recording.index import BASE, Mask, Numbers, RequestTable, Rows
from nbdproxy.requests import Command


class Cells:
    """The cells of a table's changing requests, in sectors of `sector` bytes.

    bounds      where cells begin, in sectors, ascending; cell i ends where i + 1 begins
    low, high   for each row of the table the cells [low, high) that it touches
    ragged      cells of one sector that some request covers in part only
    base_data   cells that may hold something else than zeroes before the recording
    """

    def __init__(
        self, table: RequestTable, sector: int, size: int, base_data: Iterable[Extent]
    ) -> None:
        self.table = table
        self.sector = sector
        rows = np.flatnonzero(table.is_changing)
        offset, end = table.offset[rows], table.offset[rows] + table.length[rows]
        outer = (offset // sector, -(-end // sector))
        inner = (-(-offset // sector), end // sector)
        data = np.array([(e.offset, e.end) for e in base_data], np.int64).reshape(-1, 2)
        first, last = data[:, 0] // sector, -(-data[:, 1] // sector)
        self.bounds = np.unique(np.concatenate((*outer, *inner, first, last)))
        self.low = np.zeros(len(table), np.int64)
        self.high = np.zeros(len(table), np.int64)
        self.low[rows] = np.searchsorted(self.bounds, outer[0])
        self.high[rows] = np.searchsorted(self.bounds, outer[1])
        count = max(len(self.bounds) - 1, 0)
        self.lengths: Numbers = np.diff(self.bounds)
        self.ragged = np.zeros(count, np.bool_)
        unaligned = [o[o * sector != at] for o, at in ((outer[0], offset), (end // sector, end))]
        for sectors in (*unaligned, np.array([size // sector] if size % sector else [], np.int64)):
            at = np.searchsorted(self.bounds, sectors)
            self.ragged[at[at < count]] = True
        self.base_data = np.zeros(count, np.bool_)
        self.base_data[
            expand(
                np.searchsorted(self.bounds, first),
                np.searchsorted(self.bounds, last) - np.searchsorted(self.bounds, first),
            )
        ] = True

    def __len__(self) -> int:
        return len(self.lengths)

    def pairs(self, rows: Rows) -> tuple[Numbers, Rows]:
        """Return each cell that each row touches: cells, and the rows they belong to."""
        low, counts = self.low[rows], self.high[rows] - self.low[rows]
        return expand(low, counts), np.repeat(rows, counts)

    def raise_owners(self, owners: Rows, rows: Rows) -> Numbers:
        """Let the greatest row show in each cell; return the cells that `rows` touch, each once."""
        cells, entries = self.pairs(rows)
        np.maximum.at(owners, cells, entries)
        touched: Numbers = np.unique(cells)
        return touched

    def writes_data(self, rows: Rows, cells: Numbers) -> Mask:
        """Tell for each pair of row and cell whether data may show there, and not just zeroes."""
        data: Mask = np.where(
            rows == BASE, self.base_data[cells], self.table.command[rows] == Command.WRITE
        )
        return data


def concurrent_pairs(table: RequestTable) -> tuple[Rows, Rows]:
    """Return the pairs of changing requests that overlap and were in flight at once.

    The first of a pair was received first. Takes as many steps as requests were in flight at once,
    each a pass over the table; those that were never answered are looked at one by one.
    """
    rows = np.flatnonzero(table.is_changing).astype(np.int32)
    seq, completed = table.seq[rows], table.completed[rows]
    offset, end = table.offset[rows], table.offset[rows] + table.length[rows]
    earlier, later = [], []
    unanswered = np.flatnonzero(completed > seq[-1]) if len(rows) else np.empty(0, np.int64)
    for one in unanswered.tolist():
        beside = np.flatnonzero((offset < end[one]) & (end > offset[one]))
        beside = beside[beside > one]
        earlier.append(np.full(len(beside), one))
        later.append(beside)
    left = np.flatnonzero(completed <= seq[-1]) if len(rows) else np.empty(0, np.int64)
    step = 1
    while True:
        left = left[left + step < len(rows)]
        left = left[completed[left] >= seq[left + step]]
        if not len(left):
            break
        second = left + step
        hit = (offset[left] < end[second]) & (end[left] > offset[second])
        earlier.append(left[hit])
        later.append(second[hit])
        step += 1
    if not earlier:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    return rows[np.concatenate(earlier)], rows[np.concatenate(later)]
