"""fallocate(2) with its modes, which Python's `os.posix_fallocate` does not offer."""

from __future__ import annotations

import ctypes
import errno
import os
from enum import IntFlag

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Mode(IntFlag):
    """Modes of fallocate(2)."""

    KEEP_SIZE = 1
    PUNCH_HOLE = 2
    ZERO_RANGE = 16


def fallocate(fd: int, mode: Mode, offset: int, length: int) -> None:
    """Call fallocate(2); raises OSError, with EOPNOTSUPP where the filesystem lacks the mode."""
    while _libc.fallocate(fd, int(mode), offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:  # as Python's own calls: a signal is no failure
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give a range back; it reads as zeroes and the size stays."""
    fallocate(fd, Mode.PUNCH_HOLE | Mode.KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeroes and keep it allocated."""
    fallocate(fd, Mode.ZERO_RANGE | Mode.KEEP_SIZE, offset, length)
