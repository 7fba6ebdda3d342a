"""`nbdproxy explore`: which of the states that a crash may leave are bad."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from xxhash import xxh3_64_hexdigest

from nbdproxy.cli.choices import (
    At,
    BaseOption,
    Covers,
    Fsyncgate,
    Mounts,
    PartitionOption,
    RecordedAs,
    Root,
    where_of,
)
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import MAKERS, OracleChoice, OracleName, opened
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.cli.states import tree_of_disk
from nbdproxy.crash.blame.replay import earlier_digests, level_at, place
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup
from nbdproxy.crash.explore.explore import Exploration, Tally
from nbdproxy.crash.explore.judging import JudgePlan, ManifestPlan
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
from nbdproxy.crash.states.taken import taken_under
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, UsageError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.check import Verdict, candidates, only
from nbdproxy.oracles.locate import Where
from nbdproxy.persistence.model import Coverage, Level, Options
from nbdproxy.persistence.modes import (
    CacheMode,
    Failure,
    check_projection,
    guarantee,
)
from nbdproxy.report import explored
from nbdproxy.signals import interrupt, told_to_end
from nbdproxy.state_server.commands import CommandPlan

Files = Annotated[
    Path | None,
    typer.Option("--files", metavar="MANIFEST", help="Pass if all these files are whole."),
]
Check = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="COMMAND",
        help="Pass if this shell command exits with 0, fail with 1, all else is unknown. It looks "
        "at $uri, the state over NBD, or at what is made if the command line names it: $image, a "
        "raw file of the disk; $fs, a raw file of the filesystem alone; $dir, a folder with all "
        "its files (--oracle says who reads them). $part is the partition's number, $mark the "
        "last mark before the cut.",
    ),
]
TIME_LIMIT_S = 60.0
TimeLimit = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.001, help="What a command may take for a state.")
]


def explore(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    files: Files = None,
    check: Check = None,
    at: At = None,
    every: Annotated[
        Every | None, typer.Option(help="At each flush, or each write, instead of at one cut.")
    ] = None,
    mode: Annotated[CacheMode, typer.Option(help="QEMU's cache mode.")] = CacheMode.NONE,
    failure: Annotated[Failure, typer.Option(help="What fails.")] = Failure.HOST_POWER_LOSS,
    states: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Visit so many states.",
            show_default="1000, or with --exhaustive a million",
        ),
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Visit every state, if they are few enough.")
    ] = False,
    torn: Annotated[
        bool, typer.Option("--torn", help="Also half-written sectors, which the model rules out.")
    ] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Also states where the store lost a flushed write.")
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=10**18 - 1, help="For what is drawn by lot.")
    ] = 1,
    sector: Annotated[
        int, typer.Option(metavar="BYTES", help="What is written whole or not at all.")
    ] = 512,
    covers: Covers = Coverage.RECEIVED,
    fsyncgate: Fsyncgate = False,
    loss: Annotated[
        list[str] | None,
        typer.Option(metavar="CUT", help="The store lost what was not flushed here; repeatable."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes that check.", show_default="one a CPU"),
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Check on a Dask cluster, such as tcp://host:8786."),
    ] = None,
    db: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep all verdicts here (SQLite).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the --db of a run that was ended.")
    ] = False,
    time_limit: TimeLimit = TIME_LIMIT_S,
    share: Annotated[
        bool,
        typer.Option(
            help="Share verdicts between states that differ only where the check did not read."
        ),
    ] = True,
    recorded_as: RecordedAs = None,
    root: Root = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    base: BaseOption = None,
    oracle: OracleChoice = OracleName.QUICK,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for a state that a crash may leave and that is bad.

    A crash leaves what was flushed, and of the rest, sector by sector, whatever chance decides.
    Visited are first the ends (nothing and all of the rest), then each request missing or alone,
    each sector, pairs, and then states drawn by lot. States that cannot be told apart are checked
    once. Exit code 0 if all pass, 1 if any fails, 2 if it cannot be told.

    Examples:

      nbdproxy explore run1 --files npm.sha256 --states 2000

      nbdproxy explore run1 --every flush --check 'nbdcopy "$uri" - | ./my-check -'

      nbdproxy explore run1 --every flush --check './my-check "$dir/app"'

      nbdproxy explore run1 --every write --db run1.db \
          --check 'e2fsck -y -E journal_only "$fs"; e2fsck -fn "$fs" || exit $(($? == 4 ? 1 : 2))'

      nbdproxy explore run1 --at mark:ready --exhaustive --check ./my-check
    """
    if resume and db is None:
        raise UsageError(
            "--resume goes on with a --db FILE; name the one of the run that was ended"
        )
    if exhaustive and (torn or stale):
        raise UsageError("--exhaustive visits the model's states: no --torn and no --stale ones")
    # A SIGTERM ends it as Ctrl-C does: with its workers and their commands.
    for number in (signal.SIGINT, *told_to_end()):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in the background
            signal.signal(number, interrupt)
    with ExitStack() as stack:
        source = stack.enter_context(recorded(run, base))
        timeline = Timeline(source)
        stack.callback(timeline.close)
        check_projection(taken_under(timeline, recorded_as), [mode])
        where = where_of(root, partition, mount)
        options = _options(source, sector, covers, fsyncgate=fsyncgate, losses=loss or [])
        asked = at or (every.value if every else _usual_cut(failure))
        level = _level(source, mode, failure, None if every else asked)
        judge = make_judge(
            timeline, files, check, None if every else asked, where, time_limit, oracle
        )
        fields = CrashSpaceBuilder(timeline, level, options)
        budget = states if states is not None else None if exhaustive else ExploreOptions().budget
        wish = ExploreOptions(budget, seed, torn, stale, exhaustive)
        plan = _plan(fields, None if every else asked, at, every, wish)
        job = EvaluatorSetup(run.absolute(), base, level, options, judge, share)
        about: About = {
            **_what_is_explored(source, job, mode, failure),
            "at": asked,
            **_what_is_wished(wish),
            "judge": f"{check or f'files {explored.digest_of(judge)}'}{_by(oracle)}"
            f"{_of(where) if check else ''}",
        }
        runner = _runner(job, workers, dask)
        stack.callback(runner.close)
        verdicts = Verdicts(db, about, resume=resume)
        stack.callback(verdicts.close)
        exploration = Exploration(fields, plan, judge, verdicts)
        try:
            tally = _watch(plan, lambda tell: exploration.run(runner, tell))
        except KeyboardInterrupt:
            _tell_ended(db)
            raise typer.Exit(130) from None
        again = _again(files, check, where, base, time_limit, oracle)
        needs = option_of_base(base)
        report = explored.ExplorationReport(
            about, plan, tally, verdicts, again, needs, source.missing
        )
        if json:
            print_json(explored.to_json(report))
        else:
            for line in explored.lines(report, str(run)):
                out.print(line, markup=False)
        last = source.events if every else resolve(source, asked).position
        raise typer.Exit(code_at(source, last, explored.exit_code(tally)))


def _what_is_explored(
    source: RecordedSource, job: EvaluatorSetup, mode: CacheMode, failure: Failure
) -> About:
    return {
        "recording": str(job.run),
        "identity": xxh3_64_hexdigest(source.meta.dump().encode()),
        "base": _identity_of(job.base),
        "events": source.events,
        "mode": mode.value,
        "failure": failure.value,
        "level": job.level.value,
        "sector": job.options.sector,
        "coverage": job.options.coverage.value,
        "fsyncgate": job.options.fsyncgate,
        "losses": " ".join(map(str, job.options.losses)),
    }


def _identity_of(base: Path | None) -> str | None:
    """Return what tells an image from another, wherever it is; None if none was named."""
    if base is None:
        return None
    stat = base.stat()
    return f"{stat.st_size} bytes, last changed {stat.st_mtime_ns} ns after 1970"


def _what_is_wished(wish: ExploreOptions) -> About:
    """Return all of a wish but its budget, which may grow when an exploration is gone on with."""
    return {
        "seed": wish.seed,
        "torn": wish.torn,
        "stale": wish.stale,
        "exhaustive": wish.exhaustive,
    }


def _usual_cut(failure: Failure) -> str:
    """Return where a failure strikes by default: where it tells most, as for replay."""
    return "end" if failure is Failure.GUEST_POWEROFF else "before-exit"


def _level(source: RecordedSource, mode: CacheMode, failure: Failure, at: str | None) -> Level:
    if at is None:
        return guarantee(mode, failure)
    return level_at(source.table, resolve(source, at).position, mode, failure)


def option_of_base(base: Path | None) -> str:
    """Return the option that names the image to another command, behind a space; or nothing."""
    return f" --base {shlex.quote(str(base))}" if base is not None else ""


def _again(
    files: Path | None,
    check: str | None,
    where: Where,
    base: Path | None,
    limit_s: float,
    oracle: OracleName,
) -> str:
    """Return the options with which another command asks the same."""
    words = ["--files", str(files)] if check is None else ["--check", check]
    words += ["--root", where.root] if where.root is not None else []
    words += ["--partition", str(where.partition)] if where.partition is not None else []
    words += [word for told in where.mounts for word in ("--mount", str(told))]
    words += ["--base", str(base)] if base is not None else []
    words += ["--time-limit", f"{limit_s:g}"] if limit_s != TIME_LIMIT_S else []
    words += ["--oracle", oracle.value] if oracle is not OracleName.QUICK else []
    return shlex.join(words)


def _options(
    source: RecordedSource,
    sector: int,
    covers: Coverage,
    *,
    fsyncgate: bool,
    losses: list[str],
) -> Options:
    if sector < 512 or sector & (sector - 1) or sector > 1 << 20:
        raise UsageError(f"--sector: {sector} is no sector; use 512 or 4096")
    positions = tuple(sorted({resolve(source, cut).position for cut in losses}))
    return Options(coverage=covers, sector=sector, fsyncgate=fsyncgate, losses=positions)


def make_judge(
    timeline: Timeline,
    files: Path | None,
    check: str | None,
    at: str | None,
    where: Where,
    time_limit_s: float,
    oracle: OracleName = OracleName.QUICK,
) -> JudgePlan:
    """Return the judge that a command's options name; UsageError unless it is just one."""
    if files is not None and check is not None:
        raise UsageError("--files and --check exclude each other; drop one of them")
    if files is None:
        if check is None or not check.strip():
            raise UsageError("what shall be checked? name --files MANIFEST or --check COMMAND")
        return _command(timeline, check, at, where, time_limit_s, oracle)
    cut = resolve(timeline.source, at or "before-exit")
    wanted = manifest.load(files)
    with err.status("looking for the files") as status, opened(oracle, status.update) as asked:
        tree, wanted = place(timeline, wanted, cut, where, asked)
        earlier = earlier_digests(timeline, wanted, tree, asked)
    return ManifestPlan(wanted, tree, earlier, MAKERS[oracle])


def _command(
    timeline: Timeline,
    check: str,
    at: str | None,
    where: Where,
    time_limit_s: float,
    oracle: OracleName,
) -> CommandPlan:
    """Return the judge of a command, with what it names found where the most is there."""
    plan = CommandPlan(check, time_limit_s, where.partition)
    if oracle is not OracleName.QUICK and not plan.names("dir"):
        raise UsageError("--oracle reads --files, or what is in $dir: name either, or drop it")
    cut = timeline.at(resolve(timeline.source, at or "before-exit").position)
    if plan.names("dir"):
        with err.status("looking for the files") as status, opened(oracle, status.update) as asked:
            tree = tree_of_disk(asked, cut, timeline, where)
        lacking = [*tree.unreadable.values(), *([tree.unplaced] if tree.unplaced else [])]
        for one in lacking:
            err.print(f"note: not in $dir is what cannot be read: {one}")
        plan = replace(plan, tree=tree, oracle=MAKERS[oracle])
    if plan.names_part and where.partition is None:
        plan = replace(plan, partition=_partition(timeline.at(timeline.source.events), cut))
    return plan


def _partition(best: ReadableDevice, cut: ReadableDevice) -> int:
    """Return the only part of a disk that has a filesystem; FilesystemError if there is no one."""
    try:
        return only(candidates(best, None)).number
    except FilesystemError as at_the_end:
        try:
            return only(candidates(cut, None)).number
        except FilesystemError:
            raise at_the_end from None


def _of(where: Where) -> str:
    """Say what a command's files are made from, if that was told."""
    told = [f"--partition {where.partition}"] if where.partition is not None else []
    return "".join(f" {one}" for one in [*told, *(f"--mount {one}" for one in where.mounts)])


def _by(oracle: OracleName) -> str:
    return "" if oracle is OracleName.QUICK else f" by {oracle.value}"


def _plan(
    fields: CrashSpaceBuilder,
    asked: str | None,
    at: str | None,
    every: Every | None,
    wish: ExploreOptions,
) -> ExplorationPlan:
    source = fields.timeline.source
    if every is not None and at is not None:
        raise UsageError("--at and --every exclude each other; drop one of them")
    if every is None:
        assert asked is not None
        cuts = [resolve(source, asked).position]
    else:
        cuts = cuts_of(source, fields.timeline.durability(fields.options), fields.level, every)
    with err.status("looking at the cuts") as status:
        return make_plan(
            fields,
            cuts,
            wish,
            cuts_possible=source.events + 1 if every is not None else 1,
            progress=lambda done: status.update(f"looking at the cuts: {done} of {len(cuts)}"),
        )


def _runner(job: EvaluatorSetup, workers: int | None, dask: str | None) -> Runner:
    if dask is None:
        return make_runner(job, workers)
    if workers is not None:
        raise UsageError("--workers and --dask exclude each other; the cluster has its own workers")
    from nbdproxy.crash.explore.dask.runner import DaskRunner  # noqa: PLC0415 - an optional extra

    return DaskRunner(job, dask)


def _watch(plan: ExplorationPlan, run: Callable[[Callable[[Tally], None]], Tally]) -> Tally:
    """Show on stderr how far it is."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=not shown) as progress:
        task = progress.add_task("exploring", total=plan.visits)

        def tell(tally: Tally) -> None:
            failed = tally.verdicts[Verdict.FAIL]
            progress.update(task, completed=tally.visited, description=f"{failed:,} failed")

        return run(tell)


def _tell_ended(db: Path | None) -> None:
    todo = f"go on with --db {db} --resume" if db is not None else "name a --db to be able to go on"
    err.print(f"nbdproxy: ended; {todo}", markup=False)
