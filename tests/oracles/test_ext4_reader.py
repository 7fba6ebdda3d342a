"""The reader against what was put into real filesystems, and against debugfs."""

from __future__ import annotations

import os
import re
import stat
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.ext4 import inode
from nbdproxy.oracles.ext4.faults import (
    CorruptError,
    NoFilesystemError,
    RefusedError,
    UnsupportedError,
)
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.mounted import open_filesystem

Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]
Load = Callable[[Path], MemoryDisk]

# Debian 13's mke2fs refuses the option of Debian 12's, which does not know the other.
_MKE2FS = subprocess.run(
    ["mke2fs", "-V"],
    env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    capture_output=True,
    text=True,
    check=True,
).stderr
REVISION_0 = "-r 0" if _MKE2FS < "mke2fs 1.47.1" else "-E revision=0"

KINDS = [
    "-t ext4 -b 4096",
    "-t ext4 -b 1024",
    "-t ext4 -b 2048 -O ^has_journal",
    "-t ext4 -b 4096 -O ^metadata_csum,^64bit",
    "-t ext4 -b 4096 -O inline_data -I 256",
    "-t ext4 -b 1024 -O metadata_csum_seed,^64bit",
    "-t ext4 -b 1024 -g 1024 -O meta_bg,^resize_inode",
    "-t ext4 -b 4096 -O bigalloc",
    "-t ext4 -b 1024 -O bigalloc",
    "-t ext4 -b 1024 -O bigalloc,meta_bg,^resize_inode",
    "-t ext4 -b 1024 -O sparse_super2",
    "-t ext4 -b 65536 -O ^has_journal",
    "-t ext3 -b 1024",
    "-t ext2 -b 4096",
    f"-t ext2 -b 1024 {REVISION_0}",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "app/many").mkdir(parents=True)
    (root / "app/empty-folder").mkdir()
    for i in range(600):  # more than a block of names: a hash tree
        (root / f"app/many/a-name-that-takes-some-room-{i}").write_bytes(b"x" * (i % 170))
    (root / "app/plain").write_bytes(b"plain " * 100)
    (root / "app/empty").touch()
    (root / "app/zeroes").write_bytes(bytes(20_000))  # mke2fs makes it a hole
    (root / "app/large").write_bytes(bytes(range(256)) * 9000)  # reaches double indirect blocks
    (root / "app/new\nline").write_bytes(b"newline")
    (root / "app/näme").write_bytes(b"utf-8")
    Path(os.fsdecode(bytes(root) + b"/app/\xff\xfe")).write_bytes(b"not utf-8")
    (root / "app" / ("long" * 60)).write_bytes(b"long")
    os.link(root / "app/plain", root / "app/hard")
    (root / "app/link").symlink_to("plain")
    (root / "app/far-link").symlink_to("/app/" + "./" * 60 + "many/../plain")
    (root / "app/loop").symlink_to("loop")
    (root / "folder-link").symlink_to("app")
    os.mkfifo(root / "app/fifo")
    return root


def contents(filesystem: Filesystem) -> dict[bytes, bytes]:
    return {
        path: b"".join(filesystem.chunks(node))
        for path, node in filesystem.walk()
        if node.is_regular
    }


def regular(root: Path) -> dict[bytes, bytes]:
    return {
        b"/" + os.fsencode(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_reads_as_it_was_written(
    make_image: Make, load: Load, folder: Path, kind: str
) -> None:
    image = make_image(*kind.split(), folder=folder, size="64M")
    filesystem = open_filesystem(load(image))
    assert contents(filesystem) == regular(folder)


def test_lookup_follows_links_as_the_kernel_does(
    make_image: Make, load: Load, folder: Path
) -> None:
    filesystem = open_filesystem(load(make_image("-t", "ext4", folder=folder)))
    plain = filesystem.lookup(b"/app/plain")
    assert plain is not None
    for path in (b"/app/link", b"/app/far-link", b"/app/hard", b"/folder-link/../app//./plain"):
        assert filesystem.lookup(path) == plain, path
    for path in (b"/app/none", b"/app/plain/below", b"/app/loop", b"/none/plain"):
        assert filesystem.lookup(path) is None, path


@pytest.mark.parametrize("kind", ["-t ext4 -b 1024", "-t ext4 -b 4096 -O ^metadata_csum"])
def test_holes_and_unwritten_extents_read_as_zeroes(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path, kind: str
) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"D" * 50_000)
    image = make_image(*kind.split())
    block = int(kind.split()[3])
    output = debugfs(
        image,
        [
            *[f"write {data} {name}" for name in ("punched", "longer", "cut", "full")],
            "punch punched 2 4",
            "set_inode_field longer size 80001",
            "set_inode_field cut size 20001",
            f"write {os.devnull} unwritten",
            f"fallocate unwritten 0 {40 * 1024 // block - 1}",
            "set_inode_field unwritten size 40000",
            # enough separate extents for a tree with blocks of its own
            *[f"punch full {i} {i}" for i in range(1, 50_000 // block, 2)],
        ],
    )
    assert "No such file" not in output
    found = contents(open_filesystem(load(image)))
    full = bytearray(data.read_bytes())
    expected = {
        b"/punched": full[: 2 * block] + bytes(3 * block) + full[5 * block :],
        b"/longer": full + bytes(30_001),
        b"/cut": full[:20_001],
        b"/unwritten": bytes(40_000),
    }
    for i in range(1, 50_000 // block, 2):
        full[i * block : (i + 1) * block] = bytes(min(block, len(full) - i * block))
    expected[b"/full"] = full
    for path, content in expected.items():
        assert found[path] == content, path
        out = tmp_path / "out"
        debugfs(image, [f"dump {path.decode()} {out}"])
        assert found[path] == out.read_bytes(), path


def inode_at(filesystem: Filesystem, path: bytes) -> int:
    node = filesystem.lookup(path)
    assert node is not None
    return filesystem.inode_offset(node.number)


@pytest.mark.parametrize("offset", [0, 4, 0x1A, 0x28, 0x7C, 0x82, 0x90])
def test_a_broken_inode_is_never_read(
    make_image: Make, load: Load, folder: Path, offset: int
) -> None:
    disk = load(make_image("-t", "ext4", folder=folder))
    at = inode_at(open_filesystem(disk), b"/app/plain") + offset
    disk.pwrite(at, bytes([disk.pread(at, 1)[0] ^ 0x10]))
    filesystem = open_filesystem(disk)
    for path in (b"/app/plain", b"/app/hard"):
        with pytest.raises(CorruptError):
            filesystem.lookup(path)
    assert filesystem.lookup(b"/app/large") is not None


def test_a_broken_directory_block_hides_no_name_silently(
    make_image: Make, load: Load, folder: Path
) -> None:
    disk = load(make_image("-t", "ext4", "-b", "4096", folder=folder))
    filesystem = open_filesystem(disk)
    node = filesystem.lookup(b"/app/many")
    assert node is not None
    blocks = [run.physical + i for run in filesystem.runs(node) for i in range(run.blocks)]
    disk.zero(blocks[2] * 4096, 4096, may_punch=False)
    filesystem = open_filesystem(disk)
    outcome = {"doubtful": 0, "corrupt": 0}
    for i in range(600):
        try:
            filesystem.lookup(b"/app/many/a-name-that-takes-some-room-%d" % i)
            raise AssertionError("which block is searched first is not known")
        except UnsupportedError:
            outcome["doubtful"] += 1
        except CorruptError:
            outcome["corrupt"] += 1
    assert outcome["doubtful"] and outcome["corrupt"]
    with pytest.raises(CorruptError, match="/app/many"):
        list(filesystem.walk())


@pytest.mark.parametrize("offset", [0, 9, 2000, 4095])
def test_a_directory_block_with_a_wrong_checksum_is_not_read(
    make_image: Make, load: Load, folder: Path, offset: int
) -> None:
    disk = load(make_image("-t", "ext4", "-b", "4096", folder=folder))
    filesystem = Filesystem(disk)
    node = filesystem.lookup(b"/app/many")
    assert node is not None
    at = (filesystem.runs(node)[-1].physical) * 4096 + offset
    disk.pwrite(at, bytes([disk.pread(at, 1)[0] ^ 1]))
    with pytest.raises(CorruptError, match="/app/many"):
        list(Filesystem(disk).walk())


def test_a_name_that_leads_to_a_deleted_inode_is_corrupt(
    make_image: Make, debugfs: Debugfs, load: Load, folder: Path
) -> None:
    image = make_image("-t", "ext3", folder=folder)
    debugfs(image, ["set_inode_field /app/large links_count 0"])
    filesystem = Filesystem(load(image))
    with pytest.raises(CorruptError, match="deleted"):
        filesystem.lookup(b"/app/large")


def test_inline_data_is_found_among_attributes(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").write_bytes(b"i" * 75)
    os.setxattr(root / "f", "user.a", b"other")
    image = make_image("-t", "ext4", "-O", "inline_data", folder=root)
    assert re.search(r"user.a.*system.data|system.data.*user.a", debugfs(image, ["stat f"]), re.S)
    assert contents(Filesystem(load(image))) == {b"/f": b"i" * 75}


def test_inline_data_may_stand_behind_another_attribute() -> None:
    raw = bytearray(256)
    raw[0x28:0x64] = b"b" * 60
    struct.pack_into("<H", raw, 0x80, 32)
    struct.pack_into("<I", raw, 160, inode.XATTR_MAGIC)
    inode.XATTR_ENTRY.struct.pack_into(raw, 164, 1, 1, 0, 0, 0, 0)
    raw[180:181] = b"a"
    inode.XATTR_ENTRY.struct.pack_into(raw, 184, 4, inode.XATTR_SYSTEM, 80, 0, 3, 0)
    raw[200:204] = b"data"
    raw[244:247] = b"end"
    node = inode.Inode(12, 0o100644, 63, inode.InodeFlag.INLINE_DATA, 0, False, bytes(raw))
    assert inode.inline_parts(node) == (b"b" * 60, b"end")
    for broken in (raw[:160] + bytes(96), raw[:184] + bytes(72), raw[:190] + b"\1" + raw[191:]):
        with pytest.raises(CorruptError, match="inline data is missing"):
            inode.inline_parts(replace(node, raw=bytes(broken)))


def test_a_block_behind_three_indirections(make_image: Make, load: Load, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with (root / "huge").open("wb") as file:
        file.write(b"start")
        file.seek(68 << 20)
        file.write(b"end")
    filesystem = Filesystem(load(make_image("-t", "ext2", "-b", "1024", folder=root)))
    assert contents(filesystem) == regular(root)


def test_a_broken_extent_block_is_never_read(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"D" * 50_000)
    image = make_image("-t", "ext4", "-b", "1024")
    debugfs(image, [f"write {data} f", *[f"punch f {i} {i}" for i in range(1, 48, 2)]])
    (block,) = re.findall(r"\(ETB0\):(\d+)", debugfs(image, ["stat f"]))
    disk = load(image)
    disk.pwrite(int(block) * 1024 + 20, b"\xff")
    filesystem = open_filesystem(disk)
    node = filesystem.lookup(b"/f")
    assert node is not None
    with pytest.raises(CorruptError, match="checksum"):
        list(filesystem.chunks(node))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0x62, b"\x80"),  # an unknown incompatible feature, and so a wrong checksum
        (0x18, b"\x09"),  # a block size of 512 KiB
        (0x04, b"\xff\xff\xff\x7f"),  # more blocks than the device has
        (0x78, b"label"),  # nothing important, but the checksum is wrong
    ],
)
def test_a_superblock_no_kernel_mounts_is_refused(
    make_image: Make, load: Load, offset: int, value: bytes
) -> None:
    disk = load(make_image("-t", "ext4"))
    disk.pwrite(1024 + offset, value)
    with pytest.raises(RefusedError, match="--oracle kernel"):
        open_filesystem(disk)


def test_wrong_group_descriptors_and_roots_are_refused(make_image: Make, load: Load) -> None:
    image = make_image("-t", "ext4", "-b", "4096")
    disk = load(image)
    disk.pwrite(4096 + 8, b"\1")
    with pytest.raises(RefusedError, match="group 0"):
        open_filesystem(disk)
    disk = load(image)
    disk.zero(Filesystem(disk).inode_offset(2), 128, may_punch=False)
    with pytest.raises(RefusedError, match="root directory"):
        open_filesystem(disk)


def test_what_only_a_mount_for_writing_reads_is_verified(
    make_image: Make, debugfs: Debugfs, load: Load
) -> None:
    # Linux 6.1 mounts none of these for writing; for reading it does not look at them.
    image = make_image("-t", "ext4", "-b", "1024", "-O", "quota,project,mmp")
    open_filesystem(load(image))
    told = debugfs(image, ["stats", "bmap <3> 0", "bmap <4> 0"])
    blocks = re.findall(r"^MMP block number: +(\d+)|^(\d+)$", told, re.MULTILINE)
    assert len(blocks) == 3
    for block in (int("".join(one)) for one in blocks):
        disk = load(image)
        disk.zero(block * 1024, 1024, may_punch=False)
        with pytest.raises(RefusedError, match=r"multiple mount|quota"):
            open_filesystem(disk)


def test_nothing_is_no_filesystem(run: Callable[..., str], tmp_path: Path) -> None:
    for size in (0, 1024, 1 << 20):
        with pytest.raises(NoFilesystemError):
            open_filesystem(MemoryDisk(size))
    journal = tmp_path / "journal"
    run("mke2fs", "-q", "-F", "-O", "journal_dev", "-b", "4096", journal, "8M")
    with pytest.raises(NoFilesystemError, match="external"):
        open_filesystem(MemoryDisk(journal.read_bytes()))


@pytest.mark.parametrize(("index", "wanted"), [(3, CorruptError), (200, UnsupportedError)])
def test_a_pointer_to_nowhere_ends_a_file_or_leaves_it_unknown(
    make_image: Make, debugfs: Debugfs, tmp_path: Path, index: int, wanted: type
) -> None:
    """Beside the file's own pointers: the kernel fails once, and then no more."""
    data = tmp_path / "data"
    data.write_bytes(b"D" * 20_000)
    image = make_image("-t", "ext2", "-b", "1024")
    debugfs(image, [f"write {data} f"])
    disk = MemoryDisk(image.read_bytes())
    node = open_filesystem(disk).lookup(b"/f")
    assert node is not None
    (pointers,) = struct.unpack_from("<I", node.block_map, 48)
    disk.pwrite(pointers * 1024 + 4 * index, b"\xff\xff\xff\x7f")
    filesystem = open_filesystem(disk)
    node = filesystem.lookup(b"/f")
    assert node is not None
    with pytest.raises(wanted):
        list(filesystem.chunks(node))
