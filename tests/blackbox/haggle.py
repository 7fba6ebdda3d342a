"""The client's side of the handshake: greeting, options and their replies, strictly read.

An option's answer is a list of replies; it is returned, whatever it says, because many checks want
an error. What the specification forbids in any answer is a `ViolationError`: a number that was not
asked for, an unknown kind of reply, an ACK with data, a text that is not UTF-8, an INFO reply of a
wrong length, a success without INFO_EXPORT, ERR_TLS_REQD inside TLS.

Not covered: oldstyle; what follows GO (see `transmit`).
"""

from __future__ import annotations

import ssl
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.blackbox.wire import AbsentError, ClosedError, ViolationError, Wire

FIXED_NEWSTYLE, NO_ZEROES = 1, 2

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = 1, 2, 3, 4, 5, 6, 7
STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = 8, 9, 10, 11
UNKNOWN_OPTION = 0x7ABCDEF0

ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
_ERROR = 1 << 31
WORDS = {
    ACK: "ACK",
    SERVER: "SERVER",
    REP_INFO: "INFO",
    META_CONTEXT: "META_CONTEXT",
    _ERROR + 1: "ERR_UNSUP",
    _ERROR + 2: "ERR_POLICY",
    _ERROR + 3: "ERR_INVALID",
    _ERROR + 4: "ERR_PLATFORM",
    _ERROR + 5: "ERR_TLS_REQD",
    _ERROR + 6: "ERR_UNKNOWN",
    _ERROR + 7: "ERR_SHUTDOWN",
    _ERROR + 8: "ERR_BLOCK_SIZE_REQD",
    _ERROR + 9: "ERR_TOO_BIG",
    _ERROR + 10: "ERR_EXT_HEADER_REQD",
}
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3
ALLOCATION = "base:allocation"

STRING_MOST = 4096
"""Bytes of the longest string; section "Conventions"."""
REPLIES_MOST = 1000
"""As many replies to one option as a test's server has any reason for."""

GREETING = b"NBDMAGICIHAVEOPT"
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9


class OptionReply(NamedTuple):
    """One reply to an option: its kind as a number, and its data."""

    kind: int
    data: bytes

    @property
    def word(self) -> str:
        """The specification's name of the kind, without NBD_REP."""
        return WORDS.get(self.kind, f"{self.kind:#x}")


@dataclass(slots=True)
class Export:
    """What INFO, GO or EXPORT_NAME told; `kinds` are the kinds of information in order."""

    size: int = -1
    flags: int = 0
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None
    kinds: list[int] = field(default_factory=list)


def text(data: bytes, what: str) -> str:
    """Decode a string that the server sent; see section "Conventions"."""
    if len(data) > STRING_MOST:
        raise ViolationError(f"{what} has {len(data)} bytes; a string has at most {STRING_MOST}")
    if b"\0" in data:
        raise ViolationError(f"{what} contains NUL: {data[:60]!r}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ViolationError(f"{what} is not UTF-8: {data[:60]!r}") from error


def sized(data: bytes) -> bytes:
    """Return a string with its length in front."""
    return struct.pack(">I", len(data)) + data


def go_data(name: bytes, requests: tuple[int, ...] = ()) -> bytes:
    """Return the data of INFO and GO."""
    return sized(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def meta_data(export: bytes, *queries: bytes) -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return sized(export) + struct.pack(">I", len(queries)) + b"".join(map(sized, queries))


def pack_option(option: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return an option's bytes; `length` is a lie about the data's length."""
    return _OPTION.pack(b"IHAVEOPT", option, len(data) if length is None else length) + data


class Haggle:
    """A connection in negotiation. The constructor reads the greeting; `start` answers it.

    flags: the server's handshake flags; contexts: ids and names that SET_META_CONTEXT selected;
    structured, extended: what the server acknowledged since TLS began.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        if (magic := wire.take(16)) != GREETING:
            raise ViolationError(f"the greeting is {magic!r}")
        (self.flags,) = struct.unpack(">H", wire.take(2))
        self.structured, self.extended, self.zeroes = False, False, False
        self.contexts: dict[int, str] = {}

    def start(self, flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> Haggle:
        """Send the client flags; return self."""
        self.zeroes = not flags & NO_ZEROES
        self.wire.send(struct.pack(">I", flags))
        return self

    def send(self, option: int, data: bytes = b"", *, length: int | None = None) -> None:
        """Send an option without waiting for its answer."""
        self.wire.send(pack_option(option, data, length=length))

    def reply(self, option: int) -> OptionReply:
        """Read one reply."""
        magic, echoed, kind, length = _REPLY.unpack(self.wire.take(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise ViolationError(f"a reply to an option begins with {magic:#x}")
        if echoed != option:
            raise ViolationError(f"the reply to option {option} says that it is to {echoed}")
        if length > 2 * STRING_MOST + 8:
            raise ViolationError(f"a reply of kind {kind:#x} has {length} bytes")
        reply = OptionReply(kind, self.wire.take(length))
        if reply.kind not in WORDS:
            raise ViolationError(f"the reply's kind {kind:#x} is unknown")
        if kind == ACK and length:
            raise ViolationError(f"an ACK has data: {reply.data[:60]!r}")
        if kind & _ERROR:
            text(reply.data, "an error message")
        if self.wire.secure and reply.word == "ERR_TLS_REQD":
            raise ViolationError("ERR_TLS_REQD although TLS runs")
        return reply

    def replies(self, option: int) -> list[OptionReply]:
        """Read replies up to the final one."""
        found: list[OptionReply] = []
        while len(found) < REPLIES_MOST:
            found.append(self.reply(option))
            if found[-1].kind == ACK or found[-1].kind & _ERROR:
                return found
        raise ViolationError(f"more than {REPLIES_MOST} replies to one option")

    def ask(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option and read its whole answer."""
        self.send(option, data)
        replies = self.replies(option)
        if option == STRUCTURED_REPLY and replies[-1].kind == ACK:
            self.structured = True
        if option == EXTENDED_HEADERS and replies[-1].kind == ACK:
            self.extended = True
        return replies

    def word(self, option: int, data: bytes = b"") -> str:
        """Send an option; return the final reply's word."""
        return self.ask(option, data)[-1].word

    def need(self, option: int, what: str) -> None:
        """Negotiate a feature without data; raises AbsentError when the server refuses."""
        if (word := self.word(option)) != "ACK":
            raise AbsentError(f"{what} is answered with {word}")

    def exports(self) -> list[tuple[str, str]]:
        """LIST: return names and descriptions; raises AbsentError when refused."""
        *servers, last = self.ask(LIST)
        if last.kind != ACK:
            raise AbsentError(f"LIST is answered with {last.word}")
        found = []
        for reply in servers:
            if reply.kind != SERVER or len(reply.data) < 4:
                raise ViolationError(f"LIST is answered with {reply.word}, {len(reply.data)} bytes")
            (length,) = struct.unpack_from(">I", reply.data)
            if length > len(reply.data) - 4:
                raise ViolationError(f"a listed name of {length} bytes in {len(reply.data)}")
            name = text(reply.data[4 : 4 + length], "a listed name")
            found.append((name, text(reply.data[4 + length :], "a listed description")))
        return found

    def describe(
        self, option: int, name: str | bytes, requests: tuple[int, ...] = ()
    ) -> tuple[str, Export]:
        """INFO or GO: return the final word and what was told."""
        raw = name.encode() if isinstance(name, str) else name
        *infos, last = self.ask(option, go_data(raw, requests))
        export = Export()
        for reply in infos:
            if reply.kind != REP_INFO or len(reply.data) < 2:
                raise ViolationError(f"INFO is answered with {reply.word}, {len(reply.data)} bytes")
            _note(export, reply.data)
        if last.kind == ACK and export.size < 0:
            raise ViolationError("success without INFO_EXPORT")
        return last.word, export

    def choose(
        self, option: int, export: str | bytes, *queries: str | bytes
    ) -> tuple[str, dict[int, str]]:
        """LIST_META or SET_META: return the final word and the contexts by their ids."""
        raw = [word.encode() if isinstance(word, str) else word for word in (export, *queries)]
        *replies, last = self.ask(option, meta_data(*raw))
        found: dict[int, str] = {}
        for reply in replies:
            if reply.kind != META_CONTEXT or len(reply.data) < 4:
                raise ViolationError(f"a context's reply is {reply.word}, {len(reply.data)} bytes")
            (number,) = struct.unpack_from(">I", reply.data)
            if option == SET_META and number in found:
                raise ViolationError(f"two contexts have the id {number}")
            name = text(reply.data[4:], "a context's name")
            # In a list the ids mean nothing, so that they must not hide one another.
            found[number if option == SET_META else len(found)] = name
            if ":" not in name:
                raise ViolationError(f"the context {name!r} has no namespace")
        if option == SET_META:
            self.contexts = found if last.kind == ACK else {}
        return last.word, found

    def enter_by_name(self, name: str) -> Export:
        """EXPORT_NAME: return what was told; raises ClosedError when the export is refused."""
        self.send(EXPORT_NAME, name.encode())
        size, flags = struct.unpack(">QH", self.wire.take(10))
        if self.zeroes and (zeroes := self.wire.take(124)) != bytes(124):
            raise ViolationError(f"the 124 zeroes are {zeroes.hex()}")
        return Export(size, flags)

    def secure(self, context: ssl.SSLContext) -> None:
        """STARTTLS and the TLS handshake; what was negotiated is forgotten."""
        if (word := self.word(STARTTLS)) != "ACK":
            raise AbsentError(f"STARTTLS is answered with {word}")
        try:
            self.wire.shake_hands(context)
        except ssl.SSLError as error:
            raise ClosedError(f"the TLS handshake failed ({error})") from error
        self.structured, self.extended, self.contexts = False, False, {}


def _note(export: Export, data: bytes) -> None:
    """Enter one INFO reply; section "Option reply types"."""
    (kind,) = struct.unpack_from(">H", data)
    body = data[2:]
    lengths = {INFO_EXPORT: 10, INFO_BLOCK_SIZE: 12}
    if len(body) != lengths.get(kind, len(body)):
        raise ViolationError(f"an INFO reply of kind {kind} has {len(data)} bytes")
    export.kinds.append(kind)
    if kind == INFO_EXPORT:
        export.size, export.flags = struct.unpack(">QH", body)
    elif kind == INFO_NAME:
        export.name = text(body, "INFO_NAME")
    elif kind == INFO_DESCRIPTION:
        export.description = text(body, "INFO_DESCRIPTION")
    elif kind == INFO_BLOCK_SIZE:
        export.block_sizes = struct.unpack(">III", body)
