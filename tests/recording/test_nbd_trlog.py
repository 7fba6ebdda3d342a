"""nbd-server's transaction logs, byte by byte: requests, replies, and what is said of the rest.

The logs are packed here from the format's description, not by the writer. Real ones, and
nbd-trplay, are in `tests/interop`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingError
from nbdproxy.recording.foreign.nbd_trlog import Asked, TransactionLog
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command
from tests.recording.example import ENDING, META, write
from tests.support.foreign import Answer, Mark, Step, convert, end, record

READ, WRITE, DISC, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
DATA = struct.pack(">IIQQI", 0x25609514, 1, 0, 0x4A93BA39A54F31B6, 1)
NO_DATA = DATA[:-1] + b"\0"


def ask(
    command: int,
    cookie: int,
    offset: int = 0,
    length: int = 0,
    *,
    data: bytes = b"",
    flags: int = 0,
) -> bytes:
    """A request."""
    count = len(data) or length
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, count) + data


def reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply."""
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(cookie: int, *, flags: int = 1, kind: int = 0) -> bytes:
    """The head of a structured reply."""
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, 9)


def log(path: Path, *records: bytes) -> Path:
    """A log of these records."""
    path.write_bytes(b"".join(records))
    return path


def imported(path: Path, *words: str) -> tuple[Recording, str]:
    """Convert a log and open the recording."""
    out = path.with_name("out")
    told = convert(path, out, "--to", "nbdproxy", *words).stderr
    recording = Recording(out)
    recording.close()
    return recording, told


ALL = (
    DATA,
    ask(WRITE, 1, 0, data=b"a" * 1024),
    ask(WRITE, 2, 512, data=b"b" * 100, flags=1),
    reply(2),
    ask(READ, 3, 0, 512),
    reply(1),
    ask(FLUSH, 1),
    ask(TRIM, 2, 0, 512),
    reply(3),
    reply(1),
    ask(ZEROES, 4, 1024, 512, flags=2),
    reply(2, 5),
    reply(4),
    ask(DISC, 0),
)


def test_requests_and_replies_stand_where_they_stood(tmp_path: Path) -> None:
    recording, told = imported(log(tmp_path / "log", *ALL))
    table = recording.table
    assert table.command.tolist() == [WRITE, WRITE, FLUSH, TRIM, ZEROES]
    assert table.flags.tolist() == [0, 1, 0, 0, 2]
    assert table.offset.tolist() == [0, 512, 0, 0, 1024]
    assert table.length.tolist() == [1024, 100, 0, 512, 512]
    assert table.error.tolist() == [0, 0, 0, 5, 0]
    # META is event 0; requests and replies follow in the log's order, reads left out.
    assert table.seq.tolist() == [1, 2, 5, 6, 8]
    assert table.completed.tolist() == [4, 3, 7, 9, 10]
    assert [note.kind for note in recording.notes] == [NoteKind.DISC, NoteKind.END]
    assert "1 request was answered with an error (1 within the disk)" in told
    assert end(tmp_path / "out")[:1024] == b"a" * 512 + b"b" * 100 + b"a" * 412


def test_cookies_are_used_again_and_replies_belong_to_the_oldest(tmp_path: Path) -> None:
    records = (ask(FLUSH, 7), ask(FLUSH, 7), reply(7, 5), reply(7), ask(FLUSH, 7), reply(8))
    recording, told = imported(log(tmp_path / "log", DATA, *records))
    assert recording.table.error.tolist() == [5, 0, 0]
    assert recording.table.completed.tolist() == [3, 4, NEVER]
    assert "1 request has no reply" in told
    assert "1 reply belongs to no request" in told


def test_a_structured_reply_counts_with_its_last_chunk(tmp_path: Path) -> None:
    records = (
        *(ask(FLUSH, 1), chunk(1, flags=0), ask(FLUSH, 2), chunk(1)),
        chunk(2, kind=0x8001),
    )
    recording, _ = imported(log(tmp_path / "log", DATA, *records))
    assert recording.table.completed.tolist() == [3, 4]
    assert recording.table.error.tolist() == [0, 5]


def test_cut_off_at_any_byte_it_opens_to_its_whole_records(tmp_path: Path) -> None:
    whole = b"".join(ALL)
    ends = [0]
    for one in ALL:
        ends.append(ends[-1] + len(one))
    for length in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        cut = TransactionLog(path)
        count = len(list(cut.records()))
        cut.close()
        # The switch is no record that is handed on.
        assert count == max(sum(reach <= length for reach in ends[1:]) - 1, 0), length
        assert (cut.missing is None) == (length in ends), length
        if cut.missing is not None:
            assert f"{length - max(e for e in ends if e <= length):,} bytes" in cut.missing


@pytest.mark.parametrize("garbage", [bytes(40), b"\xff" * 40, reply(1)[1:] * 3])
def test_it_stops_at_what_is_no_record(tmp_path: Path, garbage: bytes) -> None:
    path = log(tmp_path / "log", DATA, ask(FLUSH, 1), reply(1), garbage, ask(FLUSH, 1))
    done = convert(path, tmp_path / "out", "--to", "nbdproxy")
    assert f"note: the record at byte {28 + 28 + 16:,} of {path} is cut off" in done.stderr
    assert len(Recording(tmp_path / "out").table) == 1


def test_a_log_without_data_is_refused(tmp_path: Path) -> None:
    for name, records in (
        ("one", (ask(WRITE, 1, 0, length=512), reply(1))),
        ("two", (DATA, ask(WRITE, 1, 0, data=b"x"), NO_DATA, ask(WRITE, 2, 0, length=512))),
    ):
        path = log(tmp_path / name, *records)
        done = convert(path, tmp_path / "out", "--to", "nbdproxy", code=2)
        assert "datalog = true" in done.stderr
        assert not list(tmp_path.glob("out*"))


def test_what_is_beyond_the_disk_never_reached_it(tmp_path: Path) -> None:
    far = ask(WRITE, 1, (1 << 64) - 512, data=b"x" * 512)
    path = log(tmp_path / "log", DATA, far, reply(1, 28), ask(WRITE, 1, 0, data=b"a"), reply(1))
    recording, told = imported(path, "--size", "512")
    assert recording.size == 512
    assert recording.refused == 1
    assert len(recording.table) == 1
    assert "1 request was answered with an error (0 within the disk)" in told
    path = log(tmp_path / "damaged", DATA, far)
    done = convert(path, tmp_path / "no", "--to", "nbdproxy", code=2)
    assert "which no disk has" in done.stderr
    path = log(tmp_path / "short", DATA, ask(ZEROES, 1, 512, 512), reply(1))
    done = convert(path, tmp_path / "no", "--to", "nbdproxy", "--size", "512", code=2)
    assert "writes up to byte 1024, and the disk would have 512" in done.stderr


def test_a_record_that_changes_nothing_is_passed_over(tmp_path: Path) -> None:
    unknown = struct.pack(">IIQQI", 0x25609514, 2, 0, 1, 1)
    records = (DATA, unknown, ask(5, 1), reply(1), ask(99, 2), reply(2, 22), ask(TRIM, 3), reply(3))
    path = log(tmp_path / "log", *records)
    done = convert(path, tmp_path / "out", "--to", "nbdproxy", "--json")
    left_out = {"reads and others that change nothing": 2, "of no length": 1}
    assert json.loads(done.stdout)["left_out"] == left_out
    assert json.loads(done.stdout)["missing"] is None
    assert len(Recording(tmp_path / "out").table) == 0


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    made: list[Step | Answer | Mark] = [
        *(Step(Command.WRITE, 0, 1), Answer(0, 5), Step(Command.FLUSH), Answer(1, 5)),
        *(Mark("here"), Step(Command.WRITE, 1, 1, fill=3)),
    ]
    run, path = record(tmp_path / "run", made), tmp_path / "log"
    done = convert(run, path, "--to", "nbd-trlog", "--json")
    assert json.loads(done.stdout)["counts"] == {"flush": 1, "write": 1}
    assert "note: 1 request answered with an error left out" in done.stderr
    assert "note: 1 mark is lost: the format has none" in done.stderr
    assert path.read_bytes() == b"".join(
        [DATA, ask(FLUSH, 3), reply(3, 5), ask(WRITE, 6, 512, data=b"\3" * 512)]
    )


def test_the_block_that_nbd_trplay_needs_is_named(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "run", META)
    writer.received(1, [write(512, b"x" * 96), write(64, b"y" * 32)])
    writer.close(ENDING)
    done = convert(tmp_path / "run", tmp_path / "log", "--to", "nbd-trlog")
    assert "replay it with nbd-trplay -b 32" in done.stderr


def test_a_request_longer_than_a_record_can_tell_becomes_several(tmp_path: Path) -> None:
    path = tmp_path / "log"
    run = record(tmp_path / "run", [Step(Command.TRIM, 0, 20 << 20), Answer(0)], size=20 << 29)
    convert(run, path, "--to", "nbd-trlog")
    opened = TransactionLog(path)
    lengths = [record.length for record in opened.records() if isinstance(record, Asked)]
    cookies = [record.cookie for record in opened.records()]
    opened.close()
    assert sum(lengths) == 20 << 29
    assert max(lengths) == (1 << 32) - 512
    assert cookies[:3] == cookies[3:]
    assert len(set(cookies)) == 3


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\x25\x60\x95", bytes(512)):
        path = tmp_path / "log"
        path.write_bytes(content)
        done = convert(path, tmp_path / "out", "--to", "nbdproxy", code=2)
        assert "neither a dm-log-writes log nor a transaction log" in done.stderr
    with pytest.raises(RecordingError):
        TransactionLog(tmp_path / "none")
