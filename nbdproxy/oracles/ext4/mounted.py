"""The one way in: a device as the kernel would show it right after a mount."""

from __future__ import annotations

import struct

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, refusal
from nbdproxy.oracles.ext4.filesystem import ROOT, Filesystem
from nbdproxy.oracles.ext4.replayed import ReplayedDevice
from nbdproxy.oracles.ext4.superblock import Incompat
from nbdproxy.oracles.mounts import ONLY, Mount

MMP_MAGIC = 0x004D4D50
MMP_FSCK = 0xE24D4D50
MMP_HEAD = struct.Struct("<II")  # magic, sequence
MMP_SUM = struct.Struct("<I")
MMP_SUM_AT = 0x3FC
QUOTA_MAGICS = (0xD9C01F11, 0xD9C01927, 0xD9C03F14)
"""Of the files for users, groups and projects."""
QUOTA_HEAD = struct.Struct("<II12xIII")  # magic, version; blocks, first free block and entry block
QUOTA_BLOCK = 1024
QUOTA_TREE = 1
"""The block in which the tree of a quota file begins."""


def open_filesystem(device: ReadableDevice, mount: Mount = ONLY) -> Filesystem:
    """Return the filesystem that a mount of `device` would show, at its place.

    Raises NoFilesystemError, or RefusedError with the reason if only a kernel can tell.
    """
    filesystem = Filesystem(device, mount)
    blocks = journal.replay(filesystem)
    if blocks:
        shown = ReplayedDevice(device, filesystem.superblock.block_size, blocks)
        filesystem = Filesystem(shown, mount)
    check_mount(filesystem)
    return filesystem


def check_mount(filesystem: Filesystem) -> None:
    """Raise RefusedError unless a kernel would mount the filesystem for writing, journal replayed.

    Looked at is what Linux 6.1 reads for it: the root directory, the block for multiple mount
    protection, and the heads of the quota files.
    """
    _check_root(filesystem)
    sb = filesystem.superblock
    if sb.incompat & Incompat.MMP:
        _check_mmp(filesystem)
    for number, magic in zip(sb.quota_inodes, QUOTA_MAGICS, strict=True):
        if number:
            _check_quota(filesystem, number, magic)


def _check_mmp(filesystem: Filesystem) -> None:
    sb = filesystem.superblock
    if not sb.first_data_block < sb.mmp_block < sb.blocks:
        raise refusal("its block for multiple mount protection is outside of it")
    block = filesystem.block(sb.mmp_block)
    magic, sequence = MMP_HEAD.unpack_from(block)
    (found,) = MMP_SUM.unpack_from(block, MMP_SUM_AT)
    if (
        magic != MMP_MAGIC
        or sequence == MMP_FSCK
        or (sb.has_checksums and found != crc32c(sb.seed, block[:MMP_SUM_AT]))
    ):
        raise refusal("its block for multiple mount protection is broken, or fsck has it")


def _check_quota(filesystem: Filesystem, number: int, magic: int) -> None:
    try:
        node = filesystem.inode(number)
        head = next(filesystem.chunks(node), b"")[: QUOTA_HEAD.size] if node.is_regular else b""
    except FilesystemError as error:
        raise refusal(f"its quota file cannot be read: {error}") from error
    if len(head) < QUOTA_HEAD.size:
        raise refusal("its quota file has no head")
    found, version, blocks, *free = QUOTA_HEAD.unpack(head)
    if (
        (found, version) not in {(magic, 0), (magic, 1)}
        or blocks * QUOTA_BLOCK > node.size
        or any(number and not QUOTA_TREE < number < blocks for number in free)
    ):
        raise refusal("the head of its quota file is broken")


def _check_root(filesystem: Filesystem) -> None:
    """Raise RefusedError unless the filesystem, journal replayed, has a root to mount."""
    try:
        root = filesystem.inode(ROOT)
    except CorruptError as error:
        raise refusal(f"its root directory cannot be read: {error}") from error
    if not root.is_directory or not root.size:
        raise refusal("its root is not a directory")
