"""Which kind of filesystem begins at an offset, and how the quick oracle opens it.

The kind is detected by the signature that its kernel driver looks for, and nothing else is
verified: the filesystem may still be broken. A partition table is never taken for FAT, although
both end their first sector in the same two bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.ext4.mounted import open_filesystem as open_ext
from nbdproxy.oracles.ext4.superblock import SUPERBLOCK
from nbdproxy.oracles.mounts import ONLY, Mount
from nbdproxy.oracles.structs import Field, StructLayout

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


class XfsSuperblock(NamedTuple):
    """struct xfs_dsb (Linux, fs/xfs/libxfs/xfs_format.h), the fields that are used."""

    rblocks: Annotated[int, Field(16, "Q")]
    uuid: Annotated[bytes, Field(32, "16s")]
    logstart: Annotated[int, Field(48, "Q")]
    fname: Annotated[bytes, Field(108, "12s")]


class BtrfsSuperblock(NamedTuple):
    """struct btrfs_super_block (Linux, uapi/linux/btrfs_tree.h), the fields that are used."""

    fsid: Annotated[bytes, Field(0x20, "16s")]
    flags: Annotated[int, Field(0x38, "Q")]
    num_devices: Annotated[int, Field(0x88, "Q")]
    label: Annotated[bytes, Field(0x12B, "256s")]


class FatBootSector(NamedTuple):
    """The BIOS parameter block of FAT (Microsoft, FAT32 File System Specification 1.03).

    The fields from `fat_size_32` on are those of FAT32 only.
    """

    bytes_per_sector: Annotated[int, Field(11, "H")]
    sectors_per_cluster: Annotated[int, Field(13, "B")]
    reserved_sectors: Annotated[int, Field(14, "H")]
    fats: Annotated[int, Field(16, "B")]
    root_entries: Annotated[int, Field(17, "H")]
    media: Annotated[int, Field(21, "B")]
    fat_size_16: Annotated[int, Field(22, "H")]
    fat_size_32: Annotated[int, Field(36, "I")]
    root_cluster: Annotated[int, Field(44, "I")]
    signature: Annotated[bytes, Field(510, "2s")]


XFS_SUPERBLOCK = StructLayout(XfsSuperblock, ">")
BTRFS_SUPERBLOCK = StructLayout(BtrfsSuperblock, "<")
BTRFS_OFFSET = 0x10000
FAT_BOOT_SECTOR = StructLayout(FatBootSector, "<")
_BTRFS_SEEDING = 1 << 32


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
        if not XFS_SUPERBLOCK.read_field(device, 0, "logstart"):
            return "it has its log"
        return "it has a part" if XFS_SUPERBLOCK.read_field(device, 0, "rblocks") else None
    if kind is FilesystemKind.BTRFS:
        devices = BTRFS_SUPERBLOCK.read_field(device, BTRFS_OFFSET, "num_devices")
        return "it has a part" if devices > 1 else None
    if kind is FilesystemKind.EXT:
        inode, number = (
            SUPERBLOCK.read_field(device, superblock.OFFSET, name)
            for name in ("journal_inum", "journal_dev")
        )
        return "it has its journal" if number and not inode else None
    return None


def is_seed(device: ReadableDevice) -> bool:
    """Tell whether a filesystem is a seed of Btrfs, from which others may have grown (btrfs(5))."""
    if kind_of(device) is not FilesystemKind.BTRFS:
        return False
    flags = BTRFS_SUPERBLOCK.read_field(device, BTRFS_OFFSET, "flags")
    return bool(flags & _BTRFS_SEEDING)


def _is_fat(raw: bytes) -> bool:
    """Tell whether a boot sector has what Linux wants of a FAT: sizes, FATs, and a media byte."""
    boot = FAT_BOOT_SECTOR.unpack_from(raw)
    per_cluster = boot.sectors_per_cluster
    return (
        boot.signature == b"\x55\xaa"
        and boot.bytes_per_sector in _SECTOR_SIZES
        and per_cluster > 0
        and not per_cluster & (per_cluster - 1)
        and boot.reserved_sectors > 0
        and boot.fats > 0
        and boot.media in _MEDIA
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
