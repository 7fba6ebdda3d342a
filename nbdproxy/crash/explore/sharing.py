"""`Sharing`: a verdict holds for every state that is the same wherever the judge looked.

A judge that reads the same bytes says the same. So beside each verdict of a cut it is kept what was
read from the state, and a state that agrees there needs no check of its own. Whether two states
agree on a set of sectors is told by the part of their hashes that belongs to these sectors, in time
that grows with what differs.
"""

from __future__ import annotations

import numpy as np

from nbdproxy.crash.explore.crash_space import CrashSpace, StateChange
from nbdproxy.crash.explore.judging import Judgement, ReadSet
from nbdproxy.crash.states.naming import Choice
from nbdproxy.recording.index import Mask, Numbers

SETS_MAX = 16
"""So many different read sets are remembered, the latest; each costs a look-up for each state."""

KnownJudgement = tuple[str, Judgement]
"""The id of the state that was checked, and what was said of it."""


class _ReadSet:
    """The sectors that a judge read, and the verdicts that depend on them alone."""

    def __init__(self, reads: ReadSet, space: CrashSpace) -> None:
        sector = space.state.options.sector
        bounds = np.array([(r.offset // sector, -(-r.end // sector)) for r in reads], np.int64)
        self.starts, self.ends = bounds.reshape(-1, 2).T
        self.verdicts: dict[int, KnownJudgement] = {}
        self._between_ends = self._part(space.ends)

    def key(self, change: StateChange) -> int:
        """Return what this set's sectors add to the hash of MUST."""
        start = self._between_ends if change.reference is Choice.ALL else 0
        return (start + self._part(change)) % 2**64

    def _part(self, change: StateChange) -> int:
        return int(change.moved[self._holds(change.sectors)].sum(dtype=np.uint64))

    def _holds(self, sectors: Numbers) -> Mask:
        if not len(self.starts):
            return np.zeros(len(sectors), np.bool_)
        # Neighbouring extents may share a sector, so ends ascend as starts do.
        at = np.searchsorted(self.starts, sectors, "right") - 1
        held: Mask = (at >= 0) & (sectors < self.ends[at])
        return held

    def same(self, other: _ReadSet) -> bool:
        """Tell whether two sets are equal."""
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.ends, other.ends)


class Sharing:
    """The verdicts of one cut."""

    def __init__(self, space: CrashSpace) -> None:
        self._space = space
        self._sets: list[_ReadSet] = []

    def find(self, change: StateChange) -> KnownJudgement | None:
        """Return a verdict that holds for a state, if there is one."""
        for reads in reversed(self._sets):
            known = reads.verdicts.get(reads.key(change))
            if known is not None:
                return known
        return None

    def add(self, change: StateChange, known: KnownJudgement, reads: ReadSet) -> None:
        """Remember a verdict and what it was made from."""
        new = _ReadSet(reads, self._space)
        for index, old in enumerate(self._sets):
            if old.same(new):
                new = self._sets.pop(index)
                break
        self._sets.append(new)
        del self._sets[:-SETS_MAX]
        new.verdicts[new.key(change)] = known
