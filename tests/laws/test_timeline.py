"""Law: a state is the base with the requests that it names painted over it, byte for byte.

The painting here is slow and knows nothing of indexes: one request after the other, by seq. Disks
end inside a sector, and requests begin and end anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.states.naming import Choice, Pin, RequestPart, StateId, parse_state_id
from nbdproxy.crash.states.presence import ABSENT, WHOLE, Presence
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent
from nbdproxy.persistence.model import Coverage, Level, Options
from nbdproxy.recording.index import BASE, RequestTable
from nbdproxy.requests import Command
from tests.support import persistence_reference as reference
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received

CHANGES = [Command.WRITE, Command.WRITE, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM]
DRAWS = 40

Span = tuple[int, int]
"""Offset and length in bytes."""


class Holed(MemoryDisk):
    """A disk that knows where its zeroes are, in steps of 100 bytes."""

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        for start in range(offset, offset + length, 100):
            piece = Extent(start, min(100, offset + length - start))
            if any(self.pread(*piece)):
                yield piece


@dataclass(frozen=True)
class Made:
    """A made-up recording: the events, and for each changing request its bytes on the disk."""

    log: Sequence[Received | Completed]
    spans: dict[int, Span]
    base: bytes

    @property
    def data(self) -> dict[int, bytes]:
        """What each request leaves: no two bytes near each other are the same by chance."""
        return {seq: self._left(seq, length) for seq, (_, length) in self.spans.items()}

    def _left(self, seq: int, length: int) -> bytes:
        event = self.log[seq]
        assert isinstance(event, Received)
        if event.command is not Command.WRITE:
            return bytes(length)
        return np.random.default_rng(seq).integers(1, 256, length, np.uint8).tobytes()

    def timeline(self) -> Timeline:
        """The recording, opened."""
        table, data, payload = reference.table_of(self.log), self.data, bytearray()
        position = np.full(len(table), -1, np.int64)
        offset, length = np.zeros((2, len(table)), np.int64)
        for row, seq in enumerate(table.seq.tolist()):
            if seq in self.spans:
                offset[row], length[row] = self.spans[seq]
            if table.command[row] == Command.WRITE:
                position[row] = len(payload)
                payload += data[seq]
        columns = (table.seq, table.command, table.flags, table.connection, offset, length)
        table = RequestTable(*columns, position, table.completed, table.error)
        size, base = len(self.base), self.base
        return Timeline(
            MemorySource(table, size, len(self.log), lambda: Holed(base), bytes(payload))
        )

    def sectors(self, seq: int, sector: int) -> range:
        """The disk's sectors that a request touches."""
        offset, length = self.spans[seq]
        return range(offset // sector, -(-(offset + length) // sector))

    def legal(self, state: StateId) -> tuple[set[int], set[int]]:
        """What must be there in a state's cut, and what was sent."""
        must = reference.kept(self.log, state.position, state.level, state.options)
        replies = [e for e in self.log[: state.position] if isinstance(e, Completed)]
        failed = {reply.request for reply in replies if reply.error}
        return must, {seq for seq in self.spans if seq < state.position} - failed

    def whole(self, state: StateId) -> list[tuple[int, set[int] | None]]:
        """The requests on the disk, by seq, with those sectors of the disk that they have there."""
        must, sent = self.legal(state)
        sector = state.options.sector
        parts: dict[int, set[int]] = {}
        for part in state.parts:
            touched = self.sectors(part.seq, sector)
            named = touched if part.first is None else touched[part.first : part.last + 1]
            parts.setdefault(part.seq, set()).update(named)
        here: dict[int, set[int] | None] = dict.fromkeys(must)
        if state.choice in {Choice.ALL, Choice.BUT}:
            here |= dict.fromkeys(sent)
        for seq, inside in parts.items():
            if state.choice is Choice.BUT and seq in here:
                here[seq] = set(self.sectors(seq, sector)) - inside
            elif state.choice is Choice.ONLY and seq not in must:
                here[seq] = inside
        return sorted(here.items())

    def painted(self, state: StateId, here: Sequence[tuple[int, set[int] | None]]) -> bytes:
        """The disk, pins included."""
        disk, data, sector = bytearray(self.base), self.data, state.options.sector
        for seq, inside in here:
            offset, length = self.spans[seq]
            for at in range(offset, offset + length):
                if inside is None or at // sector in inside:
                    disk[at] = data[seq][at - offset]
        for pin in state.pins:
            for at in range(pin.first * sector, min((pin.last + 1) * sector, len(disk))):
                behind = pin.back is not None and at % sector >= sector // 2
                value = pin.back if behind and pin.back is not None else pin.front
                if value == BASE:
                    disk[at] = self.base[at]
                elif self.spans[value][0] <= at < sum(self.spans[value]):
                    disk[at] = data[value][at - self.spans[value][0]]
        return bytes(disk)


class Long(Made):
    """One whose requests were all answered at once and with success, for which that is quicker."""

    def legal(self, state: StateId) -> tuple[set[int], set[int]]:
        """What must be there in a state's cut, and what was sent."""
        below = {Level.NOTHING: 0, Level.COMPLETED: state.position - 1}
        flush = Received(Command.FLUSH)
        flushes = [at for at, event in enumerate(self.log[: state.position - 1]) if event == flush]
        below[Level.FLUSHED] = max(flushes, default=0)
        must = {seq for seq in self.spans if seq < below[state.level]}
        return must, {seq for seq in self.spans if seq < state.position}


@st.composite
def recordings(draw: st.DrawFn) -> Made:
    """Some tens of events over a disk of a few sectors that ends anywhere."""
    size = draw(st.integers(1, 5000))
    base = bytes(draw(st.integers(0, 500).map(lambda n: min(n, size))))
    base += np.random.default_rng(1).integers(1, 256, size - len(base), np.uint8).tobytes()
    log: list[Received | Completed] = []
    spans: dict[int, Span] = {}
    waiting: list[int] = []
    answers = st.booleans()
    for _ in range(draw(st.integers(0, 30))):
        if draw(answers) and waiting:
            request = waiting.pop(draw(st.integers(0, len(waiting) - 1)))
            log.append(Completed(request, draw(st.sampled_from([0, 0, 0, 5]))))
            continue
        waiting.append(len(log))
        connection = draw(st.integers(1, 2))
        if draw(st.integers(0, 4)) == 0:
            log.append(Received(Command.FLUSH, connection=connection))
            continue
        offset = draw(st.integers(0, size - 1))
        spans[len(log)] = offset, draw(st.integers(1, size - offset))
        fua = draw(st.integers(0, 5)) == 0
        log.append(Received(draw(st.sampled_from(CHANGES)), 0, 1, fua, connection))
    return Made(log, spans, base)


options = st.builds(
    Options,
    st.sampled_from(Coverage),
    st.sampled_from([512, 1024, 4096]),
    multi_conn=st.booleans(),
    fsyncgate=st.booleans(),
    losses=st.lists(st.integers(0, 30), max_size=2).map(tuple),
)


@st.composite
def states(draw: st.DrawFn, made: Made) -> StateId:
    """A state of any kind but a drawn one."""
    position = draw(st.integers(0, len(made.log)))
    chosen = draw(options)
    there = [seq for seq in made.spans if seq < position]
    kinds = [Choice.MUST, Choice.ALL, *([Choice.BUT, Choice.ONLY] * 2 if there else [])]
    choice = draw(st.sampled_from(kinds))
    parts: list[RequestPart] = []
    if choice in {Choice.BUT, Choice.ONLY}:
        for seq in sorted(draw(st.sets(st.sampled_from(there), min_size=1, max_size=4))):
            last = len(made.sectors(seq, chosen.sector)) - 1
            first = draw(st.integers(0, last))
            some = RequestPart(seq, first, draw(st.integers(first, last)))
            parts += draw(st.sampled_from([[RequestPart(seq)], [some], [RequestPart(seq), some]]))
    pins: list[Pin] = []
    sectors = -(-len(made.base) // chosen.sector)
    values = st.sampled_from([BASE, *there])
    bounds = sorted(draw(st.sets(st.integers(0, sectors), max_size=6)))
    for first, end in zip(bounds[::2], bounds[1::2], strict=False):
        pins.append(Pin(first, end - 1, draw(values), draw(st.none() | values)))
    level = draw(st.sampled_from(Level))
    return StateId(position, level, choice, chosen, tuple(parts), pins=tuple(pins))


@given(recordings(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_state_is_what_it_names_painted(made: Made, data: st.DataObject) -> None:
    timeline = made.timeline()
    for _ in range(4):
        state = data.draw(states(made))
        disk = timeline.open(parse_state_id(str(state)))
        assert disk.size == len(made.base)
        expected = made.painted(state, made.whole(state))
        assert disk.pread(0, disk.size) == expected, str(state)
        start = data.draw(st.integers(0, disk.size))
        length = data.draw(st.integers(0, disk.size - start))
        assert disk.pread(start, length) == expected[start : start + length]
        left, at = bytearray(expected), start
        for extent in disk.data_extents(start, length):
            assert at <= extent.offset < extent.end <= start + length, str(state)
            at = extent.end
            left[extent.offset : extent.end] = bytes(extent.length)
        assert not any(left[start : start + length]), str(state)


@given(recordings(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_drawn_state_has_all_that_must_and_nothing_that_never_came(
    made: Made, data: st.DataObject
) -> None:
    timeline = made.timeline()
    position, level = data.draw(st.integers(0, len(made.log))), data.draw(st.sampled_from(Level))
    chosen, seed = data.draw(options), data.draw(st.integers(0, 10**17))
    rows = np.flatnonzero(timeline.table.command != Command.FLUSH).astype(np.int32)
    rows = rows[timeline.table.seq[rows] < position]
    for number in range(5):
        state = StateId(position, level, Choice.DRAW, chosen, seed=seed, number=number)
        presence = Presence(timeline.durability(chosen), state)
        must, _ = made.legal(state)
        here: list[tuple[int, set[int] | None]] = []
        for row, how in zip(rows.tolist(), presence.of(rows).tolist(), strict=True):
            seq = int(timeline.table.seq[row])
            assert how == WHOLE or seq not in must, str(state)
            if how == WHOLE:
                here.append((seq, None))
            elif how != ABSENT:
                first = made.sectors(seq, chosen.sector).start
                torn = np.flatnonzero(presence.sectors(row)).tolist()
                here.append((seq, {first + at for at in torn}))
        disk = timeline.open(parse_state_id(str(state)))
        assert disk.pread(0, disk.size) == made.painted(state, here), str(state)


def test_lots_differ_and_repeat() -> None:
    log = [Received(Command.WRITE, 0, 1) for _ in range(6)]
    made = Made(log, {seq: (seq * 1024, 1024) for seq in range(6)}, bytes(6 * 1024))
    timeline = made.timeline()

    def drawn(seed: int) -> list[bytes]:
        ids = [f"s6.flushed.draw{seed}-{number}" for number in range(DRAWS)]
        return [timeline.open(parse_state_id(text)).pread(0, 6 * 1024) for text in ids]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert len(set(first)) > DRAWS // 3
    for seq in range(6):
        found = {disk[seq * 1024 : (seq + 1) * 1024] for disk in first}
        assert {bytes(1024), made.data[seq]} <= found, "each may be missing, and there"
    halves = {disk[at : at + 512] == bytes(512) for disk in first for at in (0, 512)}
    assert halves == {True, False}


def many(count: int, size: int, longest: int, seed: int) -> Long:
    """A long run of requests, each answered at once, a flush now and then."""
    rng = np.random.default_rng(seed)
    log: list[Received | Completed] = []
    spans: dict[int, Span] = {}
    for _ in range(count):
        offset = int(rng.integers(size))
        spans[len(log)] = offset, int(rng.integers(1, min(longest, size - offset) + 1))
        log += [Received(CHANGES[rng.integers(len(CHANGES))], 0, 1), Completed(len(log))]
        if not rng.integers(60):
            log += [Received(Command.FLUSH), Completed(len(log))]
    return Long(log, spans, rng.integers(1, 256, size, np.uint8).tobytes())


@pytest.mark.parametrize("seed", range(4))
def test_many_requests_in_one_read(seed: int) -> None:
    made = many(400, 20_000, 3000, seed)
    timeline = made.timeline()
    rng = np.random.default_rng(seed)
    seqs = list(made.spans)
    for choice in (Choice.MUST, Choice.ALL, Choice.BUT, Choice.ONLY):
        parts: list[RequestPart] = []
        for seq in sorted(rng.choice(seqs, 120, replace=False).tolist()):
            last = len(made.sectors(seq, 512)) - 1
            first = int(rng.integers(last + 1))
            parts.append(RequestPart(seq, first, last) if rng.integers(3) else RequestPart(seq))
        named = tuple(parts) if choice in {Choice.BUT, Choice.ONLY} else ()
        state = StateId(len(made.log), Level.FLUSHED, choice, parts=named)
        disk = timeline.open(parse_state_id(str(state)))
        expected = made.painted(state, made.whole(state))
        assert disk.pread(0, disk.size) == expected, str(state)[:40]
        for start in rng.integers(disk.size - 700, size=20).tolist():
            assert disk.pread(start, 700) == expected[start : start + 700]


def test_a_hot_block_with_thousands_of_rewrites() -> None:
    """A journal's superblock: what shows may be the newest, an old one, or far down."""
    log: list[Received | Completed] = []
    spans: dict[int, Span] = {}
    for number in range(6000):
        spans[len(log)] = (4096 + number % 3 * 100, 1000) if number % 50 else (0, 9000)
        log += [Received(Command.WRITE, 0, 1), Completed(len(log))]
    made = Long(log, spans, bytes([7]) * 9000)
    timeline = made.timeline()
    seqs = list(spans)
    last = seqs[-5:]
    for state in (
        StateId(len(log), Level.FLUSHED, Choice.ALL),
        StateId(len(log), Level.FLUSHED, Choice.BUT, parts=tuple(map(RequestPart, seqs[1000:]))),
        StateId(len(log), Level.FLUSHED, Choice.ONLY, parts=tuple(map(RequestPart, seqs[1:4]))),
        StateId(
            len(log), Level.FLUSHED, Choice.BUT, parts=tuple(RequestPart(s, 0, 0) for s in last)
        ),
        StateId(7001, Level.COMPLETED, Choice.MUST),
    ):
        disk = timeline.open(parse_state_id(str(state)))
        here = [(seq, inside) for seq, inside in made.whole(state) if inside != set()]
        # Only the newest few can show: slow painting of all would take minutes.
        newest = [at for at, (seq, _) in enumerate(here) if made.spans[seq][1] == 9000]
        shown = here[min(newest[-1] if newest else 0, max(len(here) - 60, 0)) :]
        assert disk.pread(0, 9000) == made.painted(state, shown), str(state)[:40]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s7.flushed.must", "has 6 events"),
        ("s6.flushed.but1", "no request 1 here"),  # a reply
        ("s6.flushed.but4", "no request 4 here"),  # a flush
        ("s6.flushed.only9", "no request 9 here"),
        ("s2.flushed.but2", "no request 2 here"),  # received after the cut
        ("s6.flushed.but0:2", "has only 2 sectors"),
        ("s6.flushed.must~0=1", "no request 1 here"),
        ("s6.flushed.must~0=0_4", "no request 4 here"),
        ("s2.flushed.must~0=2", "no request 2 here"),
        ("s6.flushed.must~2-3=base", "disk was larger"),
        ("s6.flushed.must~1=base+sector4096", "disk was larger"),
    ],
)
def test_a_state_of_another_recording_is_refused(text: str, why: str) -> None:
    write, flush = Received(Command.WRITE, 0, 1), Received(Command.FLUSH)
    log: list[Received | Completed] = [write, Completed(0), write, Completed(2)]
    log += [flush, Completed(4)]
    timeline = Made(log, {0: (500, 100), 2: (0, 1)}, bytes(1300)).timeline()
    assert timeline.open(parse_state_id("s6.flushed.but0:1~2=base")).size == 1300
    with pytest.raises(UsageError, match="of another recording") as refusal:
        timeline.open(parse_state_id(text))
    assert why in str(refusal.value)
