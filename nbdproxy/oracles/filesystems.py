"""Which filesystem begins at a place, and how the quick oracle gets into it.

A kind is told by the signature that its kernel driver looks for, and nothing more is verified: what
a signature promises may still be broken. A partition table is never taken for FAT, although both
end their first sector in the same two bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class KernelOnlyError(FilesystemError):
    """The quick oracle cannot read this filesystem at all; a kernel can."""


def kind_of(device: ReadableDevice) -> FilesystemKind | None:
    """Return the filesystem that begins where the device does, None if none is known."""
    if superblock.has_magic(device):
        return FilesystemKind.EXT
    for kind, offset, signature in _SIGNATURES:
        end = offset + len(signature)
        if device.size >= end and device.pread(offset, len(signature)) == signature:
            return kind
    is_fat = device.size >= BOOT_SECTOR and _is_fat(device.pread(0, BOOT_SECTOR))
    return FilesystemKind.FAT if is_fat else None


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


class Node(Protocol):
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


N = TypeVar("N", bound=Node)


class Mounted(Protocol[N]):
    """A filesystem as a mount would show it."""

    device: ReadableDevice

    def lookup(self, path: bytes, *, follow_last: bool = True) -> N | None:
        """Return what a guest's absolute path leads to; None if nothing."""
        ...

    def walk(self, under: bytes = b"/") -> Iterator[tuple[bytes, N]]:
        """Yield path and node of every file and symbolic link below a folder."""
        ...

    def chunks(self, node: N) -> Iterator[bytes]:
        """Yield a file's content."""
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
