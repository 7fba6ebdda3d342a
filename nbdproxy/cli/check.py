"""`nbdproxy check`: one state of a disk: does it mount, what says fsck, which files are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.oracles import OracleName
from nbdproxy.case.states import StateChoice
from nbdproxy.cli.choices import BaseOption, Mounts, PartitionOption, Root, where_of
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import EXIT, OracleChoice, differences_json, tell_differences
from nbdproxy.cli.states import State, StateAt, StateFailure, StateMode, disk_state
from nbdproxy.oracles import manifest
from nbdproxy.report import checked


def check(
    where: Annotated[Path, typer.Argument(metavar="RUN|IMAGE", help="A recording, or an image.")],
    state: State = None,
    at: StateAt = None,
    mode: StateMode = None,
    failure: StateFailure = None,
    files: Annotated[
        Path | None,
        typer.Option(metavar="MANIFEST", help="Also tell the condition of these files."),
    ] = None,
    root: Root = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    base: BaseOption = None,
    oracle: OracleChoice = OracleName.QUICK,
    fsck: Annotated[bool, typer.Option(help="Run the filesystem's own checker.")] = True,
    list_files: Annotated[
        bool, typer.Option("--list", help="Also list the files that are not whole.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell of one crash state whether it mounts, what the journal changes, and what fsck finds.

    And, with --files, in which condition each file is. The state is named as for open: --at alone
    is the disk with all that had been sent by then (by default at the end), with --mode and
    --failure it is the worst state that these allow. Without a kernel (--oracle quick) nothing is
    mounted: the journal is replayed in memory, and e2fsck runs on a copy. Exit code 0 if all is
    well, 1 if not, 2 if that cannot be told.

    Examples:

      nbdproxy check run1 --at before-exit --mode none --failure host-power-loss

      nbdproxy check run1 --state s1234.flushed.must --files npm.sha256 --list

      nbdproxy check run1 --at end --oracle kernel

      nbdproxy check disk.img --files npm.sha256 --no-fsck
    """
    wanted = None if files is None else manifest.load(files)
    with disk_state(where, StateChoice(state, at, mode, failure), base) as (found, fine):
        with (
            err.status("looking at the filesystem") as status,
            Case(
                files=wanted,
                where=where_of(root, partition, mount),
                oracle=oracle,
                tell=status.update,
            ) as case,
        ):
            told = case.check(found, fsck=fsck)
        tell_differences(case.comparison)
        if json:
            print_json(
                {
                    **checked.to_json(told, list_files=list_files),
                    **differences_json(case.comparison),
                }
            )
        else:
            for line in checked.lines(told, list_files=list_files):
                out.print(line, markup=False)
    raise typer.Exit(EXIT[told.verdict] or fine)
