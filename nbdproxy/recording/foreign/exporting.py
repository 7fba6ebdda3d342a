"""From a recording of ours to the logs of other programs.

dm-log-writes: one order, that of completion. A flush stands where it was received, so that what it
covers stands before it and nothing else does; FUA stands at its own completion. Only what was
answered with success is in it.

nbd-server's transaction log: requests where they were received, replies where they were completed.
Writes that were answered with an error are left out, because nbd-trplay carries out all that it
finds; so what it leaves is our own disk at `end`. A failed flush stays, with its error.

Memory grows with the number of requests in flight. Payloads are checked against their digests;
raises RecordingError where one is damaged.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from math import gcd

import numpy as np

from nbdproxy.errors import RecordingError
from nbdproxy.recording.foreign.dm_log_writes import SECTOR, ZERO_PIECE, DmLogWriter
from nbdproxy.recording.foreign.formats import (
    STEP,
    ZEROES,
    ConversionProgress,
    Converted,
    pieces,
    said,
)
from nbdproxy.recording.foreign.nbd_trlog import FLAGS, LENGTH_MAX, Asked, TransactionLogWriter
from nbdproxy.recording.format import SlotKind
from nbdproxy.recording.index import NEVER, Mask
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Event, Recording, command_name
from nbdproxy.requests import Command, CommandFlag
from nbdproxy.sizes import size_text

_PART = 1024 * 1024
_NOTES_KEPT = {NoteKind.MARK, NoteKind.CONNECT, NoteKind.DISC, NoteKind.EOF, NoteKind.REFUSED}
_NOTES_KEPT |= {NoteKind.END, NoteKind.POLICY}
_COOKIE_BITS = 48
"""A cookie is the request's seq; what is above these bits numbers the pieces of a long one."""
_PIECES_MAX = 1 << (64 - _COOKIE_BITS)
_ENTRIES_MAX = 1 << 20
"""Entries that one request may become in a log of dm-log-writes: 8 TiB."""


def to_dm_log(recording: Recording, log: DmLogWriter, progress: ConversionProgress) -> Converted:
    """Write a recording as a dm-log-writes log, and finish the log.

    Raises RecordingError if a request does not fit into sectors of 512 bytes.
    """
    job = _DmExport(recording, log)
    for event in _events(recording, progress):
        if event.kind is SlotKind.RECEIVED:
            job.received(event)
        elif event.kind is SlotKind.COMPLETED:
            for seq in range(event.offset, event.offset + event.length):
                job.completed(seq)
        elif event.kind is SlotKind.MARK:
            job.mark(event)
    log.finish()
    return Converted(job.counts, job.left_out, tuple(job.remarks()), recording.missing)


def to_trlog(
    recording: Recording, log: TransactionLogWriter, progress: ConversionProgress
) -> Converted:
    """Write a recording as a transaction log of nbd-server, with data."""
    job = _TrlogExport(recording, log)
    for event in _events(recording, progress):
        if event.kind is SlotKind.RECEIVED:
            job.received(event)
        elif event.kind is SlotKind.COMPLETED:
            for seq in range(event.offset, event.offset + event.length):
                job.completed(seq, event.flags)
        elif event.kind is SlotKind.DISC:
            log.request(Asked(0, Command.DISC, 0, 0, 0, ZEROES), iter(()))
    return Converted(job.counts, job.left_out, tuple(job.remarks()), recording.missing)


def _events(recording: Recording, progress: ConversionProgress) -> Iterator[Event]:
    for event in recording.log():
        if event.seq % STEP == 0:
            progress(event.seq, recording.events)
        yield event


def _payload(recording: Recording, event: Event) -> Iterator[memoryview]:
    """Yield a request's data in parts, each valid until the next."""
    buffer = memoryview(bytearray(min(event.length, _PART)))
    for at, count in pieces(event.position, event.length, _PART):
        recording.read_payload(at, buffer[:count])
        yield buffer[:count]


class _DmExport:
    """What an export to dm-log-writes keeps in mind."""

    def __init__(self, recording: Recording, log: DmLogWriter) -> None:
        self._recording = recording
        self._log = log
        table = recording.table
        self._lands = (table.completed != NEVER) & (table.error == 0)
        _check_sectors(recording, self._lands & table.is_modifying)
        self._row = 0
        # In the order received: what will be answered with success and is not yet.
        self._flight: dict[int, Event] = {}
        # What overtook something that is still in flight, by seq: seq, start and end. Sorted, so
        # that one request that a policy holds back for long does not make all others slow.
        self._overtook: list[tuple[int, int, int]] = []
        self._late = self._cut_marks = 0
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def received(self, event: Event) -> None:
        """Note a request; a flush is listed at once."""
        row, self._row = self._row, self._row + 1
        if not self._lands[row]:
            answered = self._recording.table.completed[row] != NEVER
            self.left_out["answered with an error" if answered else "unanswered"] += 1
        elif event.command == Command.FLUSH:
            self.counts["flush"] += 1
            self._log.flush()
        elif not event.length:
            self.left_out["of no length"] += 1
        else:
            self._flight[event.seq] = event

    def completed(self, seq: int) -> None:
        """List a request that was answered with success."""
        event = self._flight.pop(seq, None)
        if event is None:
            return
        end = event.offset + event.length
        place = bisect(self._overtook, (seq, 0, 0))
        self._late += any(
            low < end and event.offset < high for _, low, high in self._overtook[place:]
        )
        oldest = next(iter(self._flight), NEVER)
        if seq > oldest:
            self._overtook.insert(place, (seq, event.offset, end))
        del self._overtook[: bisect(self._overtook, (oldest, 0, 0))]
        self._list(event)

    def _list(self, event: Event) -> None:
        if event.length // ZERO_PIECE >= _ENTRIES_MAX:
            raise _too_long(self._recording, event)
        fua = bool(event.flags & CommandFlag.FUA)
        self.counts[command_name(event.command)] += 1
        if event.command == Command.WRITE:
            data = _payload(self._recording, event)
            self._log.write(event.offset, event.length, data, fua=fua)
        elif event.command == Command.TRIM:
            self._log.discard(event.offset, event.length, fua=fua)
        else:
            self._log.zeroes(event.offset, event.length, fua=fua)

    def mark(self, event: Event) -> None:
        """List a mark."""
        text = bytearray(event.length)
        if text:
            self._recording.read_payload(event.position, memoryview(text))
        self.counts["mark"] += 1
        self._cut_marks += not self._log.mark(text.decode(errors="surrogateescape"))

    def remarks(self) -> Iterator[str]:
        """Yield what there is to say."""
        yield (
            "dm-log-writes keeps one order, that of completion, with flushes where they were "
            "received; times, cookies and the order in which requests were received are lost"
        )
        if self._late:
            yield (
                f"{said(self._late, 'write was', 'writes were')} completed after an overlapping "
                "later one: dm-log-writes replays them in completion order, so its end may differ "
                "from the disk's (check with --verify)"
            )
        if self._cut_marks:
            yield f"{said(self._cut_marks, 'mark was', 'marks were')} cut to the 479 bytes it holds"
        yield from _common(self._recording, self.left_out)


class _TrlogExport:
    """What an export to a transaction log keeps in mind."""

    def __init__(self, recording: Recording, log: TransactionLogWriter) -> None:
        self._recording = recording
        self._log = log
        self._row = 0
        # How many pieces a request was written in, until it is answered.
        self._flight: dict[int, int] = {}
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def received(self, event: Event) -> None:
        """Write a request, in several if it is longer than a record can tell."""
        row, self._row = self._row, self._row + 1
        table = self._recording.table
        if table.error[row] and event.command != Command.FLUSH:
            self.left_out["answered with an error"] += 1
            return
        self.counts[command_name(event.command)] += 1
        flags = event.flags & FLAGS
        if event.length // _LONGEST >= _PIECES_MAX:
            raise _too_long(self._recording, event)
        parts = list(pieces(event.offset, event.length, _LONGEST)) or [(event.offset, 0)]
        for number, (offset, length) in enumerate(parts):
            cookie = event.seq | number << _COOKIE_BITS
            position = ZEROES
            data: Iterator[memoryview] = iter(())
            if event.command == Command.WRITE:
                assert len(parts) == 1
                position, data = event.position, _payload(self._recording, event)
            asked = Asked(flags, event.command, cookie, offset, length, position)
            self._log.request(asked, data)
        if table.completed[row] != NEVER:
            self._flight[event.seq] = len(parts)

    def completed(self, seq: int, error: int) -> None:
        """Write the reply to a request that is in the log."""
        for number in range(self._flight.pop(seq, 0)):
            self._log.reply(seq | number << _COOKIE_BITS, error)

    def remarks(self) -> Iterator[str]:
        """Yield what there is to say."""
        yield (
            "a transaction log keeps both instants of a request as an order; times are lost, "
            "cookies are the seq of ours; nbd-trplay replays requests as they were received and "
            "ignores flushes, FUA and replies"
        )
        marks = sum(note.kind is NoteKind.MARK for note in self._recording.notes)
        if marks:
            yield f"{said(marks, 'mark is', 'marks are')} lost: the format has none"
        block = _block(self._recording)
        if block % SECTOR:
            yield f"not all requests are whole sectors: replay it with nbd-trplay -b {block}"
        yield from _common(self._recording, self.left_out)


_LONGEST = LENGTH_MAX // SECTOR * SECTOR


def _block(recording: Recording) -> int:
    """Return the greatest block that all requests are multiples of, 0 if there are none."""
    table = recording.table
    rows = table.is_modifying & (table.error == 0)
    columns = (table.offset[rows], table.length[rows])
    return reduce(gcd, (gcd(*np.unique(column).tolist()) for column in columns), 0)


def _check_sectors(recording: Recording, rows: Mask) -> None:
    """Refuse a recording with a request that is not whole sectors."""
    table = recording.table
    odd = np.flatnonzero(rows & ((table.offset | table.length) % SECTOR != 0))
    if len(odd):
        row = odd[0]
        raise RecordingError(
            f"request {table.seq[row]} of {recording.path} ({table.length[row]} bytes at "
            f"{table.offset[row]}) is not whole sectors of {SECTOR} bytes, as dm-log-writes needs "
            f"them; {said(len(odd), 'request is', 'requests are')} not: use --to nbd-trlog"
        )


def _too_long(recording: Recording, event: Event) -> RecordingError:
    return RecordingError(
        f"request {event.seq} of {recording.path} ({size_text(event.length)}) is too long for the "
        "log: there is no way to convert it"
    )


def _common(recording: Recording, left_out: Counter[str]) -> Iterator[str]:
    """Yield what is lost in either format."""
    for why, count in left_out.items():
        yield f"{said(count, 'request', 'requests')} {why} left out"
    if recording.refused:
        refused = said(recording.refused, "request", "requests")
        yield f"{refused} that never reached the disk left out"
    clients = sum(note.kind is NoteKind.CONNECT for note in recording.notes)
    if clients > 1:
        yield f"which of {clients:,} connections a request came on is lost"
    notes = Counter(note.kind.value for note in recording.notes if note.kind not in _NOTES_KEPT)
    if notes:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in notes.items())
        yield f"notes are lost: {listed}"
