"""What a `RecordingWriter` wrote, a `Recording` reads: columns, notes, before-images, instants.

Not covered: damage; see tests/laws/test_recording.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import NONE, SlotKind
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command
from tests.recording.example import ENDING, META, SIZE, Original, assert_prefix, bare, make, write


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """The example, read."""
    make(tmp_path / "run")
    opened = Recording(tmp_path / "run")
    yield opened
    opened.close()
    opened.close()


def test_meta_and_ending_are_what_was_written(recording: Recording) -> None:
    assert recording.is_original
    assert recording.meta == replace(META, origin=recording.meta.origin)
    assert recording.ending == ENDING
    assert recording.size == SIZE
    assert recording.missing is None
    assert not recording.truncated


def test_the_table_has_a_row_for_each_request_that_was_accepted(recording: Recording) -> None:
    table = recording.table
    assert table.seq.tolist() == [3, 4, 10, 11, 12, 13, 16]
    assert table.command.tolist() == [1, 1, 6, 3, 4, 1, 3]
    assert table.flags.tolist() == [0, 0, 2, 0, 0, 1, 0]
    assert table.connection.tolist() == [1, 1, 2, 2, 2, 2, 1]
    assert table.offset.tolist() == [0, 512, 8192, 0, 0, 1024, 0]
    assert table.length.tolist() == [512, 1024, 512, 0, 4096, 512, 0]
    assert table.completed.tolist() == [5, 5, 15, NEVER, 14, 17, NEVER]
    assert table.error.tolist() == [0, 0, 28, 0, 0, 0, 0]
    assert (table.position >= 0).tolist() == [c == Command.WRITE for c in table.command]


def test_payloads_read_back_whole_and_in_parts(recording: Recording) -> None:
    place = int(recording.table.position[1])
    buffer = bytearray(1024)
    recording.read_payload(place, memoryview(buffer))
    assert buffer == b"B" * 1024
    part = bytearray(10)
    recording.read_payload(place - 5, memoryview(part))
    assert part == b"AAAAABBBBB"


def test_notes_keep_kind_text_connection_and_order(recording: Recording) -> None:
    told = [(n.seq, n.kind, n.connection, n.text) for n in recording.notes]
    assert told == [
        (1, NoteKind.CONNECT, 1, "a client"),
        (8, NoteKind.MARK, 0, "here \udcff"),
        (18, NoteKind.DISC, 2, ""),
        (19, NoteKind.END, 0, ENDING.dump()),
    ]
    assert recording.events == 20


@pytest.mark.parametrize("kind", NoteKind)
def test_every_kind_of_note_can_be_written(tmp_path: Path, kind: NoteKind) -> None:
    writer = RecordingWriter(tmp_path / "run", META)
    assert writer.note(kind, '{"reason": "r", "image": null}', connection=3) == 1
    writer.close(Ending("done", None))
    note = Recording(tmp_path / "run").notes[0]
    assert (note.kind, note.connection) == (kind, 3)


def test_before_images_are_kept_and_zeroes_take_no_room(recording: Recording) -> None:
    saved = recording.befores
    assert saved.seq.tolist() == [2, 9]
    assert saved.offset.tolist() == [0, 8192]
    assert saved.length.tolist() == [512, 512]
    assert saved.position[1] == -1
    buffer = bytearray(512)
    recording.read_payload(int(saved.position[0]), memoryview(buffer))
    assert buffer == b"old" + bytes(509)


def test_refused_requests_are_in_the_log_and_not_in_the_table(recording: Recording) -> None:
    assert recording.refused == 1
    refused, answer = list(recording.log(6, 8))
    assert (refused.kind, refused.command) == (SlotKind.REFUSED, Command.READ)
    assert (refused.offset, refused.length, refused.position) == (2**64 - 512, 512, NONE)
    assert (answer.kind, answer.offset, answer.length, answer.flags) == (
        SlotKind.COMPLETED,
        6,
        1,
        22,
    )


def test_an_unknown_command_is_not_recorded_as_another_one(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "run", META)
    writer.refused(1, bare(256 + Command.FLUSH), 22)
    writer.close(ENDING)
    recording = Recording(tmp_path / "run")
    assert [event.command for event in recording.log(1, 2)] == [255]
    assert len(recording.table) == 0


def test_the_log_can_be_read_from_anywhere(recording: Recording) -> None:
    whole = list(recording.log())
    assert [event.seq for event in whole] == list(range(20))
    assert list(recording.log(5, 9)) == whole[5:9]
    assert list(recording.log(15, 1000)) == whole[15:]
    assert list(recording.log(30)) == []
    assert list(recording.log(7, 3)) == []
    assert [event.cookie for event in recording.log(3, 5)] == [1, 2**64 - 1]


def test_time_and_position_are_each_others_inverse(recording: Recording) -> None:
    times = [recording.time_of(seq) for seq in range(recording.events)]
    assert times == sorted(times)
    assert recording.position_at(-1) == 0
    assert recording.position_at(times[-1]) == recording.events
    for seq, instant in enumerate(times):
        at = recording.position_at(instant)
        assert at > seq
        assert times[at - 1] <= instant
        assert at == len(times) or times[at] > instant


def test_a_long_recording_wraps_its_tail_and_reads_back(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "run", META)
    for number in range(400):
        batch = [write(512 * n, bytes([number % 256, n]) * 256) for n in range(100)]
        writer.completed(1, writer.received(1, batch), len(batch), 0)
    alive = Recording(tmp_path / "run")
    assert len(alive.table) == 40_000
    assert alive.missing is not None
    assert not alive.truncated
    alive.close()
    writer.close(ENDING)
    recording = Recording(tmp_path / "run")
    assert recording.missing is None
    assert recording.table.completed.tolist() == [
        1 + 101 * number + 100 for number in range(400) for _ in range(100)
    ]
    assert_prefix(recording, Original.of(tmp_path / "run"))
    recording.close()


def test_a_recording_needs_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RecordingWriter(tmp_path / "empty", META).close(ENDING)
    with pytest.raises(RecordingError, match="not empty; name a new folder"):
        RecordingWriter(tmp_path / "empty", META)
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="is a file"):
        RecordingWriter(tmp_path / "file", META)
    with pytest.raises(RecordingError, match="cannot be made"):
        RecordingWriter(tmp_path / "file" / "below", META)


def test_what_is_no_recording_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="there is no recording at"):
        Recording(tmp_path / "nothing")
    with pytest.raises(RecordingError, match="no file events"):
        Recording(tmp_path)
    (tmp_path / "events").write_bytes(b"")
    with pytest.raises(RecordingError, match="no file data"):
        Recording(tmp_path)
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(RecordingError, match="no complete event"):
        Recording(tmp_path)


def test_a_damaged_payload_names_its_event_and_the_last_good_cut(tmp_path: Path) -> None:
    make(tmp_path / "run")
    data = tmp_path / "run" / "data"
    data.write_bytes(data.read_bytes().replace(b"BBBB", b"BBbB", 1))
    recording = Recording(tmp_path / "run")
    words = "payload of event 4 .*--at seq:3"
    with pytest.raises(RecordingError, match=words):
        recording.read_payload(int(recording.table.position[1]), memoryview(bytearray(8)))
    with pytest.raises(RecordingError, match=words):
        recording.verify()
    recording.read_payload(int(recording.table.position[0]), memoryview(bytearray(8)))


def test_a_damaged_before_image_is_noticed(tmp_path: Path) -> None:
    make(tmp_path / "run")
    data = tmp_path / "run" / "data"
    data.write_bytes(data.read_bytes().replace(b"old", b"olD", 1))
    recording = Recording(tmp_path / "run")
    at = int(recording.befores.position[0])
    for _ in range(2):  # it is not taken for good the second time
        with pytest.raises(RecordingError, match="payload of event 2"):
            recording.read_payload(at + 100, memoryview(bytearray(8)))


def test_meta_and_ending_survive_their_json() -> None:
    odd = replace(META, image="/ü/\udcff.img", data=(), policies=(), overlay=True)
    assert Meta.parse(odd.dump()) == odd
    for ending in (ENDING, Ending("lost", None)):
        assert Ending.parse(ending.dump()) == ending


def test_another_version_is_not_guessed_at() -> None:
    fields = json.loads(META.dump())
    for version in (0, 2, "1", None):
        text = json.dumps({**fields, "version": version})
        with pytest.raises(RecordingError, match="use the nbdproxy that made it"):
            Meta.parse(text)


META_FIELDS = json.loads(META.dump())
WRONG_META = {
    "not JSON": "{",
    "no object": "[1]",
    "a field too few": json.dumps({k: v for k, v in META_FIELDS.items() if k != "base"}),
    "a field too many": json.dumps({**META_FIELDS, "colour": "red"}),
    "a base that is none": json.dumps({**META_FIELDS, "base": {"size": 1}}),
    "data that are no pairs": json.dumps({**META_FIELDS, "data": [[1, 2, 3]]}),
    "data that are a number": json.dumps({**META_FIELDS, "data": 5}),
}


@pytest.mark.parametrize("text", WRONG_META.values(), ids=WRONG_META.keys())
def test_a_meta_that_is_none_is_told_in_a_sentence(text: str) -> None:
    with pytest.raises(RecordingError, match="META"):
        Meta.parse(text)


@pytest.mark.parametrize("text", ["", "null", "{}", '{"reason": "r", "image": {"size": 1}}'])
def test_an_end_that_is_none_is_told_in_a_sentence(text: str) -> None:
    with pytest.raises(RecordingError, match="END"):
        Ending.parse(text)


def test_a_fingerprint_tells_size_and_change(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"12345")
    before = Fingerprint.of(file)
    assert before == Fingerprint(5, file.stat().st_mtime_ns)
    with pytest.raises(FileNotFoundError):
        Fingerprint.of(tmp_path / "nothing")
