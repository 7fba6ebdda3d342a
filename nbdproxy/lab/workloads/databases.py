"""SQLite on the target disk: scripts that commit and that check, and readers of what they print.

The first commits transactions and prints `committed N` behind each; after a crash the second opens
the database, by which SQLite rolls a hot journal back or recovers the WAL, and tells what it finds.

Guarantees: `committed N` is printed when COMMIT has returned without an error and before the next
transaction begins, so what was printed was promised. Every row's content follows from its numbers.
What SQLite and the kernel complain of is output, not a failed workload.

Does not cover several writers, and what becomes of a database that is damaged and still in use.
Source of what is promised when: sqlite.org/pragma.html#pragma_synchronous.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from nbdproxy.errors import LabError
from nbdproxy.lab.workloads.kernel_log import HUSH, TELL

SYNCHRONOUS = ("off", "normal", "full", "extra")
JOURNALS = ("delete", "truncate", "persist", "memory", "wal", "off")

DATABASE = "db/test.db"
"""The database, from the top of the target disk."""

ROWS = 3
"""How many rows a transaction inserts: 0.3 to 2.8 kB each, 4 to 5 kB together on average."""

_CONTENT = (
    "replace(hex(zeroblob(4 + (txn * 7 + seq * 13) % 40)), '00', hex(sha3(txn || ' ' || seq)))"
)
_CHECKPOINT_PAGES = 100  # a tenth of SQLite's own, so that a short run has checkpoints

# Its output is the console, a terminal, to which C's stdio writes line by line.
_SQLITE = f"/tools/bin/sqlite3 -batch DO {DATABASE} < /tmp/sql 2> /tmp/errors"

# 1 stands for an error of SQL or of SQLite; anything else is the lab's own fault.
_END = rf"""
status=$?; sed 's/^/sqlite error /' /tmp/errors; echo "sqlite ended $status"
{TELL}
[ $status -le 1 ]
"""

# Whoever loses power does not close its database: closing would make a checkpoint of the WAL.
_COMMIT = rf"""{HUSH}
mkdir db || exit
cat > /tmp/sql << END
.dbconfig no_ckpt_on_close on
PRAGMA journal_mode = $journal;
PRAGMA synchronous = $synchronous;
PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES};
CREATE TABLE entry (txn INTEGER, seq INTEGER, content TEXT NOT NULL, PRIMARY KEY (txn, seq));
.shell sync
.print sqlite ready
END
row="SELECT & AS txn, value AS seq FROM generate_series(1, {ROWS})"
rows="SELECT txn, seq, {_CONTENT} FROM ($row)"
seq $transactions |
  sed "s/.*/BEGIN; INSERT INTO entry $rows; COMMIT; SELECT 'committed ' || &;/" >> /tmp/sql
{_SQLITE.replace("DO", "-bail")}
{_END}"""

# Each statement stands alone: what one cannot read does not keep the others from being tried.
_CHECK = rf"""{HUSH}
if ! grep -q ' /mnt ' /proc/mounts; then echo sqlite mounted no; {TELL}; exit 0; fi
echo sqlite mounted yes
if ! [ -f {DATABASE} ]; then echo sqlite found no; {TELL}; exit 0; fi
echo sqlite found $(ls db)
cat > /tmp/sql << 'END'
SELECT 'sqlite highest ' || coalesce(max(txn), 0) FROM entry NOT INDEXED;
SELECT 'sqlite rows ' || count(*) FROM entry NOT INDEXED;
SELECT 'sqlite wrong ' || count(*) FROM entry NOT INDEXED WHERE content IS NOT {_CONTENT};
SELECT 'sqlite incomplete ' || ((SELECT coalesce(max(txn), 0) FROM entry NOT INDEXED) - count(*))
  FROM (SELECT txn FROM entry NOT INDEXED GROUP BY txn HAVING count(*) = {ROWS});
SELECT 'sqlite integrity ' || replace(integrity_check, char(10), ' ')
  FROM pragma_integrity_check LIMIT 20;
END
{_SQLITE.replace("DO", "")}
{_END}"""

_COMMITTED = re.compile(r"^committed (\d+)", re.MULTILINE)
_SAID = re.compile(r"^sqlite (\w+) (.*?)\r?$", re.MULTILINE)


def commit_script(*, synchronous: str, journal: str, transactions: int) -> str:
    """Return the shell script that makes the database, syncs it, and commits to it.

    The settings are those of the pragmas `synchronous` and `journal_mode`.
    """
    for value, known, what in (
        (synchronous, SYNCHRONOUS, "synchronous"),
        (journal, JOURNALS, "journal"),
    ):
        if value not in known:
            raise LabError(f"SQLite has no {what} {value!r}; choose from {', '.join(known)}")
    settings = f"synchronous={synchronous} journal={journal} transactions={transactions}"
    return f"{settings}\n{_COMMIT}"


def check_script() -> str:
    """Return the shell script that opens the database and tells what it finds.

    It prints, line by line, and leaves out what cannot be read:

        sqlite mounted yes|no          whether the disk could be mounted; if not, that is all
        sqlite found FILES|no          the files in /db before SQLite came; `no` if no database
        sqlite highest N               the highest transaction, 0 if none
        sqlite rows N
        sqlite wrong N                 the rows whose content is not what it has to be
        sqlite incomplete N            transactions below the highest with missing or other rows
        sqlite integrity ok|COMPLAINT  as `PRAGMA integrity_check` says it, up to 20 lines
        sqlite error TEXT              SQLite's own errors
        sqlite ended STATUS            0, or 1 if there was an error
        kernel: TEXT                   the kernel's errors
    """
    return _CHECK


def content(transaction: int, row: int) -> str:
    """Return what a row has to hold; both count from 1."""
    digest = hashlib.sha3_256(f"{transaction} {row}".encode()).hexdigest().upper()
    return digest * (4 + (transaction * 7 + row * 13) % 40)


def committed(serial: str) -> int:
    """Return the last transaction that a guest told as committed, 0 if none.

    Takes all that a guest printed, or one line of it.
    """
    return max(map(int, _COMMITTED.findall(serial)), default=0)


def sqlite_errors(serial: str) -> tuple[str, ...]:
    """Return what SQLite complained of, in either workload."""
    return tuple(text for word, text in _SAID.findall(serial) if word == "error")


@dataclass(frozen=True, slots=True)
class SqliteCheck:
    """What `check_script` printed; a number is None where it could not be read.

    `files` are those in /db before SQLite came: a `test.db-journal` among them may have been rolled
    back, a `test.db-wal` recovered. They are empty if there was no database.
    """

    mounted: bool
    files: tuple[str, ...]
    highest: int | None
    rows: int | None
    wrong: int | None
    incomplete: int | None
    integrity: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing at all is wrong with what is there; it may still be too little."""
        return (
            self.integrity == ("ok",)
            and (self.wrong, self.incomplete, self.errors) == (0, 0, ())
            and self.highest is not None
            and self.rows == self.highest * ROWS
        )


def checked(serial: str) -> SqliteCheck:
    """Read what a guest printed that ran `check_script`."""
    said: dict[str, list[str]] = {}
    for word, text in _SAID.findall(serial):
        said.setdefault(word, []).append(text)

    def number(word: str) -> int | None:
        return int(said[word][-1]) if word in said else None

    found = said.get("found", ["no"])[0]
    return SqliteCheck(
        mounted=said.get("mounted") == ["yes"],
        files=() if found == "no" else tuple(found.split()),
        highest=number("highest"),
        rows=number("rows"),
        wrong=number("wrong"),
        incomplete=number("incomplete"),
        integrity=tuple(said.get("integrity", ())),
        errors=tuple(said.get("error", ())),
    )
