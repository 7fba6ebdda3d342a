"""Policies under real guests: what fsync says on a disk whose flush fails, and what SQLite finds.

Each test serves a disk through a recording nbdproxy to a guest with ext4. What was observed: with
the second flush failing, ext4 aborts its journal, the application gets EIO once, the next call
succeeds although its data is lost, and then the filesystem is read-only. SQLite's synchronous=FULL
with a rollback journal may take the last committed transaction back (it does not sync the folder
in which the journal was); with a WAL it keeps all.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

import pytest

from nbdproxy.crash.recorded import RecordedSource
from nbdproxy.crash.state import Choice, StateId, open_state
from nbdproxy.errors import LabError
from nbdproxy.lab import databases, disk, fsyncs, guest, workloads
from nbdproxy.lab.build import Lab, build_lab
from nbdproxy.persistence.model import Level, Options, lost
from nbdproxy.recording.notes import NoteKind
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy

pytestmark = pytest.mark.lab

MIB = 1 << 20


@pytest.fixture(scope="module")
def lab() -> Lab:
    return build_lab()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    disk.format_disk(path, 64 * MIB)
    return path


def serve(image: Path, *options: str | Path) -> ForkedServer:
    folder = image.parent
    return ForkedServer(
        folder, image, "--record", folder / "run", "--control", folder / "ctl", *options
    )


def run(lab: Lab, server: ForkedServer, workload: workloads.Workload, end: str = "cut") -> str:
    """Run a workload on what the server serves; return what the guest printed."""
    uri = f"nbd+unix:///?socket={server.socket}"
    ending = workloads.parse_ending(end)
    return guest.run(lab, workload, uri, ending=ending, cache_mode="none", time_limit_s=150).serial


def check(lab: Lab, image: Path) -> databases.SqliteCheck:
    """What a second guest finds on the image."""
    ending = workloads.parse_ending("cut")
    found = guest.run(lab, workloads.sqlite_check(), image, ending=ending, time_limit_s=150)
    return databases.checked(found.serial)


def test_the_application_sees_eio_once(lab: Lab, image: Path) -> None:
    policy = ("--policy", "fsyncgate", "--set", "nth=2")
    with serve(image, *policy) as server:
        serial = run(lab, server, workloads.fsync_probe(call="fdatasync"))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    said = fsyncs.probed(serial)
    assert list(said.values()).count("EIO") == 1
    assert (said["fdatasync 1"], said["fdatasync 2"]) == ("EIO", "ok")
    source = RecordedSource(image.parent / "run")
    faults = [note.text for note in source.notes if note.kind is NoteKind.FAULT]
    assert len(faults) == 1
    assert "fsyncgate/fails once" in faults[0]
    table, options = source.table, Options(fsyncgate=True)
    assert int((table.is_flush & (table.error != 0)).sum()) == 1
    gone = lost(table, source.events, options)
    assert gone.any()
    state = open_state(source, StateId(source.events, Level.FLUSHED, Choice.MUST, options))
    assert state.pread(0, state.size) == image.read_bytes()
    state.close()
    source.close()


@pytest.mark.parametrize("policy", ["torn-writes", "misdirected-writes"])
def test_sqlite_finds_what_the_disk_did(lab: Lab, image: Path, policy: str) -> None:
    """Only the database's own blocks are struck, so that ext4 itself can be mounted."""
    path = image.parent / "mine.toml"
    action = {
        "torn-writes": 'action = "tear"\nkeep = "front"\nsectors = 1',
        "misdirected-writes": 'action = "misdirect"\nshift = -4096',
    }[policy]
    path.write_text(
        f'summary = "{policy} of pages full of rows"\nimitates = "see {policy}"\n'
        f'[[rule]]\ncommand = "write"\nfile = "/db/test.db"\nprobability = 0.5\n{action}\n'
    )
    first = workloads.sqlite(synchronous="full", transactions=40)
    guest.run(lab, first, image, ending=workloads.parse_ending("sync"), time_limit_s=150)
    assert check(lab, image).sound
    with serve(image, "--policy", path) as server:
        run(lab, server, VACUUM, "sync")
        serial = run(lab, server, workloads.sqlite_check())
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    found = databases.checked(serial)
    assert found.mounted
    assert found.integrity != ("ok",)
    source = RecordedSource(image.parent / "run")
    assert [note for note in source.notes if note.kind is NoteKind.FAULT]
    source.close()
    # The image is pristine: the faults were above it.
    honest = check(lab, image)
    assert (honest.integrity, honest.wrong, honest.errors) == (("ok",), 0, ())


VACUUM = workloads.shell(
    "echo 'PRAGMA synchronous = FULL; DELETE FROM entry WHERE txn <= 10; VACUUM;' > /tmp/sql; "
    "/tools/bin/sqlite3 -batch db/test.db < /tmp/sql; true"
)


def cut_at(lab: Lab, image: Path, workload: workloads.Workload, count: int) -> int:
    """Cut the power when so many transactions were told; return how many were until then."""
    told: list[str] = []
    enough = threading.Event()

    def listen(line: str) -> None:
        told.append(line)
        if databases.committed(line) >= count:
            enough.set()

    with serve(image, "--policy", "drop-unflushed") as server:

        def cut() -> None:
            assert enough.wait(120)
            nbdproxy("ctl", image.parent / "ctl", "cut")

        cutting = threading.Thread(target=cut)
        cutting.start()
        uri = f"nbd+unix:///?socket={server.socket}"
        ending = workloads.parse_ending("cut")
        with contextlib.suppress(LabError):  # a guest whose disk went away may not end well
            guest.run(
                lab, workload, uri, ending=ending, cache_mode="none", on_line=listen,
                time_limit_s=150,
            )  # fmt: skip
        cutting.join()
        assert server.wait() == 0, server.log
    return max(map(databases.committed, told))


@pytest.mark.parametrize(
    ("synchronous", "journal", "late"),
    [("full", "wal", 0), ("extra", "delete", 0), ("full", "delete", 1)],
)
def test_what_is_committed_is_kept(
    lab: Lab, image: Path, synchronous: str, journal: str, late: int
) -> None:
    workload = workloads.sqlite(synchronous=synchronous, journal=journal, transactions=400)
    cut_at(lab, image, workload, 25)
    # What was told after the cut began may not have been committed before it.
    found = check(lab, image)
    assert found.sound
    assert found.highest is not None
    assert found.highest >= 25 - late


def test_what_is_not_synced_is_lost(lab: Lab, image: Path) -> None:
    cut_at(lab, image, workloads.sqlite(synchronous="off", transactions=4000), 50)
    found = check(lab, image)
    assert not found.sound or (found.highest or 0) < 50
