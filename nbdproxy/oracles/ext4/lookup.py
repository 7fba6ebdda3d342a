"""Looks names up in a directory as Linux 6.1 does.

A directory with an index (htree) is searched through it: the hash of the name leads to one leaf
block, and if the next leaf begins with the same hash, to that one too. Other blocks are not read.
Without an index, and where the index is invalid, the kernel searches all blocks one after the
other, beginning with the block of its last success in this directory. So beside a block that ends
the search with an error, the result depends on earlier lookups, and is an UnsupportedError here.

Source: "ext4 Disk Layout", sections Linear Directories and Hash Tree Directories; Linux'
fs/ext4/namei.c (6.1). Not covered: encrypted directories.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from nbdproxy.oracles.ext4 import casefold, directory, inode
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.directory import BROKEN, ENTRY, BlockSearch
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.hashes import HashVersion, name_hash
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.mapping import BlockTree, ReadBlock
from nbdproxy.oracles.ext4.superblock import Incompat, Superblock
from nbdproxy.oracles.structs import Field, StructLayout

NAME_MAX = 255


class IndexRoot(NamedTuple):
    """struct dx_root_info, behind the entries "." and ".." of the index's first block."""

    reserved_zero: Annotated[int, Field(24, "I")]
    hash_version: Annotated[int, Field(28, "B")]
    info_length: Annotated[int, Field(29, "B")]
    indirect_levels: Annotated[int, Field(30, "B")]
    unused_flags: Annotated[int, Field(31, "B")]


class CountLimit(NamedTuple):
    """struct dx_countlimit, in place of an index block's first hash; its `count` is `used`."""

    limit: Annotated[int, Field(0, "H")]
    used: Annotated[int, Field(2, "H")]


class IndexTail(NamedTuple):
    """struct dx_tail, behind the last entry that an index block has room for."""

    reserved: Annotated[int, Field(0, "I")]
    checksum: Annotated[int, Field(4, "I")]


ROOT = StructLayout(IndexRoot, "<")
COUNT_LIMIT = StructLayout(CountLimit, "<")
TAIL = StructLayout(IndexTail, "<")
ROOT_INFO = ROOT.offset("reserved_zero")
ROOT_INFO_SIZE = ROOT.size - ROOT_INFO
ENTRY_SIZE = 8  # struct dx_entry: hash and block
NODE_ENTRIES = 8  # behind an entry without a name that fills the block
BLOCK_MASK = 0x0FFFFFFF
READ_AHEAD = 8  # so many blocks at once are looked for, before the first of them is searched
CACHED_BYTES_MAX = 16 << 20
"""Bytes of blocks whose parsed entries are cached."""
CHAIN_MAX = 16
"""Leaf blocks that are searched for one name. More are only needed where hundreds of names have one
hash, which no names have that were not chosen for it."""
_AMBIGUOUS = -2
_HASHED = {HashVersion.LEGACY, HashVersion.HALF_MD4, HashVersion.TEA}


class _BadIndexError(Exception):
    """The index is invalid in a way that makes the kernel search all blocks."""


class IndexNode(NamedTuple):
    """A block of an index; `words` are the hashes and blocks of its entries, alternating."""

    raw: bytes
    limit: int
    used: int
    words: tuple[int, ...]

    def hash(self, at: int) -> int:
        """Return the least hash that an entry leads to."""
        return self.words[2 * at]

    def block(self, at: int) -> int:
        """Return the block of the directory that an entry leads to."""
        return self.words[2 * at + 1] & BLOCK_MASK


@dataclass(slots=True)
class _Frame:
    node: IndexNode
    at: int


class CachedBlock(NamedTuple):
    """A parsed block; `verified` tells that its checksum is right, or that there are none."""

    raw: bytes
    seed: int
    leaf: BlockSearch
    verified: bool


ParsedBlocks = dict[int, CachedBlock]
"""By block of the disk; an entry counts only for the same content and seed."""


class LinearSearch(NamedTuple):
    """The search of all blocks of a directory, for all names at once.

    numbers    by name, the inode, BROKEN, or _AMBIGUOUS if blocks differ in it
    doubtful   names that may match an entry, as they are folded
    is_broken  whether a block ends the search of a name that is not in it with an error
    is_single  whether there is at most one block
    """

    numbers: dict[bytes, int]
    doubtful: frozenset[bytes]
    is_broken: bool
    is_single: bool


class DirectoryLookup:
    """The lookups in one directory; `shared` are the disk's blocks that all names depend on."""

    def __init__(
        self,
        sb: Superblock,
        node: Inode,
        read_block: ReadBlock,
        tree: Callable[[Inode, ReadBlock], BlockTree],
        parsed: ParsedBlocks,
    ) -> None:
        if node.flags & InodeFlag.ENCRYPT:
            raise UnsupportedError(f"inode {node.number} is encrypted; it needs its key")
        self.shared: set[int] = set()
        self._sb = sb
        self._node = node
        self._read_block = read_block
        self._tree = tree(node, self._read_shared)
        self._parsed = parsed
        self._is_folded = bool(node.flags & InodeFlag.CASEFOLD and sb.incompat & Incompat.CASEFOLD)
        self._physical: dict[int, int | None] = {}
        self._nodes: dict[int, IndexNode] = {}
        self._linear: LinearSearch | CorruptError | UnsupportedError | None = None

    def find(self, name: bytes) -> int | None:
        """Return the number of the inode under a name; None if none is.

        Raises CorruptError where the kernel answers with an error, UnsupportedError where its
        answer cannot be told.
        """
        if len(name) > NAME_MAX:
            return None
        folded = name
        if self._is_folded:
            known = casefold.fold(name)
            if not known.is_certain or not (known.is_valid or not self._sb.has_strict_names):
                raise self._unsupported("how its names are compared is not certain")
            folded = known.name
        if self._node.flags & InodeFlag.INLINE_DATA:
            return self._inline(folded)
        if self._node.flags & InodeFlag.INDEX and self._sb.has_index:
            try:
                found = self._indexed(folded)
                # Newer kernels than 6.1 search all blocks then, where names are folded.
                if found is None and self._is_folded and self._search_all(folded) is not None:
                    raise self._unsupported("its index does not lead to all of its names")
                return found
            except CorruptError:
                if self._is_folded:
                    raise self._unsupported(
                        "kernels differ in what they do about its index"
                    ) from None
                raise
            except _BadIndexError:
                if self._sb.has_checksums:
                    # Then the kernel takes blocks of the index as verified that it never verified.
                    raise self._unsupported(
                        "its index makes no sense, with right checksums"
                    ) from None
        return self._search_all(folded)

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"inode {self._node.number}, a directory, is broken: {what}")

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"inode {self._node.number}, a directory, cannot be told: {what}")

    def _read_shared(self, number: int) -> bytes:
        self.shared.add(number)
        return self._read_block(number)

    # One block after the other.

    def _inline(self, name: bytes) -> int | None:
        first, second = inode.inline_parts(self._node)
        for part in (first[4:], second):  # 4 bytes name the parent
            leaf = directory.search(self._sb, part, is_folded=self._is_folded)
            number = self._number_in_block(leaf, name)
            if number == BROKEN:
                raise self._corrupt("an entry of it makes no sense")
            if number is not None:
                return number
        return None

    def _search_all(self, name: bytes) -> int | None:
        found = self._searched()
        if name in found.doubtful:
            raise self._unsupported("how its names are compared is not certain")
        number = found.numbers.get(name)
        if number is None:
            if found.is_broken:
                raise self._corrupt("a block of it makes no sense")
            return None
        if number == _AMBIGUOUS or (found.is_broken and not found.is_single and number != BROKEN):
            raise self._unsupported(
                "which block is searched first depends on what was asked before"
            )
        if number == BROKEN:
            raise self._corrupt("an entry of it makes no sense")
        return number

    def _searched(self) -> LinearSearch:
        """Return the search of all blocks, or raise its error; made once."""
        if self._linear is None:
            try:
                self._linear = self._all()
            except (CorruptError, UnsupportedError) as error:
                self._linear = error
        if isinstance(self._linear, LinearSearch):
            return self._linear
        raise type(self._linear)(str(self._linear))

    def _all(self) -> LinearSearch:
        numbers: dict[bytes, int] = {}
        doubtful: set[bytes] = set()
        is_broken = False
        count = self._node.size // self._sb.block_size
        try:
            runs = self._tree.runs()
        except CorruptError:
            if count > READ_AHEAD:
                raise self._unsupported("some of its blocks are not found") from None
            raise
        places = [
            (run.logical + i, run.physical + i)
            for run in runs
            for i in range(min(run.blocks, count - run.logical))
        ]
        for logical, physical in places:
            raw = self._read_shared(physical)
            parsed = self._parsed_block(physical, raw)
            is_leaf = not directory.is_inner(self._sb, self._node, logical, raw)
            if is_leaf and not parsed.verified:
                is_broken = True
                continue
            is_broken |= not parsed.leaf.is_sound
            doubtful |= parsed.leaf.doubtful
            for name, number in parsed.leaf.numbers.items():
                if numbers.setdefault(name, number) != number:
                    numbers[name] = _AMBIGUOUS
            if len(numbers) > self._sb.names_max:
                raise self._unsupported("it has more names than are read here")
        return LinearSearch(numbers, frozenset(doubtful), is_broken, len(places) <= 1)

    def _number_in_block(self, leaf: BlockSearch, name: bytes) -> int | None:
        """Return a name's inode by one block's search: None if it has none, BROKEN for an error."""
        if name in leaf.doubtful:
            raise self._unsupported("how its names are compared is not certain")
        number = leaf.numbers.get(name)
        return BROKEN if number is None and not leaf.is_sound else number

    def _parsed_block(self, physical: int, raw: bytes) -> CachedBlock:
        known = self._parsed.get(physical)
        if (
            known is None
            or (known.raw is not raw and known.raw != raw)
            or known.seed != self._node.seed
        ):
            leaf = directory.search(self._sb, raw, is_folded=self._is_folded)
            verified = not self._sb.has_checksums or directory.checksum_is_valid(self._node, raw)
            if len(self._parsed) * len(raw) >= CACHED_BYTES_MAX:
                self._parsed.clear()
            known = self._parsed[physical] = CachedBlock(raw, self._node.seed, leaf, verified)
        return known

    # Through the index.

    def _indexed(self, name: bytes) -> int | None:
        frames, wanted = self._probe(name)
        for _ in range(CHAIN_MAX):
            top = frames[-1]
            number = self._number_in_block(self._search_block(top.node.block(top.at)), name)
            if number == BROKEN:
                raise _BadIndexError
            if number is not None:
                return number
            if not self._next_leaf(frames, wanted):
                return None
        raise self._unsupported(
            "too many of its names have one hash, or its index leads in a circle"
        )

    def _probe(self, name: bytes) -> tuple[list[_Frame], int]:
        """Descend the index by the name's hash; return its nodes from the root on, and the hash."""
        sb = self._sb
        raw = self._index_block(0)
        root = ROOT.unpack_from(raw)
        if root.hash_version not in _HASHED:
            raise _BadIndexError
        is_unsigned = sb.has_unsigned_hash
        wanted = name_hash(root.hash_version, name, sb.hash_seed, is_unsigned=is_unsigned)
        levels = root.indirect_levels
        if root.unused_flags & 1 or levels >= (3 if sb.incompat & Incompat.LARGEDIR else 2):
            raise _BadIndexError
        tail = TAIL.size if sb.has_checksums else 0
        start = ROOT_INFO + root.info_length
        node = self._entries(0, raw, start, (sb.block_size - start - tail) // ENTRY_SIZE)
        blocks = [0]
        frames: list[_Frame] = []
        while True:
            if not 0 < node.used <= node.limit:
                raise _BadIndexError
            frame = _Frame(node, _binary_search(node, wanted))
            frames.append(frame)
            block = node.block(frame.at)
            if block in blocks:
                raise _BadIndexError
            if len(frames) > levels:
                return frames, wanted
            blocks.append(block)
            raw = self._index_block(block)
            limit = (sb.block_size - NODE_ENTRIES - tail) // ENTRY_SIZE
            node = self._entries(block, raw, NODE_ENTRIES, limit)

    def _next_leaf(self, frames: list[_Frame], wanted: int) -> bool:
        """Advance to the next leaf block, if that begins with the same hash."""
        level = len(frames) - 1
        while True:
            frame = frames[level]
            frame.at += 1
            if frame.at < frame.node.used:
                if 2 * frame.at >= len(frame.node.words):
                    raise self._unsupported("its index leads out of itself")
                break
            if not level:
                return False
            level -= 1
        if frame.node.hash(frame.at) & ~1 != wanted:
            return False
        for below in range(level + 1, len(frames)):
            above = frames[below - 1]
            block = above.node.block(above.at)
            node = self._entries(block, self._index_block(block), NODE_ENTRIES, None)
            frames[below] = _Frame(node, 0)
        return True

    def _entries(self, block: int, raw: bytes, start: int, limit: int | None) -> IndexNode:
        known = self._nodes.get(block)
        if known is None or known.raw is not raw:
            head = COUNT_LIMIT.unpack_from(raw, start)
            words = struct.unpack_from(f"<{(len(raw) - start) // ENTRY_SIZE * 2}I", raw, start)
            known = self._nodes[block] = IndexNode(raw, head.limit, head.used, words)
        if limit is not None and known.limit != limit:
            raise _BadIndexError
        return known

    def _index_block(self, logical: int) -> bytes:
        raw = self._read(logical)
        known = self._nodes.get(logical)
        if known is not None and known.raw is raw:
            return raw  # validated before
        length = ENTRY.unpack_from(raw).rec_len
        if logical and directory.record_length(length, len(raw)) != len(raw):
            raise self._corrupt("its index leads to a block that is not of it")
        if self._sb.has_checksums and not self._index_checksum_is_valid(raw):
            raise self._corrupt("the checksum of its index is wrong")
        return raw

    def _search_block(self, logical: int) -> BlockSearch:
        raw = self._read(logical)
        parsed = self._parsed_block(self._physical[logical] or 0, raw)
        length = directory.record_length(ENTRY.unpack_from(raw).rec_len, len(raw))
        # A block that may be one of the index is not verified: its checksum is in another place.
        if not parsed.verified and logical and length != len(raw):
            raise self._corrupt("the checksum of a block is wrong")
        return parsed.leaf

    def _read(self, logical: int) -> bytes:
        if logical >= self._node.size // self._sb.block_size:
            raise self._corrupt("its index leads behind its end")
        if logical not in self._physical:
            self._physical[logical] = self._tree.find(logical)
        physical = self._physical[logical]
        if physical is None:
            raise self._corrupt("its index leads to a hole")
        return self._read_block(physical)

    def _index_checksum_is_valid(self, raw: bytes) -> bool:
        size = len(raw)
        length = directory.record_length(ENTRY.unpack_from(raw).rec_len, size)
        if length == size:
            start = NODE_ENTRIES
        elif length == directory.ENTRY_MIN:
            second = directory.record_length(ENTRY.unpack_from(raw, length).rec_len, size)
            root = ROOT.unpack_from(raw)
            is_plain = not root.reserved_zero and root.info_length == ROOT_INFO_SIZE
            if second != size - length or not is_plain:
                return False
            start = ROOT.size
        else:
            return False
        head = COUNT_LIMIT.unpack_from(raw, start)
        at, end = (start + ENTRY_SIZE * number for number in (head.limit, head.used))
        if at + TAIL.size > size:
            return False
        tail = TAIL.unpack_from(raw, at)
        covered = raw[start:end] if end <= size else b""
        value = crc32c(self._node.seed, raw[:start] + covered)
        value = crc32c(value, TAIL.struct.pack(tail.reserved, 0))
        return value == tail.checksum


def _binary_search(node: IndexNode, wanted: int) -> int:
    """Return the last entry whose hash is not above `wanted`; the kernel's search in dx_probe."""
    low, high = 1, node.used - 1
    while low <= high:
        middle = low + (high - low) // 2
        if node.words[2 * middle] > wanted:
            high = middle - 1
        else:
            low = middle + 1
    return low - 1
