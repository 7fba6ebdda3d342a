"""Blocks of directories: entries with names, and the checksum at the end.

Source: "ext4 Disk Layout", section Directory Entries; struct ext4_dir_entry_2 and
ext4_dir_entry_tail in Linux' fs/ext4/ext4.h; and the behaviour of Linux 6.1. `search` looks for
names as the kernel does: entry after entry, until a record length of zero, and only the entry that
matches is validated. `parse` lists all names of a directory without regard to its index; which of
them a kernel finds is told by `lookup`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from nbdproxy.oracles.ext4 import casefold
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import UnsupportedError
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.superblock import Superblock
from nbdproxy.oracles.structs import Field, StructLayout


class EntryHead(NamedTuple):
    """struct ext4_dir_entry_2, without the name behind it."""

    inode: Annotated[int, Field(0, "I")]
    rec_len: Annotated[int, Field(4, "H")]
    name_len: Annotated[int, Field(6, "B")]
    file_type: Annotated[int, Field(7, "B")]


class EntryTail(NamedTuple):
    """struct ext4_dir_entry_tail, which has the form of an entry without a name."""

    inode: Annotated[int, Field(0, "I")]
    rec_len: Annotated[int, Field(4, "H")]
    name_len: Annotated[int, Field(6, "B")]
    file_type: Annotated[int, Field(7, "B")]
    checksum: Annotated[int, Field(8, "I")]


ENTRY = StructLayout(EntryHead, "<")
TAIL = StructLayout(EntryTail, "<")
TAIL_HEAD = EntryHead(inode=0, rec_len=12, name_len=0, file_type=0xDE)
ENTRY_MIN = 12
BROKEN = -1
"""In place of the inode number of an entry that the kernel refuses when its name matches."""


@dataclass(frozen=True, slots=True)
class BlockSearch:
    """What the kernel's search of one block for a name gives, for all names at once.

    numbers   by the name, folded where the directory folds names, its first entry's inode or BROKEN
    is_sound  whether a search that does not find its name says so; else it is an error
    doubtful  names for which it is not certain whether they match an entry, as they are folded
    """

    numbers: dict[bytes, int]
    is_sound: bool
    doubtful: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Directory:
    """The names of a directory, with the numbers of their inodes.

    `is_complete` is false if some of its blocks cannot be read, `is_plain` if one name has several
    entries.
    """

    names: dict[bytes, int]
    is_complete: bool
    is_plain: bool = True


def search(sb: Superblock, block: bytes, *, is_folded: bool) -> BlockSearch:
    """Search a block, for all names that are in it at once."""
    numbers: dict[bytes, int] = {}
    doubtful: set[bytes] = set()
    at, size = 0, len(block)
    unpack = ENTRY.struct.unpack_from
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
                is_valid = _is_valid(sb, size - at, number, length, name)
                numbers[key] = number if is_valid else BROKEN
        if not length:
            return BlockSearch(numbers, is_sound=False, doubtful=frozenset(doubtful))
        at += length
    return BlockSearch(numbers, is_sound=True, doubtful=frozenset(doubtful))


def record_length(length: int, size: int) -> int:
    """Return the bytes of an entry by its `rec_len`, in a block of `size` bytes."""
    if size != 65536:
        return length
    return size if length in {0, 0xFFFF} else length & 0xFFFC | (length & 3) << 16


def checksum_is_valid(inode: Inode, block: bytes) -> bool:
    """Tell whether a block of entries ends in a tail with the right checksum."""
    tail = TAIL.unpack_from(block, len(block) - TAIL.size)
    if tail[:4] != TAIL_HEAD:
        return False
    return tail.checksum == crc32c(inode.seed, block[: -TAIL.size])


def is_inner(sb: Superblock, inode: Inode, index: int, block: bytes) -> bool:
    """Tell whether a block looks as a block of the index does, and so has no tail."""
    if not (inode.flags & InodeFlag.INDEX and sb.has_index):
        return False
    first = ENTRY.unpack_from(block)
    return index == 0 or (
        first.inode == 0 and record_length(first.rec_len, len(block)) == len(block)
    )


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
            sound = checksum_is_valid(inode, block)
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
    """List a directory that is kept in its inode, whose checksum covers it."""
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
    """Yield name and inode number of each entry; None, and no more, behind an invalid one."""
    at, size = 0, len(block)
    while at < size:
        if at + ENTRY.size > size:
            yield None
            return
        number, length, name_length, _ = ENTRY.struct.unpack_from(block, at)
        length = record_length(length, size)
        name = block[at + ENTRY.size : at + ENTRY.size + name_length]
        if not _is_valid(sb, size - at, number, length, name):
            yield None
            return
        yield name, number
        at += length


def _is_valid(sb: Superblock, room: int, number: int, length: int, name: bytes) -> bool:
    """Tell whether the kernel takes an entry as valid (__ext4_check_dir_entry).

    `room` is how many bytes of the block are left from its start on.
    """
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
