"""A disk in a raw file or on a block device.

Guarantees: one program at a time writes it (`nbdproxy.disks.locks`), reads that are in the page
cache never block (`try_pread_into`), zeroes and trims are done by fallocate where the filesystem
can.
Does not cover: image formats (`nbdproxy.disks.formats`); a qcow2 file is bytes here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nbdproxy.disks import holes
from nbdproxy.disks.fallocate import punch_hole, zero_range
from nbdproxy.disks.locks import lock
from nbdproxy.disks.mounted import mounted_at
from nbdproxy.errors import ImageError
from nbdproxy.extents import Extent

_ZEROES = memoryview(bytes(1024 * 1024))
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM}


class FileDisk:
    """A raw file or block device as a `BlockDevice`.

    Without `links`, `path` is what it is, and leads nowhere else. Raises ImageError when it is
    missing, empty, or in use by another program.
    """

    def __init__(self, path: Path, *, read_only: bool = False, links: bool = True) -> None:
        self.path = path
        self.read_only = read_only
        self._fd = _open(path, read_only=read_only, links=links)
        try:
            self.size = _size(path, self._fd)
            _check(path, self._fd, self.size, read_only=read_only)
        except BaseException:
            with suppress(OSError):
                os.close(self._fd)
            raise
        self._nowait = True
        self._lost: int | None = None

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; may block on a cold page."""
        while buffer:
            got = os.preadv(self._fd, [buffer], offset)
            if not got:
                raise OSError(errno.EIO, f"{self.path} ended early, at {offset}")
            buffer, offset = buffer[got:], offset + got

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if all of it is in the page cache; False leaves it undefined."""
        if self._nowait:
            try:
                return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                # Filesystems without RWF_NOWAIT are memory-backed ones: reading does not block.
                self._nowait = False
        self.pread_into(offset, buffer)
        return True

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        wrote = os.pwrite(self._fd, data, offset)
        while wrote < len(data):
            wrote += os.pwrite(self._fd, memoryview(data)[wrote:], offset + wrote)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Make a range read as zeroes, by fallocate where possible, else by writing them."""
        for attempt in (punch_hole, zero_range) if may_punch else (zero_range,):
            try:
                attempt(self._fd, offset, length)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
            else:
                return
        if fast:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        end = offset + length
        while offset < end:
            part = _ZEROES[: min(len(_ZEROES), end - offset)]
            self.pwrite(offset, part)
            offset += len(part)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Give a range back; it reads as zeroes afterwards."""
        self.zero(offset, length, may_punch=True, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Ask the kernel to read ahead."""
        with suppress(OSError):  # only a hint: not every filesystem can
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what is not a hole."""
        return holes.data_extents(self._fd, offset, length)

    def sync(self) -> None:
        """Make everything written so far durable (fdatasync); once that failed, it fails for good.

        The kernel says it once and drops the pages, so that a later success would promise what is
        lost: QEMU does the same (block/file-posix.c, `page_cache_inconsistent`).
        """
        if self._lost is None:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._lost = error.errno
                raise
        else:
            said = f"{os.strerror(self._lost)}, at an earlier flush"
            raise OSError(self._lost, f"{said}; see to the disk and start nbdproxy again")

    @property
    def status(self) -> os.stat_result:
        """What the filesystem says of the file that is open, whatever its path names now."""
        return os.fstat(self._fd)

    def close(self) -> None:
        """Close the file and give up its lock; raises OSError if what was written may be lost."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(*[OSError] if self.read_only else []):
                os.close(fd)


def _open(path: Path, *, read_only: bool, links: bool) -> int:
    try:
        # Opening a pipe would wait for somebody at its other end.
        status = path.stat(follow_symlinks=links)
        _check_kind(path, status)
        flags = os.O_RDONLY if read_only else os.O_RDWR
        flags |= 0 if links else os.O_NOFOLLOW
        if stat.S_ISBLK(status.st_mode) and not read_only:
            flags |= os.O_EXCL  # open(2): fails if the device is mounted, or a part of it
        return os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ImageError(f"there is no image at {path}; check the path") from None
    except ImageError:
        raise
    except PermissionError:
        hint = "" if read_only else ", or serve it with --overlay or --read-only"
        raise ImageError(f"{path} may not be opened; check its permissions{hint}") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageError(
                f"{path} is in use on this machine: it, or a part of it, is mounted, belongs to "
                "LVM or md, or is served already; end that first"
            ) from None
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from None


def _check_kind(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path} is a folder; name an image file in it")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise ImageError(f"{path} is neither a file nor a block device; name a disk image")


def _size(path: Path, fd: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise ImageError(f"the size of {path} cannot be told: {error.strerror}") from None


def _check(path: Path, fd: int, size: int, *, read_only: bool) -> None:
    if size == 0:
        raise ImageError(f"{path} is empty; give it a size with: truncate -s 10G {path}")
    lock(path, fd, read_only=read_only)
    try:
        point = mounted_at(os.fstat(fd))
    except OSError as error:
        raise ImageError(
            f"whether {path} is mounted cannot be told ({error.strerror}: {error.filename}); "
            "mount /proc"
        ) from None
    if point is not None:
        raise ImageError(
            f"{path} is mounted at {point}, where this machine changes it; "
            "unmount it, or use a copy"
        )
