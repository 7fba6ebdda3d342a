"""Which requests a failure must leave on the disk, and which it may: rules 1-5 and 10-12.

A *cut* is a position t in the recording: every event with seq < t has happened, nothing else has.
`Durability` answers for any cut and some rows of a `RequestTable`, with one boolean a row; rows of
flushes are always False.

Guarantees: the answer for a cut never depends on an event at or after it; the levels are nested
(`NOTHING` in `FLUSHED` in ... in `RECEIVED`); a request durable at t is durable at every later cut.
It takes sixteen bytes a request that are worked out once; temporaries stay under ten.

Not covered: what becomes of a *sector* (rules 6-9), which follows from the chosen requests painted
in seq order (`crash/states/`) and is enumerated slowly in `tests/support/persistence_reference.py`;
shorn or garbage sectors; QEMU's cache modes (`nbdproxy.persistence.modes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from nbdproxy.recording.index import NEVER, Mask, Positions, RequestTable, Rows
from nbdproxy.requests import Command, CommandFlag

RowChoice = slice | NDArray[np.intp] | Rows

_CHUNK = 1 << 16
"""Rows worked on at once: bounds the temporaries, and 512 KiB a column stays in the cache."""


class Coverage(Enum):
    """How to read "flush covers what was completed before it" (rule 1)."""

    RECEIVED = "received"
    """Completed before the flush was received: the careful reading, and the default."""
    REPLIED = "replied"
    """Completed before the flush's reply: the generous one, to see which verdicts depend on it."""


class Level(Enum):
    """What a failure is bound to leave, from least to most; each level contains the one before."""

    NOTHING = "nothing"
    FLUSHED = "flushed"
    """Durable by the rules."""
    FLUSHED_OR_FLUSHING = "flushing"
    """Also what would be durable had the flushes in flight at the cut completed."""
    COMPLETED = "completed"
    """Also what was answered with success and not lost since (rules 10 and 12)."""
    RECEIVED = "received"
    """Also what was read off the wire and not answered yet."""


@dataclass(frozen=True, slots=True)
class Options:
    """The readings and the what-ifs of the model.

    sector      the atomic unit in bytes (rule 7); it matters where single sectors are chosen
    multi_conn  whether CAN_MULTI_CONN was advertised (rule 11)
    fsyncgate   whether what a failed flush had in hand is beyond later flushes (rule 10)
    losses      positions at which the store lost, for good and in silence, what was completed and
                not durable (rule 12); each strikes just before the event of that seq
    """

    coverage: Coverage = Coverage.RECEIVED
    sector: int = 512
    multi_conn: bool = True
    fsyncgate: bool = False
    losses: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.sector >= 512
        assert self.sector & (self.sector - 1) == 0, "an atomic unit is a power of two"


DEFAULTS = Options()


class Durability:
    """When each request became durable and when it was lost: what a failure leaves, at any cut.

    durable_from  the position of the event that made a request durable, NEVER if none did; it is
                  durable at t if that is < t (rules 1-4, 10-12)
    lost_from     the position since which no flush can save a completed request any more, NEVER if
                  there is none (rules 10 and 12); it may still be found on the disk, as nothing
                  says that the store removed it
    """

    def __init__(self, table: RequestTable, options: Options = DEFAULTS) -> None:
        self.table = table
        self.options = options
        self.durable_from = np.empty(len(table), np.int64)
        self.lost_from = np.empty(len(table), np.int64)
        for rows, since, gone in _by_chunks(table, options):
            self.durable_from[rows], self.lost_from[rows] = since, gone
        self._flushes = np.flatnonzero(table.is_flush)

    def kept(self, rows: RowChoice, t: int, level: Level) -> Mask:
        """Tell for each of `rows` whether a failure at t is bound to leave it, at this level."""
        since = self.durable_from[rows]
        if level is Level.NOTHING:
            return np.zeros(len(since), np.bool_)
        if level is Level.FLUSHED:
            return np.less(since, t)
        if level is Level.FLUSHED_OR_FLUSHING:
            return np.less(since, t) | self._flushing(rows, t)
        mask = self._answered(rows, t) if level is Level.COMPLETED else self.sent(rows, t)
        mask &= self.lost_from[rows] >= t
        return mask

    def sent(self, rows: RowChoice, t: int) -> Mask:
        """Tell for each of `rows` whether it was received by t, and not answered with an error.

        All of those are the fullest legal choice.
        """
        table = self.table
        mask = np.less(table.seq[rows], t)
        mask &= (table.completed[rows] >= t) | (table.error[rows] == 0)
        mask &= table.command[rows] != Command.FLUSH
        return mask

    def _answered(self, rows: RowChoice, t: int) -> Mask:
        table = self.table
        mask = np.less(table.completed[rows], t)
        mask &= table.error[rows] == 0
        mask &= table.command[rows] != Command.FLUSH
        return mask

    def _flushing(self, rows: RowChoice, t: int) -> Mask:
        """Tell which rows a flush in flight at t covers."""
        mask = self._answered(rows, t)
        limit = _covered_below(self.table, self._flushes, t, self.options)
        if not isinstance(limit, int):
            limit = limit[self.table.connection[rows]]
        mask &= self.table.completed[rows] < limit
        mask &= (self.durable_from[rows] >= t) & (self.lost_from[rows] >= t)
        return mask


def _covered_below(
    table: RequestTable, flushes: NDArray[np.intp], t: int, options: Options
) -> Positions | int:
    """The position before which completion is covered by a flush in flight at t.

    One for all rows, or, where coverage does not cross connections, one for each connection.
    """
    begun = flushes[: np.searchsorted(table.seq[flushes], t)]
    flying = begun[table.completed[begun] >= t]
    if not len(flying):
        return 0
    received_ = options.coverage is Coverage.RECEIVED
    if options.multi_conn:
        return int(table.seq[flying[-1]]) if received_ else t
    limit = np.zeros(int(np.max(table.connection)) + 1, np.int64)
    np.maximum.at(limit, table.connection[flying], table.seq[flying] if received_ else t)
    return limit


@dataclass(frozen=True, slots=True, eq=False)
class _Flushes:
    """The answered flushes of one connection (of all, if `connection` is None), by ascending key.

    A flush covers a request if its key is greater than the request's completion. `answered[i]` is
    the earliest answer among flush i and those behind it, `failed[i]` whether that was an error;
    one more entry at the end stands for "covered by none".
    """

    connection: int | None
    keys: Positions
    answered: Positions
    failed: Mask


def _group(table: RequestTable, rows: NDArray[np.intp], options: Options) -> _Flushes:
    on_one = not options.multi_conn and len(rows)
    connection = int(table.connection[rows[0]]) if on_one else None
    answers = table.completed[rows]
    keys = table.seq[rows] if options.coverage is Coverage.RECEIVED else answers
    order = np.argsort(keys, kind="stable")
    # Position and outcome in one number, so that one running minimum carries both.
    codes = (answers << 1 | (table.error[rows] != 0))[order]
    codes = np.minimum.accumulate(codes[::-1])[::-1]
    return _Flushes(
        connection,
        keys[order],
        np.append(codes >> 1, NEVER),
        np.append((codes & 1).astype(np.bool_), False),
    )


def _groups(table: RequestTable, options: Options) -> list[_Flushes]:
    answered = table.is_flush
    answered &= table.completed != NEVER
    if not options.fsyncgate:
        answered &= table.error == 0
    rows = np.flatnonzero(answered)
    del answered
    if options.multi_conn:
        return [_group(table, rows, options)]
    connections = table.connection[rows]
    return [_group(table, rows[connections == one], options) for one in np.unique(connections)]


def _by_chunks(
    table: RequestTable, options: Options
) -> Iterator[tuple[slice, Positions, Positions]]:
    """Yield, chunk by chunk, the positions since which rows are durable and since which lost.

    The flush that decides on a request is the first answered among those that cover it: if it
    succeeded, the request is safe whatever happens later; if it failed (and failures count, which
    is fsyncgate), those after it come too late. A loss before that answer comes first.
    """
    groups = _groups(table, options)
    losses = np.array([*sorted(options.losses), NEVER], np.int64)
    for first in range(0, len(table), _CHUNK):
        rows = slice(first, min(first + _CHUNK, len(table)))
        done = table.completed[rows]
        counts = (done != NEVER) & (table.error[rows] == 0)
        counts &= table.command[rows] != Command.FLUSH
        answered, failed = _deciding_flush(groups, done, table.connection[rows])
        next_loss = np.searchsorted(losses, done, side="right")
        loss = losses[np.minimum(next_loss, len(losses) - 1)]
        in_time = answered < loss
        fua = table.flags[rows] & CommandFlag.FUA != 0
        since = np.where(in_time & ~failed, answered, NEVER)
        since[fua] = done[fua]
        since[~counts] = NEVER
        gone = np.where(in_time & failed, answered, np.where(in_time, NEVER, loss))
        gone[fua | ~counts] = NEVER
        yield rows, since, gone


def _deciding_flush(
    groups: list[_Flushes], done: Positions, connection: NDArray[np.uint32]
) -> tuple[Positions, Mask]:
    answered = np.full(len(done), NEVER, np.int64)
    failed = np.zeros(len(done), np.bool_)
    for group in groups:
        covering = np.searchsorted(group.keys, done, side="right")
        if group.connection is None:
            return group.answered[covering], group.failed[covering]
        here = connection == group.connection
        answered[here] = group.answered[covering[here]]
        failed[here] = group.failed[covering[here]]
    return answered, failed
