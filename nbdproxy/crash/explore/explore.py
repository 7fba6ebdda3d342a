"""Exploring: which of the states that a crash may leave are bad.

States are visited as the plan says. One whose content was seen before takes the verdict of that
state; the others are judged in units by a runner, which may find that the judge would read the same
as before. Each state visited is a row of `Verdicts`, with how its verdict was found.

Guarantees: the same recording, plan and judge give the same states with the same verdicts, whoever
judges them, and in whatever order they come back; a run that was ended and is resumed ends with
what it would have ended with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import Judged, Unit
from nbdproxy.crash.explore.judging import Judgement, JudgePlan
from nbdproxy.crash.explore.planning import ExplorationPlan, visits_of
from nbdproxy.crash.explore.stages import Visit
from nbdproxy.crash.explore.verdicts import CHECKED, SAME_CONTENT, SAME_READS, Row, Verdicts
from nbdproxy.crash.explore.workers import Runner
from nbdproxy.crash.states.naming import Choice
from nbdproxy.oracles.check import Verdict

UNIT_STATES = 16
"""States in a unit: enough to pay for the way to a worker, few enough to share out."""

READY_MAX = 256
"""Rows that need no check and are written together."""

VisitKey = tuple[int, str]
"""A state's content, and what else its verdict depends on."""


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    visited: int = 0
    verdicts: dict[Verdict, int] = field(default_factory=lambda: dict.fromkeys(Verdict, 0))
    how: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys((CHECKED, SAME_CONTENT, SAME_READS), 0)
    )

    def add(self, row: Row) -> None:
        """Count a state."""
        self.visited += 1
        self.verdicts[row.judgement.verdict] += 1
        self.how[row.how] += 1


class Exploration:
    """One run through a plan."""

    def __init__(
        self,
        builder: CrashSpaceBuilder,
        plan: ExplorationPlan,
        judge: JudgePlan,
        verdicts: Verdicts,
    ) -> None:
        self._builder = builder
        self._plan = plan
        self._judge = judge
        self._verdicts = verdicts
        self.tally = Tally()
        self._first: dict[VisitKey, str] = {}
        self._known: dict[str, Judgement] = {}
        self._stages: dict[str, tuple[int, Visit]] = {}
        self._same: dict[str, list[tuple[int, Visit]]] = defaultdict(list)
        self._done: set[str] = set()
        self._ready: list[Row] = []

    def run(self, runner: Runner, progress: Callable[[Tally], None] = lambda _: None) -> Tally:
        """Visit all states; what passed or failed by `Verdicts` already is not judged again."""
        for row in self._verdicts.rows():
            if row.judgement.verdict is Verdict.UNKNOWN:
                continue
            self._done.add(row.state)
            self._known[row.state] = row.judgement
            self.tally.add(row)
        for judged in runner.run(self._units()):
            rows = [row for one in judged for row in self._rows(one)]
            self._enter(rows)
            progress(self.tally)
        self._enter([])
        return self.tally

    def _units(self) -> Iterator[Unit]:
        """Yield what has to be judged, cut by cut; the rest is entered on the way."""
        position, states = -1, list[str]()
        for number, visit in enumerate(visits_of(self._builder, self._plan)):
            if states and (visit.state.position != position or len(states) >= UNIT_STATES):
                yield self._unit(position, states)
                states = []
            position = visit.state.position
            text = str(visit.state)
            context = self._judge.context(self._builder.timeline, visit.state)
            first = self._first.setdefault((visit.change.hash, context), text)
            if text in self._done:
                continue
            if first == text:
                self._stages[text] = number, visit
                states.append(text)
            elif first in self._known:
                self._ready.append(self._same_row(number, visit, first))
                if len(self._ready) >= READY_MAX:
                    self._enter([])
            else:
                self._same[first].append((number, visit))
        if states:
            yield self._unit(position, states)

    def _unit(self, position: int, states: list[str]) -> Unit:
        """Return states as a unit, those near one end of the cut first: less changes between."""
        visits = {text: self._stages[text][1] for text in states}
        ordered = sorted(states, key=lambda text: visits[text].change.reference is Choice.ALL)
        return Unit(position, tuple(ordered))

    def _rows(self, judged: Judged) -> Iterator[Row]:
        number, visit = self._stages.pop(judged.state)
        self._known[judged.state] = judged.judgement
        how = CHECKED if judged.shared is None else SAME_READS
        origin = how, judged.shared, judged.seconds
        yield _row(number, visit, judged.judgement, origin)
        for number, visit in self._same.pop(judged.state, ()):
            yield self._same_row(number, visit, judged.state)

    def _same_row(self, number: int, visit: Visit, first: str) -> Row:
        return _row(number, visit, self._known[first], (SAME_CONTENT, first, 0.0))

    def _enter(self, rows: list[Row]) -> None:
        rows = self._ready + rows
        self._ready = []
        self._verdicts.add(rows)
        for row in rows:
            self.tally.add(row)


def _row(
    number: int, visit: Visit, judgement: Judgement, origin: tuple[str, str | None, float]
) -> Row:
    place = (str(visit.state), number, visit.state.position, visit.stage.value)
    return Row(*place, visit.change.hash, judgement, *origin)
