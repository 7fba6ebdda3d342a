"""Locks on an image: one program writes it, or several read it, QEMU among them.

Two kinds. flock(2) keeps nbdproxy from nbdproxy. QEMU has open file description locks on single
bytes (block/file-posix.c, `raw_apply_lock_bytes` and `raw_check_lock_bytes`): a shared lock on byte
100 + n says "I do n", one on byte 200 + n "nobody else may do n", for the permissions of its block
layer: 0 consistent reads, 1 writes, 3 changes of the size. Whoever opens an image takes its own,
and then looks whether somebody has one that contradicts. We do the same, as a guest's disk would.

Guarantees: two that would disturb each other never both go on; both may be refused at the same
instant. Not covered: programs that take neither kind, filesystems without locks, other hosts on
filesystems whose locks are local.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from nbdproxy.errors import ImageError

_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""


def lock(path: Path, fd: int, *, read_only: bool) -> None:
    """Take the image for as long as `fd` is open; raises ImageError if somebody else has it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ImageError(
            f"{path} is in use by another nbdproxy{_named(fd)}; end that one first, or serve a copy"
        ) from None
    does = (_READ,) if read_only else (_READ, _WRITE)
    try:
        for at in (*(_DOES + one for one in does), _FORBIDS + _WRITE, _FORBIDS + _RESIZE):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_RDLCK, at))
        checks = (*(_FORBIDS + one for one in does), _DOES + _WRITE, _DOES + _RESIZE)
        is_taken = any(_is_taken(fd, at) for at in checks)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            is_taken = True
        else:
            return  # a filesystem without such locks: QEMU does without them there, too
    if is_taken:
        raise ImageError(
            f"{path} is in use by QEMU or one of its tools{_named(fd)}, which "
            f"{'may write it' if read_only else 'has it open'}; end that one first, or use a copy"
        )


def _is_taken(fd: int, at: int) -> bool:
    """Tell whether another open file has a lock on a byte."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, at))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _request(kind: int, at: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)


def _named(fd: int) -> str:
    """Return who else has a file open, as far as that may be seen: " (qemu-io, process 7)"."""
    own = os.fstat(fd)
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda one: int(one.name)):
        if int(process.name) == os.getpid():
            continue
        try:
            for link in (process / "fd").iterdir():
                there = link.stat()
                if (there.st_dev, there.st_ino, there.st_rdev) == (
                    own.st_dev,
                    own.st_ino,
                    own.st_rdev,
                ):
                    name = (process / "comm").read_text().strip()
                    return f" ({name}, process {process.name})"
        except OSError:
            continue  # another user's, or gone
    return ""
