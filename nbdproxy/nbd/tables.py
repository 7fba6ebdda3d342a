"""What is legal, as data: one row for each command.

The parser, the replies and the tests are driven from here, so that a rule is written once.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdproxy.nbd.constants import MAX_PAYLOAD, MIN_BLOCK, TransmissionFlag
from nbdproxy.requests import Command, CommandFlag, NbdErrno


@dataclass(frozen=True, slots=True)
class CommandRule:
    """How one command must look.

    flags       the command flags it may carry; FUA is legal everywhere once advertised
    ranged      True: offset and length name a range of the disk; False: both must be 0
    beyond      the error for a range that ends behind the disk
    modifies    needs a writable export
    max_length  bytes; None where the length carries no payload
    needs       the transmission flag that must have been advertised
    """

    flags: int
    ranged: bool
    beyond: NbdErrno
    modifies: bool
    max_length: int | None
    needs: int

    def __post_init__(self) -> None:
        # Plain integers: operators of IntFlag cost more than all the rest of a check.
        object.__setattr__(self, "flags", int(self.flags))
        object.__setattr__(self, "needs", int(self.needs))


COMMAND_RULES: dict[int, CommandRule] = {
    Command.READ: CommandRule(
        CommandFlag.FUA, True, NbdErrno.EINVAL, False, MAX_PAYLOAD, TransmissionFlag.HAS_FLAGS
    ),
    Command.WRITE: CommandRule(
        CommandFlag.FUA, True, NbdErrno.ENOSPC, True, MAX_PAYLOAD, TransmissionFlag.HAS_FLAGS
    ),
    Command.FLUSH: CommandRule(
        CommandFlag.FUA, False, NbdErrno.EINVAL, False, None, TransmissionFlag.SEND_FLUSH
    ),
    Command.TRIM: CommandRule(
        CommandFlag.FUA, True, NbdErrno.EINVAL, True, None, TransmissionFlag.SEND_TRIM
    ),
    Command.WRITE_ZEROES: CommandRule(
        CommandFlag.FUA | CommandFlag.NO_HOLE,
        True,
        NbdErrno.ENOSPC,
        True,
        None,
        TransmissionFlag.SEND_WRITE_ZEROES,
    ),
}


_READ_ONLY = int(TransmissionFlag.READ_ONLY)


def refusal(  # noqa: PLR0911 - one return for each rule
    command: int, flags: int, offset: int, length: int, *, size: int, can: int
) -> int:
    """Return the error a request must be refused with, 0 if it is legal.

    `size` is the export's in bytes, `can` its transmission flags (proto.md, "Error values").
    """
    rule = COMMAND_RULES.get(command)
    if rule is None or flags & ~rule.flags:
        return NbdErrno.EINVAL
    if rule.modifies and can & _READ_ONLY:
        return NbdErrno.EPERM
    if not can & rule.needs:
        return NbdErrno.EINVAL
    if not rule.ranged:
        return NbdErrno.EINVAL if offset or length else NbdErrno.OK
    if rule.max_length is not None and length > rule.max_length:
        return NbdErrno.EOVERFLOW
    if length == 0 or (offset | length) % MIN_BLOCK:
        return NbdErrno.EINVAL
    return rule.beyond if offset + length > size else NbdErrno.OK
