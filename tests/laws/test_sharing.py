"""Law: shared verdicts are those that each state would have got by itself.

The judge is made up and reads adaptively: where it looks next depends on what it saw, and its word
on all of that. It also holds the evaluator to its promise of what changed since the call before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, StateEvaluator, Unit
from nbdproxy.crash.explore.judging import Judge, Judgement
from nbdproxy.crash.explore.stages import Stages
from nbdproxy.crash.states.naming import StateId, parse_state_id
from nbdproxy.crash.states.timeline import CrashDisk, Timeline
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.check import Verdict
from nbdproxy.persistence.model import Level, Options
from nbdproxy.requests import Command
from tests.laws.test_cuts_of import make_timeline as make_ragged
from tests.laws.test_cuts_of import ragged_logs, visits_of
from tests.laws.test_enumeration import contents, make_timeline
from tests.support.logs import SECTOR, logs, options
from tests.support.persistence_reference import Completed, Received

Log = list[Received | Completed]


@dataclass
class AdaptivePlan:
    """A judge that reads `steps` times up to `longest` bytes; `calls` are the states it judged."""

    seed: int
    steps: int = 3
    longest: int = 700
    silent: int = 0
    """One state of so many is judged without saying what was read; 0 is none."""
    calls: list[str] = field(default_factory=list)
    opened: list[Timeline] = field(default_factory=list)

    def open(self, timeline: Timeline) -> Judge:
        """Return the judge, for the states of a timeline."""
        self.opened.append(timeline)
        return _Adaptive(self, timeline)

    def context(self, timeline: Timeline, state: StateId) -> str:  # noqa: ARG002
        """Return nothing: the disk is all that counts."""
        return ""

    def say(self, disk: CrashDisk) -> tuple[Judgement, ExtentSet]:
        """Judge a disk."""
        seen, reads = self.seed, ExtentSet()
        for _ in range(self.steps):
            start = seen % disk.size
            length = min(1 + seen // 7919 % self.longest, disk.size - start)
            reads.add(start, start + length)
            seen = xxh3_64_intdigest(disk.pread(start, length), seen)
        verdict = [Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN][seen % 3]
        return Judgement(verdict, f"{seen:x}"), reads


class _Adaptive:
    def __init__(self, plan: AdaptivePlan, timeline: Timeline) -> None:
        self._plan, self._timeline = plan, timeline
        self._last: bytearray | None = None

    def judge(
        self, state: StateId, changed: Iterable[Extent] | None
    ) -> tuple[Judgement, ExtentSet | None]:
        disk = self._timeline.open(state)
        whole = bytearray(disk.pread(0, disk.size))
        if changed is not None:
            assert self._last is not None
            for extent in changed:
                self._last[extent.offset : extent.end] = whole[extent.offset : extent.end]
        assert changed is None or self._last == whole, f"{state}: more changed than was told"
        self._last = whole
        self._plan.calls.append(str(state))
        judgement, reads = self._plan.say(disk)
        silent = self._plan.silent and len(self._plan.calls) % self._plan.silent == 0
        return judgement, None if silent else reads

    def beside(self) -> Judge:
        return _Adaptive(self._plan, self._timeline)

    def close(self) -> None:
        self._last = None


def job_of(plan: AdaptivePlan, level: Level, chosen: Options, *, share: bool) -> EvaluatorSetup:
    return EvaluatorSetup(Path("made-up"), None, level, chosen, plan, share)


def units_of(timeline: Timeline, level: Level, chosen: Options, cuts: Sequence[int]) -> list[Unit]:
    fields = CrashSpaceBuilder(timeline, level, chosen)
    units = []
    for t in cuts:
        visits = visits_of(Stages(fields.at(t), seed=t, torn=True, stale=True, few=0))
        units.append(Unit(t, tuple(str(visit.state) for visit in visits)))
    return units


def compare(timeline: Timeline, units: Sequence[Unit], job: EvaluatorSetup) -> None:
    plan = job.judge
    assert isinstance(plan, AdaptivePlan)
    plan.calls.clear()
    plan.opened.clear()
    evaluator = StateEvaluator(timeline.source, job)
    said: dict[str, Judgement] = {}
    for unit in units:
        found = evaluator.judge(unit)
        assert [judged.state for judged in found] == list(unit.states)
        for judged in found:
            alone, _ = plan.say(timeline.open(parse_state_id(judged.state)))
            assert judged.judgement == alone, (judged.state, judged.shared)
            if judged.shared is None:
                assert plan.calls.count(judged.state) == 1
            else:
                assert said[judged.shared] == alone
                assert judged.shared in plan.calls
                assert judged.state not in plan.calls
            said[judged.state] = judged.judgement
    assert job.share or len(plan.calls) == len(said)
    assert len(plan.opened) == 1  # such as a guest, which is booted once
    evaluator.close()


plans = st.builds(
    AdaptivePlan,
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.sampled_from([1, 700, 3000]),
    st.sampled_from([0, 3]),
)


@given(logs(longest=14), options, contents, plans, st.data())
@settings(max_examples=20, deadline=None)
def test_a_shared_verdict_is_the_states_own(
    log: Log, chosen: Options, content: list[int], plan: AdaptivePlan, data: st.DataObject
) -> None:
    timeline = make_timeline(log, content)
    level = data.draw(st.sampled_from(Level))
    # In any order: units go to whoever has time.
    cuts = data.draw(st.permutations(range(len(log) + 1)))[:6]
    units = units_of(timeline, level, chosen, cuts)
    for share in (True, False):
        compare(timeline, units, job_of(plan, level, chosen, share=share))


@pytest.mark.parametrize("sector", [512, 4096])
@given(ragged_logs(), contents, plans, st.data())
@settings(max_examples=20, deadline=None)
def test_also_where_requests_end_inside_sectors(
    sector: int, log: Log, content: list[int], plan: AdaptivePlan, data: st.DataObject
) -> None:
    timeline = make_ragged(log, content, sector // 4)
    chosen = Options(sector=sector)
    level = data.draw(st.sampled_from(Level))
    cuts = data.draw(st.permutations(range(len(log) + 1)))[:6]
    units = units_of(timeline, level, chosen, cuts)
    compare(timeline, units, job_of(plan, level, chosen, share=True))


def lone_writes() -> Timeline:
    """Two requests for each of four sectors, none flushed."""
    log: Log = [Received(Command.WRITE, at % 4, 1) for at in range(8)]
    return make_timeline(log, [*range(1, 9), *[0] * 24])


def test_what_the_judge_never_looks_at_costs_no_checks() -> None:
    timeline = lone_writes()
    [unit] = units_of(timeline, Level.FLUSHED, Options(), [8])
    # One read of a byte of the last sector: the base, either request, or any of them half torn.
    plan = AdaptivePlan(3 * SECTOR + 5, 1, 1)
    evaluator = StateEvaluator(timeline.source, job_of(plan, Level.FLUSHED, Options(), share=True))
    judged = evaluator.judge(unit)
    assert len(judged) > 40
    disks = [timeline.open(parse_state_id(text)) for text in unit.states]
    values = {disk.pread(3 * SECTOR, SECTOR) for disk in disks}
    assert len(plan.calls) == len(values) == 7
    assert sum(one.shared is None for one in judged) == 7


def test_a_judgement_without_what_was_read_is_never_shared() -> None:
    timeline = lone_writes()
    [unit] = units_of(timeline, Level.FLUSHED, Options(), [8])
    plan = AdaptivePlan(3 * SECTOR + 5, 1, 1, silent=1)
    evaluator = StateEvaluator(timeline.source, job_of(plan, Level.FLUSHED, Options(), share=True))
    assert all(one.shared is None for one in evaluator.judge(unit))
    assert plan.calls == list(unit.states)


def test_equal_hashes_are_equal_disks() -> None:
    timeline = lone_writes()
    [unit] = units_of(timeline, Level.FLUSHED, Options(), [8])
    evaluator = StateEvaluator(
        timeline.source, job_of(AdaptivePlan(1), Level.FLUSHED, Options(), share=True)
    )
    disks: dict[int, bytes] = {}
    for text in unit.states:
        state = parse_state_id(text)
        disk = timeline.open(state).pread(0, 4 * SECTOR)
        assert disks.setdefault(evaluator.hash_of(state), disk) == disk
    assert len(set(disks.values())) == len(disks) > 20
