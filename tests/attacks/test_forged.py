"""A recording forged with right checksums: no command raises, hangs or takes all memory."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingError
from nbdproxy.recording import format as layout
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.stream import tail_path
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command
from tests.recording.example import ENDING, META, bare, fill, write
from tests.support.forging import forge, retell
from tests.support.serving import nbdproxy

FAULT = {"action": "delay", "rule": "a", "command": "write", "seq": 3, "offset": 0, "length": 512}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recording with one of everything, that needs no image; a test may change it."""
    path = tmp_path / "run"
    writer = RecordingWriter(path, replace(META, data=()))
    writer.note(NoteKind.FAULT, json.dumps({**FAULT, "delay_s": 1}))
    fill(writer)
    writer.close(ENDING)
    return path


def seq_of(run: Path, kind: layout.SlotKind) -> int:
    with Recording(run) as recording:
        return next(event.seq for event in recording.log() if event.kind is kind)


def told(run: Path, *more: str) -> str:
    """What listing says of it; whatever that is, it is no traceback."""
    return nbdproxy("log", run, *more, code=None).stdout


@pytest.mark.parametrize("command", ["info", "log", "pack", "check", "manifest", "audit"])
def test_every_way_in_refuses_it_with_one_sentence(run: Path, command: str) -> None:
    forge(run, [(seq_of(run, layout.SlotKind.COMPLETED), "length", 2**40)])
    more = (run / "data",) if command == "audit" else ()
    done = nbdproxy(command, run, *more, code=2)
    assert "that no recorder writes; do not use it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize("to", ["dm-log-writes", "nbd-trlog"])
def test_converting_refuses_it_and_leaves_nothing(run: Path, to: str) -> None:
    forge(run, [(seq_of(run, layout.SlotKind.COMPLETED), "length", 2**40)])
    said = nbdproxy("convert", run, run.with_name("log"), "--to", to, code=2).stderr
    assert "no recorder writes" in said
    assert list(run.parent.iterdir()) == [run]


@pytest.mark.parametrize("to", ["dm-log-writes", "nbd-trlog"])
def test_a_trim_of_a_disk_that_is_larger_than_any_log(tmp_path: Path, to: str) -> None:
    """A disk of 2^62 bytes can be, and each entry of a log holds a small part of such a request."""
    run = tmp_path / "run"
    writer = RecordingWriter(run, replace(META, size=2**62, data=()))
    writer.completed(1, writer.received(1, [bare(Command.TRIM, 0, 2**61)]), 1, 0)
    writer.close(ENDING)
    said = nbdproxy("convert", run, tmp_path / "log", "--to", to, code=2).stderr
    assert "is too long for the log" in said


def test_an_errno_that_nobody_knows_is_a_number(run: Path) -> None:
    forge(run, [(seq_of(run, layout.SlotKind.COMPLETED), "flags", 4711)])
    assert " 4711 at " in told(run)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 60000,
        b'{"action": "\\ud800", "command": [], "rule": {}, "offset": 1}',
        b'{"action": 1, "rule": null, "command": 2, "offset": "a", "delay_s": "x"}',
        b"\0\xff",
    ],
)
def test_a_note_may_say_anything(run: Path, text: bytes) -> None:
    retell(run, seq_of(run, layout.SlotKind.FAULT), text)
    assert " fault " in told(run)
    assert "\nfault  " in nbdproxy("info", run).stdout
    assert nbdproxy("info", run, "--json").stdout
    assert told(run, "--json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"/somewhere/disk.img"', b'"a\\u0000"'),
        (b'"/somewhere/disk.img"', b'"\\ud800"'),
        (b"false", b"0"),
        (b'"fua": null', b'"fua": 1'),
        (b"123456789", b"1e999"),
        (b'"version": 1', b'"version": 1e999'),
        (b'"data": []', b'"data": [[4096, 1], [0, 1]]'),
        (b'"data": []', b'"data": [[0, 65537]]'),
        (b'"size": 65536, "image"', b'"size": 9223372036854775808, "image"'),
    ],
)
def test_a_meta_that_names_what_cannot_be(run: Path, old: bytes, new: bytes) -> None:
    with Recording(run) as recording:
        first = next(recording.log())
    text = (run / "data").read_bytes()[first.position : first.position + first.length]
    assert old in text
    retell(run, 0, text.replace(old, new))
    with pytest.raises(RecordingError):
        Recording(run)


@pytest.mark.parametrize("new", [b"[" * 60000, b'{"reason": 1, "image": null}', b"{}"])
def test_an_end_that_is_none(run: Path, new: bytes) -> None:
    retell(run, seq_of(run, layout.SlotKind.END), new)
    assert "END event cannot be understood" in nbdproxy("info", run, code=2).stderr


def test_files_that_say_they_are_larger_than_any_memory(run: Path) -> None:
    """Holes cost their maker nothing, and a reader must not take memory for them."""
    size = (run / "events").stat().st_size
    os.truncate(run / "events", 2**42)
    os.truncate(run / "data", 2**42)
    with Recording(run) as recording:
        assert recording.events == size // 64


def test_a_tail_that_is_larger_than_any_memory(run: Path) -> None:
    for name, segment in (("events", 2**40), ("data", 2**62)):
        tail = tail_path(run / name)
        head = layout.TAIL_HEADER.pack(layout.TAIL_MAGIC, layout.VERSION, 2, segment)
        tail.write_bytes(head + struct.pack("<QQ", 0, 1))
        os.truncate(tail, 2**42)
    with Recording(run) as recording:
        assert recording.ending == ENDING


def test_a_text_that_is_longer_than_any_is_where_reading_ends(run: Path) -> None:
    seq = seq_of(run, layout.SlotKind.MARK)
    data = (run / "data").read_bytes()
    forge(run, [(seq, "position", len(data)), (seq, "length", 2**21)], data + bytes(2**21))
    with Recording(run) as recording:
        assert recording.events == seq
        assert recording.is_damaged


def test_a_request_beyond_the_disk(run: Path) -> None:
    at = seq_of(run, layout.SlotKind.RECEIVED)
    forge(run, [(at, "offset", META.size - 1)])
    with pytest.raises(RecordingError, match="no recorder writes"):
        Recording(run)


def test_a_payload_of_a_longer_request_is_digested_in_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    size = 5 * 2**20 + 512
    writer = RecordingWriter(run, replace(META, size=size, data=()))
    writer.completed(1, writer.received(1, [write(0, b"z" * size)]), 1, 0)
    writer.close(ENDING)
    with Recording(run) as recording:
        recording.verify()
    with (run / "data").open("r+b") as file:
        file.seek(size - 1)
        file.write(b"y")
    with Recording(run) as recording, pytest.raises(RecordingError, match="is damaged"):
        recording.verify()
