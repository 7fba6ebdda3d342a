"""What the guest mounts each filesystem with, and what its refusal to mount means.

A refusal is a verdict only where a driver that knows the filesystem, and has all of it, finds it
broken. Features that this kernel does not have, and parts on other devices, are no fault of a disk.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.lab.kernel import MOUNT_PROGRAMS
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.filesystems import FilesystemKind, kind_of


class Driver(NamedTuple):
    """How the guest handles a kind.

    fsck         the checker and its options, none if the lab has none
    probe        what tells first, by its status, whether a mount for writing would be right
    refusals     which statuses of a probe or mount mean a broken filesystem; None for all
    keeps_modes  whether permissions are kept, and not made up by the driver
    """

    name: str
    options: str
    fsck: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()
    refusals: frozenset[int] | None = None
    keeps_modes: bool = True

    @property
    def program(self) -> str | None:
        """What mounts it instead of the kernel."""
        return MOUNT_PROGRAMS.get(self.name)


_NOT_NTFS, _CORRUPT = 12, 13  # ntfs-3g.probe(8)

DRIVERS = {
    FilesystemKind.EXT: Driver("ext4", "ro", ("e2fsck", "-fn")),
    FilesystemKind.XFS: Driver("xfs", "ro,nouuid", ("xfs_repair", "-n")),
    FilesystemKind.BTRFS: Driver("btrfs", "ro", ("btrfs", "check", "--readonly")),
    FilesystemKind.FAT: Driver("vfat", "ro,utf8", ("fsck.fat", "-n"), keeps_modes=False),
    FilesystemKind.EXFAT: Driver("exfat", "ro,iocharset=utf8", keeps_modes=False),
    FilesystemKind.NTFS: Driver(
        "ntfs",
        "ro",
        ("ntfsresize", "--info", "--force", "--no-progress-bar"),
        probe=("ntfs-3g.probe", "--readwrite"),  # a mount for reading does not look at the log
        refusals=frozenset({_NOT_NTFS, _CORRUPT}),
        keeps_modes=False,
    ),
}


_UNSUPPORTED = re.compile(
    r"unsupported|unknown .*(?:feature|filesystem type)|not supported|by this kernel",
    re.IGNORECASE,
)
_EXT_INCOMPAT_AT = superblock.OFFSET + 0x60


class RefusedByKernelError(FilesystemError):
    """The kernel does not mount the filesystem."""


def driver_of(device: ReadableDevice) -> Driver:
    """Return how to handle the filesystem that begins where a device does; there is one."""
    return DRIVERS[FilesystemKind(kind_of(device) or "")]


def has_ciphers(device: ReadableDevice) -> bool:
    """Tell whether folders may be encrypted, so that a name in them is not found without a key."""
    if kind_of(device) is not FilesystemKind.EXT:
        return False
    incompat = int.from_bytes(device.pread(_EXT_INCOMPAT_AT, 4), "little")
    return bool(incompat & superblock.Incompat.ENCRYPT)


def refusal(driver: Driver, code: int, log: str, said: str) -> FilesystemError:
    """Return what a failed mount means: a RefusedByKernelError only if the disk is at fault.

    `code` is the program's exit status, `log` what the kernel and `said` what the program said.
    """
    words = _last_words(log, said)
    who = driver.program or "the kernel"
    if driver.refusals is not None and code not in driver.refusals:
        return FilesystemError(f"{who} cannot tell what a mount would show: {words}")
    if _UNSUPPORTED.search(words):
        return FilesystemError(f"{who} of the lab does not know all of the filesystem: {words}")
    return RefusedByKernelError(f"{who} refuses to mount it: {words}")


def _last_words(log: str, said: str) -> str:
    """Return the kernel's last two lines, without their times, or else what mount said."""
    lines = [line.partition("] ")[2] or line for line in (log or said).splitlines()]
    return "; ".join([line.strip() for line in lines if line.strip()][-2:])
