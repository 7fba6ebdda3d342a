"""Big directories on their way from one state to the next, and disks on which that went wrong.

A kernel fills, thins out and renames the names of one directory, and the disk is kept after each
step: unmounted, or synced with its journal still to be replayed. `drawn` makes disks of two of
these: sectors and blocks of the directory, its inodes and the journal from one or the other, as a
crash leaves them, and some that no crash leaves: zeroes, turned bits, right checksums on nonsense.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import numpy as np

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Findings, check
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.inode import Inode
from nbdproxy.oracles.ext4.layout import journal_extents
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.mounts import ONLY
from nbdproxy.oracles.quick import QUICK
from tests.support.serving import tool

SECTOR = 512
SIZE = 8 << 20
CONTENTS = 16
ASKED_MAX = 40  # files of a manifest: a state is asked of one of several


@dataclass(frozen=True)
class Recipe:
    """One filesystem and the names in its directory `/d`.

    `width` is how long the names are, about.
    """

    title: str
    options: str
    names: int
    width: int
    is_folded: bool = False

    def name(self, number: int) -> str:
        """Return one of its names; every fifth is not ASCII."""
        tail = "ë" if number % 5 == 0 else "A"
        return f"{number}-{'n' * (self.width + number * 7 % 11)}{tail}"


RECIPES = (
    Recipe("ext2 1k", "-t ext2 -b 1024", 700, 30),
    Recipe("ext2 4k", "-t ext2 -b 4096", 1200, 40),
    Recipe("ext2 1k, no index", "-t ext2 -b 1024 -O ^dir_index", 200, 40),
    Recipe("ext2 1k, two levels", "-t ext2 -b 1024", 900, 200),
    Recipe("ext3 1k", "-t ext3 -b 1024", 700, 30),
    Recipe("ext3 2k, two levels", "-t ext3 -b 2048", 2400, 220),
    Recipe("ext4 1k", "-t ext4 -b 1024", 700, 30),
    Recipe("ext4 4k", "-t ext4 -b 4096", 1200, 40),
    Recipe("ext4 1k, two levels", "-t ext4 -b 1024", 900, 200),
    Recipe("ext4 1k, no checksums", "-t ext4 -b 1024 -O ^metadata_csum", 700, 30),
    Recipe("ext4 1k, large_dir", "-t ext4 -b 1024 -O large_dir,^metadata_csum", 900, 200),
    Recipe("ext4 1k, no index", "-t ext4 -b 1024 -O ^dir_index", 200, 40),
    Recipe("ext4 1k, inline data", "-t ext4 -b 1024 -O inline_data -I 512", 300, 30),
    Recipe("ext4 4k, no journal", "-t ext4 -b 4096 -O ^has_journal", 1200, 40),
    Recipe("ext4 1k, casefold", "-t ext4 -b 1024 -O casefold", 700, 30, is_folded=True),
)
HASHES = ("legacy", "half_md4", "tea")


class Step(NamedTuple):
    """Of the names `first` to `last`, those whose number has a rest of `rest` by `every`."""

    what: str  # make, drop, or move: under the name `by` numbers on
    first: int
    last: int
    every: int = 1
    rest: int = 0
    by: int = 0

    def numbers(self) -> Iterator[int]:
        """Yield the names it is about, by number."""
        return (n for n in range(self.first, self.last) if n % self.every == self.rest)


def plan(recipe: Recipe, rng: random.Random) -> list[list[Step]]:
    """Return what is done between one disk and the next."""
    some, most, every = recipe.names // 8, recipe.names * 2 // 3, rng.randint(2, 5)
    rest = rng.randrange(every)
    return [
        [Step("make", 0, rng.randint(3, some))],
        [Step("make", some, most)],
        [Step("make", most, recipe.names), Step("drop", some, most, every, rest)],
        [
            Step("move", most, recipe.names, every, rest, 100_000),
            Step("make", some, most, every, rest),
        ],
    ]


Grow = Callable[[Recipe, list[Step], bytes], tuple[bytes, bytes]]
"""Mounts a disk, takes steps, and returns it synced, and unmounted."""

_AGENT = """
const fs = require('fs'), { spawnSync } = require('child_process');
const job = JSON.parse(process.argv.at(-2));
const name = (n) => '/mnt/d/' + n + '-' + 'n'.repeat(job.width + n * 7 % 11) +
  (n % 5 === 0 ? '\u00eb' : 'A');
if (!fs.existsSync('/mnt/d')) fs.mkdirSync('/mnt/d');
for (let c = 0; c < job.contents; c++) fs.writeFileSync('/mnt/c' + c, 'content ' + c);
for (const [what, first, last, every, rest, by] of job.steps)
  for (let n = first; n < last; n++) {
    if (n % every !== rest) continue;
    if (what === 'drop') fs.rmSync(name(n), { force: true });
    else if (what === 'move') fs.existsSync(name(n)) && fs.renameSync(name(n), name(n + by));
    else if (!fs.existsSync(name(n))) fs.linkSync('/mnt/c' + n % job.contents, name(n));
  }
process.exit(spawnSync('sync').status);
"""


def in_guest(kernel: KernelOracle) -> Grow:
    """Return what grows directories in the checker guest."""

    def grow(recipe: Recipe, steps: list[Step], before: bytes) -> tuple[bytes, bytes]:
        job = {"width": recipe.width, "contents": CONTENTS, "steps": steps}
        with kernel.mounted(kernel.place(MemoryDisk(before), None)) as guest:
            done = guest.ask("fsck", argv=["/tools/bin/node", "-e", _AGENT, json.dumps(job)])
            assert done["code"] == 0, done["said"]
            synced = guest.pread(0, SIZE)
        return synced, guest.pread(0, SIZE)

    return grow


def formatted(recipe: Recipe, rng: random.Random) -> bytes:
    """Return a disk with an empty filesystem, its hash drawn."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        image.write_bytes(b"")
        image.open("r+b").truncate(SIZE)
        tool("mke2fs", "-q", "-F", *recipe.options.split(), "-U", _uuid(rng), image)
        commands = [
            f"ssv def_hash_version {rng.choice(HASHES)}",
            f"ssv flags {rng.choice((1, 2))}",  # bytes of names count as signed, or not
        ]
        if recipe.is_folded:
            commands += ["mkdir d", "sif d flags 0x40080000"]
        for command in commands:
            tool("debugfs", "-w", "-R", command, image)
        return image.read_bytes()


def _uuid(rng: random.Random) -> str:
    return str(UUID(bytes=rng.randbytes(16), version=4))


@dataclass(frozen=True)
class World:
    """One filesystem's disks in their order, and its names by number, as they are asked for."""

    recipe: Recipe
    disks: tuple[bytes, ...]
    manifests: tuple[Manifest, ...]


def world(recipe: Recipe, grow: Grow, rng: random.Random) -> World:
    """Let a kernel grow a directory."""
    clean = formatted(recipe, rng)
    disks, numbers = [clean], set[int]()
    for steps in plan(recipe, rng):
        synced, clean = grow(recipe, steps, clean)
        disks += [synced, clean]
        for step in steps:
            numbers |= {number + step.by for number in step.numbers()}
    return World(recipe, tuple(disks), tuple(_manifests(recipe, sorted(numbers), rng)))


def _manifests(recipe: Recipe, numbers: list[int], rng: random.Random) -> Iterator[Manifest]:
    rng.shuffle(numbers)
    for at in range(0, len(numbers), ASKED_MAX):
        entries = []
        for number in numbers[at : at + ASKED_MAX]:
            content = b"content %d" % (number % 100_000 % CONTENTS)
            name = recipe.name(number)
            if recipe.is_folded and rng.random() < 0.5:
                name = name.swapcase()
            entries.append(Entry(f"/d/{name}", digest([content]), len(content)))
        yield Manifest(tuple(entries))


class State(NamedTuple):
    """A disk that something went wrong with, what that was, and what to ask of it."""

    title: str
    disk: MemoryDisk
    manifest: Manifest


def drawn(world: World, rng: random.Random) -> Iterator[State]:
    """Yield disks without end."""
    while True:
        first = rng.randrange(len(world.disks) - 1)
        second = min(first + rng.choice((1, 1, 2, 4)), len(world.disks) - 1)
        old, new = world.disks[first], world.disks[second]
        if rng.random() < 0.3:
            old, new = new, old
        disk, words = MemoryDisk(new), [world.recipe.title, f"{first} and {second}"]
        if rng.random() < 0.85:
            words.append(_tear(disk, old, rng))
        if rng.random() < 0.3 or len(words) == 2:
            words.append(_damage(disk, rng))
        yield State(", ".join(words), disk, rng.choice(world.manifests))


def _tear(disk: MemoryDisk, old: bytes, rng: random.Random) -> str:
    """Leave some of what differs as it was."""
    unit = rng.choice((SECTOR, 1024, 4096))
    places = set[int]()
    for source in (disk, MemoryDisk(old)):
        places |= {at - at % unit for at in _places(source, unit, rng.random() < 0.7)}
    now = disk.pread(0, disk.size)
    differing = sorted(at for at in places if now[at : at + unit] != old[at : at + unit])
    share = rng.choice((0.02, 0.1, 0.5, 0.9, 1.0))
    few = rng.randint(1, 3)
    chosen = [at for at in differing if rng.random() < share]
    if rng.random() < 0.4:
        chosen = rng.sample(differing, min(few, len(differing)))
    for at in chosen:
        disk.pwrite(at, old[at : at + unit])
    return f"{len(chosen)} of {len(differing)} pieces of {unit} as they were"


def _folder(disk: MemoryDisk) -> tuple[Filesystem, Inode | None]:
    filesystem = Filesystem(disk)
    try:
        return filesystem, filesystem.lookup(b"/d")
    except FilesystemError:
        return filesystem, None


def _places(disk: MemoryDisk, unit: int, is_narrow: bool) -> list[int]:
    """Return where the directory is on a disk; unless `is_narrow` also its inodes, and the log."""
    filesystem, node = _folder(disk)
    size = filesystem.superblock.block_size
    found: list[tuple[int, int]] = []
    if node is not None:
        with contextlib.suppress(FilesystemError):
            found += [(run.physical * size, run.blocks * size) for run in filesystem.runs(node)]
    if not is_narrow:
        found.append((filesystem.tables[0] * size, 8 * size))
        with contextlib.suppress(FilesystemError):
            found += [(extent.offset, extent.length) for extent in journal_extents(disk)]
    return [at for start, length in found for at in range(start, start + length, unit)]


def _damage(disk: MemoryDisk, rng: random.Random) -> str:
    """Break a block of the directory; half of the time one that the index begins with."""
    filesystem, node = _folder(disk)
    size = filesystem.superblock.block_size
    blocks = sorted(_places(disk, size, is_narrow=True))
    if node is None or not blocks:
        return "nothing to break"
    at = blocks[0] if rng.random() < 0.5 else rng.choice(blocks)
    raw = bytearray(disk.pread(at, size))
    kind = rng.choice(("zeroes", "bits", "index", "moved", "header"))
    if kind == "zeroes":
        start = rng.choice((0, size // 2))
        end = min(size, start + rng.choice((4, SECTOR, size)))
        raw[start:end] = bytes(end - start)
    elif kind == "bits":
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "index":  # counts, hashes and blocks of the root or a node
        start = rng.choice((8, 32)) + 4 * rng.randrange(12)
        raw[start : start + 4] = rng.choice((bytes(4), rng.randbytes(4), raw[36:40], b"\1\0\0\0"))
    elif kind == "moved":
        raw = bytearray(disk.pread(rng.choice(blocks), size))
    else:
        raw[rng.choice((28, 29, 30, 31, *range(24)))] = rng.choice((0, 1, 2, 6, 255))
    if rng.random() < 0.4:
        _sum(raw, filesystem, node)
    disk.pwrite(at, bytes(raw))
    return f"{kind} in block {at // size}"


def _sum(raw: bytearray, filesystem: Filesystem, node: Inode) -> None:
    """Give a block of the directory a right checksum, as an index or as names."""
    if not filesystem.superblock.has_checksums:
        return
    (length,) = struct.unpack_from("<H", raw, 4)
    start = 8 if length == len(raw) else 32
    limit, count = struct.unpack_from("<HH", raw, start)
    tail = start + 8 * limit
    if raw[-12:-4] == b"\0\0\0\0\x0c\0\0\xde":
        struct.pack_into("<I", raw, len(raw) - 4, crc32c(node.seed, bytes(raw[:-12])))
    elif tail + 8 <= len(raw):
        value = crc32c(node.seed, bytes(raw[: start + 8 * count]))
        value = crc32c(value, bytes(raw[tail : tail + 4]) + bytes(4))
        struct.pack_into("<I", raw, tail + 4, value)


@dataclass
class Tally:
    """What came of asking the quick oracle and a kernel of the same disks."""

    states: int = 0
    both: int = 0
    files: int = 0
    unknown: int = 0
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.states} states, {self.both} judged by both; {self.files} files compared, "
            f"{len(self.differences)} differ; {self.unknown} files of these states the quick "
            f"oracle cannot tell"
        )

    def add(self, state: State, quick: Findings, kernel: Findings) -> None:
        """Compare what the two say of a state."""
        self.states += 1
        if quick.conditions and "refuses to mount" in str(kernel.reason):
            self.differences.append(f"{state.title}: the kernel refuses it: {kernel.reason}")
        if not quick.conditions or not kernel.conditions:
            return
        self.both += 1
        for path, said in quick.conditions.items():
            if said is Condition.CANNOT_BE_TOLD:
                self.unknown += 1
                continue
            self.files += 1
            if kernel.conditions[path] is not said:
                one = f"{state.title}: {path}: kernel {kernel.conditions[path]}, quick {said}"
                self.differences.append(one)


def compare(
    kernel: KernelOracle, recipe: Recipe, rng: random.Random, count: int, tally: Tally
) -> None:
    """Draw disks of a recipe, and ask both oracles of them; the quick one incrementally."""
    grown = world(recipe, in_guest(kernel), rng)
    states = drawn(grown, rng)
    real = [kernel.prepare_check(m, earlier={}, mount=ONLY) for m in grown.manifests]
    quick = [QUICK.prepare_check(m, earlier={}, mount=ONLY) for m in grown.manifests]
    last: dict[int, MemoryDisk] = {}
    for _ in range(count):
        state = next(states)
        which = grown.manifests.index(state.manifest)
        before = last.get(which)
        changed = None if before is None else _changed(before, state.disk)
        last[which] = state.disk
        said = quick[which].check(state.disk, changed)
        assert said == check(state.disk, state.manifest), state.title
        tally.add(state, said, real[which].check(state.disk, None))


def _changed(before: MemoryDisk, after: MemoryDisk) -> list[Extent]:
    one, other = (np.frombuffer(disk.pread(0, SIZE), np.uint8) for disk in (before, after))
    sectors = np.flatnonzero((one != other).reshape(-1, SECTOR).any(axis=1)).tolist()
    return [Extent(at * SECTOR, SECTOR) for at in sectors]
