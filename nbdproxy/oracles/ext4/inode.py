"""Inodes: type, size, flags and block map of a file, and content that is kept in the inode.

Source: "ext4 Disk Layout", sections Index Nodes, Inline Data and Extended Attributes; struct
ext4_inode in Linux' fs/ext4/ext4.h, struct ext4_xattr_entry in fs/ext4/xattr.h.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, NamedTuple

from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError
from nbdproxy.oracles.ext4.superblock import Incompat, RoCompat, Superblock
from nbdproxy.oracles.structs import Field, StructLayout

XATTR_MAGIC = 0xEA020000
XATTR_SYSTEM = 7  # the name index of the "system." attributes
OLD_SIZE = 128
"""Bytes of an inode without the fields of `RawInodeExtra`."""


class RawInode(NamedTuple):
    """struct ext4_inode, the fields that are used; its first 128 bytes."""

    mode: Annotated[int, Field(0x0, "H")]
    size_lo: Annotated[int, Field(0x4, "I")]
    mtime: Annotated[int, Field(0x10, "i")]
    links_count: Annotated[int, Field(0x1A, "H")]
    blocks_lo: Annotated[int, Field(0x1C, "I")]
    flags: Annotated[int, Field(0x20, "I")]
    block: Annotated[bytes, Field(0x28, "60s")]
    generation: Annotated[int, Field(0x64, "I")]
    file_acl_lo: Annotated[int, Field(0x68, "I")]
    size_high: Annotated[int, Field(0x6C, "I")]
    blocks_high: Annotated[int, Field(0x74, "H")]
    file_acl_high: Annotated[int, Field(0x76, "H")]
    checksum_lo: Annotated[int, Field(0x7C, "H")]


class RawInodeExtra(NamedTuple):
    """struct ext4_inode, the fields that are used of inodes with more than 128 bytes.

    `extra_isize` says how many bytes of them there are.
    """

    extra_isize: Annotated[int, Field(0x80, "H")]
    checksum_hi: Annotated[int, Field(0x82, "H")]
    mtime_extra: Annotated[int, Field(0x88, "I")]


class RawXattrEntry(NamedTuple):
    """struct ext4_xattr_entry, without the name behind it."""

    name_len: Annotated[int, Field(0, "B")]
    name_index: Annotated[int, Field(1, "B")]
    value_offs: Annotated[int, Field(2, "H")]
    value_inum: Annotated[int, Field(4, "I")]
    value_size: Annotated[int, Field(8, "I")]
    hash: Annotated[int, Field(12, "I")]


INODE = StructLayout(RawInode, "<", OLD_SIZE)
INODE_EXTRA = StructLayout(RawInodeExtra, "<")
XATTR_ENTRY = StructLayout(RawXattrEntry, "<")
BLOCK_MAP = INODE.span("block")


class InodeFlag(IntEnum):
    """The flags that change how an inode is read; plain numbers, as masking those is faster."""

    IMMUTABLE = 0x10
    APPEND = 0x20
    ENCRYPT = 0x800
    INDEX = 0x1000
    HUGE_FILE = 0x40000
    EXTENTS = 0x80000
    VERITY = 0x100000
    EA_INODE = 0x200000
    INLINE_DATA = 0x10000000
    CASEFOLD = 0x40000000


_NO_EXTRA = RawInodeExtra(extra_isize=0, checksum_hi=0, mtime_extra=0)
_XATTR_MAGIC = struct.Struct("<I")
_INODE_SEED = struct.Struct("<II")  # an inode's number and generation
_WITH_CONTENT = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
_KINDS = {*_WITH_CONTENT, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}
_RARE = (
    InodeFlag.INDEX
    | InodeFlag.INLINE_DATA
    | InodeFlag.CASEFOLD
    | InodeFlag.EA_INODE
    | InodeFlag.IMMUTABLE
    | InodeFlag.APPEND
)


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode; `raw` is all of it, `seed` starts the checksums of the blocks it owns."""

    number: int
    mode: int
    size: int
    flags: int
    seed: int
    is_fast: bool
    raw: bytes

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def has_block_map(self) -> bool:
        """Whether the block map says where content is, and is no content itself."""
        return stat.S_IFMT(self.mode) in _WITH_CONTENT and not (
            self.flags & InodeFlag.INLINE_DATA or self.is_fast_symlink
        )

    @property
    def is_fast_symlink(self) -> bool:
        """Whether it is a symbolic link that is kept in the block map."""
        return self.is_symlink and self.is_fast

    @property
    def mtime_ns(self) -> int:
        """When the content was changed last, in nanoseconds since 1970."""
        seconds = INODE.unpack_from(self.raw).mtime
        if _extra_size(self.raw) < INODE_EXTRA.size - OLD_SIZE:
            return seconds * 10**9
        extra = INODE_EXTRA.unpack_from(self.raw).mtime_extra
        return (seconds + ((extra & 3) << 32)) * 10**9 + (extra >> 2)

    @property
    def block_map(self) -> bytes:
        """The 60 bytes that hold the extent tree's root, block numbers, or the content itself."""
        return self.raw[BLOCK_MAP]


def parse(sb: Superblock, number: int, raw: bytes) -> Inode:
    """Read one inode; raises CorruptError where the kernel's lookup fails with an error."""
    fields = INODE.unpack_from(raw)
    upper = INODE_EXTRA.unpack_from(raw) if len(raw) > OLD_SIZE else _NO_EXTRA
    seed = crc32c(sb.seed, _INODE_SEED.pack(number, fields.generation))
    if OLD_SIZE + upper.extra_isize > len(raw) or upper.extra_isize % 4:
        raise CorruptError(f"inode {number} is broken: its extra size is impossible")
    if sb.has_checksums and not _is_sound(raw, fields, upper, seed):
        raise CorruptError(f"inode {number} is broken: its checksum is wrong")
    if fields.links_count == 0 or fields.mode == 0:
        raise CorruptError(f"inode {number} is referred to but deleted")
    size = fields.size_lo | fields.size_high << 32
    if size >= 1 << 63:
        raise CorruptError(f"inode {number} is broken: its size is impossible")
    if (what := _contradiction(sb, fields.mode, fields.flags)) is not None:
        raise CorruptError(f"inode {number} is broken: {what}")
    return Inode(
        number=number,
        mode=fields.mode,
        size=size,
        flags=fields.flags,
        seed=seed,
        is_fast=not fields.flags & InodeFlag.INLINE_DATA and _is_fast(sb, size, fields),
        raw=raw,
    )


def inline_parts(inode: Inode) -> tuple[bytes, bytes]:
    """Return the content kept in the inode itself: in the block map, and in "system.data"."""
    start = OLD_SIZE + _extra_size(inode.raw)
    if _XATTR_MAGIC.unpack_from(inode.raw.ljust(start + 4, b"\0"), start)[0] != XATTR_MAGIC:
        raise CorruptError(f"inode {inode.number} is broken: its inline data is missing")
    base = at = start + 4
    while at + XATTR_ENTRY.size <= len(inode.raw) and inode.raw[at : at + 4] != bytes(4):
        entry = XATTR_ENTRY.unpack_from(inode.raw, at)
        end = at + XATTR_ENTRY.size + entry.name_len
        name = inode.raw[at + XATTR_ENTRY.size : end]
        if entry.name_index == XATTR_SYSTEM and name == b"data":
            value = base + entry.value_offs
            if entry.value_inum or value + entry.value_size > len(inode.raw):
                break
            return inode.block_map, inode.raw[value : value + entry.value_size]
        at += (end - at + 3) & ~3
    raise CorruptError(f"inode {inode.number} is broken: its inline data is missing")


def _contradiction(sb: Superblock, mode: int, flags: int) -> str | None:
    """Say which field the kernel refuses, alone or beside another one; None if it takes all."""
    if stat.S_IFMT(mode) not in _KINDS:
        return "its type is none"
    if not flags & _RARE:
        return None
    inline, fixed = InodeFlag.INLINE_DATA, InodeFlag.IMMUTABLE | InodeFlag.APPEND
    index_is_new = sb.has_checksums and not sb.has_index
    rules = (
        (flags & inline and flags & InodeFlag.EXTENTS, "its content is in two places"),
        (flags & InodeFlag.INDEX and index_is_new, "it has an index, and the filesystem none"),
        (flags & InodeFlag.CASEFOLD and not sb.incompat & Incompat.CASEFOLD, "it folds names"),
        (flags & InodeFlag.EA_INODE, "it is part of an attribute"),
        (stat.S_ISLNK(mode) and flags & fixed, "it is a symbolic link that must not change"),
    )
    return next((what for is_wrong, what in rules if is_wrong), None)


def _is_fast(sb: Superblock, size: int, fields: RawInode) -> bool:
    """Tell whether a symbolic link is kept in the block map: it has no blocks of its own then."""
    if sb.incompat & Incompat.EA_INODE:
        return 0 < size < len(fields.block)
    blocks, unit = fields.blocks_lo, 512
    if sb.ro_compat & RoCompat.HUGE_FILE:
        blocks |= fields.blocks_high << 32
        unit = sb.block_size if fields.flags & InodeFlag.HUGE_FILE else unit
    has_attributes = fields.file_acl_lo or (sb.incompat & Incompat.BITS_64 and fields.file_acl_high)
    return blocks * unit == (sb.cluster_size if has_attributes else 0)


def _extra_size(raw: bytes) -> int:
    return INODE_EXTRA.unpack_from(raw).extra_isize if len(raw) > OLD_SIZE else 0


def _is_sound(raw: bytes, fields: RawInode, upper: RawInodeExtra, seed: int) -> bool:
    """Tell whether the checksum is right; its upper half exists only in large inodes."""
    found, mask = fields.checksum_lo, 0xFFFF
    covered = INODE.zeroed(raw, "checksum_lo")
    if upper.extra_isize >= 4:
        found |= upper.checksum_hi << 16
        covered = INODE_EXTRA.zeroed(covered, "checksum_hi")
        mask = 0xFFFFFFFF
    return found == crc32c(seed, covered) & mask
