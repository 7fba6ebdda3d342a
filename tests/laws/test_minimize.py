"""Law: what is left after minimizing fails, and is the least by which it fails.

The judges are made up: monotone ones, which fail whenever some sectors lack what ALL has, and
arbitrary ones, which fail by a lot that is drawn from the whole content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, StateEvaluator
from nbdproxy.crash.explore.judging import Judge, Judgement
from nbdproxy.crash.explore.minimize import Lost, Minimum, minimize
from nbdproxy.crash.explore.stages import Stages
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.check import Verdict
from nbdproxy.persistence.model import Level, Options
from nbdproxy.report.minimized import tell
from nbdproxy.requests import Command
from tests.laws.test_cuts_of import make_timeline as make_ragged
from tests.laws.test_cuts_of import ragged_logs, visits_of
from tests.laws.test_enumeration import contents, make_timeline
from tests.support.logs import SECTOR, SECTORS, logs, options
from tests.support.persistence_reference import Completed, Received

Log = list[Received | Completed]
Fails = Callable[[bytes], bool]
Judges = Callable[[st.DrawFn, bytes, bytes], Fails]
"""Make a judge for a cut; they are told ALL and the state to minimize."""


@dataclass
class MadeUpPlan:
    """Fails the disks that `fails` says, and reads all of them."""

    fails: Fails
    checks: int = 0

    def open(self, timeline: Timeline) -> Judge:
        """Return the judge, for the states of a timeline."""
        return _MadeUp(self, timeline)

    def context(self, timeline: Timeline, state: StateId) -> str:  # noqa: ARG002
        """Return nothing: the disk is all that counts."""
        return ""


class _MadeUp:
    def __init__(self, plan: MadeUpPlan, timeline: Timeline) -> None:
        self._plan, self._timeline = plan, timeline

    def judge(
        self,
        state: StateId,
        changed: Iterable[Extent] | None,  # noqa: ARG002
    ) -> tuple[Judgement, ExtentSet | None]:
        self._plan.checks += 1
        disk = self._timeline.open(state)
        reads = ExtentSet()
        reads.add(0, disk.size)
        failed = self._plan.fails(disk.pread(0, disk.size))
        return Judgement(Verdict.FAIL if failed else Verdict.PASS), reads

    def beside(self) -> Judge:
        return _MadeUp(self._plan, self._timeline)

    def close(self) -> None:
        pass


def whole(timeline: Timeline, state: StateId) -> bytes:
    disk = timeline.open(parse_state_id(str(state)))
    return disk.pread(0, disk.size)


def full_of(state: StateId) -> StateId:
    return StateId(state.position, state.level, Choice.ALL, state.options)


def evaluator_of(timeline: Timeline, state: StateId, plan: MadeUpPlan) -> StateEvaluator:
    return StateEvaluator(
        timeline.source, EvaluatorSetup(Path("made-up"), None, state.level, state.options, plan)
    )


def with_sectors(disk: bytes, other: bytes, sectors: Iterable[int]) -> bytes:
    """The disk, but for some sectors those of the other."""
    mixed = bytearray(disk)
    for at in sectors:
        mixed[at * SECTOR : (at + 1) * SECTOR] = other[at * SECTOR : (at + 1) * SECTOR]
    return bytes(mixed)


def shown_in_full(log: Log, position: int) -> dict[int, int]:
    """For each sector the row of the request that shows if all that was sent is there."""
    replies = [event for event in log[:position] if isinstance(event, Completed)]
    failed = {reply.request for reply in replies if reply.error}
    shown: dict[int, int] = {}
    row = -1
    for seq, event in enumerate(log[:position]):
        if isinstance(event, Received):
            row += 1
            if event.command is not Command.FLUSH and seq not in failed:
                shown |= dict.fromkeys(range(event.first, event.first + event.count), row)
    return shown


def sectors_of(lost: Iterable[Lost]) -> set[int]:
    return {at for one in lost for at in range(one.first, one.last + 1)}


def differing(disk: bytes, other: bytes) -> set[int]:
    return {at for at in range(SECTORS) if disk != with_sectors(disk, other, [at])}


def monotone(draw: st.DrawFn, full: bytes, given_: bytes) -> Fails:
    """Fails if all sectors of one of some sets have something else than ALL has."""
    missing = sorted(differing(given_, full))
    assume(missing)
    some = st.sets(st.integers(0, SECTORS - 1), min_size=1, max_size=3)
    sets = draw(st.lists(some, max_size=2))
    sets.append(draw(st.sets(st.sampled_from(missing), min_size=1)))
    return lambda disk: any(one <= differing(disk, full) for one in sets)


def arbitrary(draw: st.DrawFn, full: bytes, given_: bytes) -> Fails:
    """Fails two thirds of all disks."""
    seed = draw(st.integers(0, 2**32))
    return lambda disk: xxh3_64_intdigest(disk, seed) % 3 > 0


@dataclass
class Case:
    """A state that fails, and how."""

    log: Log
    timeline: Timeline
    state: StateId
    fails: Fails

    def minimum(self) -> Minimum:
        """Minimize, and hold the result to what is promised of all."""
        plan = MadeUpPlan(self.fails)
        evaluator = evaluator_of(self.timeline, self.state, plan)
        assert evaluator.timeline.source is self.timeline.source
        found = minimize(evaluator, self.state)
        evaluator.close()
        assert found.judged.judgement.verdict is Verdict.FAIL
        assert self.fails(whole(self.timeline, found.state)), str(found.state)
        assert found.checks >= plan.checks > 0
        return found


@st.composite
def cases(draw: st.DrawFn, judges: Judges) -> Case:
    log = draw(logs(longest=18))
    timeline = make_timeline(log, draw(contents))
    level, chosen = draw(st.sampled_from(Level)), draw(options)
    field = CrashSpaceBuilder(timeline, level, chosen).at(draw(st.integers(0, len(log))))
    visits = list(visits_of(Stages(field, torn=True, stale=True, few=0)))
    state = draw(st.sampled_from(visits[1:] or visits)).state
    full, given_ = (whole(timeline, one) for one in (full_of(state), state))
    fails = judges(draw, full, given_)
    assume(fails(given_))
    return Case(log, timeline, state, fails)


def check_rebuilt(case: Case, found: Minimum) -> tuple[bytes, bytes]:
    """The id rebuilds what was said to be missing, and nothing else; return it and ALL."""
    full, given_ = (whole(case.timeline, s) for s in (full_of(case.state), case.state))
    disk = whole(case.timeline, found.state)
    lost = sectors_of(found.lost)
    assert disk == with_sectors(full, given_, lost), (str(case.state), str(found.state))
    shown = shown_in_full(case.log, case.state.position)
    for one in found.lost:
        assert {shown.get(at, -1) for at in range(one.first, one.last + 1)} == {one.row}
    return disk, full


@given(cases(monotone))
@settings(max_examples=40, deadline=None)
def test_nothing_can_be_given_back(case: Case) -> None:
    found = case.minimum()
    disk, full = check_rebuilt(case, found)
    for row in {one.row for one in found.lost}:
        request = sectors_of(one for one in found.lost if one.row == row)
        assert not case.fails(with_sectors(disk, full, request)), (str(found.state), row)
    for one in found.lost:
        assert not case.fails(with_sectors(disk, full, sectors_of([one]))), str(found.state)


@given(cases(arbitrary))
@settings(max_examples=40, deadline=None)
def test_nothing_can_be_given_back_whatever_the_judge(case: Case) -> None:
    found = case.minimum()
    disk, full = check_rebuilt(case, found)
    for one in found.lost:
        assert not case.fails(with_sectors(disk, full, sectors_of([one]))), str(found.state)


@pytest.mark.parametrize("judges", [monotone, arbitrary])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_single_request_that_is_enough_is_found(judges: Judges, data: st.DataObject) -> None:
    case = data.draw(cases(judges))
    found = case.minimum()
    full, given_ = (whole(case.timeline, s) for s in (full_of(case.state), case.state))
    shown = shown_in_full(case.log, case.state.position)
    if case.fails(full):
        assert not found.lost
        assert whole(case.timeline, found.state) == full
        return
    rows = {shown.get(at, -1) for at in range(SECTORS)}
    alone = [
        row
        for row in rows
        if case.fails(
            with_sectors(full, given_, (at for at in range(SECTORS) if shown.get(at, -1) == row))
        )
    ]
    assert not alone or len({one.row for one in found.lost}) == 1, (str(case.state), alone)


@given(ragged_logs(), contents, st.integers(0, 2**32), st.data())
@settings(max_examples=30, deadline=None)
def test_it_fails_also_where_requests_end_inside_sectors(
    log: Log, content: list[int], seed: int, data: st.DataObject
) -> None:
    timeline = make_ragged(log, content, 128)
    field = CrashSpaceBuilder(timeline, Level.FLUSHED, Options()).at(len(log))
    state = data.draw(st.sampled_from(list(visits_of(Stages(field, torn=True, few=0))))).state

    def fails(disk: bytes) -> bool:
        return xxh3_64_intdigest(disk, seed) % 3 > 0

    assume(fails(whole(timeline, state)))
    found = minimize(evaluator_of(timeline, state, MadeUpPlan(fails)), state)
    assert fails(whole(timeline, found.state))


def test_what_fails_with_everything_lacks_nothing() -> None:
    log: Log = [Received(Command.WRITE, 0, 2), Received(Command.WRITE, 2, 2)]
    timeline = make_timeline(log, [1, 2, *[3] * 30])
    state = parse_state_id("s2.flushed.must")
    found = minimize(evaluator_of(timeline, state, MadeUpPlan(lambda _: True)), state)
    assert found.lost == ()
    assert whole(timeline, found.state) == whole(timeline, full_of(state))


def test_a_state_that_passes_is_refused() -> None:
    timeline = make_timeline([Received(Command.WRITE, 0, 2)], [1, *[3] * 31])
    state = parse_state_id("s1.flushed.must")
    with pytest.raises(UsageError, match=r"s1\.flushed\.must does not fail"):
        minimize(evaluator_of(timeline, state, MadeUpPlan(lambda _: False)), state)


def test_one_sector_of_one_request_of_hundreds() -> None:
    """Few checks, and exactly the sector that makes it fail."""
    log: Log = [Received(Command.WRITE, 0, 4) for _ in range(300)]
    log += [Received(Command.WRITE, at, 1) for at in range(4)]
    content = [*[1] * 300, 2, 3, 4, 5, *[9] * 28]
    timeline = make_timeline(log, content)
    state = parse_state_id("s304.flushed.must")
    plan = MadeUpPlan(lambda disk: disk[2 * SECTOR] != 4)
    told: list[tuple[int, int]] = []
    evaluator = evaluator_of(timeline, state, plan)
    found = minimize(evaluator, state, progress=lambda left, checks: told.append((left, checks)))
    assert found.lost == (Lost(302, 2, 2),)
    assert [checks for _, checks in told] == sorted(checks for _, checks in told)
    assert plan.checks < 20


def test_no_request_can_be_given_back_where_less_missing_fails_again() -> None:
    """A judge may pass a worse disk: still, giving any one request back has to pass."""
    log: Log = [Received(Command.WRITE, 0, 5), Received(Command.WRITE, 5, 3)]
    timeline = make_ragged(log, [1, 2, *[3] * 28], SECTOR)
    state = parse_state_id("s2.flushed.must")
    full = whole(timeline, full_of(state))

    def fails(disk: bytes) -> bool:
        missing = {at for at in range(8) if disk != with_sectors(disk, full, [at])}
        return missing in ({5, 6}, set(range(7)), set(range(8)))

    found = minimize(evaluator_of(timeline, state, MadeUpPlan(fails)), state)
    disk = whole(timeline, found.state)
    assert fails(disk)
    for row in {one.row for one in found.lost}:
        request = sectors_of(one for one in found.lost if one.row == row)
        assert not fails(with_sectors(disk, full, request)), (str(found.state), row)


def test_a_single_request_is_found_although_two_others_come_first() -> None:
    log: Log = [Received(Command.WRITE, at, 1) for at in range(8)]
    timeline = make_ragged(log, [*range(1, 9), *[0] * 22], SECTOR)
    state = parse_state_id("s8.flushed.must")

    def fails(disk: bytes) -> bool:
        missing = {at for at in range(8) if disk[at * SECTOR] == 0}
        return {0, 1} <= missing or 6 in missing

    found = minimize(evaluator_of(timeline, state, MadeUpPlan(fails)), state)
    assert found.lost == (Lost(6, 6, 6),)
    assert str(found.state) == "s8.flushed.but6"


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_of_several_requests_inside_one_sector_the_one_that_is_missing_is_named(lost: int) -> None:
    """Also where another shows behind it in the same sector."""
    log: Log = [Received(Command.WRITE, 4 + at, 1) for at in range(3)]
    timeline = make_ragged(log, [1, 2, 3, *[9] * 27], SECTOR // 4)
    state = parse_state_id(f"s3.flushed.but{lost}")
    full = whole(timeline, full_of(state))

    def fails(disk: bytes) -> bool:
        at = SECTOR + lost * SECTOR // 4
        return disk[at] != full[at]

    found = minimize(evaluator_of(timeline, state, MadeUpPlan(fails)), state)
    assert found.lost == (Lost(lost, 1, 1),)
    assert str(found.state) == f"s3.flushed.but{lost}"
    (missing,) = tell(timeline, found).missing
    assert missing.extent == missing.request == (SECTOR + lost * SECTOR // 4, SECTOR // 4)
