"""`nbdproxy replay`: the table cache mode x failure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.checker.both import BothOracles
from nbdproxy.cli.choices import (
    At,
    Base,
    Covers,
    FailureText,
    ModeText,
    Mounts,
    Partition,
    RecordedAs,
    Root,
    parse_list,
    where_of,
)
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import (
    OracleChoice,
    OracleName,
    differences_json,
    opened,
    tell_differences,
)
from nbdproxy.crash.naming import StateId
from nbdproxy.crash.recorded import RecordedSource
from nbdproxy.crash.replay import replay as replay_recording
from nbdproxy.oracles import manifest
from nbdproxy.oracles.check import Verdict
from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.report import table, words
from nbdproxy.report.replayed import to_json


def replay(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    files: Annotated[
        Path, typer.Option(metavar="MANIFEST", help="The files that should be there (sha256sum).")
    ],
    mode: ModeText = None,
    failure: FailureText = None,
    at: At = None,
    root: Root = None,
    partition: Partition = None,
    mount: Mounts = None,
    recorded_as: RecordedAs = None,
    covers: Covers = Coverage.RECEIVED,
    base: Base = None,
    oracle: OracleChoice = OracleName.QUICK,
    list_files: Annotated[
        bool,
        typer.Option("--list", help="Also list the lost files, one a line; with --json, too."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell which files each mode and failure would leave whole.

    And for each of the others, who lost it: the guest, a cache without a flush, or the store.
    Each failure strikes where it tells most: a guest's poweroff at the end, all others at the last
    instant before QEMU's own exit flushes. Files that were never sent cannot be found by looking:
    if none was, say where they belong with --root (/ for absolute paths). Exit code 0 if no file is
    lost in any cell, else 1.

    Examples:

      nbdproxy replay run1 --files npm.sha256

      nbdproxy replay run1 --files npm.sha256 --mode none,writethrough --failure host-power-loss

      nbdproxy replay run1 --files npm.sha256 --root / --at riskiest --json

      nbdproxy replay run1 --files npm.sha256 --mode none --failure host-power-loss --list

      nbdproxy replay run1 --files npm.sha256 --oracle kernel
    """
    source = RecordedSource(run, image=base)
    wanted = manifest.load(files)
    if source.missing:
        err.print(f"note: {source.missing}", markup=False)
    with (
        err.status("judging crash states") as status,
        opened(oracle, status.update) as judge,
    ):

        def about_to_judge(state: StateId) -> None:
            status.update(f"judging crash state {state}")
            if isinstance(judge, BothOracles):
                judge.state = str(state)

        result = replay_recording(
            source,
            wanted,
            modes=parse_list(mode, CacheMode, "--mode"),
            failures=parse_list(failure, Failure, "--failure") or tuple(Failure),
            at=at,
            options=Options(coverage=covers),
            recorded_as=recorded_as,
            where=where_of(root, partition, mount),
            progress=about_to_judge,
            oracle=judge,
        )
    tell_differences(judge)
    if json:
        told = to_json(result, source, str(run), files=list_files)
        print_json({**told, **differences_json(judge)})
    else:
        if list_files:
            for line in table.lost_files(result):
                out.print(line, markup=False)
        out.print(table.render(result, source))
        for line in table.footnotes(result):
            out.print(line, markup=False, style="dim")
        for sentence in words.sentences(result):
            out.print(sentence, markup=False)
    fine = all(cell.verdict is Verdict.PASS for cell in result.cells)
    raise typer.Exit(0 if fine else 1)
