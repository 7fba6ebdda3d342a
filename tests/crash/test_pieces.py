"""Content-addressed pieces: what arrives is the recording that was sent, or nothing at all.

Not covered: the way between the two ends; see test_dask.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nbdproxy.crash.explore import pieces
from nbdproxy.crash.explore.pieces import PieceSource, PieceStore
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.below.copy_before_write import PreservingDisk
from tests.support.exploring import random_case
from tests.support.images import write_sparse

PIECE = 8192


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that every file has several."""
    monkeypatch.setattr(pieces, "PIECE_MAX", PIECE)


@pytest.fixture
def store(tmp_path: Path) -> PieceStore:
    return PieceStore(tmp_path / "store", tmp_path / "scratch")


def contents(source: RecordedSource) -> str:
    """A digest of all that a recording says: its events, their payloads, the disk as it was."""
    source.verify()
    base = source.base()
    found = list(source.log()), source.meta, source.notes, base.pread(0, base.size)
    base.close()
    return hashlib.sha256(repr(found).encode()).hexdigest()


def half_saved(folder: Path) -> RecordedSource:
    """A recording that needs its image: 40 blocks, every other a hole, and two were changed."""
    blocks = [bytes([n]) * 4096 if n % 2 else bytes(4096) for n in range(40)]
    image = write_sparse(folder / "image", b"".join(blocks))
    below = FileDisk(image)
    data = tuple((one.offset, one.length) for one in below.data_extents(0, below.size))
    meta = Meta(
        below.size, str(image), False, data, Fingerprint.of(image), (), "2026-01-01", "test"
    )
    recorder = RecordingWriter(folder / "run", meta)
    disk = PreservingDisk(below, recorder)
    for block in (1, 7):
        disk.pwrite(block * 4096, b"new" * 1000)
    disk.close()
    recorder.close(Ending("done", Fingerprint.of(image)))
    return RecordedSource(folder / "run")


def hand_over(source: PieceSource, store: PieceStore) -> RecordedSource:
    """Put what is lacking, and open what comes of it."""
    for digest in store.lacking(source.snapshot):
        store.put(digest, source.read(digest))
    run = store.run(source.snapshot)
    assert run is not None
    image = run / pieces.IMAGE if source.snapshot.has_image else None
    return RecordedSource(run, image=image)


def test_a_recording_with_its_part_of_the_image_arrives(tmp_path: Path, store: PieceStore) -> None:
    source = half_saved(tmp_path)
    expected = contents(source)
    sender = PieceSource(source)
    assert all(length <= PIECE for length in sender.snapshot.pieces().values())
    (file,) = (one for one in sender.snapshot.files if one.name == pieces.IMAGE)
    assert file.size == 40 * 4096
    arrived = hand_over(sender, store)
    source.image.unlink()
    assert contents(arrived) == expected
    sender.close()


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
def test_a_recording_of_a_proxy_arrives(tmp_path: Path, store: PieceStore, killed: bool) -> None:
    case = random_case(tmp_path, 5, killed=killed)
    with RecordedSource(case.run) as source:
        sender = PieceSource(source)
        assert len(sender.snapshot.pieces()) > 10
        arrived = hand_over(sender, store)
        assert not arrived.path.joinpath("events.tail").exists()
        assert contents(arrived) == contents(source)
        sender.close()
        arrived.close()


def test_only_what_is_lacking_is_asked_for(tmp_path: Path, store: PieceStore) -> None:
    with half_saved(tmp_path) as source:
        sender = PieceSource(source)
        first, *others = store.lacking(sender.snapshot)
        assert len(others) + 1 == len(sender.snapshot.pieces())
        store.put(first, sender.read(first))
        assert store.lacking(sender.snapshot) == tuple(others)
        hand_over(sender, store).close()
        assert store.lacking(sender.snapshot) == ()
        assert list((tmp_path / "scratch").iterdir()) == []


def test_a_piece_damaged_on_its_way_is_refused(tmp_path: Path, store: PieceStore) -> None:
    with half_saved(tmp_path) as source:
        sender = PieceSource(source)
        first = store.lacking(sender.snapshot)[0]
        data = bytearray(sender.read(first))
        data[-1] ^= 1
        with pytest.raises(RecordingError, match=f"{first} was damaged on its way; check"):
            store.put(first, bytes(data))
        assert first in store.lacking(sender.snapshot)
        assert list((tmp_path / "scratch").iterdir()) == []


def test_a_piece_damaged_where_it_is_kept_is_asked_for_again(
    tmp_path: Path, store: PieceStore
) -> None:
    with half_saved(tmp_path) as source:
        expected = contents(source)
        sender = PieceSource(source)
        for digest in store.lacking(sender.snapshot):
            store.put(digest, sender.read(digest))
        damaged = sorted(sender.snapshot.pieces())[3]
        path = tmp_path / "store" / "pieces" / damaged
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        assert store.run(sender.snapshot) is None
        assert store.lacking(sender.snapshot) == (damaged,)
        assert contents(hand_over(sender, store)) == expected


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    with half_saved(tmp_path) as source:
        sender = PieceSource(source)
        with (source.path / "data").open("r+b") as stream:
            stream.seek(100)
            stream.write(b"something else")
        (file,) = (one for one in sender.snapshot.files if one.name == "data")
        with pytest.raises(RecordingError, match="was changed while it was handed over; end"):
            sender.read(file.pieces[0].digest)
        sender.close()
