"""What a policy says, as values; the file's form is in `nbdproxy.policy.loader`.

A policy answers three questions: does the disk have a volatile write cache, what does a flush
make durable, and at which events does the power go. `decide` turns it into one frozen `Decision`
for a request; nothing in it depends on timing or chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from nbdproxy.requests import Command, CommandFlag


class CutEvent(Enum):
    """An event at which a policy cuts the power."""

    EXIT = "exit"
    """nbdproxy itself ends: a signal, or the end of the --run command."""
    DISCONNECT = "disconnect"
    """A client that opened the export says DISC or goes away."""
    SHUTDOWN = "shutdown"
    """QEMU reports SHUTDOWN on its QMP socket, which comes before its own last flushes."""


class FlushCovers(Enum):
    """What a flush makes durable."""

    COMPLETED = "completed"
    """Every write completed before the flush was received, as the NBD specification says."""
    NOTHING = "nothing"
    """Nothing, though it is answered: QEMU's cache=unsafe, or a disk that lies."""


class Decision(Enum):
    """What the export does with a request."""

    PASS = auto()
    """Do it on the disk; whatever it promises is kept by the disk below."""
    HOLD = auto()
    """Keep it in the volatile cache; a cut takes it back."""
    HOLD_AND_LAND = auto()
    """Keep it in the cache, and answer when it alone has been written through (FUA)."""
    LAND = auto()
    """Write what this flush covers through the cache, then answer."""
    ANSWER = auto()
    """Answer, and do nothing."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy, as read from its file.

    name          how it is called on the command line
    summary       one line
    imitates      which real thing behaves like this, and the source for that
    holds         unflushed writes are held back from the image
    flush_covers  what a flush, or FUA, makes durable
    cut_at        the events at which the power goes
    """

    name: str
    summary: str
    imitates: str
    holds: bool
    flush_covers: FlushCovers
    cut_at: frozenset[CutEvent]


def decide(policy: Policy, command: int, flags: int) -> Decision:
    """Return what to do with a validated request."""
    if command == Command.READ or not policy.holds:
        return Decision.PASS
    honest = policy.flush_covers is FlushCovers.COMPLETED
    if command == Command.FLUSH:
        return Decision.LAND if honest else Decision.ANSWER
    if flags & CommandFlag.FUA and honest:
        return Decision.HOLD_AND_LAND
    return Decision.HOLD
