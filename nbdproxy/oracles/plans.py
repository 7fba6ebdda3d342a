"""Plans of a guest's tree: which filesystem of which of its disks is mounted where.

From what the user told, and from each fstab that can be read. A guest's names for its disks (sda,
vdb) depend on their order: they are understood for the disk whose own fstab names its own partition
so, and for no other.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from nbdproxy.errors import FilesystemError
from nbdproxy.oracles import fstab
from nbdproxy.oracles.fstab import Line
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import Mount, PartitionName, Tree, above, is_below, tree_of
from nbdproxy.oracles.stores import Disks, Store, Unread, place_of, plain

LINKS_MAX = 40
"""So many symbolic links Linux follows in a path: path_resolution(7)."""
IN_MEMORY = ("/dev/", "/proc/", "/run/", "/sys/")
"""What a Linux system always keeps in memory, though no fstab says so; see file-hierarchy(7)."""


@dataclass(frozen=True, slots=True)
class GivenMount:
    """What the user says is mounted somewhere; for `what` see `Disks.meant`."""

    what: str
    point: str
    root: str | None = None

    def __str__(self) -> str:
        return ":".join((self.what, self.point, *([self.root] if self.root else [])))


Spot = tuple[int, Mount]


@dataclass(slots=True)
class MountPlan:
    """What is mounted where.

    spots       by its point, a mount and the number of its disk
    away        points of what is on no disk that can be read, and why
    doubtful    paths of which the plan does not say where they are, and why
    names       the names that an fstab accounts for
    from_fstab  whether there was one
    diskless    reasons of `away` that are no disk's
    """

    spots: dict[str, Spot] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    from_fstab: bool = False
    diskless: frozenset[str] = frozenset()

    @property
    def top(self) -> tuple[int, PartitionName]:
        """The disk and the part of it that has the top of the tree; that must be known."""
        disk, mount = self.spots["/"]
        return disk, mount.partition

    def trees(self, disks: Disks) -> list[Tree]:
        """Return each disk's part of the guest's tree."""
        found = []
        for disk in range(len(disks.devices)):
            own = [mount for at, mount in self.spots.values() if at == disk]
            others = {
                point: f"{point} is on disk {at + 1}"
                for point, (at, _) in self.spots.items()
                if at != disk
            }
            tree = tree_of(own, {**others, **self.away})
            seen = f" ({disks.unread()})" if disks.hidden else ""
            nowhere = f"no filesystem is known that shows there{seen}; name it with --mount"
            found.append(
                replace(tree, nowhere=nowhere, doubtful=self.doubtful, diskless=self.diskless)
            )
        return found

    def known(self, disks: Disks) -> frozenset[str]:
        """Return the guest's paths of all files that are there."""
        found: set[str] = set()
        stores = {(store.disk, store.part): store for store in disks.parts}
        for disk, tree in enumerate(self.trees(disks)):
            for mount in tree.mounts:
                store = stores.get((disk, mount.partition or 0))
                if store is not None:
                    seen = map(mount.outside, disks.paths(store))
                    found.update(path for path in seen if path is not None)
        return frozenset(found)

    def has_folder(self, disks: Disks, path: str) -> bool:
        """Tell whether a directory is in the guest's tree; true if that cannot be told."""
        for point in above(path):
            if point in self.away:
                return True
            if point in self.spots:
                disk, mount = self.spots[point]
                return point == path or disks.has_folder(disk, mount, path)
        return True

    def is_away(self, path: str) -> bool:
        """Tell whether it is known that a path is on no disk that can be read."""
        point = next((p for p in above(path) if p in self.away or p in self.spots), None)
        return point in self.away

    def real(self, disks: Disks, path: str) -> str:
        """Return where a path leads, links to folders followed; as it is, where they go on."""
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

    def _link(self, disks: Disks, path: str) -> str | None:
        for point in above(posixpath.dirname(path)):
            if point in self.away:
                return None
            if point in self.spots:
                disk, mount = self.spots[point]
                wanted = disk, mount.partition or 0
                found = (s for s in disks.parts if (s.disk, s.part) == wanted)
                store = next(found, None)
                return None if store is None else disks.link(store, mount.inside(path))
        return None

    def alias(self, disks: Disks) -> None:
        """Enter what is mounted at a link at the place that it leads to, too: it is there."""
        for point in sorted({*self.spots, *self.away}):
            real = self.real(disks, point)
            if point in self.away:
                self.away.setdefault(real, self.away[point])
            elif real not in self.away:
                disk, mount = self.spots[point]
                self.spots.setdefault(real, (disk, replace(mount, point=real)))

    def accounts_for(self, hidden: Unread) -> bool:
        """Tell whether it is known what something unreadable is for."""
        return bool(hidden.specs & self.names)

    def words(self, disks: Disks) -> str:
        """Say what is mounted where."""
        stores = {(s.disk, s.part): s.name for s in (*disks.parts, *disks.closed)}
        return ", ".join(
            f"{stores.get((disk, mount.partition or 0), f'partition {mount.partition}')} at {point}"
            for point, (disk, mount) in sorted(self.spots.items())
        )


def told(disks: Disks, mounts: Iterable[GivenMount]) -> MountPlan:
    """Return the plan that the user told; FilesystemError for what is not on the disks."""
    plan = MountPlan()
    for one in mounts:
        found, hidden = disks.meant(one.what)
        if len(hidden) == 1:
            plan.away[one.point] = f"{one.point} is not read here: {hidden[0]}"
            plan.names |= hidden[0].specs
            continue
        if len(found) != 1:
            several = "several filesystems are" if found or hidden else "no filesystem is"
            raise FilesystemError(
                f"--mount {one}: {several} called so; there are: {disks.there_are()}"
            )
        plan.spots[one.point] = found[0].mount(one.point, one.root or "")
    plan.alias(disks)
    return plan


def by_fstab(disks: Disks, given: MountPlan, wanted: AbstractSet[str]) -> list[MountPlan]:
    """Return a plan for each system on the disks that has an fstab, no two the same.

    An fstab that says of another filesystem or subvolume that it is the top is a copy, in a
    snapshot or a backup: it counts only if there is none that says it of its own. What was told
    before counts more. `wanted` are paths that show whether a filesystem that fstab names and does
    not mount by itself was mounted.
    """
    own: list[MountPlan] = []
    copies: list[MountPlan] = []
    for store in disks.parts:
        for root in store.roots:
            plan = _by_its_fstab(disks, store, root, given, wanted)
            if plan is None:
                continue
            found = own if plan.spots.get("/") == store.mount("/", root) else copies
            if plan not in found:
                found.append(plan)
    return own or copies


def completed(disks: Disks, given: MountPlan, wanted: AbstractSet[str]) -> MountPlan:
    """Return a plan that has a top, with what the fstab there says of the rest, if there is one."""
    disk, top = given.spots["/"]
    store = next((s for s in disks.parts if (s.disk, s.part) == (disk, top.partition)), None)
    plan = store and _by_its_fstab(disks, store, top.root or "/", given, wanted)
    return plan or given


def _by_its_fstab(
    disks: Disks, store: Store, root: str, given: MountPlan, wanted: AbstractSet[str]
) -> MountPlan | None:
    """Return the plan of a system by its own fstab; None if it has none."""
    if fstab.PATH not in disks.below(store, root):
        return None
    raw, secret = (
        disks.content(store, root, Entry(path, "", None)) for path in (fstab.PATH, fstab.CRYPTTAB)
    )
    if raw is None:
        return None
    if max(len(raw), len(secret or b"")) > fstab.LONGEST:
        raise FilesystemError(
            f"{fstab.PATH} or {fstab.CRYPTTAB} on the disk has more than "
            f"{fstab.LONGEST >> 10} KiB; say what is mounted where with --mount"
        )
    return _Reading(disks, store, root, raw, secret or b"").plan(given, wanted)


class _Reading:
    """One fstab, being read."""

    def __init__(self, disks: Disks, store: Store, root: str, raw: bytes, secret: bytes) -> None:
        self._disks = disks
        self._lines = fstab.lines(raw)
        self._ciphers = fstab.ciphers(secret)
        top = next((line for line in self._lines if line.point == "/"), None)
        own = fstab.numbered(top.spec) if top is not None else None
        self._disk = own[0] if own is not None and own[1] == store.part else None
        self._store, self._root = store, root

    def plan(self, given: MountPlan, wanted: AbstractSet[str]) -> MountPlan:
        """Return what it says, but for what was told."""
        names = frozenset(map(plain, self._names())) | given.names
        no_disk = {o.elsewhere() for o in self._lines if not o.is_device and not o.is_bind}
        plan = MountPlan(from_fstab=True, names=names, diskless=frozenset(no_disk))
        for line in self._lines:
            if not line.is_bind and not line.is_optional:
                self._enter(plan, line, self._device(line))
        if "/" not in plan.spots and not self._is_of_another(names):
            plan.away.pop("/", None)  # it is written for another name of the disk that it is on
            plan.spots["/"] = self._store.mount("/", self._root)
        plan.alias(self._disks)
        for line in self._lines:
            if line.is_optional:
                self._decide(plan, line, wanted)
        self._bind_all(plan)
        for point, spot in given.spots.items():
            plan.away.pop(point, None)
            plan.spots[point] = spot
        for point, why in given.away.items():
            plan.spots.pop(point, None)
            plan.away[point] = why
        plan.alias(self._disks)
        return plan

    def _names(self) -> Iterator[str]:
        """Yield all names that the guest's own files account for."""
        for line in self._lines:
            yield self._name(line.spec)
        for name in self._ciphers.values():
            yield self._name(name)

    def _name(self, spec: str) -> str:
        """Return a name that holds for all guests; as it is, if there is none."""
        found = fstab.numbered(spec)
        if found is None or found[0] != self._disk:
            return spec
        part = f"partition {found[1]}" if found[1] else "whole disk"
        return place_of(self._store.disk, part)

    @staticmethod
    def _enter(plan: MountPlan, line: Line, found: Spot | str) -> None:
        if isinstance(found, str):
            plan.away[line.point] = found
        else:
            plan.spots[line.point] = found

    def _device(self, line: Line) -> Spot | str:
        """Return what a line mounts, or why that cannot be read."""
        if not line.is_device:
            return line.elsewhere()
        stores = self._disks.called(self._name(line.spec))
        where = f"{line.point} is on {line.spec}"
        if len(stores) > 1:
            return f"{where}, and several filesystems are called so"
        if not stores:
            return f"{where}, which is {self._obstacle(line.spec)}"
        root = line.root()
        if root is None:
            return f"{where}, a subvolume that only its number names; say which with --mount"
        if root and root not in stores[0].roots and len(stores[0].roots) > 1:
            return f"{where}, which has no subvolume {root}"
        return stores[0].mount(line.point, root)

    def _is_of_another(self, names: AbstractSet[str]) -> bool:
        """Tell whether the top is, or may be, something that is not read: this fstab is a copy.

        It may be if this filesystem is not called as the top is, and there is something of which
        nobody knows what it is for.
        """
        top = next((line for line in self._lines if line.point == "/"), None)
        if top is None or top.is_any:
            return False
        unknown = (one for one in self._disks.hidden if not one.specs & names)
        is_own = plain(self._name(top.spec)) in self._store.specs
        return (
            top.is_diskless
            or self._hidden(top.spec) is not None
            or (not is_own and any(True for _ in unknown))
        )

    def _hidden(self, spec: str) -> Unread | None:
        """Return what a device is, or is made from, if that cannot be read."""
        names = (spec, self._ciphers.get(spec, spec))
        return next(filter(None, (self._disks.hides(self._name(name)) for name in names)), None)

    def _obstacle(self, spec: str) -> str:
        """Say why a device is not there."""
        if (hidden := self._hidden(spec)) is not None:
            return f"not read here: {hidden}"
        if self._disks.hidden:
            return f"not seen, and may lie in what cannot be read: {self._disks.unread()}"
        if len(self._disks.devices) > 1 and fstab.numbered(spec) is not None:
            return "a name that may be any of these disks'; say which by UUID or LABEL with --mount"
        if len(self._disks.devices) > 1:
            return "on none of these disks"
        return "not on this disk; if it was recorded too, name that recording as well"

    def _decide(self, plan: MountPlan, line: Line, wanted: AbstractSet[str]) -> None:
        """Enter what is mounted on demand, if the files show that it was."""
        found = self._device(line)
        below = {path for path in wanted if is_below(path, line.point)}
        apart = replace(plan, spots=dict(plan.spots))
        self._enter(apart, line, found)
        here, there = (len(below & one.known(self._disks)) for one in (plan, apart))
        if not isinstance(found, str) and there > here:
            plan.spots[line.point] = found
        elif here == there and below:
            unclear = f"{line.point} is mounted on demand only; if it was, say so with --mount"
            plan.away[line.point] = found if isinstance(found, str) else unclear

    def _bind_all(self, plan: MountPlan) -> None:
        """Enter bind mounts: what one shows is mounted before it, as systemd.mount(5) has it."""
        left = [line for line in self._lines if line.is_bind]
        while left:
            ready = (
                line
                for line in left
                if not any(is_below(line.spec, o.point) for o in left if o is not line)
            )
            line = next(ready, left[0])
            left.remove(line)
            self._bind(plan, replace(line, spec=plan.real(self._disks, line.spec)))

    def _bind(self, plan: MountPlan, line: Line) -> None:
        """Enter a directory of the tree that shows in another place as well."""
        for point in above(line.spec):
            if point in plan.away:
                plan.away[line.point] = plan.away[point]
                return
            if point in plan.spots:
                disk, mount = plan.spots[point]
                root = mount.inside(line.spec)
                plan.spots[line.point] = disk, Mount(line.point, mount.partition, root)
                break
        if "rbind" not in line.options:
            return
        for point, (disk, mount) in list(plan.spots.items()):
            if point not in {line.spec, line.point} and is_below(point, line.spec):
                moved = line.point + point.removeprefix(line.spec.rstrip("/"))
                plan.spots[moved] = disk, replace(mount, point=moved)
