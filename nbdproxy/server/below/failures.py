"""How what goes wrong with a disk is told to a client."""

from __future__ import annotations

import errno
from typing import NamedTuple

from nbdproxy.errors import RecordingError
from nbdproxy.requests import CommandFlag, NbdErrno, Request

_NBD_ERRNO = {
    errno.EPERM: NbdErrno.EPERM,
    errno.ENOMEM: NbdErrno.ENOMEM,
    errno.ENOSPC: NbdErrno.ENOSPC,
    errno.EDQUOT: NbdErrno.ENOSPC,
    errno.EFBIG: NbdErrno.ENOSPC,
}
_FAST_ZERO = int(CommandFlag.FAST_ZERO)


class RequestFailure(NamedTuple):
    """Why a request failed: the NBD error number, and words for people."""

    error: int
    text: str


class ToldError(OSError):
    """A failure that is told to the client as it is, such as one that a server below told us."""

    def __init__(self, failure: RequestFailure) -> None:
        super().__init__(failure.error, failure.text)
        self.failure = failure


NOT_RECORDED = RequestFailure(
    NbdErrno.ENOSPC, "nothing may pass unrecorded, and the recording is full"
)

LOST = RequestFailure(NbdErrno.EIO, "the NBD server below is gone")

NOT_SAVED = RequestFailure(NbdErrno.EIO, "what is there could not be read, and is not lost unsaved")


def failure_of(error: Exception, request: Request | None = None) -> RequestFailure:
    """Return how an error of a disk is told to the client (proto.md, "Error values").

    A damaged recording, which is what a crash state's disk reads from, is EIO.
    """
    if isinstance(error, ToldError):
        return error.failure
    if isinstance(error, RecordingError):
        return RequestFailure(NbdErrno.EIO, str(error))
    number = error.errno if isinstance(error, OSError) else None
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if number == errno.EOPNOTSUPP and request is not None and request.flags & _FAST_ZERO:
        return RequestFailure(NbdErrno.ENOTSUP, "zeroes are not faster than writing here")
    return RequestFailure(_NBD_ERRNO.get(number or 0, NbdErrno.EIO), text)
