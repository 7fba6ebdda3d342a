"""Files of which a plan of the guest's tree does not say for certain where they are.

Something may be mounted of which neither fstab nor crypttab tells: by a unit of systemd, by hand.
Guarantees: a file is called lost only if its place is shown by content, or nothing else can have
it. Where something cannot be read and is not accounted for, a file that is not whole is in doubt
unless a file of its own directory is whole; a name, or an empty file, shows nothing. Where a
filesystem is mounted nowhere, files that are not whole are in doubt if it has one of them whole
below a directory of the tree. Files that are whole where they should be are not in doubt. Not
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
    """Return the trees of a plan, with the files of which it does not say where they are.

    Content is read where there is a doubt only: all of it at most once in each state that `disks`
    has, and once more what is not whole.
    """
    trees = plan.trees(disks)
    here = {p: None for p in manifest.paths() if any(_has(tree, p) for tree in trees)}
    plan = replace(plan, doubtful=_perhaps_elsewhere(disks, plan, manifest, here) | plan.doubtful)
    seen = ", ".join(map(str, unplaced(disks, plan)))
    asked = _of(manifest, {p for p in here if seen or (plan.from_fstab and _is_in_memory(p))})
    doubtful = dict(plan.doubtful)
    for path in _unconfirmed(disks, plan, asked):
        if plan.from_fstab and _is_in_memory(path):
            doubtful[path] = "what is there is kept in memory, and on no disk"
        else:
            doubtful[path] = f"perhaps in what cannot be read here: {seen}"
    return replace(plan, doubtful=doubtful).trees(disks)


def unplaced(disks: GuestDisks, plan: MountPlan) -> list[GuestUnreadable]:
    """Return what cannot be read and is mounted nobody knows where."""
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

    One file of each directory is read, and all of those in which that one is not whole.
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
    """Return the directories that files which are whole show to be the right ones."""
    return {posixpath.dirname(path) for path, entry in whole.items() if not entry.is_of(b"")}


def _perhaps_elsewhere(
    disks: GuestDisks, plan: MountPlan, manifest: Manifest, here: Collection[str]
) -> dict[str, str]:
    """Return files that a filesystem has which is mounted nowhere, and where it may be mounted.

    Not those that are whole in the plan; and a file that is not has to be whole there, which shows
    where the filesystem may be.
    """
    possible = [
        (guess, files)
        for store in mount_inference.unmounted(disks, plan)
        for guess in mount_inference.candidate_mounts(disks, store, here)
        if guess.point not in {*plan.mounts_at, *plan.unreadable}
        and plan.has_folder(disks, guess.point)
        if (files := mount_inference.files_under(plan, guess.point, guess.files))
    ]
    asked: set[str] = set().union(*(files for _, files in possible))
    lost = asked - _whole(disks, plan, _of(manifest, asked)).keys()
    found: dict[str, str] = {}
    for guess, files in possible:
        alone = MountPlan({guess.point: guess.store.mount(guess.point, guess.root)})
        there = _whole(disks, alone, _of(manifest, files & lost))
        if _confirmed_directories(there):
            why = f"perhaps on {guess.store.name}, mounted at {guess.point}; say so with --mount"
            found |= dict.fromkeys(files & lost, why)
    return found


def _whole(disks: GuestDisks, plan: MountPlan, entries: Iterable[Entry]) -> dict[str, Entry]:
    """Return the files that are whole in a plan, in one of the states of the disks at least."""
    asked = {entry.path: entry for entry in entries}
    found: dict[str, Entry] = {}
    for devices in filter(None, (disks.devices, disks.others)):
        for device, tree in zip(devices, plan.trees(disks), strict=True):
            own = [e for e in asked.values() if _has(tree, e.path)]
            rest = Manifest(tuple(entry for entry in own if entry.path not in found))
            if not rest.entries:
                continue
            conditions = TreeCheck(disks.oracle, rest, {}, tree).check(device, None).conditions
            found |= {path: asked[path] for path, c in conditions.items() if c is Condition.WHOLE}
    return found
