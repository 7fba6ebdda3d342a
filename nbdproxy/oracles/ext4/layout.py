"""Extents of the disk that an ext4's metadata, its journal or a file's content occupies.

Covers what mke2fs allocates: superblock, descriptors, bitmaps, inode tables, journal. Not covered:
directories, blocks of extent trees and of extended attributes; backups of the superblock.
"""

from __future__ import annotations

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.ext4 import superblock as sb
from nbdproxy.oracles.ext4.filesystem import Filesystem


def journal_extents(device: ReadableDevice) -> list[Extent]:
    """Return where the journal is; raises FilesystemError if there is no ext4, or none in it."""
    filesystem = Filesystem(device)
    if not filesystem.superblock.journal_inode:
        raise FilesystemError("the filesystem has no journal")
    return _content(filesystem, filesystem.superblock.journal_inode)


def metadata_extents(device: ReadableDevice) -> list[Extent]:
    """Return where metadata and journal are; raises FilesystemError if there is no ext4."""
    filesystem = Filesystem(device)
    found = filesystem.superblock
    size = found.block_size
    tables = -(-found.inodes_per_group * found.inode_size // size)
    blocks = [(found.own_block, 1), *((block, 1) for block in sb.descriptor_blocks(found))]
    for group in sb.descriptors(device, found):
        blocks += [(group.block_bitmap, 1), (group.inode_bitmap, 1), (group.inode_table, tables)]
    extents = [Extent(block * size, count * size) for block, count in blocks]
    if found.journal_inode:
        extents += _content(filesystem, found.journal_inode)
    return extents


def file_extents(device: ReadableDevice, path: str) -> list[Extent]:
    """Return where a file's blocks are; raises FilesystemError if there is no such file."""
    filesystem = Filesystem(device)
    node = filesystem.lookup(path.encode(errors="surrogateescape"))
    if node is None:
        raise FilesystemError(f"there is no {path} in it")
    size = filesystem.superblock.block_size
    return [Extent(run.physical * size, run.blocks * size) for run in filesystem.runs(node)]


def _content(filesystem: Filesystem, inode: int) -> list[Extent]:
    size = filesystem.superblock.block_size
    runs = filesystem.runs(filesystem.inode(inode))
    return [Extent(run.physical * size, run.blocks * size) for run in runs]
