"""`nbdproxy explain`: one file's history, or when all files of a manifest are safe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.oracles import OracleName
from nbdproxy.cli.choices import (
    At,
    BaseOption,
    FailureText,
    ModeText,
    Mounts,
    PartitionOption,
    RecordedAs,
    Root,
    parse_list,
    where_of,
)
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import EXIT, OracleChoice, tell_differences
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.crash.blame.explain import FileExplanation
from nbdproxy.crash.blame.file_history import FileHistory
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import UsageError
from nbdproxy.oracles.check import FileCheck, merge
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode, Failure, Taken, guarantee
from nbdproxy.report import histories

FILES_MAX = 20
"""So many files are told one by one."""


def explain(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]...", help="Files, by their paths in the filesystem."),
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option(
            metavar="MANIFEST",
            help="What the files should be.",
            show_default="what they are in the end",
        ),
    ] = None,
    at: At = None,
    mode: ModeText = None,
    failure: FailureText = Failure.HOST_POWER_LOSS.value,
    root: Root = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    recorded_as: RecordedAs = None,
    base: BaseOption = None,
    oracle: OracleChoice = OracleName.QUICK,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell a file's history: when it was sent, answered and flushed, and from when on it was safe.

    And which requests carried it, which flush covered each of them, what a failure at the cut
    leaves of it under each cache mode, who lost it, and what would have helped. With --files and no
    FILE it tells how many of all files were safe when. Exit code 1 if a file is not whole at the
    cut in some cell, or, without FILE, in the end under the weakest mode that keeps promises; 2 if
    no file is lost and one cannot be told.

    Examples:

      nbdproxy explain run1 /app/node_modules/react/index.js

      nbdproxy explain run1 /app/a.js --files npm.sha256 --root / --at riskiest

      nbdproxy explain run1 --files npm.sha256

      nbdproxy explain run1 /app/a.js --oracle kernel
    """
    if not paths and files is None:
        raise UsageError("which file? name one by its path in the filesystem, or --files MANIFEST")
    if not paths and (at or mode or failure != Failure.HOST_POWER_LOSS.value):
        raise UsageError("--at, --mode and --failure are for single files: name one, or drop them")
    if paths and len(paths) > FILES_MAX:
        raise UsageError(f"{len(paths)} files are too many to read; name up to {FILES_MAX}")
    modes = parse_list(mode, CacheMode, "--mode")
    failures = parse_list(failure, Failure, "--failure") or ()
    with recorded(run, base) as source:
        with err.status("looking at the files") as status:
            case = Case(
                [source],
                files=files,
                where=where_of(root, partition, mount),
                at=at,
                recorded_as=recorded_as,
                oracle=oracle,
                tell=status.update,
            )
            with case:
                told = case.explain(paths or (), modes, failures)
                taken = case.taken
        tell_differences(case.comparison)
        if not paths:
            _overview(source, told.histories, taken, json=json)
        _print(source, told.files, json=json)
    verdicts = {cell.worst.verdict for one in told.files for cell in one.replay.cells}
    cuts = [cell.cut.position for one in told.files for cell in one.replay.cells]
    # Without a file that is named, it is told of all that was recorded.
    last = max(cuts, default=source.events)
    raise typer.Exit(code_at(source, last, EXIT[merge(verdicts)]))


def _overview(
    source: RecordedSource, told: Sequence[FileHistory], taken: Taken, *, json: bool
) -> None:
    levels = [guarantee(mode, Failure.HOST_POWER_LOSS) for mode in taken.tells]
    if json:
        print_json(histories.overview_json(told, source))
    else:
        for line in histories.overview_lines(told, source, taken):
            out.print(line, markup=False)
    asked = Level.FLUSHED if Level.FLUSHED in levels else Level.COMPLETED
    verdict = merge({FileCheck(one.levels[asked].changes[-1].condition).verdict for one in told})
    raise typer.Exit(code_at(source, source.events, EXIT[verdict]))


def _print(source: RecordedSource, found: Sequence[FileExplanation], *, json: bool) -> None:
    if json:
        print_json([histories.to_json(one, source) for one in found])
        return
    for number, one in enumerate(found):
        if number:
            out.print()
        for line in histories.lines(one, source):
            out.print(line, markup=False)
