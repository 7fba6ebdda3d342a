"""What an export keeps of requests that have to wait for the disk, and of those that passed."""

from __future__ import annotations

from dataclasses import dataclass

from nbdproxy.disks.volatile import Ticket
from nbdproxy.requests import Request


@dataclass(slots=True, eq=False)
class Landing:
    """What a flush (`layer`) or a FUA request (`ticket`) has to land of the volatile cache.

    `error` is the outcome, None until there is one.
    """

    connection: int
    seq: int
    layer: int | None = None
    ticket: Ticket | None = None
    error: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has to wait for the disk: a cold read, a flush, a FUA request.

    `landing` is not set where the disk itself is synced.
    """

    request: Request
    seq: int
    landing: Landing | None = None


@dataclass(slots=True)
class Counters:
    """What passed, for the summary at the end; bytes of writes."""

    reads: int = 0
    writes: int = 0
    written: int = 0
    flushes: int = 0
