"""The states of one cut in stages, those first that are likeliest to fail.

    ends        none of the undecided requests, and all of them
    requests    each request missing, and each alone
    orders      overlapping requests in another order, and TRIMs that did nothing, each for itself
    sectors     each sector of a request of several sectors missing, and each alone
    pairs       each two requests missing, and each two alone, neighbours first
    samples     random states, without end: each legal subset has a probability above 0
    rest        instead of sectors, pairs and samples, if states are few: all of them
    torn        on request, and beyond the model: each sector half written
    stale       on request, and beyond the model: each request missing that must be there
    exhaustive  on request, instead of all these: every state of the model

The same space, seed and stage always give the same states in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from nbdproxy.crash.explore.crash_space import CrashSpace, StateChange
from nbdproxy.crash.states.naming import Choice, Pin, RequestPart, StateId
from nbdproxy.dice import key_of, mix
from nbdproxy.recording.index import Numbers


class Stage(StrEnum):
    """See the module."""

    ENDS = "ends"
    REQUESTS = "requests"
    ORDERS = "orders"
    TORN = "torn"
    STALE = "stale"
    SECTORS = "sectors"
    PAIRS = "pairs"
    SAMPLES = "samples"
    REST = "rest"
    EXHAUSTIVE = "exhaustive"


SMALL_MAX = 4096
"""States that are few: they are all visited, each once, if the budget allows."""

BEYOND = frozenset({Stage.TORN, Stage.STALE})
"""The stages whose states the model does not allow."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A state to look at, and how it differs from an end of its cut."""

    state: StateId
    stage: Stage
    change: StateChange


class Stages:
    """The stages of one space; `torn` and `stale` ask for those stages, `few` states get a rest."""

    def __init__(
        self,
        space: CrashSpace,
        *,
        seed: int = 0,
        torn: bool = False,
        stale: bool = False,
        exhaustive: bool = False,
        few: int = SMALL_MAX,
    ) -> None:
        self._space = space
        self._seed = seed
        self._table = space.timeline.table
        self._wanted = {Stage.TORN: torn, Stage.STALE: stale}
        self._exhaustive = exhaustive
        self._few = few
        self._named = self._undecided_seqs()
        self._everything = replace(space.state, choice=Choice.ALL)

    @property
    def small(self) -> bool:
        """Whether all states are visited in the end: they are few, and each can be named."""
        space = self._space
        few = space.states_log10 < 18 and space.states <= self._few
        return few and not self._exhaustive and space.is_complete

    def sizes(self) -> dict[Stage, int | None]:
        """Return how many states each stage has, in the stages' order; None is no end."""
        space = self._space
        if self._exhaustive:
            return {Stage.EXHAUSTIVE: space.states}
        count = len(self._named)
        found: dict[Stage, int | None] = {
            Stage.ENDS: 2 if len(space.sectors) else 1,
            Stage.REQUESTS: 2 * count,
            Stage.ORDERS: len(self._hidden()),
            Stage.TORN: 2 * len(self._pieces(alone=True)),
            Stage.STALE: len(space.durable),
        }
        if self.small:
            found[Stage.REST] = space.states - len(self._end_hashes())
        else:
            found[Stage.SECTORS] = 2 * len(self._pieces(alone=False))
            found[Stage.PAIRS] = count * (count - 1)
            found[Stage.SAMPLES] = None if len(space.sectors) else 0
        return {stage: n for stage, n in found.items() if self._wanted.get(stage, True)}

    def visits(self, stage: Stage) -> Iterator[Visit]:
        """Yield the states of one stage."""
        if stage in {Stage.REST, Stage.EXHAUSTIVE}:
            known = self._end_hashes() if stage is Stage.REST else ()
            for state, change in self._every():
                if change.hash not in known:
                    yield Visit(state, stage, change)
            return
        for state in self._states(stage):
            yield Visit(state, stage, self._space.change(state))

    def _states(self, stage: Stage) -> Iterator[StateId]:
        makers: dict[Stage, Callable[[], Iterator[StateId]]] = {
            Stage.ENDS: self._ends,
            Stage.REQUESTS: self._requests,
            Stage.ORDERS: self._orders,
            Stage.TORN: self._torn,
            Stage.STALE: self._stale,
            Stage.SECTORS: self._sectors,
            Stage.PAIRS: self._pairs,
            Stage.SAMPLES: self._samples,
        }
        return makers[stage]()

    def _ends(self) -> Iterator[StateId]:
        yield self._space.state
        if len(self._space.sectors):
            yield self._everything

    def _end_hashes(self) -> set[int]:
        return {self._space.must_hash, self._space.ends.hash}

    def _requests(self) -> Iterator[StateId]:
        for seq in self._named:
            yield from self._without_and_alone(RequestPart(seq))

    def _orders(self) -> Iterator[StateId]:
        for pins in self._hidden():
            yield replace(self._space.state, pins=pins)

    def _sectors(self) -> Iterator[StateId]:
        for row, sector in self._pieces(alone=False).tolist():
            at = sector - self._space.first_sector(row)
            yield from self._without_and_alone(RequestPart(int(self._table.seq[row]), at, at))

    def _pairs(self) -> Iterator[StateId]:
        for step in range(1, len(self._named)):
            for one, other in zip(self._named, self._named[step:], strict=False):
                yield from self._without_and_alone(RequestPart(one), RequestPart(other))

    def _samples(self) -> Iterator[StateId]:
        for number in itertools.count() if len(self._space.sectors) else ():
            yield replace(self._space.state, choice=Choice.DRAW, seed=self._seed, number=number)

    def _stale(self) -> Iterator[StateId]:
        for row in self._space.durable[::-1].tolist():
            yield self._but(RequestPart(int(self._table.seq[row])))

    def _without_and_alone(self, *parts: RequestPart) -> Iterator[StateId]:
        yield self._but(*parts)
        yield replace(self._space.state, choice=Choice.ONLY, parts=parts)

    def _but(self, *parts: RequestPart) -> StateId:
        return replace(self._space.state, choice=Choice.BUT, parts=parts)

    def _undecided_seqs(self) -> list[int]:
        """Return the seqs of the undecided requests that are a value of some sector."""
        rows = np.unique(self._space.values.rows)
        return [int(self._table.seq[row]) for row in rows[np.isin(rows, self._space.may)].tolist()]

    def _pieces(self, *, alone: bool) -> Numbers:
        """Return row and sector of each undecided sector of the undecided requests, shuffled.

        Unless `alone`, those of requests with one open sector are left out.
        """
        values = self._space.values
        sectors = np.repeat(values.sectors, np.diff(values.start))
        undecided = np.isin(values.rows, self._space.may)
        rows, sectors = values.rows[undecided].astype(np.int64), sectors[undecided]
        if not alone:
            several = np.bincount(rows, minlength=1)[rows] > 1
            rows, sectors = rows[several], sectors[several]
        key = key_of(self._seed, "pieces")
        order = np.argsort(mix(np.arange(len(rows), dtype=np.uint64), key), kind="stable")
        return np.stack((rows[order], sectors[order]), axis=1)

    def _hidden(self) -> list[tuple[Pin, ...]]:
        """Return pins for the values that no subset shows: those older than what must be there."""
        values = self._space.values
        sector = np.repeat(np.arange(len(values.sectors)), np.diff(values.start))
        entries = np.arange(len(values.rows))
        hidden = (entries < values.must[sector]) & self._space.first
        # A request that covers a sector in part is shown by naming it.
        hidden &= ~(values.ragged[sector] & np.isin(values.rows, self._space.may))
        return [
            self._space.pins(sector[at], at)
            for row in np.unique(values.rows[hidden]).tolist()
            for at in [np.flatnonzero(hidden & (values.rows == row))]
        ]

    def _torn(self) -> Iterator[StateId]:
        values = self._space.values
        for row, sector in self._pieces(alone=True).tolist():
            at = int(np.searchsorted(values.sectors, sector))
            before = int(values.rows[values.must[at]])
            old = self._table.seq_of(before)
            new = int(self._table.seq[row])
            yield replace(self._everything, pins=(Pin(sector, sector, new, old),))
            yield replace(self._everything, pins=(Pin(sector, sector, old, new),))

    def _every(self) -> Iterator[tuple[StateId, StateChange]]:
        """Yield the product of all sectors' values, what must be there first."""
        space = self._space
        values = space.values
        choices = []
        for index, must in enumerate(values.must.tolist()):
            here = range(int(values.start[index]), int(values.start[index + 1]))
            others = [
                at for at in here if space.first[at] and values.digests[at] != values.digests[must]
            ]
            choices.append([must, *others])
        for number, mixture in enumerate(space.mixtures):
            choices[mixture.at].append(len(values.rows) + number)
        for entries in itertools.product(*choices):
            yield space.pinned(np.array(entries, np.int64))
