"""Inodes: the 128 or more bytes that say what a file is, how long, and where its content begins.

Source: "ext4 Disk Layout", sections Index Nodes, Inline Data, Extended Attributes.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from enum import IntEnum

from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError
from nbdproxy.oracles.ext4.superblock import Incompat, RoCompat, Superblock

XATTR_MAGIC = 0xEA020000
XATTR_SYSTEM = 7  # the name index of the "system." attributes
XATTR_ENTRY = struct.Struct("<BBHIII")  # name length, index, value offset, inode, size, hash
BLOCK_MAP = slice(0x28, 0x64)


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
        seconds = int.from_bytes(self.raw[0x10:0x14], "little", signed=True)
        if _extra_size(self.raw) < 12:
            return seconds * 10**9
        extra = int.from_bytes(self.raw[0x88:0x8C], "little")
        return (seconds + ((extra & 3) << 32)) * 10**9 + (extra >> 2)

    @property
    def block_map(self) -> bytes:
        """The 60 bytes that hold the extent tree's root, block numbers, or the content itself."""
        return self.raw[BLOCK_MAP]


def parse(sb: Superblock, number: int, raw: bytes) -> Inode:
    """Read one inode; raises CorruptError where the kernel's lookup fails with an error."""
    mode, _, size = struct.unpack_from("<HHI", raw)
    (links,) = struct.unpack_from("<H", raw, 0x1A)
    (flags,) = struct.unpack_from("<I", raw, 0x20)
    generation, _, size_high = struct.unpack_from("<III", raw, 0x64)
    seed = crc32c(crc32c(sb.seed, struct.pack("<I", number)), struct.pack("<I", generation))
    extra = _extra_size(raw)
    if 128 + extra > len(raw) or extra % 4:
        raise CorruptError(f"inode {number} is broken: its extra size is impossible")
    if sb.has_checksums and not _is_sound(raw, seed, extra):
        raise CorruptError(f"inode {number} is broken: its checksum is wrong")
    if links == 0 or mode == 0:
        raise CorruptError(f"inode {number} is referred to but deleted")
    size |= size_high << 32
    if size >= 1 << 63:
        raise CorruptError(f"inode {number} is broken: its size is impossible")
    if (what := _contradiction(sb, mode, flags)) is not None:
        raise CorruptError(f"inode {number} is broken: {what}")
    is_fast = not flags & InodeFlag.INLINE_DATA and _is_fast(sb, size, flags, raw)
    return Inode(
        number=number, mode=mode, size=size, flags=flags, seed=seed, is_fast=is_fast, raw=raw
    )


def inline_parts(inode: Inode) -> tuple[bytes, bytes]:
    """Return the content kept in the inode itself: in the block map, and in "system.data"."""
    start = 128 + _extra_size(inode.raw)
    if struct.unpack_from("<I", inode.raw.ljust(start + 4, b"\0"), start)[0] != XATTR_MAGIC:
        raise CorruptError(f"inode {inode.number} is broken: its inline data is missing")
    base = at = start + 4
    while at + XATTR_ENTRY.size <= len(inode.raw) and inode.raw[at : at + 4] != bytes(4):
        length, index, offset, holder, size, _ = XATTR_ENTRY.unpack_from(inode.raw, at)
        name = inode.raw[at + XATTR_ENTRY.size : at + XATTR_ENTRY.size + length]
        if index == XATTR_SYSTEM and name == b"data":
            if holder or base + offset + size > len(inode.raw):
                break
            return inode.block_map, inode.raw[base + offset : base + offset + size]
        at += (XATTR_ENTRY.size + length + 3) & ~3
    raise CorruptError(f"inode {inode.number} is broken: its inline data is missing")


def _contradiction(sb: Superblock, mode: int, flags: int) -> str | None:
    """Return what the kernel does not accept in an inode; None if it is as it may be."""
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


def _is_fast(sb: Superblock, size: int, flags: int, raw: bytes) -> bool:
    """Tell whether a symbolic link is kept in the block map: it has no blocks of its own then."""
    if sb.incompat & Incompat.EA_INODE:
        return 0 < size < BLOCK_MAP.stop - BLOCK_MAP.start
    (blocks,) = struct.unpack_from("<I", raw, 0x1C)
    unit = 512
    if sb.ro_compat & RoCompat.HUGE_FILE:
        blocks |= struct.unpack_from("<H", raw, 0x74)[0] << 32
        unit = sb.block_size if flags & InodeFlag.HUGE_FILE else unit
    has_attributes = raw[0x68:0x6C] != bytes(4) or (
        sb.incompat & Incompat.BITS_64 and raw[0x76:0x78] != bytes(2)
    )
    return bool(blocks * unit == (sb.cluster_size if has_attributes else 0))


def _extra_size(raw: bytes) -> int:
    if len(raw) < 132:
        return 0
    value: int = struct.unpack_from("<H", raw, 0x80)[0]
    return value


def _is_sound(raw: bytes, seed: int, extra: int) -> bool:
    # The checksum's two halves count as zero; the upper one exists only in large inodes.
    found: int = struct.unpack_from("<H", raw, 0x7C)[0]
    covered = raw[:0x7C] + b"\0\0" + raw[0x7E:]
    mask = 0xFFFF
    if extra >= 4:
        found |= struct.unpack_from("<H", raw, 0x82)[0] << 16
        covered = covered[:0x82] + b"\0\0" + covered[0x84:]
        mask = 0xFFFFFFFF
    return found == crc32c(seed, covered) & mask
