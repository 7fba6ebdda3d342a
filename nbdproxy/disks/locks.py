"""Locks on an image: one program writes it, or several read it, QEMU among them.

We take the locks that QEMU takes: open file description locks on single bytes (block/file-posix.c,
`raw_apply_lock_bytes` and `raw_check_lock_bytes`). A shared lock on byte 100 + n says "I do n", one
on byte 200 + n "nobody else may do n", for the permissions of its block layer: 0 consistent reads,
1 writes, 3 changes of the size. Whoever opens an image takes its own, and then looks whether
somebody has one that contradicts. We do the same, as a guest's disk would, so another nbdproxy is
kept out as well. flock(2) is for filesystems without such locks only: NFS and GlusterFS make it a
lock of all bytes, which QEMU's readers would run into.

Guarantees: two that would disturb each other never both go on; both may be refused at the same
instant. Not covered: programs that take no such locks, a QEMU with `locking=off`, one that has an
image open and does not use it yet (it is refused when it begins to), filesystems without locks,
other hosts on filesystems whose locks are local; a partition and its disk, or two nodes of one
device, which are different files (but O_EXCL keeps two nbdproxy from writing those).
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

_TAKEN = {errno.EAGAIN, errno.EACCES}
_HAS_NONE = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_COMM = 15
"""Letters that the kernel keeps of a process's name."""


def lock(path: Path, fd: int, *, read_only: bool) -> None:
    """Take the image for as long as `fd` is open.

    Raises ImageError if somebody else has it, or if that cannot be told.
    """
    try:
        is_free = _take(fd, read_only=read_only)
    except OSError as error:
        raise ImageError(
            f"{path} cannot be locked: {error.strerror}; see to the disk that it is on"
        ) from None
    if not is_free:
        raise ImageError(
            f"{path} is in use by another nbdproxy, or by QEMU or one of its tools{_named(fd)}, "
            f"which {'may write it' if read_only else 'has it open'}; end that one first, or use "
            "a copy"
        )


def _take(fd: int, *, read_only: bool) -> bool:
    """Take all locks that there are; False if somebody else has one that contradicts."""
    for kind in (_take_bytes, _take_all):
        try:
            return kind(fd, read_only=read_only)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _HAS_NONE:
                raise
    return True  # QEMU does without them there, too


def _take_bytes(fd: int, *, read_only: bool) -> bool:
    does = (_READ,) if read_only else (_READ, _WRITE)
    for at in (*(_DOES + one for one in does), _FORBIDS + _WRITE, _FORBIDS + _RESIZE):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_RDLCK, at))
    checks = (*(_FORBIDS + one for one in does), _DOES + _WRITE, _DOES + _RESIZE)
    return not any(_is_taken(fd, at) for at in checks)


def _take_all(fd: int, *, read_only: bool) -> bool:
    fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    return True


def _is_taken(fd: int, at: int) -> bool:
    """Tell whether another open file has a lock on a byte."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, at))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _request(kind: int, at: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)


def _named(fd: int) -> str:
    """Return who else has a file open, as far as that may be seen: " (qemu-io, process 7)".

    Preferred is who has a lock on it; locks that a server keeps are not seen.
    """
    own = os.fstat(fd)
    found = ""
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda one: int(one.name)):
        if int(process.name) == os.getpid():
            continue
        try:
            for link in (process / "fd").iterdir():
                if _is_same(own, link.stat()):
                    named = f" ({_name(process)}, process {process.name})"
                    if "lock:" in (process / "fdinfo" / link.name).read_text():
                        return named
                    found = found or named
        except OSError:
            continue  # another user's, or gone
    return found


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return os.path.samestat(one, other) and one.st_rdev == other.st_rdev


def _name(process: Path) -> str:
    """Return what a program is called; where the kernel cut that off, after its file."""
    name = (process / "comm").read_text(errors="replace").strip()
    program = (process / "exe").readlink().name
    return program if len(name) == _COMM and program.startswith(name) else name
