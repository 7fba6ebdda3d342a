"""The database that the workload `sqlite` left, checked on the host, out of an image of its disk.

    python -m nbdproxy.lab.sqlite_image IMAGE [--committed N] [--may-lose K]

For `nbdproxy explore --check`: one check costs a tenth of a second instead of a guest, and the
module imports little for that reason. `nbdproxy lab check-sqlite` is the same and starts slower.
The tools are the real ones: e2fsck replays ext4's journal, debugfs copies /db out, and Python's
sqlite3 rolls a hot journal back or recovers the WAL, as an application does after a crash.

Exit codes: 0 the database is sound and nothing that was promised is lost; 1 it is damaged or too
little is there; 2 the question cannot be asked; 3 ext4's journal cannot be replayed here, so that a
kernel has to be asked (`nbdproxy lab run sqlite-check`).

Guarantees: what is found is what `databases.checked` would say of a guest's check.
**The replay writes to IMAGE**: give it a private file, it may be sparse and nothing is copied.

Does not cover filesystems other than ext2, ext3 and ext4, partitions, and unlinked files that were
still open (the kernel's mount frees them; no database is among them).
"""

from __future__ import annotations

import argparse
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import LabError, NbdproxyError
from nbdproxy.lab.guest import tools
from nbdproxy.lab.workloads.databases import DATABASE, ROWS, SqliteCheck, content
from nbdproxy.printable import visible

SOUND, LOST, UNUSABLE, CANNOT_TELL = range(4)
"""The exit codes."""

LIMIT_S = 60
"""Seconds that each of the tools has."""

_COMPLAINTS_MAX = 20
# What debugfs says besides trouble: its version, and that the owner is not ours to change.
_HARMLESS = ("debugfs ", "while changing ownership")
_REPLAYED = "recovering journal"
_ABSENT = "File not found by ext2_lookup"


class ReplayError(LabError):
    """ext4's journal cannot be replayed by e2fsck; what a kernel would do is not known."""


def check_image(image: Path, workdir: Path) -> SqliteCheck:
    """Return what is in an image; writes to it, and copies the database into an empty folder.

    Raises `ReplayError` if the filesystem's journal cannot be replayed, `LabError` if there is no
    such filesystem or a tool is missing.
    """
    if not image.exists():
        raise LabError(f"{image} does not exist; name the image of a disk")
    where = tools.require(["debugfs", "e2fsck"])
    replayed = _run([where["e2fsck"], "-y", "-E", "journal_only", image.absolute()], workdir)
    if replayed.returncode >= 8:
        raise LabError(f"{image} holds no ext4 that e2fsck can open; give the bare filesystem")
    # A damaged journal is thrown away and the filesystem repaired, which no kernel does.
    more = [line for line in replayed.stdout.splitlines() if not line.endswith(_REPLAYED)]
    if replayed.returncode >= 4 or more:
        raise ReplayError(
            f"the journal in {image} is damaged ({''.join(more[:1])}); ask a kernel, with an image "
            f"made anew, for this one was changed: nbdproxy lab run sqlite-check"
        )
    folder = Path(DATABASE).parent
    copied = _run([where["debugfs"], "-R", f"rdump /{folder} .", image.absolute()], workdir)
    troubles = [
        line
        for line in copied.stderr.splitlines()
        if line.strip() and not any(part in line for part in (*_HARMLESS, _ABSENT))
    ]
    database = workdir / DATABASE
    if not database.exists():
        return SqliteCheck(True, (), None, None, None, None, (), tuple(troubles))
    files = tuple(sorted(path.name for path in database.parent.iterdir()))
    return check_database(database, files, troubles)


def check_database(database: Path, files: Sequence[str], troubles: Iterable[str]) -> SqliteCheck:
    """Open a database, by which SQLite recovers it, and return what is in it.

    A database without the table counts as one with nothing in it: nothing had been promised then.
    """
    errors = list(troubles)
    rows: list[tuple[object, object, object]] | None = None
    integrity: list[str] = []
    with closing(sqlite3.connect(database)) as connection:
        connection.text_factory = bytes  # damaged text need not be UTF-8
        try:
            # Not as its argument: newer versions take a number there for a table's name.
            asked = f"SELECT integrity_check FROM pragma_integrity_check LIMIT {_COMPLAINTS_MAX}"
            integrity = [_text(line) for [line] in connection.execute(asked)]
        except sqlite3.Error as error:
            errors.append(str(error))
        try:
            asked = "SELECT count(*) FROM sqlite_schema WHERE name = 'entry'"
            [[tables]] = connection.execute(asked)
            asked = "SELECT txn, seq, content FROM entry NOT INDEXED"
            rows = connection.execute(asked).fetchall() if tables else []
        except sqlite3.Error as error:
            errors.append(str(error))
    found = SqliteCheck(True, tuple(files), None, None, None, None, tuple(integrity), tuple(errors))
    return found if rows is None else _counted(found, rows)


def _counted(found: SqliteCheck, rows: list[tuple[object, object, object]]) -> SqliteCheck:
    wrong = 0
    counts: dict[int, int] = {}
    for transaction, row, text in rows:
        if not isinstance(transaction, int) or not isinstance(row, int):
            wrong += 1
            continue
        counts[transaction] = counts.get(transaction, 0) + 1
        if text != content(transaction, row).encode():
            wrong += 1
    highest = max(counts, default=0)
    complete = sum(count == ROWS for count in counts.values())
    return SqliteCheck(
        mounted=True,
        files=found.files,
        highest=highest,
        rows=len(rows),
        wrong=wrong,
        incomplete=highest - complete,
        integrity=found.integrity,
        errors=found.errors,
    )


def complaints(found: SqliteCheck, *, committed: int = 0, may_lose: int = 0) -> tuple[str, ...]:
    """Return what is wrong, in sentences; empty if the database is as it was promised to be.

    `committed` is the last transaction that was told as committed before the cut, 0 if none; the
    last `may_lose` of these may be gone, all of their rows or none. With a rollback journal,
    synchronous FULL promises all but the last one.
    """
    if not found.files and not found.errors:
        return (f"there is no /{DATABASE}",) if committed else ()
    said = [*found.errors, *(f"integrity: {line}" for line in found.integrity if line != "ok")]
    if found.wrong:
        said.append(f"{found.wrong} rows hold what was never written")
    if found.incomplete:
        said.append(f"{found.incomplete} transactions up to {found.highest} are not whole")
    if not said and not found.sound:
        said.append("the database does not add up")
    highest = found.highest or 0
    if highest < committed - may_lose:
        said.append(f"transaction {committed} was committed, the last one found is {highest}")
    return tuple(said)


def judge(image: Path, *, committed: int = 0, may_lose: int = 0) -> tuple[int, tuple[str, ...]]:
    """Return the exit code for an image, and what to say; `LabError` if it cannot be asked."""
    with tempfile.TemporaryDirectory(prefix="nbdproxy-sqlite-", dir=temporary_folder()) as folder:
        try:
            found = check_image(image, Path(folder))
        except ReplayError as error:
            return CANNOT_TELL, (str(error),)
    wrong = complaints(found, committed=committed, may_lose=may_lose)
    if wrong:
        return LOST, wrong
    return SOUND, (f"sound, {found.highest or 0} transactions",)


def transaction(text: str) -> int:
    """Read a transaction's number, or a mark `committed-N`; ValueError if it is neither.

    Nothing stands for 0: before the first mark, explore's `$mark` is empty.
    """
    number = int(text.removeprefix("committed-")) if text else 0
    if number < 0:
        raise ValueError(text)
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Check as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="nbdproxy.lab.sqlite_image", allow_abbrev=False)
    parser.add_argument("image", type=Path)
    parser.add_argument("--committed", type=transaction, default=0, metavar="N")
    parser.add_argument("--may-lose", type=transaction, default=0, metavar="K")
    asked = parser.parse_args(argv)
    try:
        code, said = judge(asked.image, committed=asked.committed, may_lose=asked.may_lose)
    except NbdproxyError as error:
        code, said = UNUSABLE, (str(error),)
    sys.stdout.writelines(f"{visible(line)}\n" for line in said)
    return code


def _run(argv: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        name = Path(argv[0]).name
        raise LabError(f"{name} did not end within {LIMIT_S} s; run it by hand") from None


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main())
