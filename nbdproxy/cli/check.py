"""`nbdproxy check`: one state of a disk: does it mount, what says fsck, which files are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.checker.both import BothOracles
from nbdproxy.cli.choices import Base, Partition, Root
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import (
    OracleChoice,
    OracleName,
    differences_json,
    opened,
    tell_differences,
)
from nbdproxy.cli.states import State, StateAt, StateFailure, StateMode, choose
from nbdproxy.crash.recorded import RecordedSource, is_recording
from nbdproxy.crash.replay import earlier_digests
from nbdproxy.crash.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import FilesystemError, ManifestError, UsageError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.check import Verdict, candidates
from nbdproxy.oracles.composite import TreeFollower
from nbdproxy.oracles.locate import Where, locate
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.oracle import Digests, Oracle
from nbdproxy.oracles.owners import owners
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.recording.reader import no_recording
from nbdproxy.report import checked

_EXIT = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.UNKNOWN: 2}


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
    partition: Partition = None,
    base: Base = None,
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
    with (
        _disk(where, (state, at, mode, failure), base) as (name, disk, timeline),
        err.status("looking at the filesystem") as status,
        opened(oracle, status.update) as judge,
    ):
        if isinstance(judge, BothOracles):
            judge.state = name
        tree = Tree((Mount(partition=partition),))
        if wanted is not None:
            tree, wanted = _placed(judge, disk, wanted, Where(root, partition))
        examination = judge.examine(disk, partition=tree.mounts[0].partition, fsck=fsck)
        findings = None
        if wanted is not None:
            earlier: Digests = {}
            if timeline is not None:
                earlier = earlier_digests(timeline, wanted, tree, judge)
            findings = TreeFollower(judge, wanted, earlier, tree).check(disk, None)
        owned = tuple(owners(disk, examination.replayed, tree))
    tell_differences(judge)
    told = checked.Checked(name, examination, owned, findings)
    if json:
        print_json({**checked.to_json(told, list_files=list_files), **differences_json(judge)})
    else:
        for line in checked.lines(told, list_files=list_files):
            out.print(line, markup=False)
    raise typer.Exit(_EXIT[told.verdict])


@contextmanager
def _disk(
    where: Path,
    named: tuple[str | None, str | None, CacheMode | None, Failure | None],
    base: Path | None,
) -> Iterator[tuple[str, ReadableDevice, Timeline | None]]:
    """Yield what the state is called, its disk, and the timeline that it is of, if any."""
    if where.is_dir() and not is_recording(where):
        raise no_recording(where)
    if not is_recording(where):
        if any(named) or base is not None:
            raise UsageError(f"{where} is no recording: it has one state only; drop the options")
        disk = FileDisk(where, read_only=True)
        try:
            yield str(where), disk, None
        finally:
            disk.close()
        return
    with RecordedSource(where, image=base) as source:
        timeline = Timeline(source)
        try:
            chosen = choose(timeline, *(named if any(named) else (None, "end", None, None)))
            yield f"state {chosen} of {where}", timeline.open(chosen), timeline
        finally:
            timeline.close()


def _placed(
    judge: Oracle, disk: ReadableDevice, wanted: Manifest, where: Where
) -> tuple[Tree, Manifest]:
    """Return the tree, and the manifest with absolute paths."""
    tree = Tree((Mount(partition=where.partition),))
    is_absolute = all(entry.path.startswith("/") for entry in wanted.entries)
    if where.root is not None or not is_absolute:
        return locate(judge, disk, wanted, where)
    if where.partition is not None:
        return tree, wanted
    try:
        if len(candidates(disk, None)) > 1:
            return locate(judge, disk, wanted)[0], wanted
    except (FilesystemError, ManifestError):
        pass  # what is wrong is said of the filesystem, below
    return tree, wanted
