"""The file of verdicts: its schema, whose it is, and that a killed run can be gone on with."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, Judged, StateEvaluator, Unit
from nbdproxy.crash.explore.explore import Exploration, Tally
from nbdproxy.crash.explore.judging import Judge, Judgement
from nbdproxy.crash.explore.planning import ExploreOptions, make_plan
from nbdproxy.crash.explore.verdicts import CHECKED, SAME_CONTENT, SAME_READS, Row, Verdicts
from nbdproxy.crash.states.naming import StateId, parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.check import Verdict
from nbdproxy.persistence.model import Level, Options
from nbdproxy.requests import Command
from tests.laws.test_enumeration import make_timeline
from tests.support.persistence_reference import Completed, Received
from tests.support.serving import until

ABOUT = {"recording": "run1", "events": "7", "wish": "all"}
ROWS = [
    Row("s1.flushed.must", 0, 1, "ends", 1, Judgement(Verdict.PASS), CHECKED, None, 0.25),
    Row(
        "s1.flushed.all",
        1,
        1,
        "ends",
        2**64 - 1,
        Judgement(Verdict.FAIL, "two are gone", {"whole": 3, "missing": 2}),
        CHECKED,
        None,
        1.5,
    ),
    Row(
        *("s2.flushed.must", 2, 2, "ends", 1, Judgement(Verdict.PASS, looked=False)),
        *(SAME_CONTENT, "s1.flushed.must", 0.0),
    ),
    Row(
        *("s2.flushed.only1", 3, 2, "requests", 7, Judgement(Verdict.UNKNOWN, "exit code 3")),
        *(SAME_READS, "s1.flushed.all", 0.125),
    ),
]


def test_the_schema_is_what_sqlite_sees(tmp_path: Path) -> None:
    path = tmp_path / "run1.db"
    verdicts = Verdicts(path, ABOUT, resume=False)
    verdicts.add(ROWS)
    # Before it is closed: the file is written as results come.
    db = sqlite3.connect(path)
    columns = db.execute("SELECT name, type, pk FROM pragma_table_info('state')").fetchall()
    assert columns == [
        *[("id", "TEXT", 1), ("number", "INTEGER", 0), ("position", "INTEGER", 0)],
        *[("stage", "TEXT", 0), ("content", "TEXT", 0), ("verdict", "TEXT", 0)],
        *[("how", "TEXT", 0), ("same_as", "TEXT", 0), ("reason", "TEXT", 0)],
        *[("counts", "TEXT", 0), ("looked", "INTEGER", 0), ("seconds", "REAL", 0)],
    ]
    assert dict(db.execute("SELECT key, value FROM about")) == {"version": "2", **ABOUT}
    found = db.execute("SELECT * FROM state ORDER BY number").fetchall()
    one, two = "0000000000000001", "ffffffffffffffff"
    assert [(*row[:9], json.loads(row[9]), *row[10:]) for row in found] == [
        ("s1.flushed.must", 0, 1, "ends", one, "pass", "checked", None, None, {}, 1, 0.25),
        (
            *("s1.flushed.all", 1, 1, "ends", two, "fail", "checked", None, "two are gone"),
            *({"whole": 3, "missing": 2}, 1, 1.5),
        ),
        (
            *("s2.flushed.must", 2, 2, "ends", one, "pass", "same-content", "s1.flushed.must"),
            *(None, {}, 0, 0.0),
        ),
        (
            *("s2.flushed.only1", 3, 2, "requests", "0000000000000007", "unknown"),
            *("same-reads", "s1.flushed.all", "exit code 3", {}, 1, 0.125),
        ),
    ]
    db.close()
    verdicts.close()


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_come_back_as_they_went(tmp_path: Path, in_memory: bool) -> None:
    path = None if in_memory else tmp_path / "run1.db"
    verdicts = Verdicts(path, ABOUT, resume=False)
    verdicts.add(ROWS[2:])
    verdicts.add(ROWS[:2])
    if path is not None:
        verdicts.close()
        verdicts = Verdicts(path, ABOUT, resume=True)
    assert list(verdicts.rows()) == ROWS
    assert list(verdicts.rows(limit=3)) == ROWS[:3]
    assert list(verdicts.rows(verdict=Verdict.PASS)) == [ROWS[0], ROWS[2]]
    assert list(verdicts.rows(verdict=Verdict.PASS, limit=1)) == ROWS[:1]
    assert verdicts.count("verdict") == {"pass": 2, "fail": 1, "unknown": 1}
    assert verdicts.count("how") == {CHECKED: 2, SAME_CONTENT: 1, SAME_READS: 1}
    assert verdicts.count("stage") == {"ends": 3, "requests": 1}
    verdicts.close()


def test_it_tells_whether_anything_was_looked_at() -> None:
    """By what passed or failed; before that nothing speaks against it."""
    verdicts = Verdicts(None, ABOUT, resume=False)
    assert verdicts.looked()
    verdicts.add([ROWS[2], ROWS[3]])
    assert not verdicts.looked()
    verdicts.add([ROWS[1]])
    assert verdicts.looked()


def test_it_counts_the_different_disks_of_each_cut_that_the_model_allows() -> None:
    verdicts = Verdicts(None, ABOUT, resume=False)
    torn = ROWS[3]._replace(state="s2.flushed.all~0=1_base", stage="torn", content=8)
    again = ROWS[3]._replace(state="s2.flushed.only2", number=9)
    verdicts.add([*ROWS, torn, again])
    assert verdicts.contents() == {1: 2, 2: 2}


def test_rows_are_entered_all_or_none() -> None:
    verdicts = Verdicts(None, ABOUT, resume=False)
    broken = ROWS[1]._replace(number=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be written"):
        verdicts.add([ROWS[0], broken])
    assert list(verdicts.rows()) == []
    verdicts.add(ROWS)
    assert list(verdicts.rows()) == ROWS


def test_a_recording_may_have_been_moved(tmp_path: Path) -> None:
    path = tmp_path / "run1.db"
    Verdicts(path, ABOUT, resume=False).close()
    Verdicts(path, {**ABOUT, "recording": "elsewhere"}, resume=True).close()


@pytest.mark.parametrize("key", [key for key in ABOUT if key != "recording"])
def test_another_exploration_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "run1.db"
    Verdicts(path, ABOUT, resume=False).close()
    with pytest.raises(UsageError, match=f"of another exploration: its {key} is .*name another"):
        Verdicts(path, {**ABOUT, key: "other"}, resume=True)
    with pytest.raises(UsageError, match="exists; add --resume"):
        Verdicts(path, ABOUT, resume=False)
    Verdicts(path, ABOUT, resume=True).close()


def test_what_is_no_file_of_verdicts_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, other, newer = (tmp_path / name for name in ("text", "other.db", "newer.db"))
    text.write_text("no database, but text that is long enough to look at " * 30)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE users (name TEXT)")
    db.close()
    Verdicts(newer, ABOUT, resume=False).close()
    with sqlite3.connect(newer) as db:
        db.execute("UPDATE about SET value = '9' WHERE key = 'version'")
    db.close()
    for path in (text, other, newer):
        before = path.read_bytes() if path is text else b""
        with pytest.raises(UsageError, match="name another --db"):
            Verdicts(path, ABOUT, resume=True)
        assert path is not text or path.read_bytes() == before
    with pytest.raises(UsageError, match="no folder"):
        Verdicts(tmp_path / "nowhere" / "x.db", ABOUT, resume=False)
    with pytest.raises(UsageError, match="name another --db"):
        Verdicts(tmp_path, ABOUT, resume=True)


def test_resume_without_a_file_begins(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "new.db", ABOUT, resume=True)
    assert list(verdicts.rows()) == []
    verdicts.close()


@dataclass
class SlowPlan:
    """Reads the first two of four sectors; what it says hangs on them, and on the cut's parity."""

    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)

    def open(self, timeline: Timeline) -> Judge:
        """Return the judge, for the states of a timeline."""
        return _Slow(self, timeline)

    def context(self, timeline: Timeline, state: StateId) -> str:  # noqa: ARG002
        """Return the cut's parity."""
        return str(state.position % 2)

    def say(self, timeline: Timeline, state: StateId) -> Judgement:
        """Judge a state."""
        seen = xxh3_64_intdigest(timeline.open(state).pread(0, 1024), state.position % 2)
        verdict = [Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN][seen % 3]
        return Judgement(verdict, f"{seen:x}", {"whole": seen % 5})


class _Slow:
    def __init__(self, plan: SlowPlan, timeline: Timeline) -> None:
        self._plan, self._timeline = plan, timeline

    def judge(
        self,
        state: StateId,
        changed: Iterable[Extent] | None,  # noqa: ARG002
    ) -> tuple[Judgement, ExtentSet | None]:
        time.sleep(self._plan.seconds)
        self._plan.calls.append(str(state))
        reads = ExtentSet()
        reads.add(0, 1024)
        return self._plan.say(self._timeline, state), reads

    def beside(self) -> Judge:
        return _Slow(self._plan, self._timeline)

    def close(self) -> None:
        pass


class Shuffled:
    """A runner that holds some units back and gives them out of order."""

    def __init__(self, evaluator: StateEvaluator, held: int) -> None:
        self._evaluator, self._held = evaluator, held

    def run(self, units: Iterable[Unit]) -> Iterator[list[Judged]]:
        """Yield what became of the states of each unit."""
        waiting: list[Unit] = []
        for unit in units:
            waiting.append(unit)
            if len(waiting) > self._held:
                yield self._evaluator.judge(waiting.pop(len(waiting) // 3))
        for unit in reversed(waiting):
            yield self._evaluator.judge(unit)

    def close(self) -> None:
        """Close the recording."""
        self._evaluator.close()


STATES = 73
"""All that the model has of the made-up log at its cuts: each is visited once a cut."""


def made_up_log() -> list[Received | Completed]:
    """Writes over four sectors, answered at once, a flush after every fifth."""
    log: list[Received | Completed] = []
    for at in range(14):
        log += [Received(Command.WRITE, at % 4, 1), Completed(len(log))]
        log += [Received(Command.FLUSH), Completed(len(log))] if at % 5 == 4 else []
    return log


def explore(
    path: Path | None,
    *,
    seconds: float = 0.0,
    held: int = 0,
    resume: bool = False,
    cuts: Sequence[int] = range(0, 33, 3),
    states: int = 250,
) -> tuple[list[Row], Tally, list[str]]:
    """Explore a made-up recording; return the rows, the tally and what was judged."""
    log = made_up_log()
    timeline = make_timeline(log, [*range(len(log)), *[0] * 8])
    plan = SlowPlan(seconds)
    fields = CrashSpaceBuilder(timeline, Level.FLUSHED, Options())
    visits = make_plan(fields, cuts, ExploreOptions(states), cuts_possible=len(log) + 1)
    verdicts = Verdicts(path, ABOUT, resume=resume)
    evaluator = StateEvaluator(
        timeline.source, EvaluatorSetup(Path("made-up"), None, Level.FLUSHED, Options(), plan)
    )
    tally = Exploration(fields, visits, plan, verdicts).run(Shuffled(evaluator, held))
    rows = list(verdicts.rows())
    verdicts.close()
    for row in rows:
        assert row.judgement == plan.say(timeline, parse_state_id(row.state)), row
    return rows, tally, plan.calls


def what(rows: Iterable[Row]) -> list[tuple[object, ...]]:
    """All of the rows that must not hang on who judged when."""
    return [(*row[:5], row.judgement) for row in rows]


def test_an_exploration_is_the_same_in_whatever_order_results_come() -> None:
    rows, tally, calls = explore(None)
    assert [row.number for row in rows] == list(range(STATES))
    assert tally.visited == sum(tally.verdicts.values()) == sum(tally.how.values()) == STATES
    assert tally.how[CHECKED] == len(calls) == len(set(calls)) < 60
    assert min(tally.how.values()) > 5
    by_id = {row.state: row for row in rows}
    contents: dict[tuple[int, int], str] = {}
    for row in rows:
        assert (row.same_as is None) == (row.how == CHECKED)
        first = contents.setdefault((row.content, row.position % 2), row.state)
        assert (row.how == SAME_CONTENT) == (first != row.state)
        if row.how == SAME_CONTENT:
            assert row.same_as == first
        elif row.same_as is not None:
            assert by_id[row.same_as].how == CHECKED
    for held in (3, 100):
        assert what(explore(None, held=held)[0]) == what(rows)


def test_what_needs_no_check_at_the_very_end_is_entered_too() -> None:
    """Between 9 and 11 nothing changes but a reply, so all of 11 was seen at 9."""
    rows, tally, _ = explore(None, cuts=[9, 11], states=60)
    assert len(rows) == tally.visited == 32
    assert {row.how for row in rows if row.position == 11} == {SAME_CONTENT}


def rows_in(path: Path) -> int:
    if not path.exists():
        return 0
    db = sqlite3.connect(path)
    try:
        [(count,)] = db.execute("SELECT count(*) FROM state")
    except sqlite3.OperationalError:
        return 0
    else:
        return int(count)
    finally:
        db.close()


def test_one_that_is_done_goes_on_with_more_states(tmp_path: Path) -> None:
    path = tmp_path / "run1.db"
    some, _, calls = explore(path, states=30)
    assert 20 < len(some) <= 30
    rows, tally, more = explore(path, resume=True)
    assert tally.visited == STATES
    whole = explore(None)[0]
    assert {row.state: row.judgement for row in rows} == {row.state: row.judgement for row in whole}
    told = {row.state for row in some if row.judgement.verdict is not Verdict.UNKNOWN}
    assert calls
    assert more
    assert not set(more) & told


@pytest.mark.parametrize("enough", [1, 40])
def test_a_killed_run_goes_on_and_ends_as_it_would_have(tmp_path: Path, enough: int) -> None:
    path = tmp_path / "run1.db"
    code = (
        "from pathlib import Path; from tests.crash.test_verdicts import explore;"
        f"explore(Path({str(path)!r}), seconds=0.05)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment)
    try:
        until(lambda: process.poll() is not None or rows_in(path) >= enough, "rows are there")
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
        process.wait(30)
    done = rows_in(path)
    assert enough <= done < STATES
    rows, tally, calls = explore(path, resume=True)
    whole, _, all_calls = explore(None)
    assert what(rows) == what(whole)
    assert tally.visited == STATES
    assert len(calls) < len(all_calls), "what was judged before is not judged again"
    again, tally, calls = explore(path, resume=True)
    assert (what(again), tally.visited) == (what(whole), STATES)
    # What could not be told gets another chance, and nothing else does.
    unknown = {row.state for row in whole if row.judgement.verdict is Verdict.UNKNOWN}
    assert calls
    assert set(calls) <= unknown
