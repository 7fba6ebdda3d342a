"""`nbdproxy check`: one state of a disk: does it mount, what says fsck, which files are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.checker.both import BothOracles
from nbdproxy.cli.choices import BaseOption, Mounts, PartitionOption, Root, where_of
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import (
    EXIT,
    OracleChoice,
    OracleName,
    differences_json,
    opened,
    tell_differences,
)
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.cli.states import (
    State,
    StateAt,
    StateFailure,
    StateMode,
    at_the_end_or_here,
    choose,
    tree_of_disk,
)
from nbdproxy.crash.blame.replay import earlier_digests
from nbdproxy.crash.states.recorded import is_recording
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import refuse_foreign
from nbdproxy.errors import FilesystemError, ManifestError, UsageError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.check import candidates
from nbdproxy.oracles.composite import TreeCheck, split
from nbdproxy.oracles.condition import doubt_of
from nbdproxy.oracles.locate import ElsewhereError, Where, below, locate
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName, Tree
from nbdproxy.oracles.oracle import EarlierDigests, Oracle
from nbdproxy.oracles.owners import owners
from nbdproxy.oracles.partitions import slices
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.recording.reader import no_recording
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
    with (
        state_disk(where, (state, at, mode, failure), base) as (name, disk, timeline, fine),
        err.status("looking at the filesystem") as status,
        opened(oracle, status.update) as judge,
    ):
        if isinstance(judge, BothOracles):
            judge.state = name
        known = where_of(root, partition, mount)
        tree, wanted = _placed(judge, disk, timeline, wanted, known)
        findings = doubt = None
        if wanted is not None:
            earlier: EarlierDigests = {}
            if timeline is not None:
                earlier = earlier_digests(timeline, wanted, tree, judge)
            findings = TreeCheck(judge, wanted, earlier, tree).check(disk, None)
            doubt = doubt_of(wanted, [findings.conditions.get])
        looked = tuple(
            _examined(judge, disk, tree, number, fsck=fsck)
            for number in _asked(disk, tree, wanted, known)
        )
    tell_differences(judge)
    told = checked.Checked(name, looked, findings, doubt)
    if json:
        print_json({**checked.to_json(told, list_files=list_files), **differences_json(judge)})
    else:
        for line in checked.lines(told, list_files=list_files):
            out.print(line, markup=False)
    raise typer.Exit(EXIT[told.verdict] or fine)


@contextmanager
def state_disk(
    where: Path,
    named: tuple[str | None, str | None, CacheMode | None, Failure | None],
    base: Path | None,
) -> Iterator[tuple[str, ReadableDevice, Timeline | None, int]]:
    """Yield what the state is called, its disk, the timeline that it is of, if any, and a code.

    That is the exit code where all is well with it: 2 if it is the state at an end that is lost.
    """
    if where.is_dir() and not is_recording(where):
        raise no_recording(where)
    if not is_recording(where):
        if any(named) or base is not None:
            raise UsageError(f"{where} is no recording: it has one state only; drop the options")
        disk = FileDisk(where, read_only=True)
        try:
            refuse_foreign(disk)
            yield str(where), disk, None, 0
        finally:
            disk.close()
        return
    with recorded(where, base) as source:
        timeline = Timeline(source)
        try:
            chosen = choose(timeline, *(named if any(named) else (None, "end", None, None)))
            fine = code_at(source, chosen.position)
            yield f"state {chosen} of {where}", timeline.open(chosen), timeline, fine
        finally:
            timeline.close()


def _placed(
    judge: Oracle,
    disk: ReadableDevice,
    timeline: Timeline | None,
    wanted: Manifest | None,
    where: Where,
) -> tuple[Tree, Manifest | None]:
    """Return the tree, found when all was sent or else here, and the manifest with its paths.

    That it is not found is no reason to give up: of the files it is said why they cannot be told.
    """
    if wanted is None:
        try:
            return tree_of_disk(judge, disk, timeline, where), None
        except FilesystemError:
            if where.mounts:
                raise
            return Tree((Mount(partition=where.partition),)), None
    is_absolute = all(path.startswith("/") for path in wanted.paths())
    as_named = replace(where, root=where.root or "/") if is_absolute else where
    try:
        try:
            return _found(judge, disk, timeline, wanted, where)
        except ElsewhereError:
            raise
        except (FilesystemError, ManifestError):
            if as_named == where:
                raise
            # Not even elsewhere: the paths are right, and the files missing.
            return _found(judge, disk, timeline, wanted, as_named)
    except (FilesystemError, ManifestError) as error:
        if where.mounts or as_named.root is None:
            raise
        return Tree((), unmounted_reason=str(error)), below(as_named.root, wanted)


def _found(
    judge: Oracle,
    disk: ReadableDevice,
    timeline: Timeline | None,
    wanted: Manifest,
    where: Where,
) -> tuple[Tree, Manifest]:
    return at_the_end_or_here(
        disk, timeline, lambda one, other: locate(judge, one, wanted, where, other)
    )


def _asked(
    disk: ReadableDevice, tree: Tree, wanted: Manifest | None, where: Where
) -> list[PartitionName]:
    """Return the partitions to look at: those that have the files, or all with a filesystem."""
    if wanted is not None and (parts := split(wanted, tree)[0]):
        return list(dict.fromkeys(mount.partition for mount in parts))
    if where.partition is not None:
        return [where.partition]
    try:
        found = [part.key for part in candidates(disk, None)]
    except FilesystemError:
        return [None]
    return [*found] if len(found) > 1 else [None]


def _examined(
    judge: Oracle, disk: ReadableDevice, tree: Tree, partition: PartitionName, *, fsck: bool
) -> checked.CheckedFilesystem:
    """Tell of one filesystem of the disk."""
    points = [mount.point for mount in tree.mounts if mount.partition == partition]
    names = (part.name for part in slices(disk) if partition in {part.number, part.key})
    name = next(names, f"partition {partition}")
    found = judge.examine(disk, partition=partition, fsck=fsck)
    return checked.CheckedFilesystem(
        ", ".join((name, *(f"at {point}" for point in points))),
        found,
        tuple(owners(disk, found.replayed, tree)),
    )
