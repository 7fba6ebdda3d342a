"""A guest's disks: the filesystems on them that can be read, and what else may hold files.

`survey` says what is on one disk; here the filesystems of all disks are together, each with the
paths of its files, and are found by the names that a user or an fstab has for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles import browse
from nbdproxy.oracles.check import PartlyListedError, absolute
from nbdproxy.oracles.filesystems import NAMES, FilesystemKind, KernelOnlyError, is_seed
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import Mount
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.survey import FoundFilesystem, survey


@dataclass(frozen=True, slots=True)
class GuestFilesystem:
    """A filesystem of one of the disks.

    disk   the number of the disk, from 0
    part   its partition or volume, as in `Mount.partition`
    specs  all names by which fstab may call it
    roots  its directories that may be mounted, the default one first
    """

    disk: int
    part: int | str
    name: str
    specs: frozenset[str]
    roots: tuple[str, ...]

    def mount(self, point: str, root: str = "") -> tuple[int, Mount]:
        """Return its disk and a mount of it, of the default directory if no `root` is given."""
        root = root or self.roots[0]
        return self.disk, Mount(
            point, self.part, root if len(self.roots) > 1 or root != "/" else ""
        )


@dataclass(frozen=True, slots=True)
class GuestUnreadable:
    """Something on one of the disks that may hold files and cannot be read; `words` describe it."""

    words: str
    specs: frozenset[str]
    disk: int

    def __str__(self) -> str:
        return self.words


class GuestDisks:
    """What is on all disks of a guest.

    devices, others         the disks in a good state, and in another one, if there is one
    filesystems             those that can be read
    unreadable_filesystems  those that cannot
    unreadable              all that may hold files and cannot be read, these included
    partly_listed           by disk and partition, filesystems of which some directories are broken
    """

    def __init__(
        self,
        oracle: Oracle,
        devices: Sequence[ReadableDevice],
        others: Sequence[ReadableDevice] = (),
        names: Sequence[str] = (),
    ) -> None:
        """Survey the disks; `others` are other states of each, which may hold more.

        `names` are what a user calls the disks: paths of recordings.
        """
        self.devices = list(devices)
        self.others = list(others)
        self._names = [{name, PurePath(name).name} for name in names]
        shorts = [PurePath(name).name for name in names]
        self._shown = [
            short if shorts.count(short) == 1 else name
            for short, name in zip(shorts, names, strict=True)
        ] or [f"disk {number}" for number in range(1, len(devices) + 1)]
        self.oracle = oracle
        self.filesystems: list[GuestFilesystem] = []
        self.unreadable_filesystems: list[GuestFilesystem] = []
        self.unreadable: list[GuestUnreadable] = []
        self.partly_listed: dict[tuple[int, int | str], GuestUnreadable] = {}
        self._paths: dict[tuple[int, int | str], frozenset[str]] = {}
        self._folders: dict[tuple[int, Mount, str], bool] = {}
        surveys = [survey(device) for device in devices]
        unreadable_text = [unreadable.what for found in surveys for unreadable in found.unreadable]
        has_grown = any(NAMES[FilesystemKind.BTRFS] in what for what in unreadable_text)
        for disk, found in enumerate(surveys):
            for unreadable in found.unreadable:
                specs = specs_of(disk, unreadable.where, unreadable.specs)
                words = f"{self.name_of(disk, unreadable.where)} is {unreadable.what}"
                self.unreadable.append(GuestUnreadable(words, specs, disk))
            for part in found.filesystems:
                # A filesystem that was grown from a seed has newer versions of its files.
                if has_grown and is_seed(part.slice.device):
                    specs = specs_of(disk, part.slice.name, part.specs)
                    words = f"{self.name_of(disk, part.slice.name)} is a seed of {NAMES[part.kind]}"
                    self.unreadable.append(GuestUnreadable(words, specs, disk))
                else:
                    self._add(disk, part)
        for disk, device in enumerate(others):
            self._add_other_state(disk, device)

    def _add_other_state(self, disk: int, other: ReadableDevice) -> None:
        """Enter as unreadable what only another state of a disk has."""
        known = {
            spec
            for filesystem in (*self.filesystems, *self.unreadable_filesystems)
            for spec in filesystem.specs
        }
        known |= {spec for one in self.unreadable for spec in one.specs}
        try:
            found = survey(other)
        except FilesystemError:
            return
        seen = [(one.where, f"is {one.what}", one.specs) for one in found.unreadable]
        seen += [(part.slice.name, "has a filesystem", part.specs) for part in found.filesystems]
        for where, what, specs in seen:
            if location_spec(disk, where) not in known:
                words = f"{self.name_of(disk, where)} {what} at another time of the recording"
                self.unreadable.append(GuestUnreadable(words, specs_of(disk, where, specs), disk))

    def _add(self, disk: int, part: FoundFilesystem) -> None:
        key = part.slice.key
        device, mount = self.devices[disk], Mount(partition=key, root="/")
        name = self.name_of(disk, part.slice.name)
        roots: tuple[str, ...] = ("/",)
        specs = specs_of(disk, part.slice.name, part.specs)
        try:
            try:
                found = self.oracle.paths(device, mount=mount)
            except PartlyListedError as error:
                found = error.paths
                if not found:
                    raise
                self.partly_listed[disk, key] = GuestUnreadable(
                    f"{name}: not all listed ({error})", specs, disk
                )
            self._paths[disk, key] = frozenset(found)
            roots = self.oracle.roots(device, key)
        except FilesystemError as error:
            why = str(error) if isinstance(error, KernelOnlyError) else f"unreadable ({error})"
            self.unreadable.append(GuestUnreadable(f"{name}: {why}", specs, disk))
            self.unreadable_filesystems.append(GuestFilesystem(disk, key, name, specs, roots))
            return
        self.filesystems.append(GuestFilesystem(disk, key, name, specs, roots))

    def name_of(self, disk: int, name: str) -> str:
        """Return the name of a part: with its disk's, if there are several."""
        return name if len(self.devices) == 1 else f"{name} of {self._shown[disk]}"

    def paths(self, filesystem: GuestFilesystem) -> frozenset[str]:
        """Return the paths of a filesystem's files and links, from its own top."""
        return self._paths[filesystem.disk, filesystem.part]

    def below(self, filesystem: GuestFilesystem, root: str) -> frozenset[str]:
        """Return the paths that a mount of one of its directories shows, from there."""
        found = self.paths(filesystem)
        if root == "/":
            return found
        return frozenset(path[len(root) :] for path in found if path.startswith(root + "/"))

    def content(self, filesystem: GuestFilesystem, root: str, entry: Entry) -> bytes | None:
        """Return what a file holds, by its path in a directory of a filesystem."""
        mount = Mount("/", filesystem.part, root)
        return self.oracle.content(self.devices[filesystem.disk], entry, mount=mount)

    def link(self, filesystem: GuestFilesystem, path: str) -> str | None:
        """Return the target of a symbolic link that leads to no file; None if it is none."""
        if path not in self.paths(filesystem):
            return None
        entry = Entry(path, "", None)
        if self.content(filesystem, "/", entry) is not None:
            return None
        target = self.content(filesystem, "/", replace(entry, target=""))
        return None if target is None else target.decode("utf-8", "surrogateescape")

    def has_folder(self, disk: int, mount: Mount, path: str) -> bool:
        """Tell whether a mount has a directory, or a link; true if that cannot be told."""
        key = disk, mount, path
        if key not in self._folders:
            kinds = {browse.FileType.FOLDER, browse.FileType.LINK}
            try:
                with self.oracle.browse(self.devices[disk], mount=mount) as shown:
                    found = shown.find(absolute(path))
                self._folders[key] = found is not None and found.kind in kinds
            except FilesystemError:
                self._folders[key] = True
        return self._folders[key]

    def by_spec(self, name: str) -> list[GuestFilesystem]:
        """Return the filesystems with a name of fstab, also those that cannot be read."""
        return [
            filesystem
            for filesystem in (*self.filesystems, *self.unreadable_filesystems)
            if plain(name) in filesystem.specs
        ]

    def unreadable_by_spec(self, name: str) -> GuestUnreadable | None:
        """Return the unreadable part with a name of fstab."""
        return next((one for one in self.unreadable if plain(name) in one.specs), None)

    def matching(self, what: str) -> tuple[list[GuestFilesystem], list[GuestUnreadable]]:
        """Return the filesystems that a user's name stands for, or else the unreadable parts.

        A name is a partition's number, a volume or a name as in fstab, on any disk; a disk, for all
        that is on it; or both, as `DISK/WHAT`.
        """
        found, unreadable = self._matching(what, range(len(self.devices)))
        for disk, names in enumerate(self._names):
            for name in names:
                if what == name:
                    found += [
                        s
                        for s in (*self.filesystems, *self.unreadable_filesystems)
                        if s.disk == disk
                    ]
                    unreadable += [one for one in self.unreadable if one.disk == disk]
                elif what.startswith(f"{name}/"):
                    more = self._matching(what[len(name) + 1 :], [disk])
                    found += more[0]
                    unreadable += more[1]
        found = list(dict.fromkeys(found))
        return found, [] if found else list(dict.fromkeys(unreadable))

    def _matching(
        self, what: str, disks: Collection[int]
    ) -> tuple[list[GuestFilesystem], list[GuestUnreadable]]:
        if what.isdecimal():
            numbered = "whole disk" if what == "0" else f"partition {what}"
            names = {location_spec(disk, numbered) for disk in disks}
        elif what.startswith("/") or "=" in what:
            names = {plain(what)}
        else:
            names = {plain(f"/dev/{what}")}
        filesystems = [
            s
            for s in (*self.filesystems, *self.unreadable_filesystems)
            if s.disk in disks and names & s.specs
        ]
        unreadable = [one for one in self.unreadable if one.disk in disks and names & one.specs]
        return filesystems, unreadable

    def described(self) -> str:
        """List the filesystems and disks, for messages."""
        names = (
            ", ".join(
                filesystem.name for filesystem in (*self.filesystems, *self.unreadable_filesystems)
            )
            or "none"
        )
        if len(self.devices) == 1:
            return names
        return f"{names}; the disks are {', '.join(self._shown)} (write DISK/1 for its partition 1)"

    def unreadable_text(self) -> str:
        """List the unreadable parts, for messages."""
        return ", ".join(map(str, self.unreadable))

    def ambiguity(self) -> str:
        """Return the message that one of the filesystems has to be named."""
        names = ", ".join(filesystem.name for filesystem in self.filesystems)
        return (
            f"several partitions hold a filesystem: {names}; name one of them with --partition, "
            f"or say what is mounted where with --mount"
        )


def specs_of(disk: int, where: str, specs: Iterable[str]) -> frozenset[str]:
    """Return all names of a part of a disk, normalized by `plain`, with its location."""
    return frozenset((location_spec(disk, where), *map(plain, specs)))


def location_spec(disk: int, where: str) -> str:
    """Return a name for a location on a disk, which no fstab has."""
    return f"{where} of {disk}"


def plain(name: str) -> str:
    """Normalize a name of fstab: UUIDs are compared without regard to case."""
    return name.lower() if "uuid" in name.lower() else name
