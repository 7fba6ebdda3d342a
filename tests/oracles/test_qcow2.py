"""The guest's disk in a qcow2 file, against QEMU's own reading of it."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import ExtentSet
from nbdproxy.oracles.check import Verdict, check
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.partitions import slices
from nbdproxy.oracles.qcow2 import Qcow2Device, Qcow2Error, Structure, is_qcow2

Run = Callable[..., str]
Make = Callable[..., Path]
SECTOR = 512
SIZES = [4 << 20, (5 << 20) + 7 * SECTOR]


def load(path: Path) -> MemoryDisk:
    """A file of any length, filled up to whole sectors as the proxy does."""
    data = path.read_bytes()
    return MemoryDisk(data + bytes(-len(data) % SECTOR))


def some_work(rng: random.Random, size: int, cluster: int) -> list[str]:
    """Words for qemu-io: writes, zeroes, discards, and perhaps a compressed cluster before them."""
    words = []
    if rng.random() < 0.5:
        words += ["-c", f"write -c -P 7 {rng.randrange(size // cluster - 1) * cluster} {cluster}"]
    for _ in range(30):
        at = rng.randrange(size // SECTOR) * SECTOR
        length = min(size - at, SECTOR * rng.choice([1, 8, 100, 300]))
        what = rng.choice([f"write -P {rng.randrange(1, 255)}"] * 4 + ["write -z", "discard"])
        words += ["-c", f"{what} {at} {length}"]
    return words


@pytest.mark.parametrize("seed", range(12))
def test_it_reads_what_qemu_reads(run: Run, tmp_path: Path, seed: int) -> None:
    """Also of a file that lost its end, be it data or tables."""
    rng = random.Random(seed)
    cluster, compat = rng.choice([512, 4096, 65536]), rng.choice(["0.10", "1.1"])
    image, raw, size = tmp_path / "image", tmp_path / "raw", rng.choice(SIZES)
    options = f"cluster_size={cluster},compat={compat}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(size))
    run("qemu-io", "-f", "qcow2", *some_work(rng, size, cluster), image)
    if seed >= 8:
        os.truncate(image, rng.randrange(1, image.stat().st_size // SECTOR) * SECTOR)
    run("qemu-img", "convert", "-O", "raw", image, raw)
    expected, disk = raw.read_bytes(), Qcow2Device(load(image))
    assert disk.size == size
    assert disk.pread(0, size) == expected
    shown = bytearray(size)
    for extent in disk.data_extents(0, size):
        shown[extent.offset : extent.end] = expected[extent.offset : extent.end]
    assert shown == expected
    for _ in range(20):
        at = rng.randrange(size)
        length = min(size - at, rng.randrange(1, 9000))
        assert disk.pread(at, length) == expected[at : at + length]


@pytest.mark.parametrize("seed", range(20))
def test_what_qemu_refuses_is_refused_and_nothing_else(run: Run, tmp_path: Path, seed: int) -> None:
    """Entries of tables are exchanged for others, possible and impossible ones."""
    rng = random.Random(seed)
    cluster, compat = rng.choice([512, 4096]), rng.choice(["0.10", "1.1"])
    image, raw, size = tmp_path / "image", tmp_path / "raw", SIZES[0]
    options = f"cluster_size={cluster},compat={compat}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(size))
    run("qemu-io", "-f", "qcow2", *some_work(rng, size, cluster), image)
    data = bytearray(image.read_bytes())
    tables = [
        extent
        for kind, extent in Qcow2Device(load(image)).structures()
        if kind in {Structure.L1, Structure.L2}
    ]
    for _ in range(3):
        extent = rng.choice(tables)
        at = extent.offset + rng.randrange(extent.length // 8) * 8
        elsewhere = rng.randrange(2 * len(data)) // SECTOR * SECTOR
        data[at : at + 8] = rng.choice(
            [bytes(8), rng.randbytes(8), b"\xff" * 8, (1 << 63 | elsewhere).to_bytes(8)]
        )
    image.write_bytes(data)
    words = ["qemu-img", "convert", "-O", "raw", str(image), str(raw)]
    qemu_reads_it = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        found = Qcow2Device(load(image)).pread(0, size)
    except Qcow2Error:
        assert not qemu_reads_it
    else:
        assert qemu_reads_it
        assert found == raw.read_bytes()


def test_each_written_cluster_has_an_owner(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 200K", image)
    base = load(image)
    disk = Qcow2Device(base)
    known = ExtentSet()
    for extent in (*(own for _, own in disk.structures()), *disk.on_disk(0, disk.size)):
        known.add(extent.offset, extent.end)
    for extent in base.data_extents(0, base.size):
        for at in range(extent.offset, extent.end, SECTOR):
            assert known.covers(at, at + SECTOR) or not any(base.pread(at, SECTOR))


def test_what_is_not_read_here_is_refused(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    for words in (
        ["-o", "extended_l2=on"],
        ["-o", "compression_type=zstd"],
        ["-b", tmp_path / "other", "-F", "raw"],
        ["-o", f"data_file={tmp_path / 'data'}"],
    ):
        (tmp_path / "other").write_bytes(bytes(1 << 20))
        run("qemu-img", "create", "-q", "-f", "qcow2", *words, image, "1M")
        with pytest.raises(Qcow2Error, match="not read here"):
            Qcow2Device(load(image))
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    disk = load(image)
    disk.pwrite(36, struct.pack(">I", 1 << 30))  # the entries of its L1 table
    found = check(disk, Manifest((Entry("/a", "0" * 64, 1),)))
    assert found.verdict is Verdict.UNKNOWN and "L1 table" in str(found.reason)
    disk = load(image)
    disk.pwrite(int.from_bytes(disk.pread(40, 8), "big"), struct.pack(">Q", (1 << 20) + SECTOR))
    with pytest.raises(Qcow2Error, match="at an impossible place"):
        Qcow2Device(disk).pread(0, 1)


@pytest.mark.parametrize(
    ("at", "form", "value"), [(72, ">Q", 1 << 9), (96, ">I", 7), (100, ">I", 96), (48, ">Q", 512)]
)
def test_a_header_that_qemu_refuses(
    run: Run, tmp_path: Path, at: int, form: str, value: int
) -> None:
    """An unknown feature, the refcounts' order, the header's length, the refcount table's place."""
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with image.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, value))
    words = ["qemu-img", "convert", "-O", "raw", str(image), str(tmp_path / "raw")]
    assert subprocess.run(words, capture_output=True, check=False).returncode
    with pytest.raises(Qcow2Error):
        Qcow2Device(load(image))


def test_one_table_for_the_whole_disk_is_refused(run: Run, tmp_path: Path) -> None:
    """Hostile: petabytes of data in a small file."""
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "2G")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64K", image)
    disk = load(image)
    l1 = int.from_bytes(disk.pread(40, 8), "big")
    disk.pwrite(l1 + 8, disk.pread(l1, 8))
    with pytest.raises(Qcow2Error, match="twice"):
        Qcow2Device(disk)


def test_files_are_found_inside(run: Run, make_image: Make, tmp_path: Path) -> None:
    """In both ways of judging, and on another state of the file, where an L2 entry is gone."""
    root = tmp_path / "root"
    root.mkdir()
    content = b"content" * 4000
    (root / "a").write_bytes(content)
    image = tmp_path / "qcow2"
    raw = make_image("-t", "ext4", folder=root)
    run("qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=4096", raw, image)
    disk = load(image)
    assert is_qcow2(disk)
    [part] = slices(disk)
    assert not part.is_direct
    wanted = Manifest((Entry("/a", digest([content]), len(content)),))
    follower = IncrementalCheck(wanted)
    assert check(disk, wanted).verdict is Verdict.PASS
    assert follower.check(disk, None).verdict is Verdict.PASS
    device = Qcow2Device(disk)
    at = device.pread(0, device.size).index(content[:512])
    [piece] = device.runs(at, at + 512)
    assert piece.entry is not None
    disk.pwrite(piece.entry, bytes(8))
    after = check(disk, wanted)
    assert after.verdict is Verdict.FAIL
    assert follower.check(disk, None) == after
