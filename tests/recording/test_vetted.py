"""`Recording`: slots with right checksums that no recorder writes are refused, not believed.

Not covered: what harmless values mean; a recording may tell of a disk that never was.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from nbdproxy.errors import RecordingError
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.unpack import unpack
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import ENDING, META, SIZE, fill, make
from tests.support.forging import FIELDS, NONE, sealed, slots_of
from tests.support.packs import entry, index_of, names, seal

META_SLOT, ANSWER, REQUEST, BEFORE, TEXT, ZEROES = 0, 5, 3, 2, 1, 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording with one of everything. Nobody may change it."""
    path = tmp_path_factory.mktemp("vetted") / "run"
    make(path)
    return path


def forged(run: Path, changes: list[tuple[int, str, int]], more: bytes = b"") -> dict[str, bytes]:
    """Return a recording's files with fields of slots changed, and right checksums again."""
    data = (run / "data").read_bytes() + more
    slots = slots_of(run)
    for slot, field, value in changes:
        slots[slot % len(slots)][FIELDS.index(field)] = value
    return {"events": sealed(slots, data, digests=False), "data": data}


def refused(members: dict[str, bytes], folder: Path) -> None:
    """Opening it must fail, and unpacking it, too, and leave nothing."""
    (folder / "run").mkdir()
    for name, content in members.items():
        (folder / "run" / name).write_bytes(content)
    with pytest.raises(RecordingError):
        Recording(folder / "run")
    index = index_of(members, size=SIZE, events=len(members["events"]) // 64)
    archive = entry("pack.json", index) + b"".join(entry(*one) for one in members.items())
    (folder / "file").write_bytes(seal(archive + bytes(1024)))
    with pytest.raises(RecordingError, match="file holds no recording that this nbdproxy can read"):
        unpack(folder / "file", folder / "out")
    assert names(folder) == ["file", "run"]


def test_what_a_recorder_wrote_passes(run: Path, tmp_path: Path) -> None:
    with Recording(run) as vetted:
        assert len(list(vetted.log())) == vetted.events
    writer = RecordingWriter(tmp_path / "live", META)
    fill(writer)
    with Recording(tmp_path / "live") as vetted:
        assert vetted.events
    writer.close(ENDING)


@pytest.mark.parametrize(
    ("slot", "field", "value"),
    [
        (ANSWER, "length", 2**40),
        (ANSWER, "length", 2**64 - 2),
        (ANSWER, "length", 3),
        (ANSWER, "offset", 2**64 - 1),
        (META_SLOT, "position", NONE),
        (META_SLOT, "kind", 2),
        (TEXT, "kind", 1),
        (TEXT, "kind", 0),
        (TEXT, "kind", 99),
        (REQUEST, "command", 99),
        (REQUEST, "command", 250),
        (BEFORE, "offset", 2**63),
        (ZEROES, "length", 2**63),
        (ZEROES, "length", SIZE),
        (ZEROES, "position", 0),
        (REQUEST, "position", NONE),
        (REQUEST, "command", 0),
        (BEFORE, "offset", SIZE),
        (TEXT, "time", 2**63),
        (ANSWER, "position", 0),
    ],
)
def test_a_slot_that_no_recorder_writes(
    run: Path, tmp_path: Path, slot: int, field: str, value: int
) -> None:
    refused(forged(run, [(slot, field, value)]), tmp_path)


def test_more_answers_than_requests(run: Path, tmp_path: Path) -> None:
    """Each alone could be; together they would make work that grows with the square."""
    later = range(12, 16)
    changes = [(n, f, v) for n in later for f, v in (("kind", 3), ("offset", 1), ("length", 10))]
    refused(forged(run, changes), tmp_path)


def test_payloads_that_are_told_again_and_again(run: Path, tmp_path: Path) -> None:
    """A million requests for the same bytes would be read a million times."""
    with Recording(run) as recording:
        room = (run / "data").stat().st_size
        writes = [e for e in recording.log() if e.kind == 2 and e.command == 1]
    changes = [(e.seq, f, v) for e in writes for f, v in (("position", 0), ("length", room // 2))]
    refused(forged(run, changes), tmp_path)


def test_a_text_that_no_memory_holds(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdproxy.recording.reader.META_MAX", 100)
    refused(forged(run, []), tmp_path)


@pytest.mark.parametrize("text", [b"[" * 60000, b"{}", b"null"])
def test_a_meta_that_is_none(run: Path, tmp_path: Path, text: bytes) -> None:
    position = len((run / "data").read_bytes())
    digest = xxh3_64_intdigest(text)
    changes = [(0, "position", position), (0, "length", len(text)), (0, "digest", digest)]
    refused(forged(run, changes, text), tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"size": 65536', b'"size": 6553.'), (b"[[0, 4096]", b'[["",4096]'), (b"4096]", b"-409]")],
)
def test_a_meta_with_values_of_other_kinds(
    run: Path, tmp_path: Path, old: bytes, new: bytes
) -> None:
    with Recording(run) as recording:
        first = next(recording.log())
    text = (run / "data").read_bytes()[first.position : first.position + first.length]
    text = text.replace(old, new + b"5" * (old.count(b"65536")))
    position = len((run / "data").read_bytes())
    digest = xxh3_64_intdigest(text)
    changes = [(0, "position", position), (0, "length", len(text)), (0, "digest", digest)]
    refused(forged(run, changes, text), tmp_path)


numbers = st.integers(0, 30) | st.sampled_from(
    [255, 4096, 2**32 - 1, 2**62, 2**63, 2**64 - 512, NONE]
)
BITS = {"kind": 8, "command": 8, "flags": 16, "connection": 32}


@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from(FIELDS), numbers), min_size=1, max_size=4
    )
)
@settings(max_examples=400, deadline=None)
def test_whatever_a_slot_says_nothing_else_is_raised(
    run: Path, changes: list[tuple[int, str, int]]
) -> None:
    fit = [(slot, field, value % 2 ** BITS.get(field, 64)) for slot, field, value in changes]
    with tempfile.TemporaryDirectory() as name:
        for member, content in forged(run, fit).items():
            Path(name, member).write_bytes(content)
        with suppress(RecordingError), Recording(Path(name)) as recording:
            assert list(recording.log())
