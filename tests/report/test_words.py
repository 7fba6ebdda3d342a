"""The two sentences: whose fault, and which mode would have saved how many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.replay import Cell, FileOutcome, Replay, StateOutcome
from nbdproxy.crash.blame.together import Together
from nbdproxy.crash.states.cuts import Cut
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.report.table import footnotes, lost_files
from nbdproxy.report.words import sentences

WHOLE = FileOutcome(Condition.WHOLE, None)
EMPTY = FileOutcome(Condition.EMPTY, Cause.NEVER_SENT)
ZEROED = FileOutcome(Condition.ZEROED, Cause.UNFLUSHED)
MISSING = FileOutcome(Condition.MISSING, Cause.NEVER_SENT)
GONE = FileOutcome(Condition.MISSING, Cause.CHANGED_BY_GUEST)


def outcome(*files: FileOutcome) -> StateOutcome:
    state = StateId(9, Level.FLUSHED, Choice.MUST)
    return StateOutcome(state, Verdict.FAIL, None, {f"/f{i}": one for i, one in enumerate(files)})


def table(
    cells: dict[CacheMode, tuple[StateOutcome, StateOutcome]],
    failure: Failure = Failure.HOST_POWER_LOSS,
) -> Replay:
    cut = Cut("end", 9)
    made = [Cell(m, failure, cut, Verdict.FAIL, worst, best) for m, (worst, best) in cells.items()]
    manifest = Manifest(tuple(Entry(f"/f{i}", "0" * 64, 1) for i in range(3)))
    return Replay(manifest, Tree(), cut, frozenset(CacheMode), (), tuple(made))


def test_the_main_cause_is_told_first_and_each_mode_with_what_it_saves() -> None:
    worst, best = outcome(ZEROED, ZEROED, EMPTY), outcome(WHOLE, WHOLE, EMPTY)
    fault, saved = sentences(
        table({CacheMode.NONE: (worst, best), CacheMode.WRITETHROUGH: (best, best)})
    )
    assert fault.startswith("Whose fault: 2 of 3 files had been written and not flushed")
    assert "; 1 more was lost in the guest" in fault
    assert saved.endswith("of 3 files: writethrough 2; none 0 (at best 2).")


def test_nobody_is_blamed_where_all_is_whole() -> None:
    whole = outcome(WHOLE, WHOLE, WHOLE)
    told = sentences(table({CacheMode.NONE: (whole, whole)}))[0]
    assert told.startswith("After a host power loss under cache=none nobody lost anything: all 3")


def test_what_the_guest_may_have_discarded_is_not_certainly_saved() -> None:
    """A TRIM that no flush followed: with it a file is lost, and without it whole."""
    kept, discarded = outcome(WHOLE, WHOLE, WHOLE), outcome(WHOLE, GONE, WHOLE)
    other = outcome(WHOLE, GONE, EMPTY), outcome(EMPTY, WHOLE, WHOLE)
    cells = {CacheMode.NONE: (kept, discarded), CacheMode.WRITEBACK: other}
    fault, saved = sentences(table(cells))
    assert "nobody lost anything" not in fault
    assert "all 3 files are whole as flushed; with what was sent later, 1 of them was" in fault
    assert "changed or removed by the guest itself" in fault
    assert saved.endswith("of 3 files: none 2 (at best 3); writeback 0 (at best 2).")
    unjudged = sentences(table({CacheMode.NONE: (kept, outcome())}))
    assert "with what was sent later, that cannot be told" in unjudged[0]
    assert "cannot be told" in unjudged[1]


def test_the_guest_is_not_blamed_for_files_that_never_were_on_the_disk() -> None:
    nothing = outcome(MISSING, MISSING, MISSING)
    (only,) = sentences(table({CacheMode.NONE: (nothing, nothing)}))
    assert "none of the files was ever seen on this disk" in only


def test_files_that_the_guest_removed_were_seen() -> None:
    removed = outcome(GONE, GONE, GONE)
    fault, _ = sentences(table({CacheMode.NONE: (removed, removed)}))
    assert "3 of 3 files were changed or removed by the guest itself" in fault


@pytest.mark.parametrize("other", [Condition.DAMAGED, Condition.STALE])
def test_nobody_is_blamed_where_every_file_is_another_than_the_manifests(other: Condition) -> None:
    """As with a manifest of another version, or of digests that are another algorithm's."""
    wrong = outcome(FileOutcome(other, Cause.NEVER_SENT), MISSING, MISSING)
    (only,) = sentences(table({CacheMode.NONE: (wrong, wrong)}))
    assert "that cannot be told" in only
    assert "lost in the guest" not in only


def test_a_mode_that_could_not_be_judged_saves_no_number() -> None:
    some, unknown = outcome(ZEROED, WHOLE, WHOLE), outcome()
    told = sentences(table({CacheMode.NONE: (some, some), CacheMode.UNSAFE: (unknown, unknown)}))
    assert told[1].endswith("of 3 files: none 2; of unsafe it cannot be told.")
    told = sentences(table({CacheMode.NONE: (unknown, unknown)}))
    assert "0" not in told[1]
    assert "cannot be told" in told[1]


def test_one_file_is_spoken_of_as_one() -> None:
    fault, saved = sentences(table({CacheMode.NONE: (outcome(EMPTY), outcome(EMPTY))}))
    assert "1 of 1 file was lost in the guest, which had not sent it to any disk" in fault
    assert saved.endswith("of 1 file: none 0.")
    one = outcome(WHOLE)
    assert (
        "nobody lost anything: the file is whole"
        in sentences(table({CacheMode.NONE: (one, one)}))[0]
    )


def test_without_host_power_loss_there_is_nothing_to_say() -> None:
    some = outcome(EMPTY, WHOLE, WHOLE)
    assert sentences(table({CacheMode.NONE: (some, some)}, Failure.QEMU_KILL)) == []


def test_lost_files_are_listed_by_cell() -> None:
    some = outcome(EMPTY, WHOLE, ZEROED)
    assert list(lost_files(table({CacheMode.NONE: (some, some)}))) == [
        ("none", "host-power-loss", "empty", "never-sent", "/f0"),
        ("none", "host-power-loss", "zeroed", "unflushed", "/f2"),
    ]


@pytest.mark.parametrize(
    ("mode", "failure", "matters", "is_said"),
    [
        (CacheMode.NONE, Failure.HOST_POWER_LOSS, True, True),
        (CacheMode.UNSAFE, Failure.STORAGE_LOSS, True, True),
        (CacheMode.NONE, Failure.HOST_POWER_LOSS, False, False),
        (CacheMode.NONE, Failure.QEMU_KILL, True, False),
        (CacheMode.DIRECTSYNC, Failure.HOST_POWER_LOSS, True, False),
    ],
)
def test_which_flushes_were_qemus_is_said_where_it_changes_something(
    mode: CacheMode, failure: Failure, *, matters: bool, is_said: bool
) -> None:
    some = outcome(WHOLE, WHOLE, ZEROED)
    made = table({mode: (some, some)}, failure)
    cut = Cut("before-exit", 9, "2 flushes", matters)
    made = replace(made, cells=tuple(replace(cell, cut=cut) for cell in made.cells))
    assert ("before-exit: 2 flushes" in footnotes(Together(made, (made,)))) is is_said
