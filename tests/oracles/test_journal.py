"""The replay against e2fsck's, on journals that debugfs writes: every byte of the disk equal."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.ext4 import journal, mounted
from nbdproxy.oracles.ext4.checksum import crc32_be, crc32c
from nbdproxy.oracles.ext4.faults import RefusedError
from nbdproxy.oracles.ext4.filesystem import Filesystem

Run = Callable[..., str]
Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]
Load = Callable[[Path], MemoryDisk]

BLOCK = 1024
BLOCKS = 8192
KINDS = {
    "v3": ("-t ext4", "jo -c -v 3"),
    "v2": ("-t ext4", "jo -c -v 2"),
    "v2 32 bit": ("-t ext4 -O ^64bit", "jo -c -v 2"),
    "v3 32 bit": ("-t ext4 -O ^64bit", "jo -c -v 3"),
    "none": ("-t ext4 -O ^metadata_csum,^64bit", "jo"),
    "none 64 bit": ("-t ext4 -O ^metadata_csum,64bit", "jo"),
    "ext3": ("-t ext3", "jo"),
}


def image_of(make_image: Make, kind: str) -> Path:
    options = KINDS[kind][0].split()
    return make_image(*options, "-b", str(BLOCK), "-J", "size=1", size=f"{BLOCKS}k")


def transactions(rng: random.Random, folder: Path, count: int) -> list[str]:
    """Random transactions over few blocks, so that they meet; some data looks like a journal.

    Each writes or revokes: debugfs 1.47 forgets the commit of a transaction that does both.
    """
    commands = []
    for number in range(count):
        # The last one needs a second descriptor block.
        span, most = (60, 40) if number < count - 1 else (200, 180)
        numbers = rng.sample(range(BLOCKS - span, BLOCKS), rng.randint(most // 2, most))
        listed = ",".join(map(str, numbers))
        if number % 3 == 1:
            commands.append(f"jw -r {listed}")
            continue
        data = b"".join(
            (b"\xc0\x3b\x39\x98" + rng.randbytes(BLOCK - 4))
            if rng.random() < 0.2
            else rng.randbytes(BLOCK)
            for _ in numbers
        )
        file = folder / f"data{number}"
        file.write_bytes(data)
        commands.append(f"jw -b {listed} {file}")
    return commands


def replayed(disk: MemoryDisk) -> bytes:
    device = mounted.open_filesystem(disk).device
    return device.pread(0, device.size)


def assert_equal_but_superblocks(ours: bytes, theirs: bytes, journal_block: int) -> None:
    assert len(ours) == len(theirs)
    differing = {
        at // BLOCK
        for at in range(0, len(ours), BLOCK)
        if ours[at : at + BLOCK] != theirs[at : at + BLOCK]
    }
    assert differing <= {1, journal_block}


def write_journal(make_image: Make, debugfs: Debugfs, tmp_path: Path, kind: str, seed: int) -> Path:
    rng = random.Random(seed)
    image = image_of(make_image, kind)
    output = debugfs(image, [KINDS[kind][1], *transactions(rng, tmp_path, 9), "jc"])
    assert "needs_recovery" in debugfs(image, ["features"]), output
    return image


def journal_blocks(disk: MemoryDisk) -> list[int]:
    filesystem = Filesystem(disk)
    runs = filesystem.runs(filesystem.inode(filesystem.superblock.journal_inode))
    return [run.physical + i for run in runs for i in range(run.blocks)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_replay_equals_e2fsck(
    *,
    make_image: Make,
    debugfs: Debugfs,
    run: Run,
    load: Load,
    tmp_path: Path,
    kind: str,
    seed: int,
) -> None:
    image = write_journal(make_image, debugfs, tmp_path, kind, seed)
    disk = load(image)
    before = disk.pread(0, disk.size)
    ours = replayed(disk)
    assert ours != before
    assert disk.pread(0, disk.size) == before
    copy = shutil.copy(image, tmp_path / "copy")
    run("e2fsck", "-y", "-E", "journal_only", copy)
    assert_equal_but_superblocks(
        ours, load(Path(copy)).pread(0, disk.size), journal_blocks(disk)[0]
    )


@pytest.mark.parametrize("kind", ["none", "none 64 bit", "ext3", "v3"])
@pytest.mark.parametrize(
    ("what", "is_judged"),
    [
        ("as it is", True),
        ("in use", True),
        ("zeroes", False),
        ("torn", False),
        ("another's journal", False),
        ("zeroes, revoked", True),
    ],
)
def test_a_superblock_that_is_replayed_must_be_this_one(
    *,
    make_image: Make,
    debugfs: Debugfs,
    load: Load,
    tmp_path: Path,
    kind: str,
    what: str,
    is_judged: bool,
) -> None:
    """The kernel finds the rest of the log by it; a right copy that comes later is too late."""
    image = image_of(make_image, kind)
    debugfs(image, ["ssv free_blocks_count 77"])  # its checksum is made anew
    right = load(image).pread(BLOCK, BLOCK)
    changed = bytearray(right)
    if what == "in use":
        changed[0x30:0x38] = bytes(8)  # when it was written, and how often it was mounted
        if kind == "v3":
            changed[0x3FC:] = struct.pack("<I", crc32c((1 << 32) - 1, bytes(changed[:0x3FC])))
    elif what.startswith("zeroes"):
        changed = bytearray(BLOCK)
    elif what == "torn":
        changed[:512] = bytes(512)
    elif what == "another's journal":
        changed[0xE0:0xE4] = bytes(4)
    copies = [tmp_path / "first", tmp_path / "second"]
    for path, data in zip(copies, (changed, right), strict=True):
        path.write_bytes(bytes(data))
    writes = [f"jw -b 1 {path}" for path in copies]
    if what == "zeroes, revoked":
        writes[1:] = ["jw -r 1"]
    debugfs(image, [KINDS[kind][1], *writes, "jc"])
    if is_judged:
        assert replayed(load(image))
    else:
        with pytest.raises(RefusedError, match="only a kernel can tell"):
            replayed(load(image))


@pytest.mark.parametrize(
    ("what", "refused"),
    [
        ("a sound log", None),
        ("a broken descriptor", "a checksum in transaction 1 of its journal is wrong"),
        ("no superblock of the log", "its journal has no superblock"),
        ("no journal's inode", "its journal on another device"),
    ],
)
def test_the_log_of_a_clean_filesystem_is_looked_at_all_the_same(
    *,
    make_image: Make,
    debugfs: Debugfs,
    load: Load,
    tmp_path: Path,
    what: str,
    refused: str | None,
) -> None:
    """As seen with Linux 6.18, a broken log with 6.1 too: a sound one is emptied, not replayed."""
    image = image_of(make_image, "v3")
    (tmp_path / "data").write_bytes(b"x" * BLOCK)
    commands = ["jo -c -v 3", f"jw -b 8000 {tmp_path / 'data'}", "jc", "feature -needs_recovery"]
    debugfs(image, [*commands, *(["ssv journal_inum 0"] if "inode" in what else [])])
    disk = load(image)
    if what in {"a broken descriptor", "no superblock of the log"}:
        start, descriptor = journal_blocks(disk)[:2]
        at = start * BLOCK if "superblock" in what else descriptor * BLOCK + 100
        disk.pwrite(at, b"\xff" * 4)
    if refused is None:
        assert mounted.open_filesystem(disk).device.pread(8000 * BLOCK, BLOCK) == bytes(BLOCK)
    else:
        with pytest.raises(RefusedError, match=refused):
            mounted.open_filesystem(disk)


@pytest.mark.parametrize("what", ["its blocks", "what leads to them"])
def test_a_journal_that_replays_itself_is_not_judged(
    *, make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path, what: str
) -> None:
    image = image_of(make_image, "ext3")
    filesystem = Filesystem(load(image))
    node = filesystem.inode(filesystem.superblock.journal_inode)
    indirect = struct.unpack_from("<I", node.block_map, 48)[0]
    number = indirect if what == "what leads to them" else filesystem.runs(node)[0].physical + 900
    (tmp_path / "data").write_bytes(load(image).pread(number * BLOCK, BLOCK))
    debugfs(image, ["jo", f"jw -b {number} {tmp_path / 'data'}", "jc"])
    with pytest.raises(RefusedError, match="blocks of itself"):
        replayed(load(image))


def relocated(disk: MemoryDisk, shift: int, sequence_by: int) -> None:
    """Move the log round its end and renumber it: wrap-around of positions and of numbers.

    Only for logs without checksums; e2fsck judges whether the result is a log.
    """
    blocks = journal_blocks(disk)
    log = [disk.pread(number * BLOCK, BLOCK) for number in blocks]
    first, length = 1, len(log) - 1
    for position in range(first, len(log)):
        data = log[position]
        if data[:4] == journal.MAGIC:
            (sequence,) = struct.unpack_from(">I", data, 8)
            data = data[:8] + struct.pack(">I", (sequence + sequence_by) % (1 << 32)) + data[12:]
        there = first + (position - first + shift) % length
        disk.pwrite(blocks[there] * BLOCK, data)
    sequence, start = struct.unpack_from(">II", log[0], 24)
    head = struct.pack(">II", (sequence + sequence_by) % (1 << 32), start + shift)
    disk.pwrite(blocks[0] * BLOCK + 24, head)


@pytest.mark.parametrize("kind", ["none", "none 64 bit"])
def test_the_log_and_its_numbers_wrap_round(
    *, make_image: Make, debugfs: Debugfs, run: Run, load: Load, tmp_path: Path, kind: str
) -> None:
    image = write_journal(make_image, debugfs, tmp_path, kind, 7)
    disk = load(image)
    straight = replayed(disk)
    for shift in (1023 - 20, 1023 - 2, 1023 - 61):
        moved = load(image)
        relocated(moved, shift, -4)  # from 1 over 2**32 - 3 back to 4
        copy = tmp_path / "moved"
        copy.write_bytes(moved.pread(0, moved.size))
        run("e2fsck", "-y", "-E", "journal_only", copy)
        theirs = load(copy).pread(0, disk.size)
        ours = replayed(moved)
        assert_equal_but_superblocks(ours, theirs, journal_blocks(disk)[0])
        assert ours[(BLOCKS - 60) * BLOCK :] == straight[(BLOCKS - 60) * BLOCK :]


def log_of(disk: MemoryDisk) -> list[tuple[int, int, int]]:
    """The control blocks of a log: (disk block, kind, sequence)."""
    found = []
    for number in journal_blocks(disk)[1:]:
        magic, kind, sequence = struct.unpack(">4sII", disk.pread(number * BLOCK, 12))
        if magic == journal.MAGIC:
            found.append((number, kind, sequence))
    return found


@pytest.mark.parametrize("kind", ["v2", "v3"])
@pytest.mark.parametrize("what", ["descriptor", "data", "revoke", "commit"])
def test_a_wrong_checksum_in_a_committed_transaction_is_refused(
    *, make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path, kind: str, what: str
) -> None:
    disk = load(write_journal(make_image, debugfs, tmp_path, kind, 5))
    wanted = {"descriptor": 1, "data": 1, "commit": 2, "revoke": 5}[what]
    # The last one: no later transaction can revoke or supersede what it says.
    number = [block for block, found, _ in log_of(disk) if found == wanted][-1]
    at = number * BLOCK + (BLOCK if what == "data" else 0) + 600
    disk.pwrite(at, bytes([disk.pread(at, 1)[0] ^ 1]))
    with pytest.raises(RefusedError, match=r"journal .* (wrong|corrupt)|of its journal"):
        mounted.open_filesystem(disk)


@pytest.mark.parametrize("kind", ["v3", "none"])
def test_an_uncommitted_transaction_is_left_out_even_if_torn(
    *, make_image: Make, debugfs: Debugfs, run: Run, load: Load, tmp_path: Path, kind: str
) -> None:
    disk = load(write_journal(make_image, debugfs, tmp_path, kind, 3))
    commits = [entry for entry in log_of(disk) if entry[1] == journal.COMMIT]
    last, _, sequence = commits[-1]
    disk.zero(last * BLOCK, BLOCK, may_punch=False)
    torn = next(block for block, _, found in log_of(disk) if found == sequence)
    disk.pwrite(torn * BLOCK + 512, bytes(512))
    copy = tmp_path / "copy"
    copy.write_bytes(disk.pread(0, disk.size))
    run("e2fsck", "-y", "-E", "journal_only", copy)
    theirs = load(copy).pread(0, disk.size)
    assert_equal_but_superblocks(replayed(disk), theirs, journal_blocks(disk)[0])


def test_without_the_flag_the_journal_is_not_replayed(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    image = write_journal(make_image, debugfs, tmp_path, "v3", 1)
    debugfs(image, ["feature -needs_recovery"])
    disk = load(image)
    assert replayed(disk) == disk.pread(0, disk.size)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\0"),  # no magic number
        (12, struct.pack(">I", 4096)),  # another block size
        (28, struct.pack(">I", 5000)),  # a start behind its end
        (40, b"\x80"),  # an unknown feature
        (0xFC, b"\0\0\0\0"),  # a wrong checksum
    ],
)
def test_an_impossible_journal_superblock_is_refused(
    *, make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path, at: int, value: bytes
) -> None:
    disk = load(write_journal(make_image, debugfs, tmp_path, "v3", 1))
    disk.pwrite(journal_blocks(disk)[0] * BLOCK + at, value)
    with pytest.raises(RefusedError, match="journal"):
        mounted.open_filesystem(disk)


def test_an_external_journal_is_refused(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    image = make_image("-t", "ext4", "-O", "^metadata_csum")
    debugfs(image, ["ssv journal_inum 0", "ssv journal_dev 0x1234", "feature needs_recovery"])
    with pytest.raises(RefusedError, match="another device"):
        mounted.open_filesystem(load(image))


def fast_commit_disk(make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path) -> MemoryDisk:
    options = ("-t", "ext4", "-b", str(BLOCK), "-O", "fast_commit", "-J", "size=2")
    image = make_image(*options, size=f"{BLOCKS}k")
    debugfs(image, ["jo -c -v 3", *transactions(random.Random(1), tmp_path, 3), "jc"])
    disk = load(image)
    # debugfs does not set the journal's own flag, which the kernel does at the first mount.
    at = journal_blocks(disk)[0] * BLOCK
    raw = bytearray(disk.pread(at, 1024))
    raw[0x2B] |= journal.FAST_COMMIT
    raw[0xFC:0x100] = bytes(4)
    raw[0xFC:0x100] = struct.pack(">I", crc32c(0xFFFFFFFF, bytes(raw)))
    disk.pwrite(at, bytes(raw))
    return disk


def test_fast_commits_are_refused_unless_stale(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    disk = fast_commit_disk(make_image, debugfs, load, tmp_path)
    blocks = journal_blocks(disk)
    (reserved,) = struct.unpack(">I", disk.pread(blocks[0] * BLOCK + 0x54, 4))
    area = blocks[len(blocks) - (reserved or 256) + 1] * BLOCK
    without = replayed(disk)
    committed = max(sequence for _, _, sequence in log_of(disk))
    for sequence in (committed, committed + 2):
        disk.pwrite(area, struct.pack("<HHII", journal.FAST_COMMIT_HEAD, 8, 0, sequence))
        assert replayed(disk)[(BLOCKS - 60) * BLOCK :] == without[(BLOCKS - 60) * BLOCK :]
    disk.pwrite(area, struct.pack("<HHII", journal.FAST_COMMIT_HEAD, 8, 0, committed + 1))
    with pytest.raises(RefusedError, match="fast commits"):
        mounted.open_filesystem(disk)


def bitwise(seed: int, data: bytes) -> int:
    """The checksum of the first kind, bit by bit."""
    for byte in data:
        seed ^= byte << 24
        for _ in range(8):
            seed = (seed << 1 ^ (0x04C11DB7 if seed >> 31 else 0)) & 0xFFFFFFFF
    return seed


def test_transaction_checksums_of_the_first_kind(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    data = random.Random(4).randbytes(333)
    assert crc32_be(0xFFFFFFFF, data) == bitwise(0xFFFFFFFF, data)
    assert crc32_be(0x12345678, data) == bitwise(0x12345678, data)
    disk = load(write_journal(make_image, debugfs, tmp_path, "none", 2))
    before = replayed(disk)
    disk.pwrite(journal_blocks(disk)[0] * BLOCK + 0x27, bytes([journal.COMPAT_CHECKSUM]))
    blocks = journal_blocks(disk)[1:]
    # Give every commit the checksum over the descriptors and data before it, as the kernel does.
    running, left = 0xFFFFFFFF, 0
    for number in blocks:
        block = disk.pread(number * BLOCK, BLOCK)
        if left:
            running, left = bitwise(running, block), left - 1
        elif block[:8] == journal.MAGIC + b"\0\0\0\1":
            running, left = bitwise(running, block), count_of(block)
        elif block[:8] == journal.MAGIC + b"\0\0\0\2":
            disk.pwrite(number * BLOCK + 12, bytes([1, 4, 0, 0]) + struct.pack(">I", running))
            running = 0xFFFFFFFF
    assert replayed(disk)[(BLOCKS - 60) * BLOCK :] == before[(BLOCKS - 60) * BLOCK :]
    disk.pwrite(blocks[1] * BLOCK + 77, b"other")  # the first descriptor's first data
    with pytest.raises(RefusedError, match="transaction 1 of its journal is corrupt"):
        mounted.open_filesystem(disk)


def count_of(descriptor: bytes) -> int:
    """The tags of a descriptor block with 32-bit numbers and without checksums."""
    at, count = 12, 0
    while at + 8 <= BLOCK:
        (flags,) = struct.unpack_from(">H", descriptor, at + 6)
        count += 1
        at += 8 if flags & journal.TAG_SAME_UUID else 24
        if flags & journal.TAG_LAST:
            break
    return count
