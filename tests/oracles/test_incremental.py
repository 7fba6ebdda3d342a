"""The incremental check where it cannot follow closely, and what it reads where it can.

That it equals the plain check on any walk of states is a law; see tests/laws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import ManifestError
from nbdproxy.extents import Extent
from nbdproxy.oracles import check as oracle
from nbdproxy.oracles.check import Findings, Verdict, check, scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.manifest import Entry, Manifest, from_directory
from nbdproxy.oracles.mounts import Mount
from nbdproxy.oracles.watched import EVERYTHING, RangeSet

Run = Callable[..., str]
Make = Callable[..., Path]
Load = Callable[[Path], MemoryDisk]

MIB = 1 << 20
NAMES = [f"app{number % 3}/file{number}" for number in range(12)]


class Counting(MemoryDisk):
    """A disk that remembers what was read from it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.read: list[Extent] = []

    def pread(self, offset: int, length: int) -> bytes:
        self.read.append(Extent(offset, length))
        return super().pread(offset, length)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number + 1]) * 20_000)
    return root


@pytest.fixture
def disk(make_image: Make, folder: Path) -> Counting:
    return Counting(make_image("-t", "ext4", "-b", "4096", folder=folder).read_bytes())


def data_of(disk: MemoryDisk, name: str, shift: int = 0) -> int:
    """Where a file's content begins on the disk."""
    filesystem = Filesystem(MemoryDisk(disk.pread(shift, disk.size - shift)))
    node = filesystem.lookup(b"/" + name.encode())
    assert node is not None
    return shift + filesystem.runs(node)[0].physical * 4096


def test_only_the_file_that_changed_is_read_again(disk: Counting) -> None:
    inner = IncrementalCheck(scan(disk))
    first = inner.check(disk, None)
    assert first.verdict is Verdict.PASS
    at = data_of(disk, NAMES[4])
    disk.pwrite(at + 5000, b"other")
    disk.read.clear()
    second = inner.check(disk, [Extent(at + 5000, 5)])
    assert sum(extent.length for extent in disk.read) == 20_000
    assert second.conditions == first.conditions | {f"/{NAMES[4]}": Condition.DAMAGED}
    assert first.conditions[f"/{NAMES[4]}"] is Condition.WHOLE


def test_what_nothing_was_read_from_costs_no_read(disk: Counting) -> None:
    inner = IncrementalCheck(scan(disk))
    first = inner.check(disk, None)
    reads = inner.reads
    assert not reads.touches([Extent(disk.size - 4096, 4096)])
    disk.read.clear()
    assert inner.check(disk, [Extent(disk.size - 4096, 4096), Extent(0, 0)]) is first
    assert inner.check(disk, []) is first
    assert inner.reads is reads
    assert not disk.read


def test_a_directory_block_costs_only_the_names_that_moved(disk: Counting) -> None:
    inner = IncrementalCheck(scan(disk))
    inner.check(disk, None)
    at = data_of(disk, "app1")
    block = disk.pread(at, 4096)
    disk.pwrite(at, block.replace(NAMES[4][5:].encode(), b"fils4"))  # its checksum is wrong now
    assert inner.check(disk, [Extent(at, 4096)]) == check(disk, scan_of(inner))
    assert inner.reads.touches([Extent(at, 1)])
    disk.pwrite(at, block)
    assert inner.check(disk, [Extent(at, 4096)]).verdict is Verdict.PASS


def scan_of(inner: IncrementalCheck) -> Manifest:
    """The manifest that a check was made with."""
    return inner._manifest


def test_the_verdict_of_a_disk_without_a_filesystem_may_be_shared(disk: Counting) -> None:
    manifest = scan(disk)
    inner = IncrementalCheck(manifest)
    blank = MemoryDisk(disk.size)
    found = inner.check(blank, None)
    assert found == check(blank, manifest)
    assert found.verdict is Verdict.UNKNOWN
    assert 0 < inner.reads.total() < 8192
    assert inner.check(disk, [Extent(0, disk.size)]).verdict is Verdict.PASS
    assert inner.check(blank, [Extent(0, disk.size)]) == found


def test_another_size_is_another_disk(disk: Counting) -> None:
    manifest = scan(disk)
    inner = IncrementalCheck(manifest)
    inner.check(disk, None)
    short = MemoryDisk(disk.pread(0, disk.size - 4096))
    assert inner.check(short, []) == check(short, manifest)
    assert inner.check(disk, []).verdict is Verdict.PASS


def test_earlier_versions_count(disk: Counting) -> None:
    manifest = scan(disk)
    old = bytes([99]) * 20_000
    earlier = {f"/{NAMES[0]}": [hashlib.sha256(old).hexdigest()]}
    inner = IncrementalCheck(manifest, earlier=earlier)
    inner.check(disk, None)
    at = data_of(disk, NAMES[0])
    disk.pwrite(at, old)
    found = inner.check(disk, [Extent(at, len(old))])
    assert found.conditions[f"/{NAMES[0]}"] is Condition.STALE
    assert found == check(disk, manifest, earlier=earlier)


@pytest.mark.parametrize("partition", [None, 1, 2, 3])
def test_several_partitions(
    make_image: Make, run: Run, folder: Path, tmp_path: Path, partition: int | None
) -> None:
    inner = make_image("-t", "ext4", "-b", "4096", folder=folder).read_bytes()
    other = make_image("-t", "ext4", "-b", "4096").read_bytes()
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB) + other + inner)
    table = "label: dos\nstart=2048, size=32768, type=83\nstart=34816, size=32768, type=83\n"
    run("sfdisk", "--quiet", image, stdin=table)
    disk = MemoryDisk(image.read_bytes())
    mount = Mount(partition=partition)
    manifest = scan(disk, mount=Mount(partition=2))
    oracle = IncrementalCheck(manifest, mount=mount)
    at = data_of(MemoryDisk(image.read_bytes()), NAMES[1], 17 * MIB)
    places = [at, 17 * MIB + 1080, 510, MIB + 1080, 447, 450]
    changed: list[Extent] | None = None
    for place in [*places, *places]:
        assert oracle.check(disk, changed) == check(disk, manifest, mount=mount)
        assert oracle.reads.touches([Extent(0, 512)])
        disk.pwrite(place, bytes([disk.pread(place, 1)[0] ^ 0xFF]))
        changed = [Extent(place, 1)]
    assert oracle.check(disk, changed) == check(disk, manifest, mount=mount)


def test_a_partition_that_moves_to_another_filesystem(
    make_image: Make, run: Run, folder: Path, tmp_path: Path
) -> None:
    one = make_image("-t", "ext4", "-b", "4096", folder=folder).read_bytes()
    for name in NAMES[::2]:
        (folder / name).write_bytes(b"other")
    two = make_image("-t", "ext4", "-b", "4096", folder=folder).read_bytes()
    image = tmp_path / "disk"
    tables = []
    for start in (2048, 34816):
        image.write_bytes(bytes(MIB) + one + two)
        run("sfdisk", "--quiet", image, stdin=f"label: dos\nstart={start}, size=32768, type=83\n")
        tables.append(image.read_bytes()[:512])
    disk = MemoryDisk(tables[0] + image.read_bytes()[512:])
    manifest = scan(disk)
    oracle = IncrementalCheck(manifest)
    assert oracle.check(disk, None).verdict is Verdict.PASS
    for step, place in enumerate([1, 0, 1, 1, 0]):
        disk.pwrite(0, tables[place])
        found = oracle.check(disk, [Extent(0, 512)])
        assert found == check(disk, manifest), step
        assert found.verdict is (Verdict.FAIL if place else Verdict.PASS)


def test_a_relative_manifest_is_resolved_each_time(disk: Counting, folder: Path) -> None:
    manifest = from_directory(folder / "app1")
    inner = IncrementalCheck(manifest)
    first = inner.check(disk, None)
    assert first.verdict is Verdict.PASS
    assert inner.reads is not EVERYTHING
    at = data_of(disk, NAMES[4])
    disk.pwrite(at, b"other")
    assert inner.check(disk, [Extent(at, 5)]) == check(disk, manifest)
    nowhere = IncrementalCheck(Manifest((Entry("node_modules/nowhere", "a" * 64, 1),)))
    for _ in range(2):
        with pytest.raises(ManifestError, match="matches nothing"):
            nowhere.check(disk, [])
        assert nowhere.reads is EVERYTHING


def test_a_failure_of_the_oracle_is_never_kept(
    disk: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = IncrementalCheck(scan(disk))
    assert inner.check(disk, None).verdict is Verdict.PASS
    at = data_of(disk, NAMES[0])

    def fail(*_: object) -> Condition:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(oracle, "classify", fail)
        found = inner.check(disk, [Extent(at, 1)])
        assert found.verdict is Verdict.UNKNOWN
        assert "a bug" in (found.reason or "")
        assert inner.reads is EVERYTHING
    assert inner.check(disk, []).verdict is Verdict.PASS


def test_an_empty_manifest(disk: Counting) -> None:
    assert IncrementalCheck(Manifest(())).check(disk, None) == Findings(Verdict.PASS)


def test_reads_are_a_set_of_bytes() -> None:
    reads = RangeSet([(10, 20), (5, 5), (18, 30), (40, 41)])
    assert list(reads) == [Extent(10, 20), Extent(40, 1)]
    assert reads.total() == 21
    bytes_in = {*range(10, 30), 40}
    for start in range(50):
        for end in range(start, 50):
            assert reads.meets(start, end) == bool(bytes_in & set(range(start, end)))
    assert list(reads.moved(-15, 20)) == [Extent(0, 15)]
    assert reads.isdisjoint(RangeSet([(30, 40), (41, 99)]))
    assert not RangeSet([(0, 11)]).isdisjoint(reads)


def test_a_folder_that_comes_goes_and_comes_again(make_image: Make, folder: Path) -> None:
    """Files of a folder that is not there are followed together, until it is."""
    options = ("-t", "ext4", "-b", "4096", "-O", "^metadata_csum")
    disk = MemoryDisk(make_image(*options, folder=folder).read_bytes())
    wanted = Manifest((*from_directory(folder, "/").entries, Entry("/app1/no", "a" * 64, 1)))
    filesystem = Filesystem(disk)
    top = filesystem.lookup(b"/")
    assert top is not None
    names = filesystem.runs(top)[0].physical * 4096
    whole = disk.pread(0, disk.size)
    renamed = bytearray(whole)
    renamed[names : names + 4096] = renamed[names : names + 4096].replace(b"app1", b"gone")
    inner = IncrementalCheck(wanted)
    seen = []
    for number, content in enumerate((renamed, whole, renamed, whole)):
        state = MemoryDisk(bytes(content))
        found = inner.check(state, [Extent(names, 4096)] if number else None)
        assert found == check(state, wanted)
        seen.append(sum(c is Condition.WHOLE for c in found.conditions.values()))
    assert seen == [8, 12, 8, 12]
