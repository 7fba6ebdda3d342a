"""Names looked up through an index, as a kernel does it; tests/checker compares with a real one."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.ext4 import casefold
from nbdproxy.oracles.ext4.checksum import crc32c
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.hashes import HashVersion, name_hash
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag

Run = Callable[..., str]
Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]
Load = Callable[[Path], MemoryDisk]

BLOCK = 1024
NAMES = [b"/d/a-name-that-takes-some-room-%d" % number for number in range(700)]
KINDS = ["-t ext4 -b 1024", "-t ext4 -b 1024 -O ^metadata_csum"]
SEED = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def indexed(make_image: Make, run: Run, load: Load, tmp_path: Path) -> Callable[[str], MemoryDisk]:
    """Make a filesystem whose /d has an index."""

    def make(kind: str) -> MemoryDisk:
        root = tmp_path / "root"
        (root / "d").mkdir(parents=True)
        for name in NAMES:
            (root / name.decode().lstrip("/")).touch()
        image = make_image(*kind.split(), folder=root)
        run("e2fsck", "-fyD", image, check=False)  # it says that it changed something
        disk = load(image)
        assert folder(disk)[0].flags & InodeFlag.INDEX
        return disk

    return make


def folder(disk: MemoryDisk) -> tuple[Inode, list[int]]:
    """Return /d and where its blocks are, in bytes."""
    filesystem = Filesystem(disk)
    node = filesystem.lookup(b"/d")
    assert node is not None
    runs = filesystem.runs(node)
    return node, [(run.physical + i) * BLOCK for run in runs for i in range(run.blocks)]


def answers(disk: MemoryDisk, names: Sequence[bytes] = NAMES) -> dict[bytes, str]:
    """Return what comes of looking for each name."""
    filesystem, found = Filesystem(disk), {}
    for name in names:
        try:
            found[name] = "whole" if filesystem.lookup(name) else "missing"
        except CorruptError:
            found[name] = "unreadable"
        except UnsupportedError:
            found[name] = "unknown"
    return found


@pytest.mark.parametrize("version", ["legacy", "half_md4", "tea"])
def test_hashes_are_those_of_debugfs(make_image: Make, debugfs: Debugfs, version: str) -> None:
    seed = bytes.fromhex(SEED.replace("-", ""))
    names = [b"x" * n for n in (1, 3, 4, 15, 16, 17, 31, 32, 33, 64, 255)]
    names += [("é" * n + "y" * (n % 3)).encode() for n in range(1, 40, 3)]
    commands = [f"dx_hash -h {version} -s {SEED} {name.decode()}" for name in names]
    said = re.findall(r"is 0x([0-9a-f]+)", debugfs(make_image("-t", "ext4"), commands))
    assert [int(one, 16) for one in said] == [
        name_hash(HashVersion[version.upper()], name, seed, is_unsigned=False) for name in names
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_found_through_the_index(
    indexed: Callable[[str], MemoryDisk], kind: str
) -> None:
    disk = indexed(kind)
    assert set(answers(disk).values()) == {"whole"}
    assert set(answers(disk, [b"/d/none", b"/d/" + b"x" * 256]).values()) == {"missing"}
    assert sorted(path for path, _ in Filesystem(disk).walk(b"/d")) == sorted(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_index_hides_the_names_it_does_not_lead_to(
    indexed: Callable[[str], MemoryDisk], kind: str
) -> None:
    """The root leads to its first three blocks only, as it did before the others came."""
    disk = indexed(kind)
    node, blocks = folder(disk)
    root = bytearray(disk.pread(blocks[0], BLOCK))
    struct.pack_into("<H", root, 34, 3)
    limit = struct.unpack_from("<H", root, 32)[0]
    if "^metadata_csum" not in kind:
        value = crc32c(crc32c(node.seed, bytes(root[:56])), bytes(8))
        struct.pack_into("<I", root, 32 + 8 * limit + 4, value)
    disk.pwrite(blocks[0], bytes(root))
    found = answers(disk)
    assert set(found.values()) == {"whole", "missing"}
    held = [disk.pread(blocks[index], BLOCK) for index in (1, 2, 3)]
    for name, condition in found.items():
        is_there = any(name[3:] + b"\0" in block for block in held)
        assert (condition == "whole") <= is_there, name
    with pytest.raises(UnsupportedError, match="not found"):
        list(Filesystem(disk).walk())


def test_a_wrong_checksum_of_an_index_fails_all_names(
    indexed: Callable[[str], MemoryDisk],
) -> None:
    disk = indexed(KINDS[0])
    _, blocks = folder(disk)
    disk.pwrite(blocks[0] + 40, bytes([disk.pread(blocks[0] + 40, 1)[0] ^ 1]))
    assert set(answers(disk).values()) == {"unreadable"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_block_concerns_the_names_that_the_index_leads_to_it(
    indexed: Callable[[str], MemoryDisk], kind: str
) -> None:
    disk = indexed(kind)
    _, blocks = folder(disk)
    lost = disk.pread(blocks[4], BLOCK)
    disk.zero(blocks[4], BLOCK, may_punch=False)
    found = answers(disk)
    inside = {name for name in NAMES if name[3:] + b"\0" in lost}
    assert inside
    assert all(found[name] == "whole" for name in set(NAMES) - inside)
    assert all(found[name] == "unreadable" for name in inside)


def test_an_index_that_makes_no_sense_is_passed_by(
    indexed: Callable[[str], MemoryDisk],
) -> None:
    disk = indexed(KINDS[1])
    _, blocks = folder(disk)
    disk.pwrite(blocks[0] + 28, b"\x09")  # a hash that does not exist
    assert set(answers(disk).values()) == {"whole"}
    disk.zero(blocks[-1], BLOCK, may_punch=False)
    assert set(answers(disk).values()) == {"unknown", "unreadable"}


def test_an_index_without_the_feature_is_none(
    indexed: Callable[[str], MemoryDisk],
) -> None:
    disk = indexed(KINDS[1])
    _, blocks = folder(disk)
    disk.pwrite(1024 + 0x5C, bytes([disk.pread(1024 + 0x5C, 1)[0] & ~0x20]))
    disk.pwrite(blocks[0] + 32, bytes(500))
    assert set(answers(disk).values()) == {"whole"}


def test_names_are_folded_where_the_directory_says_so(
    make_image: Make, debugfs: Debugfs, load: Load
) -> None:
    names = ["f1", "straße", "Éa", "smile-\U0001f600"]
    commands = [f"write /dev/null d/{name}" for name in names]
    image = make_image("-t", "ext4", "-b", "1024", "-O", "casefold")
    debugfs(image, ["mkdir d", "sif d flags 0x40080000", *commands, "write /dev/null F"])
    asked = ["/d/F1", "/d/f1", "/d/STRASSE", "/d/e\u0301A", "/d/none", "/f", "/F"]
    disk = load(image)
    found = answers(disk, [one.encode() for one in asked])
    assert list(found.values()) == [*["whole"] * 4, "missing", "missing", "whole"]
    doubtful = ["/d/smile-\U0001f600", "/d/SMILE-\U0001f600", "/d/a\u200db"]
    assert set(answers(disk, [one.encode() for one in doubtful]).values()) == {"unknown"}


def test_what_is_no_utf_8_is_compared_as_it_is() -> None:
    assert casefold.fold(b"A\xff") == (b"A\xff", True, False)
    assert casefold.fold("ΣΊΣΥΦΟΣ".encode()) == casefold.fold("σίσυφος".encode())
    for name in ("\u1fb3", "\u00ad", "\u17b4", "\U0001f600"):
        assert not casefold.fold(name.encode()).is_certain


def test_a_directory_in_itself_is_not_entered(
    make_image: Make, debugfs: Debugfs, load: Load
) -> None:
    """As after a rename of which one half arrived; one that is its own parent is an error."""
    image = make_image("-t", "ext4")
    commands = ["mkdir a", "mkdir a/b", "write /dev/null a/f", "ln a a/b/a", "ln a a/a"]
    debugfs(image, commands)
    found = answers(load(image), [b"/a/f", b"/a/b/a/f", b"/a/a/f"])
    assert list(found.values()) == ["whole", "missing", "unreadable"]


def test_a_name_of_an_inode_that_no_name_may_have_is_an_error(
    make_image: Make, debugfs: Debugfs, load: Load
) -> None:
    image = make_image("-t", "ext4")
    debugfs(image, ["ln <8> journal", "ln <7> resize"])
    assert set(answers(load(image), [b"/journal", b"/resize"]).values()) == {"unreadable"}


def test_a_file_in_blocks_of_the_filesystem_itself_is_not_read(
    make_image: Make, debugfs: Debugfs, load: Load, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"x" * 1000)
    image = make_image("-t", "ext2", "-b", "1024")
    table = Filesystem(load(image)).tables[0]
    debugfs(image, [f"write {data} f", f"sif f block[0] {table}"])
    assert answers(load(image), [b"/f"]) == {b"/f": "unreadable"}
