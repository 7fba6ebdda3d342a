"""From a file's blocks to the disk's: extent trees and the older indirect blocks.

Source: "ext4 Disk Layout", section The Contents of inode.i_block. What is not mapped, and what is
mapped but unwritten, reads as zeroes: both are simply absent from the result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.superblock import Superblock

EXTENT_MAGIC = 0xF30A
EXTENT_ENTRY = 12
WRITTEN_MAX = 32768  # a longer length means: less this, and not yet written
UNWRITTEN = -1
DEPTH_MAX = 5
DIRECT = 12

ReadBlock = Callable[[int], bytes]


class Run(NamedTuple):
    """`blocks` written blocks of a file, from its block `logical`, at the disk's `physical`."""

    logical: int
    physical: int
    blocks: int


def runs(sb: Superblock, inode: Inode, read_block: ReadBlock) -> list[Run]:
    """Return the written blocks of a file in ascending order, neighbours joined.

    Raises CorruptError where the kernel would: a checksum, a magic number, an impossible block.
    """
    walker = _Walker(sb, inode, read_block)
    result: list[Run] = []
    end = 0
    for run in walker.extents() if inode.flags & InodeFlag.EXTENTS else walker.indirect():
        if run.logical < end:
            raise walker.corrupt("its extents overlap")
        end = run.logical + run.blocks
        if run.physical == UNWRITTEN:
            continue
        if run.physical <= sb.first_data_block or run.physical + run.blocks > sb.blocks:
            raise walker.corrupt("a block is outside the disk")
        if result:
            last = result[-1]
            if (run.logical, run.physical) == (last.logical + last.blocks, sum(last[1:])):
                result[-1] = last._replace(blocks=last.blocks + run.blocks)
                continue
        result.append(run)
    return result


class _Walker:
    """Walks one file's tree of blocks; yields runs that may be unwritten or wrong."""

    def __init__(self, sb: Superblock, inode: Inode, read_block: ReadBlock) -> None:
        self._sb = sb
        self._inode = inode
        self._read_block = read_block
        self._fan = sb.block_size // 4
        self._blocks = -(-inode.size // sb.block_size)

    def corrupt(self, what: str) -> CorruptError:
        """Return the error for this file."""
        return CorruptError(f"inode {self._inode.number} is broken: {what}")

    def extents(self) -> Iterator[Run]:
        """Yield the leaves of the extent tree."""
        (depth,) = struct.unpack_from("<H", self._inode.block_map, 6)
        if depth > DEPTH_MAX:
            raise self.corrupt("its extent tree is too deep")
        yield from self._node(self._inode.block_map, depth)

    def indirect(self) -> Iterator[Run]:
        """Yield the blocks of a file that has twelve direct and three indirect pointers."""
        pointers = struct.unpack("<15I", self._inode.block_map)
        for logical, physical in enumerate(pointers[:DIRECT]):
            if physical and logical < self._blocks:
                yield Run(logical, physical, 1)
        logical = DIRECT
        for level, physical in enumerate(pointers[DIRECT:], start=1):
            if physical and logical < self._blocks:
                yield from self._pointers(physical, level, logical)
            logical += self._fan**level

    def _node(self, node: bytes, depth: int) -> Iterator[Run]:
        magic, entries, room, found_depth = struct.unpack_from("<HHHH", node)
        if (
            magic != EXTENT_MAGIC
            or found_depth != depth
            or not entries <= room <= len(node) // EXTENT_ENTRY - 1
            or (depth and not entries)
        ):
            raise self.corrupt("its extent tree has a bad node")
        for at in range(EXTENT_ENTRY, EXTENT_ENTRY * (entries + 1), EXTENT_ENTRY):
            if depth:
                low, high = struct.unpack_from("<IH", node, at + 4)
                yield from self._node(self._child(high << 32 | low), depth - 1)
                continue
            logical, length, high, low = struct.unpack_from("<IHHI", node, at)
            if length == 0:
                raise self.corrupt("it has an empty extent")
            if length > WRITTEN_MAX:
                yield Run(logical, UNWRITTEN, length - WRITTEN_MAX)
            else:
                yield Run(logical, high << 32 | low, length)

    def _child(self, number: int) -> bytes:
        block = self._metadata(number)
        if self._sb.has_checksums:
            tail = EXTENT_ENTRY * (struct.unpack_from("<H", block, 4)[0] + 1)
            if tail + 4 > len(block):
                raise self.corrupt("its extent tree has a bad node")
            if struct.unpack_from("<I", block, tail)[0] != crc32c(self._inode.seed, block[:tail]):
                raise self.corrupt("an extent block's checksum is wrong")
        return block

    def _pointers(self, number: int, level: int, logical: int) -> Iterator[Run]:
        step = self._fan ** (level - 1)
        for index, physical in enumerate(struct.unpack(f"<{self._fan}I", self._metadata(number))):
            here = logical + index * step
            if here >= self._blocks:
                return
            if not physical:
                continue
            if level == 1:
                yield Run(here, physical, 1)
            else:
                yield from self._pointers(physical, level - 1, here)

    def _metadata(self, number: int) -> bytes:
        if not self._sb.first_data_block < number < self._sb.blocks:
            raise self.corrupt("a block is outside the disk")
        return self._read_block(number)
