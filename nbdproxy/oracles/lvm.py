"""LVM's volumes on one disk: where the linear ones are, and why others cannot be read.

Read is the committed metadata text of the format LVM2, if all its checksums are right; of all
metadata areas of a group's physical volumes on this disk, the newest. A volume can be read if its
segments are linear (`striped` with one stripe), on physical volumes of this disk. An obstacle is
given for thin and cached ones, RAID, snapshots and what is on other disks, and for a volume that a
snapshot is being merged into, as the kernel shows other data of it until that is done.
Source: lvm2's lib/label/label.h, lib/format_text/layout.h and import_vsn1.c; lvmsystemid(7) and
vgcfgbackup(8) show the text.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.oracles.structs import Field, StructLayout

SECTOR = 512
LABEL_SECTORS = 4


class LabelHeader(NamedTuple):
    """struct label_header (lvm2, lib/label/label.h); offsets in bytes from its sector's start."""

    magic: Annotated[bytes, Field(0, "8s")]
    sector: Annotated[int, Field(8, "Q")]
    crc: Annotated[int, Field(16, "I")]
    offset: Annotated[int, Field(20, "I")]
    type: Annotated[bytes, Field(24, "8s")]


class PvHeader(NamedTuple):
    """struct pv_header (lib/format_text/layout.h), without the areas behind it."""

    uuid: Annotated[bytes, Field(0, "32s")]
    device_size: Annotated[int, Field(32, "Q")]


class DiskArea(NamedTuple):
    """struct disk_locn: an area of the physical volume, in bytes; all zero ends a list of them."""

    offset: Annotated[int, Field(0, "Q")]
    size: Annotated[int, Field(8, "Q")]


class MetadataHeader(NamedTuple):
    """struct mda_header, with the first of its raw_locns: the committed text, from `start` on."""

    crc: Annotated[int, Field(0, "I")]
    magic: Annotated[bytes, Field(4, "16s")]
    version: Annotated[int, Field(20, "I")]
    start: Annotated[int, Field(24, "Q")]
    text_offset: Annotated[int, Field(40, "Q")]
    text_size: Annotated[int, Field(48, "Q")]
    text_crc: Annotated[int, Field(56, "I")]
    text_flags: Annotated[int, Field(60, "I")]


_LABEL = StructLayout(LabelHeader, "<")
_PV_HEADER = StructLayout(PvHeader, "<")
_AREA = StructLayout(DiskArea, "<")
_NO_AREA = DiskArea(0, 0)
_MDA = StructLayout(MetadataHeader, "<")
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_MDA_SIZE = 512
_TEXT_MAX = 512 << 10
"""Bytes of a metadata text, for some thousand volumes; an area of 1 MiB has room for two."""
_DEPTH_MAX = 8
"""Nested sections; a segment is the fourth level."""
_IGNORED = 1
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([\w.+-]+)|([{}=\[\],"])|#[^\n]*|\s+')
_LINEAR = "striped"
_SHOW_NOTHING = {"snapshot", "thin-pool", "cache-pool", "vdo-pool"}
"""Types of volumes that are part of others, though LVM lists some of them."""
_PLAIN_STATUS = {"READ", "WRITE", "VISIBLE", "FIXED_MINOR"}


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """A visible logical volume, and its pieces of the disk in order.

    ident     the ids of its group and its own, as device mapper has them: 64 characters
    obstacle  why its pieces are not what the kernel shows; None if they are
    """

    group: str
    short: str
    ident: str
    pieces: tuple[Extent, ...] = ()
    obstacle: str | None = None

    @property
    def name(self) -> str:
        """The name as `group/volume`."""
        return f"{self.group}/{self.short}"


class _MetadataCommit(NamedTuple):
    """A committed metadata text of a group: its seqno, the group's name and sections."""

    number: int
    group: str
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """A physical volume at an offset of the disk, with the metadata of its group.

    `commit` is None if the volume is in no group, and if `is_broken`: its metadata is broken, or it
    has no metadata area, which LVM allows if another volume of the group has one.
    """

    offset: int
    size: int
    ident: str
    commit: _MetadataCommit | None
    is_broken: bool


def physical_volume(device: ReadableDevice, offset: int = 0) -> PhysicalVolume | None:
    """Read the label of a physical volume and its metadata; None without a label."""
    for sector in range(LABEL_SECTORS):
        if device.size < (sector + 1) * SECTOR:
            break
        raw = device.pread(sector * SECTOR, SECTOR)
        label = _LABEL.unpack_from(raw)
        if label.magic == b"LABELONE" and label.sector == sector:
            covered = raw[_LABEL.offset("offset") :]
            is_sound = label.crc == _crc(covered) and label.type == b"LVM2 001"
            if not is_sound or not _LABEL.size <= label.offset <= SECTOR - _PV_HEADER.size:
                return PhysicalVolume(offset, device.size, "", None, is_broken=True)
            ident = _PV_HEADER.unpack_from(raw, label.offset).uuid.decode("ascii", "replace")
            commit, is_broken = _newest_commit(device, raw, label.offset + _PV_HEADER.size)
            return PhysicalVolume(offset, device.size, ident, commit, is_broken)
    return None


def logical_volumes(found: Iterable[PhysicalVolume]) -> list[LogicalVolume]:
    """Return the visible volumes of all groups on these, in the order of groups and names.

    Pieces are those of the disk that the physical volumes' offsets count on.
    """
    every = list(found)
    times = Counter(one.ident for one in every)
    there = {one.ident: one for one in every if times[one.ident] == 1}
    newest: dict[str, _MetadataCommit] = {}
    for one in every:
        if (commit := one.commit) is not None:
            ident = commit.about["id"]
            if ident not in newest or commit.number > newest[ident].number:
                newest[ident] = commit
    return [volume for commit in newest.values() for volume in _volumes(commit, there)]


def in_unknown_groups(found: Iterable[PhysicalVolume]) -> list[PhysicalVolume]:
    """Return the physical volumes whose group has no readable metadata here."""
    there = list(found)
    commits = [one.commit for one in there if one.commit is not None]
    members = {
        _without_dashes(pv["id"])
        for commit in commits
        for pv in commit.about["physical_volumes"].values()
    }
    return [one for one in there if one.is_broken and one.ident not in members]


class LinearDevice:
    """Extents of a disk, concatenated; closing it leaves the disk open."""

    def __init__(self, base: ReadableDevice, pieces: tuple[Extent, ...]) -> None:
        self._base = base
        self._pieces = pieces
        self.size = sum(piece.length for piece in pieces)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; may block on a cold page."""
        at = 0
        for extent in self._parts(offset, len(buffer)):
            self._base.pread_into(extent.offset, buffer[at : at + extent.length])
            at += extent.length

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        at = offset
        for piece in self._parts(offset, length):
            for extent in self._base.data_extents(piece.offset, piece.length):
                yield Extent(at + extent.offset - piece.offset, extent.length)
            at += piece.length

    def on_disk(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield where on the disk below a part of the volume is, in order."""
        return self._parts(offset, length)

    def _parts(self, offset: int, length: int) -> Iterator[Extent]:
        start, end, at = offset, offset + length, 0
        assert end <= self.size
        for piece in self._pieces:
            low, high = max(start, at), min(end, at + piece.length)
            if low < high:
                yield Extent(piece.offset + low - at, high - low)
            at += piece.length

    def close(self) -> None:
        """Do nothing: the disk below belongs to whoever opened it."""


def _newest_commit(
    device: ReadableDevice, raw: bytes, at: int
) -> tuple[_MetadataCommit | None, bool]:
    """Return the newest commit of a physical volume's metadata areas, and whether it is broken.

    It is broken if there is no commit and an area is. A crash leaves at most one broken area.
    """
    areas = list(_areas(raw, at))
    split = areas.index(_NO_AREA) if _NO_AREA in areas else len(areas)
    best, is_broken = None, not areas[split + 1 :]
    for offset, size in areas[split + 1 :]:
        text = _text(device, offset, size)
        if text == "":
            continue
        try:
            commit = _commit(text or "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            is_broken = True  # not what LVM writes
            continue
        if best is None or commit.number > best.number:
            best = commit
    return best, is_broken and best is None


def _areas(raw: bytes, at: int) -> Iterator[DiskArea]:
    """Yield the data areas, one that ends their list, and the metadata areas."""
    ends = 0
    while at + _AREA.size <= len(raw) and ends < 2:
        area = _AREA.unpack_from(raw, at)
        if not area.offset:
            ends += 1
        if ends < 2:
            yield area
        at += _AREA.size


def _text(device: ReadableDevice, offset: int, size: int) -> str | None:
    """Return the committed text of an area, "" if it has none; None if a checksum is wrong."""
    if offset + max(size, _MDA_SIZE) > device.size:
        return None
    raw = device.pread(offset, _MDA_SIZE)
    header = _MDA.unpack_from(raw)
    is_here = (header.magic, header.version, header.start) == (_MDA_MAGIC, 1, offset)
    if not is_here or header.crc != _crc(raw[_MDA.offset("magic") :]):
        return None
    at, length = header.text_offset, header.text_size
    if not at and not length:
        return ""  # in no group
    if header.text_flags & _IGNORED:
        return None
    if not _MDA_SIZE <= at < size or not 0 < length <= min(size, _TEXT_MAX):
        return None
    first = min(length, size - at)
    found = device.pread(offset + at, first)
    if first < length:  # the area is a ring: the text goes on at its begin
        found += device.pread(offset + _MDA_SIZE, length - first)
    return (
        found.rstrip(b"\0").decode("utf-8", "replace") if _crc(found) == header.text_crc else None
    )


def _crc(data: bytes) -> int:
    """Return LVM's CRC-32: with its own initial value, and without the final inversion."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _parse(text: str) -> dict[str, Any]:
    """Read LVM's text: sections in braces, values that are numbers, strings and lists of both."""
    tokens = []
    for found in _TOKEN.finditer(text):
        quoted, word, mark = found.groups()
        if mark == '"':
            raise ValueError  # a string without an end, in which all others would be looked for
        if (quoted, word, mark) != (None, None, None):
            tokens.append((quoted, word, mark))
    top: dict[str, Any] = {}
    stack, at = [top], 0
    while at < len(tokens):
        _, name, mark = tokens[at]
        if mark == "}":
            stack.pop()
            at += 1
        elif tokens[at + 1][2] == "{":
            stack.append(stack[-1].setdefault(name, {}))
            if len(stack) > _DEPTH_MAX:
                raise ValueError
            at += 2
        else:
            stack[-1][name], at = _value(tokens, at + 2)
    return top


def _value(tokens: list[Any], at: int) -> tuple[Any, int]:
    quoted, word, mark = tokens[at]
    if mark != "[":
        return (quoted if word is None else int(word) if word.isdigit() else word), at + 1
    found = []
    at += 1
    while tokens[at][2] != "]":
        if tokens[at][2] not in {None, ","}:
            raise ValueError  # LVM has no lists in lists
        if tokens[at][2] is None:
            found.append(_value(tokens, at)[0])
        at += 1
    return found, at + 1


def _commit(text: str) -> _MetadataCommit:
    """Parse a text and all its volumes, so that whatever LVM does not write raises an error."""
    (found,) = ((name, value) for name, value in _parse(text).items() if isinstance(value, dict))
    group, about = found
    commit = _MetadataCommit(_integer(about["seqno"]), group, about)
    for _ in _volumes(commit, {}):
        pass
    return commit


def _volumes(
    commit: _MetadataCommit, there: Mapping[str, PhysicalVolume]
) -> Iterator[LogicalVolume]:
    about = commit.about
    group_id = _without_dashes(about["id"])
    members = {
        name: (there.get(_without_dashes(pv["id"])), _integer(pv["pe_start"]) * SECTOR)
        for name, pv in about["physical_volumes"].items()
        if "MISSING" not in pv.get("flags", ())  # if it is here after all, it is not up to date
    }
    listed = about.get("logical_volumes", {})
    shows, merged = _snapshots(listed)
    for name, volume in sorted(listed.items()):
        types = {_type(segment) for segment in _segments(volume)}
        is_seen = name in shows or "VISIBLE" in volume["status"]
        if not is_seen or types & _SHOW_NOTHING or name in merged:
            continue  # a part of another volume
        pieces: tuple[Extent, ...] = ()
        obstacle = shows.get(name) or _obstacle(about, volume, types)
        if obstacle is None:
            pieces = _pieces(about, volume, members)
            obstacle = (
                None
                if pieces
                else "an LVM volume whose physical volumes are not all here, once each"
            )
        ident = group_id + _without_dashes(volume["id"])
        yield LogicalVolume(commit.group, name, ident, pieces, obstacle)


def _snapshots(listed: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Return by volume the obstacles that snapshots are, and the snapshots being merged."""
    shows: dict[str, str] = {}
    merged = set()
    for volume in listed.values():
        for segment in _segments(volume):
            if _type(segment) != "snapshot":
                continue
            if "merging_store" in segment:
                merged.add(segment["merging_store"])
                shows[segment["origin"]] = "an LVM volume that a snapshot is being merged into"
            else:
                shows[segment["cow_store"]] = "an LVM snapshot, which is kept as differences"
    return shows, merged


def _obstacle(about: Mapping[str, Any], volume: Mapping[str, Any], types: set[str]) -> str | None:
    if types != {_LINEAR}:
        return "an LVM volume of the type " + " and ".join(sorted(types - {_LINEAR}))
    if "EXPORTED" in about["status"]:
        return "in an LVM group that is exported"
    if odd := set(volume["status"]) - _PLAIN_STATUS:
        return "an LVM volume in the state " + " and ".join(sorted(odd))
    if any(segment["stripe_count"] != 1 for segment in _segments(volume)):
        return "an LVM volume in stripes"
    return None


def _pieces(
    about: Mapping[str, Any],
    volume: Mapping[str, Any],
    members: Mapping[str, tuple[PhysicalVolume | None, int]],
) -> tuple[Extent, ...]:
    """Return where the segments of a linear volume are, none if one is not on this disk."""
    extent = _integer(about["extent_size"]) * SECTOR
    pieces: list[Extent] = []
    length, is_here = 0, True
    for segment in _segments(volume):
        where, first = segment["stripes"]
        home, start = members.get(where, (None, 0))  # a volume that pvmove moves is on another one
        at = start + _integer(first) * extent
        size = _integer(segment["extent_count"]) * extent
        is_next = _integer(segment["start_extent"]) * extent == length
        length += size
        if home is None or at + size > home.size or not is_next:
            is_here = False  # the rest is still looked at: all of it must be what LVM writes
        else:
            pieces.append(Extent(home.offset + at, size))
    return tuple(pieces) if is_here else ()


def _segments(volume: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [volume[f"segment{n}"] for n in range(1, _integer(volume["segment_count"]) + 1)]


def _type(segment: Mapping[str, Any]) -> str:
    """Return a segment's type without the flags that LVM may add to it."""
    kind: str = segment["type"].partition("+")[0]
    return kind


def _without_dashes(ident: str) -> str:
    return ident.replace("-", "")


def _integer(value: object) -> int:
    """Return an integer; TypeError for others, as a string could be multiplied too."""
    if not isinstance(value, int):
        raise TypeError
    return value
