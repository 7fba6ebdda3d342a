"""Laws: what is left of a recording is a prefix of it, or is refused; it is never something else.

A recording is cut off at every byte, and every byte of it is flipped, once as it lies after an
orderly end and once as a killed recorder leaves it (a copy taken while the writer is alive).
Not covered: two damages that make up for each other, and the time a power loss of the host takes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import SLOT_SIZE, TAIL_HEADER, TAIL_PAGE
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import ENDING, META, Original, assert_prefix, fill, make


def opened(path: Path) -> Recording | None:
    """The recording, None if it is refused in a sentence; no other exception is right."""
    try:
        return Recording(path)
    except RecordingError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return None


def assert_good(path: Path, original: Original, *, least: int = 0) -> int:
    """What is there is a prefix of at least so many events, and says what is missing."""
    recording = opened(path)
    if recording is None:
        assert least == 0
        return 0
    assert recording.events >= least
    assert_prefix(recording, original)
    whole = recording.events == len(original.events)
    assert (recording.missing is None) == whole
    assert (recording.ending == ENDING) == whole
    events = recording.events
    recording.close()
    return events


def reach(original: Original, stream: str, length: int) -> int:
    """How many events are wholly in a stream cut off at `length`."""
    if stream == "events":
        return length // SLOT_SIZE
    for event in original.events:
        if event.seq in original.payloads and event.position + event.length > length:
            return event.seq
    return len(original.events)


@pytest.mark.parametrize("stream", ["events", "data"])
def test_cut_off_at_any_byte_it_opens_to_the_prefix_before(tmp_path: Path, stream: str) -> None:
    original = make(tmp_path / "run")
    file = tmp_path / "run" / stream
    for length in range(file.stat().st_size, -1, -1):
        os.truncate(file, length)
        assert assert_good(tmp_path / "run", original) == reach(original, stream, length), length


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_of_the_events_ends_the_prefix_there(tmp_path: Path, flip: int) -> None:
    original = make(tmp_path / "run")
    file = tmp_path / "run" / "events"
    content = file.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= flip
        file.write_bytes(damaged)
        assert assert_good(tmp_path / "run", original) == at // SLOT_SIZE, at


def test_a_flipped_byte_of_the_data_is_named_or_ends_the_prefix(tmp_path: Path) -> None:
    original = make(tmp_path / "run")
    file = tmp_path / "run" / "data"
    content = file.read_bytes()
    owners = {
        at: event
        for event in original.events
        if event.seq in original.payloads
        for at in range(event.position, event.position + event.length)
    }
    assert sorted(owners) == list(range(len(content)))
    for at, event in owners.items():
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        file.write_bytes(damaged)
        if event.kind.name not in ("RECEIVED", "BEFORE"):  # a text: it is read at once
            assert assert_good(tmp_path / "run", original) == event.seq
            continue
        recording = Recording(tmp_path / "run")
        with pytest.raises(RecordingError, match=f"payload of event {event.seq} "):
            recording.verify()
        with pytest.raises(RecordingError, match=f"payload of event {event.seq} "):
            recording.read_payload(event.position, memoryview(bytearray(event.length)))
        recording.close()


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[tuple[Path, Original]]:
    """A recording as a killed recorder leaves it, and what it would have been.

    The END that the whole one has is not in the copy.
    """
    writer = RecordingWriter(tmp_path / "run", META)
    fill(writer)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    writer.close(ENDING)
    yield tmp_path / "killed", Original.of(tmp_path / "run")


def test_a_killed_recorder_loses_nothing(killed: tuple[Path, Original]) -> None:
    path, original = killed
    assert assert_good(path, original) == len(original.events) - 1
    recording = Recording(path)
    assert recording.missing is not None
    assert "did not end in order" in recording.missing
    assert not recording.truncated
    recording.close()


@pytest.mark.parametrize("stream", ["events", "data"])
def test_a_tail_cut_off_at_any_byte_leaves_a_prefix(
    killed: tuple[Path, Original], stream: str
) -> None:
    path, original = killed
    tail = path / f"{stream}.tail"
    used = len(original.events) * SLOT_SIZE if stream == "events" else 3000
    # The rest of the segments is empty, and of the first page only its header counts.
    tail.write_bytes(tail.read_bytes()[: TAIL_PAGE + used])
    lengths = [*range(TAIL_PAGE + used, TAIL_PAGE, -1), TAIL_PAGE, 4000, *range(100, -1, -1)]
    for length in lengths:
        os.truncate(tail, length)
        there = reach(original, stream, max(0, length - TAIL_PAGE))
        assert assert_good(path, original) == min(there, len(original.events) - 1), length


@pytest.mark.parametrize("stream", ["events", "data"])
@pytest.mark.parametrize("flip", [0x01, 0x08, 0x80, 0xFF])
def test_a_flipped_byte_of_a_tails_header_leaves_a_prefix(
    killed: tuple[Path, Original], stream: str, flip: int
) -> None:
    path, original = killed
    tail = path / f"{stream}.tail"
    content = tail.read_bytes()[: TAIL_PAGE + 64 * 1024]
    header = TAIL_HEADER.size + 8 * 8
    for at in range(header):
        damaged = bytearray(content)
        damaged[at] ^= flip
        tail.write_bytes(damaged)
        recording = opened(path)
        if recording is not None:
            assert list(recording.log()) == original.events[: recording.events]
            assert recording.missing is not None
            recording.close()


def test_a_flipped_byte_in_the_events_tail_ends_the_prefix_there(
    killed: tuple[Path, Original],
) -> None:
    path, original = killed
    tail = path / "events.tail"
    used = (len(original.events) - 1) * SLOT_SIZE
    content = tail.read_bytes()[: TAIL_PAGE + used]
    for at in range(used):
        damaged = bytearray(content)
        damaged[TAIL_PAGE + at] ^= 0x04
        tail.write_bytes(damaged)
        assert assert_good(path, original) == at // SLOT_SIZE, at


def test_both_streams_cut_off_leave_what_both_reach(tmp_path: Path) -> None:
    original = make(tmp_path / "run")
    events, data = ((tmp_path / "run" / name).read_bytes() for name in ("events", "data"))
    for keep_events in range(0, len(events) + 1, 97):
        for keep_data in range(0, len(data) + 1, 131):
            (tmp_path / "run" / "events").write_bytes(events[:keep_events])
            (tmp_path / "run" / "data").write_bytes(data[:keep_data])
            least = min(reach(original, "events", keep_events), reach(original, "data", keep_data))
            assert assert_good(tmp_path / "run", original) == least
