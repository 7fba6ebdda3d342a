"""Directories: names to inode numbers.

Source: "ext4 Disk Layout", section Directory Entries. Hash trees are read as what they are
underneath, a list of blocks with entries: index blocks look like blocks without names. So a name
is found here even if the index that should lead to it is wrong (no legal crash leaves that).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.superblock import Superblock

ENTRY = struct.Struct("<IHBB")  # inode, record length, name length, file type
TAIL = struct.Struct("<IHBBI")  # inode 0, record length 12, name length 0, type 0xDE, checksum
TAIL_HEAD = (0, 12, 0, 0xDE)


@dataclass(frozen=True, slots=True)
class Directory:
    """The names of a directory; `is_complete` is false if a part of it cannot be read.

    Names that stand in a sound part can be trusted either way; that a name is *absent* follows
    only from a complete directory.
    """

    names: dict[bytes, int]
    is_complete: bool


def parse(sb: Superblock, inode: Inode, blocks: Iterable[bytes]) -> Directory:
    """Read a directory from the blocks of its file."""
    names: dict[bytes, int] = {}
    is_complete = True
    for index, block in enumerate(blocks):
        found = list(_entries(block))
        sound = bool(found) and found[-1] is not None
        if sound and sb.has_checksums and not _is_index(sb, inode, index, block):
            sound = _checksum_is_right(inode, block)
        if not sound:
            is_complete = False
            continue
        names.update(entry for entry in found if entry is not None and entry[1])
    return Directory(_without_dots(names), is_complete)


def parse_inline(parts: Iterable[bytes]) -> Directory:
    """Read a directory that lives in its inode; such a part has no checksum of its own."""
    names: dict[bytes, int] = {}
    is_complete = True
    for part in parts:
        found = list(_entries(part))
        is_complete &= not found or found[-1] is not None
        names.update(entry for entry in found if entry is not None and entry[1])
    return Directory(_without_dots(names), is_complete)


def _entries(block: bytes) -> Iterator[tuple[bytes, int] | None]:
    """Yield name and inode number of each entry; None ends a block that makes no sense."""
    at = 0
    while at < len(block):
        if at + ENTRY.size > len(block):
            yield None
            return
        number, length, name_length, _ = ENTRY.unpack_from(block, at)
        if length in {0, 0xFFFF}:  # how 64 KiB blocks write their full length
            length = 65536 if len(block) == 65536 else 0
        if length < ENTRY.size + name_length or length % 4 or at + length > len(block):
            yield None
            return
        yield block[at + ENTRY.size : at + ENTRY.size + name_length], number
        at += length


def _is_index(sb: Superblock, inode: Inode, index: int, block: bytes) -> bool:
    """Tell whether a block belongs to the hash tree's index, which has another checksum."""
    if not inode.flags & InodeFlag.INDEX:
        return False
    number, length, *_ = ENTRY.unpack_from(block)
    return index == 0 or (number == 0 and length in {sb.block_size & 0xFFFF, 0xFFFF})


def _checksum_is_right(inode: Inode, block: bytes) -> bool:
    *head, found = TAIL.unpack_from(block, len(block) - TAIL.size)
    if tuple(head) != TAIL_HEAD:
        return False
    return bool(found == crc32c(inode.seed, block[: -TAIL.size]))


def _without_dots(names: dict[bytes, int]) -> dict[bytes, int]:
    return {name: number for name, number in names.items() if name not in {b".", b".."}}
