"""Whose block is this: compared, block by block, with what debugfs and dumpe2fs say."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import scan
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.owners import Owner, OwnerMap, owners

Run = Callable[..., str]
Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]
Load = Callable[[Path], MemoryDisk]

KIB = 1 << 10
KINDS = {
    "ext4": ("-t", "ext4", "-b", "1024"),
    "4 KiB blocks": ("-t", "ext4", "-b", "4096", "-I", "256"),
    "indirect blocks": ("-t", "ext3", "-b", "1024"),
    "several groups": ("-t", "ext4", "-b", "1024", "-g", "2048", "-J", "size=1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    rng = random.Random(1)
    for number in range(30):
        path = root / f"app{number % 3}/part{number % 5}/file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([0, 10, 5000, 400_000])))
    (root / "hard").hardlink_to(root / "app1/part1/file1")
    (root / "long").symlink_to("x" * 100)
    return root


def by_block(device: MemoryDisk, size: int) -> list[Owner]:
    """The owner of each block."""
    found = OwnerMap(device)
    result = []
    for at in range(0, device.size, size):
        (owner,) = found.of(Extent(at, size))
        assert owner.extent == Extent(at, size)
        result.append(owner)
    return result


def blocks_of(debugfs: Debugfs, image: Path, path: str) -> set[int]:
    """The blocks of a file, those of its extent tree too."""
    lines = re.findall(r"^[\d ]+$", debugfs(image, [f"blocks {path}"]), re.M)
    return {int(word) for line in lines for word in line.split()}


def free_blocks(dumped: str) -> set[int]:
    """The free blocks that dumpe2fs lists."""
    parts = [
        part.partition("-")
        for line in re.findall(r"^  Free blocks: (.+)$", dumped, re.M)
        for part in line.split(", ")
    ]
    return {n for low, _, high in parts for n in range(int(low), int(high or low) + 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_belongs_to_whom_debugfs_says(
    *, make_image: Make, debugfs: Debugfs, run: Run, load: Load, folder: Path, kind: str
) -> None:
    image = make_image(*KINDS[kind], folder=folder)
    disk = load(image)
    size = Filesystem(disk).superblock.block_size
    found = by_block(disk, size)
    paths = [entry.path for entry in scan(disk).entries]
    for path in [*paths, "/", "/app1", "/app1/part1", "/long"]:
        ours = {
            number
            for number, owner in enumerate(found)
            if path in owner.paths and owner.kind is not OwnerKind.INODE_TABLE
        }
        assert ours == blocks_of(debugfs, image, path), path
    ours = {number for number, owner in enumerate(found) if owner.kind is OwnerKind.FREE}
    assert ours == free_blocks(run("dumpe2fs", image))
    at_once = {
        block
        for owner in owners(disk, [Extent(0, disk.size)])
        if owner.kind is OwnerKind.FREE
        for block in range(owner.extent.offset // size, owner.extent.end // size)
    }
    assert at_once == ours
    journal = {number for number, owner in enumerate(found) if owner.kind is OwnerKind.JOURNAL}
    assert journal and journal <= blocks_of(debugfs, image, "<8>")


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_places_are_where_dumpe2fs_says(
    make_image: Make, run: Run, load: Load, kind: str
) -> None:
    image = make_image(*KINDS[kind])
    disk = load(image)
    found = by_block(disk, Filesystem(disk).superblock.block_size)
    text = run("dumpe2fs", image)
    for words, owner in {
        r"superblock at (\d+)()": OwnerKind.SUPERBLOCK,
        r"Group descriptors at (\d+)-(\d+)": OwnerKind.DESCRIPTORS,
        r"Block bitmap at (\d+)()": OwnerKind.BLOCK_BITMAP,
        r"Inode bitmap at (\d+)()": OwnerKind.INODE_BITMAP,
        r"Inode table at (\d+)-(\d+)": OwnerKind.INODE_TABLE,
    }.items():
        runs = re.findall(words, text)
        theirs = {n for low, high in runs for n in range(int(low), int(high or low) + 1)}
        assert theirs
        assert {n for n, other in enumerate(found) if other.kind is owner} == theirs, words


def test_an_inode_table_names_the_files_and_data_says_where(
    make_image: Make, load: Load, folder: Path
) -> None:
    disk = load(make_image(*KINDS["4 KiB blocks"], folder=folder))
    filesystem = Filesystem(disk)
    node = filesystem.lookup(b"/app1/part1/file1")
    big = max(scan(disk).entries, key=lambda entry: entry.size or 0)
    other = filesystem.lookup(big.path.encode())
    assert node is not None and other is not None
    where = filesystem.inode_offset(node.number)
    (inode,) = owners(disk, [Extent(where, 256)])
    assert inode.kind is OwnerKind.INODE_TABLE
    assert set(inode.paths) == {"/hard", "/app1/part1/file1"}
    (table,) = owners(disk, [Extent(where & -4096, 4096)])
    assert len(table.paths) > 3
    assert re.fullmatch(r"inode table \(/.+, /.+, /.+ and \d+ more\)", table.words())
    run = filesystem.runs(other)[0]
    (data,) = owners(disk, [Extent(run.physical * 4096 + 4000, 8192)])
    assert data.words() == f"file data of {big.path}, bytes 4000-12191"
    assert (data.path, data.offset) == (big.path, 4000)


def test_a_file_with_a_hole_says_where_behind_it(
    make_image: Make, load: Load, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    with (tmp_path / "root/holes").open("wb") as file:
        file.write(b"a" * 4096)
        file.seek(1024 * KIB)
        file.write(b"b" * 4096)
    disk = load(make_image("-t", "ext4", "-b", "4096", folder=tmp_path / "root"))
    filesystem = Filesystem(disk)
    node = filesystem.lookup(b"/holes")
    assert node is not None
    first, second = filesystem.runs(node)
    assert second.physical == first.physical + 1
    found = owners(disk, [Extent(first.physical * 4096, 8192)])
    assert [owner.words() for owner in found] == [
        "file data of /holes, bytes 0-4095",
        "file data of /holes, bytes 1048576-1052671",
    ]


def test_a_partitioned_disk_and_what_is_around(
    make_image: Make, run: Run, folder: Path, tmp_path: Path
) -> None:
    inner = make_image(*KINDS["4 KiB blocks"], folder=folder).read_bytes()
    image = tmp_path / "disk"
    image.write_bytes(bytes(1024 * KIB) + inner + bytes(2048 * KIB))
    run("sfdisk", "--quiet", image, stdin="label: dos\nstart=2048, size=32768, type=83\n")
    disk = MemoryDisk(image.read_bytes())
    found = owners(disk, [Extent(0, disk.size)])
    assert [owner.kind for owner in (found[0], found[1], found[-1])] == [
        OwnerKind.OUTSIDE,
        OwnerKind.SUPERBLOCK,
        OwnerKind.OUTSIDE,
    ]
    assert found[1].extent == Extent(1024 * KIB, 4 * KIB)
    assert found[-1].extent == Extent(17 * 1024 * KIB, 2048 * KIB)
    at = 0
    for owner in found:
        assert owner.extent.offset == at
        at = owner.extent.end
    assert at == disk.size
    alone = owners(MemoryDisk(inner), [Extent(0, len(inner))])
    assert [(o.kind, o.paths, o.offset) for o in found[1:-1]] == [
        (o.kind, o.paths, o.offset) for o in alone
    ]


def test_the_journal_is_replayed(
    make_image: Make, debugfs: Debugfs, load: Load, folder: Path, tmp_path: Path
) -> None:
    image = make_image("-t", "ext4", "-b", "4096", folder=folder, size="32M")
    before = image.read_bytes()
    (tmp_path / "new").write_bytes(bytes(range(1, 201)) * 100)
    debugfs(image, [f"write {tmp_path / 'new'} new"])
    after = image.read_bytes()
    node = Filesystem(MemoryDisk(after)).lookup(b"/new")
    assert node is not None
    block = Filesystem(MemoryDisk(after)).runs(node)[0].physical
    new = {
        at // 4096: after[at : at + 4096]
        for at in range(4096, len(after), 4096)
        if before[at : at + 4096] != after[at : at + 4096]
    }
    (tmp_path / "blocks").write_bytes(b"".join(new.values()))
    image.write_bytes(before)
    assert owners(load(image), [Extent(block * 4096, 4096)])[0].kind is OwnerKind.FREE
    listed = ",".join(map(str, new))
    debugfs(image, ["jo -c -v 3", f"jw -b {listed} {tmp_path / 'blocks'}", "jc"])
    assert owners(load(image), [Extent(block * 4096, 4096)])[0].words() == (
        "file data of /new, bytes 0-4095"
    )


def test_what_cannot_be_read_is_unknown(make_image: Make, load: Load, folder: Path) -> None:
    empty = MemoryDisk(64 * KIB)
    assert owners(empty, [Extent(0, 64 * KIB)]) == [Owner(Extent(0, 64 * KIB), OwnerKind.UNKNOWN)]
    disk = load(make_image(*KINDS["4 KiB blocks"], folder=folder))
    whole = Extent(0, disk.size)
    filesystem = Filesystem(disk)
    disk.pwrite(filesystem.inode_offset(2), bytes(256))  # no root: only fixed places are known
    found = owners(disk, [whole])
    assert not any(owner.paths for owner in found)
    assert {OwnerKind.JOURNAL, OwnerKind.INODE_TABLE, OwnerKind.UNKNOWN} <= {
        owner.kind for owner in found
    }


@pytest.mark.parametrize("seed", range(4))
def test_odd_content_never_raises_and_every_byte_has_an_owner(
    make_image: Make, load: Load, folder: Path, seed: int
) -> None:
    options = ("-t", "ext4", "-b", "1024", "-O", "^metadata_csum")
    disk = load(make_image(*options, folder=folder))
    rng = random.Random(seed)
    used = [o.extent for o in owners(disk, [Extent(0, disk.size)]) if o.kind is not OwnerKind.FREE]
    for _ in range(20):
        for _ in range(5):
            extent = rng.choice(used)
            at = extent.offset + rng.randrange(extent.length)
            disk.pwrite(at, rng.randbytes(min(rng.choice([1, 4, 1024]), disk.size - at)))
        found = owners(disk, [Extent(0, disk.size)])
        assert sum(owner.extent.length for owner in found) == disk.size
        assert all(one.extent.end == two.extent.offset for one, two in pairwise(found))
