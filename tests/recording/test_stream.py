"""The stream below a recording: what is appended is in the file after `close`, and readable before.

Segments are small here, so that the tail is gone round many times. Not covered: a full disk; see
test_full.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.errors import RecordingError
from nbdproxy.recording.stream import StreamReader, StreamWriter, tail_path

SEGMENT = 4096
TAIL = 3 * SEGMENT


def pattern(start: int, length: int) -> bytes:
    """Bytes that tell where in the stream they belong."""
    words = range(start // 4, (start + length) // 4 + 1)
    content = b"".join(word.to_bytes(4, "big") for word in words)
    return content[start % 4 : start % 4 + length]


class Writer(StreamWriter):
    """A writer with three segments of a page each, which is closed as a recording's are."""

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.folder = os.open(path.parent, os.O_RDONLY)
        super().__init__(path, self.folder, segment=SEGMENT, segments=3, durable=durable)

    def close(self) -> None:
        """End in order; doing so twice is harmless."""
        if self.folder >= 0:
            self.finish()
            self.finish()
            self.remove_tail()
            self.remove_tail()
            os.close(self.folder)
            self.folder = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def writer(path: Path) -> Writer:
    """A new stream."""
    return Writer(path)


def read(path: Path, length: int, position: int = 0) -> bytes:
    """Read with a new reader."""
    reader = StreamReader(path)
    buffer = bytearray(length)
    got = reader.read_into(position, memoryview(buffer))
    reader.close()
    reader.close()
    return bytes(buffer[:got])


def append_all(stream: Writer, lengths: list[int]) -> int:
    """Append runs of the pattern; how many bytes there are."""
    for length in lengths:
        begin = stream.position
        assert stream.append(pattern(begin, length)) == begin
        assert stream.position == begin + length
    return stream.position


BOUNDARIES = {
    "nothing": [],
    "one byte": [1],
    "exactly a segment": [SEGMENT],
    "up to a segment's end": [SEGMENT - 100, 100],
    "one byte short of it, and over": [SEGMENT - 1, 2],
    "exactly the whole tail": [TAIL],
    "one more than the tail": [TAIL + 1],
    "larger than the tail": [5 * TAIL + 77],
    "around many times": [1000] * 100,
    "segments one by one": [SEGMENT] * 20,
    "across each end": [10, *[SEGMENT] * 20],
    "empty ones between": [0, 5, 0, SEGMENT - 5, 0, SEGMENT, 0],
}


@pytest.mark.parametrize("lengths", BOUNDARIES.values(), ids=BOUNDARIES.keys())
def test_boundaries(tmp_path: Path, lengths: list[int]) -> None:
    path = tmp_path / "stream"
    stream = writer(path)
    total = append_all(stream, lengths)
    assert read(path, total) == pattern(0, total)
    stream.close()
    stream.close()
    assert path.read_bytes() == pattern(0, total)
    assert not tail_path(path).exists()
    assert read(path, total + 10) == pattern(0, total)


@given(st.lists(st.integers(0, 3 * TAIL) | st.integers(0, 300), max_size=20), st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_appended_can_be_read_at_any_time(lengths: list[int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        with writer(path) as stream:
            for length in lengths:
                append_all(stream, [length])
                start = data.draw(st.integers(0, stream.position))
                count = stream.position - start
                assert read(path, count, start) == pattern(start, count)
            total = stream.position
        assert path.read_bytes() == pattern(0, total)


def test_a_killed_writer_leaves_everything_in_file_and_tail(tmp_path: Path) -> None:
    stream = writer(tmp_path / "stream")
    total = append_all(stream, [777] * 50)
    (tmp_path / "killed").mkdir()
    tail = tail_path(tmp_path / "stream")
    shutil.copy(tail, tmp_path / "killed")  # first: what leaves it goes to the file
    shutil.copy(tmp_path / "stream", tmp_path / "killed")
    stream.close()
    reader = StreamReader(tmp_path / "killed" / "stream")
    assert reader.has_tail
    assert total <= reader.size < total + TAIL
    reader.close()
    assert read(tmp_path / "killed" / "stream", total) == pattern(0, total)


def test_a_stream_that_was_closed_has_no_tail(tmp_path: Path) -> None:
    with writer(tmp_path / "stream") as stream:
        append_all(stream, [100])
    reader = StreamReader(tmp_path / "stream")
    assert not reader.has_tail
    assert reader.size == 100
    reader.close()


def test_a_tail_that_cannot_be_is_not_believed(tmp_path: Path) -> None:
    stream = writer(tmp_path / "stream")
    append_all(stream, [100])
    tail = tail_path(tmp_path / "stream")
    good = tail.read_bytes()
    copy = tmp_path / "copy"
    for at in range(48):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(good)
            damaged[at] ^= flip
            copy.write_bytes(b"")
            tail_path(copy).write_bytes(damaged)
            reader = StreamReader(copy)
            assert reader.size <= TAIL
            assert reader.read_into(0, memoryview(bytearray(200))) <= 200
            reader.close()
    stream.close()


def test_a_stream_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(b"precious")
    with pytest.raises(RecordingError, match="File exists; record to a new folder"):
        writer(tmp_path / "stream")
    assert (tmp_path / "stream").read_bytes() == b"precious"


def test_room_is_what_can_be_appended_without_waiting(tmp_path: Path) -> None:
    with writer(tmp_path / "stream") as stream:
        assert stream.has_room(2 * SEGMENT)
        assert not stream.has_room(2 * SEGMENT + 1)
        append_all(stream, [SEGMENT - 1])
        assert not stream.has_room(2 * SEGMENT)
        # More than there will ever be: it waits only for what can be emptied.
        stream.wait_for_room(100 * SEGMENT)
        append_all(stream, [SEGMENT])
        stream.wait_for_room(SEGMENT)
        assert stream.has_room(SEGMENT)


def test_a_tail_that_was_removed_meanwhile_is_no_fault(tmp_path: Path) -> None:
    stream = writer(tmp_path / "stream")
    append_all(stream, [100, 5000])
    tail_path(tmp_path / "stream").unlink()
    stream.close()
    assert read(tmp_path / "stream", 6000) == pattern(0, 5100)
