"""The server's side of the negotiation: one option in, its replies out.

`Haggling.answer` is driven by `OPTION_RULES`: who may ask, in which form, and after what. What is
left for a function of its own is what an option *does*. STARTTLS forgets everything negotiated
before it, so that nobody can have slipped it in (CVE-2021-3716).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import (
    ALLOCATION,
    ALLOCATION_ID,
    MAX_STRING,
    Info,
    Option,
    OptionReply,
    ReplyStyle,
    TlsMode,
    TransmissionFlag,
)
from nbdproxy.nbd.events import Closed, Opened, Send, ServerEvent, StartTls
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.nbd.tables import OPTION_RULES, Body, Needs, OptionRule, Terms

_ERR = OptionReply
_NAMESPACE = ALLOCATION.partition(":")[0] + ":"


@dataclass(slots=True)
class _Negotiated:
    """What a client has reached so far; `context_of` names the export its contexts are for."""

    style: ReplyStyle = ReplyStyle.SIMPLE
    context_of: str | None = None


class Haggling:
    """The options of one connection. `terms` is set as soon as an export is opened."""

    def __init__(self, exports: Mapping[str, ExportInfo], tls: TlsMode) -> None:
        self.terms: Terms | None = None
        self.closed = False
        self.fixed = True
        """Whether the client speaks fixed newstyle; if not, it knows EXPORT_NAME only."""
        self.zeroes = True
        """Whether EXPORT_NAME is answered with padding, which NO_ZEROES turns off."""
        self._exports = exports
        self._tls = tls
        self._encrypted = False
        self._now = _Negotiated()
        # What the last option asked of INFO, if it did: GO has to tell the same then.
        self._informed: tuple[bytes, list[int]] | None = None
        self._answers: dict[int, Callable[[Any], list[ServerEvent]]] = {
            Option.EXPORT_NAME: self._export_name,
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_meta_context,
            Option.SET_META_CONTEXT: self._set_meta_context,
            Option.EXTENDED_HEADERS: self._extended_headers,
        }

    def answer(self, option: int, body: bytes) -> list[ServerEvent]:
        """Return what an option leads to; raises ProtocolError where no reply is possible."""
        rule = OPTION_RULES.get(option)
        if option == Option.SET_META_CONTEXT:
            self._now.context_of = None  # "including when this command fails"
        if refused := self._refuse(option, rule):
            return refused
        assert rule is not None
        parsed = _parse(rule.body, body)
        if parsed is None:
            words = f"the data of this option must be {rule.body.value}, of the right lengths"
            return [_error(option, _ERR.ERR_INVALID, words)]
        events = self._answers[option](parsed)
        self._informed = parsed if option == Option.INFO else None
        return events

    def _refuse(self, option: int, rule: OptionRule | None) -> list[ServerEvent]:
        """Return the error for an option that may not be asked now, whatever its data."""
        name_only = option == Option.EXPORT_NAME
        if not (self.fixed or name_only):
            raise ProtocolError(f"option {option} of a client without fixed newstyle negotiation")
        if self._tls is TlsMode.REQUIRE and not (self._encrypted or (rule and rule.plaintext)):
            if name_only:
                raise ProtocolError("EXPORT_NAME without TLS, which is required")
            return [_error(option, _ERR.ERR_TLS_REQD, "this server requires TLS: ask for STARTTLS")]
        if rule is None:
            return [_error(option, _ERR.ERR_UNSUP, "this option is not supported")]
        if self._holds(rule.needs):
            return []
        if name_only:
            raise ProtocolError("EXPORT_NAME after extended headers were agreed on")
        return [_error(option, rule.otherwise, f"this option needs {rule.needs.value}")]

    def _holds(self, needs: Needs) -> bool:
        match needs:
            case Needs.NOTHING:
                return True
            case Needs.CHUNKS:
                return self._now.style is not ReplyStyle.SIMPLE
            case Needs.COMPACT:
                return self._now.style is not ReplyStyle.EXTENDED
            case Needs.PLAINTEXT:
                return not self._encrypted

    def _resolve(self, name: bytes) -> str | None:
        """Return the key of an export; the empty name stands for the first, unless it is one."""
        text = codec.decode_name(name)
        if len(name) <= MAX_STRING and text in self._exports:
            return text
        return next(iter(self._exports), None) if not text else None

    def _terms_for(self, name: bytes) -> Terms | None:
        key = self._resolve(name)
        if key is None:
            return None
        contexts = self._now.context_of == key
        return Terms(self._exports[key], self._now.style, contexts=contexts)

    def _open(self, terms: Terms) -> Opened:
        self.terms = terms
        return Opened(terms.export.name)

    def _export_name(self, name: bytes) -> list[ServerEvent]:
        terms = self._terms_for(name)
        if terms is None:
            raise ProtocolError("EXPORT_NAME asked for an export that does not exist")
        hello = codec.export_name_reply(terms.export.size, terms.flags, zeroes=self.zeroes)
        return [Send(hello), self._open(terms)]

    def _abort(self, _: bytes) -> list[ServerEvent]:
        self.closed = True
        return [_ack(Option.ABORT), Closed()]

    def _list(self, _: bytes) -> list[ServerEvent]:
        listed = [
            codec.counted_name(codec.encode_name(export.name))
            + codec.encode_name(export.description)
            for export in self._exports.values()
        ]
        return _replies(Option.LIST, OptionReply.SERVER, listed)

    def _starttls(self, _: bytes) -> list[ServerEvent]:
        if self._tls is TlsMode.OFF:
            return [_error(Option.STARTTLS, _ERR.ERR_POLICY, "this server is set up without TLS")]
        self._encrypted = True
        self._now = _Negotiated()
        return [_ack(Option.STARTTLS), StartTls()]

    def _info(self, asked: tuple[bytes, list[int]]) -> list[ServerEvent]:
        return self._describe(Option.INFO, *asked)[1]

    def _go(self, asked: tuple[bytes, list[int]]) -> list[ServerEvent]:
        terms, replies = self._describe(Option.GO, *asked)
        return [*replies, self._open(terms)] if terms else replies

    def _describe(
        self, option: Option, name: bytes, infos: list[int]
    ) -> tuple[Terms | None, list[ServerEvent]]:
        terms = self._terms_for(name)
        if terms is None:
            return None, [_unknown(option)]
        export, flags = terms.export, terms.flags
        # INFO tells what could be had; GO what is there, or what INFO told just before it.
        could = option == Option.INFO or self._informed == (name, infos)
        if could and terms.style is ReplyStyle.EXTENDED:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        told = [codec.info_export(export.size, flags)]
        if Info.NAME in infos:
            told.append(codec.info_text(Info.NAME, export.name))
        if Info.DESCRIPTION in infos and export.description:
            told.append(codec.info_text(Info.DESCRIPTION, export.description))
        told.append(codec.info_block_size(export))
        return terms, _replies(option, OptionReply.INFO, told)

    def _structured_reply(self, _: bytes) -> list[ServerEvent]:
        self._now.style = ReplyStyle.STRUCTURED
        return [_ack(Option.STRUCTURED_REPLY)]

    def _extended_headers(self, _: bytes) -> list[ServerEvent]:
        self._now.style = ReplyStyle.EXTENDED
        return [_ack(Option.EXTENDED_HEADERS)]

    def _list_meta_context(self, asked: tuple[bytes, list[bytes]]) -> list[ServerEvent]:
        _, queries = asked
        wanted = not queries or bool({ALLOCATION.encode(), _NAMESPACE.encode()} & set(queries))
        return self._contexts(Option.LIST_META_CONTEXT, asked, 0 if wanted else None)

    def _set_meta_context(self, asked: tuple[bytes, list[bytes]]) -> list[ServerEvent]:
        name, queries = asked
        chosen = ALLOCATION.encode() in queries
        replies = self._contexts(Option.SET_META_CONTEXT, asked, ALLOCATION_ID if chosen else None)
        if len(replies) > 1:
            self._now.context_of = self._resolve(name)
        return replies

    def _contexts(
        self, option: Option, asked: tuple[bytes, list[bytes]], number: int | None
    ) -> list[ServerEvent]:
        """Return the replies that name our one context, by `number` if it was asked for."""
        name, queries = asked
        if self._resolve(name) is None:
            return [_unknown(option)]
        if any(b":" not in query or len(query) > MAX_STRING for query in queries):
            return [_error(option, _ERR.ERR_INVALID, "a query is a namespace, a colon and a name")]
        told = [] if number is None else [number.to_bytes(4) + ALLOCATION.encode()]
        return _replies(option, OptionReply.META_CONTEXT, told)


def _parse(body: Body, data: bytes) -> Any:
    """Return what an option's data says, None if it has another form."""
    match body:
        case Body.EMPTY:
            return data if not data else None
        case Body.IGNORED | Body.NAME:
            return data
        case Body.NAME_AND_INFOS:
            return codec.parse_name_and_infos(data)
        case Body.NAME_AND_QUERIES:
            return codec.parse_name_and_queries(data)


def _ack(option: int) -> Send:
    return Send(codec.option_reply(option, OptionReply.ACK))


def _replies(option: int, kind: OptionReply, told: list[bytes]) -> list[ServerEvent]:
    """Return one reply for each of `told`, and the ACK behind them."""
    return [*(Send(codec.option_reply(option, kind, data)) for data in told), _ack(option)]


def _error(option: int, kind: OptionReply, text: str) -> Send:
    return Send(codec.option_reply(option, kind, text.encode()))


def _unknown(option: int) -> Send:
    # The name is not repeated: a long one would make the error itself an attack (CVE-2020-10761).
    return _error(option, _ERR.ERR_UNKNOWN, "no export has this name")
