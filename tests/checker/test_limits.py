"""What the lab's kernel cannot mount because of its own limits, and what is really broken."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdproxy.checker.drivers import DRIVERS, Driver, RefusedByKernelError, refusal
from nbdproxy.checker.guest import GuestError
from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.checksum import ONES, crc32c
from nbdproxy.oracles.filesystems import FilesystemKind
from nbdproxy.oracles.mounts import ONLY
from tests.support.states import files, opened

MIB = 1 << 20
LARGE, MAKE_SMALL = 1 << 30, "mke2fs -q -F -t ext4 -d {root}"
MANIFEST = files(a=b"content")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def made(image: Path, command: str) -> OverlayDisk:
    """A filesystem that holds /a."""
    root = image.parent / "root"
    root.mkdir()
    (root / "a").write_bytes(b"content")
    proto = image.parent / "proto"
    proto.write_text(f"/stand/diag\n0 0\nd--755 0 0\na ---644 0 0 {root}/a\n$\n")
    words = command.format(root=root, proto=proto).split()
    subprocess.run([*words, str(image)], check=True, capture_output=True)
    return opened(image)


def judged(kernel: KernelOracle, disk: OverlayDisk) -> Findings:
    return kernel.prepare_check(MANIFEST, earlier={}, mount=ONLY).check(disk, None)


@pytest.mark.lab
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mkfs.xfs -q -b size=65536 -p {proto}", "blocksize 65536"),
        ("mke2fs -q -F -t ext4 -b 65536 -d {root}", "bad block size 65536"),
        ("mkfs.btrfs -q -s 16384 --rootdir {root}", "sectorsize 16384 not yet supported"),
        ("mkfs.btrfs -q -s 65536 -n 65536 --rootdir {root}", "sectorsize 65536 not yet"),
        ("mke2fs -q -F -t ext4 -b 1024 -O verity -d {root}", "Unsupported blocksize for fs-verity"),
    ],
)
def test_sizes_that_the_lab_s_kernel_cannot_mount_are_unknown(
    kernel: KernelOracle, image: Path, command: str, words: str
) -> None:
    disk = made(image, command)
    found = judged(kernel, disk)
    if found.verdict is Verdict.PASS:
        return  # a newer kernel of the lab's, Debian 13's for one, has no such limit
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert words in str(found.reason)
    assert kernel.examine(disk, partition=None).mounts is None


@pytest.mark.lab
@pytest.mark.parametrize(
    "command",
    [
        "mkfs.xfs -q -m crc=0 -p {proto}",
        "mkfs.xfs -q -s size=4096 -p {proto}",
        "mkfs.btrfs -q --csum xxhash --rootdir {root}",
        "mkfs.btrfs -q --csum blake2 --rootdir {root}",
        "mke2fs -q -F -t ext4 -O quota,project,mmp,bigalloc,casefold -d {root}",
    ],
)
def test_what_it_can_mount_is_read(kernel: KernelOracle, image: Path, command: str) -> None:
    assert judged(kernel, made(image, command)).verdict is Verdict.PASS


@pytest.mark.lab
def test_a_seed_of_btrfs_is_mounted_for_reading(kernel: KernelOracle, image: Path) -> None:
    made(image, "mkfs.btrfs -q --rootdir {root}")
    subprocess.run(["btrfstune", "-f", "-S", "1", image], check=True, capture_output=True)
    disk = opened(image)
    assert judged(kernel, disk).verdict is Verdict.PASS
    assert kernel.paths(disk, mount=ONLY) == ["/a"]
    assert kernel.roots(disk, None) == ("/",)
    found = kernel.examine(disk, partition=None)
    assert found.mounts and not found.replayed


class Superblock(NamedTuple):
    """Where a superblock is, its incompatible features, its checksum, and of what that is."""

    command: str
    at: int
    length: int
    features: str
    features_at: int
    checksum_at: int
    summed_from: int


SUPERBLOCKS = {
    "xfs": Superblock("mkfs.xfs -q -p {proto}", 0, 512, ">I", 216, 224, 0),
    "btrfs": Superblock("mkfs.btrfs -q --rootdir {root}", 0x10000, 4096, "<I", 0xBC, 0, 32),
}


@pytest.mark.lab
@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_a_feature_from_a_newer_kernel_is_unknown_and_a_wrong_checksum_is_not(
    kernel: KernelOracle, image: Path, fs: str
) -> None:
    it = SUPERBLOCKS[fs]
    disk = made(image, it.command)
    block = bytearray(disk.pread(it.at, it.length))
    known = struct.unpack_from(it.features, block, it.features_at)[0]
    struct.pack_into(it.features, block, it.features_at, known | 1 << 30)
    disk.pwrite(it.at, bytes(block))
    found = judged(kernel, disk)
    assert found.verdict is Verdict.FAIL and "refuses to mount" in str(found.reason)
    assert found.conditions == {"/a": Condition.UNREADABLE}

    struct.pack_into("<I", block, it.checksum_at, 0)
    checksum = crc32c(ONES, bytes(block[it.summed_from :])) ^ ONES
    struct.pack_into("<I", block, it.checksum_at, checksum)
    disk.pwrite(it.at, bytes(block))
    found = judged(kernel, disk)
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert "unknown incompat" in str(found.reason)


@pytest.mark.lab
def test_disks_of_any_size_have_one_guest(kernel: KernelOracle, tmp_path: Path) -> None:
    guests = set()
    for size in (3 * MIB, 7 * MIB + 512, 1 << 40):
        image = tmp_path / str(size) / "image"
        image.parent.mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        disk = made(image, "mkfs.btrfs -q --rootdir {root}" if size > LARGE else MAKE_SMALL)
        assert judged(kernel, disk).verdict is Verdict.PASS
        with kernel.mounted(kernel.place(disk, None)) as guest:
            guests.add(guest)
    assert len(guests) == 1


EXT, XFS, BTRFS = (DRIVERS[kind] for kind in list(FilesystemKind)[:3])


@pytest.mark.parametrize("driver", [EXT, XFS, BTRFS])
@pytest.mark.parametrize(
    "code", [errno.EBUSY, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.ENXIO, errno.EPERM]
)
def test_what_may_be_the_guest_s_own_fault_is_no_verdict(driver: Driver, code: int) -> None:
    said = refusal(driver, code, ["EXT4-fs (vdb1): failed to open device, -16; corrupt"])
    assert isinstance(said, GuestError)
    assert errno.errorcode[code] in str(said)


@pytest.mark.parametrize("driver", [EXT, XFS, BTRFS])
@pytest.mark.parametrize(
    "code", [errno.EIO, errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP, errno.EACCES]
)
def test_no_words_are_no_verdict(driver: Driver, code: int) -> None:
    for words in ([], ["clocksource: Long readout interval"]):
        said = refusal(driver, code, words)
        assert isinstance(said, FilesystemError) and not isinstance(said, RefusedByKernelError)
    assert os.strerror(code) in str(refusal(driver, code, []))


@pytest.mark.parametrize(
    ("driver", "code", "words"),
    [
        (EXT, errno.EUCLEAN, "EXT4-fs (vdb1): group descriptors corrupted!"),
        (EXT, errno.EINVAL, "EXT4-fs (vdb1): bad geometry: block count 9 exceeds size of device"),
        (EXT, errno.EIO, "EXT4-fs (vdb1): can't read group descriptor 1"),
        (EXT, errno.EINVAL, "EXT4-fs (vdb1): error loading journal"),
        (EXT, errno.EINVAL, "EXT4-fs warning (device vdb1): Failed to enable quota tracking"),
        (XFS, errno.EUCLEAN, "XFS (vdb1): log mount/recovery failed: error -117"),
        (XFS, errno.EINVAL, "XFS (vdb1): Failed to read root inode 0x80, error 22"),
        (BTRFS, errno.EINVAL, "BTRFS error (device vdb1): superblock checksum mismatch"),
        (BTRFS, errno.EIO, "BTRFS error (device vdb1): failed to read chunk root"),
    ],
)
def test_what_a_driver_finds_broken_is_a_verdict(driver: Driver, code: int, words: str) -> None:
    said = refusal(driver, code, [words, "mount failed"])
    assert isinstance(said, RefusedByKernelError)
    vetoed = [words, "this feature is not supported by this kernel"]
    assert not isinstance(refusal(driver, code, vetoed), RefusedByKernelError)
