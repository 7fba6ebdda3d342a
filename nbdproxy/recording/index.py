"""`RequestTable`: a recording's requests as numpy columns, the form every analysis works on.

About 50 bytes a request, so that recordings of many millions fit in memory. One row for each
WRITE, WRITE_ZEROES, TRIM and FLUSH that was accepted, in the order received. Requests that were
refused before they reached the disk (out of range, read-only) are not here; the log has them.

Every event of a recording (a request received, a completion, a connection, a mark) has a `seq`:
its position in the recording, counted from 0 without gaps. `seq` and `completed` below are both
such positions, so "w was completed before f was received" is `completed[w] < seq[f]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nbdproxy.extents import Extent
from nbdproxy.requests import Command, CommandFlag

NEVER = np.iinfo(np.int64).max
"""The `completed` of a request that was never answered."""

BASE = -1
"""In place of a row, or of a seq: no request, but what was there before the recording."""

Mask = NDArray[np.bool_]
"""One boolean a row: a choice of requests."""

Rows = NDArray[np.int32]
"""Numbers of rows; BASE may be among them."""

Positions = NDArray[np.int64]
"""Positions in the recording, or NEVER."""

Numbers = NDArray[np.int64]
"""Other whole numbers: offsets and lengths in bytes, numbers of sectors."""


@dataclass(frozen=True, slots=True, eq=False)
class RequestTable:
    """Columns of equal length; row i is the i-th request received.

    seq         position of the *received* event, strictly ascending
    command     a `Command`
    flags       `CommandFlag` bits
    connection  number of the connection it came on, counted from 1
    offset      bytes
    length      bytes
    position    where a WRITE's payload stands in the recording's data stream; -1 for the others
    completed   position of the *completed* event, NEVER if there was none
    error       the `NbdErrno` of the reply, 0 for success and while there is none
    """

    seq: Positions
    command: NDArray[np.uint8]
    flags: NDArray[np.uint16]
    connection: NDArray[np.uint32]
    offset: Numbers
    length: Numbers
    position: Numbers
    completed: Positions
    error: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.seq)

    @property
    def is_flush(self) -> Mask:
        """Rows that are flushes."""
        return np.equal(self.command, Command.FLUSH)

    @property
    def is_modifying(self) -> Mask:
        """Rows that change the disk: WRITE, WRITE_ZEROES, TRIM."""
        return np.not_equal(self.command, Command.FLUSH)

    @property
    def is_changing(self) -> Mask:
        """Modifying rows of at least one byte."""
        return self.is_modifying & (self.length > 0)

    @property
    def is_fua(self) -> Mask:
        """Modifying rows that carry FUA."""
        fua: Mask = np.not_equal(self.flags & np.uint16(CommandFlag.FUA), 0)
        return self.is_modifying & fua

    def rows_before(self, position: int) -> int:
        """Return how many requests were received before a position: those of the first rows.

        It is also the row of the request that was received at that position, if one was.
        """
        return int(np.searchsorted(self.seq, position))

    def seq_of(self, row: int) -> int:
        """Return the seq of a row; of BASE that is BASE."""
        return BASE if row == BASE else int(self.seq[row])

    def extent(self, row: int) -> Extent:
        """Return the bytes of the disk that a request names."""
        return Extent(int(self.offset[row]), int(self.length[row]))

    def extents(self, rows: Rows | NDArray[np.intp] | Mask) -> list[Extent]:
        """Return the same for each of some rows."""
        pairs = zip(self.offset[rows].tolist(), self.length[rows].tolist(), strict=True)
        return [Extent(offset, length) for offset, length in pairs]
