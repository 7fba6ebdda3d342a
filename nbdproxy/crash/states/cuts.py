"""Cuts: the texts that name an instant of a recording, and the positions they stand for.

`end` | `before-exit` | `riskiest` | `seq:N` | `flush:N` | `time:12.5s` | `mark:NAME`

A cut at position t means: the events with seq < t have happened, the others have not. `resolve`
raises UsageError, with what there is to choose from, for everything that the recording lacks.

Not covered: knowing for sure which flushes were QEMU's own where no QMP event says when it began
to shut down. See `before_exit` for what is concluded then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nbdproxy.crash.states.source import Source
from nbdproxy.errors import UsageError
from nbdproxy.persistence.model import Durability
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.notes import Note, NoteKind

_UNITS_NS = {"": 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_TIME = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)(?P<unit>s|ms|us|ns|)")


_EXIT_FLUSHES = 2
"""So many a QEMU sends on its way out, for a raw disk."""


@dataclass(frozen=True, slots=True)
class Cut:
    """An instant: what was asked for, its position, and what there is to say about it.

    `matters` is False where what the note says changes nothing of what was flushed when.
    """

    text: str
    position: int
    note: str = ""
    matters: bool = True

    def time_ns(self, source: Source) -> int:
        """Return when the last event before the cut happened, from the recording's start."""
        return source.time_of(self.position - 1) if self.position else 0


def resolve(source: Source, text: str) -> Cut:
    """Return the cut that `text` names in a recording."""
    if text == "end":
        return Cut(text, source.events)
    if text == "before-exit":
        return before_exit(source)
    if text == "riskiest":
        return riskiest(source)
    kind, _, value = text.partition(":")
    finder = _FINDERS.get(kind)
    if finder is None or not value:
        raise UsageError(
            f"{text!r} names no instant: use end, before-exit, riskiest, seq:N, flush:N, "
            f"time:12.5s or mark:NAME"
        )
    return finder(source, text, value)


def before_exit(source: Source) -> Cut:
    """Return the last instant before QEMU's own exit flushes.

    Exact if the recording has QEMU's SHUTDOWN event, which comes before those flushes. Otherwise,
    if the last connection said DISC and the two requests before that were successful flushes,
    these two count as QEMU's own (a raw disk gets exactly two); a third is the guest's own sync
    and stays. Otherwise nothing is set aside, and the note says why. It matters if flushes that are
    set aside, or may have been QEMU's, made anything durable.
    """
    cut = _before_exit(source)
    return replace(cut, matters=_is_flushed_late(source, cut.position))


def _is_flushed_late(source: Source, position: int) -> bool:
    """Tell whether the flushes behind a cut, or the last ones if it is the end, were needed."""
    table = source.table
    if position == source.events:
        rows = np.flatnonzero(table.connection == _last_connection(source))[-_EXIT_FLUSHES:]
        others = np.flatnonzero(~table.is_flush[rows])
        exits = rows[others[-1] + 1 :] if len(others) else rows
        if not len(exits):
            return False
        position = int(table.seq[exits[0]])
    since = Durability(table).durable_from[table.is_modifying]
    return bool(((since >= position) & (since != NEVER)).any())


def _last_connection(source: Source) -> int:
    connections = [note.connection for note in source.notes if note.kind is NoteKind.CONNECT]
    if len(source.table):
        connections.append(int(np.max(source.table.connection)))
    return max(connections, default=0)


def _before_exit(source: Source) -> Cut:
    text = "before-exit"
    shutdowns = [note.seq for note in source.notes if _is_shutdown(note)]
    if shutdowns:
        return Cut(text, shutdowns[-1], "QEMU's SHUTDOWN event")
    last = _last_connection(source)
    discs = [n.seq for n in source.notes if n.kind is NoteKind.DISC and n.connection == last]
    if not discs:
        return Cut(
            text, source.events, "the last connection did not end in DISC: nothing was set aside"
        )
    table = source.table
    rows = np.flatnonzero((table.connection == last) & (table.seq < discs[-1]))[-_EXIT_FLUSHES:]
    flushed = table.is_flush[rows] & (table.error[rows] == 0) & (table.completed[rows] < discs[-1])
    if len(rows) < _EXIT_FLUSHES or not flushed.all():
        note = "the client did not flush twice right before it left, as QEMU does: "
        return Cut(text, source.events, f"{note}nothing was set aside")
    return Cut(
        text,
        int(table.seq[rows[0]]),
        "2 flushes before DISC set aside as QEMU's own; if this was another client, ask with "
        "--at end",
    )


def riskiest(source: Source) -> Cut:
    """Return the first instant at which the most bytes were completed and not yet durable."""
    table = source.table
    rows = np.flatnonzero(table.is_modifying & (table.completed != NEVER) & (table.error == 0))
    if not len(rows):
        return Cut("riskiest", source.events, "nothing was ever written")
    since = Durability(table).durable_from[rows]
    length = table.length[rows]
    at = np.concatenate((table.completed[rows], since[since != NEVER]))
    change = np.concatenate((length, -length[since != NEVER]))
    order = np.argsort(at, kind="stable")
    events, first = np.unique(at[order], return_index=True)
    risk = np.cumsum(np.add.reduceat(change[order], first))
    most = int(np.argmax(risk))
    note = f"{int(risk[most]):,} bytes were written and not yet flushed, more than ever else"
    return Cut("riskiest", int(events[most]) + 1, note)


def _is_shutdown(note: Note) -> bool:
    return note.kind is NoteKind.QMP and note.fields.get("event") == "SHUTDOWN"


def _after_event(source: Source, text: str, value: str) -> Cut:
    if not value.isdecimal() or int(value) >= source.events:
        raise UsageError(
            f"{text!r}: this recording has {source.events} events; use seq:0 to "
            f"seq:{source.events - 1}"
            if source.events
            else f"{text!r}: this recording has no events; only end can be asked for"
        )
    return Cut(text, int(value) + 1, f"just after event {int(value)}")


def _after_flush(source: Source, text: str, value: str) -> Cut:
    table = source.table
    done = np.sort(
        table.completed[table.is_flush & (table.completed != NEVER) & (table.error == 0)]
    )
    if not value.isdecimal() or not 1 <= int(value) <= len(done):
        raise UsageError(
            f"{text!r}: this recording has {len(done)} flushes that succeeded"
            + (f"; use flush:1 to flush:{len(done)}" if len(done) else "; use seq:N or time:1.5s")
        )
    return Cut(text, int(done[int(value) - 1]) + 1, f"just after completed flush {int(value)}")


def _at_time(source: Source, text: str, value: str) -> Cut:
    match = _TIME.fullmatch(value)
    if match is None:
        raise UsageError(f"{text!r} is no time: write time:12.5s or time:800ms")
    instant = round(float(match["number"]) * _UNITS_NS[match["unit"]])
    length = source.time_of(source.events - 1) if source.events else 0
    if instant > length:
        raise UsageError(
            f"{text!r}: this recording ends after {length / 1e9:.3f}s; use an earlier time, or end"
        )
    return Cut(text, source.position_at(instant), f"{instant / 1e9:g}s after the start")


def _at_mark(source: Source, text: str, value: str) -> Cut:
    marks = [note for note in source.notes if note.kind is NoteKind.MARK]
    found = [note.seq for note in marks if note.text == value]
    if not found:
        names = ", ".join(sorted({mark.text for mark in marks})) or "none"
        raise UsageError(f"{text!r}: this recording's marks are: {names}")
    note = f"the last of {len(found)} marks of that name" if len(found) > 1 else "just after it"
    return Cut(text, found[-1] + 1, note)


_FINDERS: dict[str, Callable[[Source, str, str], Cut]] = {
    "seq": _after_event,
    "flush": _after_flush,
    "time": _at_time,
    "mark": _at_mark,
}
