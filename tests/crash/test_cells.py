"""Cells, pairs and digests, each against a few slow lines."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from nbdproxy.crash.explore.contents import Contents, mixed, sector_digests
from nbdproxy.crash.states.cells import Cells, concurrent_pairs
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent, expand
from nbdproxy.recording.index import BASE, NEVER, RequestTable
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource

SIZE_MAX = 9000
SECTORS = st.sampled_from([512, 1024, 4096])


@st.composite
def tables(draw: st.DrawFn, size: int) -> RequestTable:
    """Requests anywhere on a disk, answered in any order or never; some are empty."""
    events: list[tuple[int, int, int]] = []  # command, offset, length
    replies: dict[int, int] = {}
    seqs: list[int] = []
    waiting: list[int] = []
    answers = st.booleans()
    for seq in range(draw(st.integers(0, 30))):
        if draw(answers) and waiting:
            replies[waiting.pop(draw(st.integers(0, len(waiting) - 1)))] = seq
        else:
            command = draw(st.sampled_from([1, 1, 1, 3, 4, 6]))
            # Often whole sectors, so that not every cell is ragged.
            step = draw(st.sampled_from([1, 512, 512, 1024]))
            offset = draw(st.integers(0, (size - 1) // step)) * step
            length = draw(st.integers(0, min((size - offset) // step, 4096))) * step
            length = 0 if command == Command.FLUSH else length
            waiting.append(len(events))
            events.append((command, offset if length else 0, length))
            seqs.append(seq)
    columns = np.array(events, np.int64).reshape(-1, 3)
    commands, offsets, lengths = columns.T
    writes = np.where(commands == Command.WRITE, lengths, 0)
    position = np.where(commands == Command.WRITE, np.cumsum(writes) - writes, -1)
    count = len(events)
    return RequestTable(
        seq=np.array(seqs, np.int64),
        command=commands.astype(np.uint8),
        flags=np.zeros(count, np.uint16),
        connection=np.ones(count, np.uint32),
        offset=offsets,
        length=lengths,
        position=position,
        completed=np.array([replies.get(row, NEVER) for row in range(count)], np.int64),
        error=np.zeros(count, np.uint16),
    )


@st.composite
def made_up(draw: st.DrawFn) -> tuple[RequestTable, int, int, list[Extent]]:
    """A table, the size of a sector and of the disk, and where the disk had data before."""
    size = draw(st.sampled_from([1, 300, 4096, SIZE_MAX]))
    bounds = sorted(draw(st.sets(st.sampled_from(range(0, size + 1, 100)), max_size=6)))
    data = [Extent.between(low, high) for low, high in zip(bounds[::2], bounds[1::2], strict=False)]
    return draw(tables(size)), draw(SECTORS), size, data


def touching(table: RequestTable, low: int, high: int) -> list[int]:
    """The changing requests that touch a range of bytes."""
    return [
        row
        for row in range(len(table))
        if table.length[row] and table.offset[row] < high
        if table.offset[row] + table.length[row] > low
    ]


@given(made_up())
@settings(max_examples=80, deadline=None)
def test_a_cell_is_what_the_same_requests_touch(
    made: tuple[RequestTable, int, int, list[Extent]],
) -> None:
    table, sector, size, data = made
    cells = Cells(table, sector, size, data)
    assert len(cells) == len(cells.lengths) == max(len(cells.bounds) - 1, 0)
    assert (np.diff(cells.bounds) > 0).all()
    assert len(cells) <= 4 * len(table) + 2 * len(data)
    bounds = cells.bounds.tolist()
    for cell, (first, end) in enumerate(pairwise(bounds)):
        inside = [touching(table, at * sector, (at + 1) * sector) for at in range(first, end)]
        for rows in inside:
            assert rows == inside[0]
            assert rows == [row for row in rows if cells.low[row] <= cell < cells.high[row]]
        low, high = first * sector, end * sector
        partly = any(
            table.offset[row] > low or table.offset[row] + table.length[row] < high
            for row in inside[0]
        )
        if partly:
            assert cells.ragged[cell]
        if cells.ragged[cell]:
            assert end - first == 1
            assert partly or high > size
        assert cells.base_data[cell] or all(e.offset >= high or e.end <= low for e in data)
    for row in range(len(table)):
        pieces = range(cells.low[row], cells.high[row])
        covered = [at for cell in pieces for at in range(bounds[cell], bounds[cell + 1])]
        offset, length = int(table.offset[row]), int(table.length[row])
        expected = range(offset // sector, -(-(offset + length) // sector)) if length else []
        assert covered == list(expected)


@given(made_up(), st.data())
@settings(max_examples=60, deadline=None)
def test_owners_and_pairs(
    made: tuple[RequestTable, int, int, list[Extent]], data: st.DataObject
) -> None:
    table, sector, size, extents = made
    cells = Cells(table, sector, size, extents)
    changing = [row for row in range(len(table)) if table.length[row]]
    some = sorted(data.draw(st.sets(st.sampled_from(changing)))) if changing else []
    rows = np.array(some, np.int32)
    where, who = cells.pairs(rows)
    expected = [(c, r) for r in some for c in range(cells.low[r], cells.high[r])]
    assert list(zip(where.tolist(), who.tolist(), strict=True)) == expected
    owners = np.full(len(cells), BASE, np.int32)
    touched = cells.raise_owners(owners, rows)
    assert touched.tolist() == sorted({cell for cell, _ in expected})
    for cell, owner in enumerate(owners.tolist()):
        assert owner == max([r for c, r in expected if c == cell], default=BASE)
    told = cells.writes_data(who, where)
    assert told.tolist() == [table.command[row] == Command.WRITE for _, row in expected]
    nothing = np.full(len(where), BASE, np.int32)
    assert (cells.writes_data(nothing, where) == cells.base_data[where]).all()


@given(tables(SIZE_MAX))
@settings(max_examples=80, deadline=None)
def test_pairs_in_flight_at_once(table: RequestTable) -> None:
    changing = [row for row in range(len(table)) if table.length[row]]
    end = table.offset + table.length
    expected = {
        (one, other)
        for one, other in combinations(changing, 2)
        if table.completed[one] > table.seq[other]
        if table.offset[one] < end[other] and table.offset[other] < end[one]
    }
    earlier, later = concurrent_pairs(table)
    found = list(zip(earlier.tolist(), later.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(made_up(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_digests_are_of_what_is_there(
    made: tuple[RequestTable, int, int, list[Extent]], seed: int
) -> None:
    table, sector, size, extents = made
    assume(len(table))  # nothing is ever asked of a recording without requests
    rng = np.random.default_rng(seed)
    base = bytearray(size)
    for extent in extents:
        base[extent.offset : extent.end] = rng.integers(0, 256, extent.length, np.uint8).tobytes()
    writes = table.length[np.equal(table.command, Command.WRITE)]
    payload = rng.integers(0, 256, int(writes.sum()), np.uint8).tobytes()
    timeline = Timeline(MemorySource(table, size, 99, lambda: MemoryDisk(bytes(base)), payload))
    cells = Cells(table, sector, size, extents)
    contents = Contents(timeline, cells)
    whole = [cell for cell in range(len(cells)) if not cells.ragged[cell]]
    asked: list[tuple[int, int, int, bytes]] = []
    for cell in whole:
        for at in range(int(cells.bounds[cell]), int(cells.bounds[cell + 1])):
            before = bytes(base[at * sector : (at + 1) * sector]).ljust(sector, b"\0")
            asked.append((BASE, cell, at, before))
            for row in touching(table, at * sector, (at + 1) * sector):
                start = int(table.position[row]) + at * sector - int(table.offset[row])
                is_write = table.command[row] == Command.WRITE
                here = payload[start : start + sector] if is_write else bytes(sector)
                asked.append((row, cell, at, here))
    # Twice, and in another order: what is worked out once has to hold.
    for order in (asked, asked[::-1]):
        rows = np.array([row for row, *_ in order], np.int32)
        where, at_ = (np.array([entry[i] for entry in order], np.int64) for i in (1, 2))
        found = contents.of(rows, where, at_).tolist()
        assert found == [xxh3_64_intdigest(here) for *_, here in order]
    every = np.arange(-(-size // sector))
    last = every[rng.random(len(every)) < 0.6]
    padded = bytes(base).ljust(len(every) * sector, b"\0")
    told = sector_digests(MemoryDisk(bytes(base)), last, sector).tolist()
    assert told == [xxh3_64_intdigest(padded[s * sector : (s + 1) * sector]) for s in last]


def test_what_a_sector_adds_hangs_on_place_and_content() -> None:
    places, digests = np.arange(100), np.arange(100, 200, dtype=np.uint64)
    straight = mixed(places, digests)
    assert len(set(straight.tolist())) == 100
    assert not np.intersect1d(straight, mixed(places[::-1], digests)).size
    assert int(straight.sum(dtype=np.uint64)) != int(
        mixed(places[::-1], digests).sum(dtype=np.uint64)
    )


def test_expand() -> None:
    starts, counts = np.array([5, 0, 9, 2]), np.array([2, 3, 0, 1])
    assert expand(starts, counts).tolist() == [5, 6, 0, 1, 2, 2]
    assert expand(starts[:0], counts[:0]).tolist() == []
