"""Partition tables as Linux reads them: GPT, and MBR with logical partitions.

GPT (UEFI specification, chapter 5): header and table are accepted with right checksums only. Linux
reads the backup at the disk's end only with `gpt` on its command line, though firmware and
partitioning tools restore from it: partitions of the backup alone are read, with a doubt.
MBR: a partition that extends behind the disk's end is cut there. Its unit is the disk's logical
sector, 512 or 4096 bytes, which an image does not tell: the unit is taken in which partitions begin
with a known filesystem.
Source: Linux, block/partitions/efi.c, msdos.c and core.c.
Not covered: other tables (BSD, Sun, SGI, Apple, Windows dynamic disks), see `signatures`.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.structs import Field, StructLayout

SECTOR = 512
SECTOR_SIZES = (512, 4096)
MBR_SIGNATURE = b"\x55\xaa"
PROTECTIVE = 0xEE
GPT, MBR = "GPT", "MBR"
_GPT_MAGIC = b"EFI PART"
_GPT_TABLE_SIZE_MAX = 1 << 20
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
class PartitionTable:
    """The partitions of a disk; `doubt` says why a guest may see other ones, if so.

    `scheme` is GPT or MBR, and "" where there is no table, or none that Linux takes.
    """

    scheme: str = ""
    partitions: tuple[Partition, ...] = ()
    doubt: str | None = None


class BootRecord(NamedTuple):
    """The first sector of a disk with an MBR, or of an extended one's link, in 512 bytes.

    The disk's id is Linux' reading of these bytes (msdos.c), and Windows NT's.
    """

    disk_id: Annotated[int, Field(440, "I")]
    entries: Annotated[bytes, Field(446, "64s")]
    signature: Annotated[bytes, Field(510, "2s")]


class MbrEntry(NamedTuple):
    """One of the four entries of a boot record; `first` and `length` are in sectors."""

    active: Annotated[int, Field(0, "B")]
    kind: Annotated[int, Field(4, "B")]
    first: Annotated[int, Field(8, "I")]
    length: Annotated[int, Field(12, "I")]

    @property
    def is_extended(self) -> bool:
        """Whether it holds logical partitions."""
        return self.kind in _EXTENDED and self.length > 0


class GptHeader(NamedTuple):
    """GPT's header (UEFI specification, section 5.3.2), the fields that are used; in sectors."""

    signature: Annotated[bytes, Field(0, "8s")]
    header_size: Annotated[int, Field(12, "I")]
    header_crc32: Annotated[int, Field(16, "I")]
    my_lba: Annotated[int, Field(24, "Q")]
    first_usable_lba: Annotated[int, Field(40, "Q")]
    last_usable_lba: Annotated[int, Field(48, "Q")]
    partition_entry_lba: Annotated[int, Field(72, "Q")]
    number_of_entries: Annotated[int, Field(80, "I")]
    size_of_entry: Annotated[int, Field(84, "I")]
    entry_array_crc32: Annotated[int, Field(88, "I")]


class GptEntry(NamedTuple):
    """An entry of GPT's table (section 5.3.3); the last sector is part of the partition."""

    type_guid: Annotated[bytes, Field(0, "16s")]
    unique_guid: Annotated[bytes, Field(16, "16s")]
    starting_lba: Annotated[int, Field(32, "Q")]
    ending_lba: Annotated[int, Field(40, "Q")]
    attributes: Annotated[int, Field(48, "Q")]
    name: Annotated[bytes, Field(56, "72s")]


BOOT_RECORD = StructLayout(BootRecord, "<")
MBR_ENTRY = StructLayout(MbrEntry, "<")
GPT_HEADER = StructLayout(GptHeader, "<")
GPT_ENTRY = StructLayout(GptEntry, "<")


def read_table(
    device: ReadableDevice, begins: Callable[[ReadableDevice, int], bool]
) -> PartitionTable:
    """Return the partitions of a disk, in the order of their numbers; none without a table.

    `begins` tells whether something known begins at an offset.
    """
    mbr = _sector(device, 0)
    if mbr is None:
        return PartitionTable()
    entries = _entries(mbr)
    if any(entry.kind == PROTECTIVE for entry in entries):
        return _gpt(device) if any(map(_is_protective, entries)) else PartitionTable()
    if any(entry.active not in _ACTIVE for entry in entries):
        return PartitionTable()  # a boot sector's code
    return _mbr(device, mbr, begins)


def _is_protective(entry: MbrEntry) -> bool:
    return entry.kind == PROTECTIVE and entry.first == 1


def _sector(device: ReadableDevice, offset: int) -> bytes | None:
    """Return the boot record at an offset; None if there is none."""
    if offset + SECTOR > device.size:
        return None
    raw = device.pread(offset, SECTOR)
    return raw if BOOT_RECORD.unpack_from(raw).signature == MBR_SIGNATURE else None


def _entries(sector: bytes) -> list[MbrEntry]:
    return list(MBR_ENTRY.iter_unpack(BOOT_RECORD.unpack_from(sector).entries))


def _mbr(
    device: ReadableDevice, mbr: bytes, begins: Callable[[ReadableDevice, int], bool]
) -> PartitionTable:
    """Read an MBR in the unit, 512 or 4096 bytes, in which all partitions begin with known data."""
    small, large = (
        [part for part in _mbr_partitions(device, mbr, unit) if part.offset < device.size]
        for unit in SECTOR_SIZES
    )
    is_small, is_large = (
        {begins(device, part.offset) for part in found} if found else {False}
        for found in (small, large)
    )
    if True not in is_large or len(small) > len(large):  # the larger unit goes beyond the disk
        return PartitionTable(MBR, _cut(device, small))
    if True not in is_small:
        return PartitionTable(MBR, _cut(device, large))
    if is_small == {True} != is_large:
        return PartitionTable(MBR, _cut(device, small))
    if is_large == {True} != is_small:
        return PartitionTable(MBR, _cut(device, large))
    return PartitionTable(
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
    ident = BOOT_RECORD.unpack_from(mbr).disk_id

    def named(number: int, first: int, entry: MbrEntry) -> Partition:
        return Partition(
            number=number,
            offset=first * unit,
            length=entry.length * unit,
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


def _logical(device: ReadableDevice, whole: MbrEntry, unit: int) -> Iterator[tuple[int, MbrEntry]]:
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


def _gpt(device: ReadableDevice) -> PartitionTable:
    for is_backup in (False, True):
        for unit in SECTOR_SIZES:
            at = device.size // unit - 1 if is_backup else 1
            found = _gpt_table(device, unit, at)
            if found is not None:
                doubt = "named by the copy of its GPT at the end only, which Linux does not look at"
                return PartitionTable(GPT, found, doubt if is_backup else None)
    return PartitionTable()


def _gpt_table(device: ReadableDevice, unit: int, at: int) -> tuple[Partition, ...] | None:
    """Read the header in sector `at` and its table; None unless the kernel takes both."""
    if at < 1 or (at + 1) * unit > device.size:
        return None
    raw = device.pread(at * unit, unit)
    header = GPT_HEADER.unpack_from(raw)
    last = device.size // unit - 1
    is_here = header.signature == _GPT_MAGIC and header.my_lba == at
    if not is_here or not GPT_HEADER.size <= header.header_size <= unit:
        return None
    covered = GPT_HEADER.zeroed(raw[: header.header_size], "header_crc32")
    start, length = header.partition_entry_lba * unit, header.number_of_entries * GPT_ENTRY.size
    if (
        header.header_crc32 != zlib.crc32(covered)
        or header.size_of_entry != GPT_ENTRY.size
        or length > _GPT_TABLE_SIZE_MAX
        or start + length > device.size
        or not header.first_usable_lba <= header.last_usable_lba <= last
    ):
        return None
    table = device.pread(start, length)
    if zlib.crc32(table) != header.entry_array_crc32:
        return None
    found = []
    shown = table[: NUMBER_MAX * GPT_ENTRY.size]
    for number, entry in enumerate(GPT_ENTRY.iter_unpack(shown), start=1):
        is_used = entry.type_guid != bytes(16)
        if is_used and entry.starting_lba <= entry.ending_lba <= last:
            found.append(
                Partition(
                    number=number,
                    offset=entry.starting_lba * unit,
                    length=(entry.ending_lba - entry.starting_lba + 1) * unit,
                    kind=str(uuid.UUID(bytes_le=entry.type_guid)),
                    ident=str(uuid.UUID(bytes_le=entry.unique_guid)),
                    label=entry.name.decode("utf-16-le", "replace").partition("\0")[0],
                )
            )
    return tuple(found)
