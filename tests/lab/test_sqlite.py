"""SQLite and fsync in real guests, on plain images: what is found, and that damage is told.

Disks that break under the guest are in `test_policies`.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from nbdproxy.errors import LabError
from nbdproxy.lab import run as guest
from nbdproxy.lab.guest import disk
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.workloads import databases, fsyncs, kernel_log, workloads
from nbdproxy.lab.workloads.workloads import End, RunEnd

GUEST = pytest.mark.lab
MIB = 1 << 20
CUT = RunEnd(End.CUT)
ROWS = range(1, databases.ROWS + 1)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return build_lab()


def check(lab: Lab, image: Path) -> databases.SqliteCheck:
    run = guest.run(lab, workloads.sqlite_check(), image, cpus=1)
    return databases.checked(run.serial)


@GUEST
@pytest.mark.parametrize(
    ("journal", "undone"),
    [
        ("wal", 0),
        ("delete", 1),  # the journal's removal, which is the commit, is not synced by `full`
    ],
)
def test_what_was_committed_is_found_after_a_cut(
    lab: Lab, tmp_path: Path, journal: str, undone: int
) -> None:
    image = tmp_path / "disk.img"
    disk.format_disk(image, 32 * MIB)
    workload = workloads.sqlite(synchronous="full", journal=journal, transactions=30)
    told: list[int] = []
    run = guest.run(
        lab,
        workload,
        image,
        ending=CUT,
        cpus=1,
        on_line=lambda line: told.append(databases.committed(line)),
    )
    assert [number for number in told if number] == list(range(1, 31))
    assert databases.committed(run.serial) == 30
    assert databases.sqlite_errors(run.serial) == ()
    found = check(lab, image)
    assert found.sound
    assert found.highest is not None
    assert 30 - undone <= found.highest <= 30
    assert ("test.db-wal" in found.files) == (journal == "wal")


@GUEST
def test_damage_is_told_and_ends_well(lab: Lab, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "db").mkdir(parents=True)
    database = tree / databases.DATABASE
    page = _make_database(database, transactions=4)
    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM entry WHERE txn = 2 AND seq = 1")
        connection.execute("UPDATE entry SET content = 'other' WHERE txn = 3 AND seq < 3")
    connection.close()
    data = bytearray(database.read_bytes())
    data[page * 4096 : (page + 1) * 4096] = bytes(4096)
    database.write_bytes(data)
    image = tmp_path / "disk.img"
    disk.format_disk(image, 32 * MIB, options=("-d", str(tree)))
    found = check(lab, image)
    assert found.mounted
    assert (found.highest, found.rows, found.wrong, found.incomplete) == (4, 11, 2, 1)
    assert found.integrity != ("ok",)
    assert not found.sound


def _make_database(path: Path, *, transactions: int) -> int:
    """Make on the host what a guest makes; return the number of the index's page, from 0."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA page_size = 4096")
    connection.execute(
        "CREATE TABLE entry "
        "(txn INTEGER, seq INTEGER, content TEXT NOT NULL, PRIMARY KEY (txn, seq))"
    )
    for txn in range(1, transactions + 1):
        rows = [(txn, seq, databases.content(txn, seq)) for seq in ROWS]
        connection.executemany("INSERT INTO entry VALUES (?, ?, ?)", rows)
    connection.commit()
    [[page]] = connection.execute("SELECT rootpage FROM sqlite_master WHERE type = 'index'")
    connection.close()
    return int(page) - 1


@GUEST
def test_a_disk_that_cannot_be_mounted_is_told_and_ends_well(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    found = check(lab, image)
    assert not found.mounted
    assert (found.files, found.highest, found.integrity) == ((), None, ())
    assert not found.sound


@GUEST
def test_fsync_is_ok_on_a_healthy_disk(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.format_disk(image, 32 * MIB)
    run = guest.run(lab, workloads.fsync_probe(attempts=4), image, cpus=1)
    assert fsyncs.probed(run.serial) == {
        "open": "ok",
        "write 1": "ok",
        "fsync 1": "ok",
        "fsync 2": "ok",
        "write 3": "ok",
        "fsync 3": "ok",
        "fsync 4": "ok",
        "cached": "write 3",
        "stored": "write 3",
        "close": "ok",
    }
    assert kernel_log.kernel_errors(run.serial) == ()


def test_the_last_commit_is_read_from_lines_and_from_all_of_them() -> None:
    assert databases.committed("") == 0
    assert databases.committed("sqlite ready") == 0
    assert databases.committed("committed 7") == 7
    assert databases.committed("sqlite ready\r\ncommitted 9\r\ncommitted 10\r\ncommi") == 10
    assert databases.committed("it was committed 11 times") == 0


def test_a_check_that_could_read_nothing_says_so() -> None:
    found = databases.checked(
        "sqlite mounted yes\r\nsqlite found test.db test.db-journal\r\n"
        "sqlite error Runtime error near line 1: database disk image is malformed (11)\r\n"
        "sqlite ended 1\r\n"
    )
    assert found.mounted
    assert found.files == ("test.db", "test.db-journal")
    assert (found.highest, found.rows, found.wrong, found.incomplete) == (None,) * 4
    assert found.errors == ("Runtime error near line 1: database disk image is malformed (11)",)
    assert not found.sound


def test_failed_calls_and_the_kernels_words_are_read() -> None:
    serial = "open: ok\nfsync 1: EIO\nfsync 2: ok\nstored: mixed\nkernel: [    3.7] I/O error, dev"
    assert fsyncs.probed(serial) == {
        "open": "ok",
        "fsync 1": "EIO",
        "fsync 2": "ok",
        "stored": "mixed",
    }
    assert kernel_log.kernel_errors(serial) == ("I/O error, dev",)


@pytest.mark.parametrize("wrong", [{"synchronous": "on"}, {"journal": "none"}])
def test_settings_that_sqlite_does_not_have_are_told(wrong: dict[str, str]) -> None:
    with pytest.raises(LabError, match="choose from"):
        workloads.sqlite(**wrong)  # type: ignore[arg-type]


def test_a_call_that_is_none_is_told() -> None:
    with pytest.raises(LabError, match="fdatasync"):
        workloads.fsync_probe(call="sync")
