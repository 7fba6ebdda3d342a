"""From the logs of other programs to a recording of ours.

What the model then says of the recording is what the log means: an entry of a dm-log-writes log is
received and completed before the next one; requests and replies of a transaction log stand as they
stood there. The image, if one is named, is not written and stays the base of the recording.

Memory grows with the number of entries (about 24 bytes each), not with their data. What is all zero
in a dm-log-writes log becomes WRITE_ZEROES: such a log has no other way to tell of it, and the
model treats both alike.

Not covered: times, which are those of the import, and what the log was about before it began.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from nbdproxy import __version__
from nbdproxy.errors import RecordingError, UsageError
from nbdproxy.recording.foreign.dm_log_writes import END_MARK, DmLog, LogEntry, LogFlag
from nbdproxy.recording.foreign.formats import (
    STEP,
    TRIMMED,
    ConversionProgress,
    Converted,
    Touches,
    pieces,
    said,
)
from nbdproxy.recording.foreign.nbd_trlog import FLAGS, Answered, Asked, TransactionLog, take
from nbdproxy.recording.meta import IMPORTED, Ending, Fingerprint, Meta
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import command_name
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import MODIFYING, Command, CommandFlag, Request

LONGEST = 32 * 1024 * 1024
"""Longer writes become several requests of that many bytes, so that memory does not grow."""

_ROUND = 1024 * 1024
_NOTHING = memoryview(b"")
_NO_IMAGE = "/dev/zero"
"""The image of a recording that began on zeroes; nothing is ever read from it."""


@dataclass(frozen=True, slots=True)
class ImportedBase:
    """What was on the disk before the log began.

    `image` is its absolute path, `size` in bytes, `data` what is not a hole, as offset and length.
    """

    image: str
    size: int
    data: tuple[tuple[int, int], ...]
    fingerprint: Fingerprint


def disk_size(touches: Touches, base: ImportedBase | None, size: int | None) -> int:
    """Return how large the disk was in bytes: as said, as the base is, or as the log shows.

    Raises UsageError if what was said is not so.
    """
    if base is not None:
        if size is not None and size != base.size:
            raise UsageError(
                f"--size {size} is not the size of {base.image}, which has {base.size} bytes; "
                "drop --size, or name another base"
            )
        size = base.size
    if size is None:
        return max(-(-touches.end // _ROUND), 1) * _ROUND
    if size <= 0:
        raise UsageError(f"--size {size} is no size of a disk; give its bytes, such as 10G")
    if touches.end > size:
        raise UsageError(
            f"the log writes up to byte {touches.end}, and the disk would have {size}; "
            f"{'name the right base' if base is not None else 'give a larger --size'}"
        )
    return size


def meta_of(size: int, base: ImportedBase | None) -> Meta:
    """Return the META of an imported recording."""
    return Meta(
        size=size,
        image=_NO_IMAGE if base is None else base.image,
        overlay=True,
        data=() if base is None else base.data,
        base=Fingerprint(size, 0) if base is None else base.fingerprint,
        policies=IMPORTED,
        started=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        program=f"nbdproxy {__version__}",
    )


@contextmanager
def recorded(path: Path, meta: Meta, what: str) -> Iterator[RecordingWriter]:
    """Begin a recording in a new or empty folder, and end it in order with the block.

    `what` is where it comes from. If the block fails, the recording says that it did.
    """
    writer = RecordingWriter(path, meta)
    try:
        yield writer
    except BaseException:
        with suppress(RecordingError):
            writer.close(Ending(f"the import from {what} failed", None))
        raise
    writer.close(Ending(f"imported from {what}", None))


def from_dm_log(log: DmLog, writer: RecordingWriter, progress: ConversionProgress) -> Converted:
    """Record what a dm-log-writes log tells."""
    counts: Counter[str] = Counter()
    buffer = memoryview(bytearray(LONGEST))
    ended = False
    for number, entry in enumerate(log.entries()):
        if number % STEP == 0:
            progress(entry.end, log.size)
        # The end mark is the log's own only where nothing follows.
        if ended:
            _mark(writer, END_MARK, counts)
        ended = entry.text == END_MARK
        if entry.text is not None:
            if not ended:
                _mark(writer, entry.text, counts)
            continue
        for request in _requests(log, entry, buffer):
            counts[command_name(request.command)] += 1
            writer.completed(1, writer.received(1, [request]), 1, 0)
    remarks = [
        "the order is that of the log, each request answered before the next is received; times, "
        "connections and the order in which requests were received are not in it"
    ]
    if not ended and log.missing is None:
        remarks.append("it has no end mark: QEMU writes none, the kernel does unless it was cut")
    if log.beyond:
        remarks.append(_beyond(log))
    return Converted(counts, {}, tuple(remarks), log.missing)


def _beyond(log: DmLog) -> str:
    found = said(log.beyond, "more that looks like an entry", "more that look like entries")
    what = f"behind the {log.counted:,} entries that the superblock counts stand {found}"
    if log.uncounted:
        return f"{what}: taken in, as --uncounted asks; --verify tells whether they belong to it"
    return (
        f"{what}: left out, for they may be an older log's; if the writer was killed they are its "
        "newest (QEMU counts only at a flush): --uncounted takes them in"
    )


def _mark(writer: RecordingWriter, text: str, counts: Counter[str]) -> None:
    counts["mark"] += 1
    writer.note(NoteKind.MARK, text)


def _requests(log: DmLog, entry: LogEntry, buffer: memoryview) -> Iterator[Request]:
    """Yield what an entry stands for; payloads are valid until the next one."""
    if entry.flags & LogFlag.FLUSH:
        yield Request(Command.FLUSH, 0, 0, 0, 0, _NOTHING)
    if not entry.length:
        return
    flags = int(CommandFlag.FUA) if entry.flags & LogFlag.FUA else 0
    if entry.position == TRIMMED:
        yield Request(Command.TRIM, flags, 0, entry.offset, entry.length, _NOTHING)
        return
    for offset, length in pieces(entry.offset, entry.length, LONGEST):
        payload = buffer[:length]
        log.read_into(entry.position + offset - entry.offset, payload)
        if np.frombuffer(payload, np.uint8).any():
            yield Request(Command.WRITE, flags, 0, offset, length, payload)
        else:
            yield Request(Command.WRITE_ZEROES, flags, 0, offset, length, _NOTHING)


def from_trlog(
    log: TransactionLog,
    errors: dict[int, int],
    writer: RecordingWriter,
    progress: ConversionProgress,
) -> Converted:
    """Record what a transaction log tells.

    `errors` is that of the log's survey. A request beyond the disk's end is one that never reached
    it. Raises RecordingError if such a request was not answered with an error.
    """
    job = _TrlogImport(log, errors, writer)
    done = 0
    for number, record in enumerate(log.records()):
        if number % STEP == 0:
            progress(done, log.size)
        if isinstance(record, Answered):
            job.answered(record)
        else:
            done = max(done, record.position)
            job.asked(record)
    return Converted(job.counts, job.left_out, tuple(job.remarks()), log.missing)


class _TrlogImport:
    """What an import of a transaction log keeps in mind."""

    def __init__(
        self, log: TransactionLog, errors: dict[int, int], writer: RecordingWriter
    ) -> None:
        self._log = log
        self._errors = errors
        self._writer = writer
        self._buffer = memoryview(bytearray(LONGEST))
        # Which requests of the recording wait for a reply to a cookie; none for a read.
        self._waiting: defaultdict[int, deque[tuple[int, int]]] = defaultdict(deque)
        self._number = 0
        self._stray = 0
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def asked(self, asked: Asked) -> None:
        """Record a request."""
        number, self._number = self._number, self._number + 1
        if asked.command == Command.DISC:
            self._writer.note(NoteKind.DISC, connection=1)
            return
        first, count = 0, 0
        if asked.command != Command.FLUSH and asked.command not in MODIFYING:
            self.left_out["reads and others that change nothing"] += 1
        elif asked.command in MODIFYING and asked.end > self._writer.meta.size:
            self._refuse(asked, number)
        elif asked.command in MODIFYING and not asked.length:
            self.left_out["of no length"] += 1
        else:
            first, count = self._receive(asked)
        self._waiting[asked.cookie].append((first, count))

    def _refuse(self, asked: Asked, number: int) -> None:
        if number not in self._errors:
            raise RecordingError(
                f"a request reaches up to byte {asked.end}, beyond the disk's end, and has no "
                "error; give the right --size or --base"
            )
        self.left_out["beyond the disk's end"] += 1
        request = Request(
            asked.command, asked.flags, asked.cookie, asked.offset, asked.length, _NOTHING
        )
        self._writer.refused(1, request, self._errors[number])

    def _receive(self, asked: Asked) -> tuple[int, int]:
        """Record a request, in several if it is long; return the first seq and their number."""
        flags = asked.flags & FLAGS
        self.counts[command_name(asked.command)] += 1
        if asked.command != Command.WRITE:
            extent = (0, 0) if asked.command == Command.FLUSH else (asked.offset, asked.length)
            request = Request(asked.command, flags, asked.cookie, *extent, _NOTHING)
            return self._writer.received(1, [request]), 1
        seqs = []
        for offset, length in pieces(asked.offset, asked.length, LONGEST):
            payload = self._buffer[:length]
            self._log.read_into(asked.position + offset - asked.offset, payload)
            request = Request(Command.WRITE, flags, asked.cookie, offset, length, payload)
            seqs.append(self._writer.received(1, [request]))
        return seqs[0], len(seqs)

    def answered(self, answered: Answered) -> None:
        """Record a reply."""
        if answered.cookie not in self._waiting:
            self._stray += 1
            return
        first, count = take(self._waiting, answered.cookie)
        if count:
            self._writer.completed(1, first, count, answered.error)

    def remarks(self) -> Iterator[str]:
        """Yield what there is to say."""
        yield (
            "requests and replies stand in the order of the log; times are not in it, and it does "
            "not tell connections apart: all is recorded as one"
        )
        failed = len(self._errors) - self.left_out["beyond the disk's end"]
        if self._errors:
            yield (
                f"{said(len(self._errors), 'request was', 'requests were')} answered with an error "
                f"({failed:,} within the disk): these change nothing here, but nbd-trplay carries "
                "their writes out"
            )
        if open_ := sum(count > 0 for each in self._waiting.values() for _, count in each):
            yield f"{said(open_, 'request has', 'requests have')} no reply"
        if self._stray:
            yield (
                f"{said(self._stray, 'reply belongs', 'replies belong')} to no request: several "
                "clients may have written over each other's records; log one client at a time"
            )
