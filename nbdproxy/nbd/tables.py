"""What is legal, as data: one row for each option and each command.

The parser, the replies, the fuzzer, the tests and the page docs/protocol.md are driven from here,
so that a rule is written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from nbdproxy.nbd.constants import Option, OptionReply, ReplyStyle, TransmissionFlag
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.requests import Command, CommandFlag, NbdErrno


class Body(Enum):
    """What an option's data looks like; the value is said of it on the page."""

    EMPTY = "none"
    IGNORED = "any, not looked at"
    NAME = "a name"
    NAME_AND_INFOS = "a name, and the numbers of infos"
    NAME_AND_QUERIES = "a name, and queries for contexts"


class Needs(Enum):
    """What must have been negotiated before an option."""

    NOTHING = "nothing"
    CHUNKS = "structured replies or extended headers"
    COMPACT = "no extended headers"
    PLAINTEXT = "no TLS yet"


@dataclass(frozen=True, slots=True)
class OptionRule:
    """How one option must look, and how it may be answered.

    body       its data; another form is answered with ERR_INVALID
    needs      what comes first; without it the answer is ERR_INVALID, or what `otherwise` says
    replies    what may come before the final reply
    errors     final replies other than ACK
    plaintext  legal before TLS where TLS is required
    otherwise  the answer where `needs` does not hold
    """

    body: Body
    needs: Needs = Needs.NOTHING
    replies: tuple[OptionReply, ...] = ()
    errors: tuple[OptionReply, ...] = ()
    plaintext: bool = False
    otherwise: OptionReply = OptionReply.ERR_INVALID


_ERR = OptionReply

OPTION_RULES: dict[int, OptionRule] = {
    Option.EXPORT_NAME: OptionRule(Body.NAME, Needs.COMPACT),
    Option.ABORT: OptionRule(Body.IGNORED, plaintext=True),
    Option.LIST: OptionRule(
        Body.EMPTY, replies=(OptionReply.SERVER,), errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD)
    ),
    Option.STARTTLS: OptionRule(
        Body.EMPTY,
        Needs.PLAINTEXT,
        errors=(_ERR.ERR_INVALID, _ERR.ERR_POLICY),
        plaintext=True,
    ),
    Option.INFO: OptionRule(
        Body.NAME_AND_INFOS,
        replies=(OptionReply.INFO,),
        errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD, _ERR.ERR_UNKNOWN),
    ),
    Option.GO: OptionRule(
        Body.NAME_AND_INFOS,
        replies=(OptionReply.INFO,),
        errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD, _ERR.ERR_UNKNOWN),
    ),
    Option.STRUCTURED_REPLY: OptionRule(
        Body.EMPTY,
        Needs.COMPACT,
        errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD, _ERR.ERR_EXT_HEADER_REQD),
        otherwise=OptionReply.ERR_EXT_HEADER_REQD,
    ),
    Option.LIST_META_CONTEXT: OptionRule(
        Body.NAME_AND_QUERIES,
        Needs.CHUNKS,
        replies=(OptionReply.META_CONTEXT,),
        errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD, _ERR.ERR_UNKNOWN),
    ),
    Option.SET_META_CONTEXT: OptionRule(
        Body.NAME_AND_QUERIES,
        Needs.CHUNKS,
        replies=(OptionReply.META_CONTEXT,),
        errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD, _ERR.ERR_UNKNOWN),
    ),
    Option.EXTENDED_HEADERS: OptionRule(Body.EMPTY, errors=(_ERR.ERR_INVALID, _ERR.ERR_TLS_REQD)),
}
"""All options that are known; any other is answered with ERR_UNSUP."""


class Refusal(NamedTuple):
    """Why a request is not taken: the error, and the words that go with it."""

    error: int
    text: str


@dataclass(frozen=True, slots=True)
class CommandRule:
    """How one command must look.

    flags     the command flags it may carry besides FUA, each if `FLAG_NEEDS` was advertised
    needs     the transmission flag that must have been advertised
    ranged    True: offset and length name a range of the disk; False: both must be 0
    modifies  needs a writable export
    payload   data of that length goes one way or the other, so the maximum holds
    beyond    the error for a range that ends behind the disk
    contexts  needs metadata contexts
    """

    flags: int = 0
    needs: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    ranged: bool = True
    modifies: bool = False
    payload: bool = False
    beyond: NbdErrno = NbdErrno.EINVAL
    contexts: bool = False


COMMAND_RULES: dict[int, CommandRule] = {
    Command.READ: CommandRule(CommandFlag.DF, payload=True),
    Command.WRITE: CommandRule(modifies=True, payload=True, beyond=NbdErrno.ENOSPC),
    Command.FLUSH: CommandRule(needs=TransmissionFlag.SEND_FLUSH, ranged=False),
    Command.TRIM: CommandRule(needs=TransmissionFlag.SEND_TRIM, modifies=True),
    Command.CACHE: CommandRule(needs=TransmissionFlag.SEND_CACHE),
    Command.WRITE_ZEROES: CommandRule(
        CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        needs=TransmissionFlag.SEND_WRITE_ZEROES,
        modifies=True,
        beyond=NbdErrno.ENOSPC,
    ),
    Command.BLOCK_STATUS: CommandRule(CommandFlag.REQ_ONE, contexts=True),
}
"""All commands but DISC, which has no reply; any other is answered with EINVAL."""

FLAG_NEEDS: dict[CommandFlag, TransmissionFlag] = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.NO_HOLE: TransmissionFlag.SEND_WRITE_ZEROES,
    CommandFlag.DF: TransmissionFlag.SEND_DF,
    CommandFlag.REQ_ONE: TransmissionFlag.HAS_FLAGS,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}
"""What must have been advertised for a command flag (proto.md, "Command flags")."""

_UNKNOWN = Refusal(NbdErrno.EINVAL, "this command is not known")
_FLAGS = Refusal(NbdErrno.EINVAL, "a flag does not belong to this command")
_READ_ONLY = Refusal(NbdErrno.EPERM, "the export is read-only")
_NOT_OFFERED = Refusal(NbdErrno.EINVAL, "this command was not offered")
_NO_CONTEXT = Refusal(NbdErrno.EINVAL, "no metadata context was chosen for this export")
_NO_RANGE = Refusal(NbdErrno.EINVAL, "offset and length of this command must be 0")
_EMPTY = Refusal(NbdErrno.EINVAL, "the length is 0")
UNEXPECTED_PAYLOAD = Refusal(NbdErrno.EINVAL, "this command takes no payload")
BAD_FILTER = Refusal(NbdErrno.EINVAL, "the payload does not name contexts that were chosen")


@dataclass(frozen=True, slots=True)
class _Check:
    """A command's rule worked out for one connection; plain integers, for speed."""

    legal_flags: int
    early: Refusal | None
    ranged: bool
    longest: int
    oversize: Refusal
    beyond: Refusal


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds on one connection in transmission: the export, and what was negotiated."""

    export: ExportInfo
    style: ReplyStyle = ReplyStyle.SIMPLE
    contexts: bool = False
    flags: int = field(init=False)
    _size: int = field(init=False)
    _align: int = field(init=False)
    _misaligned: Refusal = field(init=False)
    _checks: dict[int, _Check] = field(init=False)

    def __post_init__(self) -> None:
        flags = int(self.export.flags_on(self.style, contexts=self.contexts))
        block = self.export.min_block
        misaligned = f"offset and length must be multiples of {block} bytes"
        for name, value in {
            "flags": flags,
            "_size": self.export.size,
            "_align": block - 1,
            "_misaligned": Refusal(NbdErrno.EINVAL, misaligned),
            "_checks": {number: self._check(rule, flags) for number, rule in COMMAND_RULES.items()},
        }.items():
            object.__setattr__(self, name, value)

    def _check(self, rule: CommandRule, flags: int) -> _Check:
        early = None
        if rule.modifies and flags & TransmissionFlag.READ_ONLY:
            early = _READ_ONLY
        elif not flags & rule.needs:
            early = _NOT_OFFERED
        elif rule.contexts and not self.contexts:
            early = _NO_CONTEXT
        allowed = rule.flags | CommandFlag.FUA
        legal = sum(flag for flag, needs in FLAG_NEEDS.items() if flag & allowed and flags & needs)
        # "The server SHOULD NOT return EOVERFLOW except [...] when DF is supported."
        chunks = self.style is not ReplyStyle.SIMPLE
        most = self.export.max_payload
        return _Check(
            legal_flags=int(legal),
            early=early,
            ranged=rule.ranged,
            longest=most if rule.payload else 1 << 64,
            oversize=Refusal(
                NbdErrno.EOVERFLOW if chunks and not rule.modifies else NbdErrno.EINVAL,
                f"a request has at most {most} bytes of data",
            ),
            beyond=Refusal(rule.beyond, "the range ends behind the disk"),
        )

    def refusal(  # noqa: PLR0911 - one return for each rule
        self, command: int, flags: int, offset: int, length: int
    ) -> Refusal | None:
        """Return why a request must be refused, None if it is legal (proto.md, "Error values")."""
        check = self._checks.get(command)
        if check is None:
            return _UNKNOWN
        if check.early is not None:
            return check.early
        if flags & ~check.legal_flags:
            return _FLAGS
        if not check.ranged:
            return _NO_RANGE if offset or length else None
        if length > check.longest:
            return check.oversize
        if (offset | length) & self._align:
            return self._misaligned
        if offset + length > self._size:
            return check.beyond
        return None if length else _EMPTY
