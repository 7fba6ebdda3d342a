"""The checker of databases in images, without a guest: what is sound, and every kind of damage."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.errors import LabError
from nbdproxy.lab import sqlite_image
from nbdproxy.lab.guest import disk
from nbdproxy.lab.sqlite_image import CANNOT_TELL, LOST, SOUND, UNUSABLE
from nbdproxy.lab.workloads import databases
from tests.support.serving import nbdproxy, tool

MIB = 1 << 20
SIZE = 16 * MIB
TRANSACTIONS = 24


def make_database(path: Path, *, journal: str = "delete", closed: bool = True) -> None:
    """Commit what a guest would; not `closed` leaves the files as a crash in the middle does."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("PRAGMA cache_spill = 1")
    connection.execute("PRAGMA cache_size = 5")  # so that a transaction spills over
    connection.execute(
        "CREATE TABLE entry "
        "(txn INTEGER, seq INTEGER, content TEXT NOT NULL, PRIMARY KEY (txn, seq))"
    )
    for transaction in range(1, TRANSACTIONS + 1):
        insert(connection, transaction)
    if not closed:
        connection.execute("BEGIN")
        connection.execute("UPDATE entry SET content = replace(content, 'A', 'B')")
        crash = path.parent.parent / "crash"
        shutil.copytree(path.parent, crash)
        connection.close()
        shutil.rmtree(path.parent)
        crash.rename(path.parent)
    connection.close()


def insert(connection: sqlite3.Connection, transaction: int) -> None:
    rows = [(transaction, row, databases.content(transaction, row)) for row in (1, 2, 3)]
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO entry VALUES (?, ?, ?)", rows)
    connection.execute("COMMIT")


def nothing(_database: Path) -> None:
    """Leave a database as it is."""


@pytest.fixture
def image_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image with a database that was treated in some way."""

    def make(treat: Callable[[Path], None] = nothing, **options: object) -> Path:
        database = tmp_path / "tree" / databases.DATABASE
        database.parent.mkdir(parents=True)
        make_database(database, **options)  # type: ignore[arg-type]
        treat(database)
        image = tmp_path / "disk with space.img"
        disk.format_disk(image, SIZE, options=("-d", str(tmp_path / "tree")))
        return image

    return make


@pytest.mark.parametrize(
    ("journal", "closed", "left"),
    [
        ("delete", True, ("test.db",)),
        ("delete", False, ("test.db", "test.db-journal")),
        ("wal", False, ("test.db", "test.db-shm", "test.db-wal")),
    ],
)
def test_what_a_crash_left_is_recovered_and_sound(
    image_of: Callable[..., Path],
    tmp_path: Path,
    *,
    journal: str,
    closed: bool,
    left: tuple[str, ...],
) -> None:
    image = image_of(journal=journal, closed=closed)
    (tmp_path / "work").mkdir()
    found = sqlite_image.check_image(image, tmp_path / "work")
    assert found.files == left
    assert found.sound, found
    assert (found.highest, found.rows) == (TRANSACTIONS, 3 * TRANSACTIONS)
    assert sqlite_image.judge(image, committed=TRANSACTIONS)[0] == SOUND


def test_a_hot_journal_that_is_gone_is_damage(image_of: Callable[..., Path]) -> None:
    """The counterpart: what was spilled into the file is there, and nothing takes it back."""

    def lose(database: Path) -> None:
        Path(f"{database}-journal").unlink()

    assert sqlite_image.judge(image_of(lose, closed=False), committed=TRANSACTIONS)[0] == LOST


def sql(text: str) -> Callable[[Path], None]:
    def treat(database: Path) -> None:
        connection = sqlite3.connect(database)
        connection.executescript(text)
        connection.close()

    return treat


def zero_a_page(database: Path) -> None:
    data = bytearray(database.read_bytes())
    data[2 * 4096 : 3 * 4096] = bytes(4096)
    database.write_bytes(data)


def truncate(database: Path) -> None:
    database.write_bytes(database.read_bytes()[: 3 * 4096])


@pytest.mark.parametrize(
    ("treat", "complaint"),
    [
        (sql("UPDATE entry SET content = 'other' WHERE txn = 3 AND seq = 1"), "never written"),
        (sql("UPDATE entry SET content = x'ff00' WHERE txn = 3 AND seq = 1"), "never written"),
        (sql("DELETE FROM entry WHERE txn = 3 AND seq = 1"), "not whole"),
        (sql("DELETE FROM entry WHERE txn = 3"), "not whole"),
        (sql(f"DELETE FROM entry WHERE txn = {TRANSACTIONS}"), "was committed"),
        (sql("DELETE FROM entry"), "was committed"),
        (sql("DROP TABLE entry"), "was committed"),
        (Path.unlink, "there is no"),
        (zero_a_page, "malformed"),
        (truncate, "malformed"),
    ],
)
def test_damage_and_loss_are_told(
    image_of: Callable[..., Path], treat: Callable[[Path], None], complaint: str
) -> None:
    code, said = sqlite_image.judge(image_of(treat), committed=TRANSACTIONS)
    assert code == LOST
    assert complaint in "; ".join(said)


@pytest.mark.parametrize("treat", [sql("DELETE FROM entry"), sql("DROP TABLE entry"), Path.unlink])
def test_before_anything_was_promised_nothing_is_lost(
    image_of: Callable[..., Path], treat: Callable[[Path], None]
) -> None:
    assert sqlite_image.judge(image_of(treat))[0] == SOUND


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("committed-12", 12), ("committed-0", 0), ("", 0)],
)
def test_a_transaction_is_a_number_or_a_mark(text: str, number: int) -> None:
    assert sqlite_image.transaction(text) == number


@pytest.mark.parametrize("text", ["-1", "twelve", "later", "committed", "committed-"])
def test_other_marks_are_no_transaction(text: str) -> None:
    with pytest.raises(ValueError, match=r"-1|invalid literal"):
        sqlite_image.transaction(text)


def test_as_many_of_the_last_transactions_may_be_gone_as_is_said(
    image_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(image_of(sql(f"DELETE FROM entry WHERE txn > {TRANSACTIONS - 2}")))
    last = f"committed-{TRANSACTIONS}"
    for may_lose, code in (("0", LOST), ("1", LOST), ("2", SOUND)):
        assert sqlite_image.main([image, "--committed", last, "--may-lose", may_lose]) == code
        nbdproxy("lab", "check-sqlite", image, "--committed", last, "--may-lose", may_lose,
                 code=code)  # fmt: skip
    assert "was committed, the last one found is 22" in capsys.readouterr().out


def test_a_damaged_journal_is_no_answer(image_of: Callable[..., Path]) -> None:
    image = image_of()
    block = int(tool("debugfs", "-R", "blocks <8>", image).split()[0])
    with image.open("r+b") as file:
        file.seek(block * 1024)
        file.write(b"\x55" * 64)
    code, said = sqlite_image.judge(image, committed=TRANSACTIONS)
    assert code == CANNOT_TELL
    assert "ask a kernel" in said[0]


def test_what_cannot_be_asked_is_unusable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "disk.img"
    assert sqlite_image.main([str(image)]) == UNUSABLE
    image.write_bytes(bytes(SIZE))
    assert sqlite_image.main([str(image)]) == UNUSABLE
    assert "give the bare filesystem" in capsys.readouterr().out
    nbdproxy("lab", "check-sqlite", image, code=UNUSABLE)
    nbdproxy("lab", "check-sqlite", image, "--committed", "twelve", code=UNUSABLE)
    with pytest.raises(LabError, match="does not exist"):
        sqlite_image.judge(tmp_path / "none.img")


def test_the_module_is_a_program(image_of: Callable[..., Path]) -> None:
    words = (
        sys.executable,
        "-m",
        "nbdproxy.lab.sqlite_image",
        image_of(),
        "--committed",
        "24",
    )
    assert tool(*words) == "sound, 24 transactions\n"
