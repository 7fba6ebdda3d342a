"""A guest's tree found by the files themselves, where no fstab tells it.

A filesystem that has files as they are named comes first, or else a system's root, or else the one
that has most of them below a mount point; then others that have some of the rest: at the point
below which their paths are theirs. A guess must be shown by content: at least one file is what the
manifest says. Files that could be on two filesystems, or are where no content shows that they
belong there, cannot be told; nor those of another filesystem where an fstab tells the tree. Not
covered: without an fstab, files that were lost with their directories below what may be a mount
point, and of which the only copy begins at the top of another filesystem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nbdproxy.errors import FilesystemError
from nbdproxy.oracles import location_ranking, moves
from nbdproxy.oracles.guest_disks import GuestDisks, GuestFilesystem
from nbdproxy.oracles.location_ranking import CandidateLocation
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree, above, is_below
from nbdproxy.oracles.plans import MountPlan

_READ_MAX = 8
"""So many files are read to show that a guess is right."""


@dataclass(frozen=True, slots=True)
class CandidateMount:
    """A directory of a filesystem that may show at a point: the files that it would have there."""

    store: GuestFilesystem
    point: str
    root: str
    files: frozenset[str]

    @property
    def rank(self) -> tuple[int, bool, int]:
        """What makes one guess better than another: files, no change of paths, what is default."""
        return len(self.files), self.point == "/", -self.order

    @property
    def order(self) -> int:
        """How far from being the default its directory is."""
        return self.store.roots.index(self.root)


def with_inferred_mounts(disks: GuestDisks, given: MountPlan, manifest: Manifest) -> MountPlan:
    """Return a plan with what the files show of the filesystems that it does not have yet.

    Without any, if none of them has a file for certain. Raises FilesystemError if two filesystems
    have the files equally well.
    """
    plan = replace(given, mounts_at=dict(given.mounts_at), doubtful=dict(given.doubtful))
    entries = {entry.path: entry for entry in manifest.entries}
    if not given.from_fstab and not {"/"} & {*plan.mounts_at, *plan.unreadable}:
        first = _root_candidate(disks, plan, manifest)
        unseen = disks.unreadable or disks.partly_listed
        is_sure = first is not None and not (unseen and first.files)
        if first and (is_sure or _is_shown_by_content(disks, first, entries)):
            plan.mounts_at[first.point] = first.store.mount(first.point, first.root)
        elif not plan.mounts_at:
            return plan  # what has the files may not have been seen
    while (more := _next_mount(disks, plan, entries)) is not None:
        plan.mounts_at[more.point] = more.store.mount(more.point, more.root)
    if not given.mounts_at and plan.known(disks).isdisjoint(entries):
        return given
    if not given.from_fstab:
        _note_ambiguous(disks, plan, entries)
    return plan


def _root_candidate(
    disks: GuestDisks, plan: MountPlan, manifest: Manifest
) -> CandidateMount | None:
    """Return what has most of the files: as they are named, or if none is, below a mount point.

    Where a system is, and has none of them, it is what all others are mounted in.
    """
    points = {*plan.mounts_at, *plan.unreadable}
    wanted = [e.path for e in manifest.entries if points.isdisjoint(above(e.path))]
    stores = list(unmounted(disks, plan))
    found = [guess for store in stores for guess in candidate_mounts(disks, store, wanted)]
    entries = {entry.path: entry for entry in manifest.entries}
    as_named = [guess for guess in found if guess.point == "/"]
    if any(_is_shown_by_content(disks, guess, entries) for guess in as_named):
        found = as_named
    elif systems := list(_systems(disks, stores, as_named)):
        return systems[0] if len(systems) == 1 else None
    found = [guess for guess in found if _may_show(disks, guess)]
    if not found:
        return None
    by_place = {
        CandidateLocation(*_alone(disks, guess, manifest), len(guess.files)): guess
        for guess in found
    }
    best = [
        by_place[place]
        for place in location_ranking.best(disks.oracle, disks.devices, list(by_place))
    ]
    first = max(best, key=lambda guess: guess.rank)
    # Of one filesystem's subvolumes the default one counts: others may be snapshots.
    alike = [guess for guess in best if (guess.store, guess.point) == (first.store, first.point)]
    first = min(alike, key=lambda guess: guess.order)
    others = [guess for guess in best if guess.store != first.store]
    if any(first.files & other.files for other in others):
        names = " and ".join(dict.fromkeys(g.store.name for g in (first, *others)))
        raise FilesystemError(
            f"the manifest matches {names} equally well; name one of them with --partition, or say "
            f"what is mounted where with --mount"
        )
    return first


def _systems(
    disks: GuestDisks, stores: Iterable[GuestFilesystem], as_named: Sequence[CandidateMount]
) -> Iterator[CandidateMount]:
    """Yield the roots of systems, with the files that they have of their names, or none."""
    files = {(guess.store, guess.root): guess.files for guess in as_named}
    for store in stores:
        for root in store.roots:
            _, mount = store.mount("/", root)
            if moves.is_system(partial(disks.has_folder, store.disk, mount)):
                yield CandidateMount(store, "/", root, files.get((store, root), frozenset()))


def _may_show(disks: GuestDisks, guess: CandidateMount) -> bool:
    """Tell whether a filesystem may be mounted where a guess has it: see `moves`."""
    _, mount = guess.store.mount("/", guess.root)
    has = partial(disks.has_folder, guess.store.disk, mount)
    files = [path[len(guess.point.rstrip("/")) :] for path in guess.files]
    return moves.may_show_at(has, guess.point, files)


def _may_join(disks: GuestDisks, plan: MountPlan, guess: CandidateMount) -> bool:
    """Tell whether a filesystem may be mounted in a tree that is known without it.

    Not where what it is mounted on has the directories of its files: they may have been there.
    """
    if "/" not in plan.mounts_at:
        return _may_show(disks, guess)
    folders = moves.own_folders(list(guess.files), guess.point)
    return (
        plan.has_folder(disks, guess.point)
        and not any(plan.has_folder(disks, folder) for folder in folders)
        and _may_show(disks, guess)
    )


def _alone(
    disks: GuestDisks, guess: CandidateMount, manifest: Manifest
) -> tuple[list[Tree], Manifest]:
    """Return the trees with nothing but a guess, and the files that belong there."""
    plan = MountPlan({guess.point: guess.store.mount(guess.point, guess.root)})
    below = [entry for entry in manifest.entries if is_below(entry.path, guess.point)]
    return plan.trees(disks), Manifest(tuple(below))


def _next_mount(
    disks: GuestDisks, plan: MountPlan, entries: dict[str, Entry]
) -> CandidateMount | None:
    """Return the filesystem that has most of the files which are on none yet."""
    known = plan.known(disks)
    rest = [path for path in entries if path not in known]
    there = [path for path in entries if path in known]
    found = [
        guess
        for store in unmounted(disks, plan)
        for guess in candidate_mounts(disks, store, rest)
        if guess.point not in plan.mounts_at
        and guess.point not in plan.unreadable
        and not files_under(plan, guess.point, there)
    ]
    for guess in sorted(found, key=lambda guess: guess.rank, reverse=True):
        equals = [g for g in found if len(g.files) == len(guess.files) and g.store != guess.store]
        is_sole = not any(guess.files & other.files for other in equals)
        is_shown = is_sole and _is_shown_by_content(disks, guess, entries)
        if is_shown and not plan.from_fstab and _may_join(disks, plan, guess):
            return guess
    for guess in found:
        why = f"perhaps on {guess.store.name}, mounted at {guess.point}; say so with --mount"
        unclear = (path for path in guess.files if not plan.is_unreadable(path))
        plan.doubtful |= dict.fromkeys(unclear, why)
    return None


def _note_ambiguous(disks: GuestDisks, plan: MountPlan, entries: dict[str, Entry]) -> None:
    """Note files that a filesystem which is not in the plan has as well, if it is mounted above."""
    known = plan.known(disks)
    there = [path for path in entries if path in known]
    for store in unmounted(disks, plan):
        for guess in candidate_mounts(disks, store, there):
            taken = files_under(plan, guess.point, there)
            if taken and guess.point != "/" and guess.files.issuperset(taken):
                why = f"also on {store.name}, which may be mounted at {guess.point}"
                plan.doubtful |= dict.fromkeys(taken, f"{why}; say which with --mount")


def candidate_mounts(
    disks: GuestDisks, store: GuestFilesystem, paths: Collection[str]
) -> Iterator[CandidateMount]:
    """Yield the points at which a filesystem, or a subvolume of it, would have some files."""
    for root in store.roots:
        known = disks.below(store, root)
        found: defaultdict[str, set[str]] = defaultdict(set)
        for path in paths:
            for point in above(path):
                if path[len(point.rstrip("/")) :] in known:
                    found[point].add(path)
        for point, files in found.items():
            yield CandidateMount(store, point, root, frozenset(files))


def unmounted(disks: GuestDisks, plan: MountPlan) -> Iterator[GuestFilesystem]:
    """Yield the filesystems that are mounted nowhere, and subvolumes that are not."""
    for store in disks.filesystems:
        used = {
            mount.root
            for disk, mount in plan.mounts_at.values()
            if (disk, mount.partition) == (store.disk, store.part)
        }
        if not used:
            yield store
        elif len(store.roots) > 1:
            yield replace(store, roots=tuple(root for root in store.roots if root not in used))


def files_under(plan: MountPlan, point: str, paths: Collection[str]) -> set[str]:
    """Return the files that a plan has below a point, and not below another mount there."""
    inner = [other for other in plan.mounts_at if other != point and is_below(other, point)]
    return {
        path
        for path in paths
        if is_below(path, point) and not any(is_below(path, other) for other in inner)
    }


def _is_shown_by_content(
    disks: GuestDisks, guess: CandidateMount, entries: dict[str, Entry]
) -> bool:
    for path in sorted(guess.files)[:_READ_MAX]:
        entry = replace(entries[path], path=path[len(guess.point.rstrip("/")) :])
        content = disks.content(guess.store, guess.root, entry)
        if content is None:
            continue
        if entry.is_of(content):
            return True
    return False
