"""Disks made in bad faith: seconds, bounded memory, and what cannot be told is said so.

What is asked of them would be quadratic in the disk's size, or in what it says it has.
"""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles import lvm
from nbdproxy.oracles.check import check, scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.faults import RefusedError
from nbdproxy.oracles.ext4.filesystem import STEPS_MAX, Filesystem
from nbdproxy.oracles.ext4.hashes import name_hash
from nbdproxy.oracles.ext4.inode import InodeFlag
from nbdproxy.oracles.ext4.owners import map_filesystem
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.partitions import disk_layout
from nbdproxy.oracles.qcow2 import MAGIC, Qcow2Device, Qcow2Error
from nbdproxy.oracles.survey import survey
from tests.attacks.test_sizes import head, quickly
from tests.support.serving import tool

BLOCK = 4096
SIZE = 16 << 20
BLOCKS = SIZE // BLOCK
FIRST, COUNT = BLOCKS // 2, BLOCKS // 4
"""Blocks that a forged folder has."""


@contextmanager
def within(mebibytes: int) -> Iterator[None]:
    """Fail if the block takes more memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


def made(folder: Path, *options: str) -> bytearray:
    (folder / "root/app").mkdir(parents=True)
    (folder / "root/app/big").write_bytes(b"x")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    words = ("-q", "-F", "-b", str(BLOCK), "-O", "^metadata_csum,^resize_inode", *options)
    tool("mke2fs", "-t", "ext4", *words, "-d", folder / "root", image)
    return bytearray(image.read_bytes())


def become_folder(raw: bytearray, *, flags: int = 0) -> None:
    """Give /app the blocks from FIRST on."""
    filesystem = Filesystem(MemoryDisk(bytes(raw)))
    node = filesystem.lookup(b"/app")
    assert node is not None
    at = filesystem.inode_offset(node.number)
    tree = head(1, 4, 0) + struct.pack("<IHHI", 0, COUNT, 0, FIRST)
    raw[at + 4 : at + 8] = struct.pack("<I", COUNT * BLOCK)
    raw[at + 0x20 : at + 0x24] = struct.pack("<I", InodeFlag.EXTENTS | flags)
    raw[at + 0x28 : at + 0x28 + 60] = tree.ljust(60, b"\0")


def full_of_names(number: int) -> bytes:
    """A block with as many names of one file as there can be."""
    count = BLOCK // 12
    names = (
        bytes(0x40 + (n >> shift & 63) for shift in (18, 12, 6, 0))
        for n in range(number * count, (number + 1) * count)
    )
    found = b"".join(struct.pack("<IHBB4s", 12, 12, 4, 1, name) for name in names)
    return found[:-8] + struct.pack("<HBB4s", 12 + BLOCK % 12, 4, 1, found[-4:]).ljust(
        8 + BLOCK % 12, b"\0"
    )


def files(count: int) -> Manifest:
    return Manifest(tuple(Entry(f"/app/x{n}", digest([b""]), 0) for n in range(count)))


@pytest.mark.parametrize("is_indexed", [False, True])
def test_a_folder_of_millions_of_names(tmp_path: Path, is_indexed: bool) -> None:
    raw = made(tmp_path)
    for number in range(COUNT):
        raw[(FIRST + number) * BLOCK : (FIRST + number + 1) * BLOCK] = full_of_names(number)
    become_folder(raw, flags=InodeFlag.INDEX * is_indexed)
    disk = MemoryDisk(bytes(raw))
    with quickly(15):
        found = check(disk, files(30))
        with pytest.raises(FilesystemError):
            scan(disk)
        map_filesystem(disk)
    assert set(found.conditions.values()) <= {Condition.CANNOT_BE_TOLD, Condition.UNREADABLE}


def test_names_of_one_hash_in_all_blocks(tmp_path: Path) -> None:
    """The kernel goes through all that begin with the hash, for each name again."""
    raw = made(tmp_path)
    sb = Filesystem(MemoryDisk(bytes(raw))).superblock
    wanted = name_hash(0, b"x0", sb.hash_seed, is_unsigned=sb.has_unsigned_hash)
    root = struct.pack("<IHBB4sIHBB4s", 2, 12, 1, 2, b".", 2, BLOCK - 12, 2, 2, b"..")
    root += struct.pack("<IBBBB", 0, 0, 8, 1, 0)

    def entries(room: int, blocks: Iterator[int]) -> bytes:
        first = struct.pack("<HHI", room, room, next(blocks))
        return first + b"".join(struct.pack("<II", wanted | 1, b) for b in islice(blocks, room - 1))

    in_root, in_node = (BLOCK - 32) // 8, (BLOCK - 8) // 8
    blocks = [root + entries(in_root, iter(range(1, in_root + 1)))]
    leaves = cycle(range(in_root + 1, COUNT))
    empty = struct.pack("<IHBB", 0, BLOCK, 0, 0)
    blocks += [empty + entries(in_node, leaves) for _ in range(in_root)]
    for number in range(COUNT):
        block = blocks[number] if number < len(blocks) else full_of_names(number)
        raw[(FIRST + number) * BLOCK : (FIRST + number + 1) * BLOCK] = block
    become_folder(raw, flags=InodeFlag.INDEX)
    with quickly():
        found = check(MemoryDisk(bytes(raw)), files(1))
    assert found.conditions == {"/app/x0": Condition.CANNOT_BE_TOLD}


def with_log(raw: bytearray, blocks: list[bytes], compat: int) -> MemoryDisk:
    """Put blocks into the journal, and ask for recovery."""
    filesystem = Filesystem(MemoryDisk(bytes(raw)))
    runs = filesystem.runs(filesystem.inode(filesystem.superblock.journal_inode))
    log = [run.physical + i for run in runs for i in range(run.blocks)]
    at = log[0] * BLOCK
    struct.pack_into(">I", raw, at + 28, 1)
    struct.pack_into(">III", raw, at + 0x24, compat, 0, 0)
    for number, block in zip(log[1:], cycle(blocks), strict=False):
        raw[number * BLOCK : (number + 1) * BLOCK] = block.ljust(BLOCK, b"\0")
    raw[1024 + 0x60] |= 4
    return MemoryDisk(bytes(raw))


def test_a_log_whose_blocks_all_lead_to_all_others(tmp_path: Path) -> None:
    raw = made(tmp_path, "-J", "size=4")
    tags = b"".join(struct.pack(">IHH", 9, 0, 2) for _ in range((BLOCK - 12) // 8))
    disk = with_log(raw, [struct.pack(">4sII", journal.MAGIC, 1, 1) + tags], compat=1)
    with quickly(), within(64), pytest.raises(RefusedError, match="in a circle"):
        journal.replay(Filesystem(disk))


def test_a_log_that_revokes_more_blocks_than_there_are(tmp_path: Path) -> None:
    raw = made(tmp_path, "-J", "size=4")
    room = (BLOCK - 16) // 4
    blocks = [
        struct.pack(">4sIII", journal.MAGIC, 5, 1, BLOCK)
        + struct.pack(f">{room}I", *range(BLOCKS + n * room, BLOCKS + (n + 1) * room))
        for n in range(300)
    ]
    disk = with_log(raw, [*blocks, struct.pack(">4sII", journal.MAGIC, 2, 1)], compat=0)
    with quickly(), within(16):
        assert journal.replay(Filesystem(disk)) == {}


def test_links_that_lead_through_thousands_of_names(tmp_path: Path) -> None:
    below = tmp_path / "root/app"
    below.mkdir(parents=True)
    (below / "d").mkdir()
    way = "/app" + "/d/.." * 400 + "/l"
    for number in range(40):
        (below / f"l{number}").symlink_to(way + str(number + 1))
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    tool("mke2fs", "-q", "-F", "-b", str(BLOCK), "-t", "ext4", "-d", tmp_path / "root", image)
    entry = Entry("/app/l0", digest([b""]), 0)
    with quickly():
        found = check(MemoryDisk(image.read_bytes()), Manifest((entry,)))
    assert found.conditions == {"/app/l0": Condition.CANNOT_BE_TOLD}
    assert f"more than {STEPS_MAX} names" in str(found.reason)


def test_a_partition_table_of_thousands_that_overlap() -> None:
    entries = b"".join(
        struct.pack("<16s16sQQQ72s", b"\1" * 16, struct.pack("<QQ", n, n), 4096, 30000, 0, b"")
        for n in range(8192)
    )
    last = SIZE // 512 - 1
    raw = bytearray(SIZE)
    raw[446:462] = struct.pack("<B3sB3sII", 0, b"\0\0\2", 0xEE, b"\xff\xff\xff", 1, last)
    raw[510:512] = b"\x55\xaa"
    fields = (b"EFI PART", 65536, 92, 0, 0, 1, last, 40, last - 40, b"g" * 16, 2, 8192, 128)
    header = struct.pack("<8sIIIIQQQQ16sQIII", *fields, zlib.crc32(entries))
    raw[512:604] = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    raw[1024 : 1024 + len(entries)] = entries
    disk = MemoryDisk(bytes(raw))
    with quickly():
        assert len(disk_layout(disk).slices) == 256
        survey(disk)


def test_a_partition_table_that_says_it_has_2_to_the_32() -> None:
    last = SIZE // 512 - 1
    raw = bytearray(SIZE)
    raw[446:462] = struct.pack("<B3sB3sII", 0, b"\0\0\2", 0xEE, b"\xff\xff\xff", 1, last)
    raw[510:512] = b"\x55\xaa"
    fields = (b"EFI PART", 65536, 92, 0, 0, 1, last, 40, last - 40, b"g" * 16, 2, 2**32 - 1, 128)
    header = struct.pack("<8sIIIIQQQQ16sQIII", *fields, 0)
    raw[512:604] = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    disk = MemoryDisk(bytes(raw))
    with quickly(), within(16):
        assert len(disk_layout(disk).slices) == 1


@pytest.mark.parametrize(
    "text",
    ['a = "' + '\\"' * 200_000, "a {" * 100_000, "a = [" + "1," * 100_000, "a = " + "9" * 400_000],
)
def test_volume_metadata_that_goes_on_and_on(text: str) -> None:
    with quickly(), pytest.raises((ValueError, IndexError)):
        lvm._parse(text)


@pytest.mark.parametrize("bits", [9, 16])
def test_tables_of_a_qcow2_that_lead_to_the_same_place(bits: int) -> None:
    cluster, count = 1 << bits, (SIZE >> bits) * 3 // 4
    first = 1 + -(-count * 8 >> bits)
    size = count * cluster // 8 << bits
    fields = (MAGIC, 3, 0, 0, bits, size, 0, count, cluster, 0, 0, 0, 0)
    raw = bytearray(SIZE)
    header = struct.pack(">4sIQIIQIIQQIIQ", *fields) + struct.pack(">QQQII", 0, 0, 0, 4, 104)
    raw[: len(header)] = header
    raw[cluster : cluster + 8 * count] = struct.pack(
        f">{count}Q", *((first + n) << bits for n in range(count))
    )
    table = struct.pack(">QQ", 1 << 20, (1 << 20) + (cluster << 4)) * (cluster // 16)
    raw[first << bits : (first + count) << bits] = table * count
    with quickly(15), pytest.raises(Qcow2Error, match="the same clusters again and again"):
        device = Qcow2Device(MemoryDisk(bytes(raw)))
        for _ in device.runs(0, device.size):
            pass


def test_refcounts_of_a_qcow2_that_are_the_whole_file() -> None:
    bits = 16
    fields = (MAGIC, 3, 0, 0, bits, 1 << 30, 0, 2, 1 << bits, 2 << bits, 2**32 - 1, 0, 0)
    raw = bytearray(b"".join(struct.pack(">Q", n << 16) for n in range(SIZE // 8)))
    header = struct.pack(">4sIQIIQIIQQIIQ", *fields) + struct.pack(">QQQII", 0, 0, 0, 4, 104)
    raw[: 2 << bits] = header.ljust(2 << bits, b"\0")
    disk = MemoryDisk(bytes(raw))
    with quickly(), within(64):
        assert sum(1 for _ in Qcow2Device(disk).structures()) < 100_000
