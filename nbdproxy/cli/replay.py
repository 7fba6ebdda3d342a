"""`nbdproxy replay`: the table cache mode x failure."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.oracles import OracleName
from nbdproxy.cli.choices import (
    At,
    BaseOption,
    Covers,
    FailureText,
    ModeText,
    Mounts,
    PartitionOption,
    RecordedAs,
    Root,
    parse_list,
    where_of,
)
from nbdproxy.cli.console import err, out, print_fields, print_json
from nbdproxy.cli.oracles import EXIT, OracleChoice, differences_json, tell_differences
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.crash.blame.together import Together
from nbdproxy.crash.states.recorded import RecordedSource, is_recording
from nbdproxy.errors import UsageError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.check import merge
from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.printable import printable
from nbdproxy.report import table, words
from nbdproxy.report.replayed import to_json


def replay(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="A recording; several, or a folder of them: one guest's disks."
        ),
    ],
    files: Annotated[
        Path, typer.Option(metavar="MANIFEST", help="The files that should be there (sha256sum).")
    ],
    mode: ModeText = None,
    failure: FailureText = None,
    at: At = None,
    root: Root = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    recorded_as: RecordedAs = None,
    covers: Covers = Coverage.RECEIVED,
    base: BaseOption = None,
    oracle: OracleChoice = OracleName.QUICK,
    list_files: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Also list the lost files, one a line, tabs between the fields; with --json, too.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell which files each mode and failure would leave whole.

    And for each of the others, who lost it: the guest, a cache without a flush, or the store.
    Each failure strikes where it tells most: a guest's poweroff at the end, all others at the last
    instant before QEMU's own exit flushes. Files that were never sent cannot be found by looking:
    if none was, say where they belong with --root (/ for absolute paths). What is mounted where is
    read in the guest's /etc/fstab, or told with --mount. Exit code 0 if no file is lost in any
    cell, 1 if one is, 2 if none is and something cannot be told.

    Examples:

      nbdproxy replay run1 --files npm.sha256

      nbdproxy replay run1 --files npm.sha256 --mode none,writethrough --failure host-power-loss

      nbdproxy replay run1 --files npm.sha256 --root / --at riskiest --json

      nbdproxy replay run1 --files npm.sha256 --mode none --failure host-power-loss --list

      nbdproxy replay run1 --files npm.sha256 --oracle kernel

      nbdproxy replay run1 --files all.sha256 --mount 1:/boot --mount vg/root:/

      nbdproxy replay run1/root.img run1/home.img --files all.sha256
    """
    found = [run for path in runs for run in _recordings(path)]
    for number, run in enumerate(found):
        if run.resolve() in {other.resolve() for other in found[:number]}:
            raise UsageError(f"{run} is named twice; name each recording once")
    if base is not None and len(found) > 1:
        raise UsageError("--base is the image of one recording; name one recording, or drop it")
    wanted = manifest.load(files)
    with ExitStack() as stack:
        several = len(found) > 1
        sources = [stack.enter_context(recorded(run, base, name=several)) for run in found]
        with err.status("judging crash states") as status:
            modes = parse_list(mode, CacheMode, "--mode")
            failures = parse_list(failure, Failure, "--failure") or tuple(Failure)
            case = stack.enter_context(
                Case(
                    sources,
                    files=wanted,
                    where=where_of(root, partition, mount),
                    at=at,
                    model=Options(coverage=covers),
                    recorded_as=recorded_as,
                    oracle=oracle,
                    tell=status.update,
                )
            )
            together = case.replay(modes, failures)
        tell_differences(case.comparison)
        if json:
            told = to_json(together, sources, [str(run) for run in found], files=list_files)
            print_json({**told, **differences_json(case.comparison)})
        else:
            _print(together, sources[0], list_files=list_files)
    code = EXIT[merge({cell.verdict for cell in together.table.cells})]
    for source, own in zip(sources, together.each, strict=True):
        code = code_at(source, max(cell.cut.position for cell in own.cells), code)
    raise typer.Exit(code)


def _print(together: Together, source: RecordedSource, *, list_files: bool) -> None:
    result = together.table
    if list_files:
        for fields in table.lost_files(result):
            print_fields(fields)
    out.print(table.render(result, source))
    for line in table.footnotes(together):
        out.print(printable(line), markup=False, style="dim")
    for sentence in words.sentences(result):
        out.print(printable(sentence), markup=False)


def _recordings(path: Path) -> list[Path]:
    """Return a recording, or those in a folder of several: `serve` makes one for each export."""
    if is_recording(path) or not path.is_dir():
        return [path]
    return sorted(filter(is_recording, path.iterdir())) or [path]
