"""The page docs/protocol.md, written from the tables so that it cannot say anything else.

`page` needs nothing but `tables`, `constants` and their docstrings; scripts/protocol-page stores
what it returns. Covers the server's side: what it answers, and where its limits are.

Not covered: what a command does to the disk, and the client's side but for its limits.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from itertools import pairwise

from nbdproxy.nbd import constants
from nbdproxy.nbd.constants import Option, OptionReply, TransmissionFlag
from nbdproxy.nbd.tables import COMMAND_RULES, FLAG_NEEDS, OPTION_RULES, CommandRule, Needs
from nbdproxy.requests import Command, CommandFlag, NbdErrno

_INTRO = """\
# The NBD protocol, as it is served

This page is written by `scripts/protocol-page` from the tables that the server itself is driven
by (`nbdproxy/nbd/tables.py`), so what it says is what is done. The names and numbers are those of
the [specification][spec]; extended headers are from its branch [`extension-ext-header`][ext].

A connection has two parts. First the client asks for *options*, one at a time, until one of them
(GO or EXPORT_NAME) opens an export. Then it sends *commands*, many at a time, until it says DISC.
What can be answered is answered, with an error if need be. What cannot be followed any further,
such as a wrong magic number or a length beyond every limit, ends the connection. DISC ends it
too: there is no reply to it, but to all that was in flight before it.

[spec]: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
[ext]: https://github.com/NetworkBlockDevice/nbd/blob/extension-ext-header/doc/proto.md
"""

_OPTIONS = """\
## Options

*Needs* is what must be agreed on first; without it the answer is the one behind the colon.
*Replies* come before the final ACK, *errors* instead of it. *Before TLS* says whether the option
is answered before STARTTLS where TLS is required; every other option then gets ERR_TLS_REQD.

In TLS a client needs a certificate where the server asks for one (`--tls-verify-peer`), as it must
for a disk that can be written from beyond this machine, or be told `--insecure`.

STARTTLS forgets everything that was agreed on before it, and bytes behind it that are not TLS end
the connection. SET_META_CONTEXT replaces what was set before, even when it fails. EXPORT_NAME has
no form for an error; *the end* is that of the connection. Any option that is not in this table is
answered with ERR_UNSUP. Sizes, flags and block sizes are told with every INFO and GO; the name
and the description when asked for.
"""

_COMMANDS = """\
## Commands

FUA is accepted with every command, and means the data of this one. *Needs* is what must have been
advertised. A command that breaks several rules gets one of their errors, and its payload is read
and dropped; one above the maximum payload of the specification is the end of the connection.
Offset and length are multiples of the minimum block, and the length is not 0; if not, the error
is EINVAL. So it is for a command or a flag that is not in these tables.
"""

_FLAGS = """\
## Flags of commands

A flag is accepted with the commands of the table above that name it, if the transmission flag
beside it was advertised.
"""

_HEADERS = """\
With extended headers a WRITE has a payload, even if a client leaves out PAYLOAD_LEN, which it
must not. BLOCK_STATUS may have one, to ask for some of the chosen contexts only. With any other
command PAYLOAD_LEN is EINVAL, and so is a filter of contexts that were not chosen.
"""

_LIMITS = "## Limits, and why\n\n"

_NOT_SUPPORTED = """\
## What is not supported

- Oldstyle negotiation. A client of newstyle that is not fixed has EXPORT_NAME and nothing else.
- PEEK_EXPORT and RESIZE, which are no part of the specification.
- Metadata contexts other than `base:allocation`. Queries for others find nothing and are no
  error.
- Requests of length 0; and, over a server with a minimum block above 1, requests that are no
  multiples of it.
- TLS for some exports only: it is off, allowed, or required for a whole server.
- ERR_BLOCK_SIZE_REQD and ERR_EXT_HEADER_REQD in reply to GO: block sizes and extended headers are
  offered and never demanded.
"""


def page() -> str:
    """Return the page, in Markdown."""
    parts = [
        _INTRO,
        _OPTIONS + "\n" + "\n".join(_option_table()) + "\n",
        _COMMANDS + "\n" + "\n".join(_command_table()) + "\n",
        _HEADERS,
        _FLAGS + "\n" + "\n".join(_flag_table()) + "\n",
        _LIMITS + "\n".join(_limit_table()) + "\n",
        _NOT_SUPPORTED,
    ]
    return "\n".join(parts)


def _rows(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a table whose head is given with its bars between the cells."""
    yield f"| {head} |"
    yield "|" + " --- |" * (head.count("|") + 1)
    for cells in rows:
        yield "| " + " | ".join(cells) + " |"


def _option_table() -> Iterator[str]:
    def cells(number: int) -> Iterator[str]:
        rule = OPTION_RULES[number]
        yield str(int(number))
        yield Option(number).name
        yield rule.body.value
        ends = number == Option.EXPORT_NAME
        otherwise = "the end" if ends else _reply(rule.otherwise)
        yield f"{rule.needs.value}: {otherwise}" if rule.needs is not Needs.NOTHING else ""
        yield ", ".join(map(_reply, rule.replies))
        yield "the end" if ends else ", ".join(map(_reply, rule.errors))
        yield "yes" if rule.plaintext else "no"

    head = "no. | option | data | needs | replies | errors | before TLS"
    return _rows(head, map(cells, sorted(OPTION_RULES)))


def _reply(kind: int) -> str:
    return OptionReply(kind).name


def _command_table() -> Iterator[str]:
    def cells(number: int) -> Iterator[str]:
        rule = COMMAND_RULES[number]
        yield str(int(number))
        yield Command(number).name
        yield ", ".join(flag.name or "" for flag in CommandFlag if flag & rule.flags)
        yield _needs(rule)
        yield rule.beyond.name if rule.ranged else "EINVAL for any range"
        yield _oversize(rule)
        yield NbdErrno.EPERM.name if rule.modifies else ""
        yield "yes" if rule.modifies else "no"

    head = (
        "no. | command | flags | needs | beyond the end | oversize | read-only | changes the disk"
    )
    return _rows(head, map(cells, sorted(COMMAND_RULES)))


def _needs(rule: CommandRule) -> str:
    if rule.contexts:
        return "a chosen context"
    return "" if rule.needs == TransmissionFlag.HAS_FLAGS else rule.needs.name or ""


def _oversize(rule: CommandRule) -> str:
    if not rule.payload:
        return "no limit"
    if rule.modifies:
        return "EINVAL, or the end"
    return "EOVERFLOW; EINVAL with simple replies"


def _flag_table() -> Iterator[str]:
    def cells(flag: CommandFlag) -> Iterator[str]:
        yield str(int(flag))
        yield flag.name or ""
        needs = FLAG_NEEDS[flag]
        yield "always" if needs == TransmissionFlag.HAS_FLAGS else needs.name or ""

    return _rows("bit | flag | advertised by", map(cells, sorted(FLAG_NEEDS)))


def _limit_table() -> Iterator[str]:
    limits = [(name, why) for name, why in _documented() if name.startswith(("MIN_", "MAX_"))]
    rows = (
        (f"`{name}`", f"{getattr(constants, name):,}".replace(",", " "), why)
        for name, why in limits
    )
    return _rows("limit | value | why", rows)


def _documented() -> Iterator[tuple[str, str]]:
    """Yield the names of `constants` that a docstring follows, and the docstring as one line."""
    body = ast.parse(inspect.getsource(constants)).body
    for before, after in pairwise(body):
        match before, after:
            case (
                ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(why))),
            ):
                yield name, " ".join(why.split())
