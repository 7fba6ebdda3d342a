"""What judges a crash state: the protocol, and the judge that looks for the files of a manifest.

A `JudgePlan` is what travels to another process; there it opens a `Judge`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nbdproxy.crash.states.naming import StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import EarlierDigests, Oracle
from nbdproxy.oracles.quick import QuickOracle
from nbdproxy.oracles.watched import RangeSet

ReadSet = RangeSet | ExtentSet
"""What of a disk was read: ascending and disjoint, as whoever compares states needs it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is said of a state.

    `counts` says more of it in numbers, as how many files are in each condition; `reason` is why
    it is unknown, or what a command printed. `looked` tells whether anything of the disk was read.
    """

    verdict: Verdict
    reason: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    looked: bool = True


class Judge(Protocol):
    """Judges the states of one timeline, one after the other."""

    def judge(
        self, state: StateId, changed: Iterable[Extent] | None
    ) -> tuple[Judgement, ReadSet | None]:
        """Return what is to be said of a state, and what of its disk that was read from.

        `changed` covers all in which the disk may differ from that of the call before; None is
        everything. A judgement without a read set holds for this very state only.
        """
        ...

    def beside(self) -> Judge:
        """Return another, for other states of the timeline, that shares what is costly to have.

        One that would have nothing of its own returns itself.
        """
        ...

    def close(self) -> None:
        """Release what the judge holds, and those beside it; closing twice is harmless."""
        ...


class JudgePlan(Protocol):
    """A judge to be, in any process."""

    def open(self, timeline: Timeline) -> Judge:
        """Return the judge, for the states of a timeline."""
        ...

    def context(self, timeline: Timeline, state: StateId) -> str:
        """Return what the judgement depends on besides the disk; the same text, the same verdict.

        States with the same content and context are judged once.
        """
        ...


@dataclass(frozen=True, slots=True)
class ManifestPlan:
    """Are these files whole? `manifest` has absolute paths, `oracle` makes the one to ask."""

    manifest: Manifest
    tree: Tree
    earlier: EarlierDigests
    oracle: Callable[[], Oracle] = QuickOracle

    def open(self, timeline: Timeline) -> Judge:
        """Return the judge, for the states of a timeline."""
        return _ManifestJudge(self, timeline, self.oracle())

    def context(self, timeline: Timeline, state: StateId) -> str:  # noqa: ARG002
        """Return nothing: the disk is all that counts."""
        return ""


class _ManifestJudge:
    def __init__(self, plan: ManifestPlan, timeline: Timeline, oracle: Oracle) -> None:
        self._plan = plan
        self._timeline = timeline
        self._oracle = oracle
        self._check = TreeCheck(self._oracle, plan.manifest, plan.earlier, plan.tree)
        self._last: tuple[Findings, Judgement] | None = None

    def judge(
        self, state: StateId, changed: Iterable[Extent] | None
    ) -> tuple[Judgement, ReadSet | None]:
        disk = self._timeline.open(state)
        found = self._check.check(disk, changed)
        # Findings that did not change are the same object, and thousands of files need no count.
        if self._last is None or self._last[0] is not found or not found.conditions:
            counts = Counter(condition.value for condition in found.conditions.values())
            self._last = found, Judgement(found.verdict, found.reason, counts)
        return self._last[1], self._check.reads

    def beside(self) -> Judge:
        return _ManifestJudge(self._plan, self._timeline, self._oracle)

    def close(self) -> None:
        self._oracle.close()
