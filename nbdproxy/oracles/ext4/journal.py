"""The journal's replay: what jbd2 would write to the filesystem before a mount shows it.

Source: "ext4 Disk Layout", section Journal (jbd2), and the behaviour of Linux 6.1 where that page
is silent. Three passes over the log as in the kernel: *scan* finds the last committed transaction,
*revoke* collects the blocks that must not be replayed, *replay* collects the blocks that must.
Nothing is written; the result is a map from block number to content.

All checksums are verified (the first kind over whole transactions, v2 and v3 per block). Where
they make the kernel give up, `RefusedError` says so. Not covered, and refused: external journals
and fast commits that are not empty.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4 import superblock
from nbdproxy.oracles.ext4.checksum import ONES, crc32_be, crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, RefusedError, refusal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.replayed import ReplayedDevice
from nbdproxy.oracles.ext4.superblock import HAS_JOURNAL

MAGIC = b"\xc0\x3b\x39\x98"
DESCRIPTOR, COMMIT, SUPERBLOCK_V1, SUPERBLOCK_V2, REVOKE = 1, 2, 3, 4, 5
HEADER = struct.Struct(">4sII")  # magic, kind, sequence
COMPAT_CHECKSUM = 0x1
BITS_64, ASYNC_COMMIT, CSUM_V2, CSUM_V3, FAST_COMMIT = 0x2, 0x4, 0x8, 0x10, 0x20
INCOMPAT_KNOWN = 0x3F
TAG_ESCAPED, TAG_SAME_UUID, TAG_LAST = 1, 2, 8
TAG_UUID_SIZE = 16
CRC32, CRC32C = 1, 4  # checksum types
CRC32_SIZE = 4
COMMIT_CHECKSUM = slice(16, 20)
LOG_BLOCKS_MIN = 1024  # the log is never cut below this to make room for fast commits
FAST_COMMIT_BLOCKS = 256
FAST_COMMIT_HEAD = 9


class Tag(NamedTuple):
    """One entry of a descriptor block: where the next block of the log belongs."""

    block: int
    flags: int
    checksum: int


class ControlBlock(NamedTuple):
    """A block of the log that is no data; the next one, or its data, is at `position`."""

    position: int
    sequence: int
    kind: int
    block: bytes
    tags: list[Tag]


Sums = dict[int, tuple[bytes, int, int]]
"""By position in the log: data, seed, and the checksum they give; for the same object only."""


@dataclass(frozen=True, slots=True)
class Log:
    """A journal's superblock, and where its blocks are on the disk.

    `leading` are the blocks that say where they are, beside its inode.
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
        return 4 if self.has_checksums else 0

    def read(self, position: int) -> bytes:
        """Return the block at a position of the log."""
        size = self.filesystem.superblock.block_size
        return self.filesystem.device.pread(self.blocks[position] * size, size)

    def step(self, position: int, count: int = 1) -> int:
        """Return the position `count` blocks on, round the end of the log."""
        position += count
        return position - (self.last - self.first) if position >= self.last else position


class LogBlock(NamedTuple):
    """A block of a committed transaction in the log: what it is, and what it is a copy of."""

    transaction: int
    role: str
    target: int | None


def log_map(filesystem: Filesystem) -> dict[int, LogBlock]:
    """Return the blocks of the disk that hold transactions which a mount would replay.

    `target` is the block that a copy belongs to; descriptor, revoke and commit blocks have none.
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


def replay(filesystem: Filesystem, sums: Sums | None = None) -> dict[int, bytes]:
    """Return the blocks that a mount would write from the journal; empty if it is clean.

    Who replays many states hands over the same `sums` each time, and a device that returns for
    an unchanged block the very same object: what was summed then is not summed again.

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
        blocks = _replay(log, controls, _revoked(log, controls), {} if sums is None else sums)
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
    raw = filesystem.device.pread(blocks[0] * sb.block_size, 1024)
    magic, kind, _ = HEADER.unpack_from(raw)
    block_size, length, first, sequence, start = struct.unpack_from(">5I", raw, 12)
    if magic != MAGIC or kind not in {SUPERBLOCK_V1, SUPERBLOCK_V2}:
        raise refusal("its journal has no superblock")
    compat, incompat, ro_compat = struct.unpack_from(">3I", raw, 0x24)
    if kind == SUPERBLOCK_V1:
        compat = incompat = ro_compat = 0
    if incompat & ~INCOMPAT_KNOWN or ro_compat:
        raise refusal("its journal has unknown features")
    if block_size != sb.block_size or length > len(blocks) or not 0 < first < length:
        raise refusal("its journal's superblock is impossible")
    _check_superblock(raw, compat, incompat)
    last = length
    if incompat & FAST_COMMIT:
        reserved = struct.unpack_from(">I", raw, 0x54)[0] or FAST_COMMIT_BLOCKS
        if length - reserved >= LOG_BLOCKS_MIN:
            last = length - reserved
    if start and not first <= start < last:
        raise refusal("its journal's superblock is impossible")
    return Log(
        filesystem=filesystem,
        blocks=blocks[:length],
        leading=frozenset(leading),
        first=first,
        last=last,
        start=start,
        sequence=sequence,
        compat=compat,
        incompat=incompat,
        seed=crc32c(ONES, raw[0x30:0x40]),
    )


def _check_superblock(raw: bytes, compat: int, incompat: int) -> None:
    kinds = [compat & COMPAT_CHECKSUM, incompat & CSUM_V2, incompat & CSUM_V3]
    if sum(map(bool, kinds)) > 1:
        raise refusal("its journal claims two kinds of checksums")
    if incompat & (CSUM_V2 | CSUM_V3):
        (found,) = struct.unpack_from(">I", raw, 0xFC)
        covered = raw[:0xFC] + bytes(4) + raw[0x100:]
        if raw[0x50] != CRC32C or found != crc32c(ONES, covered):
            raise refusal("the checksum of its journal's superblock is wrong")


def _scan(log: Log) -> list[ControlBlock]:
    """Return the control blocks of all transactions that count, and behind them, of none."""
    position, sequence = log.start, log.sequence
    time_last = 0
    doubtful = False  # a block's checksum was wrong: stale if its commit is older, else broken
    running = ONES  # checksum of the first kind, over a transaction
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
            (time,) = struct.unpack_from(">Q", block, 48)
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
        (used,) = struct.unpack_from(">I", control.block, 12)
        if used > len(control.block) - log.tail:
            raise refusal("its journal holds an impossible revoke block")
        count = max(0, used - 16) // width
        for number in struct.unpack_from(f">{count}{code}", control.block, 16):
            if number >= blocks:
                continue  # there is no such block, and nothing is written there
            if number not in revoked or _is_later(control.sequence, revoked[number]):
                revoked[number] = control.sequence
    return revoked


def _replay(
    log: Log, controls: list[ControlBlock], revoked: dict[int, int], sums: Sums
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
                known = sums.get(position)
                if known is None or known[0] is not data or known[1] != seed:
                    known = sums[position] = (data, seed, crc32c(seed, data))
                if tag.checksum != known[2] & mask:
                    raise refusal(f"a block in transaction {sequence} of its journal is corrupt")
            blocks[tag.block] = MAGIC + data[4:] if tag.flags & TAG_ESCAPED else data
            if tag.block == log.filesystem.superblock.own_block:
                _check_own(log, blocks[tag.block])
    # Without checksums, what is torn or stale may name these.
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
    magic, kind, found = HEADER.unpack_from(block)
    if magic == MAGIC and found == sequence and kind in {DESCRIPTOR, COMMIT, REVOKE}:
        return int(kind)
    return None


def _tags(log: Log, block: bytes) -> Iterator[Tag]:
    wide = log.incompat & BITS_64
    if log.incompat & CSUM_V3:
        size = 16
    else:
        size = (12 if wide else 8) + (2 if log.incompat & CSUM_V2 else 0)
    at = HEADER.size
    while at + size <= len(block) - log.tail:
        number, checksum, flags = struct.unpack_from(">IHH", block, at)
        if wide:
            number |= struct.unpack_from(">I", block, at + 8)[0] << 32
        if log.incompat & CSUM_V3:
            (checksum,) = struct.unpack_from(">I", block, at + 12)
        yield Tag(number, flags, checksum)
        at += size
        if not flags & TAG_SAME_UUID:
            at += TAG_UUID_SIZE
        if flags & TAG_LAST:
            return


def _tail_is_right(log: Log, block: bytes) -> bool:
    if not log.has_checksums:
        return True
    found = int.from_bytes(block[-4:], "big")
    return found == crc32c(log.seed, block[:-4] + bytes(4))


def _commit_is_right(log: Log, block: bytes, running: int) -> bool:
    found = int.from_bytes(block[COMMIT_CHECKSUM], "big")
    if log.has_checksums:
        start, stop = COMMIT_CHECKSUM.start, COMMIT_CHECKSUM.stop
        return found == crc32c(log.seed, block[:start] + bytes(4) + block[stop:])
    if not log.compat & COMPAT_CHECKSUM:
        return True
    kind, size = block[12], block[13]
    return (kind, size, found) in {(CRC32, CRC32_SIZE, running), (0, 0, 0)}


def _is_later(sequence: int, than: int) -> bool:
    """Compare sequence numbers, which wrap round at 32 bits."""
    return 0 < (sequence - than) & ONES < 1 << 31


def _check_fast_commits(log: Log, end: int) -> None:
    """Raise RefusedError if fast commits would be replayed behind the transaction `end`."""
    first = log.last + 1  # the kernel leaves one block between the log and the area
    if not log.incompat & FAST_COMMIT or first >= len(log.blocks):
        return
    # The area is little-endian, unlike the log; anything not of this transaction is stale.
    kind, _, _, sequence = struct.unpack_from("<HHII", log.read(first))
    if kind == FAST_COMMIT_HEAD and sequence == end:
        raise RefusedError(
            "the journal holds fast commits, which only a kernel replays; ask with --oracle kernel"
        )
