"""Maps a file's blocks to the disk's: extent trees and the older indirect blocks.

Source: "ext4 Disk Layout", section The Contents of inode.i_block; Linux' fs/ext4/ext4_extents.h;
and the behaviour of Linux 6.1. A node of the tree that maps only blocks behind the file's end is
not read, as no reader of the file comes there. Blocks that are not mapped (holes) and those mapped
as unwritten read as zeroes: both are absent from the result.

A forged tree cannot cost more than the disk's size: no node is read twice for one file, and no file
has more blocks than the filesystem.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.superblock import Superblock
from nbdproxy.oracles.structs import Field, StructLayout
from nbdproxy.oracles.watched import RangeSet

EXTENT_MAGIC = 0xF30A
WRITTEN_MAX = 32768  # a greater `len` stands for an unwritten extent of that many blocks less
DEPTH_MAX = 5
DIRECT = 12
NODES_ALWAYS, NODES_SHARE = 64, 16
"""So many nodes of one file's tree are read: these, and one of each NODES_SHARE blocks."""


class ExtentHeader(NamedTuple):
    """struct ext4_extent_header, which a node of an extent tree begins with."""

    magic: Annotated[int, Field(0, "H")]
    entries: Annotated[int, Field(2, "H")]
    max: Annotated[int, Field(4, "H")]
    depth: Annotated[int, Field(6, "H")]
    generation: Annotated[int, Field(8, "I")]


class RawExtent(NamedTuple):
    """struct ext4_extent, an entry of a leaf."""

    block: Annotated[int, Field(0, "I")]
    len: Annotated[int, Field(4, "H")]
    start_hi: Annotated[int, Field(6, "H")]
    start_lo: Annotated[int, Field(8, "I")]


class RawExtentIndex(NamedTuple):
    """struct ext4_extent_idx, an entry of an inner node."""

    block: Annotated[int, Field(0, "I")]
    leaf_lo: Annotated[int, Field(4, "I")]
    leaf_hi: Annotated[int, Field(8, "H")]


HEADER = StructLayout(ExtentHeader, "<")
EXTENT = StructLayout(RawExtent, "<")
INDEX = StructLayout(RawExtentIndex, "<", EXTENT.size)
_CHECKSUM = struct.Struct("<I")  # struct ext4_extent_tail, behind the last entry there is room for
_POINTERS = struct.Struct(f"<{DIRECT + 3}I")  # i_block without extents: direct, then indirect ones

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


class ExtentIndex(NamedTuple):
    """An entry of an extent tree's inner node: the node that maps the blocks from `logical` on."""

    logical: int
    physical: int


class BlockTree:
    """One file's tree of blocks.

    Raises CorruptError where the kernel would fail: a checksum, a magic number, a block that is
    outside of the disk or in `fixed`, which are those that no file may have.
    """

    def __init__(
        self, sb: Superblock, fixed: RangeSet, inode: Inode, read_block: ReadBlock
    ) -> None:
        self._sb = sb
        self._fixed = fixed
        self._inode = inode
        self._read_block = read_block
        self._fan = sb.block_size // 4
        self._blocks = -(-inode.size // sb.block_size)
        self._has_bad_pointers = False  # in an indirect block that was read
        self._nodes_read: set[int] = set()

    def check(self) -> None:
        """Validate the root in the inode, as the kernel does when it loads the inode."""
        if self._inode.flags & InodeFlag.EXTENTS:
            self._entries(self._inode.block_map, None, None)
        else:
            for pointer in _POINTERS.unpack(self._inode.block_map)[:DIRECT]:
                if pointer:
                    self._require_valid(pointer, 1)

    def runs(self) -> list[BlockRun]:
        """Return the written blocks of a file in ascending order, neighbours joined.

        Raises UnsupportedError where it depends on the kernel's cache whether they can be read, and
        for a tree that reaches one node by several ways.
        """
        self._has_bad_pointers = False
        self._nodes_read.clear()
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
        self._raise_if_cache_decides()
        return result

    def find(self, logical: int) -> int | None:
        """Return the disk's block of one of the file's; None for a hole.

        Only the nodes on the way to it are read. Raises UnsupportedError if it is unwritten, or
        where it depends on the kernel's cache whether it can be read.
        """
        if not self._inode.flags & InodeFlag.EXTENTS:
            return self._find_pointer(logical)
        node, parent = self._inode.block_map, None
        depth = self._depth()
        while True:
            last: LeafExtent | ExtentIndex | None = None
            for entry in self._entries(node, depth, parent):
                if entry.logical > logical and (last is not None or not depth):
                    break
                last = entry
            if isinstance(last, ExtentIndex):
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
        _, _, _, depth, _ = HEADER.struct.unpack_from(self._inode.block_map)
        if depth > DEPTH_MAX:
            raise self._corrupt("its extent tree is too deep")
        return int(depth)

    def _leaves(self, node: bytes, depth: int, parent: int | None) -> Iterator[LeafExtent]:
        for index, entry in enumerate(self._entries(node, depth, parent)):
            if isinstance(entry, LeafExtent):
                yield entry
            elif self._blocks and (not index or entry.logical < self._blocks):
                self._count_node(entry.physical)
                yield from self._leaves(self._child(entry.physical), depth - 1, entry.logical)

    def _entries(
        self, node: bytes, depth: int | None, parent: int | None
    ) -> list[LeafExtent | ExtentIndex]:
        """Return a node's entries, validated as the kernel does (__ext4_ext_check).

        `depth` is what it has to be by the node above; None if any is right. `parent` is the first
        logical block by the entry that leads to the node; None of the root.
        """
        magic, count, room, found_depth, _ = HEADER.struct.unpack_from(node)
        if (
            magic != EXTENT_MAGIC
            or depth not in {None, found_depth}
            or not count <= room <= len(node) // EXTENT.size - 1
            or not room
            or (found_depth and not count)
        ):
            raise self._corrupt("its extent tree has a bad node")
        found: list[LeafExtent | ExtentIndex] = []
        end = 0
        entries = node[HEADER.size : HEADER.size + EXTENT.size * count]
        for fields in (INDEX if found_depth else EXTENT).struct.iter_unpack(entries):
            entry: LeafExtent | ExtentIndex
            if found_depth:
                logical, low, high = fields
                entry, blocks = ExtentIndex(logical, high << 32 | low), 1
            else:
                logical, blocks, high, low = fields
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
            tail = HEADER.size + EXTENT.size * HEADER.unpack_from(block).max
            if tail + _CHECKSUM.size > len(block):
                raise self._corrupt("its extent tree has a bad node")
            if _CHECKSUM.unpack_from(block, tail)[0] != crc32c(self._inode.seed, block[:tail]):
                raise self._corrupt("an extent block's checksum is wrong")
        return block

    def _indirect(self) -> Iterator[LeafExtent]:
        """Yield the blocks of a file that has twelve direct and three indirect pointers."""
        pointers = _POINTERS.unpack(self._inode.block_map)
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
        self._count_node(number)
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

    def _count_node(self, number: int) -> None:
        if number in self._nodes_read:
            raise UnsupportedError(f"inode {self._inode.number} uses block {number} twice")
        self._nodes_read.add(number)
        if len(self._nodes_read) > NODES_ALWAYS + self._sb.blocks // NODES_SHARE:
            raise UnsupportedError(
                f"inode {self._inode.number} has too many blocks that lead to others"
            )

    def _find_pointer(self, logical: int) -> int | None:
        self._has_bad_pointers = False
        pointers = _POINTERS.unpack(self._inode.block_map)
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
        self._raise_if_cache_decides()
        return number or None

    def _raise_if_cache_decides(self) -> None:
        """Raise UnsupportedError if an indirect block that was read holds an impossible pointer.

        The kernel fails when it reads such a block, but not where it has it in its cache.
        """
        if self._has_bad_pointers:
            raise UnsupportedError(
                f"inode {self._inode.number} has a block of pointers that are not all possible"
            )

    def _pointer_block(self, number: int) -> tuple[int, ...]:
        if not 0 < number < self._sb.blocks:
            raise self._corrupt("a block is outside the disk")
        found = struct.unpack(f"<{self._fan}I", self._read_block(number))
        self._has_bad_pointers |= not all(self._is_valid(one, 1) for one in {number, *found} - {0})
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
