"""Plans: how a budget is dealt out, and that what is planned is what is visited."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.planning import (
    CutPlan,
    Every,
    ExplorationPlan,
    ExploreOptions,
    cuts_of,
    make_plan,
    stages_of,
    states_text,
    visits_of,
)
from nbdproxy.crash.explore.stages import BEYOND, Stage, Visit
from nbdproxy.errors import UsageError
from nbdproxy.persistence.model import Level, Options
from nbdproxy.requests import Command
from tests.laws.test_enumeration import contents, make_timeline
from tests.support.logs import logs, options
from tests.support.persistence_reference import Completed, Received

Log = list[Received | Completed]
VISITS_MAX = 300

wishes = st.builds(
    ExploreOptions,
    st.one_of(st.integers(0, 120), st.none()),
    st.integers(0, 9),
    torn=st.booleans(),
    stale=st.booleans(),
)


def check_dealt(plan: ExplorationPlan) -> None:
    """Whatever the cuts are: nothing beyond sizes, stage by stage, evenly, and all of it."""
    stages = list(dict.fromkeys(stage for cut in plan.cuts for stage in cut.sizes))
    budget = plan.options.budget
    spent, full = 0, True
    for stage in stages:
        sizes = [cut.sizes.get(stage, 0) for cut in plan.cuts]
        quotas = [cut.quotas.get(stage, 0) for cut in plan.cuts]
        assert all(q >= 0 and (s is None or q <= s) for q, s in zip(quotas, sizes, strict=True))
        if budget is None:
            assert quotas == [size or 0 for size in sizes]
        elif not full:
            assert not any(quotas), f"{stage} although the one before it was not done"
        else:
            cut_off = [q for q, s in zip(quotas, sizes, strict=True) if s is None or q < s]
            assert not cut_off or max(quotas) <= min(cut_off) + 1
            full = not cut_off
        spent += sum(quotas)
    assert plan.visits == spent == sum(sum(cut.quotas.values()) for cut in plan.cuts)
    if budget is not None:
        endless = any(size is None for cut in plan.cuts for size in cut.sizes.values())
        total = sum(size or 0 for cut in plan.cuts for size in cut.sizes.values())
        assert spent == (budget if endless else min(budget, total))
    for stage in stages:
        sizes = [cut.sizes.get(stage, 0) for cut in plan.cuts]
        missing = None if None in sizes else sum(size or 0 for size in sizes)
        if missing is not None:
            missing -= sum(cut.quotas.get(stage, 0) for cut in plan.cuts)
        assert plan.left_out.get(stage, 0) == missing
    assert set(plan.left_out) <= set(stages)


@given(logs(), options, contents, wishes, st.data())
@settings(max_examples=40, deadline=None)
def test_a_budget_is_dealt_and_visited_as_promised(
    log: Log, chosen: Options, content: list[int], wish: ExploreOptions, data: st.DataObject
) -> None:
    level, every = data.draw(st.sampled_from(Level)), data.draw(st.sampled_from(Every))
    timeline = make_timeline(log, content)
    fields = CrashSpaceBuilder(timeline, level, chosen)
    cuts = [
        cut
        for cut in cuts_of(timeline.source, timeline.durability(chosen), level, every)
        if cut <= len(log)
    ]
    told: list[int] = []
    plan = make_plan(fields, cuts, wish, cuts_possible=len(log) + 1, progress=told.append)
    assert [cut.position for cut in plan.cuts] == cuts
    assert told == list(range(len(cuts)))
    assert (plan.options, plan.cuts_possible) == (wish, len(log) + 1)
    check_dealt(plan)
    for cut in plan.cuts:
        field = fields.at(cut.position)
        assert (cut.states, cut.sectors) == (field.states, len(field.sectors))
        assert cut.sizes == stages_of(field, wish).sizes()
        assert (Stage.TORN in cut.sizes, Stage.STALE in cut.sizes) == (wish.torn, wish.stale)
    if plan.visits > VISITS_MAX:
        return
    visits = list(visits_of(fields, plan))
    for cut in plan.cuts:
        check_visited(cut, stages_of(fields.at(cut.position), wish).small, visits)
    positions = [visit.state.position for visit in visits]
    assert positions == sorted(positions)
    names = [str(visit.state) for visit in visits]
    assert len(set(names)) == len(names), "a state is visited twice"
    again = CrashSpaceBuilder(make_timeline(log, content), level, chosen)
    repeated = [(str(v.state), v.stage, v.change.hash) for v in visits_of(again, plan)]
    assert repeated == [(str(v.state), v.stage, v.change.hash) for v in visits]


def check_visited(cut: CutPlan, small: bool, visits: list[Visit]) -> None:
    """All that was promised; where there are few states each once, and all if the budget allows."""
    here = [visit for visit in visits if visit.state.position == cut.position]
    counted = Counter(visit.stage for visit in here)
    if not small:
        assert counted == Counter(cut.quotas)
        return
    assert counted <= Counter(cut.quotas)
    disks = [visit.change.hash for visit in here if visit.stage not in BEYOND]
    assert len(set(disks)) == len(disks)
    if all(cut.quotas.get(stage, 0) == size for stage, size in cut.sizes.items()):
        assert len(disks) == cut.states


def three_writes() -> Log:
    """One write of two sectors, and two of one; nothing overlaps, nothing is flushed."""
    writes = [Received(Command.WRITE, 0, 2), *(Received(Command.WRITE, at, 1) for at in (2, 3))]
    return [event for at, write in enumerate(writes) for event in (write, Completed(2 * at))]


def make_three() -> CrashSpaceBuilder:
    return CrashSpaceBuilder(
        make_timeline(three_writes(), [*range(1, 7), *[0] * 26]), Level.FLUSHED, Options()
    )


def test_what_does_not_fit_is_dealt_evenly_among_the_cuts() -> None:
    """Ends first, at all cuts; then requests, as many at each; nothing of what comes later."""
    plan = make_plan(make_three(), [2, 4, 6], ExploreOptions(13), cuts_possible=7)
    assert [cut.sizes[Stage.REQUESTS] for cut in plan.cuts] == [2, 4, 6]
    assert [cut.quotas for cut in plan.cuts] == [
        {Stage.ENDS: 2, Stage.REQUESTS: 2},
        {Stage.ENDS: 2, Stage.REQUESTS: 3},
        {Stage.ENDS: 2, Stage.REQUESTS: 2},
    ]


def make_many() -> CrashSpaceBuilder:
    """Sixty writes to each of four sectors, all different."""
    log: Log = [Received(Command.WRITE, at, 1) for at in range(4) for _ in range(60)]
    timeline = make_timeline(log, list(range(1, 250)) + [0] * 4)
    return CrashSpaceBuilder(timeline, Level.NOTHING, Options())


def test_samples_fill_any_budget() -> None:
    pairs = 240 * 239
    plan = make_plan(make_many(), [240], ExploreOptions(2 + 480 + pairs + 100), cuts_possible=1)
    assert plan.visits == 2 + 480 + pairs + 100
    assert plan.left_out == {Stage.SAMPLES: None}
    assert not any(BEYOND & cut.quotas.keys() for cut in plan.cuts)


def test_few_states_are_all_visited_and_each_once() -> None:
    fields = make_three()
    plan = make_plan(fields, [2, 4, 6], ExploreOptions(500), cuts_possible=7)
    assert not plan.left_out
    visits = list(visits_of(fields, plan))
    assert Counter(visit.state.position for visit in visits) == {2: 4, 4: 8, 6: 16}
    assert len({(visit.state.position, visit.change.hash) for visit in visits}) == 4 + 8 + 16


def test_exhaustive_visits_each_disk_once_up_to_its_limit() -> None:
    fields = make_three()
    disks = [4, 8, 16]  # two sectors, three, four: each old or new
    cuts = [2, 4, 6]
    plan = make_plan(fields, cuts, ExploreOptions(28, exhaustive=True), cuts_possible=7)
    assert [cut.states for cut in plan.cuts] == disks
    assert [cut.quotas for cut in plan.cuts] == [{Stage.EXHAUSTIVE: n} for n in disks]
    visits = list(visits_of(fields, plan))
    assert len({visit.change.hash for visit in visits}) == 16
    assert not plan.left_out
    with pytest.raises(UsageError, match=r"--exhaustive would visit 28 states .*limit of 27"):
        make_plan(fields, cuts, ExploreOptions(27, exhaustive=True), cuts_possible=7)
    no_limit = make_plan(fields, cuts, ExploreOptions(None, exhaustive=True), cuts_possible=7)
    assert no_limit.visits == 28


def test_exhaustive_refuses_what_no_machine_can_visit() -> None:
    with pytest.raises(UsageError, match=r"13,845,841 states .*limit of 1,000,000"):
        make_plan(make_many(), [240], ExploreOptions(None, exhaustive=True), cuts_possible=1)


def test_numbers_of_states_as_people_read_them() -> None:
    assert states_text(4.2, 16_000) == "16,000"
    assert states_text(1234.4) == "10^1234"


def test_a_plan_without_cuts_visits_nothing() -> None:
    plan = make_plan(make_three(), [], ExploreOptions(10), cuts_possible=0)
    assert (plan.visits, plan.cuts, plan.left_out) == (0, (), {})


def test_a_cut_that_leaves_nothing_to_chance_has_one_state() -> None:
    plan = make_plan(make_three(), [0], ExploreOptions(10), cuts_possible=1)
    [cut] = plan.cuts
    assert isinstance(cut, CutPlan)
    assert (cut.states, cut.sectors, plan.visits) == (1, 0, 1)
