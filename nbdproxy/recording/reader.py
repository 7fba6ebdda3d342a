"""Reads a recording, also one whose writer was killed or is still writing.

`Recording(path)` verifies every slot's checksum and keeps about 50 bytes for each request; the
payloads stay in the file and their digests are checked as they are read. A recording that was cut
off anywhere opens to the consistent prefix before the cut, and `missing` says in a sentence what
is not there. Raises RecordingError when there is nothing to open, and for what no recorder writes:
checksums tell damage, not forgery (see `vetted`). Nothing else is raised of an open recording than
RecordingError where a payload is damaged.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest

from nbdproxy.errors import RecordingError
from nbdproxy.private import is_trusted
from nbdproxy.recording.format import (
    CHECKSUM,
    NONE,
    SLOT,
    SLOT_SIZE,
    SLOTS,
    TAIL_MAX,
    SlotKind,
    data_path,
    events_path,
)
from nbdproxy.recording.index import RequestTable
from nbdproxy.recording.meta import Ending, Meta, origin_of
from nbdproxy.recording.notes import NOTE_OF_SLOT, Note, NoteKind
from nbdproxy.recording.payloads import PayloadIndex
from nbdproxy.recording.stream import StreamReader
from nbdproxy.recording.tables import TableBuilder
from nbdproxy.recording.vetted import Vetting
from nbdproxy.requests import Command

TEXT_MAX = 1024 * 1024
"""Bytes of a note's text; what reaches us for one has at most 64 KiB."""
META_MAX = 256 * 1024 * 1024
"""Bytes of META's; it takes 20 for each part of an image that is no hole."""
TEXTS_MAX = 1024 * 1024 * 1024
"""Bytes of all texts, which are held in memory."""
_CHUNK = 16384
_PART = 1024 * 1024
_NOTES = [int(kind) for kind in NOTE_OF_SLOT]
_TEXTS = frozenset({SlotKind.META, *NOTE_OF_SLOT})
_CHECKSUMS = struct.Struct("<56sQ")


class Event(NamedTuple):
    """One slot, as `format` describes it; `seq` is its number."""

    seq: int
    kind: SlotKind
    command: int
    flags: int
    connection: int
    time_ns: int
    offset: int
    length: int
    cookie: int
    position: int
    digest: int


@dataclass(frozen=True, slots=True, eq=False)
class BeforeTable:
    """What the disk held before ranges were first changed, as columns in the order recorded.

    `position` -1 means zeroes. Where ranges overlap the first one counts: two clients may save the
    same place, and only the first surely comes before every change.
    """

    seq: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.seq)


class Recording:
    """A recording that is open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events = _open(path, events_path(path))
        try:
            self._data = _open(path, data_path(path))
        except BaseException:
            self._events.close()
            raise
        self.missing: str | None = None
        """What is not there any more, in a sentence; None when all is."""
        self.is_damaged = False
        """Whether events are gone that were recorded, so that `end` is not the end."""
        self.notes: list[Note] = []
        self.refused = 0
        """How many requests never reached the disk."""
        self.events = 0
        """How many events there are; the position `end`."""
        self._indexes: tuple[PayloadIndex, ...] = ()
        self._saved: list[NDArray[np.int64]] = []
        self._texts = 0
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        builder = TableBuilder(self._events.size // SLOT_SIZE)
        vetting = Vetting(self.path, self._data.size)
        for chunk in self._chunks():
            if self.events == 0:
                self.meta = self._read_meta(chunk)
            vetting.check(chunk, self.events, self.meta.size)
            builder.add(chunk, self.events)
            self._load_rest(chunk)
            self.events += len(chunk)
        if self.events == 0:
            raise RecordingError(
                f"{self.path} holds no complete event: it was cut off at once; record again"
            )
        self.table: RequestTable = builder.finish()
        columns = np.concatenate(self._saved, axis=1) if self._saved else np.empty((4, 0), np.int64)
        self._saved.clear()
        self.befores = BeforeTable(*columns)
        """What was saved of the disk before it was changed."""
        last = self.notes[-1] if self.notes else None
        self.ending = (
            Ending.parse(last.text) if last is not None and last.kind is NoteKind.END else None
        )
        if self.truncated and self.missing is None:
            self._lack(
                f"cut off after event {self.events}: there is no end, and no tail that a "
                "recorder leaves which was killed"
            )
        if self.ending is None and self.missing is None:
            self.missing = (
                "the recorder is still at work, or did not end in order; until here all is there"
            )

    def _chunks(self) -> Iterator[NDArray[np.void]]:
        """Yield the slots that hold, in chunks, and stop at the first that does not."""
        buffer = memoryview(bytearray(_CHUNK * SLOT_SIZE))
        number = 0
        while count := self._events.read_into(number * SLOT_SIZE, buffer):
            good = self._good(buffer[: count - count % SLOT_SIZE], number)
            if good:
                # A copy, because the buffer is used again.
                yield np.frombuffer(bytes(buffer[: good * SLOT_SIZE]), SLOTS)
            if good * SLOT_SIZE < count:
                lost = self._events.size - (number + good) * SLOT_SIZE
                if not self._stale(buffer[good * SLOT_SIZE : count], number + good):
                    self._lack(
                        f"cut off or damaged after event {number + good}: "
                        f"{lost} bytes behind it cannot be read"
                    )
                return
            number += good

    def _good(self, slots: memoryview, number: int) -> int:
        """Return how many slots from the front are whole, payloads included."""
        limit = self._data.size
        digest = xxh3_64_intdigest
        for index, (body, checksum) in enumerate(_CHECKSUMS.iter_unpack(slots)):
            if digest(body, number + index) != checksum:
                return index
            if body[0] != SlotKind.COMPLETED:
                length, position = _payload(body)
                if position != NONE and position + length > limit:
                    return index
                if body[0] in _TEXTS and not self._intact(body, position, length):
                    return index
        return len(slots) // SLOT_SIZE

    def _intact(self, body: bytes, position: int, length: int) -> bool:
        """Tell whether a text is the one that was recorded, and one that memory holds."""
        if position == NONE:
            return True
        self._texts += length
        if length > (META_MAX if body[0] == SlotKind.META else TEXT_MAX) or self._texts > TEXTS_MAX:
            return False
        (expected,) = CHECKSUM.unpack_from(body, 48)
        return bool(self._digest(position, length) == expected)

    def _digest(self, position: int, length: int) -> int | None:
        """Return the digest of a payload; None if it is not all there."""
        digest = xxh3_64()
        part = memoryview(bytearray(min(length, _PART)))
        for at in range(position, position + length, _PART):
            piece = part[: position + length - at]
            if self._data.read_into(at, piece) != len(piece):
                return None
            digest.update(piece)
        return digest.intdigest()

    def _lack(self, what: str) -> None:
        self.missing, self.is_damaged = what, True

    def _stale(self, rest: memoryview, number: int) -> bool:
        """Tell whether what follows is only what a killed writer leaves in its tail.

        `number` is that of the first slot that does not hold. One that holds behind it was
        recorded later; but a recorder at work may have written both while they were read.
        """
        if not self._events.has_tail:
            return not any(rest)
        if not self._holds_behind(number):
            return True
        with closing(_open(self.path, events_path(self.path))) as again:
            slot = memoryview(bytearray(SLOT_SIZE))
            again.read_into(number * SLOT_SIZE, slot)
            body, checksum = _CHECKSUMS.unpack(slot)
            return bool(xxh3_64_intdigest(body, number) == checksum)

    def _holds_behind(self, number: int) -> bool:
        """Tell whether a slot behind `number` holds, as far as a tail reaches."""
        buffer = memoryview(bytearray(_CHUNK * SLOT_SIZE))
        for first in range(number + 1, number + 1 + TAIL_MAX // SLOT_SIZE, _CHUNK):
            count = self._events.read_into(first * SLOT_SIZE, buffer)
            found = _CHECKSUMS.iter_unpack(buffer[: count - count % SLOT_SIZE])
            if any(xxh3_64_intdigest(b, seq) == s for seq, (b, s) in enumerate(found, first)):
                return True
            if count < len(buffer):
                break
        return False

    def _read_meta(self, chunk: NDArray[np.void]) -> Meta:
        first = chunk[0]
        if first["kind"] != SlotKind.META or first["position"] == NONE:
            raise RecordingError(f"{self.path} does not begin as a recording does; check the path")
        return Meta.parse(self._text(int(first["position"]), int(first["length"])))

    def _load_rest(self, chunk: NDArray[np.void]) -> None:
        kinds = chunk["kind"]
        self.refused += int(np.count_nonzero(kinds == SlotKind.REFUSED))
        before = np.flatnonzero(kinds == SlotKind.BEFORE)
        if len(before):
            slots = chunk[before]
            # NONE has all bits set: as a signed number it is -1.
            fields = (slots[name].astype(np.int64) for name in ("offset", "length", "position"))
            self._saved.append(np.stack((before + self.events, *fields)))
        for index in np.flatnonzero(np.isin(kinds, _NOTES)):
            slot = chunk[index]
            position = -1 if slot["position"] == NONE else int(slot["position"])
            text = self._text(position, int(slot["length"])) if position >= 0 else ""
            note = NOTE_OF_SLOT[SlotKind(slot["kind"])]
            seq, connection = self.events + int(index), int(slot["connection"])
            self.notes.append(Note(seq, int(slot["time"]), note, connection, text))

    def _text(self, position: int, length: int) -> str:
        text = bytearray(length)
        self._fill(position, memoryview(text))
        return text.decode(errors="surrogateescape")

    @property
    def truncated(self) -> bool:
        """Whether events are gone that were recorded: a recorder that was killed leaves a tail."""
        return self.ending is None and not (self._events.has_tail or self._data.has_tail)

    @property
    def is_original(self) -> bool:
        """Whether it was made here, by one who may do everything here anyway, and is no copy."""
        events = self._events.status
        return is_trusted(events.st_uid) and self.meta.origin == origin_of(events)

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.meta.size

    def read_payload(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` with payload bytes from `position` of the data stream.

        What a request or a before-image wrote there is checked against its digest when it is read
        for the first time; raises RecordingError if it is damaged.
        """
        if not self._indexes:
            saved, table = self.befores, self.table
            self._indexes = (
                PayloadIndex(table.seq, table.position, table.length),
                PayloadIndex(saved.seq, saved.position, saved.length),
            )
        for index in self._indexes:
            found = index.unverified(position)
            if found is not None:
                row, seq = found
                self._verify(next(self.log(seq, seq + 1)))
                index.verified(row)
        self._fill(position, buffer)

    def _fill(self, position: int, buffer: memoryview) -> None:
        if self._data.read_into(position, buffer) != len(buffer):
            raise self._lacks_payload()

    def _lacks_payload(self) -> RecordingError:
        return RecordingError(
            f"{self.path} lacks payload that its events promise; copy it again, all its files"
        )

    def verify(self) -> None:
        """Check every payload's digest; raises RecordingError at the first that is wrong."""
        for event in self.log():
            if event.position != NONE:
                self._verify(event)

    def _verify(self, event: Event) -> None:
        found = self._digest(event.position, event.length)
        if found is None:
            raise self._lacks_payload()
        if found != event.digest:
            raise RecordingError(
                f"the payload of event {event.seq} in {self.path} is damaged; "
                "only cuts before it can be trusted: --at seq:" + str(max(event.seq - 1, 0))
            )

    def log(self, start: int = 0, end: int | None = None) -> Iterator[Event]:
        """Yield the events from `start` up to `end`, read from the file as they are asked for."""
        stop = self.events if end is None else min(end, self.events)
        buffer = memoryview(bytearray(min(_CHUNK, max(stop - start, 0)) * SLOT_SIZE))
        for first in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - first)
            self._events.read_into(first * SLOT_SIZE, buffer[: count * SLOT_SIZE])
            for index in range(count):
                fields = SLOT.unpack_from(buffer, index * SLOT_SIZE)
                yield Event(first + index, SlotKind(fields[0]), *fields[1:])

    def time_of(self, seq: int) -> int:
        """Return when an event happened, in nanoseconds since the recording began."""
        return next(self.log(seq, seq + 1)).time_ns

    def position_at(self, time_ns: int) -> int:
        """Return the position before which everything had happened by `time_ns`."""
        return bisect_right(range(self.events), time_ns, key=self.time_of)

    def close(self) -> None:
        """Release the files; closing twice is harmless."""
        self._events.close()
        self._data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _payload(body: bytes) -> tuple[int, int]:
    """Return length and position of a slot's payload."""
    length, _, position = struct.unpack_from("<QQQ", body, 24)
    return length, position


def recordings_in(folder: Path) -> list[Path]:
    """Return the recordings that stand in a folder, as serving several exports makes them."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    return [one for one in inside if events_path(one).is_file() and data_path(one).is_file()]


def no_recording(folder: Path) -> RecordingError:
    """Return what is said of a folder that is no recording."""
    if inside := recordings_in(folder):
        names = ", ".join(one.name for one in inside)
        return RecordingError(
            f"{folder} is not a recording, and has some in it ({names}): name one, such as "
            f"{inside[0]}"
        )
    lacking = next(p for p in (events_path(folder), data_path(folder), folder) if not p.is_file())
    return RecordingError(f"{folder} is not a recording: it has no file {lacking.name}")


def _open(recording: Path, path: Path) -> StreamReader:
    try:
        return StreamReader(path)
    except FileNotFoundError:
        if not recording.exists():
            raise RecordingError(f"there is no recording at {recording}; check the path") from None
        raise no_recording(recording) from None
    except NotADirectoryError:
        packed = recording.suffix == ".nbdpack"
        todo = f"; it is packed: run nbdproxy unpack {recording}" if packed else ""
        raise RecordingError(f"{recording} is a file; a recording is a folder{todo}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RecordingError(
                f"a recording's files are all in its folder, and {path} is a link: put what it "
                "leads to in its place, if you know that it belongs there"
            ) from None
        raise RecordingError(f"{path} cannot be read: {error.strerror}") from None


def command_name(command: int) -> str:
    """Return a command's name as listings show it."""
    return Command(command).name.lower().replace("_", "-")
