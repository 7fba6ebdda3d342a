"""The owners of ranges of a disk: which file or structure a byte belongs to.

For describing a missing write: "file data of /app/a.js, bytes 0-4095". It describes and does not
judge: a disk that cannot be read has owners of kind UNKNOWN, never an error. Only the ext family is
read here; `ext4.owners` says what it does not distinguish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent, ExtentMap
from nbdproxy.oracles.check import candidates
from nbdproxy.oracles.ext4.owners import FilesystemMap, OwnerKind, map_filesystem
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.partitions import Slice, slices
from nbdproxy.oracles.qcow2 import Qcow2Device, is_qcow2
from nbdproxy.oracles.watched import WatchedDevice

NAMED_MAX = 3
"""Paths that `Owner.words` gives; it counts the others."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What a range of a disk belongs to.

    `paths` are those of the file or directory (several, if it has hard links), or of all files
    whose inodes are in this piece of an inode table. `offset` is where in the file the range
    begins, in bytes; None for what is not a file's or directory's content. Paths that are not
    UTF-8 carry surrogate escapes.
    """

    extent: Extent
    kind: OwnerKind
    paths: tuple[str, ...] = ()
    offset: int | None = None

    @property
    def path(self) -> str | None:
        """The first of the paths, if there is one."""
        return self.paths[0] if self.paths else None

    def words(self) -> str:
        """Describe it: `inode table (/a, /b and 3 more)`, `file data of /a, bytes 0-4095`."""
        named = ", ".join(self.paths[:NAMED_MAX])
        if len(self.paths) > NAMED_MAX:
            named += f" and {len(self.paths) - NAMED_MAX} more"
        if not named:
            return str(self.kind)
        if self.kind is OwnerKind.INODE_TABLE:
            return f"{self.kind} ({named})"
        if self.offset is None:
            return f"{self.kind} of {named}"
        return f"{self.kind} of {named}, bytes {self.offset}-{self.offset + self.extent.length - 1}"


class OwnerMap:
    """The owners on one disk: read once for the whole disk, then looked up for any range.

    The owners of bytes of a qcow2 file are those of the guest's disk inside, and the file's tables.
    """

    def __init__(self, device: ReadableDevice, tree: Tree | None = None) -> None:
        """Read all names and inodes; paths are those of the guest's `tree`, if it is known.

        Paths on filesystems outside of the tree are given with their partition, if several
        filesystems are there.
        """
        self._parts: list[_MappedFilesystem] = []
        self._qcow2: _Qcow2Owners | None = None
        try:
            if is_qcow2(device):
                self._qcow2 = _Qcow2Owners(Qcow2Device(device), tree)
                return
            found = _readable(device, tree)
        except FilesystemError:
            self._parts.append(_MappedFilesystem(0, device.size, None, 0, _unchanged))
            return
        for part in found:
            filesystem_map = None
            shown = partial(_shown, tree, part, len(found) > 1)
            with suppress(Exception):  # any failure of a description is kind UNKNOWN
                filesystem_map = map_filesystem(part.device)
            at = 0
            for piece in part.on_disk(0, part.length):
                self._parts.append(
                    _MappedFilesystem(piece.offset, piece.end, filesystem_map, at, shown)
                )
                at += piece.length

    def of(self, extent: Extent) -> list[Owner]:
        """Return the owners of all bytes of an extent, in order; neighbours differ."""
        result: list[Owner] = []
        for owner in self._pieces(extent.offset, extent.end):
            last = result[-1] if result else None
            if last is not None and _is_same_owner(last, owner):
                both = dict.fromkeys((*last.paths, *owner.paths))
                extended = Extent.between(last.extent.offset, owner.extent.end)
                result[-1] = replace(last, extent=extended, paths=tuple(both))
            else:
                result.append(owner)
        return result

    def _pieces(self, start: int, end: int) -> Iterator[Owner]:
        if self._qcow2 is not None:
            yield from self._qcow2.pieces(start, end)
            return
        while start < end:
            # Of two filesystems that overlap the first one counts.
            here = next((part for part in self._parts if part.low <= start < part.high), None)
            if here is None:
                stop = min([end, *(part.low for part in self._parts if part.low > start)])
                yield Owner(Extent.between(start, stop), OwnerKind.OUTSIDE)
                start = stop
                continue
            stop = min(end, here.high)
            if here.filesystem_map is None:
                yield Owner(Extent.between(start, stop), OwnerKind.UNKNOWN)
            else:
                shift = here.low - here.at
                for piece in here.filesystem_map.pieces(start - shift, stop - shift):
                    extent = Extent(shift + piece.start, piece.end - piece.start)
                    is_content = piece.kind in {OwnerKind.FILE_DATA, OwnerKind.DIRECTORY}
                    offset = piece.offset if is_content else None
                    yield Owner(extent, piece.kind, here.shown(piece.paths), offset)
            start = stop


def _readable(device: ReadableDevice, tree: Tree | None) -> list[Slice]:
    """Return the parts of a disk that have a filesystem; first those that the tree names."""
    numbers = {m.partition for m in tree.mounts if m.partition is not None} if tree else set()
    if not numbers:
        return candidates(device, None)
    found = [part for part in slices(device) if {part.number, part.key} & numbers]
    with suppress(FilesystemError):
        found += [
            part for part in candidates(device, None) if not {part.number, part.key} & numbers
        ]
    return found


def _unchanged(paths: tuple[str, ...]) -> tuple[str, ...]:
    return paths


def _shown(
    tree: Tree | None, part: Slice, is_one_of_many: bool, paths: tuple[str, ...]
) -> tuple[str, ...]:
    """Translate paths of a filesystem to the guest's."""
    found: list[str] = []
    for path in paths:
        seen = tree.shown(part.key, path) if tree is not None else []
        if not seen:
            seen = [f"{path} of {part.name}" if is_one_of_many else path]
        found += seen
    return tuple(found)


class _MappedFilesystem(NamedTuple):
    """Bytes [low, high) of the disk hold a filesystem's bytes from `at` on."""

    low: int
    high: int
    filesystem_map: FilesystemMap | None
    at: int
    shown: Callable[[tuple[str, ...]], tuple[str, ...]]


class _Qcow2Owners:
    """Who owns the bytes of a qcow2 file."""

    def __init__(self, file: Qcow2Device, tree: Tree | None) -> None:
        # A plain device hides that it is qcow2, so that owners are by offsets of the guest's disk.
        self._owners = OwnerMap(WatchedDevice(file), tree)
        self._claims = ExtentMap[_Claim](lambda claim, by: claim._replace(at=claim.at + by))
        for run in file.runs(0, file.size):
            if run.host is not None and not run.packed:
                claim = _Claim(None, run.start)
                self._claims.set(run.host, run.host + run.end - run.start, claim)
        for kind, extent in file.structures():
            self._claims.set(extent.offset, extent.end, _Claim(OwnerKind(kind.value), 0))

    def pieces(self, start: int, end: int) -> Iterator[Owner]:
        """Yield the owners of [start, end) of the file in order."""
        for low, high, claim in self._claims.segments(start, end):
            if claim is None or claim.kind is not None:
                kind = OwnerKind.UNREFERENCED if claim is None else claim.kind
                yield Owner(Extent.between(low, high), kind or OwnerKind.UNKNOWN)
                continue
            for owner in self._owners.of(Extent(claim.at, high - low)):
                at = low + owner.extent.offset - claim.at
                yield replace(owner, extent=Extent(at, owner.extent.length))


class _Claim(NamedTuple):
    """A structure of the file, or data of the guest's disk from `at` on."""

    kind: OwnerKind | None
    at: int


def owners(
    device: ReadableDevice, extents: Iterable[Extent], tree: Tree | None = None
) -> list[Owner]:
    """Return the owners of ranges of a disk, journal replayed, in order.

    The owners of an extent cover exactly its bytes. For many calls make one `OwnerMap`, which takes
    most of the time. No content of the disk raises an error.
    """
    found = OwnerMap(device, tree)
    return [owner for extent in extents for owner in found.of(extent)]


def _is_same_owner(last: Owner, owner: Owner) -> bool:
    """Tell whether two neighbours are one run of the same owner."""
    if last.kind is not owner.kind:
        return False
    if last.kind is OwnerKind.INODE_TABLE:
        return True
    if last.offset is None or owner.offset is None:
        return last.paths == owner.paths
    return last.paths == owner.paths and last.offset + last.extent.length == owner.offset
