"""Explorations: what is asked of the states that a crash may leave, and what judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from nbdproxy.case.oracles import MAKERS, OracleName
from nbdproxy.case.states import DiskState
from nbdproxy.crash.blame.replay import level_at
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup
from nbdproxy.crash.explore.explore import Exploration, Tally
from nbdproxy.crash.explore.judging import JudgePlan
from nbdproxy.crash.explore.planning import (
    Every,
    ExplorationPlan,
    ExploreOptions,
    cuts_of,
    make_plan,
)
from nbdproxy.crash.explore.verdicts import About, Verdicts
from nbdproxy.crash.explore.workers import Runner, make_runner
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.source import Source
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import UsageError
from nbdproxy.oracles.check import candidates, only
from nbdproxy.oracles.locate import Where
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.persistence.model import Coverage, Level, Options
from nbdproxy.persistence.modes import CacheMode, Failure, guarantee
from nbdproxy.report.explored import ExplorationReport, digest_of
from nbdproxy.state_server.commands import CommandPlan

TIME_LIMIT_S = 60.0
"""Seconds that a command may take for a state."""


@dataclass(frozen=True, slots=True)
class ExploreRequest:
    """What is to be explored.

    mode, failure  what fails, under which cache mode
    at, every      at one cut, or at many; neither is where the failure tells most
    states         the most states to visit; None is a thousand, or with `exhaustive` a million
    exhaustive     visit every state of the model, if they are few enough
    torn, stale    also states beyond the model: half-written sectors; a flushed write that is lost
    seed           for what is drawn by lot
    sector         bytes that are written as a whole or not at all: 512, 4096
    coverage       what a flush covers
    fsyncgate      what a failed flush had in hand, no later one saves
    losses         cuts at which the store lost what was not flushed
    workers        processes that check, None is one a CPU; or `dask`, the address of a cluster
    share          share verdicts between states that differ only where the check did not read
    db, resume     the file where verdicts are kept, and whether to go on with it

    >>> ExploreRequest(every=Every.FLUSH, states=2000).asked
    'flush'
    """

    mode: CacheMode = CacheMode.NONE
    failure: Failure = Failure.HOST_POWER_LOSS
    at: str | None = None
    every: Every | None = None
    states: int | None = None
    exhaustive: bool = False
    torn: bool = False
    stale: bool = False
    seed: int = 1
    sector: int = 512
    coverage: Coverage = Coverage.RECEIVED
    fsyncgate: bool = False
    losses: Sequence[str] = ()
    workers: int | None = None
    dask: str | None = None
    share: bool = True
    db: Path | None = None
    resume: bool = False

    @property
    def cut(self) -> str | None:
        """The one cut that is looked at, as a user writes it; None if it is many."""
        return None if self.every else self.asked

    @property
    def asked(self) -> str:
        """The cut, or at which cuts, as a user writes it."""
        return self.at or (self.every.value if self.every else _usual_cut(self.failure))

    @property
    def options(self) -> ExploreOptions:
        """Which states are visited, and how many."""
        budget = ExploreOptions().budget if self.states is None else self.states
        if self.states is None and self.exhaustive:
            budget = None
        return ExploreOptions(budget, self.seed, self.torn, self.stale, self.exhaustive)

    def model(self, source: Source) -> Options:
        """Return the reading of the model; UsageError for a sector, or a cut, that is none."""
        if self.sector < 512 or self.sector & (self.sector - 1) or self.sector > 1 << 20:
            raise UsageError(f"--sector: {self.sector} is no sector; use 512 or 4096")
        losses = tuple(sorted({resolve(source, cut).position for cut in self.losses}))
        return Options(
            coverage=self.coverage,
            sector=self.sector,
            fsyncgate=self.fsyncgate,
            losses=losses,
        )

    def level(self, source: Source) -> Level:
        """Return what the failure leaves for certain under the cache mode."""
        if self.cut is None:
            return guarantee(self.mode, self.failure)
        position = resolve(source, self.cut).position
        return level_at(source.table, position, self.mode, self.failure)


@dataclass(frozen=True, slots=True)
class Check:
    """What a state has to pass: the case's files, or a shell command and its limit in seconds.

    The command looks at `$uri`, `$image`, `$fs` or `$dir`, as `nbdproxy explore --check` says.

    >>> Check('test -s "$dir/app/data.db"').time_limit_s
    60.0
    """

    command: str | None = None
    time_limit_s: float = TIME_LIMIT_S


THE_FILES = Check()


@dataclass(frozen=True, slots=True)
class PlannedExploration:
    """An exploration that is ready to be run, once; it is there as long as its case is open.

    `missing` is what the recording lacks, if anything.
    """

    plan: ExplorationPlan
    about: About
    missing: str | None
    exploration: Exploration
    runner: Runner
    verdicts: Verdicts

    def run(self, progress: Callable[[Tally], None] = lambda _: None) -> ExplorationReport:
        """Judge the states; `progress` hears how many there are so far."""
        tally = self.exploration.run(self.runner, progress)
        return ExplorationReport(self.about, self.plan, tally, self.verdicts, self.missing)


def command_plan(
    timeline: Timeline,
    check: Check,
    at: str | None,
    where: Where,
    oracle: OracleName,
    *,
    asked: Callable[[], Oracle],
    warn: Callable[[str], None],
) -> CommandPlan:
    """Return the judge of a command, with what it names found where the most is there.

    `asked` gives the oracle that looks for it, and `warn` hears what of the files cannot be read.
    """
    plan = CommandPlan(check.command or "", check.time_limit_s, where.partition)
    if oracle is not OracleName.QUICK and not plan.names("dir"):
        raise UsageError("--oracle reads --files, or what is in $dir: name either, or drop it")
    cut = timeline.at(resolve(timeline.source, at or "before-exit").position)
    if plan.names("dir"):
        tree = DiskState(str(cut.state), cut, timeline).tree(asked(), where)
        for one in [*tree.unreadable.values(), *([tree.unplaced] if tree.unplaced else [])]:
            warn(f"not in $dir is what cannot be read: {one}")
        plan = replace(plan, tree=tree, oracle=MAKERS[oracle])
    if plan.names_part and where.partition is None:
        state = DiskState(str(cut.state), cut, timeline)
        plan = replace(plan, partition=state.found(lambda one, _: _only_part(one)))
    return plan


def _only_part(disk: ReadableDevice) -> int:
    """Return the only part of a disk that has a filesystem; FilesystemError if there is no one."""
    return only(candidates(disk, None)).number


def plan_exploration(
    builder: CrashSpaceBuilder, request: ExploreRequest, progress: Callable[[str], None]
) -> ExplorationPlan:
    """Return which states are visited; `progress` hears in words how many cuts were looked at."""
    source = builder.timeline.source
    if request.every is not None and request.at is not None:
        raise UsageError("--at and --every exclude each other; drop one of them")
    if request.every is None:
        cuts = [resolve(source, request.asked).position]
    else:
        durability = builder.timeline.durability(builder.options)
        cuts = cuts_of(source, durability, builder.level, request.every)
    progress("looking at the cuts")
    return make_plan(
        builder,
        cuts,
        request.options,
        cuts_possible=source.events + 1 if request.every is not None else 1,
        progress=lambda done: progress(f"looking at the cuts: {done} of {len(cuts)}"),
    )


def runner_of(setup: EvaluatorSetup, request: ExploreRequest, timeline: Timeline) -> Runner:
    """Return what judges the states, in processes of this machine or on a cluster."""
    if request.dask is None:
        return make_runner(setup, request.workers, timeline)
    if request.workers is not None:
        raise UsageError("--workers and --dask exclude each other; the cluster has its own workers")
    from nbdproxy.crash.explore.dask.runner import DaskRunner  # noqa: PLC0415 - an optional extra

    return DaskRunner(setup, request.dask)


def about_exploration(
    source: RecordedSource,
    setup: EvaluatorSetup,
    request: ExploreRequest,
    judge: str,
) -> About:
    """Return what tells one exploration from another; the budget does not, which may grow."""
    return {
        "recording": str(setup.run),
        "identity": xxh3_64_hexdigest(source.meta.dump().encode()),
        "base": _identity_of(setup.base),
        "events": source.events,
        "mode": request.mode.value,
        "failure": request.failure.value,
        "level": setup.level.value,
        "sector": setup.options.sector,
        "coverage": setup.options.coverage.value,
        "fsyncgate": setup.options.fsyncgate,
        "losses": " ".join(map(str, setup.options.losses)),
        "at": request.asked,
        "seed": request.seed,
        "torn": request.torn,
        "stale": request.stale,
        "exhaustive": request.exhaustive,
        "judge": judge,
    }


def words_of_check(plan: JudgePlan, check: Check, where: Where, oracle: OracleName) -> str:
    """Return what is checked, in words that differ where verdicts may."""
    by = "" if oracle is OracleName.QUICK else f" by {oracle.value}"
    if check.command is None:
        return f"files {digest_of(plan)}{by}"
    told = [f"--partition {where.partition}"] if where.partition is not None else []
    told += [f"--mount {one}" for one in where.mounts]
    return "".join((f"{check.command}{by}", *(f" {one}" for one in told)))


def _identity_of(base: Path | None) -> str | None:
    """Return what tells an image from another, wherever it is; None if none was named."""
    if base is None:
        return None
    stat = base.stat()
    return f"{stat.st_size} bytes, last changed {stat.st_mtime_ns} ns after 1970"


def _usual_cut(failure: Failure) -> str:
    """Return where a failure strikes by default: where it tells most, as for replay."""
    return "end" if failure is Failure.GUEST_POWEROFF else "before-exit"
