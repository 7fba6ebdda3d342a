"""Plans of a guest's tree: which filesystem of which of its disks is mounted where.

From the user's options, and from each fstab that can be read. A guest's names for its disks (sda,
vdb) depend on their order: they are understood for the disk whose own fstab has such a name for its
own partition, and for no other.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from nbdproxy.errors import FilesystemError
from nbdproxy.oracles import fstab
from nbdproxy.oracles.fstab import FstabLine
from nbdproxy.oracles.guest_disks import (
    GuestDisks,
    GuestFilesystem,
    GuestUnreadable,
    location_spec,
    plain,
)
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import Mount, PartitionName, Tree, above, is_below, tree_of

LINKS_MAX = 40
"""Symbolic links that Linux follows in one path: path_resolution(7)."""
IN_MEMORY = ("/dev/", "/proc/", "/run/", "/sys/")
"""Directories that Linux keeps in memory without a line in fstab: file-hierarchy(7)."""


@dataclass(frozen=True, slots=True)
class GivenMount:
    """A mount that the user gave as an option; for `what` see `GuestDisks.matching`."""

    what: str
    point: str
    root: str | None = None

    def __str__(self) -> str:
        return ":".join((self.what, self.point, *([self.root] if self.root else [])))


DiskMount = tuple[int, Mount]
"""The number of a disk, and a mount of one of its filesystems."""


@dataclass(slots=True)
class MountPlan:
    """What is mounted where.

    mounts_at   by mount point, a mount that can be read
    unreadable  mount points of what cannot be read, and why
    doubtful    paths of which it is not known on which filesystem they are, and why
    names       the names that fstab and crypttab account for
    from_fstab  whether the plan is an fstab's
    diskless    the reasons in `unreadable` that concern no disk
    """

    mounts_at: dict[str, DiskMount] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    from_fstab: bool = False
    diskless: frozenset[str] = frozenset()

    @property
    def top(self) -> tuple[int, PartitionName]:
        """Disk and partition of the mount at /, which must be there."""
        disk, mount = self.mounts_at["/"]
        return disk, mount.partition

    def trees(self, disks: GuestDisks) -> list[Tree]:
        """Return each disk's part of the guest's tree."""
        found = []
        for disk in range(len(disks.devices)):
            own = [mount for at, mount in self.mounts_at.values() if at == disk]
            others = {
                point: f"{point} is on disk {at + 1}"
                for point, (at, _) in self.mounts_at.items()
                if at != disk
            }
            tree = tree_of(own, {**others, **self.unreadable})
            seen = f" ({disks.unreadable_text()})" if disks.unreadable else ""
            unmounted_reason = (
                f"no filesystem is known that shows there{seen}; name it with --mount"
            )
            found.append(
                replace(
                    tree,
                    unmounted_reason=unmounted_reason,
                    doubtful=self.doubtful,
                    diskless=self.diskless,
                )
            )
        return found

    def known(self, disks: GuestDisks) -> frozenset[str]:
        """Return the guest's paths of all files on the mounts."""
        found: set[str] = set()
        filesystems = {
            (filesystem.disk, filesystem.part): filesystem for filesystem in disks.filesystems
        }
        for disk, tree in enumerate(self.trees(disks)):
            for mount in tree.mounts:
                filesystem = filesystems.get((disk, mount.partition or 0))
                if filesystem is not None:
                    seen = map(mount.outside, disks.paths(filesystem))
                    found.update(path for path in seen if path is not None)
        return frozenset(found)

    def has_folder(self, disks: GuestDisks, path: str) -> bool:
        """Tell whether a directory is in the guest's tree; true if that cannot be told."""
        for point in above(path):
            if point in self.unreadable:
                return True
            if point in self.mounts_at:
                disk, mount = self.mounts_at[point]
                return point == path or disks.has_folder(disk, mount, path)
        return True

    def is_unreadable(self, path: str) -> bool:
        """Tell whether a path is below a mount point that cannot be read."""
        point = next((p for p in above(path) if p in self.unreadable or p in self.mounts_at), None)
        return point in self.unreadable

    def real_path(self, disks: GuestDisks, path: str) -> str:
        """Resolve symbolic links to directories in a path; unchanged for more than LINKS_MAX."""
        names, at = path.split("/")[::-1], "/"
        links = 0
        while names and links <= LINKS_MAX:
            step = posixpath.normpath(posixpath.join(at, names.pop()))
            target = self._link(disks, step)
            if target is None:
                at = step
                continue
            links += 1
            names += target.split("/")[::-1]
            at = "/" if target.startswith("/") else at
        return path if names else at

    def _link(self, disks: GuestDisks, path: str) -> str | None:
        for point in above(posixpath.dirname(path)):
            if point in self.unreadable:
                return None
            if point in self.mounts_at:
                disk, mount = self.mounts_at[point]
                wanted = disk, mount.partition or 0
                found = (s for s in disks.filesystems if (s.disk, s.part) == wanted)
                filesystem = next(found, None)
                return None if filesystem is None else disks.link(filesystem, mount.inside(path))
        return None

    def add_link_targets(self, disks: GuestDisks) -> None:
        """Add each mount whose point is a symbolic link at the link's target too."""
        for point in sorted({*self.mounts_at, *self.unreadable}):
            real_path = self.real_path(disks, point)
            if point in self.unreadable:
                self.unreadable.setdefault(real_path, self.unreadable[point])
            elif real_path not in self.unreadable:
                disk, mount = self.mounts_at[point]
                self.mounts_at.setdefault(real_path, (disk, replace(mount, point=real_path)))

    def accounts_for(self, unreadable: GuestUnreadable) -> bool:
        """Tell whether fstab or crypttab names an unreadable part."""
        return bool(unreadable.specs & self.names)

    def words(self, disks: GuestDisks) -> str:
        """Say what is mounted where."""
        names = {
            (s.disk, s.part): s.name for s in (*disks.filesystems, *disks.unreadable_filesystems)
        }
        return ", ".join(
            f"{names.get((disk, mount.partition or 0), f'partition {mount.partition}')} at {point}"
            for point, (disk, mount) in sorted(self.mounts_at.items())
        )


def plan_from_options(disks: GuestDisks, mounts: Iterable[GivenMount]) -> MountPlan:
    """Return the plan of the user's options; FilesystemError for what is not on the disks."""
    plan = MountPlan()
    for one in mounts:
        found, unreadable = disks.matching(one.what)
        if len(unreadable) == 1:
            plan.unreadable[one.point] = f"{one.point} is not read here: {unreadable[0]}"
            plan.names |= unreadable[0].specs
            continue
        if len(found) != 1:
            ambiguity = "several filesystems are" if found or unreadable else "no filesystem is"
            raise FilesystemError(
                f"--mount {one}: {ambiguity} called so; there are: {disks.described()}"
            )
        plan.mounts_at[one.point] = found[0].mount(one.point, one.root or "")
    plan.add_link_targets(disks)
    return plan


def plans_from_fstab(
    disks: GuestDisks, given: MountPlan, wanted: AbstractSet[str]
) -> list[MountPlan]:
    """Return a plan for each system on the disks that has an fstab, no two the same.

    An fstab that mounts another filesystem or subvolume at / than its own is a copy, in a snapshot
    or a backup: it counts only if no fstab mounts its own. Mounts that are `given` replace those of
    an fstab. A filesystem with the option noauto was mounted if it has some of the paths `wanted`.
    """
    own: list[MountPlan] = []
    copies: list[MountPlan] = []
    for filesystem in disks.filesystems:
        for root in filesystem.roots:
            plan = _plan_from_fstab(disks, filesystem, root, given, wanted)
            if plan is None:
                continue
            found = own if plan.mounts_at.get("/") == filesystem.mount("/", root) else copies
            if plan not in found:
                found.append(plan)
    return own or copies


def completed_from_fstab(
    disks: GuestDisks, given: MountPlan, wanted: AbstractSet[str]
) -> MountPlan:
    """Return a plan that has a mount at /, with those of the fstab there, if there is one."""
    disk, top = given.mounts_at["/"]
    filesystem = next(
        (s for s in disks.filesystems if (s.disk, s.part) == (disk, top.partition)), None
    )
    plan = filesystem and _plan_from_fstab(disks, filesystem, top.root or "/", given, wanted)
    return plan or given


def _plan_from_fstab(
    disks: GuestDisks,
    filesystem: GuestFilesystem,
    root: str,
    given: MountPlan,
    wanted: AbstractSet[str],
) -> MountPlan | None:
    """Return the plan of the fstab in a filesystem's directory; None if it has none."""
    if fstab.PATH not in disks.below(filesystem, root):
        return None
    raw, secret = (
        disks.content(filesystem, root, Entry(path, "", None))
        for path in (fstab.PATH, fstab.CRYPTTAB)
    )
    if raw is None:
        return None
    if max(len(raw), len(secret or b"")) > fstab.LONGEST:
        raise FilesystemError(
            f"{fstab.PATH} or {fstab.CRYPTTAB} on the disk has more than "
            f"{fstab.LONGEST >> 10} KiB; say what is mounted where with --mount"
        )
    return _FstabReading(disks, filesystem, root, raw, secret or b"").plan(given, wanted)


class _FstabReading:
    """An fstab, its crypttab, and the filesystem that they are on."""

    def __init__(
        self, disks: GuestDisks, filesystem: GuestFilesystem, root: str, raw: bytes, secret: bytes
    ) -> None:
        self._disks = disks
        self._lines = fstab.lines(raw)
        self._ciphers = fstab.ciphers(secret)
        top = next((line for line in self._lines if line.point == "/"), None)
        own = fstab.numbered(top.spec) if top is not None else None
        self._disk = own[0] if own is not None and own[1] == filesystem.part else None
        self._filesystem, self._root = filesystem, root

    def plan(self, given: MountPlan, wanted: AbstractSet[str]) -> MountPlan:
        """Return its plan, with the given mounts in place of its own."""
        names = frozenset(map(plain, self._names())) | given.names
        no_disk = {o.elsewhere() for o in self._lines if not o.is_device and not o.is_bind}
        plan = MountPlan(from_fstab=True, names=names, diskless=frozenset(no_disk))
        for line in self._lines:
            if not line.is_bind and not line.is_optional:
                self._add(plan, line, self._device(line))
        if "/" not in plan.mounts_at and not self._is_of_another(names):
            plan.unreadable.pop(
                "/", None
            )  # it is written for another name of the disk that it is on
            plan.mounts_at["/"] = self._filesystem.mount("/", self._root)
        plan.add_link_targets(self._disks)
        for line in self._lines:
            if line.is_optional:
                self._add_if_mounted(plan, line, wanted)
        self._bind_all(plan)
        for point, spot in given.mounts_at.items():
            plan.unreadable.pop(point, None)
            plan.mounts_at[point] = spot
        for point, why in given.unreadable.items():
            plan.mounts_at.pop(point, None)
            plan.unreadable[point] = why
        plan.add_link_targets(self._disks)
        return plan

    def _names(self) -> Iterator[str]:
        """Yield the names of all devices in fstab and crypttab."""
        for line in self._lines:
            yield self._name(line.spec)
        for name in self._ciphers.values():
            yield self._name(name)

    def _name(self, spec: str) -> str:
        """Translate a name such as /dev/sda1 to its location, if the disk is known."""
        found = fstab.numbered(spec)
        if found is None or found[0] != self._disk:
            return spec
        part = f"partition {found[1]}" if found[1] else "whole disk"
        return location_spec(self._filesystem.disk, part)

    @staticmethod
    def _add(plan: MountPlan, line: FstabLine, found: DiskMount | str) -> None:
        if isinstance(found, str):
            plan.unreadable[line.point] = found
        else:
            plan.mounts_at[line.point] = found

    def _device(self, line: FstabLine) -> DiskMount | str:
        """Return the mount of a line, or why it cannot be read."""
        if not line.is_device:
            return line.elsewhere()
        filesystems = self._disks.by_spec(self._name(line.spec))
        where = f"{line.point} is on {line.spec}"
        if len(filesystems) > 1:
            return f"{where}, and several filesystems are called so"
        if not filesystems:
            return f"{where}, which is {self._obstacle(line.spec)}"
        root = line.root()
        if root is None:
            return f"{where}, a subvolume that only its number names; say which with --mount"
        if root and root not in filesystems[0].roots and len(filesystems[0].roots) > 1:
            return f"{where}, which has no subvolume {root}"
        return filesystems[0].mount(line.point, root)

    def _is_of_another(self, names: AbstractSet[str]) -> bool:
        """Tell whether / is, or may be, something unreadable, so that this fstab is a copy.

        It may be if the line of / does not name this filesystem, and there are unreadable parts
        that the fstab does not account for.
        """
        top = next((line for line in self._lines if line.point == "/"), None)
        if top is None or top.is_any:
            return False
        unknown = (one for one in self._disks.unreadable if not one.specs & names)
        is_own = plain(self._name(top.spec)) in self._filesystem.specs
        return (
            top.is_diskless
            or self._hidden(top.spec) is not None
            or (not is_own and any(True for _ in unknown))
        )

    def _hidden(self, spec: str) -> GuestUnreadable | None:
        """Return the unreadable part that a device is, or that crypttab makes it from."""
        names = (spec, self._ciphers.get(spec, spec))
        return next(
            filter(None, (self._disks.unreadable_by_spec(self._name(name)) for name in names)), None
        )

    def _obstacle(self, spec: str) -> str:
        """Say why no filesystem was found for a device."""
        if (unreadable := self._hidden(spec)) is not None:
            return f"not read here: {unreadable}"
        if self._disks.unreadable:
            return f"not seen, and may lie in what cannot be read: {self._disks.unreadable_text()}"
        if len(self._disks.devices) > 1 and fstab.numbered(spec) is not None:
            return "a name that may be any of these disks'; say which by UUID or LABEL with --mount"
        if len(self._disks.devices) > 1:
            return "on none of these disks"
        return "not on this disk; if it was recorded too, name that recording as well"

    def _add_if_mounted(self, plan: MountPlan, line: FstabLine, wanted: AbstractSet[str]) -> None:
        """Add a mount with the option noauto, if it has files that are wanted."""
        found = self._device(line)
        below = {path for path in wanted if is_below(path, line.point)}
        apart = replace(plan, mounts_at=dict(plan.mounts_at))
        self._add(apart, line, found)
        here, there = (len(below & one.known(self._disks)) for one in (plan, apart))
        if not isinstance(found, str) and there > here:
            plan.mounts_at[line.point] = found
        elif here == there and below:
            unclear = f"{line.point} is mounted on demand only; if it was, say so with --mount"
            plan.unreadable[line.point] = found if isinstance(found, str) else unclear

    def _bind_all(self, plan: MountPlan) -> None:
        """Add bind mounts, each after those that its source is below, as in systemd.mount(5)."""
        left = [line for line in self._lines if line.is_bind]
        while left:
            ready = (
                line
                for line in left
                if not any(is_below(line.spec, o.point) for o in left if o is not line)
            )
            line = next(ready, left[0])
            left.remove(line)
            self._bind(plan, replace(line, spec=plan.real_path(self._disks, line.spec)))

    def _bind(self, plan: MountPlan, line: FstabLine) -> None:
        """Add a bind mount."""
        for point in above(line.spec):
            if point in plan.unreadable:
                plan.unreadable[line.point] = plan.unreadable[point]
                return
            if point in plan.mounts_at:
                disk, mount = plan.mounts_at[point]
                root = mount.inside(line.spec)
                plan.mounts_at[line.point] = disk, Mount(line.point, mount.partition, root)
                break
        if "rbind" not in line.options:
            return
        for point, (disk, mount) in list(plan.mounts_at.items()):
            if point not in {line.spec, line.point} and is_below(point, line.spec):
                moved = line.point + point.removeprefix(line.spec.rstrip("/"))
                plan.mounts_at[moved] = disk, replace(mount, point=moved)
