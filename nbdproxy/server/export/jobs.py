"""What an export keeps of requests that have to wait, and of those that passed."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import NamedTuple

import trio

from nbdproxy.disks.volatile import Ticket
from nbdproxy.errors import RecordingError
from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.engine import Decision
from nbdproxy.policy.model import Handling
from nbdproxy.requests import Command, CommandFlag, NbdErrno, Request

_NBD_ERRNO = {
    errno.EPERM: NbdErrno.EPERM,
    errno.ENOMEM: NbdErrno.ENOMEM,
    errno.ENOSPC: NbdErrno.ENOSPC,
    errno.EDQUOT: NbdErrno.ENOSPC,
    errno.EFBIG: NbdErrno.ENOSPC,
}
_FAST_ZERO = int(CommandFlag.FAST_ZERO)


class RequestFailure(NamedTuple):
    """Why a request failed: the NBD error number, and words for people."""

    error: int
    text: str


class ToldError(OSError):
    """An NBD server below told an error; it goes up as it is."""

    def __init__(self, failure: RequestFailure) -> None:
        super().__init__(failure.error, failure.text)
        self.failure = failure


NOT_RECORDED = RequestFailure(
    NbdErrno.ENOSPC, "nothing may pass unrecorded, and the recording is full"
)

LOST = RequestFailure(NbdErrno.EIO, "the NBD server below is gone")

NOT_SAVED = RequestFailure(NbdErrno.EIO, "what is there could not be read, and is not lost unsaved")


def failure_by_rule(decision: Decision) -> RequestFailure:
    """Return the error that a rule gives."""
    assert decision.action is not None
    return RequestFailure(
        decision.action.errno.number, f"the policy's rule {decision.draw_key.rule} says so"
    )


def failure_of(error: Exception, request: Request | None = None) -> RequestFailure:
    """Return how an error of a disk is told to the client (proto.md, "Error values").

    A damaged recording, which is what a crash state's disk reads from, is EIO.
    """
    if isinstance(error, ToldError):
        return error.failure
    if isinstance(error, RecordingError):
        return RequestFailure(NbdErrno.EIO, str(error))
    number = error.errno if isinstance(error, OSError) else None
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if number == errno.EOPNOTSUPP and request is not None and request.flags & _FAST_ZERO:
        return RequestFailure(NbdErrno.ENOTSUP, "zeroes are not faster than writing here")
    return RequestFailure(_NBD_ERRNO.get(number or 0, NbdErrno.EIO), text)


@dataclass(slots=True, eq=False)
class Destage:
    """What a flush (`layer`), or a FUA request or write-back (`ticket`), has to land of the cache.

    seq      -1 for a write-back, which nobody waits for and which promises nothing
    drops    set if the flush is to fail so, and the cache to forget what it had in hand
    over     it is down; `failure` says how that went
    """

    connection: int
    seq: int
    layer: int | None = None
    ticket: Ticket | None = None
    drops: RequestFailure | None = None
    over: bool = False
    failure: RequestFailure | None = None


class RangeClaim:
    """A change that is at work on its range; a later one over it waits until it is released."""

    __slots__ = ("_all", "_done", "_earlier", "end", "offset")

    def __init__(self, offset: int, end: int, claims: dict[RangeClaim, None]) -> None:
        self.offset = offset
        self.end = end
        self._earlier = [c for c in claims if c.offset < end and offset < c.end]
        self._done = trio.Event()
        self._all = claims
        claims[self] = None

    async def wait_turn(self) -> None:
        """Return when all earlier changes of the range are over."""
        for claim in self._earlier:
            await claim.wait_over()
        self._earlier.clear()

    async def wait_over(self) -> None:
        """Return when it is released."""
        await self._done.wait()

    def release(self) -> None:
        """Let the later ones go; doing so twice is harmless."""
        self._all.pop(self, None)
        self._done.set()


class LinkDroppedError(Exception):
    """A rule drops the connection that a request came by."""


class Claims:
    """The changes that are at work beside the event loop: two of one place land in order."""

    def __init__(self) -> None:
        # In the order in which they were made; those that are over are not in it.
        self._claims: dict[RangeClaim, None] = {}

    def overlap(self, request: Request) -> bool:
        """Tell whether a request has to wait for another."""
        start, end = request.offset, request.end
        return any(c.offset < end and start < c.end for c in self._claims)

    async def settled(self) -> None:
        """Return when none is at work."""
        while self._claims:
            await next(iter(self._claims)).wait_over()

    def claim(self, request: Request) -> RangeClaim:
        """Claim a request's range, behind all that claim a part of it now."""
        return RangeClaim(request.offset, request.end, self._claims)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has to wait for the disk.

    seq       its place in the recording, -1 if it changes nothing
    landing   set for a flush or FUA request that lands what a volatile cache holds
    claim     set for a change that is done beside the event loop
    decision  what a rule decided on it
    handling  how it is done, where that is not the disk's own way
    layer     for a flush that is late: what of the cache it covers
    regime    the number of the policy in force when it came
    """

    request: Request
    seq: int = -1
    landing: Destage | None = None
    claim: RangeClaim | None = None
    decision: Decision | None = None
    handling: Handling = Handling.PASS
    layer: int | None = None
    regime: int = 0

    @property
    def action(self) -> ActionKind | None:
        """What a rule does to it."""
        if self.decision is None or self.decision.action is None:
            return None
        return self.decision.action.kind

    @property
    def dropped_before(self) -> bool:
        """Whether its connection is dropped before it is done."""
        action = self.decision.action if self.decision is not None else None
        return action is not None and action.drops_before

    @property
    def fails(self) -> bool:
        """Whether it is answered with an error, and nothing else becomes of it."""
        hollow = self.action is ActionKind.FSYNCGATE and self.handling is not Handling.LAND
        return hollow or self.action is ActionKind.ERROR

    @property
    def cost(self) -> int:
        """Bytes of memory it needs while it is done."""
        reads = self.request.command == Command.READ
        return self.request.length if reads else len(self.request.payload)


@dataclass(slots=True)
class Counters:
    """What clients asked for, whatever rules made of it; bytes of writes."""

    reads: int = 0
    writes: int = 0
    written: int = 0
    flushes: int = 0
