"""How the guest mounts each kind of filesystem, and what a mount that fails means.

A state is mounted as its own machine would after a reboot: for writing, so that logs, fast commits
and orphans are processed, except for what Linux mounts read-only. Options switch off work that
changes no file: times of access, tables that are initialized in the background, discards, a balance
that is resumed.

A failed mount is a verdict only if the driver says, by errno and in words that are listed here,
that the filesystem is broken. Every other failure says nothing of the disk: a feature or a size
that this kernel does not have, parts on other devices, a guest in trouble.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from nbdproxy.checker.guest import GuestError
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, LabError
from nbdproxy.lab.guest.kernel import MOUNT_PROGRAMS
from nbdproxy.oracles.browse import NotMountedError
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.ext4.superblock import SUPERBLOCK
from nbdproxy.oracles.filesystems import FilesystemKind, kind_of


class Driver(NamedTuple):
    """How the guest handles a kind.

    broken       a pattern of kernel messages that mean a broken filesystem
    fsck         the checker and its options, none if the lab has none
    probe        a program that is run before the mount; its exit status says whether to mount
    refusals     exit statuses of a probe or mount program that mean a broken filesystem
    top_level    the option that mounts the top level, if the default may be a part of it
    keeps_modes  whether the filesystem has permissions, and the driver does not invent them
    """

    name: str
    options: str
    broken: str = "$^"
    fsck: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()
    refusals: frozenset[int] = frozenset()
    top_level: str = ""
    keeps_modes: bool = True

    @property
    def program(self) -> str | None:
        """The program that mounts it, if the kernel does not."""
        return MOUNT_PROGRAMS.get(self.name)


_NOT_NTFS, _CORRUPT = 12, 13  # ntfs-3g.probe(8)

_EXT_BROKEN = (
    r"VFS: (?:Can't find|Found) ext4|[Ii]nvalid|bad geometry|too big|too large: |not valid|corrupt"
    r"|can't read group|not in group|[Cc]hecksum|inconsistent|smaller than|!= block size"
    r"|(?:error loading|inaccessible|required|both|no) journal|journal inode|no valid journal"
    r"|no magic|too short|[Rr]ecovery failed|root inode|root dentry|orphan|enable quota|comm .*: "
)
_XFS_BROKEN = (
    r"magic number|sanity check failed|[Cc]orrupt|[Ff]ailed to read root inode|needs repair"
    r"|log mount|[Ff]ailed to recover|log recovery|bad (?:magic|clientid|number)|metadata I/O error"
)
_BTRFS_BROKEN = (
    r"checksum mismatch|csum|no valid FS|invalid|mismatch|corrupt|failed to (?:read|load|verify"
    r"|recover|add|replay)|couldn't (?:read|find)|could not (?:read|find|do orphan)|parent transid"
    r"|super_total_bytes|bad (?:tree|super|fsid)|fatal errors|too small|unexpected|level verify"
)
_FAT_BROKEN = (
    r"bogus|invalid|Can't find a valid FAT|looks like a DOS 1|count of clusters|root inode failed"
    r"|FAT read failed|[bB]read"
)
_EXFAT_BROKEN = (
    r"bogus|[Ii]nvalid|failed to (?:load|recognize|read|scan|count|initialize)|unable to read"
)

DRIVERS = {
    FilesystemKind.EXT: Driver(
        "ext4",
        "errors=continue,noinit_itable,no_prefetch_block_bitmaps,nodiscard",
        _EXT_BROKEN,
        ("e2fsck", "-fn"),
    ),
    FilesystemKind.XFS: Driver("xfs", "nouuid,nodiscard", _XFS_BROKEN, ("xfs_repair", "-n")),
    FilesystemKind.BTRFS: Driver(
        "btrfs",
        "nodiscard,skip_balance",
        _BTRFS_BROKEN,
        ("btrfs", "check", "--readonly"),
        top_level="subvolid=5",
    ),
    FilesystemKind.FAT: Driver(
        "vfat", "utf8,errors=continue", _FAT_BROKEN, ("fsck.fat", "-n"), keeps_modes=False
    ),
    FilesystemKind.EXFAT: Driver(
        "exfat", "iocharset=utf8,errors=continue", _EXFAT_BROKEN, keeps_modes=False
    ),
    FilesystemKind.NTFS: Driver(
        "ntfs",
        "ro",  # what ntfs-3g does when it mounts for writing, it does to an empty log only
        fsck=("ntfsresize", "--info", "--force", "--no-progress-bar"),
        probe=("ntfs-3g.probe", "--readwrite"),  # a mount for reading does not look at the log
        refusals=frozenset({_NOT_NTFS, _CORRUPT}),
        keeps_modes=False,
    ),
}

READ_ONLY, NO_TIMES = 1, 1024
"""Flags of mount(2): MS_RDONLY, MS_NOATIME."""

_LIMITS = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|not (?:yet )?supported|by this kernel|bad block size"
    r"|[Oo]nly pagesize|without CONFIG_|[Cc]an(?:'t|not) load|already",
    re.IGNORECASE,
)
"""Kernel messages about features that are not supported; they win over `Driver.broken`."""
_STRUCTURES = {errno.EUCLEAN, errno.EBADMSG}
"""What drivers return only for a broken structure (EFSCORRUPTED, EFSBADCRC)."""
_ANY_FAULT = {errno.EINVAL, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EFBIG, errno.ERANGE}
"""What they return for broken structures and for other reasons: `Driver.broken` decides."""
_PASSING = {
    errno.EBUSY,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EINTR,
    errno.ENXIO,
    errno.EPERM,
    errno.ENODEV,
    errno.ENOTBLK,
    errno.ENFILE,
    errno.EMFILE,
    errno.EFAULT,
}
"""Errors of the guest, which another guest need not have."""
_FAST_COMMIT = 0x400  # a compatible feature of ext4


class RefusedByKernelError(NotMountedError):
    """The kernel does not mount the filesystem."""


def driver_of(device: ReadableDevice) -> Driver:
    """Return how to handle the filesystem that begins where a device does; there is one."""
    return DRIVERS[FilesystemKind(kind_of(device) or "")]


def has_ciphers(device: ReadableDevice) -> bool:
    """Tell whether directories may be encrypted, so that names are not found without a key."""
    if kind_of(device) is not FilesystemKind.EXT:
        return False
    incompat = SUPERBLOCK.read_field(device, superblock.OFFSET, "feature_incompat")
    return bool(incompat & superblock.Incompat.ENCRYPT)


def replays_for_writing_only(device: ReadableDevice) -> bool:
    """Tell whether a read-only mount does not replay all of the log: ext4 with fast commits."""
    if kind_of(device) is not FilesystemKind.EXT:
        return False
    compat = SUPERBLOCK.read_field(device, superblock.OFFSET, "feature_compat")
    return bool(compat & _FAST_COMMIT)


def refusal(driver: Driver, code: int, said: Sequence[str]) -> FilesystemError | LabError:
    """Return what a failed mount means: a RefusedByKernelError only if the disk is at fault.

    `code` is the errno of mount(2), or a program's exit status; `said` what it or the kernel said.
    A GuestError if the fault may be the guest's.
    """
    lines = [line.strip() for line in said if line.strip()]
    if driver.program is not None:
        message = "; ".join(lines[-2:])
        if code in driver.refusals:
            return RefusedByKernelError(f"{driver.program} refuses to mount it: {message}")
        return FilesystemError(f"{driver.program} cannot tell what a mount would show: {message}")
    name = errno.errorcode.get(code, str(code))
    limits = [line for line in lines if _LIMITS.search(line)]
    message = f"{'; '.join((limits or lines)[-2:]) or os.strerror(code)} ({name})"
    if code in _PASSING:
        return GuestError(f"the checker guest cannot mount anything: {message}")
    if limits:
        return FilesystemError(
            f"the kernel of the lab does not know all of the filesystem: {message}"
        )
    faults = any(re.search(driver.broken, line) for line in lines)
    if code in _STRUCTURES or (code in _ANY_FAULT and faults):
        return RefusedByKernelError(f"the kernel refuses to mount it: {message}")
    return FilesystemError(
        f"the kernel of the lab does not mount it, and why is not clear: {message}"
    )
