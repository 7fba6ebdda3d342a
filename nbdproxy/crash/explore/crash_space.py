"""`CrashSpace`: the set of all disks that the model allows at one cut, sector by sector.

A sector is *undecided* if the model allows several contents of it. Of such sectors the space has
the values that each may hold; values with the same content are one. The product of the sectors'
values is the set of disks (see `crash_space_builder` for how they are found, and for what is not
covered).

`CrashSpace.change` tells how any state of the cut differs from the nearer of its two ends, MUST and
ALL, in time that grows with what the state names, not with the disk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nbdproxy.crash.explore.contents import SectorDigests, mixed, sector_digests
from nbdproxy.crash.states.naming import Choice, Pin, RequestPart, StateId
from nbdproxy.crash.states.presence import TORN, WHOLE, Presence, sectors_of
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.extents import expand, join_neighbours
from nbdproxy.recording.index import BASE, Mask, Numbers, Rows


@dataclass(frozen=True, slots=True, eq=False)
class StateChange:
    """How a state differs from one of the two ends of its cut.

    reference  MUST or ALL
    sectors    numbers of the disk's sectors whose content differs, ascending
    moved      what each of them adds to the hash of the reference; sums wrap around
    hash       of the state's whole content: equal hashes mean equal disks
    """

    reference: Choice
    sectors: Numbers
    moved: SectorDigests
    hash: int


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """What sectors may hold; arrays of values have one entry for each sector and value.

    sectors    numbers of the sectors on the disk, ascending
    start      where each sector's entries begin; one more at the end
    rows       the request that an entry is of, or BASE for what was there before the recording;
               ascending within a sector
    digests    the entry's content
    must       for each sector the entry that shows if nothing that may be there is
    ragged     for each sector whether some request covers it only in part
    """

    sectors: Numbers
    start: Numbers
    rows: Rows
    digests: SectorDigests
    must: Numbers
    ragged: Mask


class Mixture(NamedTuple):
    """What a sector may hold that no single value is: parts of several requests.

    `at` is the position of the sector in `Values.sectors`.
    """

    at: int
    pin: Pin
    digest: np.uint64


FindMixtures = Callable[[StateId, Values], "tuple[list[Mixture], bool]"]
"""Returns the mixtures of a space, and whether all of them were found."""

_FEW_LOG10 = 7
"""Mixtures are looked for where so few states can be listed one by one."""


class CrashSpace:
    """The undecided sectors of one cut, and what each may hold.

    state    MUST at that cut
    may      the undecided rows: received, changing, and not kept for certain
    durable  the rows that must be there, and show somewhere
    """

    def __init__(
        self,
        state: StateId,
        timeline: Timeline,
        values: Values,
        rows: tuple[Rows, Rows],
        *,
        must_hash: int,
        find_mixtures: FindMixtures = lambda _state, _values: ([], True),
    ) -> None:
        self.state = state
        self.timeline = timeline
        self.may, self.durable = may, _ = rows
        self.values = values
        self.sectors, self.start = values.sectors, values.start
        self._first_sector = timeline.table.offset // state.options.sector
        everywhere = np.arange(len(self.sectors))
        self.first = first_of_content(self.start, values.digests)
        self.must_hash = must_hash
        self._must = self._contents(state, everywhere, values.must)
        self._undecided = frozenset(may.tolist())
        everything = replace(state, choice=Choice.ALL)
        counts = np.diff(self.start)
        presence = Presence(timeline.durability(state.options), everything)
        entries = np.arange(len(values.rows))
        self._in_all = self._there(presence, entries, np.repeat(self.sectors, counts))
        self._in_all[values.must] = True
        self.all = _newest(entries, self._in_all, counts)
        """For each sector the entry that shows if all that was sent is there."""
        self._all = self._contents(everything, everywhere, self.all)
        moved = mixed(self.sectors, self._all) - mixed(self.sectors, self._must)
        differs = self._all != self._must
        self.ends = StateChange(
            Choice.MUST, self.sectors[differs], moved[differs], _add(must_hash, moved)
        )
        """How ALL differs from MUST."""
        self._find_mixtures = find_mixtures

    @cached_property
    def _mixtures(self) -> tuple[list[Mixture], bool]:
        values = self._single_values.astype(np.float64)
        if self.values.ragged.any() and float(np.log10(values).sum()) > _FEW_LOG10:
            return [], False
        return self._find_mixtures(self.state, self.values)

    @property
    def mixtures(self) -> list[Mixture]:
        """What sectors may hold besides their values, where states are few."""
        return self._mixtures[0]

    @property
    def is_complete(self) -> bool:
        """Whether values and mixtures are all that sectors may hold, so that states are counted."""
        return self._mixtures[1]

    @cached_property
    def _single_values(self) -> Numbers:
        counted: Numbers = np.add.reduceat(self.first, self.start[:-1], dtype=np.int64)
        return counted

    @cached_property
    def choices(self) -> Numbers:
        """For each sector the number of its different contents."""
        found = self._single_values.copy()
        for mixture in self.mixtures:
            found[mixture.at] += 1
        return found

    @cached_property
    def states_log10(self) -> float:
        """The decimal logarithm of the number of states."""
        return float(np.log10(self.choices.astype(np.float64)).sum())

    @cached_property
    def states(self) -> int:
        """The number of states: of disks with different contents."""
        counted = Counter(self.choices.tolist())
        return math.prod(count**times for count, times in counted.items())

    def first_sector(self, row: int) -> int:
        """Return the number of the first sector that a request touches."""
        return int(self._first_sector[row])

    def span(self, row: int) -> tuple[int, int]:
        """Return the positions of the sectors that a request touches: first, and behind last."""
        first, last = sectors_of(self.timeline.table, row, self.state.options.sector)
        low, high = np.searchsorted(self.sectors, (first, last)).tolist()
        return low, high

    def change(self, state: StateId) -> StateChange:
        """Return how a state of this cut differs from the nearer of MUST and ALL."""
        if state.choice is Choice.MUST and not state.pins:
            return StateChange(Choice.MUST, self.sectors[:0], self._must[:0], self.must_hash)
        if state.choice is Choice.ALL and not state.pins:
            return StateChange(Choice.ALL, self.sectors[:0], self._must[:0], self.ends.hash)
        rows = [self.timeline.table.rows_before(part.seq) for part in state.parts]
        if state.pins or not self._undecided.issuperset(rows):
            return self._read_change(state, rows)
        if state.choice is Choice.DRAW:
            where = np.arange(len(self.sectors))
            return self._changed(state, where, self._shown(state, where))
        spans = [np.arange(*self.span(row)) for row in dict.fromkeys(rows)]
        where = spans[0] if len(spans) == 1 else np.unique(np.concatenate(spans))
        return self._changed(state, where, self._shown_named(state, where, rows))

    def pinned(self, entries: Numbers) -> tuple[StateId, StateChange]:
        """Return the state in which these entries show, one for each undecided sector.

        Behind the entries of the values come the mixtures, numbered on.
        """
        count = len(self.values.rows)
        mixed = [self.mixtures[entry - count] for entry in entries[entries >= count].tolist()]
        single = entries < count
        plain = np.flatnonzero(single)
        plain = plain[self.values.digests[entries[plain]] != self._must[plain]]
        shown = entries[plain]
        # A request that covers a sector in part is laid in its place among the others.
        partly = self.values.ragged[plain] & np.isin(self.values.rows[shown], self.may)
        pins = self.pins(plain[~partly], shown[~partly])
        pins = tuple(sorted((*pins, *(one.pin for one in mixed)), key=lambda pin: pin.first))
        state = replace(self.state, pins=pins)
        if partly.any():
            parts = self._parts(plain[partly], shown[partly])
            state = replace(state, choice=Choice.ONLY, parts=parts)
        where = np.concatenate((plain, np.flatnonzero(~single)))
        where.sort()
        # What is said of a mixture's sector is read, so any value of it will do.
        stand_in = np.where(single[where], entries[where], self.values.must[where])
        return state, self._changed(state, where, stand_in)

    def _parts(self, where: Numbers, entries: Numbers) -> tuple[RequestPart, ...]:
        rows = self.values.rows[entries]
        at = (self.sectors[where] - self._first_sector[rows]).tolist()
        seqs = self.timeline.table.seq[rows].tolist()
        return tuple(sorted(RequestPart(seq, k, k) for seq, k in zip(seqs, at, strict=True)))

    def _changed(self, state: StateId, where: Numbers, shown: Numbers) -> StateChange:
        near, contents, start = self._nearer(state)
        new = self._contents(state, where, shown)
        return _change(near, self.sectors[where], (contents[where], new), start)

    def _nearer(self, state: StateId) -> tuple[Choice, SectorDigests, int]:
        if state.choice in {Choice.ALL, Choice.BUT}:
            return Choice.ALL, self._all, self.ends.hash
        return Choice.MUST, self._must, self.must_hash

    def _read_change(self, state: StateId, rows: list[int]) -> StateChange:
        """The same by reading the sectors that a state names, wherever they are."""
        size, table = state.options.sector, self.timeline.table
        spans = [sectors_of(table, row, size) for row in rows]
        spans += [(pin.first, pin.last + 1) for pin in state.pins]
        named = [np.arange(*span) for span in spans]
        if state.choice is Choice.DRAW:
            named.append(self.sectors)
        sectors = np.unique(np.concatenate(named))
        near, _, start = self._nearer(state)
        reference = self.timeline.open(replace(self.state, choice=near))
        old = sector_digests(reference, sectors, size)
        new = sector_digests(self.timeline.open(state), sectors, size)
        return _change(near, sectors, (old, new), start)

    def _contents(self, state: StateId, where: Numbers, shown: Numbers) -> SectorDigests:
        """Return what is in some sectors; where requests end inside one, it has to be read."""
        found = self.values.digests[shown]
        ragged = np.flatnonzero(self.values.ragged[where])
        if len(ragged):
            disk = self.timeline.open(state)
            sectors = self.sectors[where[ragged]]
            found[ragged] = sector_digests(disk, sectors, state.options.sector)
        return found

    def _shown(self, state: StateId, where: Numbers) -> Numbers:
        """Return the entries that show in some sectors, pins aside: the newest that are there."""
        counts = np.diff(self.start)[where]
        entries = expand(self.start[where], counts)
        presence = Presence(self.timeline.durability(state.options), state)
        there = self._there(presence, entries, np.repeat(self.sectors[where], counts))
        there |= entries == np.repeat(self.values.must[where], counts)
        return _newest(entries, there, counts)

    def _shown_named(self, state: StateId, where: Numbers, rows: list[int]) -> Numbers:
        """The same for a state that names parts of undecided requests."""
        counts = self.start[where + 1] - self.start[where]
        entries = expand(self.start[where], counts)
        alone = state.choice is Choice.ONLY
        if alone:
            there = entries == np.repeat(self.values.must[where], counts)
        else:
            there = self._in_all[entries]
        for row, part in zip(rows, state.parts, strict=True):
            named = self.values.rows[entries] == row
            if part.first is not None:
                at = np.repeat(self.sectors[where], counts) - self._first_sector[row]
                named &= (at >= part.first) & (at <= part.last)
            there[named] = alone
        return _newest(entries, there, counts)

    def _there(self, presence: Presence, entries: Numbers, sectors: Numbers) -> Mask:
        rows = self.values.rows[entries]
        written = np.unique(rows[rows != BASE])
        how = presence.of(written)
        there = np.zeros(len(entries), np.bool_)
        known = np.flatnonzero(rows != BASE)
        there[known] = how[np.searchsorted(written, rows[known])] == WHOLE
        for row in written[how == TORN].tolist():
            at = np.flatnonzero(rows == row)
            there[at] = presence.sectors(row)[sectors[at] - self._first_sector[row]]
        return there

    def pins(self, where: Numbers, entries: Numbers) -> tuple[Pin, ...]:
        """Return the pins that make one entry show in each of some undecided sectors."""
        rows = self.values.rows[entries].tolist()
        pins = (
            Pin(sector, sector, self.timeline.table.seq_of(row))
            for sector, row in zip(self.sectors[where].tolist(), rows, strict=True)
        )
        return tuple(join_neighbours(pins, Pin.joined))


def _newest(entries: Numbers, there: Mask, counts: Numbers) -> Numbers:
    """Return for each run of `counts` entries the last that is there."""
    if not len(entries):
        return entries
    newest: Numbers = np.maximum.reduceat(np.where(there, entries, -1), np.cumsum(counts) - counts)
    return newest


def _change(
    near: Choice, sectors: Numbers, contents: tuple[SectorDigests, SectorDigests], start: int
) -> StateChange:
    old, new = contents
    differs = old != new
    sectors = sectors[differs]
    moved = mixed(sectors, new[differs]) - mixed(sectors, old[differs])
    return StateChange(near, sectors, moved, _add(start, moved))


def _add(start: int, moved: SectorDigests) -> int:
    return (start + int(moved.sum(dtype=np.uint64))) % 2**64


def first_of_content(start: Numbers, digests: SectorDigests) -> Mask:
    """Mark the entries whose content no earlier entry of their sector has."""
    sector = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = np.lexsort((digests, sector))
    first = np.ones(len(digests), np.bool_)
    again = (sector[order][1:] == sector[order][:-1]) & (digests[order][1:] == digests[order][:-1])
    first[order[1:][again]] = False
    return first
