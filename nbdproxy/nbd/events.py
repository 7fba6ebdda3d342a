"""What the protocol core tells the shell that drives it."""

from __future__ import annotations

from typing import NamedTuple

from nbdproxy.requests import Request


class Send(NamedTuple):
    """Bytes of the negotiation that the peer must be sent, before anything else."""

    data: bytes


class Opened(NamedTuple):
    """The negotiation is over; requests for the export of this name follow."""

    export: str


class Refused(NamedTuple):
    """A request that breaks a rule: answer with `error`, do nothing else."""

    request: Request
    error: int


class Closed(NamedTuple):
    """The client said good-bye (DISC in transmission, ABORT before): nothing more is read."""


Event = Request | Refused | Send | Opened | Closed
