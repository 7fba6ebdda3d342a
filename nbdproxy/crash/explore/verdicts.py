"""`Verdicts`: what an exploration found out, in an SQLite file. The schema, version 2:

    about    key TEXT PRIMARY KEY, value TEXT
             what was explored: `version`, `recording` (its path then), `identity` (a digest of
             how it began), `base` (the image that was named, by size and time), `events`, `mode`,
             `failure`, `level`, `at` (the cut or the cuts), the model's `sector`, `coverage`,
             `fsyncgate` and `losses`, `judge` (what was checked), and what was asked for: `seed`,
             `torn`, `stale`, `exhaustive`
    state    one row a state that was visited, in the order in which they were
        id        TEXT PRIMARY KEY; with the recording all that is needed to rebuild the state
        number    INTEGER, counted from 0
        position  INTEGER, the cut
        stage     TEXT, why it was visited (see `nbdproxy.crash.explore.stages`)
        content   TEXT, 16 hex digits: the hash of the disk; equal ones are equal disks
        verdict   TEXT, pass, fail or unknown
        how       TEXT: `checked`; `same-content` as the state `same_as`; or `same-reads`: it
                  differs from `same_as` only where the judge did not look
        same_as   TEXT, the id of the state whose verdict it took; NULL if it was checked
        reason    TEXT, what the judge said, or NULL
        counts    TEXT, JSON: how many files are in which condition
        looked    INTEGER, 1 if the judge read anything of the disk, else 0
        seconds   REAL, what the check took

The file is written as results come; a run that was ended goes on where it was.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nbdproxy.crash.explore.judging import Judgement
from nbdproxy.crash.explore.stages import BEYOND
from nbdproxy.errors import UsageError
from nbdproxy.oracles.check import Verdict
from nbdproxy.private import check_folder

VERSION = "2"
"""Of the schema, and of what a verdict means: raised as well where states are judged by other
rules, as a file of before has verdicts that would be others now."""

_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE state (
    id TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    position INTEGER NOT NULL,
    stage TEXT NOT NULL,
    content TEXT NOT NULL,
    verdict TEXT NOT NULL,
    how TEXT NOT NULL,
    same_as TEXT,
    reason TEXT,
    counts TEXT,
    looked INTEGER NOT NULL,
    seconds REAL NOT NULL
);
CREATE INDEX state_verdict ON state (verdict, number);
"""
CHECKED, SAME_CONTENT, SAME_READS = "checked", "same-content", "same-reads"

About = Mapping[str, str | int | None]
"""What is explored, in words; see the module."""


class Row(NamedTuple):
    """A state and what became of it; see the module."""

    state: str
    number: int
    position: int
    stage: str
    content: int
    judgement: Judgement
    how: str
    same_as: str | None
    seconds: float


class Verdicts:
    """An SQLite file of verdicts, or one in memory if `path` is None; closes with `close`.

    Raises UsageError if the file is of something else: all of `about` has to be the same but where
    the recording is.
    """

    def __init__(self, path: Path | None, about: About, *, resume: bool) -> None:
        self._path = path
        if path is not None and path.exists() and not resume:
            raise UsageError(f"{path} exists; add --resume to go on with it, or name a new file")
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}; make it, or name another --db")
        if path is not None:
            _make_ready(path)
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
            # A database may come from elsewhere, with a recording.
            self._db.execute("PRAGMA trusted_schema = OFF")
            # Nothing is lost by a kill; only the host's own end may take the last rows.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                self._db.executescript(_SCHEMA)
                rows = [("version", VERSION), *_texts(about).items()]
                self._db.executemany("INSERT INTO about VALUES (?, ?)", rows)
            else:
                self._check(about)
        except sqlite3.Error as error:
            raise UsageError(
                f"{path} cannot be used for verdicts ({error}); name another --db"
            ) from None

    def _check(self, about: About) -> None:
        found = dict(self._db.execute("SELECT key, value FROM about"))
        if found.pop("version", None) != VERSION:
            raise UsageError(
                f"{self._path} was made by another version of nbdproxy, which judged by other "
                f"rules; name another --db"
            )
        for key, value in _texts(about).items():
            if key != "recording" and found.get(key) != value:
                raise UsageError(
                    f"{self._path} is of another exploration: its {key} is {found.get(key)}, "
                    f"and {value} was asked for; ask for the same, or name another --db"
                )

    def add(self, rows: Iterable[Row]) -> None:
        """Enter rows, all or none."""
        values = [
            (
                row.state,
                row.number,
                row.position,
                row.stage,
                f"{row.content:016x}",
                row.judgement.verdict.value,
                row.how,
                row.same_as,
                row.judgement.reason,
                json.dumps(dict(row.judgement.counts)),
                row.judgement.looked,
                row.seconds,
            )
            for row in rows
        ]
        try:
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany(
                    "INSERT OR REPLACE INTO state VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", values
                )
        except sqlite3.Error as error:
            raise UsageError(
                f"{self._path} cannot be written ({error}); make room, and go on with --resume"
            ) from None

    def telling(self, limit: int) -> Iterator[Row]:
        """Yield failing states, first those of cuts where the state with all that was sent passes.

        There what was lost on the way decides; elsewhere it had never been sent.
        """
        passing = [(cut,) for cut, verdict in self.fullest().items() if verdict is Verdict.PASS]
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS passing (position INTEGER PRIMARY KEY)")
        self._db.execute("DELETE FROM passing")
        self._db.executemany("INSERT INTO passing VALUES (?)", passing)
        yield from self._select(
            "WHERE verdict = 'fail' ORDER BY position NOT IN passing, number LIMIT ?", limit
        )

    def fullest(self) -> dict[int, Verdict]:
        """Return what became of the state with all that had been sent, for each cut it was at."""
        found = self._db.execute(
            "SELECT position, verdict FROM state WHERE id GLOB 's*.*.all' OR id GLOB 's*.*.all+*'"
        )
        return {position: Verdict(verdict) for position, verdict in found}

    def rows(self, *, verdict: Verdict | None = None, limit: int = -1) -> Iterator[Row]:
        """Yield rows in the order visited."""
        if verdict is None:
            yield from self._select("ORDER BY number LIMIT ?", limit)
        else:
            where = "WHERE verdict = ? ORDER BY number LIMIT ?"
            yield from self._select(where, verdict.value, limit)

    def _select(self, rest: str, *values: object) -> Iterator[Row]:
        found = self._db.execute(f"SELECT * FROM state {rest}", values)
        for *where, content, word, how, same_as, reason, text, looked, seconds in found:
            judgement = Judgement(Verdict(word), reason, json.loads(text), bool(looked))
            state, number, position, stage = where
            place = (state, number, position, stage, int(content, 16))
            yield Row(*place, judgement, how, same_as, seconds)

    def count(self, column: str) -> dict[str, int]:
        """Return how many states there are for each value of a column, such as `verdict`."""
        assert column in {"verdict", "how", "stage"}
        found = self._db.execute(f"SELECT {column}, count(*) FROM state GROUP BY {column}")
        return dict(found.fetchall())

    def looked(self) -> bool:
        """Tell whether anything was read of any state that passed or failed."""
        (found,) = self._db.execute(
            "SELECT ifnull(max(looked), 1) FROM state WHERE verdict != 'unknown'"
        ).fetchone()
        return bool(found)

    def contents(self) -> dict[int, int]:
        """Return for each cut how many different disks the visited states of the model are."""
        beyond = [stage.value for stage in BEYOND]
        marks = ", ".join("?" * len(beyond))
        found = self._db.execute(
            f"SELECT position, count(DISTINCT content) FROM state WHERE stage NOT IN ({marks}) "
            f"GROUP BY position",
            beyond,
        )
        return dict(found.fetchall())

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _make_ready(path: Path) -> None:
    """Make the file for its owner alone; no other user may be able to add its log beside it."""
    try:
        check_folder(path.parent, sticky=False)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be used for verdicts ({error.strerror}); name another --db"
        ) from None


def _texts(about: About) -> dict[str, str]:
    return {key: "" if value is None else str(value) for key, value in about.items()}
