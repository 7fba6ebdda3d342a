"""The journal's replay: the blocks that jbd2 would write to the filesystem at a mount.

Source: "ext4 Disk Layout", section Journal (jbd2); Linux' include/linux/jbd2.h; and the behaviour
of Linux 6.1 where that page is silent. Three passes over the log as in the kernel: *scan* finds the
last committed transaction, *revoke* collects the blocks that must not be replayed, *replay* those
that must. Nothing is written; the result is a map from block number to content.

All checksums are verified (v1 over whole transactions, v2 and v3 per block). Where the kernel
gives up because of one, `RefusedError` says so. Not covered, and refused: external journals
and fast commits that are not empty.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.ext4.checksum import ONES, crc32_be, crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, RefusedError, refusal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.replayed import ReplayedDevice
from nbdproxy.oracles.ext4.superblock import HAS_JOURNAL
from nbdproxy.oracles.structs import Field, StructLayout

MAGIC = b"\xc0\x3b\x39\x98"
DESCRIPTOR, COMMIT, SUPERBLOCK_V1, SUPERBLOCK_V2, REVOKE = 1, 2, 3, 4, 5
_CONTROL = {DESCRIPTOR, COMMIT, REVOKE}
SUPERBLOCK_SIZE = 1024
COMPAT_CHECKSUM = 0x1
BITS_64, ASYNC_COMMIT, CSUM_V2, CSUM_V3, FAST_COMMIT = 0x2, 0x4, 0x8, 0x10, 0x20
INCOMPAT_KNOWN = 0x3F
TAG_ESCAPED, TAG_SAME_UUID, TAG_LAST = 1, 2, 8
TAG_UUID_SIZE = 16
CRC32, CRC32C = 1, 4  # checksum types
CRC32_SIZE = 4
TAIL_SIZE = 4  # struct jbd2_journal_block_tail: a checksum at the end of the block
LOG_BLOCKS_MIN = 1024  # the log is never cut below this to make room for fast commits
FAST_COMMIT_BLOCKS = 256
FAST_COMMIT_HEAD = 9


class BlockHeader(NamedTuple):
    """struct journal_header_s, which each block of the log begins with that is no copy."""

    magic: Annotated[bytes, Field(0, "4s")]
    blocktype: Annotated[int, Field(4, "I")]
    sequence: Annotated[int, Field(8, "I")]


class JournalSuperblock(NamedTuple):
    """struct journal_superblock_s, the fields that are used."""

    magic: Annotated[bytes, Field(0x0, "4s")]
    blocktype: Annotated[int, Field(0x4, "I")]
    blocksize: Annotated[int, Field(0xC, "I")]
    maxlen: Annotated[int, Field(0x10, "I")]
    first: Annotated[int, Field(0x14, "I")]
    sequence: Annotated[int, Field(0x18, "I")]
    start: Annotated[int, Field(0x1C, "I")]
    feature_compat: Annotated[int, Field(0x24, "I")]
    feature_incompat: Annotated[int, Field(0x28, "I")]
    feature_ro_compat: Annotated[int, Field(0x2C, "I")]
    uuid: Annotated[bytes, Field(0x30, "16s")]
    checksum_type: Annotated[int, Field(0x50, "B")]
    num_fc_blks: Annotated[int, Field(0x54, "I")]
    checksum: Annotated[int, Field(0xFC, "I")]


class CommitHeader(NamedTuple):
    """struct commit_header, behind its `BlockHeader`."""

    chksum_type: Annotated[int, Field(12, "B")]
    chksum_size: Annotated[int, Field(13, "B")]
    chksum: Annotated[int, Field(16, "I")]
    commit_sec: Annotated[int, Field(48, "Q")]


class RevokeHeader(NamedTuple):
    """struct jbd2_journal_revoke_header_s, behind its `BlockHeader`; r_count is in bytes."""

    used: Annotated[int, Field(12, "I")]


class RawTag(NamedTuple):
    """struct journal_block_tag_s of a log with 32-bit block numbers."""

    blocknr: Annotated[int, Field(0, "I")]
    checksum: Annotated[int, Field(4, "H")]
    flags: Annotated[int, Field(6, "H")]


class RawTag64(NamedTuple):
    """struct journal_block_tag_s of a log with 64-bit block numbers."""

    blocknr: Annotated[int, Field(0, "I")]
    checksum: Annotated[int, Field(4, "H")]
    flags: Annotated[int, Field(6, "H")]
    blocknr_high: Annotated[int, Field(8, "I")]


class RawTag3(NamedTuple):
    """struct journal_block_tag3_s, of a log with checksums v3."""

    blocknr: Annotated[int, Field(0, "I")]
    flags: Annotated[int, Field(4, "I")]
    blocknr_high: Annotated[int, Field(8, "I")]
    checksum: Annotated[int, Field(12, "I")]


class FastCommitHead(NamedTuple):
    """struct ext4_fc_tl and, behind it, struct ext4_fc_head (fs/ext4/fast_commit.h)."""

    tag: Annotated[int, Field(0, "H")]
    len: Annotated[int, Field(2, "H")]
    features: Annotated[int, Field(4, "I")]
    tid: Annotated[int, Field(8, "I")]


HEADER = StructLayout(BlockHeader, ">")
JOURNAL_SUPERBLOCK = StructLayout(JournalSuperblock, ">")
COMMIT_HEADER = StructLayout(CommitHeader, ">")
REVOKE_HEADER = StructLayout(RevokeHeader, ">")
TAG = StructLayout(RawTag, ">")
TAG_64 = StructLayout(RawTag64, ">")
TAG_3 = StructLayout(RawTag3, ">")
CSUM_V2_SIZE = 2  # bytes that checksums v2 add to a tag, of which nothing is read
FAST_COMMIT_HEADER = StructLayout(FastCommitHead, "<")  # unlike the log


class Tag(NamedTuple):
    """One entry of a descriptor block: the home, on the disk, of the next block of the log."""

    block: int
    flags: int
    checksum: int


class ControlBlock(NamedTuple):
    """A descriptor, commit or revoke block; `position` is that of the block behind it."""

    position: int
    sequence: int
    kind: int
    block: bytes
    tags: list[Tag]


ChecksumCache = dict[int, tuple[bytes, int, int]]
"""By position in the log: a block, a seed, and the checksum of both; valid for that very object."""


@dataclass(frozen=True, slots=True)
class Log:
    """A journal's superblock, and where its blocks are on the disk.

    blocks       by position in the log, the block of the disk
    leading      blocks of the disk that are nodes of the journal's extent tree, or indirect blocks
    first, last  the positions that transactions may use, [first, last)
    start        the position of the oldest transaction; 0 if the log is empty
    sequence     its number
    """

    filesystem: Filesystem
    blocks: list[int]
    leading: frozenset[int]
    first: int
    last: int
    start: int
    sequence: int
    compat: int
    incompat: int
    seed: int

    @property
    def has_checksums(self) -> bool:
        """Whether every block of the log carries a checksum."""
        return bool(self.incompat & (CSUM_V2 | CSUM_V3))

    @property
    def tail(self) -> int:
        """The bytes at the end of a descriptor or revoke block that hold its checksum."""
        return TAIL_SIZE if self.has_checksums else 0

    def read(self, position: int) -> bytes:
        """Return the block at a position of the log."""
        size = self.filesystem.superblock.block_size
        return self.filesystem.device.pread(self.blocks[position] * size, size)

    def step(self, position: int, count: int = 1) -> int:
        """Return the position `count` blocks on, round the end of the log."""
        position += count
        return position - (self.last - self.first) if position >= self.last else position


class LogBlock(NamedTuple):
    """A block of a committed transaction: its role in the log, and of a copy its home."""

    transaction: int
    role: str
    target: int | None


def log_map(filesystem: Filesystem) -> dict[int, LogBlock]:
    """Return the blocks of the disk that hold transactions which a mount would replay.

    `target` is the home of a copy; descriptor, revoke and commit blocks have none.
    Raises RefusedError as `replay` does.
    """
    sb = filesystem.superblock
    if not sb.needs_recovery or not sb.journal_inode:
        return {}
    log = _open(filesystem)
    found = {}
    for control in _scan(log) if log.start else ():
        before = control.position - 1 if control.position > log.first else log.last - 1
        role = {DESCRIPTOR: "descriptor block", COMMIT: "commit block"}.get(control.kind, "revoke")
        found[log.blocks[before]] = LogBlock(control.sequence, role, None)
        for index, tag in enumerate(control.tags):
            number = log.blocks[log.step(control.position, index)]
            found[number] = LogBlock(control.sequence, "copy", tag.block)
    return found


def replay(filesystem: Filesystem, checksums: ChecksumCache | None = None) -> dict[int, bytes]:
    """Return the blocks that a mount would write from the journal; empty if it is clean.

    `checksums` is a cache for callers that replay many states. It helps if the device returns for
    an unchanged block the same object each time.

    Raises RefusedError where the kernel would not mount, or where only it can tell.
    """
    sb = filesystem.superblock
    if not sb.compat & HAS_JOURNAL:
        if sb.needs_recovery:
            raise refusal("it asks for recovery and has no journal")
        return {}
    if not sb.journal_inode:
        raise RefusedError(
            "the filesystem has its journal on another device, which is not part of the recording"
        )
    log = _open(filesystem)
    if not log.start:
        return {}
    try:
        controls = _scan(log)
        if not sb.needs_recovery:
            return {}  # the kernel looks through such a log all the same, before it empties it
        blocks = _replay(
            log, controls, _revoked(log, controls), {} if checksums is None else checksums
        )
    except IndexError as error:
        raise refusal("its journal leads out of itself") from error
    commits = sum(control.kind == COMMIT for control in controls)
    _check_fast_commits(log, (log.sequence + commits) & ONES)
    if any(not 0 <= number < sb.blocks for number in blocks):
        raise refusal("its journal holds blocks outside of it")
    return blocks


def _open(filesystem: Filesystem) -> Log:
    sb = filesystem.superblock
    try:
        node = filesystem.inode(sb.journal_inode)
        leading: set[int] = set()

        def noted(number: int) -> bytes:
            leading.add(number)
            return filesystem.block(number)

        runs = filesystem.tree(node, noted).runs()
    except CorruptError as error:
        raise refusal(f"its journal cannot be read: {error}") from error
    blocks = [run.physical + i for run in runs for i in range(run.blocks)]
    if not node.is_regular or not blocks or runs[0].logical:
        raise refusal("its journal is not a file")
    block = filesystem.device.pread(blocks[0] * sb.block_size, SUPERBLOCK_SIZE)
    raw = JOURNAL_SUPERBLOCK.unpack_from(block)
    if raw.magic != MAGIC or raw.blocktype not in {SUPERBLOCK_V1, SUPERBLOCK_V2}:
        raise refusal("its journal has no superblock")
    if raw.blocktype == SUPERBLOCK_V1:
        raw = raw._replace(feature_compat=0, feature_incompat=0, feature_ro_compat=0)
    if raw.feature_incompat & ~INCOMPAT_KNOWN or raw.feature_ro_compat:
        raise refusal("its journal has unknown features")
    is_fitting = raw.blocksize == sb.block_size and raw.maxlen <= len(blocks)
    if not is_fitting or not 0 < raw.first < raw.maxlen:
        raise refusal("its journal's superblock is impossible")
    _check_superblock(block, raw)
    last = raw.maxlen
    if raw.feature_incompat & FAST_COMMIT:
        reserved = raw.num_fc_blks or FAST_COMMIT_BLOCKS
        if raw.maxlen - reserved >= LOG_BLOCKS_MIN:
            last = raw.maxlen - reserved
    if raw.start and not raw.first <= raw.start < last:
        raise refusal("its journal's superblock is impossible")
    return Log(
        filesystem=filesystem,
        blocks=blocks[: raw.maxlen],
        leading=frozenset(leading),
        first=raw.first,
        last=last,
        start=raw.start,
        sequence=raw.sequence,
        compat=raw.feature_compat,
        incompat=raw.feature_incompat,
        seed=crc32c(ONES, raw.uuid),
    )


def _check_superblock(block: bytes, raw: JournalSuperblock) -> None:
    incompat = raw.feature_incompat
    kinds = [raw.feature_compat & COMPAT_CHECKSUM, incompat & CSUM_V2, incompat & CSUM_V3]
    if sum(map(bool, kinds)) > 1:
        raise refusal("its journal claims two kinds of checksums")
    if incompat & (CSUM_V2 | CSUM_V3):
        covered = JOURNAL_SUPERBLOCK.zeroed(block, "checksum")
        if raw.checksum_type != CRC32C or raw.checksum != crc32c(ONES, covered):
            raise refusal("the checksum of its journal's superblock is wrong")


def _scan(log: Log) -> list[ControlBlock]:
    """Return the control blocks of all transactions that are to be replayed, in log order."""
    position, sequence = log.start, log.sequence
    time_last = 0
    doubtful = False  # a block's checksum was wrong: stale if its commit is older, else broken
    running = ONES  # checksum v1, over the transaction so far
    found: list[ControlBlock] = []
    committed = passed = 0
    while passed <= log.last - log.first:
        block = log.read(position)
        kind = _kind(block, sequence)
        if kind is None:
            return found[:committed]
        position = log.step(position)
        tags = list(_tags(log, block)) if kind == DESCRIPTOR else []
        found.append(ControlBlock(position, sequence, kind, block, tags))
        passed += 1 + len(tags)
        if kind == DESCRIPTOR:
            doubtful |= not _tail_is_right(log, block)
            if log.compat & COMPAT_CHECKSUM:
                running = crc32_be(running, block)
                for i in range(len(tags)):
                    running = crc32_be(running, log.read(log.step(position, i)))
            position = log.step(position, len(tags))
        elif kind == REVOKE:
            doubtful |= not _tail_is_right(log, block)
        else:
            time = COMMIT_HEADER.unpack_from(block).commit_sec
            if doubtful and time >= time_last:
                raise refusal(f"a checksum in transaction {sequence} of its journal is wrong")
            if doubtful:
                return found[:committed]
            if not _commit_is_right(log, block, running):
                # With asynchronous commits this is a transaction that was under way.
                if time < time_last or log.incompat & ASYNC_COMMIT:
                    return found[:committed]
                raise refusal(f"transaction {sequence} of its journal is corrupt")
            running = ONES
            time_last = time
            sequence = (sequence + 1) & ONES
            committed = len(found)
    raise refusal("its journal leads round in a circle")


def _revoked(log: Log, controls: list[ControlBlock]) -> dict[int, int]:
    """Return each revoked block's last revoking sequence."""
    revoked: dict[int, int] = {}
    blocks = log.filesystem.superblock.blocks
    width, code = (8, "Q") if log.incompat & BITS_64 else (4, "I")
    for control in controls:
        if control.kind != REVOKE:
            continue
        used = REVOKE_HEADER.unpack_from(control.block).used
        if used > len(control.block) - log.tail:
            raise refusal("its journal holds an impossible revoke block")
        count = max(0, used - REVOKE_HEADER.size) // width
        for number in struct.unpack_from(f">{count}{code}", control.block, REVOKE_HEADER.size):
            if number >= blocks:
                continue  # there is no such block, and nothing is written there
            if number not in revoked or _is_later(control.sequence, revoked[number]):
                revoked[number] = control.sequence
    return revoked


def _replay(
    log: Log, controls: list[ControlBlock], revoked: dict[int, int], checksums: ChecksumCache
) -> dict[int, bytes]:
    blocks: dict[int, bytes] = {}
    for control in controls:
        sequence = control.sequence
        seed = crc32c(log.seed, struct.pack(">I", sequence))
        mask = ONES if log.incompat & CSUM_V3 else 0xFFFF
        for index, tag in enumerate(control.tags):
            if tag.block in revoked and not _is_later(sequence, revoked[tag.block]):
                continue
            position = log.step(control.position, index)
            data = log.read(position)
            if log.has_checksums:
                known = checksums.get(position)
                if known is None or known[0] is not data or known[1] != seed:
                    known = checksums[position] = (data, seed, crc32c(seed, data))
                if tag.checksum != known[2] & mask:
                    raise refusal(f"a block in transaction {sequence} of its journal is corrupt")
            blocks[tag.block] = MAGIC + data[4:] if tag.flags & TAG_ESCAPED else data
            if tag.block == log.filesystem.superblock.own_block:
                _check_own(log, blocks[tag.block])
    # Without checksums, a torn or stale descriptor block may name these.
    if not (blocks.keys().isdisjoint(log.blocks) and blocks.keys().isdisjoint(log.leading)):
        raise RefusedError(
            "the journal holds blocks of itself, and only a kernel can tell what it makes of that; "
            "ask with --oracle kernel"
        )
    return blocks


def _check_own(log: Log, data: bytes) -> None:
    """Raise RefusedError unless a copy of the superblock leaves the filesystem what it is.

    The kernel uses each copy as soon as it is replayed, to find the next block of the log.
    """
    known = log.filesystem.superblock
    shown = ReplayedDevice(log.filesystem.device, known.block_size, {known.own_block: data})
    try:
        if superblock.parse(shown).is_like(known):
            return
    except FilesystemError:
        pass
    raise RefusedError(
        "the journal holds a superblock that is not this filesystem's, and only a kernel can tell "
        "how far it gets with that; ask with --oracle kernel"
    )


def _kind(block: bytes, sequence: int) -> int | None:
    header = HEADER.unpack_from(block)
    is_current = header.magic == MAGIC and header.sequence == sequence
    return header.blocktype if is_current and header.blocktype in _CONTROL else None


def _tags(log: Log, block: bytes) -> Iterator[Tag]:
    is_wide = log.incompat & BITS_64
    layout: StructLayout[RawTag] | StructLayout[RawTag64] | StructLayout[RawTag3]
    layout = TAG_3 if log.incompat & CSUM_V3 else TAG_64 if is_wide else TAG
    size = layout.size + (CSUM_V2_SIZE if log.incompat & CSUM_V2 else 0)
    at = HEADER.size
    while at + size <= len(block) - log.tail:
        raw = layout.unpack_from(block, at)
        high = 0 if isinstance(raw, RawTag) or not is_wide else raw.blocknr_high
        yield Tag(raw.blocknr | high << 32, raw.flags, raw.checksum)
        at += size
        if not raw.flags & TAG_SAME_UUID:
            at += TAG_UUID_SIZE
        if raw.flags & TAG_LAST:
            return


def _tail_is_right(log: Log, block: bytes) -> bool:
    if not log.has_checksums:
        return True
    found = int.from_bytes(block[-TAIL_SIZE:], "big")
    return found == crc32c(log.seed, block[:-TAIL_SIZE] + bytes(TAIL_SIZE))


def _commit_is_right(log: Log, block: bytes, running: int) -> bool:
    header = COMMIT_HEADER.unpack_from(block)
    if log.has_checksums:
        return header.chksum == crc32c(log.seed, COMMIT_HEADER.zeroed(block, "chksum"))
    if not log.compat & COMPAT_CHECKSUM:
        return True
    return (header.chksum_type, header.chksum_size, header.chksum) in {
        (CRC32, CRC32_SIZE, running),
        (0, 0, 0),
    }


def _is_later(sequence: int, than: int) -> bool:
    """Compare sequence numbers, which wrap round at 32 bits."""
    return 0 < (sequence - than) & ONES < 1 << 31


def _check_fast_commits(log: Log, end: int) -> None:
    """Raise RefusedError if there are fast commits to be replayed, on top of transaction `end`."""
    first = log.last + 1  # the kernel leaves one block between the log and the area
    if not log.incompat & FAST_COMMIT or first >= len(log.blocks):
        return
    head = FAST_COMMIT_HEADER.unpack_from(log.read(first))
    if head.tag == FAST_COMMIT_HEAD and head.tid == end:  # else it is stale
        raise RefusedError(
            "the journal holds fast commits, which only a kernel replays; ask with --oracle kernel"
        )
