"""Law: a cache with a history lands what it should of every held write, whatever came before.

Writes, flushes that land or fail, FUA writes and write-backs come in any order, each landing in
two halves with writes in between, and a power cut lets some pieces survive. The reference keeps
every write for ever and asks for each sector of each, which has a few bytes here. Not covered:
several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.disks import held as held_module
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.volatile import Ticket, VolatileDisk

S = 7
"""Bytes that are looked at together: the cache knows no sectors."""
BASE = 0xFE


@dataclass(slots=True)
class Write:
    """One write, what became of it, and whether someone was promised that it lands alone.

    `value` is that of sector 0; each sector has its own, or 0 if they are zeroed.
    """

    order: int
    first: int
    end: int
    value: int
    fua: bool = False
    landed: bool = False
    dropped: bool = False
    ticket: Ticket | None = None

    def at(self, sector: int) -> int:
        """What it leaves in a sector."""
        return (self.value + sector) % 250 + 1 if self.value else 0


@dataclass(frozen=True, slots=True)
class Landing:
    """A flush of layers up to `layer` and of orders up to `order`, or that one write alone."""

    order: int
    layer: int = 0
    ticket: Ticket | None = None
    sync: bool = True


@dataclass(slots=True)
class Model:
    """All writes, and for each sector the value below and the newest write that landed there."""

    sectors: int
    below: list[int] = field(default_factory=list)
    landed: list[int] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.below, self.landed = [BASE] * self.sectors, [0] * self.sectors

    def free(self, write: Write) -> list[int]:
        """The sectors of a write over which nothing newer has landed."""
        return [s for s in range(write.first, write.end) if self.landed[s] < write.order]

    def listed(self) -> list[Write]:
        """What a power cut may let survive, a part at least."""
        return [w for w in self.writes if not (w.landed or w.dropped) and self.free(w)]

    def landing(self, job: Landing) -> list[Write]:
        """What a landing brings down, oldest first."""
        if job.ticket is None:
            return [w for w in self.writes if w.order <= job.order and not (w.landed or w.dropped)]
        one = self.writes[job.order - 1]
        return [] if one.landed or (one.dropped and not one.fua) else [one]

    def copy(self, job: Landing) -> None:
        """The first half of a landing: the disk below changes."""
        for write in self.landing(job):
            for sector in self.free(write):
                self.below[sector] = write.at(sector)

    def forget(self, job: Landing) -> None:
        """The second half: from now on it counts as landed."""
        for write in self.landing(job):
            for sector in self.free(write):
                self.landed[sector] = write.order
            write.landed = True

    def drop(self, job: Landing) -> None:
        """The flush failed instead."""
        for write in self.landing(job):
            write.dropped = True

    def newest(self, sector: int) -> Write | None:
        """The write that is read there."""
        return max(
            (w for w in self.writes if w.first <= sector < w.end),
            key=lambda w: w.order,
            default=None,
        )

    def shown(self) -> list[int]:
        """What is read: always the newest write, wherever it is."""
        found = [self.newest(sector) for sector in range(self.sectors)]
        return [BASE if one is None else one.at(sector) for sector, one in enumerate(found)]

    def held(self) -> int:
        """Sectors whose newest write is not below."""
        found = [(self.newest(s), self.landed[s]) for s in range(self.sectors)]
        return sum(write is not None and write.order > landed for write, landed in found)


def content(values: list[int]) -> bytes:
    """The disk that has these values in its sectors."""
    return b"".join(bytes([value]) * S for value in values)


class Run:
    """A cache and the model, driven together."""

    def __init__(self, sectors: int, *, history: bool) -> None:
        self.model = Model(sectors)
        self.history = history
        self.below = MemoryDisk(content(self.model.below))
        self.disk = VolatileDisk(self.below, history=history)
        self.waiting: list[Landing] = []
        self.copied: Landing | None = None

    def step(self, what: str, one: int, two: int) -> None:
        """Do one thing; `one` and `two` choose where, or which."""
        if what == "flush":
            self.waiting.append(Landing(len(self.model.writes), self.disk.freeze()))
        elif what == "write-back" and self.history:
            self.write_back(one, sync=bool(two % 2))
        elif what in ("copy", "fail"):
            fails = what == "fail"
            ready = [job for job in self.waiting if job.ticket is None or not fails]
            if self.copied is not None:
                self.forget()
            elif ready:
                job = ready[one % len(ready)]
                self.waiting.remove(job)
                self.land(job, fails=fails)
        elif what != "write-back":
            self.change(what, one, two)

    def change(self, what: str, first: int, count: int) -> None:
        """Write, zero or trim some sectors; each write's value is its own."""
        first %= self.model.sectors
        end = min(self.model.sectors, first + 1 + count % 4)
        write = Write(len(self.model.writes) + 1, first, end, 0)
        if what in ("write", "fua"):
            write.value = 7 * write.order
            self.disk.pwrite(first * S, content([write.at(sector) for sector in range(first, end)]))
        elif what == "trim":
            self.disk.trim(first * S, (end - first) * S)
        else:
            self.disk.zero(first * S, (end - first) * S, may_punch=False)
        self.model.writes.append(write)
        if what in ("fua", "zero-fua"):
            write.fua = True
            self.waiting.append(Landing(write.order, ticket=self.disk.issue_ticket()))

    def write_back(self, which: int, *, sync: bool) -> None:
        """The cache wants to get rid of one write; it lands later."""
        listed = self.model.listed()
        if listed:
            order = listed[which % len(listed)].order
            ticket = self.disk.issue_ticket(order)
            self.waiting.append(Landing(order, ticket=ticket, sync=sync))

    def land(self, job: Landing, *, fails: bool) -> None:
        """The first half of a landing; a flush may fail instead."""
        if job.ticket is not None:
            self.disk.copy_ticket_down(job.ticket, sync=job.sync)
        elif fails:
            self.disk.drop(job.layer)
            self.model.drop(job)
            return
        else:
            self.disk.copy_down(job.layer)
        self.model.copy(job)
        self.copied = job

    def forget(self) -> None:
        """The second half."""
        job, self.copied = self.copied, None
        if job is None:
            return
        if job.ticket is not None:
            self.disk.ticket_destaged(job.ticket)
        else:
            self.disk.destaged(job.layer)
        self.model.forget(job)

    def check(self) -> None:
        """Everything that can be seen is as the model says."""
        model = self.model
        assert self.below.pread(0, self.below.size) == content(model.below)
        assert self.disk.pread(0, self.disk.size) == content(model.shown())
        assert self.disk.held_bytes == S * model.held()
        assert self.disk.newest_order == len(model.writes)
        if self.history:
            listed = {ticket.held.order: ticket for ticket in self.disk.writes()}
            assert list(listed) == [write.order for write in model.listed()]
            for write in model.listed():
                write.ticket = listed[write.order]
                assert write.ticket[:2] == (write.first * S, (write.end - write.first) * S)

    def cut(self, chosen: list[tuple[int, int, int]]) -> None:
        """Some pieces survive, of writes that landed or were dropped none at all."""
        known = [write for write in self.model.writes if write.ticket is not None]
        pieces, survivors = [], []
        for which, first, count in chosen if known else []:
            write = known[which % len(known)]
            start = write.first + first % (write.end - write.first)
            end = min(write.end, start + 1 + count)
            assert write.ticket is not None
            pieces.append((write.ticket, start * S, end * S))
            survivors.append((write, range(start, end)))
        listed = self.model.listed()
        for write, sectors in sorted(survivors, key=lambda piece: piece[0].order):
            for sector in set(sectors) & set(self.model.free(write)) if write in listed else ():
                self.model.below[sector] = write.at(sector)
        self.disk.destage_pieces(iter(pieces))
        assert self.below.pread(0, self.below.size) == content(self.model.below)


STEPS = ["write"] * 4 + ["fua", "fua", "zero", "zero-fua", "trim", "flush", "flush", "fail", "fail"]
STEPS += ["copy"] * 5 + ["write-back"] * 4
step = st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9))
# Left alone, Hypothesis draws mostly short lists, in which few things can come together.
steps = st.integers(0, 40).flatmap(lambda least: st.lists(step, min_size=least, max_size=60))
cuts = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 3)), max_size=12)


@pytest.fixture(autouse=True, scope="module")
def housekeeping_all_the_time() -> Iterator[None]:
    """What is done only when there are many is done at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_module, "_PRUNE_AT_LEAST", 0)
        yield


@given(st.integers(1, 6), steps, cuts)
@settings(max_examples=500, deadline=None)
def test_a_cut_lands_what_it_may_of_the_history_and_nothing_else(
    sectors: int, chosen: list[tuple[str, int, int]], survivors: list[tuple[int, int, int]]
) -> None:
    run = Run(sectors, history=True)
    for what, one, two in chosen:
        run.step(what, one, two)
        run.check()
    run.forget()
    run.check()
    run.cut(survivors)
    run.disk.close()


@given(st.booleans(), st.integers(1, 4), steps)
@settings(max_examples=300, deadline=None)
def test_a_sync_lands_all_but_what_was_dropped(
    history: bool, sectors: int, chosen: list[tuple[str, int, int]]
) -> None:
    run = Run(sectors, history=history)
    for what, one, two in chosen:
        run.step(what, one, two)
        run.check()
    run.forget()
    run.disk.sync()
    everything = Landing(len(run.model.writes))
    run.model.copy(everything)
    run.model.forget(everything)
    run.check()
    run.disk.close()
