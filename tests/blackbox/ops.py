"""The numbers of transmission, as the specification's section "Values" has them, and a request.

Not covered: the numbers of the handshake, which are in `haggle`.
"""

from __future__ import annotations

from typing import NamedTuple

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = 0, 1, 2, 3, 4, 5, 6, 7
UNKNOWN_COMMAND = 0x7ABC

FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
UNKNOWN_FLAG = 1 << 14

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM = 1, 2, 4, 8, 16, 32
SEND_ZEROES, SEND_DF, MULTI_CONN, SEND_RESIZE, SEND_CACHE = 64, 128, 256, 512, 1024
SEND_FAST_ZERO, STATUS_PAYLOAD = 2048, 4096

ERRORS = {
    0: "OK",
    1: "EPERM",
    5: "EIO",
    12: "ENOMEM",
    22: "EINVAL",
    28: "ENOSPC",
    75: "EOVERFLOW",
    95: "ENOTSUP",
    108: "ESHUTDOWN",
}

CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_STATUS_EXT = 0, 1, 2, 5, 6
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2
STATE_HOLE, STATE_ZERO = 1, 2

PAYLOAD_MOST = 1 << 25
"""The maximum payload where the server names none; section "Size constraints"."""


class Op(NamedTuple):
    """One request. `length` is that of `data`, if there is data and no other length is given."""

    command: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    flags: int = 0
