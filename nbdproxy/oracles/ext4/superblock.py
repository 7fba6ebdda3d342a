"""Superblock and group descriptors of ext2, ext3 and ext4.

Source: "ext4 Disk Layout", sections Super Block, Block Group Descriptors and Meta Block Groups;
struct ext4_super_block and struct ext4_group_desc in Linux' fs/ext4/ext4.h. A superblock that the
kernel would not mount raises `RefusedError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Annotated, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.ext4.checksum import ONES, crc32c
from nbdproxy.oracles.ext4.faults import NoFilesystemError, RefusedError, refusal
from nbdproxy.oracles.structs import Field, StructLayout
from nbdproxy.oracles.watched import RangeSet

OFFSET = 1024
LENGTH = 1024
MAGIC = 0xEF53
HAS_JOURNAL = 0x4
DIR_INDEX = 0x20
SPARSE_SUPER2 = 0x200
NAMES_ALWAYS, BYTES_PER_NAME = 100_000, 256
UNSIGNED_HASH = 0x2  # of `flags`: bytes of names count as unsigned in their hash
STRICT_ENCODING = 0x1  # of `encoding_flags`
UTF8_12_1 = 1  # the only value of `encoding`
BLOCK_UNINIT = 0x2  # of a descriptor's `flags`: the group's block bitmap was never written
SMALL_DESCRIPTOR = 32  # bytes of a descriptor without the feature 64bit
REVISION_0_INODE_SIZE, REVISION_0_FIRST_INODE = 128, 11


class RawSuperblock(NamedTuple):
    """struct ext4_super_block, the fields that are used."""

    inodes_count: Annotated[int, Field(0x0, "I")]
    blocks_count_lo: Annotated[int, Field(0x4, "I")]
    first_data_block: Annotated[int, Field(0x14, "I")]
    log_block_size: Annotated[int, Field(0x18, "I")]
    log_cluster_size: Annotated[int, Field(0x1C, "I")]
    blocks_per_group: Annotated[int, Field(0x20, "I")]
    inodes_per_group: Annotated[int, Field(0x28, "I")]
    magic: Annotated[int, Field(0x38, "H")]
    rev_level: Annotated[int, Field(0x4C, "I")]
    first_ino: Annotated[int, Field(0x54, "I")]
    inode_size: Annotated[int, Field(0x58, "H")]
    feature_compat: Annotated[int, Field(0x5C, "I")]
    feature_incompat: Annotated[int, Field(0x60, "I")]
    feature_ro_compat: Annotated[int, Field(0x64, "I")]
    uuid: Annotated[bytes, Field(0x68, "16s")]
    volume_name: Annotated[bytes, Field(0x78, "16s")]
    reserved_gdt_blocks: Annotated[int, Field(0xCE, "H")]
    journal_inum: Annotated[int, Field(0xE0, "I")]
    journal_dev: Annotated[int, Field(0xE4, "I")]
    hash_seed: Annotated[bytes, Field(0xEC, "16s")]
    desc_size: Annotated[int, Field(0xFE, "H")]
    first_meta_bg: Annotated[int, Field(0x104, "I")]
    blocks_count_hi: Annotated[int, Field(0x150, "I")]
    flags: Annotated[int, Field(0x160, "I")]
    mmp_block: Annotated[int, Field(0x168, "Q")]
    usr_quota_inum: Annotated[int, Field(0x240, "I")]
    grp_quota_inum: Annotated[int, Field(0x244, "I")]
    first_backup_bg: Annotated[int, Field(0x24C, "I")]
    last_backup_bg: Annotated[int, Field(0x250, "I")]
    prj_quota_inum: Annotated[int, Field(0x26C, "I")]
    checksum_seed: Annotated[int, Field(0x270, "I")]
    encoding: Annotated[int, Field(0x27C, "H")]
    encoding_flags: Annotated[int, Field(0x27E, "H")]
    orphan_file_inum: Annotated[int, Field(0x280, "I")]
    checksum: Annotated[int, Field(0x3FC, "I")]


class RawDescriptor(NamedTuple):
    """struct ext4_group_desc, the fields that are used; its first 32 bytes."""

    block_bitmap_lo: Annotated[int, Field(0x0, "I")]
    inode_bitmap_lo: Annotated[int, Field(0x4, "I")]
    inode_table_lo: Annotated[int, Field(0x8, "I")]
    flags: Annotated[int, Field(0x12, "H")]
    checksum: Annotated[int, Field(0x1E, "H")]


class RawDescriptorHigh(NamedTuple):
    """struct ext4_group_desc, the upper halves that a descriptor of 64 bytes has."""

    block_bitmap_hi: Annotated[int, Field(0x20, "I")]
    inode_bitmap_hi: Annotated[int, Field(0x24, "I")]
    inode_table_hi: Annotated[int, Field(0x28, "I")]


SUPERBLOCK = StructLayout(RawSuperblock, "<")
DESCRIPTOR = StructLayout(RawDescriptor, "<")
DESCRIPTOR_HIGH = StructLayout(RawDescriptorHigh, "<")


class Incompat(IntEnum):
    """Features without which the filesystem must not be touched."""

    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    BITS_64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class RoCompat(IntEnum):
    """Features without which the filesystem must not be written, as a mount with replay does."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    BTREE_DIR = 0x4
    HUGE_FILE = 0x8
    GDT_CSUM = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    READONLY = 0x1000
    PROJECT = 0x2000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


_EXT_ATTR = 0x8
_SET_IN_USE = (
    _EXT_ATTR,
    Incompat.RECOVER | Incompat.EA_INODE | Incompat.ENCRYPT,
    RoCompat.LARGE_FILE
    | RoCompat.HUGE_FILE
    | RoCompat.DIR_NLINK
    | RoCompat.EXTRA_ISIZE
    | RoCompat.VERITY
    | RoCompat.ORPHAN_PRESENT,
)
"""Features that a kernel sets or takes away while a filesystem is mounted, of the three kinds."""

KNOWN_INCOMPAT = sum(Incompat) & ~Incompat.JOURNAL_DEV
KNOWN_RO_COMPAT = sum(RoCompat)


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the reader needs of it, validated; lengths in blocks, sizes in bytes."""

    block_size: int
    blocks: int
    first_data_block: int
    blocks_per_group: int
    inodes: int
    inodes_per_group: int
    inode_size: int
    descriptor_size: int
    first_meta_bg: int
    reserved_descriptors: int
    backup_groups: tuple[int, int]
    compat: int
    incompat: int
    ro_compat: int
    journal_inode: int
    seed: int
    cluster_size: int
    first_inode: int
    quota_inodes: tuple[int, int, int]
    """Of users, groups and projects; 0 where there is none."""
    orphan_file: int
    mmp_block: int
    hash_seed: bytes
    has_unsigned_hash: bool
    has_strict_names: bool

    @property
    def has_index(self) -> bool:
        """Whether directories may have an index."""
        return bool(self.compat & DIR_INDEX)

    @property
    def own_block(self) -> int:
        """The block that the superblock is in."""
        return OFFSET // self.block_size

    @property
    def hidden_inodes(self) -> frozenset[int]:
        """The inodes that no name may lead to: quota files and the orphan file."""
        return frozenset((*self.quota_inodes, self.orphan_file))

    @property
    def has_checksums(self) -> bool:
        """Whether metadata carries CRC-32C checksums."""
        return bool(self.ro_compat & RoCompat.METADATA_CSUM)

    @property
    def names_max(self) -> int:
        """How many names are listed at most: a bound for forged directories.

        Each file takes an inode, and few have many names.
        """
        return NAMES_ALWAYS + self.blocks * self.block_size // BYTES_PER_NAME

    @property
    def needs_recovery(self) -> bool:
        """Whether the filesystem was not unmounted: the kernel replays the journal then."""
        return bool(self.incompat & Incompat.RECOVER)

    def is_like(self, other: Superblock) -> bool:
        """Whether both describe the same filesystem, but for what changes while it is mounted."""
        mine, its = ((sb.compat, sb.incompat, sb.ro_compat) for sb in (self, other))
        return replace(self, compat=0, incompat=0, ro_compat=0) == replace(
            other, compat=0, incompat=0, ro_compat=0
        ) and all((a ^ b) & ~may == 0 for a, b, may in zip(mine, its, _SET_IN_USE, strict=True))

    @property
    def groups(self) -> int:
        """The number of block groups."""
        return -(-(self.blocks - self.first_data_block) // self.blocks_per_group)


class GroupDescriptor(NamedTuple):
    """One block group: the numbers of its bitmaps' blocks and of its inode table's first one."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    flags: int


def has_magic(device: ReadableDevice) -> bool:
    """Tell whether an ext superblock may be at the start of `device`."""
    return (
        device.size >= OFFSET + LENGTH and SUPERBLOCK.read_field(device, OFFSET, "magic") == MAGIC
    )


def is_journal(device: ReadableDevice) -> bool:
    """Tell whether a device with an ext superblock is the external journal of a filesystem."""
    incompat = SUPERBLOCK.read_field(device, OFFSET, "feature_incompat")
    return bool(incompat & Incompat.JOURNAL_DEV)


def parse(device: ReadableDevice) -> Superblock:
    """Read and validate the primary superblock.

    Raises NoFilesystemError without a magic number, RefusedError for what no kernel would mount.
    """
    if not has_magic(device):
        raise NoFilesystemError("no filesystem found: there is no ext2, ext3 or ext4 superblock")
    block = device.pread(OFFSET, LENGTH)
    raw = SUPERBLOCK.unpack_from(block)
    if raw.rev_level == 0:
        raw = raw._replace(
            inode_size=REVISION_0_INODE_SIZE,
            first_ino=REVISION_0_FIRST_INODE,
            feature_compat=0,
            feature_incompat=0,
            feature_ro_compat=0,
        )
    incompat, ro_compat = raw.feature_incompat, raw.feature_ro_compat
    _check_features(raw)
    if ro_compat & RoCompat.METADATA_CSUM:
        covered = block[: SUPERBLOCK.offset("checksum")]
        _require(raw.checksum == crc32c(ONES, covered), "its checksum is wrong")
    blocks, descriptor_size = raw.blocks_count_lo, SMALL_DESCRIPTOR
    if incompat & Incompat.BITS_64:
        blocks |= raw.blocks_count_hi << 32
        descriptor_size = raw.desc_size
    block_size = _block_size(raw, descriptor_size)
    _require(raw.first_data_block < blocks, "its block count is impossible")
    _require(blocks * block_size <= device.size, "it is larger than the device it is on")
    result = Superblock(
        block_size=block_size,
        blocks=blocks,
        first_data_block=raw.first_data_block,
        blocks_per_group=raw.blocks_per_group,
        inodes=raw.inodes_count,
        inodes_per_group=raw.inodes_per_group,
        inode_size=raw.inode_size,
        descriptor_size=descriptor_size,
        first_meta_bg=raw.first_meta_bg,
        reserved_descriptors=raw.reserved_gdt_blocks,
        backup_groups=(raw.first_backup_bg, raw.last_backup_bg),
        compat=raw.feature_compat,
        incompat=incompat,
        ro_compat=ro_compat,
        journal_inode=raw.journal_inum,
        seed=_checksum_seed(raw),
        cluster_size=_cluster_size(raw, block_size),
        first_inode=raw.first_ino,
        quota_inodes=_quota_inodes(raw),
        orphan_file=raw.orphan_file_inum,
        mmp_block=raw.mmp_block,
        hash_seed=raw.hash_seed,
        has_unsigned_hash=bool(raw.flags & UNSIGNED_HASH),
        has_strict_names=bool(raw.encoding_flags & STRICT_ENCODING),
    )
    _require(
        raw.inodes_per_group > 0 and raw.inodes_count == raw.inodes_per_group * result.groups,
        "its inode count is impossible",
    )
    return result


def groups(device: ReadableDevice, sb: Superblock) -> tuple[list[int], RangeSet]:
    """Return the first block of each group's inode table, and the blocks that no file may have.

    Those are the blocks that mke2fs allocated, except for the journal's. Verifies the checksums of
    the descriptors.
    """
    tables, fixed = [], []
    length = -(-sb.inodes_per_group * sb.inode_size // sb.block_size)
    count = len(descriptor_blocks(sb))
    for group, descriptor in enumerate(descriptors(device, sb)):
        table = descriptor.inode_table
        if not sb.first_data_block <= table < sb.blocks:
            raise refusal(f"the inode table of group {group} is outside of it")
        tables.append(table)
        fixed.append((table, table + length))
        for block in (descriptor.block_bitmap, descriptor.inode_bitmap):
            fixed.append((block, block + 1))
        if has_backup(sb, group) and not sb.incompat & Incompat.META_BG:
            start = sb.first_data_block + group * sb.blocks_per_group
            fixed.append((start, start + 1 + count + sb.reserved_descriptors))
    if sb.incompat & Incompat.META_BG:
        fixed += [(block, block + 1) for block in descriptor_blocks(sb)]
    return tables, RangeSet(fixed)


def descriptor_blocks(sb: Superblock) -> list[int]:
    """Return the blocks that hold the group descriptors which are in use."""
    per_block = sb.block_size // sb.descriptor_size
    return [_descriptor_block(sb, i, per_block) for i in range(-(-sb.groups // per_block))]


def descriptors(device: ReadableDevice, sb: Superblock) -> Iterator[GroupDescriptor]:
    """Yield each group's descriptor; verifies their checksums."""
    per_block = sb.block_size // sb.descriptor_size
    for index, where in enumerate(descriptor_blocks(sb)):
        if where >= sb.blocks:
            raise refusal("its group descriptors are outside of it")
        block = device.pread(where * sb.block_size, sb.block_size)
        for slot in range(min(per_block, sb.groups - index * per_block)):
            raw = block[slot * sb.descriptor_size : (slot + 1) * sb.descriptor_size]
            group = index * per_block + slot
            if sb.has_checksums and not _descriptor_is_sound(sb, group, raw):
                raise refusal(f"the checksum of group {group} is wrong")
            yield _descriptor(raw)


def has_backup(sb: Superblock, group: int) -> bool:
    """Tell whether a group begins with a superblock, the first one or a copy."""
    if group == 0:
        return True
    if sb.compat & SPARSE_SUPER2:
        return group in sb.backup_groups
    if group == 1 or not sb.ro_compat & RoCompat.SPARSE_SUPER:
        return True
    return any(_is_power(group, base) for base in (3, 5, 7))


def _check_features(raw: RawSuperblock) -> None:
    incompat, ro_compat = raw.feature_incompat, raw.feature_ro_compat
    if incompat & Incompat.JOURNAL_DEV:
        raise NoFilesystemError("no filesystem found: this is an external ext4 journal")
    if incompat & ~KNOWN_INCOMPAT:
        raise RefusedError(
            f"the filesystem has features this reader does not know "
            f"(incompat {incompat & ~KNOWN_INCOMPAT:#x}); ask with --oracle kernel"
        )
    if ro_compat & ~KNOWN_RO_COMPAT:
        raise RefusedError(
            f"the filesystem has features this reader does not know "
            f"(ro_compat {ro_compat & ~KNOWN_RO_COMPAT:#x}); ask with --oracle kernel"
        )
    _require(
        not incompat & Incompat.CASEFOLD or raw.encoding == UTF8_12_1,
        "the encoding of its names is unknown",
    )


def _block_size(raw: RawSuperblock, descriptor_size: int) -> int:
    """Return the bytes of a block; raises RefusedError for sizes that do not fit together."""
    _require(raw.log_block_size <= 6, "its block size is impossible")
    block_size = 1024 << raw.log_block_size
    _require(raw.inode_size in {128 << n for n in range(10)}, "its inode size is impossible")
    _require(raw.inode_size <= block_size, "its inode size is impossible")
    _require(
        descriptor_size in {SMALL_DESCRIPTOR << n for n in range(6)},
        "its descriptor size is impossible",
    )
    _require(0 < raw.blocks_per_group <= 8 * block_size * (1 << 20), "its groups are impossible")
    return block_size


def _checksum_seed(raw: RawSuperblock) -> int:
    if raw.feature_incompat & Incompat.CSUM_SEED:
        return raw.checksum_seed
    return crc32c(ONES, raw.uuid)


def _cluster_size(raw: RawSuperblock, block_size: int) -> int:
    if not raw.feature_ro_compat & RoCompat.BIGALLOC:
        return block_size
    log_size = raw.log_cluster_size
    _require(log_size <= 20 and 1024 << log_size >= block_size, "its cluster size is impossible")
    return 1024 << log_size


def _quota_inodes(raw: RawSuperblock) -> tuple[int, int, int]:
    if not raw.feature_ro_compat & RoCompat.QUOTA:
        return (0, 0, 0)
    return raw.usr_quota_inum, raw.grp_quota_inum, raw.prj_quota_inum


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise refusal(what)


def _descriptor(raw: bytes) -> GroupDescriptor:
    low = DESCRIPTOR.unpack_from(raw)
    blocks = [low.block_bitmap_lo, low.inode_bitmap_lo, low.inode_table_lo]
    if len(raw) > SMALL_DESCRIPTOR:
        upper = DESCRIPTOR_HIGH.unpack_from(raw)
        blocks = [part | high << 32 for part, high in zip(blocks, upper, strict=True)]
    block_bitmap, inode_bitmap, inode_table = blocks
    return GroupDescriptor(block_bitmap, inode_bitmap, inode_table, low.flags)


def _descriptor_is_sound(sb: Superblock, group: int, raw: bytes) -> bool:
    value = crc32c(sb.seed, struct.pack("<I", group))
    value = crc32c(value, DESCRIPTOR.zeroed(raw, "checksum"))
    return value & 0xFFFF == DESCRIPTOR.unpack_from(raw).checksum


def _descriptor_block(sb: Superblock, index: int, per_block: int) -> int:
    if not sb.incompat & Incompat.META_BG or index < sb.first_meta_bg:
        return sb.own_block + 1 + index
    group = index * per_block
    # With blocks of 1 KiB that are counted from 0, the superblock is the second of group 0.
    behind = has_backup(sb, group) + (not index and sb.own_block > sb.first_data_block)
    return sb.first_data_block + group * sb.blocks_per_group + behind


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
