"""The superblock and the group descriptors: where everything else is.

Source: "ext4 Disk Layout", sections Super Block, Block Group Descriptors, Meta Block Groups.
A superblock that the kernel would not mount raises `RefusedError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.ext4.checksum import ONES, crc32c
from nbdproxy.oracles.ext4.faults import NoFilesystemError, RefusedError, refusal
from nbdproxy.oracles.watched import Reads

OFFSET = 1024
LENGTH = 1024
MAGIC = b"\x53\xef"
HAS_JOURNAL = 0x4
DIR_INDEX = 0x20
SPARSE_SUPER2 = 0x200
NAMES_ALWAYS, BYTES_PER_NAME = 100_000, 256
UNSIGNED_HASH = 0x2  # a flag: bytes of names count as unsigned in their hash
STRICT_ENCODING = 0x1
UTF8_12_1 = 1  # the one encoding there is


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


BLOCK_BITMAP, INODE_BITMAP, INODE_TABLE = 0, 4, 8
"""Fields of a group's descriptor that name a block."""

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
    """The fields this reader needs, in the units of the disk (blocks unless said otherwise)."""

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
        """The block that the superblock stands in."""
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
        """How many names are listed: each file takes an inode, and few have many names."""
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


def has_magic(device: ReadableDevice) -> bool:
    """Tell whether an ext superblock may stand at the start of `device`."""
    return device.size >= OFFSET + LENGTH and device.pread(OFFSET + 0x38, 2) == MAGIC


def is_journal(device: ReadableDevice) -> bool:
    """Tell whether what has a superblock is no filesystem, but the journal of another one."""
    return bool(int.from_bytes(device.pread(OFFSET + 0x60, 4), "little") & Incompat.JOURNAL_DEV)


def parse(device: ReadableDevice) -> Superblock:
    """Read and validate the primary superblock.

    Raises NoFilesystemError without a magic number, RefusedError for what no kernel would mount.
    """
    if not has_magic(device):
        raise NoFilesystemError("no filesystem found: there is no ext2, ext3 or ext4 superblock")
    raw = device.pread(OFFSET, LENGTH)
    inodes, blocks = struct.unpack_from("<II", raw)
    first_data_block, log_block_size = struct.unpack_from("<II", raw, 0x14)
    blocks_per_group, _, inodes_per_group = struct.unpack_from("<III", raw, 0x20)
    (revision,) = struct.unpack_from("<I", raw, 0x4C)
    inode_size, _, compat, incompat, ro_compat = struct.unpack_from("<HHIII", raw, 0x58)
    if revision == 0:
        inode_size, compat, incompat, ro_compat = 128, 0, 0, 0
    _check_features(raw, incompat, ro_compat)
    if ro_compat & RoCompat.METADATA_CSUM:
        (found,) = struct.unpack_from("<I", raw, 0x3FC)
        _require(found == crc32c(ONES, raw[:0x3FC]), "its checksum is wrong")
    if incompat & Incompat.BITS_64:
        blocks |= struct.unpack_from("<I", raw, 0x150)[0] << 32
        (descriptor_size,) = struct.unpack_from("<H", raw, 0xFE)
    else:
        descriptor_size = 32
    _require(log_block_size <= 6, "its block size is impossible")
    block_size = 1024 << log_block_size
    _require(inode_size in {128 << n for n in range(10)}, "its inode size is impossible")
    _require(inode_size <= block_size, "its inode size is impossible")
    _require(descriptor_size in {32 << n for n in range(6)}, "its descriptor size is impossible")
    _require(0 < blocks_per_group <= 8 * block_size * (1 << 20), "its groups are impossible")
    _require(first_data_block < blocks, "its block count is impossible")
    _require(blocks * block_size <= device.size, "it is larger than the device it is on")
    result = Superblock(
        block_size=block_size,
        blocks=blocks,
        first_data_block=first_data_block,
        blocks_per_group=blocks_per_group,
        inodes=inodes,
        inodes_per_group=inodes_per_group,
        inode_size=inode_size,
        descriptor_size=descriptor_size,
        first_meta_bg=struct.unpack_from("<I", raw, 0x104)[0],
        reserved_descriptors=struct.unpack_from("<H", raw, 0xCE)[0],
        backup_groups=struct.unpack_from("<II", raw, 0x24C),
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        journal_inode=struct.unpack_from("<I", raw, 0xE0)[0],
        seed=_seed(raw, incompat),
        cluster_size=_cluster_size(raw, ro_compat, block_size),
        first_inode=struct.unpack_from("<I", raw, 0x54)[0] if revision else 11,
        quota_inodes=_quota_inodes(raw, ro_compat),
        orphan_file=struct.unpack_from("<I", raw, 0x280)[0],
        mmp_block=struct.unpack_from("<Q", raw, 0x168)[0],
        hash_seed=raw[0xEC:0xFC],
        has_unsigned_hash=bool(raw[0x160] & UNSIGNED_HASH),
        has_strict_names=bool(raw[0x27E] & STRICT_ENCODING),
    )
    _require(
        inodes_per_group > 0 and inodes == inodes_per_group * result.groups,
        "its inode count is impossible",
    )
    return result


def groups(device: ReadableDevice, sb: Superblock) -> tuple[list[int], Reads]:
    """Return the first block of each group's inode table, and which blocks no file may have.

    Those are what mke2fs put there, except for the journal. Verifies the descriptors' checksums.
    """
    tables, fixed = [], []
    length = -(-sb.inodes_per_group * sb.inode_size // sb.block_size)
    count = len(descriptor_blocks(sb))
    for group, raw in enumerate(descriptors(device, sb)):
        table = block_number(sb, raw, INODE_TABLE)
        if not sb.first_data_block <= table < sb.blocks:
            raise refusal(f"the inode table of group {group} is outside of it")
        tables.append(table)
        fixed.append((table, table + length))
        for field in (BLOCK_BITMAP, INODE_BITMAP):
            block = block_number(sb, raw, field)
            fixed.append((block, block + 1))
        if has_backup(sb, group) and not sb.incompat & Incompat.META_BG:
            start = sb.first_data_block + group * sb.blocks_per_group
            fixed.append((start, start + 1 + count + sb.reserved_descriptors))
    if sb.incompat & Incompat.META_BG:
        fixed += [(block, block + 1) for block in descriptor_blocks(sb)]
    return tables, Reads(fixed)


def block_number(sb: Superblock, descriptor: bytes, field: int) -> int:
    """Return the block that a group's descriptor names in one of its fields."""
    (number,) = struct.unpack_from("<I", descriptor, field)
    if sb.descriptor_size >= 64:
        number |= struct.unpack_from("<I", descriptor, field + 0x20)[0] << 32
    return int(number)


def descriptor_blocks(sb: Superblock) -> list[int]:
    """Return the blocks that hold the group descriptors which are in use."""
    per_block = sb.block_size // sb.descriptor_size
    return [_descriptor_block(sb, i, per_block) for i in range(-(-sb.groups // per_block))]


def descriptors(device: ReadableDevice, sb: Superblock) -> Iterator[bytes]:
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
            yield raw


def has_backup(sb: Superblock, group: int) -> bool:
    """Tell whether a group begins with a superblock, the first one or a copy."""
    if group == 0:
        return True
    if sb.compat & SPARSE_SUPER2:
        return group in sb.backup_groups
    if group == 1 or not sb.ro_compat & RoCompat.SPARSE_SUPER:
        return True
    return any(_is_power(group, base) for base in (3, 5, 7))


def _check_features(raw: bytes, incompat: int, ro_compat: int) -> None:
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
    (encoding,) = struct.unpack_from("<H", raw, 0x27C)
    _require(
        not incompat & Incompat.CASEFOLD or encoding == UTF8_12_1,
        "the encoding of its names is unknown",
    )


def _seed(raw: bytes, incompat: int) -> int:
    if incompat & Incompat.CSUM_SEED:
        value: int = struct.unpack_from("<I", raw, 0x270)[0]
        return value
    return crc32c(ONES, raw[0x68:0x78])


def _cluster_size(raw: bytes, ro_compat: int, block_size: int) -> int:
    if not ro_compat & RoCompat.BIGALLOC:
        return block_size
    (log_size,) = struct.unpack_from("<I", raw, 0x1C)
    _require(log_size <= 20 and 1024 << log_size >= block_size, "its cluster size is impossible")
    return 1024 << int(log_size)


def _quota_inodes(raw: bytes, ro_compat: int) -> tuple[int, int, int]:
    if not ro_compat & RoCompat.QUOTA:
        return (0, 0, 0)
    users, groups, projects = (struct.unpack_from("<I", raw, at)[0] for at in (0x240, 0x244, 0x26C))
    return users, groups, projects


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise refusal(what)


def _descriptor_is_sound(sb: Superblock, group: int, raw: bytes) -> bool:
    # The checksum is part of what it covers, counted as zero.
    value = crc32c(sb.seed, struct.pack("<I", group))
    value = crc32c(value, raw[:0x1E] + b"\0\0" + raw[0x20:])
    return bool(value & 0xFFFF == struct.unpack_from("<H", raw, 0x1E)[0])


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
