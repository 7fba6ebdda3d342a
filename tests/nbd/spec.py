"""What the specification says, written out by hand: numbers, options, commands, errors.

Nothing is imported from the product, so that a wrong table there cannot agree with itself. Where a
request or an option breaks several rules the specification does not say which of them counts: the
functions here return every answer that would be right, and nothing if there is nothing to refuse.

Source: doc/proto.md, with extended headers as in the branch extension-ext-header. Where it leaves
the choice to a server, ours is written out: length 0 is refused, so is a filter of no contexts;
a WRITE has a payload even if a client forgets to say so, as QEMU does; INFO tells of filters that
could be had.

Not covered: what replies look like; see `decode`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SIMPLE, STRUCTURED, EXTENDED = 0, 1, 2
TLS_OFF, TLS_ALLOW, TLS_REQUIRE = 0, 1, 2

ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD = (2**31 + n for n in range(1, 6))
ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG = (2**31 + n for n in range(6, 10))
ERR_EXT_HEADER_REQD = 2**31 + 10
ENDS = -1
"""Stands for a hard disconnect, where EXPORT_NAME cannot be answered with an error."""
HELLO = -2
"""Stands for the answer to EXPORT_NAME, which is no reply to an option."""

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108

FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 2, 4, 8, 32, 64
SEND_DF, SEND_CACHE, SEND_FAST_ZERO, BLOCK_STATUS_PAYLOAD = 128, 1024, 2048, 4096

MAX_PAYLOAD = 2**25
TEXT_MAX = 900
"""QEMU ends a connection for a chunk of over 1000 bytes that is not data."""
MAX_STRING = 4096
CONTEXT, CONTEXT_ID = b"base:allocation", 1


class OptionSays(NamedTuple):
    """One option: the form of its data, what comes before it, how it may be answered."""

    name: str
    data: str
    needs: str = ""
    before: frozenset[int] = frozenset()
    errors: frozenset[int] = frozenset()
    plaintext: bool = False


def _says(name: str, data: str, *errors: int, needs: str = "", before: int = 0) -> OptionSays:
    first = frozenset({before}) if before else frozenset()
    return OptionSays(name, data, needs, first, frozenset(errors))


_MALFORMED = ERR_INVALID, ERR_TLS_REQD
_OF_EXPORT = ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN
OPTIONS = {
    1: _says("EXPORT_NAME", "name", needs="no extended headers"),
    2: OptionSays("ABORT", "ignored", plaintext=True),
    3: _says("LIST", "none", *_MALFORMED, before=SERVER),
    5: OptionSays(
        *("STARTTLS", "none", "no TLS"),
        errors=frozenset({ERR_INVALID, ERR_POLICY}),
        plaintext=True,
    ),
    6: _says("INFO", "infos", *_OF_EXPORT, before=INFO),
    7: _says("GO", "infos", *_OF_EXPORT, before=INFO),
    8: _says(
        *("STRUCTURED_REPLY", "none"),
        *(*_MALFORMED, ERR_EXT_HEADER_REQD),
        needs="no extended headers",
    ),
    9: _says("LIST_META_CONTEXT", "queries", *_OF_EXPORT, needs="chunks", before=META_CONTEXT),
    10: _says("SET_META_CONTEXT", "queries", *_OF_EXPORT, needs="chunks", before=META_CONTEXT),
    11: _says("EXTENDED_HEADERS", "none", *_MALFORMED),
}
"""The options that a server of ours knows; 4 was withdrawn, so it is unknown."""


def may_answer(number: int) -> frozenset[int]:
    """Every kind of reply that an option may get from a server of ours."""
    says = OPTIONS.get(number)
    if says is None:
        return frozenset({ERR_UNSUP, ERR_TLS_REQD})
    return says.before | says.errors | {ACK}


def infos_of(body: bytes) -> bytes | None:
    """The name in the data of INFO and GO, None if its lengths disagree."""
    name, rest = _string(body)
    if name is None or len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2]):
        return None
    return name


def queries_of(body: bytes) -> tuple[bytes, list[bytes]] | None:
    """The name and the queries in the data of a context option, None if its lengths disagree."""
    name, rest = _string(body)
    if name is None or len(rest) < 4:
        return None
    count, rest = int.from_bytes(rest[:4]), rest[4:]
    queries: list[bytes] = []
    while len(queries) < count:
        query, rest = _string(rest)
        if query is None:
            return None
        queries.append(query)
    return None if rest else (name, queries)


def _string(body: bytes) -> tuple[bytes | None, bytes]:
    length, rest = int.from_bytes(body[:4]), body[4:]
    if len(body) < 4 or length > len(rest):
        return None, b""
    return rest[:length], rest[length:]


@dataclass
class Bargain:
    """What a client has reached by its options; `names` are the exports', the first is default."""

    names: Sequence[bytes]
    tls: int = TLS_OFF
    style: int = SIMPLE
    encrypted: bool = False
    fixed: bool = True
    context_of: bytes | None = None
    chosen: bytes | None = field(default=None, init=False)
    informed: bytes | None = field(default=None, init=False)
    """What was asked by the last INFO that was answered, until another option is agreed on."""
    interrupted: bool = field(default=False, init=False)
    """Whether an option was refused since."""

    def find(self, name: bytes) -> bytes | None:
        """The export that a name means."""
        if len(name) <= MAX_STRING and name in self.names:
            return name
        return self.names[0] if not name and self.names else None

    def answers(self, number: int, body: bytes) -> frozenset[int]:
        """The final replies that would be right; ACK or HELLO is the only one where it is."""
        says = OPTIONS.get(number)
        if not self.fixed and number != 1:
            return frozenset({ENDS})  # "the only valid option in nonfixed newstyle negotiation"
        if self.tls == TLS_REQUIRE and not self.encrypted and not (says and says.plaintext):
            # "any other option, including NBD_OPT_INFO and unsupported options"
            return frozenset({ENDS if number == 1 else ERR_TLS_REQD})
        if says is None:
            return frozenset({ERR_UNSUP})
        wrong: set[int] = set()
        if says.needs == "no extended headers" and self.style == EXTENDED:
            wrong.add(ENDS if number == 1 else ERR_EXT_HEADER_REQD)
        if says.needs == "chunks" and self.style == SIMPLE:
            wrong.add(ERR_INVALID)
        if says.needs == "no TLS":
            if self.encrypted:
                wrong.add(ERR_INVALID)
            elif self.tls == TLS_OFF:
                wrong.add(ERR_POLICY)
        wrong |= self._wrong_data(says, body)
        return frozenset(wrong or {HELLO if number == 1 else ACK})

    def _wrong_data(self, says: OptionSays, body: bytes) -> set[int]:
        if says.data == "none":
            return {ERR_INVALID} if body else set()
        if says.data == "name":
            return {ENDS} if self.find(body) is None else set()
        if says.data == "ignored":
            return set()
        queries: list[bytes] = []
        name = infos_of(body)
        if says.data == "queries":
            name, queries = queries_of(body) or (None, [])
        if name is None:
            return {ERR_INVALID}
        wrong = {ERR_UNKNOWN} if self.find(name) is None else set()
        # A query MUST start with a namespace and a colon, and no string may be longer.
        if any(b":" not in query or len(query) > MAX_STRING for query in queries):
            wrong.add(ERR_INVALID)
        return wrong

    def asked(self, number: int, body: bytes, final: int) -> None:
        """Go on, an option having been answered with `final`."""
        if number == 10 and not (self.tls == TLS_REQUIRE and not self.encrypted):
            self.context_of = None  # "replaces all [...] (including when this command fails)"
        self.interrupted = True
        if final not in (ACK, HELLO):
            return
        self.informed, self.interrupted = body if number == 6 else None, False
        if number == 1:
            self.chosen = self.find(body)
        elif number == 5:
            self.encrypted, self.style, self.context_of = True, SIMPLE, None
        elif number == 7:
            self.chosen = self.find(infos_of(body) or b"")
        elif number == 8:
            self.style = STRUCTURED
        elif number == 11:
            self.style = EXTENDED
        elif number == 10:
            name, queries = queries_of(body) or (b"", [])
            self.context_of = self.find(name) if CONTEXT in queries else None

    def filter_told(self, number: int, body: bytes) -> frozenset[bool]:
        """Whether INFO or GO tells of BLOCK_STATUS_PAYLOAD; both where either is right.

        GO "MUST reply with the same set of information" as a same INFO just before it, which wins
        over that it SHOULD NOT tell of filters without contexts.
        """
        if self.style != EXTENDED:
            return frozenset({False})
        if number == 6 or self.context_of == self.find(infos_of(body) or b""):
            return frozenset({True})
        if self.informed == body:
            return frozenset({True, not self.interrupted})
        return frozenset({False})

    def contexts_told(self, number: int, body: bytes) -> int:
        """How many contexts come before the ACK of a context option."""
        _, queries = queries_of(body) or (b"", [])
        if number == 10:
            return int(CONTEXT in queries)
        return int(not queries or CONTEXT in queries or b"base:" in queries)


class CommandSays(NamedTuple):
    """One command: its flags with what exposes each, what exposes it, and its errors."""

    name: str
    flags: dict[int, int] = {}  # noqa: RUF012 - a NamedTuple's default, and never changed
    exposed_by: int = 1
    ranged: bool = True
    modifies: bool = False
    payload: bool = False
    beyond: int = EINVAL
    contexts: bool = False


COMMANDS = {
    0: CommandSays("READ", {DF: SEND_DF}, payload=True),
    1: CommandSays("WRITE", modifies=True, payload=True, beyond=ENOSPC),
    3: CommandSays("FLUSH", exposed_by=SEND_FLUSH, ranged=False),
    4: CommandSays("TRIM", exposed_by=SEND_TRIM, modifies=True),
    5: CommandSays("CACHE", exposed_by=SEND_CACHE),
    6: CommandSays(
        "WRITE_ZEROES",
        {NO_HOLE: SEND_WRITE_ZEROES, FAST_ZERO: SEND_FAST_ZERO},
        exposed_by=SEND_WRITE_ZEROES,
        modifies=True,
        beyond=ENOSPC,
    ),
    7: CommandSays("BLOCK_STATUS", {REQ_ONE: 1}, contexts=True),
}
"""The commands with a reply; 2 is DISC, and 8 is another extension's."""


class Asked(NamedTuple):
    """A request as it was on the wire; `payload` is None where none was announced."""

    command: int
    flags: int
    offset: int
    length: int
    payload: bytes | None


class Terms(NamedTuple):
    """What holds in transmission. `flags` are those that were told the client."""

    size: int
    flags: int
    style: int = SIMPLE
    contexts: bool = False
    min_block: int = 1
    max_payload: int = MAX_PAYLOAD


def flags_told(flags: int, style: int, *, contexts: bool) -> int:
    """The transmission flags of an export on a connection."""
    if style != SIMPLE:
        flags |= SEND_DF
    if style == EXTENDED and contexts:
        flags |= BLOCK_STATUS_PAYLOAD
    return flags


def effect(terms: Terms, asked: Asked) -> tuple[int, int, set[int]]:
    """Flags without PAYLOAD_LEN, the length on the disk, and what is wrong with a payload."""
    if terms.style != EXTENDED:
        return asked.flags, asked.length, set()
    flags, payload = asked.flags & ~PAYLOAD_LEN, asked.payload
    if payload is None:
        return flags, asked.length, set()
    if asked.command == 7 and terms.flags & BLOCK_STATUS_PAYLOAD:
        if payload[8:] == struct.pack(">I", CONTEXT_ID):
            return flags, int.from_bytes(payload[:8]), set()
        return flags, asked.length, {EINVAL}
    return flags, asked.length, set() if asked.command == 1 else {EINVAL}


def errors(terms: Terms, asked: Asked) -> frozenset[int]:
    """The errors that would be right for a request; none if it must be accepted."""
    says = COMMANDS.get(asked.command)
    if says is None:
        return frozenset({EINVAL})
    flags, length, wrong = effect(terms, asked)
    legal = {FUA: SEND_FUA} | says.flags
    if flags & ~sum(flag for flag, exposed_by in legal.items() if terms.flags & exposed_by):
        wrong.add(EINVAL)
    if says.modifies and terms.flags & READ_ONLY:
        wrong.add(EPERM)
    if not terms.flags & says.exposed_by or (says.contexts and not terms.contexts):
        wrong.add(EINVAL)
    if not says.ranged:
        return frozenset(wrong | ({EINVAL} if asked.offset or length else set()))
    if length == 0 or asked.offset % terms.min_block or length % terms.min_block:
        wrong.add(EINVAL)
    if asked.offset + length > terms.size:
        wrong.add(says.beyond)
    if says.payload and length > terms.max_payload:
        # EOVERFLOW is for READ "when NBD_CMD_FLAG_DF is supported", and what has no payload.
        wrong.add(EOVERFLOW if asked.command == 0 and terms.style != SIMPLE else EINVAL)
    return frozenset(wrong)
