"""A filesystem's UUID and label by its superblock, as blkid prints them.

Covers the kinds that some oracle reads. Nothing is verified: of a torn superblock it is what its
bytes say. Sources: each format's specification, named at its structure here or in `filesystems`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Annotated, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.filesystems import (
    BOOT_SECTOR,
    BTRFS_OFFSET,
    BTRFS_SUPERBLOCK,
    FAT_BOOT_SECTOR,
    XFS_SUPERBLOCK,
    FilesystemKind,
)
from nbdproxy.oracles.signatures import read, text
from nbdproxy.oracles.structs import Field, StructLayout


class Identity(NamedTuple):
    """A UUID, or the serial number that stands for one, and a label; "" if there is none."""

    ident: str = ""
    label: str = ""


class FatVolumeId(NamedTuple):
    """BS_VolID and BS_VolLab of a FAT's boot sector, which are behind one another."""

    serial: Annotated[int, Field(0, "I")]
    label: Annotated[bytes, Field(4, "11s")]


class ExfatBootSector(NamedTuple):
    """exFAT's main boot sector (Microsoft, exFAT file system specification, section 3.1)."""

    fat_offset: Annotated[int, Field(80, "I")]
    cluster_heap_offset: Annotated[int, Field(88, "I")]
    root_cluster: Annotated[int, Field(96, "I")]
    volume_serial: Annotated[int, Field(100, "I")]
    bytes_per_sector_shift: Annotated[int, Field(108, "B")]
    sectors_per_cluster_shift: Annotated[int, Field(109, "B")]


class NtfsBootSector(NamedTuple):
    """NTFS' boot sector (ntfs-3g, include/ntfs-3g/layout.h: NTFS_BOOT_SECTOR)."""

    bytes_per_sector: Annotated[int, Field(11, "H")]
    sectors_per_cluster: Annotated[int, Field(13, "B")]
    mft_lcn: Annotated[int, Field(48, "Q")]
    clusters_per_mft_record: Annotated[int, Field(64, "b")]
    volume_serial: Annotated[int, Field(72, "Q")]


class NtfsRecord(NamedTuple):
    """A record of NTFS' master file table (layout.h: MFT_RECORD)."""

    magic: Annotated[bytes, Field(0, "4s")]
    attrs_offset: Annotated[int, Field(20, "H")]


class NtfsAttribute(NamedTuple):
    """A resident attribute of a record (layout.h: ATTR_RECORD)."""

    type: Annotated[int, Field(0, "I")]
    length: Annotated[int, Field(4, "I")]
    value_length: Annotated[int, Field(16, "I")]
    value_offset: Annotated[int, Field(20, "H")]


_FAT_VOLUME_ID, _EXFAT = StructLayout(FatVolumeId, "<"), StructLayout(ExfatBootSector, "<")
_FAT16_VOLUME_ID_AT, _FAT32_VOLUME_ID_AT = 39, 67
_FAT_LABEL, _FAT_LONG_NAME, _FAT_DELETED = 0x08, 0x0F, 0xE5
_FAT_NO_LABEL = "NO NAME"
_FAT32_BITS, _EXFAT_BITS = 0x0FFFFFFF, 0xFFFFFFFF
_EXFAT_LABEL = 0x83
_NTFS, _NTFS_RECORD = StructLayout(NtfsBootSector, "<"), StructLayout(NtfsRecord, "<")
_NTFS_ATTRIBUTE = StructLayout(NtfsAttribute, "<", 24)
_NTFS_VOLUME, _NTFS_VOLUME_NAME, _NTFS_LAST = 3, 0x60, 0xFFFFFFFF
_ENTRY = 32
_CHAIN_MAX = 64  # clusters of a root directory that are looked through


def identity(device: ReadableDevice, kind: FilesystemKind) -> Identity:
    """Return the names of the filesystem of a kind that begins where a device does."""
    return _READERS[kind](device)


def _ext(device: ReadableDevice) -> Identity:
    ident, label = (
        superblock.SUPERBLOCK.read_field(device, superblock.OFFSET, name)
        for name in ("uuid", "volume_name")
    )
    return Identity(str(uuid.UUID(bytes=ident)), text(label))


def _xfs(device: ReadableDevice) -> Identity:
    size = XFS_SUPERBLOCK.size
    raw = XFS_SUPERBLOCK.unpack_from(read(device, 0, size).ljust(size, b"\0"))
    return Identity(str(uuid.UUID(bytes=raw.uuid)), text(raw.fname))


def _btrfs(device: ReadableDevice) -> Identity:
    size = BTRFS_SUPERBLOCK.size
    raw = BTRFS_SUPERBLOCK.unpack_from(read(device, BTRFS_OFFSET, size).ljust(size, b"\0"))
    return Identity(str(uuid.UUID(bytes=raw.fsid)), text(raw.label))


def _fat(device: ReadableDevice) -> Identity:
    """Prefer the label in the root directory, as Linux and Windows do."""
    raw = device.pread(0, BOOT_SECTOR)
    boot = FAT_BOOT_SECTOR.unpack_from(raw)
    is_small = boot.fat_size_16 > 0
    at = _FAT16_VOLUME_ID_AT if is_small else _FAT32_VOLUME_ID_AT
    serial, label = _FAT_VOLUME_ID.unpack_from(raw, at)
    sectors = boot.reserved_sectors + boot.fats * (boot.fat_size_16 or boot.fat_size_32)
    data = sectors * boot.bytes_per_sector
    if is_small:
        entries = read(device, data, boot.root_entries * _ENTRY)
    else:
        table = boot.reserved_sectors * boot.bytes_per_sector
        chain = _chain(device, table, boot.root_cluster, _FAT32_BITS)
        width = boot.sectors_per_cluster * boot.bytes_per_sector
        entries = b"".join(read(device, data + (n - 2) * width, width) for n in chain)
    shown = next(_fat_labels(entries), "") or label.decode("cp437").rstrip()
    ident = f"{serial >> 16:04X}-{serial & 0xFFFF:04X}"
    return Identity(ident if serial else "", "" if shown == _FAT_NO_LABEL else shown)


def _fat_labels(entries: bytes) -> Iterator[str]:
    for at in range(0, len(entries) - _ENTRY + 1, _ENTRY):
        name, flags = entries[at : at + 11], entries[at + 11]
        if not name[0]:
            return
        is_label = flags & _FAT_LABEL and flags & _FAT_LONG_NAME != _FAT_LONG_NAME
        if is_label and name[0] != _FAT_DELETED:
            yield name.decode("cp437").rstrip()


def _exfat(device: ReadableDevice) -> Identity:
    raw = read(device, 0, BOOT_SECTOR).ljust(BOOT_SECTOR, b"\0")
    boot = _EXFAT.unpack_from(raw)
    ident = f"{boot.volume_serial >> 16:04X}-{boot.volume_serial & 0xFFFF:04X}"
    sector_bits, cluster_bits = boot.bytes_per_sector_shift, boot.sectors_per_cluster_shift
    if sector_bits > 12 or cluster_bits > 25 - sector_bits:
        return Identity(ident)
    width = 1 << sector_bits + cluster_bits
    table, heap = boot.fat_offset << sector_bits, boot.cluster_heap_offset << sector_bits
    for number in _chain(device, table, boot.root_cluster, _EXFAT_BITS):
        entries = read(device, heap + (number - 2) * width, width)
        for at in range(0, len(entries) - _ENTRY + 1, _ENTRY):
            if entries[at] == _EXFAT_LABEL:
                count = min(entries[at + 1], 11)
                label = entries[at + 2 : at + 2 + 2 * count].decode("utf-16-le", "replace")
                return Identity(ident, label)
    return Identity(ident)


def _chain(device: ReadableDevice, table: int, first: int, bits: int) -> Iterator[int]:
    """Follow a chain of clusters in the table of 32-bit entries at a place, as far as is needed."""
    number = first
    for _ in range(_CHAIN_MAX):
        if not 2 <= number & bits < bits - 8:  # the last ones mean a bad cluster, and the end
            return
        yield number & bits
        number = int.from_bytes(read(device, table + 4 * (number & bits), 4), "little")


def _ntfs(device: ReadableDevice) -> Identity:
    raw = read(device, 0, BOOT_SECTOR).ljust(BOOT_SECTOR, b"\0")
    boot = _NTFS.unpack_from(raw)
    per_cluster, size = boot.sectors_per_cluster, boot.clusters_per_mft_record
    sectors = per_cluster if per_cluster <= 128 else 1 << 256 - per_cluster
    cluster = boot.bytes_per_sector * sectors
    width = 1 << -size if size < 0 else size * cluster
    record = read(device, boot.mft_lcn * cluster + _NTFS_VOLUME * width, min(width, 1 << 16))
    return Identity(f"{boot.volume_serial:016X}", _ntfs_label(record))


def _ntfs_label(record: bytes) -> str:
    """Return the $VOLUME_NAME of the file record of $Volume."""
    if not record.startswith(b"FILE"):
        return ""
    at = _NTFS_RECORD.unpack_from(record.ljust(_NTFS_RECORD.size, b"\0")).attrs_offset
    while at + _NTFS_ATTRIBUTE.size <= len(record):
        attribute = _NTFS_ATTRIBUTE.unpack_from(record, at)
        if attribute.type == _NTFS_LAST or attribute.length < _NTFS_ATTRIBUTE.size:
            return ""
        if attribute.type == _NTFS_VOLUME_NAME:
            start = at + attribute.value_offset
            value = record[start : start + attribute.value_length]
            return value.decode("utf-16-le", "replace")
        at += attribute.length
    return ""


_READERS = {
    FilesystemKind.EXT: _ext,
    FilesystemKind.XFS: _xfs,
    FilesystemKind.BTRFS: _btrfs,
    FilesystemKind.FAT: _fat,
    FilesystemKind.EXFAT: _exfat,
    FilesystemKind.NTFS: _ntfs,
}
