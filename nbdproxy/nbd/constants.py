"""Numbers of the NBD specification (doc/proto.md), and our own limits with their reasons.

Extended headers are those of the specification's branch `extension-ext-header`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

NBD_MAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

NBD_PORT = 10809
"""The port registered for NBD."""


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
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048
    BLOCK_STATUS_PAYLOAD = 4096


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
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


OPTION_ERROR_BIT = 1 << 31
"""Set in every reply to an option that is an error, known or not."""


class Info(IntEnum):
    """What INFO and GO may tell of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Chunk(IntEnum):
    """What a chunk of a structured or extended reply holds; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_ERROR_BIT = 0x8000
CHUNK_DONE = 1
"""The one flag of a chunk: no more chunks follow for this request."""


class ReplyStyle(IntEnum):
    """The form of all headers of a connection, as negotiated."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class TlsMode(IntEnum):
    """What a server says to STARTTLS: the specification's NOTLS, SELECTIVETLS, FORCEDTLS."""

    OFF = 0
    ALLOW = 1
    REQUIRE = 2


class BlockState(IntFlag):
    """The flags of an extent in the context `base:allocation`."""

    HOLE = 1
    ZERO = 2


ALLOCATION = "base:allocation"
"""The one metadata context of the specification, and the one we serve."""

ALLOCATION_ID = 1
"""The number we give it on each connection; the choice is the server's."""

MIN_BLOCK = 1
"""Requests may begin and end at any byte: the specification's default."""

MAX_MIN_BLOCK = 64 * 1024
"""The largest minimum block size that the specification allows a server."""

PREFERRED_BLOCK = 4096
MAX_PAYLOAD = 32 * 1024 * 1024
"""The largest READ or WRITE: what the specification tells clients to assume."""

MAX_STRING = 4096
"""The longest name the specification allows."""

MAX_ERROR_TEXT = 900
"""Bytes of an error's text: QEMU ends a connection for a chunk of over 1000 that is not data."""

MAX_OPTION_DATA = 64 * 1024
"""More than any legal option needs; a longer one is an attack (CVE-2017-15119)."""

MAX_OPTIONS = 32
"""Options before transmission; nbdkit's number, far above what any client sends."""

MAX_OPTIONS_PER_EXPORT = 8
"""Options for each listed export, if that is more: nbdinfo asks of all over one connection."""

MAX_OPTION_REPLIES = 1000
"""Infos or contexts in the answer to one option; servers send a handful, endless ones attack."""

MAX_EXTENTS = 1024
"""Extents in our reply to one BLOCK_STATUS; a client asks on from where the last one ends."""

MAX_REPLY_EXTENTS = 1 << 20
"""Extents in one reply beyond which a server SHOULD NOT go; more is an attack on a client."""

MAX_PIECES = 32 * 1024
"""Gaps in the data of one READ that a client keeps book of: every other sector of 32 MiB."""

MAX_EXPORT_SIZE = 2**63 - 512
"""Offsets must fit the kernel's signed 64 bits; a larger size is an attack (CVE-2023-5215)."""
