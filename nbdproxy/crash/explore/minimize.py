"""Minimizing: the fewest writes that have to be missing for a state to fail.

Whatever a state shows, each of its sectors may also show what ALL shows, and the result is as legal
as the state was. So those sectors that differ from ALL are given back, half of them, a quarter and
so on (`nbdproxy.delta_debugging`), first all of a request's together, then piece by piece, as long
as the state fails.

Guarantees: the result fails, and passes (or is unknown) if any one of its requests, and then any
one of its runs of sectors, is given back; where requests end inside a sector, it is given back as
a whole. A single request that is enough is found if there is one
among the first `SINGLES_MAX`. Not covered: a smaller set of several that is no subset of what was
found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nbdproxy.crash.explore.evaluator import Judged, StateEvaluator, Unit
from nbdproxy.crash.states.naming import Choice, Pin, RequestPart, StateId
from nbdproxy.crash.states.presence import sectors_of
from nbdproxy.crash.states.timeline import Segment, Timeline
from nbdproxy.delta_debugging import ddmin
from nbdproxy.errors import UsageError
from nbdproxy.extents import join_neighbours, runs
from nbdproxy.oracles.check import Verdict
from nbdproxy.recording.index import BASE, Numbers

SINGLES_MAX = 256
"""So many requests are tried alone before sets of them."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Sectors that show something older than what a request wrote: it is missing there.

    `row` is the request that shows in ALL; `first` and `last` are sectors of the disk.
    """

    row: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Minimum:
    """What is left: the state, what was said of it, and what is missing; `checks` were made."""

    state: StateId
    judged: Judged
    lost: tuple[Lost, ...]
    checks: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Sectors that show something else than ALL: of one request another, or a torn sector.

    `row` is the request that is missing there; `others` are missing as well, where several end
    inside a sector.
    """

    row: int
    pin: Pin
    others: tuple[int, ...] = ()

    def joined(self, behind: _Piece) -> _Piece | None:
        """Return both as one if they are alike but for their place, and nothing is between them."""
        pin = self.pin.joined(behind.pin)
        if pin is None or (self.row, self.others) != (behind.row, behind.others):
            return None
        return replace(self, pin=pin)


def minimize(
    evaluator: StateEvaluator,
    state: StateId,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Minimum:
    """Return the least that has to be missing; UsageError if the state does not fail.

    `progress` is told how many pieces are left, and how many checks were made.
    """
    search = _Search(evaluator, state, progress)
    pieces = _pieces(evaluator.timeline, state)
    if not search.fails_as_given():
        raise UsageError(
            f"state {state} does not fail that check; paste one that does, of nbdproxy explore"
        )
    if search.fails([]):
        return search.result([])
    if not search.fails(pieces):
        # Where sectors are torn, pieces do not add up to the state.
        return Minimum(state, search.given, _lost(pieces), search.checks)
    return search.result(search.least(pieces))


class _Search:
    def __init__(
        self, evaluator: StateEvaluator, state: StateId, progress: Callable[[int, int], None]
    ) -> None:
        self._evaluator = evaluator
        self._state = state
        self._progress = progress
        self._known: dict[tuple[_Piece, ...], Judged] = {}
        self.checks = 0
        self.given = self._judge(state)

    def fails_as_given(self) -> bool:
        return self.given.judgement.verdict is Verdict.FAIL

    def least(self, pieces: Sequence[_Piece]) -> Sequence[_Piece]:
        """Return pieces that fail: by requests, then by sectors, until neither gives any more."""
        groups = _grouped(pieces)
        alone = (group for group in groups[:SINGLES_MAX] if len(groups) > 1 and self.fails(group))
        left: Sequence[_Piece] = next(alone, pieces)
        before = None
        while left != before:
            before = left
            left = _flat(ddmin(_grouped(left), self._all_fail))
            left = ddmin(_merged(left), self.fails)
            left = ddmin([one for piece in left for one in _sectors(piece)], self.fails)
        return left

    def _all_fail(self, groups: Sequence[Sequence[_Piece]]) -> bool:
        return self.fails(_flat(groups))

    def fails(self, pieces: Sequence[_Piece]) -> bool:
        return self._of(pieces).judgement.verdict is Verdict.FAIL

    def _of(self, pieces: Sequence[_Piece]) -> Judged:
        key = tuple(sorted(pieces, key=lambda piece: piece.pin))
        if key not in self._known:
            self._progress(len(pieces), self.checks)
            self._known[key] = self._judge(self._named(key))
        return self._known[key]

    def _judge(self, state: StateId) -> Judged:
        [judged] = self._evaluator.judge(Unit(state.position, (str(state),)))
        self.checks += judged.shared is None
        return judged

    def _named(self, pieces: Sequence[_Piece]) -> StateId:
        everything = replace(self._state, choice=Choice.ALL, parts=(), seed=0, number=0)
        pins = join_neighbours((piece.pin for piece in pieces), Pin.joined)
        return replace(everything, pins=tuple(pins))

    def result(self, pieces: Sequence[_Piece]) -> Minimum:
        key = tuple(sorted(pieces, key=lambda piece: piece.pin))
        state = self._named(key)
        missing = _without(self._evaluator.timeline, state, key)
        same = missing is not None and self._evaluator.hash_of(missing) == self._evaluator.hash_of(
            state
        )
        shown = missing if missing is not None and same else state
        return Minimum(shown, self._of(pieces), _lost(key), self.checks)


def _pieces(timeline: Timeline, state: StateId) -> list[_Piece]:
    """Return where a state shows something else than ALL, in sectors."""
    size, table = state.options.sector, timeline.table
    everything = replace(state, choice=Choice.ALL, parts=(), seed=0, number=0, pins=())
    full, given = timeline.open(everything), timeline.open(state)
    torn = {
        sector: pin
        for pin in state.pins
        for sector in range(pin.first, pin.last + 1)
        if pin.back is not None
    }
    found: list[_Piece] = []
    for first, last in runs(_touched(timeline, state)):
        start, end = first * size, min(last * size, full.size)
        shown = _by_sector(given.segments(start, end), size)
        there = _by_sector(full.segments(start, end), size)
        for sector, parts in there.items():
            pin = torn.get(sector)
            if pin is not None:
                found.append(_Piece(parts[-1][2], replace(pin, first=sector, last=sector)))
            elif shown[sector] != parts:
                row, *others = _missing(parts, shown[sector])
                values = [(table.seq_of(one), high - low) for low, high, one in shown[sector]]
                pin = Pin(sector, sector, values[-1][0], mix=tuple(values[:-1]))
                found.append(_Piece(row, pin, tuple(others)))
    return _merged(found)


def _missing(parts: Sequence[Segment], shown: Sequence[Segment]) -> list[int]:
    """Return the rows of a sector's parts that do not show where they should."""
    found = [
        row
        for low, high, row in parts
        if any(low < end and start < high and other != row for start, end, other in shown)
    ]
    return list(dict.fromkeys(found))


def _touched(timeline: Timeline, state: StateId) -> Numbers:
    """Return the sectors in which a state can differ from ALL: those of May, and what it names."""
    table, durability = timeline.table, timeline.durability(state.options)
    rows = np.arange(table.rows_before(state.position))
    may = rows[~durability.kept(rows, state.position, state.level) & (table.length[rows] > 0)]
    named = np.searchsorted(table.seq, [part.seq for part in state.parts])
    spans = [
        sectors_of(table, int(row), state.options.sector)
        for row in np.unique(np.concatenate((may, named))).tolist()
    ]
    spans += [(pin.first, pin.last + 1) for pin in state.pins]
    if not spans:
        return np.empty(0, np.int64)
    return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def _by_sector(segments: Iterator[Segment], size: int) -> dict[int, list[Segment]]:
    """Return which rows show in each sector, and where in it."""
    found: dict[int, list[Segment]] = {}
    for start, end, row in segments:
        for sector in range(start // size, -(-end // size)):
            at = sector * size
            low, high = max(start - at, 0), min(end - at, size)
            parts = found.setdefault(sector, [])
            if parts and parts[-1][2] == row:
                parts[-1] = parts[-1][0], high, row
            else:
                parts.append((low, high, row))
    return found


def _merged(pieces: Iterable[_Piece]) -> list[_Piece]:
    return list(join_neighbours(pieces, _Piece.joined))


def _sectors(piece: _Piece) -> Iterator[_Piece]:
    for sector in range(piece.pin.first, piece.pin.last + 1):
        yield replace(piece, pin=replace(piece.pin, first=sector, last=sector))


def _grouped(pieces: Sequence[_Piece]) -> list[Sequence[_Piece]]:
    groups: dict[int, list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.row, []).append(piece)
    return list(groups.values())


def _flat(groups: Sequence[Sequence[_Piece]]) -> list[_Piece]:
    return [piece for group in groups for piece in group]


def _lost(pieces: Sequence[_Piece]) -> tuple[Lost, ...]:
    return tuple(
        Lost(row, piece.pin.first, piece.pin.last)
        for piece in _merged(pieces)
        for row in (piece.row, *piece.others)
    )


def _without(timeline: Timeline, state: StateId, pieces: Sequence[_Piece]) -> StateId | None:
    """Return the state that names what is missing, not what shows; None if there is none."""
    size, table = state.options.sector, timeline.table
    parts = []
    for lost in _lost(pieces):
        if lost.row == BASE:
            return None
        first, end = sectors_of(table, lost.row, size)
        seq = int(table.seq[lost.row])
        whole = lost.first == first and lost.last == end - 1
        parts.append(
            RequestPart(seq) if whole else RequestPart(seq, lost.first - first, lost.last - first)
        )
    parts.sort(key=lambda part: (part.seq, part.last))
    return replace(state, choice=Choice.BUT, parts=tuple(parts), pins=()) if parts else None
