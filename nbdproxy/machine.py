"""Limits of this machine: room for open files, and what to do about an error that is not ours.

Covers what a full disk, a limit or a broken disk makes a call fail with, wherever that is. Every
other OSError that nobody took is a fault of nbdproxy, and keeps its traceback.
"""

from __future__ import annotations

import errno
import resource

from nbdproxy.errors import UsageError

_OWN = 32
"""Descriptors of a server without exports."""
_EACH = 12
"""Descriptors of an export: image, cache, recording, and a server below."""
_CLIENTS = 160
"""Descriptors of all clients that there may be, those of the control socket included."""
_TODO = {
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "end what has so many files open on this machine",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for a larger quota",
    errno.EFBIG: "raise the limit of a file's size: ulimit -f unlimited",
    errno.EIO: "look at that disk; dmesg says more",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ENOMEM: "end other programs, or add memory",
    errno.EAGAIN: "raise the limit of processes and threads: ulimit -u",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
}


def said_of(error: BaseException) -> str | None:
    """Return what an error of the machine says, and what to do; None if it may be our fault."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory; {_TODO[errno.ENOMEM]}"
    if not isinstance(error, OSError) or (todo := _TODO.get(error.errno or 0)) is None:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {todo}"


def make_room_for_exports(count: int) -> None:
    """Raise the limit of open files as far as so many exports and their clients need.

    Raises UsageError if this machine does not allow what the exports alone need.
    """
    needed = _OWN + _EACH * count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < needed:
        raise UsageError(
            f"{count} exports need up to {needed} open files, and {hard} are allowed; raise the "
            f"limit, as root: ulimit -n {needed + _CLIENTS}, or serve fewer images at once"
        )
    wanted = needed + _CLIENTS
    if soft != unlimited and soft < wanted:
        allowed = wanted if hard == unlimited else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
