"""The words of a request: commands, flags, error numbers, and the request itself.

The numbers are those of the NBD specification (doc/proto.md, "Request types", "Command flags",
"Error values"). Nothing here knows how they travel; that is `nbdproxy.nbd`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple


class Command(IntEnum):
    """What a client asks for."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Modifiers of a command."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class NbdErrno(IntEnum):
    """Error numbers that may stand in a reply."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


def error_name(error: int) -> str:
    """Return an error's name, or its number where nobody knows it, as of a server below."""
    return _ERROR_NAMES.get(error, str(error))


_ERROR_NAMES = {int(one): one.name for one in NbdErrno}


class Request(NamedTuple):
    """One request, validated against the export's size and flags.

    `offset` and `length` are bytes. `payload` is a WRITE's data, a view into the receive buffer
    that is valid only until the batch it came in has been handled; empty for everything else.
    `cookie` is the client's own tag; clients reuse cookies, so nothing is ever ordered by it.
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: memoryview

    @property
    def end(self) -> int:
        """The first byte behind the request."""
        return self.offset + self.length


MODIFYING = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
"""The commands that change what a later read returns."""
