"""`nbdproxy minimize`: the fewest writes that have to be missing for a state to fail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.choices import BaseOption, Mounts, PartitionOption, Root, where_of
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.explore import TIME_LIMIT_S, Check, Files, TimeLimit, make_judge, option_of_base
from nbdproxy.cli.oracles import OracleChoice, OracleName
from nbdproxy.cli.recorded import recorded
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, StateEvaluator
from nbdproxy.crash.explore.judging import ManifestPlan
from nbdproxy.crash.explore.minimize import minimize as minimize_state
from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.report import minimized


def minimize(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    state: Annotated[str, typer.Option(metavar="ID", help="A state that fails.")],
    files: Files = None,
    check: Check = None,
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
        timeline = Timeline(source)
        timeline.open(chosen)
        at = f"seq:{chosen.position - 1}" if chosen.position else "end"
        judge = make_judge(
            timeline, files, check, at, where_of(root, partition, mount), time_limit, oracle
        )
        job = EvaluatorSetup(run.absolute(), base, chosen.level, chosen.options, judge)
        bench = StateEvaluator(source, job)
        try:
            with err.status("minimizing") as status:
                found = minimize_state(
                    bench,
                    chosen,
                    progress=lambda left, checks: status.update(
                        f"minimizing: {left:,} pieces left after {checks:,} checks"
                    ),
                )
                tree = judge.tree if isinstance(judge, ManifestPlan) else None
                told = minimized.tell(bench.timeline, found, tree)
        finally:
            bench.close()
            timeline.close()
    if json:
        print_json(minimized.to_json(told, str(run)))
    else:
        for line in minimized.lines(told, str(run), option_of_base(base)):
            out.print(line, markup=False)
    raise typer.Exit(1)
