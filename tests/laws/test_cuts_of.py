"""Laws: few cuts stand for all of them, and where requests end inside sectors nothing is made up.

The second law has a reference of its own, in units of a quarter of a sector: any of the requests
that may be there, laid over what must be there in any order that happens-before allows. What TRIM
leaves is undefined, so each piece of it may have been done or not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.planning import Every, cuts_of
from nbdproxy.crash.explore.stages import BEYOND, Stage, Stages, Visit
from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.persistence.model import Coverage, Durability, Level, Options
from nbdproxy.requests import Command
from tests.support import persistence_reference as reference
from tests.support.logs import SECTORS, logs, options
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received

Log = Sequence[Received | Completed]
QUARTERS = 4
UNITS = 2 * QUARTERS + 1
"""The disk ends inside its third sector."""
SAMPLES = 8


def disks_at(log: Log, position: int, chosen: Options, level: Level) -> set[tuple[int, ...]]:
    """All disks of a cut, by which request shows in each sector."""
    values = reference.allowed(log, position, SECTORS, chosen, level)
    return set(itertools.product(*values))


@given(logs(longest=14), options)
@settings(max_examples=40, deadline=None)
def test_few_cuts_have_the_states_of_all(log: list[Received | Completed], chosen: Options) -> None:
    # A loss after the end of a recording is none of its instants.
    chosen = replace(chosen, losses=tuple(at for at in chosen.losses if at <= len(log)))
    table = reference.table_of(log)
    source = MemorySource(table, SECTORS * 512, len(log), lambda: MemoryDisk(SECTORS * 512))
    fates = Durability(table, chosen)
    for level in Level:
        at = [disks_at(log, t, chosen, level) for t in range(len(log) + 1)]
        everywhere = set[tuple[int, ...]]().union(*at)
        for every in Every:
            cuts = cuts_of(source, fates, level, every)
            assert cuts == sorted(set(cuts)), (level, every)
            assert cuts[-1] == len(log)
            assert cuts[0] >= 0
            if level is Level.FLUSHED_OR_FLUSHING and chosen.coverage is Coverage.REPLIED:
                continue  # has a test of its own
            assert set[tuple[int, ...]]().union(*(at[t] for t in cuts)) == everywhere, level
        flushes = set(cuts_of(source, fates, level, Every.FLUSH))
        changes = {
            seq + 1
            for seq, event in enumerate(log)
            if isinstance(event, Received) and event.command is not Command.FLUSH
        }
        assert set(cuts) == flushes | changes, "every write, and what every flush has"


def test_as_few_cuts_as_changes_of_the_guarantee() -> None:
    write, flush = Received(Command.WRITE, 0, 1), Received(Command.FLUSH)
    log: Log = [write, Completed(0), write, Completed(2), flush, Completed(4), write, Completed(6)]
    table = reference.table_of(log)
    source = MemorySource(table, 4096, len(log), lambda: MemoryDisk(4096))
    fates = Durability(table)
    assert cuts_of(source, fates, Level.FLUSHED, Every.FLUSH) == [5, 8]
    assert cuts_of(source, fates, Level.FLUSHED, Every.WRITE) == [1, 3, 5, 7, 8]
    assert cuts_of(source, fates, Level.NOTHING, Every.FLUSH) == [8]
    assert cuts_of(source, fates, Level.COMPLETED, Every.FLUSH) == [1, 3, 7, 8]


def test_a_flush_in_flight_may_cover_more_with_each_reply() -> None:
    """Just before the second write is answered it may be there without the first."""
    write, other = Received(Command.WRITE, 0, 1), Received(Command.WRITE, 1, 1)
    log: Log = [Received(Command.FLUSH), write, other, Completed(2)]
    chosen, level = Options(Coverage.REPLIED), Level.FLUSHED_OR_FLUSHING
    table = reference.table_of(log)
    source = MemorySource(table, SECTORS * 512, len(log), lambda: MemoryDisk(SECTORS * 512))
    cuts = cuts_of(source, Durability(table, chosen), level, Every.FLUSH)
    found = set[tuple[int, ...]]().union(*(disks_at(log, t, chosen, level) for t in cuts))
    everywhere = (disks_at(log, t, chosen, level) for t in range(len(log) + 1))
    assert found == set[tuple[int, ...]]().union(*everywhere)


class Item(NamedTuple):
    """A request, or a piece of a TRIM, in one sector: units [low, high) of it hold `value`."""

    seq: int
    reply: int
    low: int
    high: int
    value: int
    needed: bool


@st.composite
def ragged_logs(draw: st.DrawFn) -> list[Received | Completed]:
    """Requests in units of a quarter sector; few, as the reference tries all orders."""
    log: list[Received | Completed] = []
    waiting: list[int] = []
    answers = st.booleans()
    for _ in range(draw(st.integers(1, 10))):
        if draw(answers) and waiting:
            request = waiting.pop(draw(st.integers(0, len(waiting) - 1)))
            log.append(Completed(request, draw(st.sampled_from([0, 0, 0, 5]))))
            continue
        waiting.append(len(log))
        commands = [Command.FLUSH, *[Command.WRITE] * 3, Command.WRITE_ZEROES, Command.TRIM]
        command = draw(st.sampled_from(commands))
        first = draw(st.integers(0, UNITS - 1))
        count = draw(st.integers(1, min(UNITS - first, 6)))
        fua = draw(st.integers(0, 3)) == 0
        is_flush = command is Command.FLUSH
        log.append(Received(command) if is_flush else Received(command, first, count, fua))
    return log


def items_of(
    log: Log, position: int, must: set[int], content: Sequence[int], sector: int
) -> list[Item]:
    """What was received by a cut and touches a sector."""
    start = sector * QUARTERS
    replies = {e.request: at for at, e in enumerate(log) if isinstance(e, Completed)}
    requests = [
        (seq, e, max(e.first - start, 0), min(e.first + e.count - start, QUARTERS))
        for seq, e in enumerate(log[:position])
        if isinstance(e, Received) and e.first < start + QUARTERS and e.first + e.count > start
    ]
    bounds = {bound for _, _, *both in requests for bound in both}
    found = []
    for seq, event, low, high in requests:
        reply = replies.get(seq, len(log))
        if event.command is not Command.TRIM:
            value = content[seq] if event.command is Command.WRITE else 0
            found.append(Item(seq, reply, low, high, value, seq in must))
            continue
        edges = sorted(bound for bound in bounds | {low, high} if low <= bound <= high)
        for piece, end in itertools.pairwise(edges):
            found.append(Item(seq, reply, piece, end, 0, needed=False))
    return found


def sector_values(items: Sequence[Item], base: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Every content that a sector may have."""
    needed = sum(1 << at for at, item in enumerate(items) if item.needed)
    seen = {(0, base)}
    todo = [(0, base)]
    while todo:
        done, content = todo.pop()
        for at, item in enumerate(items):
            after = (k for k in range(len(items)) if done >> k & 1)
            if done >> at & 1 or any(item.reply < items[k].seq for k in after):
                continue
            inside = content[: item.low] + (item.value,) * (item.high - item.low)
            state = done | 1 << at, inside + content[item.high :]
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return {content for done, content in seen if done & needed == needed}


def make_timeline(log: Log, content: Sequence[int], unit: int) -> Timeline:
    """Each unit of the disk holds one number."""
    payload = b"".join(
        bytes([content[seq]]) * event.count * unit
        for seq, event in enumerate(log)
        if isinstance(event, Received) and event.command is Command.WRITE
    )
    base = b"".join(bytes([content[-1 - at]]) * unit for at in range(UNITS))
    table = reference.table_of(log, sector=unit)
    return Timeline(MemorySource(table, len(base), len(log), lambda: MemoryDisk(base), payload))


def units_of(timeline: Timeline, visit: Visit, unit: int) -> tuple[int, ...]:
    disk = timeline.open(parse_state_id(str(visit.state)))
    whole = disk.pread(0, disk.size)
    units = [whole[at : at + unit] for at in range(0, len(whole), unit)]
    assert all(len(set(one)) == 1 for one in units), str(visit.state)
    return tuple(one[0] for one in units)


def visits_of(stages: Stages) -> Iterator[Visit]:
    for stage in stages.sizes():
        yield from itertools.islice(stages.visits(stage), SAMPLES if stage is Stage.SAMPLES else 60)


contents = st.lists(st.integers(0, 9), min_size=30, max_size=30)


@pytest.mark.parametrize("sector", [512, 4096])
@given(ragged_logs(), options, contents)
@settings(max_examples=12, deadline=None)
def test_inside_sectors_only_what_the_rules_allow(
    sector: int, log: list[Received | Completed], chosen: Options, content: list[int]
) -> None:
    unit = sector // QUARTERS
    timeline = make_timeline(log, content, unit)
    chosen = replace(chosen, sector=sector)
    base = tuple(content[-1 - at] for at in range(UNITS))
    for level in Level:
        fields = CrashSpaceBuilder(timeline, level, chosen)
        disks: dict[int, tuple[int, ...]] = {}
        for t in range(len(log) + 1):
            must = reference.kept(log, t, level, chosen)

            @cache
            def values(at: int, t: int = t, must: set[int] = must) -> set[tuple[int, ...]]:
                items = items_of(log, t, must, content, at)
                here = base[at * QUARTERS : (at + 1) * QUARTERS]
                return sector_values(items, here + (0,) * (QUARTERS - len(here)))

            for visit in visits_of(Stages(fields.at(t), seed=t, few=0)):
                assert visit.stage not in BEYOND
                disk = units_of(timeline, visit, unit)
                for at in range(3):
                    part = disk[at * QUARTERS : (at + 1) * QUARTERS]
                    legal = {value[: len(part)] for value in values(at)}
                    assert part in legal, (str(visit.state), visit.stage, at)
                same = disks.setdefault(visit.change.hash, disk)
                assert same == disk, f"{visit.state} has the hash of another disk"
        assert len(set(disks.values())) == len(disks), "a disk has two hashes"


@given(ragged_logs(), options, contents)
@settings(max_examples=20, deadline=None)
def test_inside_sectors_all_that_the_rules_allow_is_listed(
    log: list[Received | Completed], chosen: Options, content: list[int]
) -> None:
    unit = 512 // QUARTERS
    timeline = make_timeline(log, content, unit)
    base = tuple(content[-1 - at] for at in range(UNITS))
    for level in (Level.FLUSHED, Level.NOTHING):
        fields = CrashSpaceBuilder(timeline, level, chosen)
        for t in range(len(log) + 1):
            must = reference.kept(log, t, level, chosen)
            sectors = []
            for first in range(0, UNITS, QUARTERS):
                here = base[first : first + QUARTERS]
                items = items_of(log, t, must, content, first // QUARTERS)
                values = sector_values(items, here + (0,) * (QUARTERS - len(here)))
                sectors.append({value[: len(here)] for value in values})
            count = math.prod(map(len, sectors))
            field = fields.at(t)
            if count > 2000 or not field.is_complete:
                continue
            assert field.states == count, (t, level)
            visits = list(Stages(field, exhaustive=True).visits(Stage.EXHAUSTIVE))
            assert len({visit.change.hash for visit in visits}) == len(visits) == count
            expected = {sum(parts, ()) for parts in itertools.product(*sectors)}
            assert {units_of(timeline, visit, unit) for visit in visits} == expected


def test_two_requests_in_one_sector_are_four_disks() -> None:
    """Neither is named by the other's absence: each may be there or not."""
    log: Log = [Received(Command.WRITE, 4, 1), Completed(0), Received(Command.WRITE, 6, 1)]
    timeline = make_timeline(log, list(range(1, 31)), 512 // QUARTERS)
    field = CrashSpaceBuilder(timeline, Level.FLUSHED, Options()).at(3)
    assert field.is_complete
    assert field.states == 4
    stages = Stages(field)
    assert stages.small
    found = {str(visit.state) for visit in Stages(field, exhaustive=True).visits(Stage.EXHAUSTIVE)}
    assert found == {
        "s3.flushed.must",
        "s3.flushed.only0:0",
        "s3.flushed.only2:0",
        "s3.flushed.must~1=0x128_basex128_2x128_base",
    }


@given(ragged_logs(), options, contents)
@settings(max_examples=25, deadline=None)
def test_a_change_tells_every_sector_that_differs(
    log: list[Received | Completed], chosen: Options, content: list[int]
) -> None:
    unit = 512 // QUARTERS
    timeline = make_timeline(log, content, unit)
    fields = CrashSpaceBuilder(timeline, Level.FLUSHED, chosen)
    for t in range(len(log) + 1):
        stages = Stages(fields.at(t), torn=True, stale=True, few=0)
        ends = [visit.state for visit in stages.visits(Stage.ENDS)]
        for visit in visits_of(stages):
            near = next((end for end in ends if end.choice is visit.change.reference), ends[0])
            one, other = (
                np.frombuffer(timeline.open(state).pread(0, UNITS * unit), np.uint8)
                for state in (visit.state, near)
            )
            differs = np.unique(np.flatnonzero(one != other) // 512)
            assert visit.change.sectors.tolist() == differs.tolist(), str(visit.state)


@pytest.mark.parametrize(
    "first",
    [Received(Command.WRITE, 4, 1), Received(Command.WRITE_ZEROES, 4, 1)],
    ids=["beside a durable write", "beside durable zeroes"],
)
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_request_beside_a_durable_one_in_its_sector_is_left_to_chance(
    sector: int, first: Received
) -> None:
    """The durable one touches none of its bytes, so it may be there or not: two disks."""
    durable = Received(first.command, 6, 1, fua=True)
    log: Log = [first, Completed(0), durable, Completed(2)]
    timeline = make_timeline(log, list(range(1, 31)), sector // QUARTERS)
    field = CrashSpaceBuilder(timeline, Level.FLUSHED, Options(sector=sector)).at(4)
    ids = ("s4.flushed.must", "s4.flushed.all")
    suffix = "+sector4096" if sector > 512 else ""
    states = [parse_state_id(text + suffix) for text in ids]
    disks = {timeline.open(state).pread(0, UNITS * sector // QUARTERS) for state in states}
    assert len(disks) == 2
    assert len({field.change(state).hash for state in states}) == 2
    assert field.sectors.tolist() == [1]
