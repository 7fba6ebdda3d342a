"""The wire forms that both ends share. All integers are big-endian (proto.md, "Conventions")."""

from __future__ import annotations

import struct

from nbdproxy.nbd.constants import (
    IHAVEOPT,
    MIN_BLOCK,
    NBD_MAGIC,
    OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK,
    SIMPLE_REPLY_MAGIC,
    HandshakeFlag,
    Info,
)

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")

_EXPORT = struct.Struct(">QH")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")


def greeting() -> bytes:
    """Return the server's first 18 bytes."""
    flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    return GREETING.pack(NBD_MAGIC, IHAVEOPT, flags)


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """Return one reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def export_name_reply(size: int, flags: int, *, zeroes: bool) -> bytes:
    """Return the answer to EXPORT_NAME, which has a form of its own."""
    return _EXPORT.pack(size, flags) + (bytes(124) if zeroes else b"")


def info_export(size: int, flags: int) -> bytes:
    """Return the data of an INFO reply that tells size and flags."""
    return _INFO_EXPORT.pack(Info.EXPORT, size, flags)


def info_block_size(maximum: int) -> bytes:
    """Return the data of an INFO reply that tells the block sizes, in bytes."""
    return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, MIN_BLOCK, PREFERRED_BLOCK, maximum)


def info_text(kind: Info, text: str) -> bytes:
    """Return the data of an INFO reply that carries a text."""
    return struct.pack(">H", kind) + text.encode(errors="surrogateescape")


def simple_reply(error: int, cookie: int) -> bytes:
    """Return the header of a simple reply; a READ's data follows it."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
