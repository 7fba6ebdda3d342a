"""The file that the newest part of a stream stands in while it is written.

What is put there is the kernel's at once, and outlives a kill -9. Where the filesystem keeps the
space that was allocated for a file, a copy into a shared map does that without a system call. A
copy-on-write filesystem needs new space whenever a page is written again that has been written
back: in a map its want is a SIGBUS, so there each piece is a pwrite(2), whose error is told.
Guarantee: a full disk is an OSError, of the constructor or of `put`, and never a signal.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import os
from contextlib import suppress

from nbdproxy.private import NEW

_GETFLAGS, _SETFLAGS, _NOCOW = 0x80086601, 0x40086602, 0x00800000
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_NOCOW_FL of linux/fs.h."""
_COPY_ON_WRITE = {0x9123683E, 0xCA451A4E, 0x2FC12FC1, 0xF2F52010}
"""Filesystems that write in new places, by statfs(2): Btrfs, bcachefs, ZFS, F2FS."""
_libc = ctypes.CDLL(None, use_errno=True)


class Tail:
    """A new file `name` of `size` bytes in a folder, filled by one thread; any may read `view`.

    With `durable` it can be synced. If it `is_mapped`, what is put may go to `view` instead.
    """

    def __init__(self, name: str, folder: int, size: int, *, durable: bool) -> None:
        self._fd = os.open(name, os.O_RDWR | NEW, 0o600, dir_fd=folder)
        try:
            self.is_mapped = not _is_copied_on_write(self._fd)
            os.posix_fallocate(self._fd, 0, size)
            self._map = mmap.mmap(self._fd, size)
        except BaseException:
            self.close_file()
            raise
        self.view = memoryview(self._map)
        """What is in it."""
        if self.is_mapped and not durable:
            self.close_file()

    def put(self, where: int, data: bytes | memoryview) -> None:
        """Copy `data` to a place; raises OSError if there is no room for it."""
        if self.is_mapped:
            self.view[where : where + len(data)] = data
            return
        wrote = os.pwrite(self._fd, data, where)
        while wrote < len(data):
            wrote += os.pwrite(self._fd, memoryview(data)[wrote:], where + wrote)

    def sync(self) -> None:
        """Make durable what was put before this call."""
        os.fdatasync(self._fd)

    def close_file(self) -> None:
        """Close the file; the map stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # what was written has been synced, or has failed before
                os.close(fd)

    def close(self) -> None:
        """Close the file and its map."""
        self.close_file()
        self.view.release()
        # The traceback of a failed write still refers to the map, which then goes with it.
        with suppress(BufferError):
            self._map.close()


def _is_copied_on_write(fd: int) -> bool:
    """Tell whether a new file's pages may need new space when they are written again.

    If so, it asks for the file to be written in place, which spares most of that.
    """
    flags = array.array("l", [0])
    try:
        fcntl.ioctl(fd, _GETFLAGS, flags)
        flags[0] |= _NOCOW
        fcntl.ioctl(fd, _SETFLAGS, flags)
    except OSError:
        return _kind_of_filesystem(fd) in _COPY_ON_WRITE
    return True  # only such filesystems have the flag; of an overlay it is the one below


def _kind_of_filesystem(fd: int) -> int:
    found = (ctypes.c_ulong * 32)()  # struct statfs begins with f_type, and is 120 bytes
    if _libc.fstatfs(fd, ctypes.byref(found)):
        return 0
    return int(found[0])
