"""The client's side of the negotiation: what to ask next, and what the answers may be.

`ClientHaggling` walks through a plan of options, one at a time as the specification demands:
STARTTLS before anything else if TLS is wanted, the best form of replies that the server has, the
context `base:allocation`, and GO; EXPORT_NAME only for a server that does not know GO. Whatever
the server tells is checked where it comes in, so that `export` holds nothing that is not sound.

An option that is refused is left out if one can do without it; otherwise `ServerRefusedError` says
what the user can do. Texts of the server are shown only when they are printable and short.

Not covered: LIST, INFO, contexts other than `base:allocation`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import (
    ALLOCATION,
    MAX_EXPORT_SIZE,
    MAX_MIN_BLOCK,
    MAX_OPTION_DATA,
    MAX_OPTION_REPLIES,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION_ERROR_BIT,
    PREFERRED_BLOCK,
    Info,
    Option,
    OptionReply,
    ReplyStyle,
    TransmissionFlag,
)
from nbdproxy.nbd.events import ClientEvent, Send, StartTls
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.nbd.tables import OPTION_RULES

_PLAN = (
    Option.STARTTLS,
    Option.EXTENDED_HEADERS,
    Option.STRUCTURED_REPLY,
    Option.SET_META_CONTEXT,
    Option.GO,
    Option.EXPORT_NAME,
)
_INFOS = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
_SMALLEST_PREFERRED = 512
_INFO_HEAD = struct.Struct(">H")
_CONTEXT_HEAD = struct.Struct(">I")


class ServerRefusedError(ProtocolError):
    """The server declined, as it may; the message says what the user can do about it."""


class ClientHaggling:
    """The options of one connection. `export` is set as soon as the server opened it."""

    def __init__(self, export: str, *, tls: bool, best: ReplyStyle, contexts: bool) -> None:
        self.asked: Option | None = None
        """The option that the server owes an answer to."""
        self.export: ExportInfo | None = None
        self.style = ReplyStyle.SIMPLE
        self.context: int | None = None
        """The number that the server gave to `base:allocation`."""
        self._tls = tls
        self._best = best
        self._contexts = contexts
        self._name = codec.encode_name(export)
        assert len(self._name) <= MAX_STRING, "no server may have a name as long as this"
        self._plan = iter(_PLAN)
        self._unsaid = ExportInfo(export, 0, TransmissionFlag(0), min_block=1)
        """What holds of an export when nothing was said (proto.md, "Size constraints")."""
        assert (self._unsaid.preferred, self._unsaid.max_payload) == (PREFERRED_BLOCK, MAX_PAYLOAD)
        self._told = self._unsaid
        self._told_context: int | None = None
        self._replies = 0

    @property
    def shown_name(self) -> str:
        """The export's name as a message shows it."""
        return f'"{codec.printable(self._name)}"' if self._name else "of the default name"

    def ask(self) -> Send:
        """Return the next option."""
        self.asked = next(option for option in self._plan if self._wants(option))
        self._replies = 0
        self._told, self._told_context = self._unsaid, None
        match self.asked:
            case Option.SET_META_CONTEXT:
                body = codec.name_and_queries(self._name, [ALLOCATION.encode()])
            case Option.GO:
                body = codec.name_and_infos(self._name, _INFOS)
            case Option.EXPORT_NAME:
                body = self._name
            case _:
                body = b""
        return Send(codec.option(self.asked, body))

    def expect(self, option: int, kind: int, length: int) -> None:
        """Check the header of a reply, before its data is waited for."""
        asked = self.asked
        assert asked is not None, "the connection waits for something else"
        if option != asked:
            raise ProtocolError(f"the server answered option {option}, which was not asked")
        if length > MAX_OPTION_DATA:
            raise ProtocolError(f"the server's reply to {asked.name} announces {length} bytes")
        if kind & OPTION_ERROR_BIT:
            return
        if kind == OptionReply.ACK:
            if length:
                raise ProtocolError(f"the server's ACK of {asked.name} has {length} bytes of data")
        elif kind not in OPTION_RULES[asked].replies:
            raise ProtocolError(f"the server answered {asked.name} with a reply of type {kind}")
        elif self._replies >= MAX_OPTION_REPLIES:
            raise ProtocolError(f"the server sent endless replies to {asked.name}")

    def answer(self, kind: int, data: bytes) -> list[ClientEvent]:
        """Return what a reply that passed `expect` leads to."""
        if kind & OPTION_ERROR_BIT:
            return self._declined(kind, data)
        if kind == OptionReply.ACK:
            return self._agreed()
        self._replies += 1
        if kind == OptionReply.INFO:
            self._info(data)
        else:
            self._context(data)
        return []

    def open_by_name(self, size: int, flags: int) -> ExportInfo:
        """Return what the answer to EXPORT_NAME means, which has a form of its own."""
        return _sized(self._unsaid, size, flags)

    def _wants(self, option: Option) -> bool:
        match option:
            case Option.STARTTLS:
                return self._tls
            case Option.EXTENDED_HEADERS:
                return self._best is ReplyStyle.EXTENDED
            case Option.STRUCTURED_REPLY:
                return self._best is not ReplyStyle.SIMPLE and self.style is ReplyStyle.SIMPLE
            case Option.SET_META_CONTEXT:
                return self._contexts and self.style is not ReplyStyle.SIMPLE
            case _:
                return True

    def _agreed(self) -> list[ClientEvent]:
        match self.asked:
            case Option.STARTTLS:
                self.asked = None
                return [StartTls()]
            case Option.EXTENDED_HEADERS:
                self.style = ReplyStyle.EXTENDED
            case Option.STRUCTURED_REPLY:
                self.style = ReplyStyle.STRUCTURED
            case Option.SET_META_CONTEXT:
                self.context = self._told_context
            case _:
                if not self._told.flags:
                    raise ProtocolError("the server opened the export without telling its size")
                self.export = self._told
                return []
        return [self.ask()]

    def _declined(self, kind: int, data: bytes) -> list[ClientEvent]:
        """Go on without what was asked, or raise if that is not possible."""
        assert self.asked is not None
        says = f' (it says: "{codec.printable(data)}")' if data else ""
        match kind:
            case OptionReply.ERR_SHUTDOWN:
                words = f"the server is shutting down{says}: try again when it is back"
                raise ServerRefusedError(words)
            case OptionReply.ERR_TLS_REQD if self._tls and self.asked is not Option.STARTTLS:
                raise ProtocolError("the server asks for TLS though it is in use")
            case OptionReply.ERR_TLS_REQD if self.asked is not Option.STARTTLS:
                raise ServerRefusedError(
                    f"the server requires TLS{says}: use nbds:// or nbds+unix://"
                )
        match self.asked:
            case Option.STARTTLS:
                raise ServerRefusedError(
                    f"the server offers no TLS{says}: "
                    "set it up there, or use nbd:// or nbd+unix:// to go without"
                )
            case Option.GO:
                if kind != OptionReply.ERR_UNSUP:
                    raise self._refusal(kind, says)
                if self.style is ReplyStyle.EXTENDED:
                    raise ProtocolError("the server has extended headers but does not know GO")
        return [self.ask()]

    def _refusal(self, kind: int, says: str) -> ServerRefusedError:
        match kind:
            case OptionReply.ERR_UNKNOWN:
                return ServerRefusedError(
                    f"the server has no export {self.shown_name}{says}: "
                    "`nbdinfo --list` with the server's URI shows what it has"
                )
            case OptionReply.ERR_POLICY:
                return ServerRefusedError(
                    f"the server's policy forbids to open the export {self.shown_name}{says}: "
                    "see how it is set up"
                )
            case OptionReply.ERR_EXT_HEADER_REQD:
                return ServerRefusedError(
                    f"the server requires extended headers{says}: allow them on this side"
                )
        return ServerRefusedError(
            f"the server does not open the export {self.shown_name}, error {kind:#x}{says}: "
            "see its log"
        )

    def _info(self, data: bytes) -> None:
        if len(data) < _INFO_HEAD.size:
            raise ProtocolError("the server sent an info that is too short to have a type")
        (kind,) = _INFO_HEAD.unpack_from(data)
        read = _INFO_READERS.get(kind)
        if read is not None:  # "The client MUST ignore information replies it does not understand."
            self._told = read(self._told, data)

    def _context(self, data: bytes) -> None:
        name = data[_CONTEXT_HEAD.size :]
        if name != ALLOCATION.encode():
            shown = codec.printable(name)
            raise ProtocolError(f'the server chose the context "{shown}", which was not asked for')
        if self._told_context is not None:
            raise ProtocolError("the server chose the same context twice")
        (self._told_context,) = _CONTEXT_HEAD.unpack_from(data)


def _sized(told: ExportInfo, size: int, flags: int) -> ExportInfo:
    """Return what is told with size and flags, which both ways to open an export tell."""
    if not flags & TransmissionFlag.HAS_FLAGS:
        raise ProtocolError(f"the server's flags {flags:#x} of the export are not flags")
    if size > MAX_EXPORT_SIZE:
        raise ProtocolError(f"the server tells that the export has {size} bytes, which cannot be")
    return replace(told, size=size, flags=TransmissionFlag(flags))


def _export(told: ExportInfo, data: bytes) -> ExportInfo:
    if len(data) != codec.INFO_EXPORT.size:
        raise ProtocolError(f"the server sent {len(data)} bytes to tell the export's size")
    _, size, flags = codec.INFO_EXPORT.unpack(data)
    return _sized(told, size, flags)


def _name(told: ExportInfo, data: bytes) -> ExportInfo:
    return replace(told, name=codec.decode_name(_string(data)))


def _description(told: ExportInfo, data: bytes) -> ExportInfo:
    return replace(told, description=codec.decode_name(_string(data)))


def _string(data: bytes) -> bytes:
    text = data[_INFO_HEAD.size :]
    if len(text) > MAX_STRING or b"\0" in text:
        raise ProtocolError("the server sent a text that is too long, or has a NUL in it")
    return text


def _block_size(told: ExportInfo, data: bytes) -> ExportInfo:
    """Check and take block sizes (proto.md, "Size constraints")."""
    if len(data) != codec.INFO_BLOCK_SIZE.size:
        raise ProtocolError(f"the server sent {len(data)} bytes to tell the block sizes")
    _, smallest, preferred, most = codec.INFO_BLOCK_SIZE.unpack(data)
    sound = (
        _is_power_of_two(smallest)
        and smallest <= MAX_MIN_BLOCK
        and _is_power_of_two(preferred)
        and max(smallest, _SMALLEST_PREFERRED) <= preferred <= most
    )
    if not sound:
        raise ProtocolError(
            "the server's block sizes contradict the specification: "
            f"at least {smallest}, better {preferred}, at most {most} bytes"
        )
    return replace(told, min_block=smallest, preferred=preferred, max_payload=most)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


_INFO_READERS: dict[int, Callable[[ExportInfo, bytes], ExportInfo]] = {
    Info.EXPORT: _export,
    Info.NAME: _name,
    Info.DESCRIPTION: _description,
    Info.BLOCK_SIZE: _block_size,
}
