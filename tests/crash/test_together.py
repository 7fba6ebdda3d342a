"""What one table of several recordings says of them."""

from __future__ import annotations

from dataclasses import replace

from nbdproxy.crash.blame.replay import Cell, Replay, StateOutcome
from nbdproxy.crash.blame.together import Together, _merged
from nbdproxy.crash.states.cuts import Cut
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CACHED, CacheMode, Failure
from nbdproxy.report.table import footnotes

NAMES = ("disk 1 (system.img)", "disk 2 (home.img)")
FILES = Manifest((Entry("/a", "0" * 64, 1),))


def one(
    note: str = "", *, under: frozenset[CacheMode] = CACHED, matters: bool = True, **more: str
) -> Replay:
    """The table of one recording, with one cell."""
    cut = Cut("before-exit", 9, note, matters)
    state = StateId(9, Level.FLUSHED, Choice.MUST)
    end = StateOutcome(state, Verdict.UNKNOWN, more.pop("reason", None), {})
    cell = Cell(CacheMode.NONE, Failure.HOST_POWER_LOSS, cut, Verdict.UNKNOWN, end, end)
    left_out = tuple(mode for mode in CacheMode if mode not in under) if "why" in more else ()
    return Replay(FILES, Tree(), cut, under, left_out, (cell,), **more)  # type: ignore[arg-type]


def notes(*each: Replay) -> list[str]:
    return footnotes(Together(_merged(each, FILES, NAMES[: len(each)]), each))


def test_what_is_said_of_each_recording_names_it() -> None:
    said = notes(
        one("SHUTDOWN", remark="taken for none", reason="no journal", why="no FUA"),
        one("nothing was set aside", remark="above qcow2", reason="the disk reads all zeroes"),
    )
    first, second = NAMES
    assert f"before-exit: {first}: SHUTDOWN; {second}: nothing was set aside" in said
    assert f"{first}: taken for none; {second}: above qcow2" in said
    assert any(f"{first}: no journal; {second}: the disk reads all zeroes" in one for one in said)
    assert any(f"; {first}: no FUA" in one for one in said)


def test_what_is_the_same_of_all_is_said_once_and_what_is_one_s_own_of_it() -> None:
    assert "before-exit: SHUTDOWN" in notes(one("SHUTDOWN"), one("SHUTDOWN"))
    assert "before-exit: SHUTDOWN" in notes(one("SHUTDOWN"))
    said = notes(one("nothing", matters=False), one("2 flushes"))
    assert f"before-exit: {NAMES[1]}: 2 flushes" in said


def test_they_were_recorded_under_what_all_can_have_been() -> None:
    every = frozenset(CacheMode)
    for pair in ((one(under=every), one()), (one(), one(under=every))):
        assert _merged(pair, FILES, NAMES).recorded_under == CACHED


def test_the_users_word_is_asked_for_where_it_decides_of_any() -> None:
    unsure = replace(one(under=frozenset(CacheMode), why="FUA"), left_out=(CacheMode.NONE,))
    for pair in ((unsure, one()), (one(), unsure)):
        assert any("--recorded-as says it" in note for note in notes(*pair))
    assert not any("--recorded-as" in note for note in notes(one(), one(why="it is qcow2")))
