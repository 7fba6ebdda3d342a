"""From a file's blocks to the disk's: extent trees and the older indirect blocks.

Source: "ext4 Disk Layout", section The Contents of inode.i_block, and the behaviour of Linux 6.1. A
block of the tree that leads only to what is behind the file's end is not read, as no reader of the
file comes there. What is not mapped, and what is mapped but unwritten, reads as zeroes: both are
simply absent from the result. No block that leads to others is walked twice, and no file has more
blocks than there are: what a made-up tree can ask for is bounded by the disk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.superblock import Superblock
from nbdproxy.oracles.watched import Reads

EXTENT_MAGIC = 0xF30A
EXTENT_ENTRY = 12
WRITTEN_MAX = 32768  # a longer length means: less this, and not yet written
DEPTH_MAX = 5
DIRECT = 12
WALKED_ALWAYS, WALKED_SHARE = 64, 16
"""Blocks that lead to a file's others: no more than these, and that part of the filesystem's."""

ReadBlock = Callable[[int], bytes]


class BlockRun(NamedTuple):
    """`blocks` written blocks of a file, from its block `logical`, at the disk's `physical`."""

    logical: int
    physical: int
    blocks: int


class LeafExtent(NamedTuple):
    """An entry of an extent tree's leaf."""

    logical: int
    physical: int
    blocks: int
    is_written: bool


class Child(NamedTuple):
    """An entry of an extent tree's inner node: where blocks from `logical` on are found."""

    logical: int
    physical: int


class BlockTree:
    """One file's tree of blocks.

    Raises CorruptError where the kernel would fail: a checksum, a magic number, a block that is
    outside of the disk or in `fixed`, which are those that no file may have.
    """

    def __init__(self, sb: Superblock, fixed: Reads, inode: Inode, read_block: ReadBlock) -> None:
        self._sb = sb
        self._fixed = fixed
        self._inode = inode
        self._read_block = read_block
        self._fan = sb.block_size // 4
        self._blocks = -(-inode.size // sb.block_size)
        self._is_doubtful = False  # a block of pointers that was read holds impossible ones
        self._walked: set[int] = set()

    def check(self) -> None:
        """Look at what stands in the inode itself, as the kernel does before anything is read."""
        if self._inode.flags & InodeFlag.EXTENTS:
            (depth,) = struct.unpack_from("<H", self._inode.block_map, 6)
            self._entries(self._inode.block_map, depth, None)
        else:
            for pointer in struct.unpack_from("<12I", self._inode.block_map):
                if pointer:
                    self._require_valid(pointer, 1)

    def runs(self) -> list[BlockRun]:
        """Return the written blocks of a file in ascending order, neighbours joined.

        Raises UnsupportedError if the kernel might read them or not, and for a tree that leads to
        the same blocks again and again.
        """
        self._is_doubtful = False
        self._walked.clear()
        result: list[BlockRun] = []
        end = count = 0
        for run in self._extents() if self._inode.flags & InodeFlag.EXTENTS else self._indirect():
            if run.logical < end:
                raise self._corrupt("its extents overlap")
            end = run.logical + run.blocks
            count += run.blocks
            if count > self._sb.blocks:
                raise UnsupportedError(
                    f"inode {self._inode.number} has more blocks than the filesystem"
                )
            if not run.is_written:
                continue
            if result:
                last = result[-1]
                if run[:2] == (last.logical + last.blocks, last.physical + last.blocks):
                    result[-1] = last._replace(blocks=last.blocks + run.blocks)
                    continue
            result.append(BlockRun(*run[:3]))
        self._raise_doubt()
        return result

    def find(self, logical: int) -> int | None:
        """Return where one block of the file is, reading only what leads there; None for a hole.

        Raises UnsupportedError for one that is unwritten, or that the kernel might read or not.
        """
        if not self._inode.flags & InodeFlag.EXTENTS:
            return self._find_pointer(logical)
        node, parent = self._inode.block_map, None
        depth = self._depth()
        while True:
            last: LeafExtent | Child | None = None
            for entry in self._entries(node, depth, parent):
                if entry.logical > logical and (last is not None or not depth):
                    break
                last = entry
            if isinstance(last, Child):
                depth, parent = depth - 1, last.logical
                node = self._child(last.physical)
                continue
            if last is None or logical >= last.logical + last.blocks:
                return None
            if not last.is_written:
                raise UnsupportedError(f"inode {self._inode.number} has unwritten blocks")
            return last.physical + logical - last.logical

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"inode {self._inode.number} is broken: {what}")

    def _extents(self) -> Iterator[LeafExtent]:
        yield from self._leaves(self._inode.block_map, self._depth(), None)

    def _depth(self) -> int:
        (depth,) = struct.unpack_from("<H", self._inode.block_map, 6)
        if depth > DEPTH_MAX:
            raise self._corrupt("its extent tree is too deep")
        return int(depth)

    def _leaves(self, node: bytes, depth: int, parent: int | None) -> Iterator[LeafExtent]:
        for index, entry in enumerate(self._entries(node, depth, parent)):
            if isinstance(entry, LeafExtent):
                yield entry
            elif self._blocks and (not index or entry.logical < self._blocks):
                self._walk_once(entry.physical)
                yield from self._leaves(self._child(entry.physical), depth - 1, entry.logical)

    def _entries(self, node: bytes, depth: int, parent: int | None) -> list[LeafExtent | Child]:
        """Return what a node holds, all of it checked; `parent` is where it is said to begin."""
        magic, count, room, found_depth = struct.unpack_from("<HHHH", node)
        if (
            magic != EXTENT_MAGIC
            or found_depth != depth
            or not count <= room <= len(node) // EXTENT_ENTRY - 1
            or not room
            or (depth and not count)
        ):
            raise self._corrupt("its extent tree has a bad node")
        found: list[LeafExtent | Child] = []
        end = 0
        for at in range(EXTENT_ENTRY, EXTENT_ENTRY * (count + 1), EXTENT_ENTRY):
            entry: LeafExtent | Child
            if depth:
                logical, low, high = struct.unpack_from("<IIH", node, at)
                entry, blocks = Child(logical, high << 32 | low), 1
            else:
                logical, blocks, high, low = struct.unpack_from("<IHHI", node, at)
                is_written = blocks <= WRITTEN_MAX
                blocks -= 0 if is_written else WRITTEN_MAX
                entry = LeafExtent(logical, high << 32 | low, blocks, is_written)
            if not blocks or logical + blocks > 1 << 32:
                raise self._corrupt("it has an impossible extent")
            if logical < end:
                raise self._corrupt("its extents overlap")
            self._require_valid(entry.physical, blocks)
            end = logical + blocks
            found.append(entry)
        if found and parent is not None and found[0].logical != parent:
            raise self._corrupt("its extent tree has a node in the wrong place")
        return found

    def _child(self, number: int) -> bytes:
        block = self._read_block(number)
        if self._sb.has_checksums:
            tail = EXTENT_ENTRY * (struct.unpack_from("<H", block, 4)[0] + 1)
            if tail + 4 > len(block):
                raise self._corrupt("its extent tree has a bad node")
            if struct.unpack_from("<I", block, tail)[0] != crc32c(self._inode.seed, block[:tail]):
                raise self._corrupt("an extent block's checksum is wrong")
        return block

    def _indirect(self) -> Iterator[LeafExtent]:
        """Yield the blocks of a file that has twelve direct and three indirect pointers."""
        pointers = struct.unpack("<15I", self._inode.block_map)
        for logical, physical in enumerate(pointers[:DIRECT]):
            if physical and logical < self._blocks:
                self._require_valid(physical, 1)
                yield LeafExtent(logical, physical, 1, is_written=True)
        logical = DIRECT
        for level, physical in enumerate(pointers[DIRECT:], start=1):
            if physical and logical < self._blocks:
                yield from self._pointers(physical, level, logical)
            logical += self._fan**level

    def _pointers(self, number: int, level: int, logical: int) -> Iterator[LeafExtent]:
        self._walk_once(number)
        step = self._fan ** (level - 1)
        for index, physical in enumerate(self._pointer_block(number)):
            here = logical + index * step
            if here >= self._blocks:
                return
            if not physical:
                continue
            if level == 1:
                self._require_valid(physical, 1)
                yield LeafExtent(here, physical, 1, is_written=True)
            else:
                yield from self._pointers(physical, level - 1, here)

    def _walk_once(self, number: int) -> None:
        if number in self._walked:
            raise UnsupportedError(f"inode {self._inode.number} uses block {number} twice")
        self._walked.add(number)
        if len(self._walked) > WALKED_ALWAYS + self._sb.blocks // WALKED_SHARE:
            raise UnsupportedError(
                f"inode {self._inode.number} has too many blocks that lead to others"
            )

    def _find_pointer(self, logical: int) -> int | None:
        self._is_doubtful = False
        pointers = struct.unpack("<15I", self._inode.block_map)
        if logical < DIRECT:
            number, level = pointers[logical], 0
        else:
            logical -= DIRECT
            level = 1
            while level < 3 and logical >= self._fan**level:
                logical -= self._fan**level
                level += 1
            number = pointers[DIRECT + level - 1]
        while number and level:
            level -= 1
            index, logical = divmod(logical, self._fan**level)
            if index >= self._fan:
                raise self._corrupt("it is too long")
            number = self._pointer_block(number)[index]
        if number:
            self._require_valid(number, 1)
        self._raise_doubt()
        return number or None

    def _raise_doubt(self) -> None:
        """Raise UnsupportedError if a block of pointers that was read is not wholly right.

        The kernel fails when it reads such a block, and no more once it has kept it.
        """
        if self._is_doubtful:
            raise UnsupportedError(
                f"inode {self._inode.number} has a block of pointers that are not all possible"
            )

    def _pointer_block(self, number: int) -> tuple[int, ...]:
        if not 0 < number < self._sb.blocks:
            raise self._corrupt("a block is outside the disk")
        found = struct.unpack(f"<{self._fan}I", self._read_block(number))
        self._is_doubtful |= not all(self._is_valid(one, 1) for one in {number, *found} - {0})
        return found

    def _is_valid(self, block: int, blocks: int) -> bool:
        end = block + blocks
        is_inside = self._sb.first_data_block < block and end <= self._sb.blocks
        return is_inside and not self._fixed.meets(block, end)

    def _require_valid(self, block: int, blocks: int) -> None:
        end = block + blocks
        if block <= self._sb.first_data_block or end > self._sb.blocks:
            raise self._corrupt("a block is outside the disk")
        if self._fixed.meets(block, end):
            raise self._corrupt("a block of it belongs to the filesystem")
