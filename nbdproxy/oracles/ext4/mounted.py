"""Opens a filesystem as a mount would show it: journal replayed, checks of the mount passed.

Sources: "ext4 Disk Layout", section Multiple Mount Protection; struct mmp_struct in Linux'
fs/ext4/ext4.h; struct v2_disk_dqheader and v2_disk_dqinfo in fs/quota/quotaio_v2.h.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, refusal
from nbdproxy.oracles.ext4.filesystem import ROOT, Filesystem
from nbdproxy.oracles.ext4.replayed import ReplayedDevice
from nbdproxy.oracles.ext4.superblock import Incompat
from nbdproxy.oracles.mounts import ONLY, Mount
from nbdproxy.oracles.structs import Field, StructLayout

MMP_MAGIC = 0x004D4D50
MMP_FSCK = 0xE24D4D50
QUOTA_MAGICS = (0xD9C01F11, 0xD9C01927, 0xD9C03F14)
"""Of the files for users, groups and projects."""
QUOTA_BLOCK = 1024
QUOTA_TREE = 1
"""The block in which the tree of a quota file begins."""


class MmpBlock(NamedTuple):
    """struct mmp_struct, the fields that are used."""

    magic: Annotated[int, Field(0x0, "I")]
    seq: Annotated[int, Field(0x4, "I")]
    checksum: Annotated[int, Field(0x3FC, "I")]


class QuotaHead(NamedTuple):
    """struct v2_disk_dqheader, and behind it struct v2_disk_dqinfo."""

    magic: Annotated[int, Field(0, "I")]
    version: Annotated[int, Field(4, "I")]
    blocks: Annotated[int, Field(20, "I")]
    free_blk: Annotated[int, Field(24, "I")]
    free_entry: Annotated[int, Field(28, "I")]


MMP = StructLayout(MmpBlock, "<")
QUOTA_HEAD = StructLayout(QuotaHead, "<")


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

    Checked is what Linux 6.1 reads for it: the root directory, the block for multiple mount
    protection, and the headers of the quota files.
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
    found = MMP.unpack_from(block)
    covered = block[: MMP.offset("checksum")]
    if (
        found.magic != MMP_MAGIC
        or found.seq == MMP_FSCK
        or (sb.has_checksums and found.checksum != crc32c(sb.seed, covered))
    ):
        raise refusal("its block for multiple mount protection is broken, or fsck has it")


def _check_quota(filesystem: Filesystem, number: int, magic: int) -> None:
    try:
        node = filesystem.inode(number)
        raw = next(filesystem.chunks(node), b"") if node.is_regular else b""
    except FilesystemError as error:
        raise refusal(f"its quota file cannot be read: {error}") from error
    if len(raw) < QUOTA_HEAD.size:
        raise refusal("its quota file has no head")
    head = QUOTA_HEAD.unpack_from(raw)
    free = (head.free_blk, head.free_entry)
    if (
        (head.magic, head.version) not in {(magic, 0), (magic, 1)}
        or head.blocks * QUOTA_BLOCK > node.size
        or any(number and not QUOTA_TREE < number < head.blocks for number in free)
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
