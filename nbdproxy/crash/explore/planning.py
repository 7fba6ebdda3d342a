"""Which states of which cuts an exploration visits, and how many there are that it does not.

A budget of states is spent stage by stage: all cuts' ends first, then all cuts' requests, and so
on; where a stage does not fit any more, what is left is dealt out evenly among the cuts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from nbdproxy.crash.explore.crash_space import CrashSpace
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.stages import BEYOND, Stage, Stages, Visit
from nbdproxy.crash.states.source import Source
from nbdproxy.errors import UsageError
from nbdproxy.persistence.model import Coverage, Durability, Level
from nbdproxy.recording.index import NEVER

EXHAUSTIVE_MAX = 1_000_000
"""States that --exhaustive agrees to visit."""


class Every(StrEnum):
    """At which cuts to look."""

    FLUSH = "flush"
    """Just before the guarantee changes, and at the end: all states of the cuts between are there.

    Between two changes requests only come in, and whatever a cut allows, later ones allow too.
    """
    WRITE = "write"
    """Just after each request that changes the disk as well: the same states, nearer the ends."""


@dataclass(frozen=True, slots=True)
class ExploreOptions:
    """What to visit: `budget` is the number of states, None for no end but that of the stages."""

    budget: int | None = 1000
    seed: int = 0
    torn: bool = False
    stale: bool = False
    exhaustive: bool = False


@dataclass(frozen=True, slots=True)
class CutPlan:
    """One cut: the states that it has, as a decimal logarithm, and how many of each stage to visit.

    `sizes` is how many each stage has, None for no end; `sectors` how many are undecided.
    """

    position: int
    states_log10: float
    states: int | None
    sectors: int
    sizes: dict[Stage, int | None]
    quotas: dict[Stage, int]


@dataclass(frozen=True, slots=True)
class ExplorationPlan:
    """All cuts, ascending; `cuts_possible` is how many instants there would have been."""

    options: ExploreOptions
    cuts: tuple[CutPlan, ...]
    cuts_possible: int

    @property
    def visits(self) -> int:
        """How many states are visited, at most: of those that are the same some are left out."""
        return sum(sum(cut.quotas.values()) for cut in self.cuts)

    @property
    def left_out(self) -> dict[Stage, int | None]:
        """How many states of each stage are not visited; None where there is no end."""
        found: dict[Stage, int | None] = {}
        for cut in self.cuts:
            for stage, size in cut.sizes.items():
                so_far = found.get(stage, 0)
                if size is None or so_far is None:
                    found[stage] = None
                else:
                    found[stage] = so_far + size - cut.quotas.get(stage, 0)
        return {stage: count for stage, count in found.items() if count != 0}


def cuts_of(source: Source, durability: Durability, level: Level, every: Every) -> list[int]:
    """Return the positions at which to look, ascending."""
    table = source.table
    changing = table.is_changing
    flying = [durability.durable_from, table.seq[table.is_flush]]
    if durability.options.coverage is Coverage.REPLIED:
        # A flush in flight then covers more with each reply.
        flying.append(table.completed[changing])
    changes = {
        Level.NOTHING: [],
        Level.FLUSHED: [durability.durable_from],
        Level.FLUSHED_OR_FLUSHING: flying,
        Level.COMPLETED: [table.completed[changing], durability.lost_from],
        Level.RECEIVED: [table.completed[changing], durability.lost_from, table.seq[changing]],
    }[level]
    positions = [np.array([source.events], np.int64), *changes]
    if every is Every.WRITE:
        positions.append(table.seq[changing] + 1)
    found = np.unique(np.concatenate(positions))
    return [int(position) for position in found[found != NEVER]]


def make_plan(
    builder: CrashSpaceBuilder,
    cuts: Sequence[int],
    options: ExploreOptions,
    *,
    cuts_possible: int,
    progress: Callable[[int], None] = lambda _: None,
) -> ExplorationPlan:
    """Look at all cuts, and deal out the budget. Raises UsageError if `exhaustive` is too much."""
    found, unlisted = [], []
    for number, position in enumerate(cuts):
        progress(number)
        space = builder.at(position)
        sizes = stages_of(space, options).sizes()
        small = space.states_log10 < 18
        states = space.states if small or options.exhaustive else None
        if options.exhaustive and not space.is_complete:
            unlisted.append(position)
        found.append(CutPlan(position, space.states_log10, states, len(space.sectors), sizes, {}))
    if options.exhaustive:
        _refuse_too_many(found, options)
        if unlisted:
            raise UsageError(
                f"--exhaustive cannot list all states at cut {unlisted[0]}: too many requests end "
                "inside the same sectors; leave --exhaustive out"
            )
    return ExplorationPlan(options, tuple(_deal(found, options.budget)), cuts_possible)


def stages_of(space: CrashSpace, options: ExploreOptions) -> Stages:
    """Return a space's stages as the options say."""
    return Stages(
        space,
        seed=options.seed,
        torn=options.torn,
        stale=options.stale,
        exhaustive=options.exhaustive,
    )


def visits_of(builder: CrashSpaceBuilder, plan: ExplorationPlan) -> Iterator[Visit]:
    """Yield all states to visit, cut after cut; where there are few, each different one once."""
    for cut in plan.cuts:
        stages = stages_of(builder.at(cut.position), plan.options)
        seen: set[int] = set()
        for stage, quota in cut.quotas.items():
            visits = stages.visits(stage)
            if stages.small and stage not in BEYOND:
                visits = _unseen(visits, seen)
            yield from itertools.islice(visits, quota)


def _unseen(visits: Iterator[Visit], seen: set[int]) -> Iterator[Visit]:
    for visit in visits:
        if visit.change.hash not in seen:
            seen.add(visit.change.hash)
            yield visit


def states_text(log10: float, states: int | None = None) -> str:
    """Return a number of states as people read it: in full, or as a power of ten."""
    return f"{states:,}" if states is not None else f"10^{log10:.0f}"


def _refuse_too_many(cuts: list[CutPlan], options: ExploreOptions) -> None:
    total = sum(cut.states or 0 for cut in cuts)
    limit = EXHAUSTIVE_MAX if options.budget is None else options.budget
    if total > limit:
        largest = max(cuts, key=lambda cut: cut.states_log10)
        sectors = sum(cut.sectors for cut in cuts)
        size = states_text(largest.states_log10, total if total < 10**18 else None)
        raise UsageError(
            f"--exhaustive would visit {size} states ({sectors:,} sectors at {len(cuts):,} cuts); "
            f"choose one cut with --at, raise the limit of {limit:,} with --states, or leave "
            f"--exhaustive out"
        )


def _deal(cuts: list[CutPlan], budget: int | None) -> list[CutPlan]:
    quotas: list[dict[Stage, int]] = [{} for _ in cuts]
    left = budget
    for stage in dict.fromkeys(stage for cut in cuts for stage in cut.sizes):
        sizes = [cut.sizes.get(stage, 0) for cut in cuts]
        if left is None:
            shares = [size or 0 for size in sizes]
        else:
            shares = _shares(sizes, left)
            left -= sum(shares)
        for quota, share in zip(quotas, shares, strict=True):
            if share:
                quota[stage] = share
    return [
        CutPlan(c.position, c.states_log10, c.states, c.sectors, c.sizes, quota)
        for c, quota in zip(cuts, quotas, strict=True)
    ]


def _shares(sizes: Sequence[int | None], left: int) -> list[int]:
    """Deal `left` out evenly; nobody gets more than their size, None takes any."""
    shares = [0] * len(sizes)
    unfilled = [index for index, size in enumerate(sizes) if size != 0]
    while left and unfilled:
        # What does not go round is dealt last, so that nobody is ahead by more than one.
        each = left // len(unfilled)
        for index in unfilled if each else unfilled[:left]:
            size, offer = sizes[index], max(each, 1)
            take = offer if size is None else min(offer, size - shares[index])
            shares[index] += take
            left -= take
        unfilled = [i for i in unfilled if sizes[i] is None or shares[i] < (sizes[i] or 0)]
    return shares
