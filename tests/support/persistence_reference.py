"""The rules once more, slow and obvious: the reference that the fast model is tested against.

A log is a plain list of events; an event's index is its seq. `allowed` answers, for each sector of
a tiny disk, with the exact set of values that a failure may leave. Values are names: BASE, ZERO,
or the seq of the WRITE that left its data there.

Quadratic and worse: for logs of some tens of events. Sectors are numbered, not measured, so the
size of the atomic unit (rule 7) does not occur here. Garbage after TRIM is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from nbdproxy.persistence.model import DEFAULTS, Coverage, Level, Options
from nbdproxy.recording.index import NEVER, RequestTable
from nbdproxy.requests import Command, CommandFlag

BASE = -1
"""The value of a sector as it was before the recording."""

ZERO = -2
"""The value of a sector that reads as zeroes."""


@dataclass(frozen=True, slots=True)
class Received:
    """A request came in; `count` sectors from sector `first`, none for a flush."""

    command: Command
    first: int = 0
    count: int = 0
    fua: bool = False
    connection: int = 1


@dataclass(frozen=True, slots=True)
class Completed:
    """The reply to the request received at `request` went out."""

    request: int
    error: int = 0


Log = Sequence[Received | Completed]


@dataclass(frozen=True, slots=True)
class _Request:
    seq: int
    what: Received
    reply: int | None
    error: int

    @property
    def is_flush(self) -> bool:
        return self.what.command is Command.FLUSH

    def answered_by(self, t: int) -> bool:
        return self.reply is not None and self.reply < t

    def succeeded_by(self, t: int) -> bool:
        return self.answered_by(t) and self.error == 0


def _requests(log: Log) -> list[_Request]:
    replies = {e.request: (seq, e.error) for seq, e in enumerate(log) if isinstance(e, Completed)}
    return [
        _Request(seq, event, *replies.get(seq, (None, 0)))
        for seq, event in enumerate(log)
        if isinstance(event, Received)
    ]


def _covers(flush: _Request, write: _Request, options: Options) -> bool:
    if write.reply is None or write.error:
        return False
    if not options.multi_conn and flush.what.connection != write.what.connection:
        return False
    if options.coverage is Coverage.RECEIVED:
        return write.reply < flush.seq
    return flush.reply is None or write.reply < flush.reply


def _saved(log: Log, write: _Request, t: int, options: Options) -> bool:
    if write.what.fua and write.succeeded_by(t):
        return True
    for flush in (r for r in _requests(log) if r.is_flush and _covers(r, write, options)):
        if flush.succeeded_by(t) and not _lost(log, write, (flush.reply or 0) + 1, options):
            return True
    return False


def _lost(log: Log, write: _Request, t: int, options: Options) -> bool:
    """Whether rule 10 or 12 struck a completed, unprotected write before t."""
    assert write.reply is not None
    strikes = [loss for loss in options.losses if write.reply < loss < t]
    if options.fsyncgate:
        for flush in (r for r in _requests(log) if r.is_flush and _covers(r, write, options)):
            if flush.answered_by(t) and flush.error:
                strikes.append(flush.reply or 0)
    return any(not _saved(log, write, strike, options) for strike in strikes)


def durable(log: Log, t: int, options: Options = DEFAULTS) -> set[int]:
    """Rules 1-4, 10-12: the seqs of the requests that are durable at t."""
    writes = [r for r in _requests(log) if not r.is_flush]
    return {w.seq for w in writes if _saved(log, w, t, options)}


def kept(log: Log, t: int, level: Level, options: Options = DEFAULTS) -> set[int]:
    """The seqs of the requests that a failure at t leaves for certain."""
    requests = [r for r in _requests(log) if r.seq < t]
    writes = [r for r in requests if not r.is_flush]
    done = {w.seq: w for w in writes if w.succeeded_by(t)}
    stay = {
        seq
        for seq, w in done.items()
        if seq in durable(log, t, options) or not _lost(log, w, t, options)
    }
    if level is Level.NOTHING:
        return set()
    if level is Level.FLUSHED:
        return durable(log, t, options)
    if level is Level.FLUSHED_OR_FLUSHING:
        flushing = [r for r in requests if r.is_flush and not r.answered_by(t)]
        # In flight at t, so its reply, whatever it will be, is not before t.
        covered = {
            seq
            for seq in stay
            if any(_covers(replace(f, reply=None), done[seq], options) for f in flushing)
        }
        return durable(log, t, options) | covered
    if level is Level.COMPLETED:
        return stay
    return stay | {w.seq for w in writes if not w.answered_by(t)}


def may(log: Log, t: int, must: set[int]) -> set[int]:
    """Rule 5: what chance decides on, given what `must` stay."""
    return {r.seq for r in _requests(log) if r.seq < t and not r.is_flush} - must


def allowed(
    log: Log, t: int, sectors: int, options: Options = DEFAULTS, level: Level = Level.FLUSHED
) -> list[frozenset[int]]:
    """Rules 6, 8 and 9: the values that each sector may have after a failure at t."""
    must = kept(log, t, level, options)
    requests = {r.seq: r for r in _requests(log)}
    chosen = [requests[seq] for seq in must | may(log, t, must)]
    return [_values(chosen, must, sector) for sector in range(sectors)]


def _values(requests: list[_Request], must: set[int], sector: int) -> frozenset[int]:
    """A TRIM leaves zeroes or, as if it had never been, the old data: try both for each."""
    here = [r for r in requests if r.what.first <= sector < r.what.first + r.what.count]
    trims = [r for r in here if r.what.command is Command.TRIM]
    values: set[int] = set()
    for absent in _subsets(trims):
        values |= _landing([r for r in here if r not in absent], must)
    return frozenset(values)


def _landing(here: list[_Request], must: set[int]) -> set[int]:
    """Rule 6 for the requests that touch one sector."""
    kept_here = [r for r in here if r.seq in must]
    latest = [d for d in kept_here if not any(_before(d, e) for e in kept_here)]
    chance = [r for r in here if r.seq not in must and not any(_before(r, d) for d in kept_here)]
    values = {_value(r) for r in latest + chance}
    return values if kept_here else values | {BASE}


def _before(a: _Request, b: _Request) -> bool:
    return a.reply is not None and a.reply < b.seq


def _value(request: _Request) -> int:
    return request.seq if request.what.command is Command.WRITE else ZERO


def _subsets(items: list[_Request]) -> Iterable[tuple[_Request, ...]]:
    return (some for n in range(len(items) + 1) for some in combinations(items, n))


def table_of(log: Log, sector: int = 512) -> RequestTable:
    """Return the log's `RequestTable`, with payloads laid end to end in the order received."""
    requests = _requests(log)
    position, positions = 0, []
    for r in requests:
        is_write = r.what.command is Command.WRITE
        positions.append(position if is_write else -1)
        position += r.what.count * sector if is_write else 0
    return RequestTable(
        seq=np.array([r.seq for r in requests], np.int64),
        command=np.array([r.what.command for r in requests], np.uint8),
        flags=np.array([CommandFlag.FUA if r.what.fua else 0 for r in requests], np.uint16),
        connection=np.array([r.what.connection for r in requests], np.uint32),
        offset=np.array([r.what.first * sector for r in requests], np.int64),
        length=np.array([r.what.count * sector for r in requests], np.int64),
        position=np.array(positions, np.int64),
        completed=np.array([NEVER if r.reply is None else r.reply for r in requests], np.int64),
        error=np.array([r.error for r in requests], np.uint16),
    )
