"""LVM's linear volumes on one disk: where they are, from LVM's own metadata.

Read is the committed metadata text of the format LVM2, with all its checksums right; else there are
no volumes. A volume counts if all its segments are linear (`striped` with one stripe) and on this
very physical volume; mirrors, thin pools, snapshots and volumes that go on elsewhere are left out.
Source: lvm2's lib/format_text and "LVM2 metadata" (lvmsystemid(7), vgcfgbackup(8) show the text).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent

SECTOR = 512
LABEL_SECTORS = 4
_LABEL = struct.Struct("<8sQII8s")
_AREA = struct.Struct("<QQ")
_MDA = struct.Struct("<I16sIQQ")
_LOCATION = struct.Struct("<QQII")
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_MDA_SIZE = 512
_TEXT_MAX = 16 << 20
_IGNORED = 1
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([\w.+-]+)|([{}=\[\],])|#[^\n]*|\s+')


@dataclass(frozen=True, slots=True)
class Volume:
    """A linear volume: its name as `group/volume`, and its pieces of the disk in order."""

    name: str
    pieces: tuple[Extent, ...]


def volumes(device: ReadableDevice) -> list[Volume]:
    """Return the linear volumes of a physical volume, by name; none if the disk is not one."""
    for sector in range(LABEL_SECTORS):
        if device.size < (sector + 1) * SECTOR:
            break
        raw = device.pread(sector * SECTOR, SECTOR)
        magic, number, crc, at, kind = _LABEL.unpack_from(raw)
        if magic == b"LABELONE" and kind == b"LVM2 001" and number == sector:
            if crc != _crc(raw[20:]) or not _LABEL.size <= at <= SECTOR - 40:
                return []
            return sorted(_of_label(device, raw, at), key=lambda volume: volume.name)
    return []


class LinearDevice:
    """Pieces of a disk, one behind the other, as a disk; closing it leaves the disk open."""

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


def _of_label(device: ReadableDevice, raw: bytes, at: int) -> Iterator[Volume]:
    own = raw[at : at + 32].decode("ascii", "replace")
    areas = list(_areas(raw, at + 40))
    split = areas.index((0, 0)) if (0, 0) in areas else len(areas)
    best, newest = -1, []
    for offset, size in areas[split + 1 :]:
        text = _text(device, offset, size)
        if text is None:
            continue
        try:
            parsed = _parse(text)
            number, found = _sequence(parsed), list(_volumes(parsed, own, device.size))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return  # not what LVM writes
        if number > best:  # a commit that was cut off is in one area, and not yet in the other
            best, newest = number, found
    yield from newest


def _areas(raw: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yield the data areas, an empty one, and the metadata areas."""
    ends = 0
    while at + _AREA.size <= len(raw) and ends < 2:
        offset, size = _AREA.unpack_from(raw, at)
        if not offset:
            ends += 1
        if ends < 2:
            yield offset, size
        at += _AREA.size


def _text(device: ReadableDevice, offset: int, size: int) -> str | None:
    """Return the committed metadata of an area, if it is sound."""
    if offset + max(size, _MDA_SIZE) > device.size:
        return None
    raw = device.pread(offset, _MDA_SIZE)
    crc, magic, version, start, _ = _MDA.unpack_from(raw)
    at, length, text_crc, flags = _LOCATION.unpack_from(raw, _MDA.size)
    if (magic, version, start) != (_MDA_MAGIC, 1, offset) or crc != _crc(raw[4:]):
        return None
    if flags & _IGNORED or not _MDA_SIZE <= at < size or not 0 < length <= min(size, _TEXT_MAX):
        return None
    first = min(length, size - at)
    found = device.pread(offset + at, first)
    if first < length:  # the text goes round the end of its area
        found += device.pread(offset + _MDA_SIZE, length - first)
    return found.rstrip(b"\0").decode("utf-8", "replace") if _crc(found) == text_crc else None


def _crc(data: bytes) -> int:
    """LVM's own start value, and no inversion."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _parse(text: str) -> dict[str, Any]:
    """Read LVM's text: sections in braces, values that are numbers, strings and lists of both."""
    tokens = [
        (quoted, word, mark)
        for quoted, word, mark in (found.groups() for found in _TOKEN.finditer(text))
        if (quoted, word, mark) != (None, None, None)
    ]
    top: dict[str, Any] = {}
    stack, at = [top], 0
    while at < len(tokens):
        _, name, mark = tokens[at]
        if mark == "}":
            stack.pop()
            at += 1
        elif tokens[at + 1][2] == "{":
            stack.append(stack[-1].setdefault(name, {}))
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


def _sequence(text: dict[str, Any]) -> int:
    """Return which of a group's commits this is."""
    (group,) = (value for value in text.values() if isinstance(value, dict))
    return _whole(group["seqno"])


def _volumes(text: dict[str, Any], own: str, size: int) -> Iterator[Volume]:
    (group,) = (name for name, value in text.items() if isinstance(value, dict))
    about = text[group]
    extent = _whole(about["extent_size"]) * SECTOR
    starts = {
        name: _whole(pv["pe_start"]) * SECTOR
        for name, pv in about["physical_volumes"].items()
        if pv["id"].replace("-", "") == own
    }
    for name, volume in about.get("logical_volumes", {}).items():
        if "VISIBLE" not in volume["status"]:
            continue  # a part of another volume
        pieces: list[Extent] = []
        length = 0
        for number in range(1, volume["segment_count"] + 1):
            segment = volume[f"segment{number}"]
            if segment["type"] != "striped" or segment["stripe_count"] != 1:
                break
            where, first = segment["stripes"]
            start = starts.get(where, size) + _whole(first) * extent
            piece = Extent(start, _whole(segment["extent_count"]) * extent)
            if (
                where not in starts
                or piece.end > size
                or segment["start_extent"] * extent != length
            ):
                break
            pieces.append(piece)
            length += piece.length
        else:
            yield Volume(f"{group}/{name}", tuple(pieces))


def _whole(value: object) -> int:
    """Return a whole number; what else stands there would be multiplied, too."""
    if not isinstance(value, int):
        raise TypeError
    return value
