"""THE LAW: the same recording, seed and check give the same states with the same verdicts.

In this process or in one to three others, in units of any size, with workers that die at work, and
in a run that was ended anywhere and was resumed: the rows are the same but for how each verdict
was found. Not covered: a Dask cluster; see tests/crash/test_dask.py.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from nbdproxy.crash.explore import explore
from nbdproxy.crash.explore.explore import Tally
from nbdproxy.crash.explore.workers import LocalRunner, PoolRunner
from nbdproxy.oracles.check import Verdict
from nbdproxy.state_server.commands import CommandPlan
from tests.support.exploring import DIES_ONCE, ODD, Case, Told, ext4_case, random_case


class StopHereError(Exception):
    """Ends an exploration from within."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Random requests checked by a command, and a filesystem checked by a manifest."""
    folders = [tmp_path_factory.mktemp(name) for name in ("random", "ext4")]
    return [random_case(folders[0], 2), ext4_case(folders[1])]


@pytest.fixture(scope="module")
def expected(cases: list[Case]) -> list[list[Told]]:
    """What this process says."""
    found = [case.explore(LocalRunner) for case in cases]
    for rows in found:
        assert {row.verdict for row in rows} == {Verdict.PASS, Verdict.FAIL}
    return found


@pytest.mark.parametrize("kind", [0, 1], ids=["command", "manifest"])
@pytest.mark.parametrize(("workers", "states"), [(1, 16), (2, 3), (3, 1)])
def test_any_number_of_workers_and_any_size_of_units(
    cases: list[Case],
    expected: list[list[Told]],
    monkeypatch: pytest.MonkeyPatch,
    kind: int,
    *,
    workers: int,
    states: int,
) -> None:
    monkeypatch.setattr(explore, "UNIT_STATES", states)
    assert cases[kind].explore(partial(PoolRunner, workers=workers)) == expected[kind]


def test_workers_that_are_killed_at_work(
    cases: list[Case], expected: list[list[Told]], tmp_path: Path
) -> None:
    case, once = cases[0], tmp_path / "once"
    command = DIES_ONCE.format(once) + ODD
    killed = Case(case.run, CommandPlan(command, 30), case.states, case.seed, case.cuts)
    assert killed.explore(partial(PoolRunner, workers=2)) == expected[0]
    assert once.is_dir()


@pytest.mark.parametrize("kind", [0, 1], ids=["command", "manifest"])
@pytest.mark.parametrize("seed", range(3))
def test_resumed_wherever_it_was_ended(
    cases: list[Case],
    expected: list[list[Told]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    kind: int,
    seed: int,
) -> None:
    dice = random.Random(seed)
    monkeypatch.setattr(explore, "UNIT_STATES", dice.choice([1, 4, 16]))
    database, ends, resume = tmp_path / "db", 0, False
    left = dice.randrange(1, 40)

    def end_early(tally: Tally) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StopHereError

    while True:
        try:
            found = cases[kind].explore(
                LocalRunner, database=database, resume=resume, progress=end_early
            )
            break
        except StopHereError:
            resume, ends, left = True, ends + 1, dice.randrange(1, 40)
    assert found == expected[kind]
