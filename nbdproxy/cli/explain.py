"""`nbdproxy explain`: one file's story, or when all files of a manifest are safe."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.checker.both import BothOracles
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
from nbdproxy.cli.oracles import EXIT, OracleChoice, OracleName, opened, tell_differences
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.crash.blame.file_history import FileHistory, carriers, stories
from nbdproxy.crash.blame.ranges import Losses, losses
from nbdproxy.crash.blame.replay import Replay, place, replay
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.taken import taken_under
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import FilesystemError, UsageError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.check import FileCheck, merge
from nbdproxy.oracles.composite import scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where, survey_tree
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import (
    CacheMode,
    Failure,
    Taken,
    guarantee,
)
from nbdproxy.report import stories as report

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
    """Tell a file's story: when it was sent, answered and flushed, and from when on it was safe.

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
    with recorded(run, base) as source, closing(Timeline(source)) as timeline:
        with err.status("looking at the files") as status, opened(oracle, status.update) as judge:

            def about(state: StateId, done: int = 0, total: int = 0) -> None:
                status.update(
                    f"looking at each instant: {state.level.value}, {done:,} of {total:,}"
                    if total
                    else f"judging crash state {state}"
                )
                if isinstance(judge, BothOracles):
                    judge.state = str(state)

            asked = _Asked(source, timeline, judge, at, modes, failures, recorded_as, about)
            tree, wanted = _wanted(asked, paths or [], files, where_of(root, partition, mount))
            told = stories(timeline, wanted, tree, progress=about, oracle=judge)
            found = [_told(asked, story, tree) for story in told if paths]
            taken = taken_under(timeline, recorded_as)
        tell_differences(judge)
        if not paths:
            _overview(source, told, taken, json=json)
        _print(source, found, json=json)
    verdicts = {cell.worst.verdict for one in found for cell in one.replay.cells}
    cuts = [cell.cut.position for one in found for cell in one.replay.cells]
    # Without a file that is named, it is told of all that was recorded.
    last = max(cuts, default=source.events)
    raise typer.Exit(code_at(source, last, EXIT[merge(verdicts)]))


@dataclass(slots=True)
class _Asked:
    """What is asked, of which recording, and who says what files are.

    `about` hears of each state that is judged next.
    """

    source: RecordedSource
    timeline: Timeline
    oracle: Oracle
    at: str | None
    modes: Sequence[CacheMode] | None
    failures: Sequence[Failure]
    recorded_as: CacheMode | None
    about: Callable[[StateId], None]


def _wanted(
    asked: _Asked, paths: Sequence[str], files: Path | None, where: Where
) -> tuple[Tree, Manifest]:
    """Return what to tell of, and the tree that it is in."""
    cut = resolve(asked.source, asked.at or "before-exit")
    if files is not None:
        listed = manifest.load(files)
        tree, wanted = place(asked.timeline, listed, cut, where, asked.oracle)
    else:
        end = asked.timeline.at(asked.source.events)
        tree, wanted = survey_tree(asked.oracle, end, where), Manifest(())
    if paths:
        absolute = ["/" + posixpath.normpath(path).lstrip("/") for path in paths]
        if files is None:
            wanted = _at_the_end(asked, absolute, tree)
        wanted = _chosen(wanted, absolute, from_manifest=files is not None)
    return tree, wanted


def _told(asked: _Asked, story: FileHistory, tree: Tree) -> report.FileReport:
    table = replay(
        asked.source,
        Manifest((story.entry,)),
        modes=asked.modes,
        failures=asked.failures,
        at=asked.at,
        recorded_as=asked.recorded_as,
        progress=asked.about,
        tree=tree,
        oracle=asked.oracle,
    )
    hangs_on = carriers(asked.timeline, story.entry, tree, oracle=asked.oracle)
    return report.FileReport(story, hangs_on, table, _losses(asked, story.entry, table))


def _losses(asked: _Asked, entry: Entry, table: Replay) -> dict[str, Losses]:
    """Return what the worst states of the cells lack of a file, each state once."""
    found = {}
    for cell in table.cells:
        outcome = cell.worst.files.get(entry.path)
        state = cell.worst.state
        if outcome is None or outcome.condition is Condition.WHOLE or str(state) in found:
            continue
        lost = losses(asked.timeline, entry, state, table.tree, asked.oracle)
        if lost is not None:
            found[str(state)] = lost
    return found


def _at_the_end(asked: _Asked, paths: list[str], tree: Tree) -> Manifest:
    """Return what is in the folders of some files when all has been sent."""
    disk = asked.timeline.at(asked.source.events)
    found: list[Entry] = []
    for folder in dict.fromkeys(posixpath.dirname(path) or "/" for path in paths):
        try:
            found += scan(asked.oracle, disk, folder, tree).entries
        except FilesystemError as error:
            raise UsageError(
                f"what {folder} held in the end cannot be read ({error}); say what should be "
                f"there with --files MANIFEST"
            ) from None
    return Manifest(tuple(found))


def _chosen(wanted: Manifest, paths: list[str], *, from_manifest: bool) -> Manifest:
    """Return the entries of the files that are asked for."""
    known = {entry.path: entry for entry in wanted.entries}
    lost = [path for path in paths if path not in known]
    if lost:
        where = "the manifest" if from_manifest else "what was sent to the disk by the end"
        raise UsageError(
            f"{lost[0]} is not in {where}; its path has to be absolute in the filesystem, and one "
            f"that was never sent has to be in a --files MANIFEST"
        )
    return Manifest(tuple(known[path] for path in dict.fromkeys(paths)))


def _overview(
    source: RecordedSource, told: tuple[FileHistory, ...], taken: Taken, *, json: bool
) -> None:
    levels = [guarantee(mode, Failure.HOST_POWER_LOSS) for mode in taken.tells]
    if json:
        print_json(report.overview_json(told, source))
    else:
        for line in report.overview_lines(told, source, taken):
            out.print(line, markup=False)
    asked = Level.FLUSHED if Level.FLUSHED in levels else Level.COMPLETED
    verdict = merge(
        {FileCheck(story.courses[asked].changes[-1].condition).verdict for story in told}
    )
    raise typer.Exit(code_at(source, source.events, EXIT[verdict]))


def _print(source: RecordedSource, found: list[report.FileReport], *, json: bool) -> None:
    if json:
        print_json([report.to_json(one, source) for one in found])
        return
    for number, one in enumerate(found):
        if number:
            out.print()
        for line in report.lines(one, source):
            out.print(line, markup=False)
