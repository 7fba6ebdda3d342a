"""Law: the fast model equals the slow reference, on every log, at every cut, at every level."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.persistence.model import Durability, Level, Options
from tests.support import persistence_reference as reference
from tests.support.logs import SECTOR, SECTORS, logs, options
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import BASE, ZERO, Completed, Received

ALL = slice(None)


@given(logs(), options)
@settings(max_examples=120, deadline=None)
def test_the_model_equals_the_reference(log: list[Received | Completed], chosen: Options) -> None:
    table = reference.table_of(log)
    durability = Durability(table, chosen)
    for t in range(len(log) + 1):
        flushed = reference.durable(log, t, chosen)
        assert set(table.seq[durability.durable_from < t].tolist()) == flushed
        for level in Level:
            found = set(table.seq[durability.kept(ALL, t, level)].tolist())
            assert found == reference.kept(log, t, level, chosen), (t, level)


@given(logs(), options)
@settings(max_examples=100, deadline=None)
def test_levels_are_nested_and_durable_only_grows(
    log: list[Received | Completed], chosen: Options
) -> None:
    table = reference.table_of(log)
    durability = Durability(table, chosen)
    before = np.zeros(len(table), np.bool_)
    for t in range(len(log) + 1):
        levels = [durability.kept(ALL, t, level) for level in Level]
        for less, more in pairwise([*levels, durability.sent(ALL, t)]):
            assert not np.any(less & ~more)
        assert not np.any(before & ~levels[1])
        before = levels[1]


@given(logs(), options, st.data())
@settings(max_examples=60, deadline=None)
def test_no_answer_depends_on_what_comes_after_the_cut(
    log: list[Received | Completed], chosen: Options, data: st.DataObject
) -> None:
    t = data.draw(st.integers(0, len(log)))
    whole, prefix = (Durability(reference.table_of(some), chosen) for some in (log, log[:t]))
    count = len(prefix.table)
    for level in Level:
        known = whole.kept(ALL, t, level)
        assert np.array_equal(known[:count], prefix.kept(ALL, t, level))
        assert not known[count:].any()


def memory_source(log: list[Received | Completed]) -> MemorySource:
    """A recording in which every sector written holds its request's seq plus one."""
    table = reference.table_of(log)
    payload = b"".join(
        bytes([int(seq) + 1]) * int(length)
        for seq, length, position in zip(table.seq, table.length, table.position, strict=True)
        if position >= 0
    )
    size = SECTORS * SECTOR
    return MemorySource(table, size, len(log), lambda: MemoryDisk(b"\xfe" * size), payload)


@given(logs(), options)
@settings(max_examples=50, deadline=None)
def test_both_ends_are_states_that_the_rules_allow(
    log: list[Received | Completed], chosen: Options
) -> None:
    source = memory_source(log)
    for t in range(len(log) + 1):
        for level in Level:
            allowed = reference.allowed(log, t, SECTORS, chosen, level)
            for choice in (Choice.MUST, Choice.ALL):
                state = StateId(t, level, choice, chosen)
                disk = open_state(source, parse_state_id(str(state)))
                content = disk.pread(0, disk.size)
                for sector in range(SECTORS):
                    part = content[sector * SECTOR : (sector + 1) * SECTOR]
                    assert part == bytes([part[0]]) * SECTOR
                    assert _value(part[0]) in allowed[sector], (str(state), sector)


def _value(byte: int) -> int:
    if byte == 0xFE:
        return BASE
    return byte - 1 if byte else ZERO
