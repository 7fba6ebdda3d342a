"""Files of which a plan of the guest's tree does not say for certain on which filesystem they are.

Something may be mounted that neither fstab nor crypttab names: by a unit of systemd, by hand.
Guarantees: a file is called lost only if content shows that it belongs where it was looked for, or
if nothing else can have it. With something unreadable that is not accounted for, a file that is not
whole is doubtful unless a file of its own directory is whole; a name, or an empty file, is no
evidence. With a filesystem that is not mounted, files that are not whole are doubtful if it has one
of them whole below a directory of the tree. Files that are whole in the tree are not doubtful. Not
covered: a directory that something is mounted over, and in which other files are left whole.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace

from nbdproxy.oracles import mount_inference
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.guest_disks import GuestDisks, GuestUnreadable
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.plans import IN_MEMORY, MountPlan


def trees_with_doubts(disks: GuestDisks, plan: MountPlan, manifest: Manifest) -> list[Tree]:
    """Return the trees of a plan, with `doubtful` files added.

    Content is read only where files may be doubtful: all of it at most once in each state that
    `disks` has, and once more that of files that are not whole.
    """
    trees = plan.trees(disks)
    here = {p: None for p in manifest.paths() if any(_has(tree, p) for tree in trees)}
    plan = replace(plan, doubtful=_perhaps_elsewhere(disks, plan, manifest, here) | plan.doubtful)
    seen = ", ".join(map(str, unplaced(disks, plan)))
    wanted = _of(manifest, {p for p in here if seen or (plan.from_fstab and _is_in_memory(p))})
    doubtful = dict(plan.doubtful)
    for path in _unconfirmed(disks, plan, wanted):
        if plan.from_fstab and _is_in_memory(path):
            doubtful[path] = "what is there is kept in memory, and on no disk"
        else:
            doubtful[path] = f"perhaps in what cannot be read here: {seen}"
    return replace(plan, doubtful=doubtful).trees(disks)


def unplaced(disks: GuestDisks, plan: MountPlan) -> list[GuestUnreadable]:
    """Return what cannot be read, and of which no fstab or crypttab says what it is for."""
    used = {(disk, mount.partition) for disk, mount in plan.mounts_at.values()}
    apart = [one for place, one in disks.partly_listed.items() if place not in used]
    return [one for one in (*disks.unreadable, *apart) if not plan.accounts_for(one)]


def _of(manifest: Manifest, paths: Collection[str]) -> list[Entry]:
    """Return the entries of some files, in order."""
    return [e for e in manifest.entries if e.path in paths] if paths else []


def _has(tree: Tree, path: str) -> bool:
    return isinstance(tree.of(path), Mount)


def _is_in_memory(path: str) -> bool:
    return f"{path}/".startswith(IN_MEMORY)


def _unconfirmed(disks: GuestDisks, plan: MountPlan, entries: Iterable[Entry]) -> set[str]:
    """Return files that are not whole, in directories in which no file is whole.

    One file of each directory is read; if that one is not whole, all others too.
    """
    known = plan.known(disks)
    folders: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        folders[posixpath.dirname(entry.path)].append(replace(entry, mode=None))
    for inside in folders.values():
        inside.sort(key=lambda e: (e.path not in known, e.is_of(b""), e.size or 0))
    whole = _whole(disks, plan, (inside[0] for inside in folders.values()))
    sure = _confirmed_directories(whole)
    rest = [e for f, inside in folders.items() if f not in sure for e in inside[1:]]
    whole |= _whole(disks, plan, rest)
    sure = _confirmed_directories(whole)
    unsure = (e.path for f, inside in folders.items() if f not in sure for e in inside)
    return {path for path in unsure if path not in whole}


def _confirmed_directories(whole: dict[str, Entry]) -> set[str]:
    """Return the directories that have a whole file which is not empty."""
    return {posixpath.dirname(path) for path, entry in whole.items() if not entry.is_of(b"")}


def _perhaps_elsewhere(
    disks: GuestDisks, plan: MountPlan, manifest: Manifest, here: Collection[str]
) -> dict[str, str]:
    """Return files that an unmounted filesystem may have, and where that may be mounted.

    Of the files that are not whole in the plan, at least one has to be whole there.
    """
    possible = [
        (candidate, files)
        for filesystem in mount_inference.unmounted(disks, plan)
        for candidate in mount_inference.candidate_mounts(disks, filesystem, here)
        if candidate.point not in {*plan.mounts_at, *plan.unreadable}
        and plan.has_folder(disks, candidate.point)
        if (files := mount_inference.files_under(plan, candidate.point, candidate.files))
    ]
    wanted: set[str] = set().union(*(files for _, files in possible))
    lost = wanted - _whole(disks, plan, _of(manifest, wanted)).keys()
    found: dict[str, str] = {}
    for candidate, files in possible:
        alone = MountPlan(
            {candidate.point: candidate.filesystem.mount(candidate.point, candidate.root)}
        )
        there = _whole(disks, alone, _of(manifest, files & lost))
        if _confirmed_directories(there):
            where = f"perhaps on {candidate.filesystem.name}, mounted at {candidate.point}"
            why = f"{where}; say so with --mount"
            found |= dict.fromkeys(files & lost, why)
    return found


def _whole(disks: GuestDisks, plan: MountPlan, entries: Iterable[Entry]) -> dict[str, Entry]:
    """Return the files that are whole in a plan, in at least one of the disks' states."""
    wanted = {entry.path: entry for entry in entries}
    found: dict[str, Entry] = {}
    for devices in filter(None, (disks.devices, disks.others)):
        for device, tree in zip(devices, plan.trees(disks), strict=True):
            own = [e for e in wanted.values() if _has(tree, e.path)]
            rest = Manifest(tuple(entry for entry in own if entry.path not in found))
            if not rest.entries:
                continue
            conditions = TreeCheck(disks.oracle, rest, {}, tree).check(device, None).conditions
            found |= {path: wanted[path] for path, c in conditions.items() if c is Condition.WHOLE}
    return found
