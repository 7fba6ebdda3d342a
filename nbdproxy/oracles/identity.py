"""The names that a filesystem gives itself: its UUID and its label, as blkid prints them.

Covers the kinds that some oracle reads. Nothing is verified: a torn superblock has the names that
stand in it. Sources: each format's description of its superblock or boot sector.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.filesystems import BOOT_SECTOR, FilesystemKind
from nbdproxy.oracles.signatures import read, text


class Identity(NamedTuple):
    """A UUID, or the serial number that stands for one, and a label; "" if there is none."""

    ident: str = ""
    label: str = ""


_EXT, _EXT_AT = struct.Struct("<16s16s"), 1024 + 0x68
_XFS = struct.Struct(">32x16s60x12s")
_BTRFS, _BTRFS_AT = struct.Struct("<32x16s251x256s"), 0x10000
_FAT = struct.Struct("<11xHBHBHHxH8xII4xI")
_FAT16_NAMES, _FAT32_NAMES = (struct.Struct("<I11s"), 39), (struct.Struct("<I11s"), 67)
_FAT_LABEL, _FAT_LONG_NAME, _FAT_DELETED = 0x08, 0x0F, 0xE5
_FAT_NO_LABEL = "NO NAME"
_EXFAT = struct.Struct("<80xI4xI4xII4xBB")
_FAT32_BITS, _EXFAT_BITS = 0x0FFFFFFF, 0xFFFFFFFF
_EXFAT_LABEL = 0x83
_NTFS = struct.Struct("<11xHB34xQ8xb7xQ")
_NTFS_VOLUME, _NTFS_VOLUME_NAME, _NTFS_LAST = 3, 0x60, 0xFFFFFFFF
_ENTRY = 32
_CHAIN_MAX = 64  # clusters of a root directory that are looked through


def identity(device: ReadableDevice, kind: FilesystemKind) -> Identity:
    """Return the names of the filesystem of a kind that begins where a device does."""
    return _READERS[kind](device)


def _ext(device: ReadableDevice) -> Identity:
    ident, label = _EXT.unpack(device.pread(_EXT_AT, _EXT.size))
    return Identity(str(uuid.UUID(bytes=ident)), text(label))


def _xfs(device: ReadableDevice) -> Identity:
    ident, label = _XFS.unpack(read(device, 0, _XFS.size).ljust(_XFS.size, b"\0"))
    return Identity(str(uuid.UUID(bytes=ident)), text(label))


def _btrfs(device: ReadableDevice) -> Identity:
    raw = read(device, _BTRFS_AT, _BTRFS.size).ljust(_BTRFS.size, b"\0")
    ident, label = _BTRFS.unpack(raw)
    return Identity(str(uuid.UUID(bytes=ident)), text(label))


def _fat(device: ReadableDevice) -> Identity:
    """Prefer the label in the root directory, as Linux and Windows do."""
    boot = device.pread(0, BOOT_SECTOR)
    sector, per_cluster, reserved, fats, roots, _, small, _, large, root = _FAT.unpack_from(boot)
    names, at = _FAT16_NAMES if small else _FAT32_NAMES
    serial, label = names.unpack_from(boot, at)
    data = (reserved + fats * (small or large)) * sector
    if small:
        entries = read(device, data, roots * _ENTRY)
    else:
        chain = _chain(device, reserved * sector, root, _FAT32_BITS)
        width = per_cluster * sector
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
    table, heap, root, serial, sector_bits, cluster_bits = _EXFAT.unpack_from(raw)
    ident = f"{serial >> 16:04X}-{serial & 0xFFFF:04X}"
    if sector_bits > 12 or cluster_bits > 25 - sector_bits:
        return Identity(ident)
    width = 1 << sector_bits + cluster_bits
    for number in _chain(device, table << sector_bits, root, _EXFAT_BITS):
        entries = read(device, (heap << sector_bits) + (number - 2) * width, width)
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
    sector, per_cluster, table, size, serial = _NTFS.unpack_from(raw)
    cluster = sector * (per_cluster if per_cluster <= 128 else 1 << 256 - per_cluster)
    width = 1 << -size if size < 0 else size * cluster
    record = read(device, table * cluster + _NTFS_VOLUME * width, min(width, 1 << 16))
    return Identity(f"{serial:016X}", _ntfs_label(record))


def _ntfs_label(record: bytes) -> str:
    """Return the $VOLUME_NAME of the file record of $Volume."""
    if not record.startswith(b"FILE"):
        return ""
    at = int.from_bytes(record[20:22], "little")
    while at + 24 <= len(record):
        kind, length = struct.unpack_from("<II", record, at)
        if kind == _NTFS_LAST or length < 24:
            return ""
        if kind == _NTFS_VOLUME_NAME:
            size, start = struct.unpack_from("<IH", record, at + 16)
            return record[at + start : at + start + size].decode("utf-16-le", "replace")
        at += length
    return ""


_READERS = {
    FilesystemKind.EXT: _ext,
    FilesystemKind.XFS: _xfs,
    FilesystemKind.BTRFS: _btrfs,
    FilesystemKind.FAT: _fat,
    FilesystemKind.EXFAT: _exfat,
    FilesystemKind.NTFS: _ntfs,
}
