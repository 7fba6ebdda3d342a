"""Partition tables as Linux reads them: GPT, and MBR with logical partitions.

GPT (UEFI specification, chapter 5): header and table are accepted with right checksums only. Linux
looks at the copy at the disk's end only if it is told to (`gpt` on its command line), though
firmware and partitioning tools restore from it: what only that copy names is read, with a doubt.
MBR: a partition that goes on behind the disk's end is cut there. Its unit is the disk's logical
sector, which an image does not tell: it is found by where filesystems really begin.
Source: Linux, block/partitions/efi.c, msdos.c and core.c.
Not covered: other tables (BSD, Sun, SGI, Apple, Windows dynamic disks), see `signatures`.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from nbdproxy.disks.device import ReadableDevice

SECTOR = 512
SECTOR_SIZES = (512, 4096)
MBR_SIGNATURE = b"\x55\xaa"
PROTECTIVE = 0xEE
GPT, MBR = "GPT", "MBR"
_GPT_MAGIC = b"EFI PART"
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")  # type, own GUID, first and last sector, flags, name
_GPT_TABLE_SIZE_MAX = 1 << 20
_MBR_ENTRY = struct.Struct("<B3sB3sII")  # active, CHS, type, CHS, first sector, sectors
_MBR_ENTRIES_AT, _DISK_ID_AT, _SIGNATURE_AT = 446, 440, 510
_ACTIVE = {0x00, 0x80}
_EXTENDED = {0x05, 0x0F, 0x85}
NUMBER_MAX = 255
"""The last partition that Linux shows (block/partitions: DISK_MAX_PARTS)."""
_LOGICAL_FIRST = 5
_EMPTY_MAX = 100  # so many boot records without a partition in a row end a chain


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition, in bytes; it counts as in /dev/sda1.

    kind   what it is meant for: a GUID, or MBR's byte as in "0x83"
    ident  its PARTUUID as Linux writes it
    label  its PARTLABEL, "" in MBR
    """

    number: int
    offset: int
    length: int
    kind: str
    ident: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """What a table names; `doubt` says why a guest may see other partitions, if so.

    `scheme` is GPT or MBR, and "" where there is none, or none that is sound.
    """

    scheme: str = ""
    partitions: tuple[Partition, ...] = ()
    doubt: str | None = None


class _Entry(NamedTuple):
    active: int
    kind: int
    first: int
    length: int

    @property
    def is_extended(self) -> bool:
        return self.kind in _EXTENDED and self.length > 0


def read_table(device: ReadableDevice, begins: Callable[[ReadableDevice, int], bool]) -> Table:
    """Return the partitions of a disk, in the order of their numbers; none without a table.

    `begins` tells whether something known begins at an offset.
    """
    mbr = _sector(device, 0)
    if mbr is None:
        return Table()
    entries = _entries(mbr)
    if any(entry.kind == PROTECTIVE for entry in entries):
        return _gpt(device) if any(map(_is_protective, entries)) else Table()
    if any(entry.active not in _ACTIVE for entry in entries):
        return Table()  # a boot sector's code
    return _mbr(device, mbr, begins)


def _is_protective(entry: _Entry) -> bool:
    return entry.kind == PROTECTIVE and entry.first == 1


def _sector(device: ReadableDevice, offset: int) -> bytes | None:
    """Return the boot record at an offset; None if there is none."""
    if offset + SECTOR > device.size:
        return None
    raw = device.pread(offset, SECTOR)
    return raw if raw[_SIGNATURE_AT:] == MBR_SIGNATURE else None


def _entries(sector: bytes) -> list[_Entry]:
    fields = _MBR_ENTRY.iter_unpack(sector[_MBR_ENTRIES_AT:_SIGNATURE_AT])
    return [_Entry(active, kind, first, count) for active, _, kind, _, first, count in fields]


def _mbr(
    device: ReadableDevice, mbr: bytes, begins: Callable[[ReadableDevice, int], bool]
) -> Table:
    """Read an MBR in the unit in which all that is named begins with something known."""
    small, large = (
        [part for part in _mbr_partitions(device, mbr, unit) if part.offset < device.size]
        for unit in SECTOR_SIZES
    )
    is_small, is_large = (
        {begins(device, part.offset) for part in found} if found else {False}
        for found in (small, large)
    )
    if True not in is_large or len(small) > len(large):  # the larger unit goes beyond the disk
        return Table(MBR, _cut(device, small))
    if True not in is_small:
        return Table(MBR, _cut(device, large))
    if is_small == {True} != is_large:
        return Table(MBR, _cut(device, small))
    if is_large == {True} != is_small:
        return Table(MBR, _cut(device, large))
    return Table(
        MBR,
        _cut(device, small),
        "in units of 512 or of 4096 bytes, which its partition table leaves open",
    )


def _cut(device: ReadableDevice, found: list[Partition]) -> tuple[Partition, ...]:
    """Cut what goes on behind the end of the disk, as the kernel does."""
    return tuple(
        replace(part, length=min(part.length, device.size - part.offset)) for part in found
    )


def _mbr_partitions(device: ReadableDevice, mbr: bytes, unit: int) -> Iterator[Partition]:
    ident = int.from_bytes(mbr[_DISK_ID_AT : _DISK_ID_AT + 4], "little")

    def named(number: int, first: int, entry: _Entry) -> Partition:
        return Partition(
            number,
            first * unit,
            entry.length * unit,
            kind=f"{entry.kind:#04x}",
            ident=f"{ident:08x}-{number:02x}",
        )

    entries = _entries(mbr)
    for number, entry in enumerate(entries, start=1):
        if entry.length and not entry.is_extended:
            yield named(number, entry.first, entry)
    number = _LOGICAL_FIRST
    for extended in entries:
        if extended.is_extended:
            for first, entry in _logical(device, extended, unit):
                if number > NUMBER_MAX:
                    return
                yield named(number, first, entry)
                number += 1


def _logical(device: ReadableDevice, whole: _Entry, unit: int) -> Iterator[tuple[int, _Entry]]:
    """Follow the chain of extended boot records; links count from the extended partition.

    OS/2 uses all four entries of a record. In the last two there may be garbage: they count if
    what they name is within this link of the chain, and within the extended partition.
    """
    here, room, empty = whole.first, whole.length, 0
    while empty < _EMPTY_MAX:
        sector = _sector(device, here * unit)
        if sector is None:
            return
        empty += 1
        entries = _entries(sector)
        for at, entry in enumerate(entries):
            end = entry.first + entry.length
            is_within = end <= room and here + end <= whole.first + whole.length
            if entry.length and not entry.is_extended and (at < 2 or is_within):
                yield here + entry.first, entry
                empty = 0
        link = next((entry for entry in entries if entry.is_extended), None)
        if link is None:
            return
        here, room = whole.first + link.first, link.length


def _gpt(device: ReadableDevice) -> Table:
    for is_backup in (False, True):
        for unit in SECTOR_SIZES:
            at = device.size // unit - 1 if is_backup else 1
            found = _gpt_table(device, unit, at)
            if found is not None:
                doubt = "named by the copy of its GPT at the end only, which Linux does not look at"
                return Table(GPT, found, doubt if is_backup else None)
    return Table()


def _gpt_table(device: ReadableDevice, unit: int, at: int) -> tuple[Partition, ...] | None:
    """Read the header in sector `at` and its table; None unless the kernel takes both."""
    if at < 1 or (at + 1) * unit > device.size:
        return None
    raw = device.pread(at * unit, unit)
    header = _GPT_HEADER.unpack_from(raw)
    magic, _, size, crc, _, here, _, lowest, highest, _, table, count, width, table_crc = header
    last = device.size // unit - 1
    if magic != _GPT_MAGIC or here != at or not _GPT_HEADER.size <= size <= unit:
        return None
    if (
        crc != zlib.crc32(raw[:16] + bytes(4) + raw[20:size])
        or width != _GPT_ENTRY.size
        or count * width > _GPT_TABLE_SIZE_MAX
        or table * unit + count * width > device.size
        or not lowest <= highest <= last
    ):
        return None
    entries = device.pread(table * unit, count * width)
    if zlib.crc32(entries) != table_crc:
        return None
    found = []
    shown = entries[: NUMBER_MAX * width]
    for number, fields in enumerate(_GPT_ENTRY.iter_unpack(shown), start=1):
        kind, ident, first, end, _, name = fields
        if kind != bytes(16) and first <= end <= last:
            guids = str(uuid.UUID(bytes_le=kind)), str(uuid.UUID(bytes_le=ident))
            label = name.decode("utf-16-le", "replace").partition("\0")[0]
            extent = (first * unit, (end - first + 1) * unit)
            found.append(Partition(number, *extent, *guids, label))
    return tuple(found)
