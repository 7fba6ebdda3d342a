"""dm-log-writes logs, byte by byte: what is an entry and what is not, and what is said of the rest.

The logs are packed here from the format's description, not by the writer. Real ones are in
`tests/interop`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingError
from nbdproxy.recording.foreign.dm_log_writes import DmLog, DmLogWriter
from nbdproxy.recording.foreign.importing import LONGEST
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command
from tests.recording.example import ENDING, META, write
from tests.support.foreign import (
    SIZE,
    Answer,
    Mark,
    Step,
    convert,
    end,
    flushed,
    record,
    replay_log,
    serial,
)

FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16
MAGIC = 0x6A736677736872


def entry(
    flags: int,
    sector: int = 0,
    data: bytes = b"",
    *,
    sectors: int | None = None,
    length: int = 0,
    text: bytes = b"",
    unit: int = 512,
) -> bytes:
    """An entry and its data."""
    count = len(data) // unit if sectors is None else sectors
    return (struct.pack("<QQQQ", sector, count, flags, length) + text).ljust(unit, b"\0") + data


def mark(text: bytes, unit: int = 512) -> bytes:
    """A mark."""
    return entry(MARK, length=len(text), text=text, unit=unit)


def log(
    path: Path, *entries: bytes, count: int | None = None, unit: int = 512, version: int = 1
) -> Path:
    """A log of these entries."""
    counted = len(entries) if count is None else count
    head = struct.pack("<QQQI", MAGIC, version, counted, unit).ljust(unit, b"\0")
    path.write_bytes(head + b"".join(entries))
    return path


ALL = (
    entry(0, 0, b"a" * 1024),
    mark(b"here"),
    entry(FLUSH | METADATA, 1, b"b" * 512),
    entry(FUA | METADATA, 4, b"c" * 512),
    entry(DISCARD, 0, sectors=1),
    entry(0, 5, bytes(512)),
    entry(FLUSH),
    entry(FUA),
    entry(0, 7, b"d" * 512, length=512),
    mark(b"dm-log-writes-end"),
)


def imported(log_path: Path, *words: str) -> tuple[Recording, str]:
    """Convert a log and open the recording."""
    out = log_path.with_name("out")
    told = convert(log_path, out, "--to", "nbdproxy", *words).stderr
    recording = Recording(out)
    recording.close()
    return recording, told


def test_every_kind_of_entry_is_understood(tmp_path: Path) -> None:
    recording, told = imported(log(tmp_path / "log", *ALL))
    table = recording.table
    rows = zip(table.command.tolist(), table.flags.tolist(), table.offset.tolist(), strict=True)
    assert list(rows) == [
        (Command.WRITE, 0, 0),
        (Command.FLUSH, 0, 0),
        (Command.WRITE, 0, 512),
        (Command.WRITE, 1, 2048),
        (Command.TRIM, 0, 0),
        (Command.WRITE_ZEROES, 0, 2560),
        (Command.FLUSH, 0, 0),
        (Command.WRITE, 0, 3584),
    ]
    assert [note.text for note in recording.notes if note.kind.value == "mark"] == ["here"]
    assert (table.completed == table.seq + 1).all()
    assert recording.size == 1 << 20
    assert "left out" not in told
    assert "missing" not in told
    # A flush with data is the flush, and then the data.
    first, second = flushed(tmp_path / "out")
    assert first[:1024] == b"a" * 1024
    assert second[:4096] == bytes(512) + b"b" * 512 + bytes(1024) + b"c" * 512 + bytes(1536)


def test_sectors_of_4096_bytes(tmp_path: Path) -> None:
    unit = 4096
    path = log(
        tmp_path / "log",
        entry(0, 1, b"a" * 8192, unit=unit),
        mark(b"x" * 3000, unit),
        entry(DISCARD, 2, sectors=1, unit=unit),
        unit=unit,
    )
    recording, _ = imported(path, "--size", "1M")
    assert end(tmp_path / "out")[:16384] == bytes(4096) + b"a" * 4096 + bytes(8192)
    assert [len(note.text) for note in recording.notes if note.kind.value == "mark"] == [3000]


def test_cut_off_at_any_byte_it_opens_to_its_whole_entries(tmp_path: Path) -> None:
    whole = log(tmp_path / "log", *ALL).read_bytes()
    ends = [512]
    for one in ALL:
        ends.append(ends[-1] + len(one))
    for length in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        if length < 28:
            with pytest.raises(RecordingError, match=r"nothing of it is left|not a dm-log-writes"):
                DmLog(path)
            continue
        cut = DmLog(path)
        entries = list(cut.entries())
        cut.close()
        assert len(entries) == sum(reach <= length for reach in ends[1:]), length
        assert (cut.missing is None) == (length == len(whole)), length
        if cut.missing is not None:
            assert f"entry {len(entries)} of {len(ALL)}, at byte" in cut.missing


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(512),
        entry(32),
        entry(MARK | FUA),
        entry(0, 0, b"a" * 512, text=b"\1"),
        entry(0, 0, b"a" * 512)[:511] + b"\1" + b"a" * 512,
        entry(0, 0, b"a" * 512, length=513),
        entry(MARK, sectors=1),
        entry(MARK, length=481),
        entry(MARK, length=2, text=b"abc"),
        entry(0, 0, sectors=1 << 40),
        entry(DISCARD, 1 << 60, sectors=1),
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_what_no_writer_writes_is_no_entry(tmp_path: Path, garbage: bytes, counted: bool) -> None:
    entries = (entry(0, 3, b"a" * 512), garbage, entry(FLUSH), entry(FLUSH))
    path = log(tmp_path / "log", *entries, count=4 if counted else 1)
    opened = DmLog(path, uncounted=True)
    assert [one.offset for one in opened.entries()] == [1536]
    assert (opened.missing is not None) == counted
    assert opened.beyond == 0
    opened.close()
    done = convert(path, tmp_path / "out", "--to", "nbdproxy", "--json")
    assert (json.loads(done.stdout)["missing"] is not None) == counted


def test_what_the_superblock_does_not_count_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    path = log(tmp_path / "log", *ALL[:5], bytes(1 << 20), count=3)
    recording, told = imported(path)
    assert recording.table.command.tolist() == [Command.WRITE, Command.FLUSH, Command.WRITE]
    assert "behind the 3 entries that the superblock counts stand 2 more that look like" in told
    done = convert(path, tmp_path / "two", "--to", "nbdproxy", "--uncounted")
    assert "taken in, as --uncounted asks" in done.stderr
    assert "3 write" in done.stderr
    assert "1 trim" in done.stderr


def test_the_end_mark_is_a_mark_like_any_other_unless_it_is_the_last(tmp_path: Path) -> None:
    path = log(tmp_path / "log", mark(b"dm-log-writes-end"), *ALL)
    recording, told = imported(path)
    texts = [note.text for note in recording.notes if note.kind.value == "mark"]
    assert texts == ["dm-log-writes-end", "here"]
    assert "no end mark" not in told
    done = convert(log(tmp_path / "no", *ALL[:-1]), tmp_path / "two", "--to", "nbdproxy")
    assert "no end mark" in done.stderr


def test_a_superblock_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="of version 2"):
        DmLog(log(tmp_path / "log", version=2))
    for unit in (0, 256, 513, 1 << 24):
        path = tmp_path / "log"
        path.write_bytes(struct.pack("<QQQI", MAGIC, 1, 0, unit).ljust(512, b"\0"))
        with pytest.raises(RecordingError, match=f"have {unit} bytes"):
            DmLog(path)


def test_the_disk_is_as_large_as_said(tmp_path: Path) -> None:
    path = log(tmp_path / "log", entry(0, 2048, b"a" * 512))
    assert imported(path)[0].size == 2 << 20
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    for words, sentence in (
        (("--size", "1M"), "the log writes up to byte 1049088, and the disk would have 1048576"),
        (("--base", base), "name the right base"),
        (("--base", base, "--size", "2M"), "is not the size of"),
        (("--size", "0"), "is no size of a disk"),
        (("--size", "many"), "is no size; write for example 10G"),
    ):
        done = convert(path, tmp_path / "no", "--to", "nbdproxy", *words, code=2)
        assert sentence in done.stderr
        assert not list(tmp_path.glob("no*")), "something is left"
    done = convert(path, tmp_path / "yes", "--to", "nbdproxy", "--size", "1G")
    assert Recording(tmp_path / "yes").size == 1 << 30


def test_a_request_that_is_no_whole_sector_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    odd = _unaligned(run)
    done = convert(run, tmp_path / "log", "--to", "dm-log-writes", code=2)
    assert f"request {odd} of {run} (100 bytes at 512) is not whole sectors" in done.stderr
    assert "use --to nbd-trlog" in done.stderr
    assert not list(tmp_path.glob("log*"))


def _unaligned(run: Path) -> int:
    """Make a recording with one odd request, behind one that failed; return its seq."""
    writer = RecordingWriter(run, META)
    failed = writer.received(1, [write(1, b"xx")])
    writer.completed(1, failed, 1, 5)
    odd = writer.received(1, [write(512, b"x" * 100)])
    writer.completed(1, odd, 1, 0)
    writer.close(ENDING)
    return odd


def test_what_is_lost_is_said_with_its_number(tmp_path: Path) -> None:
    first = Step(Command.WRITE, 0, 2, fill=1)
    made: list[Step | Answer | Mark] = [
        *(first, Step(Command.WRITE, 1, 2, fill=2), Answer(1), Answer(0)),
        *(first, Answer(2, 5), first, Answer(3, 5)),
        *(Step(Command.WRITE, 8, 1), Step(Command.FLUSH), Mark("x" * 600)),
    ]
    run, path = record(tmp_path / "run", made), tmp_path / "log"
    done = convert(run, path, "--to", "dm-log-writes", "--json")
    told = json.loads(done.stdout)
    assert told["counts"] == {"write": 2, "mark": 1}
    assert told["left_out"] == {"answered with an error": 2, "unanswered": 2}
    assert "note: 1 write was completed after an overlapping later one" in done.stderr
    assert "note: 2 requests answered with an error left out" in done.stderr
    assert "note: 1 mark was cut to the 479 bytes it holds" in done.stderr
    assert f"nbdproxy open {run} --at seq:0" in done.stderr
    disk = bytearray(SIZE)
    assert replay_log(path, disk) == ["x" * 479, "dm-log-writes-end"]
    # In completion order the earlier request, which was answered last, is on top.
    assert disk[:1536] == b"\1" * 1024 + b"\2" * 512
    assert end(run)[:1536] == b"\1" * 512 + b"\2" * 1024


def test_a_flush_stands_behind_what_it_covers_and_before_all_else(tmp_path: Path) -> None:
    """Byte for byte: the second write is completed while the flush is on its way."""
    made: list[Step | Answer | Mark] = [
        *(Step(Command.WRITE, 0, 1, fill=1), Step(Command.WRITE, 2, 1, fua=True, fill=2)),
        *(Answer(0), Step(Command.FLUSH), Answer(1), Answer(2), Step(Command.FLUSH), Answer(3, 5)),
        *(Step(Command.TRIM, 3, 1), Answer(4), Step(Command.WRITE_ZEROES, 4, 1), Answer(5)),
    ]
    run, path = record(tmp_path / "run", made), tmp_path / "log"
    convert(run, path, "--to", "dm-log-writes")
    entries = (
        *(entry(0, 0, b"\1" * 512), entry(FLUSH), entry(FUA, 2, b"\2" * 512)),
        *(entry(DISCARD, 3, sectors=1), entry(0, 4, bytes(512)), mark(b"dm-log-writes-end")),
    )
    assert path.read_bytes() == log(tmp_path / "expected", *entries).read_bytes()


def test_what_contradicts_itself_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [Step(Command.WRITE, 0, 1, fill=1)])
    path = log(tmp_path / "log", *ALL)
    there = tmp_path / "there"
    there.mkdir()
    for words, sentence in (
        ((path, there, "--to", "nbdproxy"), "exists; name a new one"),
        ((path, tmp_path / "no" / "out", "--to", "nbdproxy"), "there is no folder"),
        ((run, tmp_path / "out", "--to", "nbdproxy"), "of the format nbdproxy already"),
        ((path, tmp_path / "out", "--to", "dm-log-writes"), "of the format dm-log-writes already"),
        ((run, tmp_path / "out", "--to", "nbd-trlog", "--size", "1M"), "--size is for logs"),
        ((run, tmp_path / "out", "--to", "nbd-trlog", "--base", path), "needed only to --verify"),
        ((run, tmp_path / "out", "--to", "nbd-trlog", "--uncounted"), "is for dm-log-writes logs"),
        ((there, tmp_path / "out", "--to", "nbd-trlog"), "is not a recording"),
        ((tmp_path / "none", tmp_path / "out", "--to", "nbd-trlog"), "there is nothing at"),
    ):
        assert sentence in convert(*words, code=2).stderr
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["nbdproxy", "nbd-trlog"])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log(tmp_path / "log", *ALL)

    seen: list[int] = []

    def interrupt(_log: DmLog, _position: int, _buffer: memoryview) -> None:
        seen.append(len(list(tmp_path.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(DmLog, "read_into", interrupt)
    convert(path, tmp_path / "out", "--to", form, code=130)
    assert seen[0] > 1, "nothing was written yet"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", serial([Step(Command.WRITE, 0, 1, fill=1)]))

    def full(*_words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DmLogWriter, "finish", full)
    done = convert(run, tmp_path / "out", "--to", "dm-log-writes", code=2)
    assert "the log cannot be written: No space left on device" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_images_are_looked_at_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log(tmp_path / "log", *ALL)
    image = tmp_path / "image"
    image.write_bytes(b"QFI\xfb" + bytes((1 << 20) - 4))
    words = ("--to", "nbdproxy", "--base", image, "--verify")
    assert "not the same file" in convert(path, tmp_path / "x", *words, image, code=2).stderr
    other = tmp_path / "other"
    other.write_bytes(image.read_bytes())
    told = convert(path, tmp_path / "out", *words, other, code=1).stderr
    assert told.count("is a qcow2 file, whose own bytes are read") == 2

    def worked(_log: DmLog) -> None:
        raise AssertionError("the log was read first")

    monkeypatch.setattr(DmLog, "entries", worked)
    missing = ("--to", "nbdproxy", "--verify", tmp_path / "none")
    assert "there is no image at" in convert(path, tmp_path / "no", *missing, code=2).stderr


def test_memory_does_not_grow_with_the_payloads(tmp_path: Path) -> None:
    """An entry of 96 MiB, and one of 32: neither is ever in memory as a whole."""
    sizes = (96 << 20, 32 << 20)
    path, run = tmp_path / "log", tmp_path / "run"
    with path.open("wb") as file:
        file.write(struct.pack("<QQQI", MAGIC, 1, len(sizes), 512).ljust(512, b"\0"))
        for size in sizes:
            start = file.tell() + 512
            file.write(entry(0, 0, sectors=size // 512))
            for at in range(0, size, 16 << 20):
                file.seek(start + at)
                file.write(b"data")
            file.seek(start + size)
        file.truncate()
    tracemalloc.start()
    try:
        for source, out, form in (
            (path, run, "nbdproxy"),
            (run, tmp_path / "dm", "dm-log-writes"),
            (run, tmp_path / "nbd", "nbd-trlog"),
            (tmp_path / "nbd", tmp_path / "back", "nbdproxy"),
        ):
            tracemalloc.reset_peak()
            convert(source, out, "--to", form)
            assert tracemalloc.get_traced_memory()[1] < 48 << 20, form
    finally:
        tracemalloc.stop()
    assert len(Recording(tmp_path / "back").table) == sum(sizes) // LONGEST
    shutil.rmtree(tmp_path)  # half a gigabyte, which pytest would keep for three runs


@pytest.mark.parametrize("fua", [False, True])
def test_a_long_discard_is_listed_in_pieces_that_replay_log_does_not_leave_out(fua: bool) -> None:
    """Its `zero_range` returns at once for more than `max_zero_size`, which is 128 MiB."""
    most, file = 128 << 20, io.BytesIO()
    log_ = DmLogWriter(file)
    log_.discard(4096, 2 * most + 512, fua=fua)
    log_.finish()
    data = file.getvalue()
    found = [struct.unpack_from("<QQQQ", data, at) for at in range(512, len(data), 512)]
    flags = DISCARD | (FUA if fua else 0)
    assert found[:-1] == [
        (8, most // 512, flags, 0),
        (8 + most // 512, most // 512, flags, 0),
        (8 + 2 * most // 512, 1, flags, 0),
    ]
