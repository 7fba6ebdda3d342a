"""The wire forms that both ends share. All integers are big-endian (proto.md, "Conventions")."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from nbdproxy.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    NBD_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    HandshakeFlag,
    Info,
)
from nbdproxy.nbd.export_info import ExportInfo

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
EXPORT_NAME_ZEROES = 124
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")

REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")

SIMPLE_REPLY = struct.Struct(">IIQ")
"""Magic, error, cookie."""
STRUCTURED_REPLY = struct.Struct(">IHHQI")
"""Magic, flags, chunk type, cookie, length of the payload."""
EXTENDED_REPLY = struct.Struct(">IHHQQQ")
"""Magic, flags, chunk type, cookie, the request's offset, length of the payload."""

DATA_HEAD = struct.Struct(">Q")
HOLE = struct.Struct(">QI")
ERROR_HEAD = struct.Struct(">IH")
STATUS_HEAD = struct.Struct(">I")
STATUS_EXTENT = struct.Struct(">II")
STATUS_EXT_HEAD = struct.Struct(">II")
STATUS_EXT_EXTENT = struct.Struct(">QQ")

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")

NAME_HEAD = _U32.size
"""Bytes in front of a name: its length."""

MAX_SHOWN = 200
"""Characters of a peer's text that are shown; a longer one is cut."""


def greeting() -> bytes:
    """Return the server's first 18 bytes."""
    flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    return GREETING.pack(NBD_MAGIC, IHAVEOPT, flags)


def option(number: int, body: bytes = b"") -> bytes:
    """Return one option as a client sends it."""
    return OPTION.pack(IHAVEOPT, number, len(body)) + body


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """Return one reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def export_name_reply(size: int, flags: int, *, zeroes: bool) -> bytes:
    """Return the answer to EXPORT_NAME, which has a form of its own."""
    return EXPORT_NAME_REPLY.pack(size, flags) + (bytes(EXPORT_NAME_ZEROES) if zeroes else b"")


def info_export(size: int, flags: int) -> bytes:
    """Return the data of an INFO reply that tells size and flags."""
    return INFO_EXPORT.pack(Info.EXPORT, size, flags)


def info_block_size(export: ExportInfo) -> bytes:
    """Return the data of an INFO reply that tells the block sizes, in bytes."""
    sizes = export.min_block, export.preferred, export.max_payload
    return INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)


def info_text(kind: Info, text: str) -> bytes:
    """Return the data of an INFO reply that carries a text."""
    return _U16.pack(kind) + encode_name(text)


def encode_name(name: str) -> bytes:
    """Return a name's bytes; names are bytes that need not be UTF-8."""
    return name.encode(errors="surrogateescape")


def decode_name(name: bytes) -> str:
    """Return a name as text that `encode_name` turns back into the same bytes."""
    return name.decode(errors="surrogateescape")


def printable(text: bytes) -> str:
    """Return a peer's text as it may be shown: one line, no control characters, not too long."""
    # Four bytes make at most one character, so the rest of a long text need not be decoded.
    words = text[: 4 * (MAX_SHOWN + 1)].decode(errors="replace")
    shown = "".join(letter if letter.isprintable() else "?" for letter in words)
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 1] + "…"


def counted_name(name: bytes) -> bytes:
    """Return a name behind its length."""
    return _U32.pack(len(name)) + name


def name_and_infos(name: bytes, infos: Sequence[int]) -> bytes:
    """Return the body of INFO or GO."""
    return counted_name(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def name_and_queries(name: bytes, queries: Sequence[bytes]) -> bytes:
    """Return the body of LIST_META_CONTEXT or SET_META_CONTEXT."""
    return counted_name(name) + _U32.pack(len(queries)) + b"".join(map(counted_name, queries))


def parse_name(body: bytes, at: int = 0) -> tuple[bytes, int] | None:
    """Return a name behind its length, and where it ends; None if there is no room for it."""
    if len(body) < at + NAME_HEAD:
        return None
    (length,) = _U32.unpack_from(body, at)
    at += NAME_HEAD
    return (body[at : at + length], at + length) if length <= len(body) - at else None


def parse_name_and_infos(body: bytes) -> tuple[bytes, list[int]] | None:
    """Return the name and the infos that INFO or GO asks for, None if the lengths disagree."""
    named = parse_name(body)
    if named is None or len(body) < named[1] + _U16.size:
        return None
    name, at = named
    (count,) = _U16.unpack_from(body, at)
    if len(body) != at + _U16.size * (1 + count):
        return None
    return name, list(struct.unpack_from(f">{count}H", body, at + _U16.size))


def parse_name_and_queries(body: bytes) -> tuple[bytes, list[bytes]] | None:
    """Return the name and the queries of a meta context option, None if the lengths disagree."""
    named = parse_name(body)
    if named is None or len(body) < named[1] + _U32.size:
        return None
    name, at = named
    (count,) = _U32.unpack_from(body, at)
    at += _U32.size
    queries = []
    for _ in range(count):
        found = parse_name(body, at)
        if found is None:
            return None
        query, at = found
        queries.append(query)
    return (name, queries) if at == len(body) else None


def request(
    command: int, flags: int, cookie: int, offset: int, length: int, *, extended: bool
) -> bytes:
    """Return a request's header; a payload of `length` bytes follows where `flags` say so.

    With extended headers the caller sets PAYLOAD_LEN; without, only a WRITE has a payload.
    """
    if extended:
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def parse_status_filter(payload: memoryview) -> tuple[int, tuple[int, ...]] | None:
    """Return the length asked for and the contexts' numbers; None if it has another form."""
    if len(payload) < _U64.size or len(payload) % _U32.size:
        return None
    count = (len(payload) - _U64.size) // _U32.size
    length, *ids = struct.unpack(f">Q{count}I", payload)
    return length, tuple(ids)
