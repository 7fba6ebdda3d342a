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

from nbdproxy.requests import Command, CommandFlag

NEVER = np.iinfo(np.int64).max
"""The `completed` of a request that was never answered."""

Mask = NDArray[np.bool_]
"""One boolean a row: a choice of requests."""


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

    seq: NDArray[np.int64]
    command: NDArray[np.uint8]
    flags: NDArray[np.uint16]
    connection: NDArray[np.uint32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    position: NDArray[np.int64]
    completed: NDArray[np.int64]
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
    def is_fua(self) -> Mask:
        """Modifying rows that carry FUA."""
        fua: Mask = np.not_equal(self.flags & np.uint16(CommandFlag.FUA), 0)
        return self.is_modifying & fua
