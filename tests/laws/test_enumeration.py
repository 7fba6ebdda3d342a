"""Law: what is enumerated is what the rules allow: nothing missing, nothing extra."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.explore.crash_space import CrashSpace
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.stages import BEYOND, SMALL_MAX, Stage, Stages, Visit
from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.persistence.model import Level, Options
from nbdproxy.requests import Command
from tests.support import persistence_reference as reference
from tests.support.logs import SECTOR, SECTORS, logs, options
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import BASE, ZERO, Completed, Received

STATES_MAX = 3000
SAMPLES = 20
few = st.sampled_from([0, SMALL_MAX])
contents = st.lists(st.integers(0, 3), min_size=32, max_size=32)
"""What each request writes, and what the base holds: few values, so that some are the same."""


def make_timeline(log: list[Received | Completed], content: list[int]) -> Timeline:
    table = reference.table_of(log)
    writes = [
        (seq, event.count)
        for seq, event in enumerate(log)
        if isinstance(event, Received) and event.command is Command.WRITE
    ]
    payload = b"".join(bytes([content[seq]]) * SECTOR * count for seq, count in writes)
    base = b"".join(bytes([content[-1 - sector]]) * SECTOR for sector in range(SECTORS))
    return Timeline(MemorySource(table, len(base), len(log), lambda: MemoryDisk(base), payload))


def allowed_disks(
    log: list[Received | Completed], field: CrashSpace, content: list[int]
) -> list[frozenset[int]]:
    """The contents that each sector may have, by the slow reference."""
    state = field.state
    values = reference.allowed(log, state.position, SECTORS, state.options, state.level)
    return [
        frozenset(
            content[-1 - sector] if value == BASE else 0 if value == ZERO else content[value]
            for value in here
        )
        for sector, here in enumerate(values)
    ]


def read(timeline: Timeline, visit: Visit) -> tuple[int, ...]:
    """The state's disk, opened by its printed name: one number a sector."""
    disk = timeline.open(parse_state_id(str(visit.state)))
    whole = disk.pread(0, SECTORS * SECTOR)
    sectors = [whole[at : at + SECTOR] for at in range(0, len(whole), SECTOR)]
    assert all(len(set(sector)) == 1 for sector in sectors), str(visit.state)
    return tuple(sector[0] for sector in sectors)


def visits_of(stages: Stages, stage: Stage) -> Iterator[Visit]:
    return itertools.islice(stages.visits(stage), SAMPLES if stage is Stage.SAMPLES else None)


@given(logs(), options, contents, st.integers(0, 99), few)
@settings(max_examples=8, deadline=None)
def test_all_stages_visit_what_the_rules_allow(
    log: list[Received | Completed], chosen: Options, content: list[int], seed: int, few: int
) -> None:
    timeline = make_timeline(log, content)
    for level in Level:
        fields = CrashSpaceBuilder(timeline, level, chosen)
        hashes: dict[int, tuple[int, ...]] = {}
        for t in range(len(log) + 1):
            field = fields.at(t)
            allowed = allowed_disks(log, field, content)
            stages = Stages(field, seed=seed, few=few)
            for stage, size in stages.sizes().items():
                visits = list(visits_of(stages, stage))
                assert size is None or len(visits) == size, stage
                for visit in visits:
                    disk = read(timeline, visit)
                    for found, values in zip(disk, allowed, strict=True):
                        assert found in values, (str(visit.state), stage)
                    # Equal hashes, at whatever cut, mean equal disks.
                    assert hashes.setdefault(visit.change.hash, disk) == disk, str(visit.state)
        assert len(set(hashes.values())) == len(hashes)


@given(logs(), options, contents)
@settings(max_examples=12, deadline=None)
def test_exhaustive_equals_brute_force(
    log: list[Received | Completed], chosen: Options, content: list[int]
) -> None:
    timeline = make_timeline(log, content)
    for level in Level:
        fields = CrashSpaceBuilder(timeline, level, chosen)
        for t in range(len(log) + 1):
            field = fields.at(t)
            allowed = allowed_disks(log, field, content)
            expected = set(itertools.product(*allowed))
            assert field.states == len(expected)
            assert np.isclose(10**field.states_log10, len(expected))
            stages = Stages(field, exhaustive=True)
            assert stages.sizes() == {Stage.EXHAUSTIVE: len(expected)}
            if len(expected) > STATES_MAX:
                continue
            visits = list(stages.visits(Stage.EXHAUSTIVE))
            assert len({visit.change.hash for visit in visits}) == len(visits) == len(expected)
            assert {read(timeline, visit) for visit in visits} == expected


@given(logs(), options, contents, few)
@settings(max_examples=15, deadline=None)
def test_a_change_is_what_differs_from_an_end(
    log: list[Received | Completed], chosen: Options, content: list[int], few: int
) -> None:
    timeline = make_timeline(log, content)
    fields = CrashSpaceBuilder(timeline, Level.FLUSHED, chosen)
    for t in range(len(log) + 1):
        field = fields.at(t)
        stages = Stages(field, torn=True, stale=True, few=few)
        ends = {visit.state.choice: visit for visit in stages.visits(Stage.ENDS)}
        for stage in stages.sizes():
            for visit in visits_of(stages, stage):
                state, change = visit.state, visit.change
                disk = timeline.open(state).pread(0, SECTORS * SECTOR)
                near = ends.get(change.reference, next(iter(ends.values())))
                reference_ = timeline.open(near.state).pread(0, SECTORS * SECTOR)
                differs = [
                    sector
                    for sector in range(SECTORS)
                    for at in [sector * SECTOR]
                    if disk[at : at + SECTOR] != reference_[at : at + SECTOR]
                ]
                assert change.sectors.tolist() == differs, (str(state), stage)


def test_beyond_the_model_only_on_request() -> None:
    log: list[Received | Completed] = [
        Received(Command.WRITE, 0, 2),
        Received(Command.WRITE, 1, 1, fua=True),
        Completed(1),
    ]
    timeline = make_timeline(log, [1, 2, *[3] * 30])
    field = CrashSpaceBuilder(timeline, Level.FLUSHED, Options()).at(3)
    assert not BEYOND & Stages(field).sizes().keys()
    assert Stages(field, torn=True, stale=True).sizes().keys() >= BEYOND
