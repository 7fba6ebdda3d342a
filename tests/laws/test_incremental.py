"""Laws: the incremental oracle says what the plain one says, and depends on what it says it reads.

A real filesystem with an active journal goes through states that a disk may get into: bytes turn,
blocks become zero, old, or those of a later state of the same filesystem. After each step the
incremental check, told only what changed, equals the plain one on the whole state. And a state in
which everything outside of `reads` is garbage gets the same findings. Not covered: two partitions
with a filesystem; see tests/oracles.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Verdict, check, scan
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.filesystem import ROOT, Filesystem
from nbdproxy.oracles.ext4.layout import metadata_extents
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.manifest import Manifest
from tests.support.serving import tool

SECTOR = 512
FILES = 40
BLOCKS = 4096
PARTITION = 1 << 20
UUID = "6f0a4d8e-1c9b-4a57-9d35-b1d1c2f7a3e4"
KINDS = {
    "checksums": ("4096", "-t ext4", "jo -c -v 3", PARTITION),
    "no checksums": ("1024", "-t ext4 -O ^metadata_csum,^64bit", "jo", 0),
    "indirect blocks": ("1024", "-t ext3", "jo", PARTITION),
}


@dataclass(frozen=True)
class World:
    """A disk with files, the same disk a while later, and where to look for trouble."""

    good: bytes
    later: bytes
    manifest: Manifest

    @cached_property
    def places(self) -> list[list[int]]:
        """Sectors by what they are: of the mount, metadata, journal and directories, all read."""
        oracle = IncrementalCheck(self.manifest)
        oracle.check(MemoryDisk(self.good), None)
        read = [at for extent in oracle.reads for at in _sectors(extent)]
        offset = PARTITION if self.good[510:512] == b"\x55\xaa" else 0
        meta = metadata_extents(MemoryDisk(self.good[offset:]))
        moved = [Extent(offset + extent.offset, extent.length) for extent in meta]
        fixed = [at for extent in moved for at in _sectors(extent)]
        differing = [
            at
            for at in range(0, len(self.good), SECTOR)
            if self.good[at : at + SECTOR] != self.later[at : at + SECTOR]
        ]
        root = Filesystem(MemoryDisk(self.good[offset:])).inode_offset(ROOT)
        return [read, fixed, differing, [0, offset + 1024, offset + root // SECTOR * SECTOR]]


def _sectors(extent: Extent) -> range:
    return range(extent.offset // SECTOR * SECTOR, extent.end, SECTOR)


def _block(image: bytes, number: int, size: int) -> bytes:
    return image[number * size : (number + 1) * size]


def fill(folder: Path, rng: random.Random) -> None:
    """Write files in some directories, and symbolic links in the inode and outside of it."""
    for number in range(FILES):
        path = folder / f"app{number % 3}" / f"part{number % 7}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([0, 10, 3000, 5000, 40_000])))
    (folder / "link").symlink_to("app1/part1")
    (folder / "long").symlink_to("app1/../" * 20 + "app1/part1")


def journal_commands(good: bytes, later: bytes, block: int, folder: Path, start: str) -> list[str]:
    """Put some of the blocks that differ into the journal: a state after a crash.

    The root's inode is read from its own place, so that it can be spoiled there.
    """
    root = Filesystem(MemoryDisk(good)).inode_offset(ROOT) // block
    numbers = [
        number
        for number in range(2, len(good) // block)
        if number != root and _block(good, number, block) != _block(later, number, block)
    ]
    commands = [start]
    for first in range(0, min(len(numbers), 90), 30):
        part = numbers[first : first + 30]
        file = folder / f"transaction{first}"
        file.write_bytes(b"".join(_block(later, number, block) for number in part))
        commands.append(f"jw -b {','.join(map(str, part))} {file}")
    return [*commands, "jc"]


def world(kind: str, folder: Path) -> World:
    """Make a world; partitioned ones have an MBR."""
    size, options, start, offset = KINDS[kind]
    rng = random.Random(kind)
    fill(folder / "root", rng)
    image, command = folder / "image", folder / "commands"
    tool(
        *(
            "mke2fs",
            "-q",
            "-F",
            *options.split(),
            "-b",
            size,
            "-J",
            f"size={int(size) >> 10}",
        ),
        *("-U", UUID, "-E", f"hash_seed={UUID}"),
        *("-N", "256", "-d", folder / "root", image, str(BLOCKS)),
    )
    good = image.read_bytes()
    (folder / "new").write_bytes(rng.randbytes(9000))
    command.write_text(
        "".join(f"rm /app1/part{n}/file{m}\n" for n, m in ((1, 1), (4, 4)))
        + "".join(f"write {folder / 'new'} /app{n % 3}/new{n}\n" for n in range(20))
    )
    tool("debugfs", "-w", "-f", command, image)
    later = image.read_bytes()
    image.write_bytes(good)
    lines = journal_commands(good, later, int(size), folder, start)
    command.write_text("".join(f"{line}\n" for line in lines))
    tool("debugfs", "-w", "-f", command, image)
    good = image.read_bytes()
    assert journal.replay(Filesystem(MemoryDisk(good)))
    found = scan(MemoryDisk(good)).entries
    (through,) = (entry for entry in found if entry.path == "/app1/part1/file22")
    paths = ("/link/file22", "/long/file22", "/app1/part1/gone", "/app1/new/gone", "/gone", "/app0")
    manifest = Manifest((*found, *(replace(through, path=path) for path in paths)))
    table = bytearray(offset)
    if offset:
        table[446:462] = struct.pack("<8xII", offset // SECTOR, len(good) // SECTOR)
        table[450] = 0x83
        table[510:512] = b"\x55\xaa"
    return World(bytes(table) + good, bytes(table) + later, manifest)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {kind: world(kind, tmp_path_factory.mktemp("world")) for kind in KINDS}


class Walk:
    """A disk on its way, and the two oracles beside it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk = MemoryDisk(world.good)
        self.oracle = IncrementalCheck(world.manifest)
        self.changed: list[Extent] | None = None
        self.spoiled: set[int] = set()
        self.seen: set[Verdict] = set()
        self.judge()

    def judge(self) -> None:
        """Compare the two oracles."""
        found = self.oracle.check(self.disk, self.changed)
        assert found == check(self.disk, self.world.manifest)
        self.changed = []
        self.seen.add(found.verdict)

    def spoil(self, place: int, which: int, how: int, byte: int) -> None:
        """Change up to 4 KiB of the disk; `which` and `byte` are reduced to what is there."""
        sectors = self.world.places[place]
        at = sectors[which % len(sectors)]
        length = (1, SECTOR, 4096)[byte % 3] if how else 1
        at += byte % SECTOR if length == 1 else 0
        length = min(length, self.disk.size - at)
        data = (
            bytes([self.disk.pread(at, 1)[0] ^ (1 << byte % 8)]),
            bytes(length),
            self.world.later[at : at + length],
            self.world.good[at : at + length],
        )[how]
        self.write(at, data)
        self.spoiled.update(_sectors(Extent(at, len(data))))

    def mend(self, sectors: Sequence[int]) -> None:
        """Make some sectors good again."""
        for at in sectors:
            self.write(at, self.world.good[at : at + SECTOR])
            self.spoiled.discard(at)

    def write(self, at: int, data: bytes) -> None:
        """Write, and remember that for the oracle."""
        self.disk.pwrite(at, data)
        assert self.changed is not None
        self.changed.append(Extent(at, len(data)))

    def assert_that_reads_suffice(self, rng: random.Random) -> None:
        """Everything else may be garbage."""
        other = MemoryDisk(rng.randbytes(self.disk.size))
        for extent in self.oracle.reads:
            if extent.offset < self.disk.size:
                length = min(extent.end, self.disk.size) - extent.offset
                other.pwrite(extent.offset, self.disk.pread(extent.offset, length))
        expected = check(self.disk, self.world.manifest)
        assert check(other, self.world.manifest) == expected
        assert self.oracle.check(self.disk, []) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_walk(worlds: dict[str, World], kind: str) -> None:
    rng = random.Random(f"walk {kind}")
    walk = Walk(worlds[kind])
    for step in range(250):
        for _ in range(rng.choice([1, 1, 2, 5])):
            walk.spoil(
                rng.choices(range(4), [6, 3, 3, 0.3])[0],
                rng.randrange(1 << 30),
                rng.choices(range(4), [2, 1, 3, 2])[0],
                rng.randrange(1 << 16),
            )
        if rng.random() < 0.5:
            count = len(walk.spoiled) if rng.random() < 0.4 else len(walk.spoiled) // 2
            walk.mend(rng.sample(sorted(walk.spoiled), count))
        if step % 50 == 20:
            walk.spoil(3, 1, 1, 1)  # for once no superblock, whatever chance brought
        walk.judge()
        if step % 5 == 0:
            walk.assert_that_reads_suffice(rng)
    assert walk.seen == {Verdict.FAIL, Verdict.UNKNOWN}


spoilings = st.tuples(
    st.integers(0, 3), st.integers(0, 1 << 16), st.integers(0, 3), st.integers(0, 1 << 12)
)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.one_of(st.lists(spoilings, max_size=4), st.none()), max_size=8))
def test_any_short_walk(
    worlds: dict[str, World],
    kind: str,
    steps: list[list[tuple[int, int, int, int]] | None],
) -> None:
    walk = Walk(worlds[kind])
    for step in steps:
        if step is None:
            walk.mend(sorted(walk.spoiled))
        else:
            for spoiling in step:
                walk.spoil(*spoiling)
        walk.judge()
    walk.assert_that_reads_suffice(random.Random(1))
