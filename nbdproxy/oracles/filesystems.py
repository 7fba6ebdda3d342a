"""Which filesystem begins at a place, and how the quick oracle gets into it.

A kind is told by the signature that its kernel driver looks for, and nothing more is verified: what
a signature promises may still be broken. A partition table is never taken for FAT, although both
end their first sector in the same two bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.ext4.mounted import open_filesystem as open_ext
from nbdproxy.oracles.mounts import ONLY, Mount

BOOT_SECTOR = 512
_SECTOR_SIZES = {512, 1024, 2048, 4096}
_MEDIA = {0xF0, *range(0xF8, 0x100)}


class FilesystemKind(StrEnum):
    """A family of filesystems."""

    EXT = "ext"
    XFS = "xfs"
    BTRFS = "btrfs"
    FAT = "fat"
    EXFAT = "exfat"
    NTFS = "ntfs"


NAMES = {
    FilesystemKind.EXT: "ext2, ext3 or ext4",
    FilesystemKind.XFS: "XFS",
    FilesystemKind.BTRFS: "Btrfs",
    FilesystemKind.FAT: "FAT",
    FilesystemKind.EXFAT: "exFAT",
    FilesystemKind.NTFS: "NTFS",
}
"""What people call them."""

_SIGNATURES = (
    (FilesystemKind.BTRFS, 0x10040, b"_BHRfS_M"),
    (FilesystemKind.XFS, 0, b"XFSB"),
    (FilesystemKind.NTFS, 3, b"NTFS    "),
    (FilesystemKind.EXFAT, 3, b"EXFAT   "),
)


_XFS_SUPERBLOCK = struct.Struct(">16xQ24xQ")  # blocks of its realtime device; where the log is
_BTRFS_DEVICES_AT = 0x10088
_BTRFS_FLAGS_AT, _BTRFS_SEEDING = 0x10038, 1 << 32
_EXT_JOURNAL = struct.Struct("<II")  # its inode, its device
_EXT_JOURNAL_AT = superblock.OFFSET + 0xE0


class KernelOnlyError(FilesystemError):
    """The quick oracle cannot read this filesystem at all; a kernel can."""


def kind_of(device: ReadableDevice) -> FilesystemKind | None:
    """Return the filesystem that begins where the device does, None if none is known."""
    return next(iter(kinds_of(device)), None)


def kinds_of(device: ReadableDevice) -> list[FilesystemKind]:
    """Return every filesystem that seems to begin there: several, if one was not wiped."""
    found = [FilesystemKind.EXT] if superblock.has_magic(device) else []
    for kind, offset, signature in _SIGNATURES:
        end = offset + len(signature)
        if device.size >= end and device.pread(offset, len(signature)) == signature:
            found.append(kind)
    if device.size >= BOOT_SECTOR and _is_fat(device.pread(0, BOOT_SECTOR)):
        found.append(FilesystemKind.FAT)
    return found


def elsewhere(device: ReadableDevice, kind: FilesystemKind) -> str | None:
    """Say what of a filesystem is not on this device, by its superblock; None if nothing is."""
    if kind is FilesystemKind.XFS:
        realtime, log = _XFS_SUPERBLOCK.unpack(device.pread(0, _XFS_SUPERBLOCK.size))
        return "it has its log" if not log else "it has a part" if realtime else None
    if kind is FilesystemKind.BTRFS:
        devices = int.from_bytes(device.pread(_BTRFS_DEVICES_AT, 8), "little")
        return "it has a part" if devices > 1 else None
    if kind is FilesystemKind.EXT:
        raw = device.pread(_EXT_JOURNAL_AT, _EXT_JOURNAL.size)
        inode, number = _EXT_JOURNAL.unpack(raw)
        return "it has its journal" if number and not inode else None
    return None


def is_seed(device: ReadableDevice) -> bool:
    """Tell whether a filesystem is a seed of Btrfs, from which others may have grown (btrfs(5))."""
    if kind_of(device) is not FilesystemKind.BTRFS:
        return False
    return bool(int.from_bytes(device.pread(_BTRFS_FLAGS_AT, 8), "little") & _BTRFS_SEEDING)


def _is_fat(boot: bytes) -> bool:
    """Tell whether a boot sector has what Linux wants of a FAT: sizes, FATs, and a media byte."""
    sector_size = int.from_bytes(boot[11:13], "little")
    per_cluster, reserved, fats, media = boot[13], boot[14:16], boot[16], boot[21]
    return (
        boot[510:] == b"\x55\xaa"
        and sector_size in _SECTOR_SIZES
        and per_cluster > 0
        and not per_cluster & (per_cluster - 1)
        and reserved != b"\0\0"
        and fats > 0
        and media in _MEDIA
    )


class FileNode(Protocol):
    """What a path leads to."""

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file."""
        ...

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        ...

    @property
    def size(self) -> int:
        """How long it is, in bytes."""
        ...

    @property
    def mode(self) -> int:
        """Its type and permissions."""
        ...


N = TypeVar("N", bound=FileNode)


class Mounted(Protocol[N]):
    """A filesystem as a mount would show it."""

    device: ReadableDevice

    def lookup(self, path: bytes, *, follow_last: bool = True) -> N | None:
        """Return what a guest's absolute path leads to; None if nothing."""
        ...

    def walk(
        self,
        under: bytes = b"/",
        broken: list[bytes] | None = None,
        without: Callable[[bytes], bool] = ...,
    ) -> Iterator[tuple[bytes, N]]:
        """Yield path and node of every file and symbolic link below a folder.

        Raises FilesystemError at what cannot be read; with a list `broken` its path goes there.
        Nothing is read of the paths that `without` means.
        """
        ...

    def is_endless(self, node: N) -> bool:
        """Tell whether a file has so many bytes of zeroes that it is not read."""
        ...

    def chunks(self, node: N) -> Iterator[bytes]:
        """Yield a file's content; raises UnsupportedError for one that `is_endless`."""
        ...

    def symlink_target(self, node: N) -> bytes:
        """Return where a symbolic link points to."""
        ...


def open_filesystem(device: ReadableDevice, mount: Mount = ONLY) -> Mounted[Any]:
    """Return the filesystem that a mount of `device` would show, at its place.

    Raises KernelOnlyError for a filesystem that is not read here, other FilesystemErrors where
    there is none or it cannot be judged.
    """
    kind = kind_of(device)
    if kind is None or kind is FilesystemKind.EXT:
        return open_ext(device, mount)
    raise KernelOnlyError(f"{NAMES[kind]} is not read here; ask with --oracle kernel")
