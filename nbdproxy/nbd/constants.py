"""Numbers of the NBD specification (doc/proto.md), and our own limits with their reasons."""

from __future__ import annotations

from enum import IntEnum, IntFlag

NBD_MAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698


class HandshakeFlag(IntFlag):
    """What the server offers in its greeting, and what a client may echo."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    CAN_MULTI_CONN = 256


class Option(IntEnum):
    """What a client may ask before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """How an option is answered; errors have the top bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    """What INFO and GO may tell of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


MIN_BLOCK = 512
"""A sector: the atomic unit of the persistence model, so nothing smaller may be asked for."""

PREFERRED_BLOCK = 4096
MAX_PAYLOAD = 32 * 1024 * 1024
"""The largest READ or WRITE: what the specification tells clients to assume."""

MAX_STRING = 4096
"""The longest name the specification allows."""

MAX_OPTION_DATA = 64 * 1024
"""More than any legal option needs; a longer one is an attack (CVE-2017-15119)."""

MAX_OPTIONS = 32
"""Options before transmission; nbdkit's number, far above what any client sends."""
