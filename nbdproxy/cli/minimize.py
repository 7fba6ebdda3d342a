"""`nbdproxy minimize`: the fewest writes that have to be missing for a state to fail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.exploring import TIME_LIMIT_S, Check
from nbdproxy.case.oracles import OracleName
from nbdproxy.cli.checks import CheckCommand, Files, TimeLimit, option_of_base
from nbdproxy.cli.choices import BaseOption, Mounts, PartitionOption, Root, where_of
from nbdproxy.cli.console import out, print_json
from nbdproxy.cli.oracles import OracleChoice
from nbdproxy.cli.recorded import recorded, telling, warn
from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.report import minimized


def minimize(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    state: Annotated[str, typer.Option(metavar="ID", help="A state that fails.")],
    files: Files = None,
    check: CheckCommand = None,
    time_limit: TimeLimit = TIME_LIMIT_S,
    root: Root = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    base: BaseOption = None,
    oracle: OracleChoice = OracleName.QUICK,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the fewest writes that have to be missing for a state to fail, and say which they are.

    Each is told with its request, the file that it belonged to, and the flush that should have
    covered it. Check with what the state failed: the same manifest, or the same command. Exit code
    1, because the state fails; 2 if it does not.

    Examples:

      nbdproxy minimize run1 --state s1234.flushed.draw1-7 --files npm.sha256

      nbdproxy minimize run1 --state s1234.flushed.must --check './check "$uri"'
    """
    chosen = parse_state_id(state)
    with recorded(run, base) as source:
        case = Case(
            [source],
            files=files,
            where=where_of(root, partition, mount),
            base=base,
            oracle=oracle,
            warn=warn,
        )
        with case, telling(case, "minimizing"):
            told = case.minimize(chosen, Check(check, time_limit))
    if json:
        print_json(minimized.to_json(told, str(run)))
    else:
        for line in minimized.lines(told, str(run), option_of_base(base)):
            out.print(line, markup=False)
    raise typer.Exit(1)
