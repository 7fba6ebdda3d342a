"""Infers from a manifest's files what is mounted where, if no fstab says it.

First comes a filesystem that has files at the paths of the manifest, or else a system's root, or
else the one that has most of the files below a mount point; then others that have some of the rest,
each at the mount point that makes its paths the manifest's. An inferred mount needs evidence by
content: at least one file is what the manifest says. Files that could be on two filesystems, or
have no evidence, cannot be told; nor those of another filesystem where an fstab gives the tree. Not
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
"""Files of a candidate that are read at most, to find one that is whole."""


@dataclass(frozen=True, slots=True)
class CandidateMount:
    """A filesystem's directory that may be mounted at `point`, and the files that it has then."""

    filesystem: GuestFilesystem
    point: str
    root: str
    files: frozenset[str]

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Sorts candidates, the best last: more files, mounted at /, the default directory."""
        return len(self.files), self.point == "/", -self.order

    @property
    def order(self) -> int:
        """The index of its directory among the filesystem's roots; the default one is first."""
        return self.filesystem.roots.index(self.root)


def with_inferred_mounts(disks: GuestDisks, given: MountPlan, manifest: Manifest) -> MountPlan:
    """Return a plan with the mounts that can be inferred for the filesystems it does not have.

    Raises FilesystemError if two filesystems have the files equally well.
    """
    plan = replace(given, mounts_at=dict(given.mounts_at), doubtful=dict(given.doubtful))
    entries = {entry.path: entry for entry in manifest.entries}
    if not given.from_fstab and not {"/"} & {*plan.mounts_at, *plan.unreadable}:
        first = _root_candidate(disks, plan, manifest)
        unseen = disks.unreadable or disks.partly_listed
        is_sure = first is not None and not (unseen and first.files)
        if first and (is_sure or _is_shown_by_content(disks, first, entries)):
            plan.mounts_at[first.point] = first.filesystem.mount(first.point, first.root)
        elif not plan.mounts_at:
            return plan  # what has the files may not have been seen
    while (more := _next_mount(disks, plan, entries)) is not None:
        plan.mounts_at[more.point] = more.filesystem.mount(more.point, more.root)
    if not given.mounts_at and plan.known(disks).isdisjoint(entries):
        return given
    if not given.from_fstab:
        _note_ambiguous(disks, plan, entries)
    return plan


def _root_candidate(
    disks: GuestDisks, plan: MountPlan, manifest: Manifest
) -> CandidateMount | None:
    """Return the candidate for the first mount: with most files at /, or else below a point.

    If none has a whole file at /, the root of the only system comes first, with or without files.
    """
    points = {*plan.mounts_at, *plan.unreadable}
    wanted = [e.path for e in manifest.entries if points.isdisjoint(above(e.path))]
    filesystems = list(unmounted(disks, plan))
    found = [
        candidate
        for filesystem in filesystems
        for candidate in candidate_mounts(disks, filesystem, wanted)
    ]
    entries = {entry.path: entry for entry in manifest.entries}
    as_named = [candidate for candidate in found if candidate.point == "/"]
    if any(_is_shown_by_content(disks, candidate, entries) for candidate in as_named):
        found = as_named
    elif systems := list(_systems(disks, filesystems, as_named)):
        return systems[0] if len(systems) == 1 else None
    found = [candidate for candidate in found if _may_show(disks, candidate)]
    if not found:
        return None
    by_location = {
        CandidateLocation(*_alone(disks, candidate, manifest), len(candidate.files)): candidate
        for candidate in found
    }
    best = [
        by_location[location]
        for location in location_ranking.best(disks.oracle, disks.devices, list(by_location))
    ]
    first = max(best, key=lambda candidate: candidate.rank)
    # Of one filesystem's subvolumes the default one counts: others may be snapshots.
    alike = [
        candidate
        for candidate in best
        if (candidate.filesystem, candidate.point) == (first.filesystem, first.point)
    ]
    first = min(alike, key=lambda candidate: candidate.order)
    others = [candidate for candidate in best if candidate.filesystem != first.filesystem]
    if any(first.files & other.files for other in others):
        names = " and ".join(dict.fromkeys(g.filesystem.name for g in (first, *others)))
        raise FilesystemError(
            f"the manifest matches {names} equally well; name one of them with --partition, or say "
            f"what is mounted where with --mount"
        )
    return first


def _systems(
    disks: GuestDisks, filesystems: Iterable[GuestFilesystem], as_named: Sequence[CandidateMount]
) -> Iterator[CandidateMount]:
    """Yield the candidates for / that are roots of systems, even without any file."""
    files = {(candidate.filesystem, candidate.root): candidate.files for candidate in as_named}
    for filesystem in filesystems:
        for root in filesystem.roots:
            _, mount = filesystem.mount("/", root)
            if moves.is_system(partial(disks.has_folder, filesystem.disk, mount)):
                yield CandidateMount(
                    filesystem, "/", root, files.get((filesystem, root), frozenset())
                )


def _may_show(disks: GuestDisks, candidate: CandidateMount) -> bool:
    """Tell whether a candidate's filesystem may be mounted at its point: see `moves`."""
    _, mount = candidate.filesystem.mount("/", candidate.root)
    has = partial(disks.has_folder, candidate.filesystem.disk, mount)
    files = [path[len(candidate.point.rstrip("/")) :] for path in candidate.files]
    return moves.may_show_at(has, candidate.point, files)


def _may_join(disks: GuestDisks, plan: MountPlan, candidate: CandidateMount) -> bool:
    """Tell whether a candidate may be added to the tree of a plan.

    Not if the directories of its files are already in the tree: the files may have been there.
    """
    if "/" not in plan.mounts_at:
        return _may_show(disks, candidate)
    folders = moves.own_folders(list(candidate.files), candidate.point)
    return (
        plan.has_folder(disks, candidate.point)
        and not any(plan.has_folder(disks, folder) for folder in folders)
        and _may_show(disks, candidate)
    )


def _alone(
    disks: GuestDisks, candidate: CandidateMount, manifest: Manifest
) -> tuple[list[Tree], Manifest]:
    """Return the trees with nothing but a candidate, and the manifest's files at its point."""
    plan = MountPlan({candidate.point: candidate.filesystem.mount(candidate.point, candidate.root)})
    below = [entry for entry in manifest.entries if is_below(entry.path, candidate.point)]
    return plan.trees(disks), Manifest(tuple(below))


def _next_mount(
    disks: GuestDisks, plan: MountPlan, entries: dict[str, Entry]
) -> CandidateMount | None:
    """Return the next mount: of the candidate with most of the files that are on no mount yet."""
    known = plan.known(disks)
    rest = [path for path in entries if path not in known]
    there = [path for path in entries if path in known]
    found = [
        candidate
        for filesystem in unmounted(disks, plan)
        for candidate in candidate_mounts(disks, filesystem, rest)
        if candidate.point not in plan.mounts_at
        and candidate.point not in plan.unreadable
        and not files_under(plan, candidate.point, there)
    ]
    for candidate in sorted(found, key=lambda candidate: candidate.rank, reverse=True):
        equals = [
            g
            for g in found
            if len(g.files) == len(candidate.files) and g.filesystem != candidate.filesystem
        ]
        is_sole = not any(candidate.files & other.files for other in equals)
        is_shown = is_sole and _is_shown_by_content(disks, candidate, entries)
        if is_shown and not plan.from_fstab and _may_join(disks, plan, candidate):
            return candidate
    for candidate in found:
        where = f"perhaps on {candidate.filesystem.name}, mounted at {candidate.point}"
        why = f"{where}; say so with --mount"
        unclear = (path for path in candidate.files if not plan.is_unreadable(path))
        plan.doubtful |= dict.fromkeys(unclear, why)
    return None


def _note_ambiguous(disks: GuestDisks, plan: MountPlan, entries: dict[str, Entry]) -> None:
    """Enter as doubtful the files that an unmounted filesystem has too, mounted above them."""
    known = plan.known(disks)
    there = [path for path in entries if path in known]
    for filesystem in unmounted(disks, plan):
        for candidate in candidate_mounts(disks, filesystem, there):
            taken = files_under(plan, candidate.point, there)
            if taken and candidate.point != "/" and candidate.files.issuperset(taken):
                why = f"also on {filesystem.name}, which may be mounted at {candidate.point}"
                plan.doubtful |= dict.fromkeys(taken, f"{why}; say which with --mount")


def candidate_mounts(
    disks: GuestDisks, filesystem: GuestFilesystem, paths: Collection[str]
) -> Iterator[CandidateMount]:
    """Yield the points at which a filesystem, or a subvolume of it, has some of the files."""
    for root in filesystem.roots:
        known = disks.below(filesystem, root)
        found: defaultdict[str, set[str]] = defaultdict(set)
        for path in paths:
            for point in above(path):
                if path[len(point.rstrip("/")) :] in known:
                    found[point].add(path)
        for point, files in found.items():
            yield CandidateMount(filesystem, point, root, frozenset(files))


def unmounted(disks: GuestDisks, plan: MountPlan) -> Iterator[GuestFilesystem]:
    """Yield the filesystems that a plan does not mount, and those with unmounted subvolumes."""
    for filesystem in disks.filesystems:
        used = {
            mount.root
            for disk, mount in plan.mounts_at.values()
            if (disk, mount.partition) == (filesystem.disk, filesystem.part)
        }
        if not used:
            yield filesystem
        elif len(filesystem.roots) > 1:
            yield replace(
                filesystem, roots=tuple(root for root in filesystem.roots if root not in used)
            )


def files_under(plan: MountPlan, point: str, paths: Collection[str]) -> set[str]:
    """Return the files below a point that are not below another mount there."""
    inner = [other for other in plan.mounts_at if other != point and is_below(other, point)]
    return {
        path
        for path in paths
        if is_below(path, point) and not any(is_below(path, other) for other in inner)
    }


def _is_shown_by_content(
    disks: GuestDisks, candidate: CandidateMount, entries: dict[str, Entry]
) -> bool:
    for path in sorted(candidate.files)[:_READ_MAX]:
        entry = replace(entries[path], path=path[len(candidate.point.rstrip("/")) :])
        content = disks.content(candidate.filesystem, candidate.root, entry)
        if content is None:
            continue
        if entry.is_of(content):
            return True
    return False
