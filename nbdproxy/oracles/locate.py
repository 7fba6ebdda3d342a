"""`locate`: the guest's tree and the paths of a manifest in it, found on a good state of its disks.

The tree is the user's options, or else the guest's own /etc/fstab, or else inferred from the files
(`mount_inference`). It is found once and used to judge all other states.

Guarantees: a file is assigned to a filesystem only by the user, by an fstab, or by the content of
files of its directory, or if everything on the disks can be read. Files that may be in something
unreadable (LUKS, a thin volume, a filesystem for which a kernel is needed) cannot be told, and the
reason names it (`uncertain_locations`). A file that is on none of the filesystems that can be read
was certainly not sent.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles import check, location_ranking, mount_inference, moves, partitions
from nbdproxy.oracles.guest_disks import GuestDisks
from nbdproxy.oracles.location_ranking import CandidateLocation
from nbdproxy.oracles.manifest import Entries, Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName, Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.plans import (
    GivenMount,
    MountPlan,
    completed_from_fstab,
    plan_from_options,
    plans_from_fstab,
)
from nbdproxy.oracles.quick import QUICK
from nbdproxy.oracles.resolutions import Resolution, resolutions
from nbdproxy.oracles.uncertain_locations import trees_with_doubts, unplaced


@dataclass(frozen=True, slots=True)
class Where:
    """The user's options on where files are.

    root       the directory that a manifest's paths begin at
    partition  the partition that all of them are on; 0 is the whole disk
    mounts     what is mounted where; one at / makes this complete, with the fstab that is there
    """

    root: str | None = None
    partition: int | None = None
    mounts: tuple[GivenMount, ...] = ()


ANYWHERE = Where()


def locate(
    oracle: Oracle,
    device: ReadableDevice,
    manifest: Manifest,
    where: Where = ANYWHERE,
    other: ReadableDevice | None = None,
) -> tuple[Tree, Manifest]:
    """Return the guest's tree, and the manifest with its paths in it.

    Meant for a good state. `other` is another one that will be judged by it: what cannot be read
    there may have files as well. Raises FilesystemError if nothing can be read or it is not clear
    what is mounted where, ManifestError if the manifest matches nowhere.
    """
    others = [] if other is None else [other]
    (tree,), found = locate_all(oracle, [device], manifest, where, others)
    return tree, found


def locate_all(
    oracle: Oracle,
    devices: Sequence[ReadableDevice],
    manifest: Manifest,
    where: Where = ANYWHERE,
    others: Sequence[ReadableDevice] = (),
    *,
    names: Sequence[str] = (),
) -> tuple[list[Tree], Manifest]:
    """Do what `locate` does, for all disks of one guest; returns each disk's part of the tree.

    `names` are what a user calls the disks.
    """
    if where.root is not None:
        manifest = below(where.root, manifest)
    if where.partition is not None:
        if where.root is None:
            manifest = _on_one(oracle, devices[0], manifest, where)
        tree = Tree((Mount(partition=where.partition),))
        doubtful = _left_out(oracle, devices[0], manifest, where.partition)
        return [replace(tree, doubtful=doubtful)], manifest
    disks = GuestDisks(oracle, devices, others, names)
    given = plan_from_options(disks, where.mounts)
    if "/" in given.unreadable:
        raise FilesystemError(f"nothing can be judged: {given.unreadable['/']}")
    if "/" in given.mounts_at:
        plan = completed_from_fstab(disks, given, frozenset(manifest.paths()))
        manifest = _resolved(plan, disks, manifest, where, as_named=True)
        if not plan.from_fstab:
            return plan.trees(disks), manifest
        return trees_with_doubts(
            disks, mount_inference.with_inferred_mounts(disks, plan, manifest), manifest
        ), manifest
    plan, manifest = _best(disks, given, manifest, where)
    return trees_with_doubts(disks, plan, manifest), manifest


def survey_tree(
    oracle: Oracle,
    device: ReadableDevice,
    where: Where = ANYWHERE,
    other: ReadableDevice | None = None,
) -> Tree:
    """Return the tree of a disk without a manifest; `other` as in `locate`.

    Raises FilesystemError if it is not clear what is mounted where.
    """
    if where.partition is not None:
        return Tree((Mount(partition=where.partition),))
    disks = GuestDisks(oracle, [device], [] if other is None else [other])
    given = plan_from_options(disks, where.mounts)
    if "/" in given.unreadable:
        raise FilesystemError(given.unreadable["/"])
    if "/" in given.mounts_at:
        plan = completed_from_fstab(disks, given, frozenset())
        (tree,) = plan.trees(disks)
        unreadable_text = unplaced(disks, plan) if plan.from_fstab else []
        return replace(tree, unplaced=", ".join(map(str, unreadable_text)))
    plans = plans_from_fstab(disks, given, frozenset())
    if len(plans) > 1:
        raise FilesystemError(
            "several systems are on the disk, each with an fstab of its own; say what is mounted "
            "where with --mount"
        )
    if plans or given.mounts_at:
        plan = plans[0] if plans else given
    else:
        top = Mount(partition=check.only(check.candidates(device, None), or_mount=True).key)
        plan = replace(given, mounts_at={"/": (0, top)})
    (tree,) = plan.trees(disks)
    return replace(tree, unplaced=", ".join(map(str, unplaced(disks, plan))))


def tree_by_fstab(device: ReadableDevice) -> Tree | None:
    """Return the tree of a disk, for descriptions; None if it is ambiguous or unreadable."""
    try:
        return survey_tree(QUICK, device)
    except FilesystemError:
        return None


def below(root: str, manifest: Manifest) -> Manifest:
    """Put every path of a manifest below a directory of the guest."""
    return Manifest(
        Entries(
            replace(entry, path=posixpath.join(f"/{root.lstrip('/')}", entry.path.lstrip("/")))
            for entry in manifest.entries
        )
    )


def _on_one(oracle: Oracle, device: ReadableDevice, manifest: Manifest, where: Where) -> Manifest:
    """Return the manifest with the paths of one partition."""
    mount = Mount(partition=where.partition)
    try:
        there = oracle.paths(device, mount=mount)
    except check.PartlyListedError as error:
        there = error.paths
    found = resolutions(manifest, frozenset(there))
    disks = GuestDisks(oracle, [device])
    sure = moves.fitting(lambda path: disks.has_folder(0, mount, path), manifest, found)
    if found and not sure:
        raise _elsewhere(found)
    return location_ranking.resolved_manifest(oracle, [device], [Tree((mount,))], manifest, sure)


def _left_out(
    oracle: Oracle, device: ReadableDevice, manifest: Manifest, partition: int
) -> dict[str, str]:
    """Return the files that fstab assigns to another partition than `partition`, and why.

    Not those that are whole on `partition`.
    """
    disks = GuestDisks(oracle, [device])
    top = next(
        (s for s in disks.filesystems if partition in {_number(device, s.part), s.part}), None
    )
    plans = [
        p
        for p in plans_from_fstab(disks, MountPlan(), frozenset())
        if top and p.top == (0, top.part)
    ]
    if top is None or len(plans) != 1:
        return {}
    (tree,) = plans[0].trees(disks)
    there = disks.paths(top)
    found: dict[str, str] = {}
    for entry in manifest.entries:
        place = tree.of(entry.path)
        if isinstance(place, Mount):
            if place.partition == top.part:
                continue
            filesystems = (*disks.filesystems, *disks.unreadable_filesystems)
            name = next(s.name for s in filesystems if s.part == place.partition)
            why = f"{place.point} is on {name} (by fstab)"
        else:
            why = f"{place} (by fstab)"
        content = disks.content(top, "/", entry) if entry.path in there else None
        if content is None or not entry.is_of(content):
            found[entry.path] = f"{why}, which --partition {partition} leaves out"
    return found


def _number(device: ReadableDevice, key: PartitionName) -> int | None:
    """Return the number of a part of a disk."""
    return next((p.number for p in partitions.slices(device) if p.key == key), None)


def _resolved(
    plan: MountPlan, disks: GuestDisks, manifest: Manifest, where: Where, *, as_named: bool = False
) -> Manifest:
    """Return a manifest with the paths that its files have under a plan.

    `as_named` leaves absolute paths unchanged: where the guest's tree is known, or could be any.
    """
    if where.root is not None:
        return manifest
    found = resolutions(manifest, plan.known(disks))
    stand = as_named and all(path.startswith("/") for path in manifest.paths())
    sure = [
        one
        for one in moves.fitting(partial(plan.has_folder, disks), manifest, found)
        if one.place == "" or not stand
    ]
    if found and not sure:
        raise _elsewhere(found)
    return location_ranking.resolved_manifest(
        disks.oracle, disks.devices, plan.trees(disks), manifest, sure
    )


def _best(
    disks: GuestDisks, given: MountPlan, manifest: Manifest, where: Where
) -> tuple[MountPlan, Manifest]:
    """Return the plan under which most of the files are there, and the manifest with its paths."""
    names = frozenset(manifest.paths())
    is_absolute = all(path.startswith("/") for path in names)
    plans = plans_from_fstab(disks, given, names)
    if plans and (found := _most(disks, plans, manifest, where, as_named=True)) is not None:
        return mount_inference.with_inferred_mounts(disks, *found), found[1]
    if plans and all("/" in plan.unreadable for plan in plans):
        raise FilesystemError(f"nothing can be judged: {plans[0].unreadable['/']}")
    if plans:
        if len(plans) == len(disks.filesystems) == 1 and not disks.unreadable:
            _resolved(plans[0], disks, manifest, where, as_named=True)  # says what there is
        raise _matches_nothing(disks)
    if not disks.filesystems:
        if (
            where.root is not None
            and len(disks.unreadable) == len(disks.unreadable_filesystems) <= 1
        ):
            return MountPlan({"/": (0, Mount())}), manifest  # as soon as there is any, it is that
        raise _nothing_readable(disks)
    singles = [MountPlan({"/": p.mount("/", root)}) for p in disks.filesystems for root in p.roots]
    if len(singles) == 1 and not disks.unreadable and not given.mounts_at:
        return _on_the_only_one(disks, singles[0], manifest, where)
    if is_absolute:
        plan = mount_inference.with_inferred_mounts(disks, given, manifest)
        if plan.mounts_at:
            return plan, manifest
    if where.root is not None and len(disks.filesystems) > 1:
        raise FilesystemError(disks.ambiguity())
    if where.root is not None or (is_absolute and disks.unreadable):
        raise _matches_nothing(disks)  # what has the names only may be a copy of what is hidden
    found = _most(disks, singles, manifest, where, as_named=is_absolute)
    if found is None:
        raise _matches_nothing(disks)
    return found


def _on_the_only_one(
    disks: GuestDisks, single: MountPlan, manifest: Manifest, where: Where
) -> tuple[MountPlan, Manifest]:
    """Return the plan of the only filesystem that there is, and the manifest with its paths.

    Where no change of all paths fits, it may be a data disk with some of a whole guest's files.
    """
    try:
        return single, _resolved(single, disks, manifest, where)
    except ElsewhereError:
        raise
    except ManifestError:
        if all(entry.path.startswith("/") for entry in manifest.entries):
            plan = mount_inference.with_inferred_mounts(disks, MountPlan(), manifest)
            if plan.mounts_at:
                return plan, manifest
        raise


def _most(
    disks: GuestDisks,
    plans: Sequence[MountPlan],
    manifest: Manifest,
    where: Where,
    *,
    as_named: bool = False,
) -> tuple[MountPlan, Manifest] | None:
    """Return the plan with most of the files; None if none has any, but for a --root."""
    places: list[tuple[MountPlan, CandidateLocation]] = []
    for plan in plans:
        known = plan.known(disks)
        try:
            resolved = _resolved(plan, disks, manifest, where, as_named=as_named)
        except ManifestError:
            continue
        count = sum(path in known for path in resolved.paths())
        places.append((plan, CandidateLocation(plan.trees(disks), resolved, count)))
    if not places:
        return None
    found = location_ranking.best(disks.oracle, disks.devices, [place for _, place in places])
    best = [(plan, place.manifest) for plan, place in places if place in found]
    # Of one filesystem's subvolumes, without an fstab, the default one counts, or the first.
    if len(best) > 1 and (best[0][0].from_fstab or len({plan.top for plan, _ in best}) > 1):
        raise FilesystemError(
            f"the manifest matches equally well {' and '.join(p.words(disks) for p, _ in best)}; "
            f"name one of them with --partition, or say what is mounted where with --mount"
        )
    return best[0]


class ElsewhereError(ManifestError):
    """No file is at its path in the manifest, and those elsewhere may be a copy."""


def _elsewhere(found: Sequence[Resolution]) -> ElsewhereError:
    return ElsewhereError(
        f"the manifest matches nothing where its paths lead: files of these names are in "
        f"{found[0].place}, which may be a copy of what was lost; say where its paths begin with "
        f"--root PATH (--root / if they are right), or what is mounted where with "
        f"--mount WHAT:POINT[:ROOT]"
    )


def _nothing_readable(disks: GuestDisks) -> FilesystemError:
    if not disks.unreadable:
        for device in disks.devices:
            check.candidates(device, None)  # says what it looked for
    return FilesystemError(f"nothing can be read: {disks.unreadable_text()}")


def _matches_nothing(disks: GuestDisks) -> FilesystemError | ManifestError:
    if disks.unreadable:
        return FilesystemError(
            f"no file of the manifest is whole where its path leads, but not all can be read: "
            f"{disks.unreadable_text()}"
        )
    return ManifestError(
        "the manifest matches nothing on any of these filesystems: if none of its files was ever "
        "there, say where they belong with --root PATH, and what is mounted where with --mount"
    )
