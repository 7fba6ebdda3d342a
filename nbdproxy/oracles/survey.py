"""`survey`: everything on a disk that holds files, or may hold some that cannot be read here.

A file that is not found is lost only if nothing else can have it. So each filesystem is returned
with its names in fstab(5), and whatever is not read (LUKS, a thin volume, a member of an array, a
filesystem that no oracle knows, unknown data) as unreadable. Left out is what holds no files: swap,
boot loaders' partitions, and parts that read all zeroes.

A part is what its signatures claim (see `signatures`); with contradicting ones it is unreadable.
Not covered: what lies between partitions, and detached headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.oracles import lvm
from nbdproxy.oracles.blank import is_blank
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.filesystems import NAMES, FilesystemKind, elsewhere, kinds_of
from nbdproxy.oracles.identity import identity
from nbdproxy.oracles.lvm import LogicalVolume
from nbdproxy.oracles.partition_table import GPT, SECTOR, read_table
from nbdproxy.oracles.partitions import DiskLayout, Slice, SliceDevice, disk_layout
from nbdproxy.oracles.signatures import (
    Signature,
    Usage,
    members,
    signatures,
    weak_signatures,
)

_NO_FILES = {
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot
    "e3c9e316-0b5c-4db8-817d-f92df00215ae",  # Microsoft reserved
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b",  # PowerPC PReP boot
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",  # swap, encrypted with a new key at each boot
    "0x41",  # PReP
    "0x82",  # swap
}
"""Types of partitions that hold no files, whatever is in them."""
_ROUNDS = 4
_DYNAMIC = {"0x42", "af9b60a0-1431-4f62-bc68-3311714a69ad"}
"""What partitions of a Windows dynamic disk are for: volumes begin and go on anywhere in them."""
_PHYSICAL = "a physical volume of LVM"
_UNKNOWN = Signature("something unknown", Usage.FILESYSTEM)
_DIVIDED = Signature("divided by a partition table", Usage.TABLE)
_UDEV_SAFE = frozenset("#+-.:=@_")


@dataclass(frozen=True, slots=True)
class FoundFilesystem:
    """A filesystem that some oracle reads, and its names in fstab.

    `specs` are as in the first field of fstab, quotes and escapes undone: UUID=, LABEL=, PARTUUID=,
    PARTLABEL=, /dev/disk/by-..., and LVM's names below /dev. Names that depend on a guest's order
    of disks (/dev/sda1) are none of them.
    """

    slice: Slice
    kind: FilesystemKind
    specs: frozenset[str]


@dataclass(frozen=True, slots=True)
class FoundUnreadable:
    """Something that may hold files and is not read; `str` describes it."""

    where: str
    what: str
    specs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.where} is {self.what}"


@dataclass(frozen=True, slots=True)
class Survey:
    """What has files on a disk, in the order of its slices, and what may have some."""

    filesystems: tuple[FoundFilesystem, ...]
    unreadable: tuple[FoundUnreadable, ...]


class _SurveyBuilder:
    """A survey in the making."""

    def __init__(self, device: ReadableDevice) -> None:
        self.filesystems: list[FoundFilesystem] = []
        self.unreadable: list[FoundUnreadable] = []
        self.left = _ROUNDS * device.size
        """Bytes that may still be read to look for others than zeroes."""

    def add_unreadable(self, where: str, what: str, specs: Iterable[str] = ()) -> None:
        self.unreadable.append(FoundUnreadable(where, what, frozenset(specs)))


def survey(device: ReadableDevice) -> Survey:
    """Classify every part of a disk; raises Qcow2Error for a qcow2 file that cannot be read."""
    layout = disk_layout(device)
    whole, *inner = layout.slices
    found = _SurveyBuilder(device)
    has_table = any(part.partition is not None for part in inner)
    doubt = layout.doubt
    if has_table and (member := _member(whole, inner)) is not None:
        found.add_unreadable(whole.name, member)
        doubt = f"on a disk that is {member}"
    if not has_table or whole.number in layout.physical_volumes or kinds_of(whole.device):
        inner.insert(0, whole)
    elif beside := list(_beside(whole, inner)):
        what = f"{' and '.join(one.what for one in beside)}, and has partitions"
        found.add_unreadable(whole.name, what, set().union(*map(_signature_specs, beside)))
    in_unknown_groups = lvm.in_unknown_groups(layout.physical_volumes.values())
    for part in inner:
        physical = layout.physical_volumes.get(part.number)
        if physical is None:
            _classify(found, part, doubt or _below(layout, part))
        elif odd := _no_plain_physical(layout, part):
            found.add_unreadable(part.name, odd, _place_specs(part))
        elif physical in in_unknown_groups:
            found.add_unreadable(part.name, f"{_PHYSICAL} whose metadata cannot be read")
    for volume in layout.unreadable_volumes:
        assert volume.obstacle is not None
        found.add_unreadable(f"volume {volume.name}", volume.obstacle, _volume_specs(volume))
    return Survey(tuple(found.filesystems), tuple(found.unreadable))


def _member(whole: Slice, inner: Iterable[Slice]) -> str | None:
    """Say what array the whole disk is a member of, by a superblock behind all partitions."""
    end = max(part.offset + part.length for part in inner if part.partition is not None)
    return next((one.what for one in members(whole.device) if one.at >= end), None)


def _beside(whole: Slice, inner: Iterable[Slice]) -> Iterator[Signature]:
    """Yield the signatures in front of the partitions: they or the table are out of date."""
    first = min(part.offset for part in inner if part.partition is not None)
    head = SliceDevice(whole.device, 0, first)
    return (one for one in signatures(head) if one.usage is not Usage.NO_FILES)


def _below(layout: DiskLayout, volume: Slice) -> str | None:
    """Say why a volume is only a copy of what a guest sees: it is on a member of an array."""
    if volume.volume is None:
        return None
    for number in layout.physical_volumes:
        part = next(part for part in layout.slices if part.number == number)
        inside = Extent(part.offset, part.length)
        if any(inside.offset <= e.offset < inside.end for e in volume.volume.pieces) and (
            odd := _no_plain_physical(layout, part)
        ):
            return f"on {part.name}, which is {odd}"
    return None


def _no_plain_physical(layout: DiskLayout, part: Slice) -> str | None:
    """Say what else a physical volume of LVM is; None if LVM surely takes it for one.

    LVM passes over a disk with partitions, and what is a member of an array.
    """
    if wrapper := _wrapper(signatures(part.device)):
        return wrapper
    if not part.number and any(one.partition is not None for one in layout.slices):
        return f"{_PHYSICAL}, and has partitions"
    if kinds := kinds_of(part.device):
        return f"{_PHYSICAL} and {NAMES[kinds[0]]} at once"
    return None


def _wrapper(seen: Iterable[Signature]) -> str | None:
    return next((one.what for one in seen if one.usage is Usage.WRAPPER), None)


def _classify(found: _SurveyBuilder, part: Slice, doubt: str | None) -> None:
    """Enter a part as a filesystem, as unreadable, or not at all."""
    kinds = kinds_of(part.device)
    seen = list(signatures(part.device))
    if kinds == [FilesystemKind.EXT] and superblock.is_journal(part.device):
        return  # that of another filesystem, which is entered with the journal elsewhere
    if not kinds and not seen:
        # Parts that overlap are not read again and again.
        found.left -= part.length
        if found.left >= 0 and _holds_no_files(part):
            return
        seen = [_by_chance(part.device)]
    specs = _place_specs(part)
    for one in seen:
        specs |= _signature_specs(one)
    for kind in kinds:
        names = identity(part.device, kind)
        specs |= _tags("UUID", names.ident) | _tags("LABEL", names.label)
    what = _obstacle(part, seen, kinds) or (doubt if kinds else None)
    if what is not None:
        found.add_unreadable(part.name, what, specs)
    elif kinds:
        found.filesystems.append(FoundFilesystem(part, kinds[0], frozenset(specs)))


def _obstacle(part: Slice, seen: list[Signature], kinds: list[FilesystemKind]) -> str | None:
    """Say what a part is, if it cannot be read."""
    if wrapper := _wrapper(seen):
        return wrapper
    if part.partition is not None and part.partition.kind in _DYNAMIC:
        return "part of a Windows dynamic disk"
    names = [NAMES[kind] for kind in kinds] + [one.what for one in seen]
    if len(names) > 1:
        return f"{' and '.join(names)} at once"
    if kinds:
        gone = elsewhere(part.device, kinds[0])
        return f"{names[0]}, but {gone} on another device" if gone else None
    return None if seen[0].usage is Usage.NO_FILES else seen[0].what


def _by_chance(device: ReadableDevice) -> Signature:
    """Return what a part without a reliable signature may be."""
    if read_table(device, lambda *_: False).partitions:
        return _DIVIDED
    return next(weak_signatures(device), _UNKNOWN)


def _holds_no_files(part: Slice) -> bool:
    """Tell whether a part without any signature is known to be empty, or meant for none."""
    is_meant = part.partition is not None and part.partition.kind in _NO_FILES
    if is_meant or is_blank(part.device):
        return True
    table = read_table(part.device, lambda *_: False)
    if part.number or table.partitions or not table.scheme:
        return False
    rest = SliceDevice(part.device, SECTOR, part.length - SECTOR)
    return table.scheme == GPT or is_blank(rest)


def _place_specs(part: Slice) -> set[str]:
    """Return the names of a part by its partition or volume."""
    specs: set[str] = set()
    if part.partition is not None:
        specs |= _tags("PARTUUID", part.partition.ident) | _tags("PARTLABEL", part.partition.label)
    if part.volume is not None:
        specs |= _volume_specs(part.volume)
    return specs


def _signature_specs(seen: Signature) -> set[str]:
    """Return the names by a signature's UUID, label and nodes in /dev."""
    return _tags("UUID", seen.ident) | _tags("LABEL", seen.label) | {*seen.nodes}


def _volume_specs(volume: LogicalVolume) -> set[str]:
    """Return the names of an LVM volume; device mapper doubles dashes (lvm(8), VALID NAMES)."""
    mapped = "-".join(name.replace("-", "--") for name in (volume.group, volume.short))
    return {
        f"/dev/mapper/{mapped}",
        f"/dev/{volume.name}",
        f"/dev/disk/by-id/dm-name-{mapped}",
        f"/dev/disk/by-id/dm-uuid-LVM-{volume.ident}",
    }


def _tags(tag: str, value: str) -> set[str]:
    """Return both names by a tag of fstab; none for an empty value."""
    if not value:
        return set()
    return {f"{tag}={value}", f"/dev/disk/by-{tag.lower()}/{_udev(value)}"}


def _udev(value: str) -> str:
    """Write a name as udev does in /dev/disk: what is not plain as the hex digits of its bytes."""
    return "".join(
        one
        if (one.isascii() and one.isalnum()) or one in _UDEV_SAFE or not one.isascii()
        else "".join(f"\\x{byte:02x}" for byte in one.encode())
        for one in value
    )
