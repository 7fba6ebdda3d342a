"""What `FileDisk` refuses, each in one sentence, and what only a file can do.

That it is a bytearray is in tests/laws/test_disks.py. Not covered: real block devices.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdproxy.disks import file as file_module
from nbdproxy.disks.fallocate import zero_range
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError
from tests.support.images import write_sparse

BOTH = pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])


@contextmanager
def nobody_special() -> Iterator[None]:
    """Without root's right to open everything, where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def assert_refused(path: Path, words: str, *, read_only: bool = False) -> None:
    """The image is refused in one sentence that names it."""
    with pytest.raises(ImageError, match=words) as refused:
        FileDisk(path, read_only=read_only)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message


@BOTH
def test_a_missing_image(tmp_path: Path, read_only: bool) -> None:
    assert_refused(tmp_path / "image", "there is no image at .*; check", read_only=read_only)


@BOTH
def test_a_folder(tmp_path: Path, read_only: bool) -> None:
    assert_refused(tmp_path, "is a folder; name an image file", read_only=read_only)


@BOTH
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, read_only: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "neither a file nor a block device", read_only=read_only)


@BOTH
def test_a_socket_and_a_character_device(tmp_path: Path, read_only: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        assert_refused(tmp_path / "socket", "neither a file nor", read_only=read_only)
    assert_refused(Path("/dev/null"), "neither a file nor", read_only=read_only)


@BOTH
def test_an_empty_file_tells_how_to_give_it_a_size(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "image").touch()
    assert_refused(tmp_path / "image", "is empty; .*truncate -s 10G", read_only=read_only)


@pytest.mark.parametrize("size", [1, 511, 513, 196_616])
def test_an_image_of_any_size_keeps_it(tmp_path: Path, size: int) -> None:
    (tmp_path / "image").write_bytes(bytes(size))
    disk = FileDisk(tmp_path / "image")
    assert disk.size == size
    disk.pwrite(size - 1, b"A")
    disk.zero(0, size - 1, may_punch=True)
    disk.close()
    assert (tmp_path / "image").read_bytes() == bytes(size - 1) + b"A"


def test_an_image_that_may_not_be_opened(tmp_path: Path) -> None:
    image = write_sparse(tmp_path / "image", bytes(512))
    image.chmod(0)
    with nobody_special():
        assert_refused(image, "permissions, or serve it with --overlay or --read-only")
        assert_refused(image, "check its permissions$", read_only=True)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_refused(tmp_path / "loop", "cannot be opened: Too many levels")


def test_an_image_belongs_to_one_writer_or_to_many_readers(tmp_path: Path) -> None:
    image = write_sparse(tmp_path / "image", bytes(4096))
    writer = FileDisk(image)
    assert_refused(image, "in use by another nbdproxy.*; end that one")
    assert_refused(image, "in use by another nbdproxy", read_only=True)
    writer.close()
    writer.close()
    readers = [FileDisk(image, read_only=True) for _ in range(2)]
    assert_refused(image, "in use by another nbdproxy")
    for reader in readers:
        reader.close()
    FileDisk(image).close()


def test_a_refused_image_leaves_no_descriptor_open(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert_refused(image, "is empty")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_trims_and_zeroes_that_may_punch_make_holes(tmp_path: Path) -> None:
    disk = FileDisk(write_sparse(tmp_path / "image", b"\x01" * 32768))
    disk.trim(0, 8192)
    disk.zero(16384, 8192, may_punch=True)
    extents = [(extent.offset, extent.end) for extent in disk.data_extents(0, disk.size)]
    assert extents == [(8192, 16384), (24576, 32768)]
    disk.close()


def test_zeroes_that_may_not_punch_stay_allocated(tmp_path: Path) -> None:
    image = write_sparse(tmp_path / "image", b"\x01" * 32768)
    before = image.stat().st_blocks
    disk = FileDisk(image)
    disk.zero(0, 32768, may_punch=False)
    assert disk.pread(0, 32768) == bytes(32768)
    assert image.stat().st_blocks >= before
    disk.close()


def test_zeroes_are_written_where_the_filesystem_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such mode")

    monkeypatch.setattr(file_module, "punch_hole", cannot)
    monkeypatch.setattr(file_module, "zero_range", cannot)
    size = 3 * 1024 * 1024 + 512
    disk = FileDisk(write_sparse(tmp_path / "image", b"\x01" * size))
    disk.zero(512, size - 1024, may_punch=True)
    assert disk.pread(0, size) == b"\x01" * 512 + bytes(size - 1024) + b"\x01" * 512
    disk.close()


def test_an_error_of_the_disk_is_not_taken_for_a_missing_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    disk = FileDisk(write_sparse(tmp_path / "image", b"\x01" * 4096))
    monkeypatch.setattr(file_module, "zero_range", full)
    with pytest.raises(OSError, match="full"):
        disk.zero(0, 4096, may_punch=False)
    disk.close()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FileDisk(write_sparse(tmp_path / "image", bytes(4096)))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data)[:100], at))
    disk.pwrite(512, bytes(range(256)) * 4)
    monkeypatch.undo()
    assert disk.pread(512, 1024) == bytes(range(256)) * 4
    disk.close()


def test_an_image_that_shrank_is_an_error_and_not_zeroes(tmp_path: Path) -> None:
    image = write_sparse(tmp_path / "image", b"\x01" * 8192)
    disk = FileDisk(image)
    os.truncate(image, 4096)
    with pytest.raises(OSError, match="ended early, at 4096"):
        disk.pread(0, 8192)
    assert not disk.try_pread_into(0, memoryview(bytearray(8192)))
    disk.close()


def test_fallocate_reports_the_kernels_error() -> None:
    read, write = os.pipe()
    with pytest.raises(OSError, match=os.strerror(errno.ESPIPE)):
        zero_range(write, 0, 512)
    os.close(read)
    os.close(write)
