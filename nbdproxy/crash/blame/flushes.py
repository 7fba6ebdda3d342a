"""Why a request was not durable at a cut: the flush that should have covered it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.recording.index import NEVER, RequestTable


class Safety(StrEnum):
    """Whether a request was durable at a cut, and if not, why."""

    UNANSWERED = "unanswered"
    """The request itself had no reply yet."""
    REFUSED = "refused"
    """The request was answered with an error."""
    LOST = "lost"
    """The store had lost it, for good, before a flush covered it."""
    IN_FLIGHT = "flush-in-flight"
    """The flush that covers it was received, and had no reply yet."""
    FAILED = "flush-failed"
    """The flush that covers it was answered with an error."""
    LATER = "flushed-later"
    """The first flush that covers it came after the cut."""
    NEVER_FLUSHED = "never-flushed"
    """No flush that covers it ever came."""
    BROKEN = "promise-broken"
    """It was durable: whoever lost it broke a promise."""


@dataclass(frozen=True, slots=True)
class Blame:
    """A request's safety at a cut; `flush` is the seq of the flush in question, if there is one.

    `delay_ns` is how long after the cut a later flush came.
    """

    safety: Safety
    flush: int | None = None
    delay_ns: int | None = None

    def sentence(self) -> str:
        """Return the sentence that says so of a request that was lost."""
        flush = self._covers
        return {
            Safety.UNANSWERED: "it had not been answered at the cut",
            Safety.REFUSED: "it was answered with an error",
            Safety.LOST: "the store had lost it before a flush covered it",
            Safety.IN_FLIGHT: f"{flush} covers it, and had not been answered at the cut",
            Safety.FAILED: f"{flush} would have covered it, and failed",
            Safety.LATER: f"{flush} covers it, and came {(self.delay_ns or 0) / 1e6:.3g} ms "
            f"after the cut",
            Safety.NEVER_FLUSHED: "no flush came after it",
            Safety.BROKEN: f"{flush} had made it durable: whoever lost it broke that promise",
        }[self.safety]

    def in_the_end(self) -> str:
        """Return the sentence that says so of a request that is there in the end."""
        if self.safety is not Safety.BROKEN:
            return self.sentence()
        return f"{self._covers} covers it"

    @property
    def _covers(self) -> str:
        return f"flush {self.flush}" if self.flush is not None else "its own FUA"


def blame(timeline: Timeline, row: int, position: int, options: Options) -> Blame:
    """Tell why a request was not safe, or that it was."""
    table = timeline.table
    done = int(table.completed[row])
    durable = int(timeline.durability(options).durable_from[row])
    if durable < position:
        flushes = np.flatnonzero(table.completed == durable)
        own = not len(flushes) or not table.is_flush[flushes[0]]
        return Blame(Safety.BROKEN, None if own else int(table.seq[flushes[0]]))
    if done >= position:
        return Blame(Safety.UNANSWERED)
    if table.error[row]:
        return Blame(Safety.REFUSED)
    return _flushes_fate(timeline, row, position, options)


def _flushes_fate(timeline: Timeline, row: int, position: int, options: Options) -> Blame:
    """Tell what became of the flushes that cover a request which was answered with success."""
    table = timeline.table
    covering = _covering(table, row, options)
    answered = table.completed[covering] < position
    failed = covering[answered & (table.error[covering] != 0)]
    if int(timeline.durability(options).lost_from[row]) < position:
        seq = int(table.seq[failed[0]]) if options.fsyncgate and len(failed) else None
        return Blame(Safety.LOST if seq is None else Safety.FAILED, seq)
    begun = covering[(table.seq[covering] < position) & ~answered]
    if len(begun):
        return Blame(Safety.IN_FLIGHT, int(table.seq[begun[0]]))
    later = covering[table.seq[covering] >= position]
    if len(failed):
        return Blame(Safety.FAILED, int(table.seq[failed[-1]]))
    if not len(later):
        return Blame(Safety.NEVER_FLUSHED)
    source, flush = timeline.source, int(table.seq[later[0]])
    cut_ns = source.time_of(position - 1) if position else 0
    return Blame(Safety.LATER, flush, source.time_of(flush) - cut_ns)


def _covering(table: RequestTable, row: int, options: Options) -> np.ndarray[tuple[int]]:
    """Return the flushes that cover a completed request, in the order received (rules 1, 11)."""
    by_reply = options.coverage is Coverage.REPLIED
    keys = table.completed if by_reply else table.seq
    covers = table.is_flush & (keys > table.completed[row]) & (table.completed[row] != NEVER)
    if not options.multi_conn:
        covers &= table.connection == table.connection[row]
    return np.flatnonzero(covers)
