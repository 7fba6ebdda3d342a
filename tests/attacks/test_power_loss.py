"""What a recording says to be durable is there after its machine lost power.

The disk of that machine is a model: of each file, what it was at its last sync is there, and of
each page since then, any of the versions that were seen; of the folder, the names at its last sync,
and any later one. Not covered: what a real filesystem does beyond that.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from nbdproxy.private import new_file, new_folder
from nbdproxy.recording import writer as writing
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command
from tests.recording.example import ENDING, META, bare, write

PAGE = 4096
SEEDS = range(6)


class Machine:
    """A folder whose machine may lose power; it watches the syncs of this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.versions: dict[int, list[bytes]] = {}
        self.names: dict[str, int] = {}
        self._lock = threading.Lock()  # streams are synced by a thread of theirs, too
        for name in ("fsync", "fdatasync"):
            really = getattr(os, name)

            def synced(fd: int, really: object = really) -> None:
                with self._lock:
                    self._synced(fd)
                really(fd)  # type: ignore[operator]

            monkeypatch.setattr(os, name, synced)

    def _synced(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}")
        if path.is_dir():
            if path.samefile(self.folder):
                self.names = {one.name: one.stat().st_ino for one in self.folder.iterdir()}
        else:
            self.versions[os.fstat(fd).st_ino] = [path.read_bytes()]

    def look(self) -> dict[int, list[bytes]]:
        """See what is in the files: any page of it may come to the disk at any time."""
        with self._lock:
            for file in self.folder.iterdir():
                self.versions.setdefault(file.stat().st_ino, [b""]).append(file.read_bytes())
            return {file: [*seen] for file, seen in self.versions.items()}

    def lose_power(self, dice: random.Random, to: Path) -> Path:
        """Return a folder with what is left."""
        versions = self.look()
        now = {one.name: one.stat().st_ino for one in self.folder.iterdir()}
        to.mkdir()
        for name in {**self.names, **now}:
            found = dice.choice((self.names, now)).get(name)
            if found is not None:
                (to / name).write_bytes(_some_of(versions.get(found, [b""]), dice))
        return to


def _some_of(versions: list[bytes], dice: random.Random) -> bytes:
    synced, size = versions[0], len(dice.choice(versions))
    size = max(size, min(len(synced), len(versions[-1])))
    pages = []
    for at in range(0, size, PAGE):
        page = dice.choice(versions)[at : at + PAGE]
        pages.append(page.ljust(min(PAGE, size - at), b"\0"))
    return b"".join(pages)[:size]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails that are gone round many times."""
    monkeypatch.setattr(writing, "_EVENT_SEGMENT", PAGE)
    monkeypatch.setattr(writing, "_DATA_SEGMENT", 2 * PAGE)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_synced_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    dice = random.Random(seed)
    machine = Machine(tmp_path / "run", monkeypatch)
    writer = RecordingWriter(tmp_path / "run", META, durable=True)
    synced: dict[int, bytes] = {}
    for turn in range(dice.randrange(3, 60)):
        written = {}
        for _ in range(dice.randrange(1, 30)):
            payload = dice.randbytes(dice.choice((1, 512, 4096, 9000)))
            first = writer.received(1, [write(0, payload)])
            writer.completed(1, first, 1, 0)
            written[first] = payload
        if not turn % 7:
            machine.look()
        flush = writer.received(1, [bare(Command.FLUSH)])
        writer.completed(1, flush, 1, 0)
        if turn % 3 == 0:
            writer.sync()
            end = writer.seq
            synced |= written
    left = machine.lose_power(dice, tmp_path / "left")
    with Recording(left) as found:
        assert found.events >= end
        for row, seq in enumerate(found.table.seq.tolist()):
            if seq in synced:
                kept = bytearray(len(synced[seq]))
                found.read_payload(int(found.table.position[row]), memoryview(kept))
                assert kept == synced[seq], f"seed {seed}, event {seq}"
    writer.close(ENDING)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_recording_that_ended_in_order_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    dice = random.Random(seed)
    machine = Machine(tmp_path / "run", monkeypatch)
    writer = RecordingWriter(tmp_path / "run", META)
    for _ in range(dice.randrange(200)):
        first = writer.received(1, [write(0, dice.randbytes(dice.choice((1, 512, 9000))))])
        writer.completed(1, first, 1, 0)
    machine.look()
    events = writer.seq + 1
    writer.close(ENDING)
    with Recording(machine.lose_power(dice, tmp_path / "left")) as found:
        assert (found.events, found.ending, found.missing) == (events, ENDING, None)
        found.verify()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_has_its_name_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    machine = Machine(folder, monkeypatch)
    content = random.Random(seed).randbytes(100_000)
    with new_file(folder / "out") as made:
        os.pwrite(made.fd, content, 0)
        machine.look()
        made.finish()
    left = machine.lose_power(random.Random(seed), tmp_path / "left")
    assert (left / "out").read_bytes() == content
    with new_folder(tmp_path / "run") as made:
        made.finish()
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("seed", SEEDS)
def test_tails_go_when_the_files_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    machine = Machine(tmp_path / "run", monkeypatch)
    writer = RecordingWriter(tmp_path / "run", META)
    really = os.unlink
    left: list[Path] = []

    def unlinked(name: str, *, dir_fd: int) -> None:
        really(name, dir_fd=dir_fd)
        to = tmp_path / f"left{len(left)}"
        left.append(machine.lose_power(random.Random(seed), to))

    monkeypatch.setattr(os, "unlink", unlinked)
    writer.close(ENDING)
    assert len(left) == 2
    for folder in left:
        assert {"events", "data"} <= {one.name for one in folder.iterdir()}
