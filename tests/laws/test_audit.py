"""Audit against the slow reference: what a store may hold, it may; what it may not, is told."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.blame.audit import FAULTS, Audit, Auditor, Fate
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.stages import Stages
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.persistence.model import Level, Options
from nbdproxy.requests import Command
from tests.laws.test_cuts_of import contents as ragged_contents
from tests.laws.test_cuts_of import make_timeline as make_ragged
from tests.laws.test_cuts_of import ragged_logs, visits_of
from tests.laws.test_enumeration import contents, make_timeline
from tests.support import persistence_reference as reference
from tests.support.logs import SECTOR, SECTORS, logs, options
from tests.support.persistence_reference import BASE, ZERO, Completed, Received

Log = list[Received | Completed]

holdings = st.lists(st.integers(0, 4), min_size=SECTORS, max_size=SECTORS)
"""What each sector of the store holds; 4 is written by nobody."""


def audited(timeline: Timeline, holds: list[int], chosen: Options) -> tuple[Audit, MemoryDisk]:
    store = MemoryDisk(b"".join(bytes([value]) * SECTOR for value in holds))
    return Auditor(timeline, store, chosen).run(), store


def expected(
    log: Log, content: list[int], holds: list[int], chosen: Options
) -> dict[int, frozenset[Fate]]:
    """The fates that each sector that was touched may be told to have."""
    timeline = make_timeline(log, content)
    end = StateId(len(log), Level.RECEIVED, Choice.ALL, chosen)
    sent = timeline.open(end).pread(0, SECTORS * SECTOR)
    rows = {state: shown(timeline, state) for state in (end, durable_state(log, chosen))}
    allowed = reference.allowed(log, len(log), SECTORS, chosen, Level.FLUSHED)
    found = {}
    for sector, holding in enumerate(holds):
        touching = [
            seq
            for seq, event in enumerate(log)
            if isinstance(event, Received)
            and event.command is not Command.FLUSH
            and event.first <= sector < event.first + event.count
        ]
        if not touching:
            continue

        def value(of: int, at: int = sector) -> int:
            write = of >= 0 and log[of].command is Command.WRITE  # type: ignore[union-attr]
            return content[-1 - at] if of == BASE else content[of] if write else 0

        last, durable = (shown_rows[sector] for shown_rows in rows.values())
        table = timeline.table
        since = table.seq[durable] if durable >= 0 else -1
        trims = [
            row
            for row in range(len(table))
            if table.command[row] == Command.TRIM and int(table.seq[row]) in touching
        ]
        ever = {value(seq) for seq in touching} | {content[-1 - sector], 0}
        may = holding in {0 if one == ZERO else value(one) for one in allowed[sector]}
        if last in trims:
            fates = {Fate.TRIMMED}
        elif holding == sent[sector * SECTOR]:
            fates = {Fate.AS_SENT}
        elif any(table.completed[row] >= since for row in trims):
            # What a TRIM may have left and what a request may have are both allowed.
            fates = {Fate.TRIMMED, Fate.UNFLUSHED} if may else {Fate.TRIMMED}
        elif may:
            fates = {Fate.UNFLUSHED}
        else:
            known = holding in ever and durable >= 0
            fates = {Fate.BROKEN if known else Fate.FOREIGN}
        found[sector] = frozenset(fates)
    return found


def durable_state(log: Log, chosen: Options) -> StateId:
    return StateId(len(log), Level.FLUSHED, Choice.MUST, chosen)


def shown(timeline: Timeline, state: StateId) -> list[int]:
    rows = np.full(SECTORS, -1)
    for low, high, row in timeline.open(state).segments(0, SECTORS * SECTOR):
        rows[low // SECTOR : high // SECTOR] = row
    return [int(row) for row in rows]


@given(logs(), options, contents, holdings)
@settings(max_examples=150, deadline=None)
def test_what_a_store_may_hold_is_what_the_rules_allow(
    log: Log, chosen: Options, content: list[int], holds: list[int]
) -> None:
    timeline = make_timeline(log, content)
    audit, _ = audited(timeline, holds, chosen)
    wanted = expected(log, content, holds, chosen)
    found = {
        sector: finding.fate
        for finding in audit.findings
        for sector in range(finding.extent.offset // SECTOR, finding.extent.end // SECTOR)
    }
    for sector, fates in wanted.items():
        assert found.get(sector, Fate.AS_SENT) in fates, sector
    assert found.keys() <= wanted.keys()
    for fate in set(Fate) - {Fate.AS_SENT}:
        assert audit.sizes[fate] == SECTOR * list(found.values()).count(fate)
    assert audit.compared == SECTOR * len(wanted)


@given(ragged_logs(), options, ragged_contents, st.data())
@settings(max_examples=40, deadline=None)
def test_no_legal_disk_breaks_a_promise_where_requests_end_inside_sectors(
    log: Log, chosen: Options, content: list[int], data: st.DataObject
) -> None:
    timeline = make_ragged(log, content, SECTOR // 4)
    field = CrashSpaceBuilder(timeline, Level.FLUSHED, chosen).at(len(log))
    visit = data.draw(st.sampled_from(list(visits_of(Stages(field, seed=7)))))
    disk = timeline.open(visit.state)
    audit = Auditor(timeline, MemoryDisk(disk.pread(0, disk.size)), chosen).run()
    assert not [one for one in audit.findings if one.fate in FAULTS], str(visit.state)
