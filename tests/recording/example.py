"""A short recording with one of everything, and what it must read back as."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbdproxy.recording.format import NONE
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Event, Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command, CommandFlag, Request

SIZE = 64 * 1024
META = Meta(
    size=SIZE,
    image="/somewhere/disk.img",
    overlay=False,
    data=((0, 4096), (8192, 512)),
    base=Fingerprint(SIZE, 123_456_789),
    policies=("passthrough",),
    started="2026-01-01T00:00:00.000+00:00",
    program="nbdproxy test",
)
ENDING = Ending("the command ended", Fingerprint(SIZE, 987_654_321))


def write(offset: int, payload: bytes, *, flags: int = 0, cookie: int = 1) -> Request:
    """A WRITE."""
    return Request(Command.WRITE, flags, cookie, offset, len(payload), memoryview(payload))


def bare(command: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> Request:
    """A request without payload."""
    return Request(command, flags, 2, offset, length, memoryview(b""))


def fill(writer: RecordingWriter) -> None:
    """Record one of everything; the END comes with `close`."""
    writer.note(NoteKind.CONNECT, "a client", connection=1)
    writer.before(0, b"old" + bytes(509))
    first = writer.received(1, [write(0, b"A" * 512), write(512, b"B" * 1024, cookie=2**64 - 1)])
    writer.completed(1, first, 2, 0)
    writer.refused(1, bare(Command.READ, 2**64 - 512, 512), 22)
    writer.note(NoteKind.MARK, "here \udcff", connection=0)
    writer.before(8192, bytes(512))
    batch = writer.received(
        2,
        [
            bare(Command.WRITE_ZEROES, 8192, 512, flags=CommandFlag.NO_HOLE),
            bare(Command.FLUSH),
            bare(Command.TRIM, 0, 4096),
            write(1024, b"C" * 512, flags=CommandFlag.FUA),
        ],
    )
    writer.completed(2, batch + 2, 1, 0)
    writer.completed(2, batch, 1, 28)
    writer.received(1, [bare(Command.FLUSH)])
    writer.completed(2, batch + 3, 1, 0)
    writer.note(NoteKind.DISC, connection=2)


@dataclass(frozen=True, slots=True)
class Original:
    """What a whole recording says: its events, and each payload by seq."""

    events: list[Event]
    payloads: dict[int, bytes]

    @classmethod
    def of(cls, path: Path) -> Original:
        """Read it all; `path` is a recording that ended in order."""
        recording = Recording(path)
        events = list(recording.log())
        data = (path / "data").read_bytes()
        recording.close()
        payloads = {
            event.seq: data[event.position : event.position + event.length]
            for event in events
            if event.position != NONE
        }
        return cls(events, payloads)


def assert_prefix(recording: Recording, original: Original) -> None:
    """What is there equals the original's beginning, payloads included."""
    events = list(recording.log())
    assert events == original.events[: recording.events]
    recording.verify()
    for event in events:
        if event.position != NONE:
            buffer = bytearray(event.length)
            recording.read_payload(event.position, memoryview(buffer))
            assert buffer == original.payloads[event.seq]
    rows = [event for event in events if event.kind.name == "RECEIVED"]
    assert recording.table.seq.tolist() == [event.seq for event in rows]


def make(path: Path) -> Original:
    """Write the example, end it in order, and read it."""
    writer = RecordingWriter(path, META)
    fill(writer)
    writer.close(ENDING)
    return Original.of(path)
