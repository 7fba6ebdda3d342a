"""Blocks of directories: entries with names, and what else stands in one.

Source: "ext4 Disk Layout", section Directory Entries, and the behaviour of Linux 6.1. A name is
looked for as the kernel does it: entry after entry, until a length of zero, and only the entry that
matches is looked at closely. `parse` lists all names of a directory instead, whatever index leads
to them or does not; which of them a kernel finds is told by `lookup`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nbdproxy.oracles.ext4 import casefold
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import UnsupportedError
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.superblock import Superblock

ENTRY = struct.Struct("<IHBB")  # inode, record length, name length, file type
TAIL = struct.Struct("<IHBBI")  # inode 0, record length 12, name length 0, type 0xDE, checksum
TAIL_HEAD = (0, 12, 0, 0xDE)
ENTRY_MIN = 12
BROKEN = -1
"""Stands for the number of an entry that the kernel refuses when it finds it."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a search in one block finds: the first entry of each name, as names are compared.

    `is_sound` is false if a search that finds nothing is an error. `doubtful` holds what names of
    other entries might be compared as.
    """

    numbers: dict[bytes, int]
    is_sound: bool
    doubtful: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Directory:
    """The names of a directory; `is_complete` is false if a part of it cannot be read.

    `is_plain` is false if a name stands there twice.
    """

    names: dict[bytes, int]
    is_complete: bool
    is_plain: bool = True


def search(sb: Superblock, block: bytes, *, is_folded: bool) -> Leaf:
    """Return what a search in a block comes to."""
    numbers: dict[bytes, int] = {}
    doubtful: set[bytes] = set()
    at, size = 0, len(block)
    unpack = ENTRY.unpack_from
    wide = size == 65536
    while at < size - ENTRY.size:
        number, length, name_length, _ = unpack(block, at)
        if wide:
            length = record_length(length, size)
        end = at + ENTRY.size + name_length
        if number and end <= size:
            name = key = block[at + ENTRY.size : end]
            if is_folded:
                key, is_certain, _ = casefold.fold(name)
                if not is_certain:
                    doubtful |= {name, key}
            if key not in numbers:
                is_right = _is_right(sb, size - at, number, length, name)
                numbers[key] = number if is_right else BROKEN
        if not length:
            return Leaf(numbers, is_sound=False, doubtful=frozenset(doubtful))
        at += length
    return Leaf(numbers, is_sound=True, doubtful=frozenset(doubtful))


def record_length(length: int, size: int) -> int:
    """Return the length that an entry's 16 bits stand for in a block of `size` bytes."""
    if size != 65536:
        return length
    return size if length in {0, 0xFFFF} else length & 0xFFFC | (length & 3) << 16


def checksum_is_right(inode: Inode, block: bytes) -> bool:
    """Tell whether a block with entries ends in its checksum."""
    *head, found = TAIL.unpack_from(block, len(block) - TAIL.size)
    if tuple(head) != TAIL_HEAD:
        return False
    return bool(found == crc32c(inode.seed, block[: -TAIL.size]))


def is_inner(sb: Superblock, inode: Inode, index: int, block: bytes) -> bool:
    """Tell whether a block belongs to the index, as far as that can be seen."""
    if not (inode.flags & InodeFlag.INDEX and sb.has_index):
        return False
    number, length, *_ = ENTRY.unpack_from(block)
    return index == 0 or (number == 0 and record_length(length, len(block)) == len(block))


def parse(sb: Superblock, inode: Inode, blocks: Iterable[tuple[int, bytes]]) -> Directory:
    """List a directory from the blocks of its file, each with its place in it.

    Raises UnsupportedError for more names than any disk of its size has files.
    """
    names: dict[bytes, int] = {}
    is_complete = is_plain = True
    for index, block in blocks:
        found = list(_entries(sb, block))
        sound = bool(found) and found[-1] is not None
        if sound and sb.has_checksums and not is_inner(sb, inode, index, block):
            sound = checksum_is_right(inode, block)
        if not sound:
            is_complete = False
            continue
        for entry in found:
            if entry is not None and entry[1]:
                is_plain &= entry[0] not in names
                names[entry[0]] = entry[1]
        if len(names) > sb.names_max:
            raise UnsupportedError(f"inode {inode.number} has more names than are read here")
    return Directory(_without_dots(names), is_complete, is_plain)


def parse_inline(sb: Superblock, parts: Iterable[bytes]) -> Directory:
    """List a directory that lives in its inode; such a part has no checksum of its own."""
    names: dict[bytes, int] = {}
    is_complete = is_plain = True
    for part in parts:
        found = list(_entries(sb, part))
        is_complete &= not found or found[-1] is not None
        for entry in found:
            if entry is not None and entry[1]:
                is_plain &= entry[0] not in names
                names[entry[0]] = entry[1]
    return Directory(_without_dots(names), is_complete, is_plain)


def _entries(sb: Superblock, block: bytes) -> Iterator[tuple[bytes, int] | None]:
    """Yield name and inode number of each entry; None ends a block that makes no sense."""
    at, size = 0, len(block)
    while at < size:
        if at + ENTRY.size > size:
            yield None
            return
        number, length, name_length, _ = ENTRY.unpack_from(block, at)
        length = record_length(length, size)
        name = block[at + ENTRY.size : at + ENTRY.size + name_length]
        if not _is_right(sb, size - at, number, length, name):
            yield None
            return
        yield name, number
        at += length


def _is_right(sb: Superblock, room: int, number: int, length: int, name: bytes) -> bool:
    """Tell whether the kernel takes an entry for one; `room` is what is left of the block."""
    return (
        length >= ENTRY_MIN
        and length % 4 == 0
        and length >= ENTRY.size + len(name)
        and (length == room or length <= room - ENTRY_MIN)
        and number <= sb.inodes
        and not (length == room and name == b".")
    )


def _without_dots(names: dict[bytes, int]) -> dict[bytes, int]:
    return {name: number for name, number in names.items() if name not in {b".", b".."}}
