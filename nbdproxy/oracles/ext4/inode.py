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
from nbdproxy.oracles.ext4.superblock import Superblock

XATTR_MAGIC = 0xEA020000
XATTR_SYSTEM = 7  # the name index of the "system." attributes
XATTR_ENTRY = struct.Struct("<BBHIII")  # name length, index, value offset, inode, size, hash
BLOCK_MAP = slice(0x28, 0x64)


class InodeFlag(IntEnum):
    """The flags that change how an inode is read; plain numbers, as masking those is faster."""

    ENCRYPT = 0x800
    INDEX = 0x1000
    EXTENTS = 0x80000
    VERITY = 0x100000
    INLINE_DATA = 0x10000000


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode; `raw` is all of it, `seed` starts the checksums of the blocks it owns."""

    number: int
    mode: int
    size: int
    flags: int
    seed: int
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
    return Inode(number=number, mode=mode, size=size, flags=flags, seed=seed, raw=raw)


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
