"""Sizes and trees that a disk cannot have: answered in seconds, and never called whole.

What is asked of them is bounded by the disk: sizes are compared before contents, too many zeroes
are not digested, and no block that leads to others is walked twice.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.check import check, scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.faults import UnsupportedError
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.inode import InodeFlag
from nbdproxy.oracles.ext4.mapping import EXTENT_MAGIC
from nbdproxy.oracles.ext4.owners import map_filesystem
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.mounts import ONLY
from nbdproxy.oracles.qcow2 import MAGIC, Qcow2Device, Qcow2Error
from nbdproxy.oracles.quick import QUICK
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.below.copy_before_write import PreservingDisk
from tests.support.nbd_client import WRITE, Op
from tests.support.serving import Server, nbdproxy, tool

BLOCK = 4096
SIZE = 16 << 20
CONTENT = b"what it holds\n"
HUGE = 0xFFFFFFF000
PATH = "/app/big"
ENTRY = Entry(PATH, digest([CONTENT]), len(CONTENT))


@contextmanager
def quickly(seconds: float = 5) -> Iterator[None]:
    """Fail if the block takes longer; the suite's own limit ends a loop that has no end."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < seconds


def image_with(folder: Path, *commands: str, options: tuple[str, ...] = ()) -> Path:
    """An ext4 with PATH, which debugfs then changed."""
    root, image = folder / "root", folder / "image"
    (root / "app").mkdir(parents=True)
    (root / "app/big").write_bytes(CONTENT)
    (root / "app/other").write_bytes(CONTENT)
    with image.open("wb") as file:
        file.truncate(SIZE)
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), *options, "-d", root, image)
    for command in commands:
        tool("debugfs", "-w", "-R", command, image)
    return image


def disk_of(image: Path) -> MemoryDisk:
    return MemoryDisk(image.read_bytes())


def test_a_size_that_cannot_be_is_compared_before_contents(tmp_path: Path) -> None:
    """Earlier versions are not looked for in what cannot be read: the size says that it is lost."""
    disk = disk_of(image_with(tmp_path, f"sif {PATH} size {HUGE:#x}"))
    earlier = {PATH: {digest([b"older"])}}
    for entry, known, expected in (
        (ENTRY, {}, Condition.DAMAGED),
        (ENTRY, earlier, Condition.DAMAGED),
        (replace(ENTRY, size=2 * HUGE), earlier, Condition.SHORT),
        (replace(ENTRY, size=None), {}, Condition.CANNOT_BE_TOLD),
        (replace(ENTRY, size=HUGE), {}, Condition.CANNOT_BE_TOLD),
        (replace(ENTRY, size=HUGE), earlier, Condition.CANNOT_BE_TOLD),
    ):
        with quickly():
            found = check(disk, Manifest((entry,)), earlier=known)
            follower = IncrementalCheck(Manifest((entry,)), earlier=known)
            assert follower.check(disk, None) == found
        assert found.conditions == {PATH: expected}
    assert QUICK.content(disk, ENTRY, mount=ONLY) is None


def test_the_command_says_which_file_it_does_not_list(tmp_path: Path) -> None:
    image = image_with(tmp_path, f"sif {PATH} size {HUGE:#x}")
    said = nbdproxy("manifest", image, code=2).stderr
    assert (
        said.startswith(f"nbdproxy: {PATH}: ")
        and "sparse" in said
        and "leave it out with --exclude" in said
    )
    assert said.count("\n") == 1


def test_what_is_left_out_is_not_read(tmp_path: Path) -> None:
    """Sixteen terabytes of zeroes would take a day."""
    image = image_with(tmp_path, f"sif {PATH} size {HUGE:#x}")
    with (tmp_path / "root/app/big").open("r+b") as file:
        file.truncate(1 << 43)
    for where, under in ((image, ()), (tmp_path / "root", ("--under", "/"))):
        for glob in (PATH, "big", "b*g", "app/big", "/*/[a-c]?g"):
            listed = nbdproxy("manifest", where, *under, "--exclude", glob).stdout
            assert [line.split("  ")[1] for line in listed.splitlines() if "  " in line] == [
                "/app/other"
            ]
        for glob in ("/big", "ig", "/app/bi", "app/big/x"):
            with quickly():
                assert PATH not in nbdproxy("manifest", image, "--exclude", glob, code=2).stdout
    for glob in ("app", "/app/", "*"):
        said = nbdproxy("manifest", tmp_path / "root", "--exclude", glob, code=2).stderr
        assert said.count("\n") == 1 and "no files" in said and "--exclude" in said


@pytest.mark.parametrize("number", [2, 3, 7, 8])
def test_the_filesystems_own_files_of_any_size_are_no_hang(tmp_path: Path, number: int) -> None:
    """The root, a quota file, the reserved descriptors, the journal."""
    options = ("-O", "quota,^metadata_csum")
    disk = disk_of(image_with(tmp_path, f"sif <{number}> size {HUGE:#x}", options=options))
    with quickly():
        found = check(disk, Manifest((ENTRY,)))
        map_filesystem(disk)
    assert found.conditions.get(PATH, Condition.WHOLE) is Condition.WHOLE


def test_a_sparse_file_larger_than_its_disk_is_judged_and_listed(tmp_path: Path) -> None:
    size = 100 << 20
    disk = disk_of(image_with(tmp_path, f"sif {PATH} size {size:#x}"))
    whole = Entry(PATH, digest([CONTENT, bytes(size - len(CONTENT))]), size)
    with quickly():
        assert check(disk, Manifest((whole,))).conditions == {PATH: Condition.WHOLE}
        assert whole in [replace(one, mode=None) for one in scan(disk).entries]


def test_files_that_are_far_longer_than_the_disk_together_are_not_listed(tmp_path: Path) -> None:
    commands = [f"sif {PATH} size {3 << 30:#x}", f"sif /app/other size {3 << 30:#x}"]
    disk = disk_of(image_with(tmp_path, *commands))
    with quickly(30), pytest.raises(FilesystemError, match="far longer than the disk"):
        scan(disk)


def put_map(
    image: Path, path: str, block_map: bytes, blocks: dict[int, bytes], *, flags: int
) -> MemoryDisk:
    """Give a file or folder a tree of blocks."""
    raw = bytearray(image.read_bytes())
    filesystem = Filesystem(MemoryDisk(bytes(raw)))
    node = filesystem.lookup(path.encode())
    assert node is not None
    at = filesystem.inode_offset(node.number)
    raw[at + 0x20 : at + 0x24] = struct.pack("<I", flags)
    raw[at + 0x28 : at + 0x28 + 60] = block_map.ljust(60, b"\0")
    for number, block in blocks.items():
        raw[number * BLOCK : (number + 1) * BLOCK] = block.ljust(BLOCK, b"\0")
    return MemoryDisk(bytes(raw))


def head(count: int, room: int, depth: int) -> bytes:
    return struct.pack("<HHHHI", EXTENT_MAGIC, count, room, depth, 0)


def pointers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


TRIPLE = pointers(*[0] * 14, 2000)
"""A block map with nothing but what leads to 2^30 blocks."""
LEAF = b"".join(struct.pack("<IHHI", i * 2000, 2000, 0, 2000) for i in range(300))
TREES = {
    "pointers that lead to themselves": (TRIPLE, {2000: pointers(*[2000] * 1024)}, 0),
    "pointers to the same pointers": (
        TRIPLE,
        {2000: pointers(*[2001] * 1024), 2001: pointers(*[2002] * 1024)},
        0,
    ),
    "pointers to the same data": (
        pointers(*[0] * 13, 2000),
        {
            2000: pointers(*range(2001, 2021)),
            **{n: pointers(*[3000] * 1024) for n in range(2001, 2021)},
        },
        0,
    ),
    "nodes that lead to the same leaf": (
        head(2, 4, 1) + struct.pack("<IIHHIIHH", 0, 2000, 0, 0, 1, 2000, 0, 0),
        {2000: head(0, 340, 0)},
        InodeFlag.EXTENTS,
    ),
    "extents of the same blocks": (
        head(1, 4, 1) + struct.pack("<IIHH", 0, 2500, 0, 0),
        {2500: head(300, 340, 0) + LEAF},
        InodeFlag.EXTENTS,
    ),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("path", [PATH, "/app"])
def test_no_block_is_walked_twice(tmp_path: Path, tree: str, path: str) -> None:
    """Of a file, and of a folder that the file is in; the kernel would go on for days."""
    block_map, blocks, flags = TREES[tree]
    size = 1 << 40
    image = image_with(tmp_path, f"sif {path} size {size:#x}", options=("-O", "^metadata_csum"))
    disk = put_map(image, path, block_map, blocks, flags=flags)
    with quickly():
        filesystem = Filesystem(disk)
        node = filesystem.lookup(path.encode())
        assert node is not None
        with pytest.raises(UnsupportedError, match=r"twice|more blocks"):
            filesystem.runs(node)
        found = check(disk, Manifest((replace(ENTRY, size=size),)))
        with pytest.raises(FilesystemError):
            scan(disk)
        map_filesystem(disk)
    assert found.conditions == {PATH: Condition.CANNOT_BE_TOLD}


def test_folders_that_use_the_same_blocks_are_not_walked_again_and_again(tmp_path: Path) -> None:
    """Each is read; together they have more blocks than there are."""
    blocks = SIZE // BLOCK
    each = 2000
    commands = [f"mkdir /app/d{n}" for n in range(3)]
    image = image_with(tmp_path, *commands, options=("-O", "^metadata_csum"))
    disk = MemoryDisk(image.read_bytes())
    entry = struct.pack("<IHHI", 0, each, 0, 1500)
    empty = {n: struct.pack("<IHBB", 0, BLOCK, 0, 0) for n in range(1500, 1500 + each)}
    for number in range(3):
        path = f"/app/d{number}"
        tool("debugfs", "-w", "-R", f"sif {path} size {each * BLOCK:#x}", image)
        disk = put_map(image, path, head(1, 4, 0) + entry, empty, flags=InodeFlag.EXTENTS)
        image.write_bytes(disk.pread(0, disk.size))
    assert 2 * each < blocks < 3 * each
    with quickly(), pytest.raises(FilesystemError, match="directories use the same blocks"):
        scan(disk)


def test_a_qcow2_has_no_more_tables_than_its_file_can_hold() -> None:
    """Each of them would be 8,192 clusters of nothing."""
    count, bits = 1 << 19, 16
    size = count << bits + bits - 3
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", MAGIC, 3, 0, 0, bits, size, 0, count, 1 << bits, 0, 0, 0, 0
    )
    header += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    table = struct.pack(f">{count}Q", *(1 << 40 | n << bits for n in range(count)))
    with quickly(), pytest.raises(Qcow2Error, match="more L2 tables than it can have"):
        Qcow2Device(MemoryDisk(header.ljust(1 << bits, b"\0") + table))


def test_memory_follows_what_is_written_and_not_the_size(tmp_path: Path) -> None:
    """Of a disk of 2 TiB that is nearly empty; a byte for each block would be 512 MiB."""
    image, size = tmp_path / "image", 2 << 40
    with image.open("wb") as file:
        file.truncate(size)
    with Server(image, "--record", tmp_path / "run") as server:
        client = server.client()
        for at in range(0, size, size // 64):
            assert client.do(Op(WRITE, at, data=b"x" * BLOCK))[0].error == 0
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert server.stop() == 0
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 200 << 10, f"{peak} KiB"


@pytest.mark.parametrize("seed", range(3))
def test_each_block_of_data_is_saved_once_and_before_it_is_changed(seed: int) -> None:
    """Across the pieces in which that is kept in mind, and for data of any place and length."""
    rng = random.Random(seed)
    content = rng.randbytes(SIZE)
    data = []
    at = 0
    while (at := at + rng.randrange(1, 3 << 20)) < SIZE:
        length = min(rng.randrange(1, 6 << 20), SIZE - at)
        data.append((at, length))
        at += length
    saved: dict[int, bytes] = {}

    def before(offset: int, found: bytes | bytearray) -> None:
        for at in range(0, len(found), BLOCK):
            assert offset + at not in saved
            saved[offset + at] = bytes(found[at : at + BLOCK])

    recorder = SimpleNamespace(meta=SimpleNamespace(data=tuple(data)), before=before)
    disk = PreservingDisk(MemoryDisk(content), cast(RecordingWriter, recorder))
    touched: set[int] = set()
    for _ in range(60):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 4096, 70_000, 5 << 20]), SIZE - offset)
        disk.pwrite(offset, bytes(length))
        touched.update(range(offset // BLOCK * BLOCK, offset + length, BLOCK))
        assert not disk.unsaved(offset, length)
    of_data = {
        block
        for start, length in data
        for block in range(start // BLOCK * BLOCK, start + length, BLOCK)
    }
    assert saved == {block: content[block : block + BLOCK] for block in touched & of_data}
