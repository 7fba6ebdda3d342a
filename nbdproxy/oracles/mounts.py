"""Mounts in the guest's tree of files: a `Mount` is one, a `Tree` all of them.

Paths of a manifest are the guest's: `/boot/vmlinuz`, on whichever disk. A `Mount` translates them
to paths of its filesystem. A `Tree` gives the mount of a path, or says why it is not known: part of
a disk cannot be read, or the filesystem is on none of the recorded disks. See mount_namespaces(7)
and fstab(5).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

PartitionName = int | str | None
"""A part of a disk: the number of its `partitions.Slice`, or the name of an LVM volume, since
numbers change with the volumes of a group. None: the only part that has a filesystem."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One filesystem's place in the guest's tree.

    point      where it is mounted
    partition  which part of the disk it is
    root       its directory that shows at `point`: of Btrfs a subvolume, by its path from the top
               level (`/@home`); of a bind mount what was bound. Empty: what a mount without
               options shows, of Btrfs the default subvolume; of all others that is the top, `/`
    covered    points below `point` where another filesystem shows
    """

    point: str = "/"
    partition: PartitionName = None
    root: str = ""
    covered: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Describe the mount, for messages."""
        if isinstance(self.partition, str):
            part = f"volume {self.partition}"
        else:
            part = f"partition {self.partition}" if self.partition else "the whole disk"
        of_it = f", {self.root}," if self.root not in {"", "/"} else ""
        return f"{part}{of_it} at {self.point}"

    def holds(self, path: str) -> bool:
        """Tell whether the guest sees this filesystem at an absolute path."""
        return is_below(path, self.point) and not any(is_below(path, p) for p in self.covered)

    def inside(self, path: str) -> str:
        """Return the filesystem's own path of a guest's path at or below `point`."""
        rest = path.removeprefix(self.point.rstrip("/"))
        return posixpath.normpath(f"{self.root.rstrip('/')}/{rest.lstrip('/')}")

    def outside(self, path: str) -> str | None:
        """Return the guest's path of a filesystem's own path; None if it does not show."""
        if not is_below(path, self.root):
            return None
        rest = path.removeprefix(self.root.rstrip("/")).lstrip("/")
        seen = posixpath.join(self.point, rest) if rest else self.point
        return seen if self.holds(seen) else None


ONLY = Mount()
"""The only filesystem of a disk, at the top of the guest's tree."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The guest's tree of files.

    mounts            those that can be read; no two have the same point
    unreadable        mount points of what cannot, and why
    doubtful          paths of which it is not known on which filesystem they are, and why
    unmounted_reason  why a path that is below no mount point cannot be told
    unplaced          what cannot be read and may be mounted anywhere, with files that are missed.
                      Only of a tree that was made without a manifest; else see `doubtful`
    diskless          the reasons in `unreadable` that concern no disk: a filesystem in memory, or
                      one that is reached over a network
    """

    mounts: tuple[Mount, ...] = (ONLY,)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    doubtful: Mapping[str, str] = field(default_factory=dict)
    unmounted_reason: str = "no filesystem is known that shows there; name it with --mount"
    unplaced: str = ""
    diskless: frozenset[str] = frozenset()

    def of(self, path: str) -> Mount | str:
        """Return the mount that has an absolute path, or why that cannot be told."""
        if (why := self.doubtful.get(path)) is not None:
            return why
        points: dict[str, Mount | str] = {mount.point: mount for mount in self.mounts}
        points |= self.unreadable
        path = "/" + path.lstrip("/")
        here = [point for point in points if is_below(path, point)]
        return points[max(here, key=len)] if here else self.unmounted_reason

    def left_out(self, under: str) -> dict[str, str]:
        """Return the unreadable mount points below a directory that are on disks, and why."""
        return {
            point: why
            for point, why in self.unreadable.items()
            if is_below(point, under) and why not in self.diskless
        }

    def shown(self, partition: PartitionName, path: str) -> list[str]:
        """Return the guest's paths of a path on a partition; none if it does not show."""
        found = (m.outside(path) for m in self.mounts if m.partition in {None, partition})
        return [one for one in found if one is not None]


def tree_of(mounts: Iterable[Mount], unreadable: Mapping[str, str] | None = None) -> Tree:
    """Return the tree of some mounts: each is covered by whatever is mounted below it."""
    mounts, unreadable = tuple(mounts), unreadable or {}
    points = sorted({*(mount.point for mount in mounts), *unreadable})
    return Tree(
        tuple(
            replace(
                mount,
                covered=tuple(p for p in points if p != mount.point and is_below(p, mount.point)),
            )
            for mount in sorted(mounts, key=lambda mount: mount.point)
        ),
        unreadable,
    )


def above(path: str) -> Iterator[str]:
    """Yield an absolute path and all directories above it, the longest first."""
    path = "/" + path.lstrip("/")  # POSIX leaves open what two slashes at the beginning mean
    yield path
    while path != "/":
        path = posixpath.dirname(path)
        yield path


def is_below(path: str, folder: str) -> bool:
    """Tell whether an absolute path is a folder or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
