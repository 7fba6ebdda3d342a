"""What of a recording is played, and in which order.

A request is sent where it was received, and where it was completed its answer is waited for before
anything later is sent: so what happened one after the other does so again, and what was in flight
together is so again. Three things differ from that, so that nothing is found safe that need not
have been, and the disk ends as it was recorded:

- A flush is sent alone, and answered before anything else is sent. What was in flight when it was
  received is sent behind it: the flush covers what was completed before (rule 1 of the model), and
  QEMU's would cover all that it finds. A request with FUA makes all tables of a qcow2 file durable,
  so it is played like a flush.
- What was in flight at one of the `cuts` is sent behind that cut: whether a killed QEMU had done it
  is chance, and the worst state lacks it.
- Of requests that overlap and were in flight together, the earlier one is answered before the later
  one is sent, because the recorded disk has them in this order.

What was answered with an error is not played: it was not done, or nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbdproxy.persistence.modes import THROUGH, CacheMode
from nbdproxy.recording.index import Mask, Positions, RequestTable

_NEAR = 64
"""Requests in flight that are compared by whole columns, and beyond that one by one."""
_CHUNK = 1 << 16


class PlayStep(NamedTuple):
    """A step of a play: see `Schedule` and `RequestTable`."""

    cut: int
    row: int
    is_wait: bool
    command: int
    flags: int
    offset: int
    length: int
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The steps of a play, in order, as columns of equal length.

    cut      the first cut that a step comes before: its effect is seen from there on
    row      of the request in the table
    is_wait  whether its answer is waited for; else it is sent
    exact    for each cut from 0 to the end, whether by then nothing was sent that was not answered
    """

    cut: Positions
    row: Positions
    is_wait: Mask
    exact: Mask

    def __len__(self) -> int:
        return len(self.row)

    def steps(self, table: RequestTable) -> Iterator[PlayStep]:
        """Yield the steps, with what the table says of each one's request."""
        for first in range(0, len(self), _CHUNK):
            part = slice(first, first + _CHUNK)
            rows = self.row[part]
            told = (table.command, table.flags, table.offset, table.length, table.position)
            columns = [self.cut[part], rows, self.is_wait[part], *(one[rows] for one in told)]
            yield from map(PlayStep._make, zip(*(one.tolist() for one in columns), strict=True))


def schedule(
    table: RequestTable, mode: CacheMode, *, events: int, cuts: Iterable[int] = ()
) -> Schedule:
    """Return how the requests of a recording with so many `events` are played for a mode.

    Every cut of `cuts`, and the end, is exact unless a flush was in flight there, or what overlaps
    with a request that had been answered.
    """
    played = np.equal(table.error, 0)
    is_flush, alone = table.is_flush, table.is_flush | table.is_fua
    if mode in THROUGH:
        # The guest sees no cache: it sends no flush, and QEMU flushes with each write.
        played &= ~is_flush
        alone = np.zeros(len(table), np.bool_)
    rows = np.flatnonzero(played)
    seq, done, alone = table.seq[rows], np.minimum(table.completed[rows], events), alone[rows]
    barriers = np.unique(np.concatenate((np.array([0, *cuts, events], np.int64), seq[alone] + 1)))
    latest = barriers[np.searchsorted(barriers, done, side="right") - 1]
    # Two instants to a position: when all before it is played, and with the event that is there.
    send = np.where(~alone & (latest > seq), 2 * latest, 2 * seq + 1)
    wait = np.where(alone, send, 2 * done + 1)
    start = table.offset[rows]
    end = start + table.length[rows]
    for earlier, later in sorted(_overlapping(seq, done, start, end), reverse=True):
        send[earlier] = min(send[earlier], send[later])
        wait[earlier] = min(wait[earlier], send[later])
    when = np.concatenate((send, wait))
    is_wait = np.arange(len(when)) >= len(rows)
    order = np.lexsort((is_wait, np.tile(rows, 2), when))
    return Schedule(
        when[order] // 2 + 1,
        np.tile(rows, 2)[order],
        is_wait[order],
        _exact(send // 2 + 1, done, events),
    )


def _exact(first: Positions, last: Positions, events: int) -> Mask:
    """Mark the cuts that are in none of the ranges from `first` to `last`."""
    changes = np.zeros(events + 3, np.int64)
    there = first <= last
    np.add.at(changes, first[there], 1)
    np.add.at(changes, last[there] + 1, -1)
    return np.equal(np.cumsum(changes)[: events + 1], 0)


def _overlapping(
    seq: Positions, done: Positions, start: Positions, end: Positions
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of requests that overlap and were in flight together, the earlier first."""
    behind = np.searchsorted(seq, done)
    reach = behind - np.arange(len(seq)) - 1
    near = np.arange(len(seq))
    for distance in range(1, _NEAR + 1):
        near = near[reach[near] >= distance]
        other = near + distance
        found = (start[near] < end[other]) & (start[other] < end[near])
        yield from zip(near[found].tolist(), other[found].tolist(), strict=True)
    for row in near[reach[near] > _NEAR].tolist():
        first, last = row + _NEAR + 1, behind[row]
        found = (start[row] < end[first:last]) & (start[first:last] < end[row])
        yield from ((row, first + other) for other in np.flatnonzero(found).tolist())
