"""`WorkingImage`: a raw file that follows a disk from state to state, and is lent to programs.

Copying a disk of a gigabyte for each state takes seconds, and between two states little differs: so
there is one file, and what differs is written to it. Whoever it is lent to may do to it what they
like. Afterwards every block of it is compared with what was written there, by a digest of 128 bits,
and what they changed is written anew: times of change would not tell, as a mapping of a file on
tmpfs is written without them.

Guarantees: after `bring` the file equals the disk, with holes where that reads zeroes. A file that
was replaced, renamed, linked, or has other permissions, and one that a process still has open, is
never lent again; a new one is made (fcntl(2): a lease for writing is given only if nobody else has
the file open). Each loan is in a folder of its own, and what is left there is removed.

Where a filesystem knows no leases, a new file is made each time. Seen on ext4, XFS, Btrfs, tmpfs
and overlayfs, also with a process that outlives its loan and only has the file mapped.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from xxhash import xxh3_128_digest

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.fallocate import punch_hole
from nbdproxy.disks.holes import data_extents
from nbdproxy.disks.scratch import scratch_folder, write_scratch
from nbdproxy.extents import Extent

BLOCK = 1 << 16
"""Bytes that are compared, and written anew, at once."""
_BATCH = 16
"""Blocks that are read in one go."""


class WorkingImage:
    """A file of scratch space; `close` removes it. Not thread-safe."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=scratch_folder())
        self._home = Path(self._folder.name) / "image"
        self._fd = -1
        self._size = 0
        self._digests: dict[int, bytes] = {}  # of the blocks that are not zero
        self._was_lent = False

    def bring(self, disk: ReadableDevice, changed: Iterable[Extent] | None) -> None:
        """Make the file equal to `disk`.

        `changed` covers all in which that may differ from the disk of the call before; None is
        everything. Raises OSError if the file cannot be written.
        """
        try:
            if self._fd >= 0 and disk.size != self._size:
                self._drop()
            spoilt = self._spoilt() if self._fd >= 0 and self._was_lent else set()
            if self._fd < 0:
                self._make(disk.size)
                changed = None
            if changed is None:
                changed = [*disk.data_extents(0, disk.size), *map(_extent, self._digests)]
            self._write(disk, spoilt | set(_blocks(changed, self._size)), spoilt)
            self._was_lent = False
        except BaseException:
            self._drop()
            raise

    @contextmanager
    def lent(self) -> Iterator[Path]:
        """Lend the file for the block, under a name that nobody had before."""
        with tempfile.TemporaryDirectory(
            prefix="nbdproxy-", dir=scratch_folder(), ignore_cleanup_errors=True
        ) as folder:
            path = Path(folder) / "image"
            self._was_lent = True
            self._home.rename(path)
            before = os.fstat(self._fd)
            try:
                yield path
            finally:
                if not self._take_back(path, before):
                    self._drop()

    def close(self) -> None:
        """Remove the file; closing twice is harmless."""
        self._drop()
        self._folder.cleanup()

    def _make(self, size: int) -> None:
        self._fd = os.open(self._home, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size)
        self._size = size

    def _drop(self) -> None:
        """Forget the file, whoever still has it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._home.unlink(missing_ok=True)
        self._digests = {}
        self._was_lent = False

    def _take_back(self, path: Path, before: os.stat_result) -> bool:
        """Move the file home; tell whether it is still ours alone."""
        try:
            after = path.lstat()
            same = _identity(after) == _identity(before)
            if not same or not _is_free(self._fd):
                return False
            path.rename(self._home)
        except OSError:
            return False
        return True

    def _spoilt(self) -> set[int]:
        """Return the blocks that are not as they were written, and give the file its size again."""
        if os.fstat(self._fd).st_size != self._size:
            os.ftruncate(self._fd, self._size)
        found = set()
        there = set(_blocks(data_extents(self._fd, 0, self._size), self._size))
        for start, stop in _runs(there):
            data = _read(self._fd, start * BLOCK, min(stop * BLOCK, self._size))
            for block, part in enumerate(_parts(data), start):
                if _digest(part) != self._digests.get(block):
                    found.add(block)
        # What is a hole now and was data then; and zeroes where there was a hole take up room.
        return found | (self._digests.keys() ^ there)

    def _write(self, disk: ReadableDevice, blocks: Iterable[int], spoilt: set[int]) -> None:
        for start, stop in _runs(blocks):
            data = disk.pread(start * BLOCK, min(stop * BLOCK, self._size) - start * BLOCK)
            for block, part in enumerate(_parts(data), start):
                digest = _digest(part)
                if digest == self._digests.get(block) and block not in spoilt:
                    continue
                if digest is not None:
                    write_scratch(self._fd, part, block * BLOCK)
                    self._digests[block] = digest
                elif block in self._digests or block in spoilt:
                    _clear(self._fd, block * BLOCK, len(part))
                    self._digests.pop(block, None)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Return what a file has that was neither replaced nor linked, nor closed to us."""
    return (found.st_dev, found.st_ino, found.st_nlink, found.st_mode, found.st_uid, found.st_gid)


def _is_free(fd: int) -> bool:
    """Tell whether no other open file is of the same file, in any process."""
    try:
        # Should one be opened just now, the signal must not be SIGIO, which ends a process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _extent(block: int) -> Extent:
    return Extent(block * BLOCK, BLOCK)


def _blocks(extents: Iterable[Extent], size: int) -> Iterator[int]:
    """Yield the blocks that extents touch; perhaps some of them twice."""
    for extent in extents:
        yield from range(extent.offset // BLOCK, -(-min(extent.end, size) // BLOCK))


def _runs(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of blocks, ascending, none of them too long to be read at once."""
    start = stop = -1
    for block in sorted(blocks):
        if block != stop or stop - start == _BATCH:
            if stop > start:
                yield start, stop
            start = block
        stop = block + 1
    if stop > start:
        yield start, stop


def _parts(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + BLOCK] for at in range(0, len(data), BLOCK))


def _digest(part: memoryview) -> bytes | None:
    """Return a block's digest; None for zeroes, which are a hole."""
    digest = xxh3_128_digest(part)
    return None if digest == _digest_of_zeroes(len(part)) else digest


@cache
def _digest_of_zeroes(length: int) -> bytes:
    return xxh3_128_digest(bytes(length))


def _read(fd: int, start: int, end: int) -> bytes:
    data = os.pread(fd, end - start, start)
    while len(data) < end - start:
        more = os.pread(fd, end - start - len(data), start + len(data))
        if not more:
            return data.ljust(end - start, b"\0")  # somebody has just cut it off
        data += more
    return data


def _clear(fd: int, offset: int, length: int) -> None:
    """Make zeroes of a range, and a hole where there can be holes."""
    try:
        punch_hole(fd, offset, BLOCK)  # also what is left of a last page, behind the end
    except OSError:
        write_scratch(fd, bytes(length), offset)
