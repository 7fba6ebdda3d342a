"""One state of a disk: does it mount, what says fsck, which files are whole."""

from __future__ import annotations

from dataclasses import replace

from nbdproxy.case.states import DiskState
from nbdproxy.crash.blame.replay import earlier_digests
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles.check import candidates
from nbdproxy.oracles.composite import TreeCheck, split
from nbdproxy.oracles.condition import doubt_of
from nbdproxy.oracles.locate import ElsewhereError, Where, below, locate
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName, Tree
from nbdproxy.oracles.oracle import EarlierDigests, Oracle
from nbdproxy.oracles.owners import owners
from nbdproxy.oracles.partitions import slices
from nbdproxy.report.checked import Checked, CheckedFilesystem


def check(
    state: DiskState, wanted: Manifest | None, where: Where, oracle: Oracle, *, fsck: bool = True
) -> Checked:
    """Look at the filesystems of a state, and at the files of a manifest if there is one.

    Without `fsck` no checker is run. Raises FilesystemError or ManifestError if `where` names what
    is not there.
    """
    tree, wanted = _placed(state, wanted, where, oracle)
    findings = doubt = None
    if wanted is not None:
        earlier: EarlierDigests = {}
        if state.timeline is not None:
            earlier = earlier_digests(state.timeline, wanted, tree, oracle)
        findings = TreeCheck(oracle, wanted, earlier, tree).check(state.disk, None)
        doubt = doubt_of(wanted, [findings.conditions.get])
    looked = tuple(
        _examined(oracle, state.disk, tree, partition, fsck=fsck)
        for partition in _partitions(state.disk, tree, wanted, where)
    )
    return Checked(state.name, looked, findings, doubt)


def _placed(
    state: DiskState, wanted: Manifest | None, where: Where, oracle: Oracle
) -> tuple[Tree, Manifest | None]:
    """Return the guest's tree, and the manifest with its paths.

    That it is not found is no reason to give up: of the files it is said why they cannot be told.
    """
    if wanted is None:
        try:
            return state.tree(oracle, where), None
        except FilesystemError:
            if where.mounts:
                raise
            return Tree((Mount(partition=where.partition),)), None
    is_absolute = all(path.startswith("/") for path in wanted.paths())
    as_named = replace(where, root=where.root or "/") if is_absolute else where
    try:
        try:
            return _located(state, wanted, where, oracle)
        except ElsewhereError:
            raise
        except (FilesystemError, ManifestError):
            if as_named == where:
                raise
            # Not even elsewhere: the paths are right, and the files missing.
            return _located(state, wanted, as_named, oracle)
    except (FilesystemError, ManifestError) as error:
        if where.mounts or as_named.root is None:
            raise
        return Tree((), unmounted_reason=str(error)), below(as_named.root, wanted)


def _located(
    state: DiskState, wanted: Manifest, where: Where, oracle: Oracle
) -> tuple[Tree, Manifest]:
    return state.found(lambda one, other: locate(oracle, one, wanted, where, other))


def _partitions(
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
    oracle: Oracle, disk: ReadableDevice, tree: Tree, partition: PartitionName, *, fsck: bool
) -> CheckedFilesystem:
    """Tell of one filesystem of the disk."""
    points = [mount.point for mount in tree.mounts if mount.partition == partition]
    names = (part.name for part in slices(disk) if partition in {part.number, part.key})
    name = next(names, f"partition {partition}")
    found = oracle.examine(disk, partition=partition, fsck=fsck)
    return CheckedFilesystem(
        ", ".join((name, *(f"at {point}" for point in points))),
        found,
        tuple(owners(disk, found.replayed, tree)),
    )
