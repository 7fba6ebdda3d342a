"""`nbdproxy explore`: which of the states that a crash may leave are bad."""

from __future__ import annotations

import signal
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

from nbdproxy.case.case import Case
from nbdproxy.case.exploring import TIME_LIMIT_S, Check, ExploreRequest, PlannedExploration
from nbdproxy.case.oracles import OracleName
from nbdproxy.cli.checks import CheckCommand, Files, TimeLimit, option_of_base, options_again
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
from nbdproxy.cli.oracles import OracleChoice
from nbdproxy.cli.recorded import code_at, recorded, telling, warn
from nbdproxy.crash.explore.explore import Tally
from nbdproxy.crash.explore.planning import Every
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.errors import UsageError
from nbdproxy.oracles.check import Verdict
from nbdproxy.persistence.model import Coverage
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.report import explored
from nbdproxy.report.explored import ExplorationReport
from nbdproxy.signals import interrupt, told_to_end


def explore(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    files: Files = None,
    check: CheckCommand = None,
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
    request = ExploreRequest(
        mode=mode,
        failure=failure,
        at=at,
        every=every,
        states=states,
        exhaustive=exhaustive,
        torn=torn,
        stale=stale,
        seed=seed,
        sector=sector,
        coverage=covers,
        fsyncgate=fsyncgate,
        losses=loss or (),
        workers=workers,
        dask=dask,
        share=share,
        db=db,
        resume=resume,
    )
    asked = Check(check, time_limit)
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
    with recorded(run, base) as source:
        case = Case(
            [source],
            files=files,
            where=where_of(root, partition, mount),
            recorded_as=recorded_as,
            base=base,
            oracle=oracle,
            warn=warn,
        )
        with case:
            with telling(case, "looking at the recording"):
                planned = case.plan(request, asked)
            try:
                report = _watch(planned)
            except KeyboardInterrupt:
                _tell_ended(db)
                raise typer.Exit(130) from None
            if json:
                print_json(explored.to_json(report))
            else:
                again = options_again(files, asked, case.where, base, oracle)
                for line in explored.lines(report, str(run), again, option_of_base(base)):
                    out.print(line, markup=False)
            last = source.events if every else resolve(source, request.asked).position
            raise typer.Exit(code_at(source, last, explored.exit_code(report.tally)))


def _watch(planned: PlannedExploration) -> ExplorationReport:
    """Run an exploration, and show on stderr how far it is."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=not shown) as progress:
        task = progress.add_task("exploring", total=planned.plan.visits)

        def tell(tally: Tally) -> None:
            failed = tally.verdicts[Verdict.FAIL]
            progress.update(task, completed=tally.visited, description=f"{failed:,} failed")

        return planned.run(tell)


def _tell_ended(db: Path | None) -> None:
    todo = f"go on with --db {db} --resume" if db is not None else "name a --db to be able to go on"
    err.print(f"nbdproxy: ended; {todo}", markup=False)
