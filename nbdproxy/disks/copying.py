"""Writes a disk to a sparse file."""

from __future__ import annotations

import os

from nbdproxy.disks.device import ReadableDevice

_COPY = 1 << 20
_BLOCK = 1 << 16
_ZEROES = bytes(_BLOCK)


def write_sparse(disk: ReadableDevice, fd: int) -> None:
    """Make an empty file, which is open as `fd`, a raw image of a disk, with holes where it is 0.

    Raises OSError if it cannot be written; what is there by then is not whole.
    """
    os.ftruncate(fd, disk.size)
    for extent in disk.data_extents(0, disk.size):
        for offset in range(extent.offset, extent.end, _COPY):
            data = disk.pread(offset, min(_COPY, extent.end - offset))
            write_blocks(fd, data, offset)


def write_blocks(fd: int, data: bytes, offset: int) -> None:
    """Write what is not zero, in runs of blocks."""
    start = at = 0
    while at < len(data):
        block = data[at : at + _BLOCK]
        if block == _ZEROES[: len(block)]:
            _write_all(fd, memoryview(data)[start:at], offset + start)
            start = at + len(block)
        at += len(block)
    _write_all(fd, memoryview(data)[start:], offset + start)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
