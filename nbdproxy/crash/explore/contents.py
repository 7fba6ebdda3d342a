"""`Contents`: a digest of what each request left in each sector, worked out once.

Digests are xxh3-64 of a sector's bytes; two sectors with the same digest count as equal. The hash
of a whole state is the sum, over its sectors, of the digests mixed with the sectors' numbers: it
changes by what changes, whatever the order. With a million states the chance that any two that
differ have the same hash is below one in ten million.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from nbdproxy.crash.states.cells import Cells
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.dice import mix
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import runs
from nbdproxy.recording.index import BASE, Numbers, Rows

SectorDigests = NDArray[np.uint64]

_PLACES, _SECTORS = 0x9C7A11, 0x5EC702
_READ = 1 << 20


def mixed(sectors: Numbers, digests: SectorDigests) -> SectorDigests:
    """Return what sectors with these contents add to a state's hash."""
    return mix(digests ^ mix(sectors.astype(np.uint64), _PLACES), _SECTORS)


class Contents:
    """Digests of whole sectors: of what requests wrote, and of what was there before them."""

    def __init__(self, timeline: Timeline, cells: Cells) -> None:
        self._timeline = timeline
        self._cells = cells
        self._sector = cells.sector
        self.zero = np.uint64(xxh3_64_intdigest(bytes(self._sector)))
        self._pool = np.empty(1 << 12, np.uint64)
        self._used = 0
        # Where in the pool a row's, or a cell's, first sector is; -1 where it is not yet.
        self._row_at = np.full(len(timeline.table), -1, np.int64)
        self._cell_at = np.full(len(cells), -1, np.int64)

    def of(self, rows: Rows, cells: Numbers, sectors: Numbers) -> SectorDigests:
        """Return the digest that each row (or BASE) left in a sector of a cell."""
        found = np.full(len(rows), self.zero, np.uint64)
        table = self._timeline.table
        data = self._cells.writes_data(rows, cells)
        written = np.flatnonzero(data & (rows != BASE))
        for row in np.unique(rows[written]).tolist():
            if self._row_at[row] < 0:
                self._row_at[row] = self._digest_row(row)
        who = rows[written]
        first = table.offset[who] // self._sector
        found[written] = self._pool[self._row_at[who] + sectors[written] - first]
        before = np.flatnonzero(data & (rows == BASE))
        for cell in np.unique(cells[before]).tolist():
            if self._cell_at[cell] < 0:
                self._cell_at[cell] = self._digest_base(cell)
        where = cells[before]
        found[before] = self._pool[
            self._cell_at[where] + sectors[before] - self._cells.bounds[where]
        ]
        return found

    def _digest_row(self, row: int) -> int:
        """Digest the sectors of a WRITE; what stands for its torn ends is never asked for."""
        table, sector = self._timeline.table, self._sector
        offset, length = table.extent(row)
        payload = bytearray(-(-(offset % sector + length) // sector) * sector)
        view = memoryview(payload)
        self._timeline.source.read_payload(
            int(table.position[row]), view[offset % sector : offset % sector + length]
        )
        return self._add(view)

    def _digest_base(self, cell: int) -> int:
        start = int(self._cells.bounds[cell]) * self._sector
        length = int(self._cells.lengths[cell]) * self._sector
        base = self._timeline.base()
        at = self._used
        for offset in range(start, start + length, _READ - _READ % self._sector):
            piece = memoryview(
                bytearray(min(_READ - _READ % self._sector, start + length - offset))
            )
            base.pread_into(offset, piece[: max(0, base.size - offset)])
            self._add(piece)
        return at

    def _add(self, view: memoryview) -> int:
        at, sector = self._used, self._sector
        count = len(view) // sector
        while at + count > len(self._pool):
            self._pool = np.concatenate((self._pool, np.empty_like(self._pool)))
        digest = xxh3_64_intdigest
        self._pool[at : at + count] = [
            digest(view[start : start + sector]) for start in range(0, len(view), sector)
        ]
        self._used += count
        return at


def sector_digests(disk: ReadableDevice, sectors: Numbers, size: int) -> SectorDigests:
    """Return the digests of some sectors of a disk, by reading them; `sectors` ascend."""
    found = np.empty(len(sectors), np.uint64)
    at = 0
    for start, end in runs(sectors):
        for first in range(start, end, _READ // size):
            count = min(_READ // size, end - first)
            offset = first * size
            # The disk may end inside its last sector.
            view = memoryview(bytearray(count * size))
            disk.pread_into(offset, view[: disk.size - offset])
            for index in range(count):
                found[at + index] = xxh3_64_intdigest(view[index * size : (index + 1) * size])
            at += count
    return found
