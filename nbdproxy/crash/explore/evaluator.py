"""`StateEvaluator`: judges crash states of one recording with one judge, in any process.

An `EvaluatorSetup` says what to judge with, a `Unit` which states of one cut. Both can be sent to
another process, and the same unit gives the same verdicts there; only which states had to be
checked, and which took another's verdict, depends on what else that process had to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nbdproxy.crash.explore.crash_space import CrashSpace, StateChange
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.judging import Judge, Judgement, JudgePlan
from nbdproxy.crash.explore.sharing import Sharing
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.source import Source
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.extents import Extent, runs
from nbdproxy.persistence.model import Level, Options


@dataclass(frozen=True, slots=True)
class EvaluatorSetup:
    """What to judge states of, and with; `base` is where the image is now, if it was moved."""

    run: Path
    base: Path | None
    level: Level
    options: Options
    judge: JudgePlan
    share: bool = True
    """Whether verdicts may be shared between states that the judge cannot tell apart."""


class Unit(NamedTuple):
    """States of one cut, by their ids."""

    position: int
    states: tuple[str, ...]


class Judged(NamedTuple):
    """What became of a state: `shared` is the id of the one whose verdict it took, if any."""

    state: str
    judgement: Judgement
    shared: str | None
    seconds: float


class StateEvaluator:
    """Judges states; `source` is the caller's, and so is its timeline if that is open already."""

    def __init__(
        self, source: Source, job: EvaluatorSetup, timeline: Timeline | None = None
    ) -> None:
        self.timeline = timeline or Timeline(source)
        self._owns_timeline = timeline is None
        self._builder = CrashSpaceBuilder(self.timeline, job.level, job.options)
        self._plan = job.judge
        # One for the states near each end of a cut: between two of these less changes.
        self._judges: dict[Choice, Judge] = {}
        self._share = job.share
        self._space: CrashSpace | None = None
        self._sharing: Sharing | None = None
        self._last: dict[Judge, tuple[int, StateChange]] = {}

    def judge(self, unit: Unit) -> list[Judged]:
        """Judge the states of a unit."""
        space = self._space_at(unit.position)
        return [self._one(space, parse_state_id(text)) for text in unit.states]

    def _space_at(self, position: int) -> CrashSpace:
        if self._space is None or self._space.state.position != position:
            self._space = self._builder.at(position)
            self._sharing = Sharing(self._space)
        return self._space

    def hash_of(self, state: StateId) -> int:
        """Return the hash of a state's content; equal ones are equal disks."""
        return self._space_at(state.position).change(state).hash

    def _one(self, space: CrashSpace, state: StateId) -> Judged:
        assert self._sharing is not None
        began = time.perf_counter()
        change = space.change(state)
        known = self._sharing.find(change) if self._share else None
        if known is not None:
            return Judged(str(state), known[1], known[0], time.perf_counter() - began)
        near = change.reference
        if near not in self._judges:
            others = list(self._judges.values())
            self._judges[near] = others[0].beside() if others else self._plan.open(self.timeline)
        judge = self._judges[near]
        judgement, reads = judge.judge(state, self._changed(judge, space, change))
        self._last[judge] = state.position, change
        if reads is not None:
            self._sharing.add(change, (str(state), judgement), reads)
        return Judged(str(state), judgement, None, time.perf_counter() - began)

    def _changed(
        self, judge: Judge, space: CrashSpace, change: StateChange
    ) -> Iterable[Extent] | None:
        """Return where a state may differ from the one that the same judge saw before it."""
        if judge not in self._last:
            return None
        position, last = self._last[judge]
        size = space.state.options.sector
        sectors = [last.sectors, change.sectors]
        if last.reference is not change.reference:
            sectors.append(space.ends.sectors)
        differing = np.unique(np.concatenate(sectors))
        found = [Extent(low * size, (high - low) * size) for low, high in runs(differing)]
        if position != space.state.position:
            found += self._between(position, space.state.position)
        return found

    def _between(self, one: int, other: int) -> list[Extent]:
        """Return what may differ between the states of two cuts.

        A request that must be there at both is there in all states of both.
        """
        table, level = self.timeline.table, self._builder.level
        rows = np.arange(table.rows_before(max(one, other)))
        durability = self.timeline.durability(self._builder.options)
        stays = durability.kept(rows, one, level) & durability.kept(rows, other, level)
        return table.extents(rows[~stays & (table.length[rows] > 0)])

    def close(self) -> None:
        """Release judges and timeline."""
        for judge in self._judges.values():
            judge.close()
        if self._owns_timeline:
            self.timeline.close()


def open_evaluator(job: EvaluatorSetup) -> StateEvaluator:
    """Open a job's recording and its evaluator; they are there until the process ends."""
    return StateEvaluator(RecordedSource(job.run, image=job.base), job)
