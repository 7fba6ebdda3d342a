"""What each block of an ext4 is used for: fixed structures, and files, by their paths.

Made once, from all names and inodes that can be read; others are skipped. Of kind UNKNOWN are
blocks of extended attributes, blocks reserved for growth of the descriptors, and blocks that a file
has allocated and never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import ExtentMap
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.ext4.faults import CorruptError
from nbdproxy.oracles.ext4.filesystem import PATH_MAX, ROOT, Filesystem
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.mounted import open_filesystem
from nbdproxy.oracles.ext4.superblock import Incompat, RoCompat


class OwnerKind(StrEnum):
    """What a piece of a disk is used for."""

    SUPERBLOCK = "superblock"
    DESCRIPTORS = "group descriptors"
    BLOCK_BITMAP = "block bitmap"
    INODE_BITMAP = "inode bitmap"
    INODE_TABLE = "inode table"
    JOURNAL = "journal"
    DIRECTORY = "directory"
    EXTENT_BLOCK = "extent block"
    FILE_DATA = "file data"
    FREE = "free"
    QCOW2_HEADER = "qcow2 header"
    QCOW2_L1 = "qcow2 L1 table"
    QCOW2_L2 = "qcow2 L2 table"
    QCOW2_REFCOUNTS = "qcow2 refcounts"
    UNREFERENCED = "unreferenced cluster of the qcow2 file"
    OUTSIDE = "outside of any filesystem"
    UNKNOWN = "unknown"


class BlockClaim(NamedTuple):
    """The use of a run of bytes: kind, inode (0: none), and its offset in what it belongs to."""

    kind: OwnerKind
    inode: int
    offset: int


class OwnedBytes(NamedTuple):
    """Bytes [start, end) of a filesystem with one owner, from byte `offset` of it on."""

    start: int
    end: int
    kind: OwnerKind
    paths: tuple[str, ...]
    offset: int


def _shifted(claim: BlockClaim, by: int) -> BlockClaim:
    return claim._replace(offset=claim.offset + by)


@dataclass(slots=True)
class FilesystemMap:
    """The owners of all bytes of one filesystem, counted from its beginning.

    size    the filesystem's, in bytes
    claims  runs of bytes with an owner
    paths   by inode, all its paths
    free    by group, its block bitmap, as far as that can be read
    """

    filesystem: Filesystem
    size: int
    claims: ExtentMap[BlockClaim]
    paths: dict[int, list[str]]
    free: dict[int, bytes]

    def pieces(self, start: int, end: int) -> Iterator[OwnedBytes]:
        """Yield all of [start, end) in order, piece by piece; neighbours may have one owner."""
        inside = max(start, min(end, self.size))
        for low, high, claim in self.claims.segments(start, inside):
            if claim is None:
                yield from self._unclaimed(low, high)
            elif claim.kind is OwnerKind.INODE_TABLE:
                yield OwnedBytes(
                    low, high, claim.kind, self._inodes(claim, high - low), claim.offset
                )
            else:
                paths = tuple(self.paths.get(claim.inode, ()))
                yield OwnedBytes(low, high, claim.kind, paths, claim.offset)
        if inside < end:
            yield OwnedBytes(inside, end, OwnerKind.OUTSIDE, (), 0)

    def _inodes(self, claim: BlockClaim, length: int) -> tuple[str, ...]:
        """Return the paths of the inodes in a piece of a table, which begins at `claim.inode`."""
        size = self.filesystem.superblock.inode_size
        first = claim.inode + claim.offset // size
        last = claim.inode + (claim.offset + length - 1) // size
        return tuple(
            path for number in range(first, last + 1) for path in self.paths.get(number, ())
        )

    def _unclaimed(self, start: int, end: int) -> Iterator[OwnedBytes]:
        size = self.filesystem.superblock.block_size
        first, last = start // size, -(-end // size)
        is_free = self._is_free(first, last)
        edges = (np.flatnonzero(np.diff(is_free)) + 1).tolist()
        for low, high in pairwise([0, *edges, last - first]):
            kind = OwnerKind.FREE if is_free[low] else OwnerKind.UNKNOWN
            bytes_low, bytes_high = (first + low) * size, (first + high) * size
            yield OwnedBytes(max(start, bytes_low), min(end, bytes_high), kind, (), 0)

    def _is_free(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Tell of each block of [first, last) whether it is known to be free."""
        sb = self.filesystem.superblock
        per_group = sb.blocks_per_group
        result = np.zeros(last - first, np.bool_)
        low_group = max(0, (first - sb.first_data_block) // per_group)
        for group in range(low_group, (last - 1 - sb.first_data_block) // per_group + 1):
            bitmap = self.free.get(group)
            if bitmap is None:
                continue
            start = sb.first_data_block + group * per_group
            low, high = max(first, start), min(last, start + per_group)
            bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
            result[low - first : high - first] = bits[low - start : high - start] == 0
        return result


def map_filesystem(device: ReadableDevice) -> FilesystemMap:
    """Map the filesystem that a device begins with, journal replayed.

    If it cannot be mounted, only the fixed structures are known. Raises FilesystemError if not even
    they can be read.
    """
    try:
        filesystem = open_filesystem(device)
    except FilesystemError:
        filesystem = Filesystem(device)
        return _fixed_map(filesystem, {})
    result = _fixed_map(filesystem, _bitmaps(filesystem))
    owned = ExtentMap[BlockClaim](_shifted)
    leading: set[int] = set()
    for node in _tree(filesystem, result.paths):
        kind = OwnerKind.DIRECTORY if node.is_directory else OwnerKind.FILE_DATA
        _claim_blocks(filesystem, owned, node, kind, leading)
    # Fixed structures win over a broken inode that claims their blocks.
    for start, end, claim in result.claims:
        owned.set(start, end, claim)
    result.claims = owned
    return result


def _fixed_map(filesystem: Filesystem, free: dict[int, bytes]) -> FilesystemMap:
    sb = filesystem.superblock
    result = FilesystemMap(filesystem, sb.blocks * sb.block_size, ExtentMap(_shifted), {}, free)
    if sb.journal_inode:
        try:
            node = filesystem.inode(sb.journal_inode)
        except FilesystemError:
            pass
        else:
            _claim_blocks(filesystem, result.claims, node, OwnerKind.JOURNAL, set())
    for block, count, kind, inode in _fixed(filesystem):
        start = block * sb.block_size
        result.claims.set(start, start + count * sb.block_size, BlockClaim(kind, inode, 0))
    return result


def _fixed(filesystem: Filesystem) -> Iterator[tuple[int, int, OwnerKind, int]]:
    """Yield (block, blocks, kind, first inode) of each fixed structure."""
    sb = filesystem.superblock
    tables = -(-sb.inodes_per_group * sb.inode_size // sb.block_size)
    descriptors = superblock.descriptor_blocks(sb)
    for block in descriptors:
        yield block, 1, OwnerKind.DESCRIPTORS, 0
    for group, descriptor in enumerate(superblock.descriptors(filesystem.device, sb)):
        yield descriptor.block_bitmap, 1, OwnerKind.BLOCK_BITMAP, 0
        yield descriptor.inode_bitmap, 1, OwnerKind.INODE_BITMAP, 0
        first = group * sb.inodes_per_group + 1
        yield filesystem.tables[group], tables, OwnerKind.INODE_TABLE, first
        if superblock.has_backup(sb, group):
            block = sb.first_data_block + group * sb.blocks_per_group if group else sb.own_block
            yield block, 1, OwnerKind.SUPERBLOCK, 0
            if not sb.incompat & Incompat.META_BG:
                yield block + 1, len(descriptors), OwnerKind.DESCRIPTORS, 0
                behind = block + 1 + len(descriptors)
                yield behind, sb.reserved_descriptors, OwnerKind.UNKNOWN, 0


def _bitmaps(filesystem: Filesystem) -> dict[int, bytes]:
    """Return by group its block bitmap, where it can be read and its bits stand for blocks."""
    sb = filesystem.superblock
    if sb.ro_compat & RoCompat.BIGALLOC or sb.blocks_per_group > 8 * sb.block_size:
        return {}  # its bits stand for clusters
    found = {}
    has_flags = sb.ro_compat & (RoCompat.GDT_CSUM | RoCompat.METADATA_CSUM)
    for group, descriptor in enumerate(superblock.descriptors(filesystem.device, sb)):
        if has_flags and descriptor.flags & superblock.BLOCK_UNINIT:
            found[group] = bytes(sb.block_size)
        elif descriptor.block_bitmap < sb.blocks:
            found[group] = filesystem.block(descriptor.block_bitmap)
    return found


def _tree(filesystem: Filesystem, paths: dict[int, list[str]]) -> Iterator[Inode]:
    """Yield each inode that has a name once; collects the names as paths."""
    paths[ROOT] = ["/"]
    todo = [("", ROOT)]
    left, names_left = filesystem.superblock.blocks, filesystem.superblock.names_max
    while todo:
        path, number = todo.pop()
        try:
            node = filesystem.inode(number)
            yield node
            left -= filesystem.blocks_in(node) if node.is_directory else 0
            is_listed = node.is_directory and left >= 0  # else directories use the same blocks
            names = filesystem.listing(node).names if is_listed else {}
        except FilesystemError:
            continue
        names_left -= len(names)
        if names_left < 0:
            return
        for name, below in names.items():
            full = f"{path}/{name.decode('utf-8', 'surrogateescape')}"
            if len(full) >= PATH_MAX:
                continue
            if below not in paths:
                todo.append((full, below))
            paths.setdefault(below, []).append(full)


def _claim_blocks(
    filesystem: Filesystem,
    claims: ExtentMap[BlockClaim],
    node: Inode,
    kind: OwnerKind,
    leading: set[int],
) -> None:
    """Claim the blocks of a file, and the nodes of its block tree, which go into `leading`.

    A file that shares a node with another one claims no data blocks.
    """
    is_fast = node.is_symlink and node.size < len(node.block_map)
    if node.flags & InodeFlag.INLINE_DATA or (is_fast and not node.flags & InodeFlag.EXTENTS):
        return
    size = filesystem.superblock.block_size

    def read_block(number: int) -> bytes:
        if number in leading:
            raise CorruptError(f"block {number} leads to the blocks of two files")
        leading.add(number)
        claim = BlockClaim(OwnerKind.EXTENT_BLOCK, node.number, 0)
        claims.set(number * size, (number + 1) * size, claim)
        return filesystem.block(number)

    if not (node.is_regular or node.is_directory or node.is_symlink):
        return
    try:
        found = filesystem.tree(node, read_block).runs()
    except FilesystemError:
        return
    for run in found:
        start = run.physical * size
        claims.set(
            start, start + run.blocks * size, BlockClaim(kind, node.number, run.logical * size)
        )
