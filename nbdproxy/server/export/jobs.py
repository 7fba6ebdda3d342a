"""Requests that have to wait, the claims on their ranges, and the counters of all."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.engine import Decision
from nbdproxy.requests import Command, Request
from nbdproxy.server.below.failures import RequestFailure
from nbdproxy.server.below.store import Promise


def failure_by_rule(decision: Decision) -> RequestFailure:
    """Return the error that a rule gives."""
    assert decision.action is not None
    return RequestFailure(
        decision.action.errno.number, f"the policy's rule {decision.draw_key.rule} says so"
    )


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
    """The changes that are at work beside the event loop: two of one range are done in order."""

    def __init__(self) -> None:
        # In the order in which they were made; those that are over are not in it.
        self._claims: dict[RangeClaim, None] = {}

    def overlap(self, request: Request) -> bool:
        """Tell whether a request has to wait for another."""
        if not self._claims:
            return False
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
    policy    the number of the policy that was in force when it came
    claim     set for a change that is done beside the event loop
    promise   set for what was done or received, and only has to be made durable
    decision  what a rule decided on it
    honest    False if a FLUSH or FUA is answered and makes nothing durable
    line      for a FLUSH that is late: what it covers, as the store drew it
    """

    request: Request
    seq: int = -1
    policy: int = 0
    claim: RangeClaim | None = None
    promise: Promise | None = None
    decision: Decision | None = None
    honest: bool = True
    line: int = 0

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
        hollow = self.action is ActionKind.FSYNCGATE and not self.honest
        return hollow or self.action is ActionKind.ERROR

    @property
    def drops(self) -> RequestFailure | None:
        """How a FLUSH fails that drops what it covers; None for any other."""
        drops = self.decision is not None and self.action is ActionKind.FSYNCGATE
        return failure_by_rule(self.decision) if drops and self.decision is not None else None

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
