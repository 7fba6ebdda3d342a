"""Crash states: their names, and the disks that they rebuild."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.states.naming import Choice, Pin, RequestPart, StateId, parse_state_id
from nbdproxy.crash.states.timeline import CrashDisk, open_state
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent
from nbdproxy.persistence.model import Coverage, Level, Options
from nbdproxy.recording.index import RequestTable
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received, table_of

MakeSource = Callable[..., MemorySource]

EXOTIC = Options(Coverage.REPLIED, 4096, multi_conn=False, fsyncgate=True, losses=(7, 90))


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (StateId(1234, Level.FLUSHED, Choice.MUST), "s1234.flushed.must"),
        (StateId(0, Level.NOTHING, Choice.ALL), "s0.nothing.all"),
        (
            StateId(5, Level.FLUSHED_OR_FLUSHING, Choice.MUST, EXOTIC),
            "s5.flushing.must+replied+fsyncgate+single+sector4096+lost7+lost90",
        ),
        (
            StateId(
                5,
                Level.FLUSHED,
                Choice.BUT,
                parts=(RequestPart(2), RequestPart(3, 0, 3), RequestPart(3, 5, 5)),
            ),
            "s5.flushed.but2,3:0-3,3:5",
        ),
        (StateId(5, Level.FLUSHED, Choice.DRAW, seed=7, number=12), "s5.flushed.draw7-12"),
        (
            StateId(
                5,
                Level.FLUSHED,
                Choice.ONLY,
                Options(sector=4096),
                (RequestPart(2),),
                pins=(Pin(0, 0, -1), Pin(3, 4, 2), Pin(8, 9, 2, -1)),
            ),
            "s5.flushed.only2~0=base~3-4=2~8-9=2_base+sector4096",
        ),
    ],
)
def test_an_id_is_read_as_it_is_printed(state: StateId, text: str) -> None:
    assert str(state) == text
    assert parse_state_id(text) == state


@pytest.mark.parametrize(
    "text",
    [
        *["", "s1", "s1.flushed", "s1.washed.must", "s1.flushed.must+", "s1.flushed.must+lost"],
        *["s1.flushed.but", "s1.flushed.but2,", "s1.flushed.but3,2", "s1.flushed.but2:4-3"],
        *["s1.flushed.draw7", "s1.flushed.must2", "s1.flushed.must~", "s1.flushed.must~1"],
        *["s1.flushed.must~2=1~1=1", "s01.flushed.must", f"s{10**18}.flushed.must"],
        *["s1.flushed.must~4-3=base", "s1.flushed.must~4=base_"],
        *["x1.flushed.must", "s1.flushed.some", "s-1.flushed.must", "s1.flushed.must+sector513"],
    ],
)
def test_anything_else_is_no_id(text: str) -> None:
    with pytest.raises(UsageError, match="is not the id of a crash state"):
        parse_state_id(text)


def test_a_state_of_another_recording_is_refused(make_source: MakeSource) -> None:
    with pytest.raises(UsageError, match="has 0 events"):
        open_state(make_source([]), parse_state_id("s1.flushed.must"))


def sectors(disk: CrashDisk) -> list[int]:
    return [disk.pread(at, 1)[0] for at in range(0, disk.size, 512)]


LOG: list[Received | Completed] = [
    *(Received(Command.WRITE, 0, 4), Completed(0)),
    *(Received(Command.TRIM, 1, 1), Completed(2)),
    *(Received(Command.FLUSH), Completed(4)),
    *(Received(Command.WRITE_ZEROES, 2, 1), Completed(6)),
    *(Received(Command.WRITE, 3, 2), Completed(8, error=5)),
    Received(Command.WRITE, 5, 2),
]
B = 0xFE


@pytest.mark.parametrize(
    ("state", "content"),
    [
        ("s11.nothing.must", [B, B, B, B, B, B, B, B]),
        ("s11.flushed.must", [1, 0, 1, 1, B, B, B, B]),
        ("s11.completed.must", [1, 0, 0, 1, B, B, B, B]),
        ("s11.received.must", [1, 0, 0, 1, B, 11, 11, B]),
        ("s11.nothing.all", [1, 0, 0, 1, B, 11, 11, B]),
        ("s9.nothing.all", [1, 0, 0, 9, 9, B, B, B]),
        ("s5.flushing.must", [1, 0, 1, 1, B, B, B, B]),
        ("s5.flushed.must", [B, B, B, B, B, B, B, B]),
    ],
)
def test_a_state_is_the_base_painted_in_order(
    make_source: MakeSource, state: str, content: list[int]
) -> None:
    assert sectors(open_state(make_source(LOG), parse_state_id(state))) == content


def test_of_two_durable_writes_at_once_the_later_received_shows(make_source: MakeSource) -> None:
    log: list[Received | Completed] = [
        Received(Command.WRITE, 0, 2),
        Received(Command.WRITE, 1, 2),
        Completed(1),
        Completed(0),
    ]
    log += [Received(Command.FLUSH), Completed(4)]
    disk = open_state(make_source(log), parse_state_id("s6.flushed.must"))
    assert sectors(disk)[:4] == [1, 2, 2, B]


def test_zeroes_are_no_data_and_neighbours_are_one_extent(make_source: MakeSource) -> None:
    disk = open_state(make_source(LOG), parse_state_id("s11.nothing.all"))
    assert list(disk.data_extents(0, disk.size)) == [Extent(0, 512), Extent(1536, 5 * 512)]
    assert list(disk.data_extents(100, 1000)) == [Extent(100, 412)]
    assert list(disk.data_extents(600, 300)) == []


def test_closing_closes_the_base_once() -> None:
    class Counted(MemoryDisk):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    base = Counted(512)
    source = MemorySource(table_of([]), 512, 0, lambda: base)
    disk = open_state(source, parse_state_id("s0.flushed.must"))
    disk.close()
    disk.close()
    assert base.closed == 1


def byte_table(requests: list[tuple[Command, int, int]]) -> tuple[RequestTable, bytes]:
    """A table in bytes rather than sectors: painting does not depend on any alignment."""
    is_write = np.array([command is Command.WRITE for command, _, _ in requests], np.bool_)
    length = np.array([length for _, _, length in requests], np.int64)
    behind = np.cumsum(np.where(is_write, length, 0))
    count = len(requests)
    table = RequestTable(
        seq=np.arange(count, dtype=np.int64) * 2,
        command=np.array([command for command, _, _ in requests], np.uint8),
        flags=np.zeros(count, np.uint16),
        connection=np.ones(count, np.uint32),
        offset=np.array([offset for _, offset, _ in requests], np.int64),
        length=length,
        position=np.where(is_write, behind - length, -1),
        completed=np.arange(count, dtype=np.int64) * 2 + 1,
        error=np.zeros(count, np.uint16),
    )
    return table, bytes(np.arange(int(behind[-1]) if count else 0) % 251 + 1)


SIZE = 200
requests = st.lists(
    st.tuples(
        st.sampled_from([Command.WRITE, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM]),
        st.integers(0, SIZE),
        st.integers(0, SIZE),
    ).map(lambda r: (r[0], r[1], min(r[2], SIZE - r[1]))),
    max_size=40,
)


@given(requests, st.data())
@settings(max_examples=200, deadline=None)
def test_painting_equals_a_bytearray(
    made: list[tuple[Command, int, int]], data: st.DataObject
) -> None:
    table, payload = byte_table(made)
    choice = np.array(data.draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made))))
    choice = choice.astype(np.bool_)
    expected = bytearray(b"\xff" * SIZE)
    for row in np.flatnonzero(choice):
        start, length, at = int(table.offset[row]), int(table.length[row]), int(table.position[row])
        expected[start : start + length] = payload[at : at + length] if at >= 0 else bytes(length)
    source = MemorySource(table, SIZE, len(made) * 2, lambda: MemoryDisk(b"\xff" * SIZE), payload)
    parts = tuple(
        RequestPart(int(table.seq[row])) for row in np.flatnonzero(choice & (table.length > 0))
    )
    chosen = Choice.ONLY if parts else Choice.MUST
    disk = open_state(source, StateId(source.events, Level.NOTHING, chosen, parts=parts))
    assert disk.pread(0, SIZE) == expected
    start = data.draw(st.integers(0, SIZE))
    length = data.draw(st.integers(0, SIZE - start))
    assert disk.pread(start, length) == expected[start : start + length]
    extents = list(disk.data_extents(start, length))
    holes = bytearray(length)
    for extent in extents:
        inside = slice(extent.offset - start, extent.end - start)
        holes[inside] = expected[extent.offset : extent.end]
    assert holes == expected[start : start + length]
    assert all(a.end < b.offset for a, b in pairwise(extents))


def test_many_overlapping_requests_equal_a_bytearray() -> None:
    """More cells than one chunk, and spans of every power of two."""
    random = np.random.default_rng(7)
    size = 1 << 20
    made = []
    for _ in range(80_000):
        length = int(2 ** random.uniform(0, 12))
        made.append((Command.WRITE, int(random.integers(0, size - length)), length))
    made[10] = (Command.WRITE, 0, size)
    table, payload = byte_table(made)
    expected = bytearray(size)
    for (_, start, length), at in zip(made, table.position.tolist(), strict=True):
        expected[start : start + length] = payload[at : at + length]
    source = MemorySource(table, size, 2 * len(made), lambda: MemoryDisk(size), payload)
    state = StateId(source.events, Level.COMPLETED, Choice.MUST)
    disk = open_state(source, state)
    assert disk.pread(0, size) == expected
