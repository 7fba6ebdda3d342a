"""The file that the newest part of a stream stands in while it is written.

What is put there is the kernel's at once, and outlives a kill -9. Where the filesystem keeps the
space that was allocated for a file whatever is done to it, a copy into a shared map does that
without a system call. Elsewhere a page may need new space when it is written again: Btrfs writes
in new places, and XFS does when somebody has copied the file meanwhile (cp --reflink, which is how
cp copies). In a map its want is a SIGBUS, so there each piece is a pwrite(2), whose error is told.
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
_EXT4, _TMPFS, _XFS = 0xEF53, 0x01021994, 0x58465342
"""Filesystems, by statfs(2): ext4 is ext2 and ext3, too."""
_libc = ctypes.CDLL(None, use_errno=True)


class Tail:
    """A new file `name` of `size` bytes in a folder, filled by one thread; any may read `view`.

    With `durable` it can be synced. If it `is_mapped`, what is put may go to `view` instead; if it
    `is_direct`, other files may be written from `view` with O_DIRECT.
    """

    def __init__(self, name: str, folder: int, size: int, *, durable: bool) -> None:
        self._fd = os.open(name, os.O_RDWR | NEW, 0o600, dir_fd=folder)
        try:
            moves = _ask_to_stay(self._fd)
            kind = _kind_of_filesystem(self._fd)
            self.is_mapped = kind in {_EXT4, _TMPFS} and not moves
            # Btrfs before Linux 6.4 leaves a hole if a page of the map is not in memory.
            self.is_direct = self.is_mapped or kind == _XFS
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


def _ask_to_stay(fd: int) -> bool:
    """Ask for a new file to be written in place; tell whether its filesystem knows that flag.

    Only those that write in new places do, or lie on one. It spares most of that.
    """
    flags = array.array("l", [0])
    try:
        fcntl.ioctl(fd, _GETFLAGS, flags)
        flags[0] |= _NOCOW
        fcntl.ioctl(fd, _SETFLAGS, flags)
    except OSError:
        return False
    return True


def _kind_of_filesystem(fd: int) -> int:
    found = (ctypes.c_ulong * 32)()  # struct statfs begins with f_type, and is 120 bytes
    if _libc.fstatfs(fd, ctypes.byref(found)):
        return 0
    return int(found[0])
