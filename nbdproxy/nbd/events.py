"""What the protocol cores tell the shells that drive them; both ends share `Send` and `StartTls`.

A server's shell gets requests, a client's the parts of replies.
"""

from __future__ import annotations

from typing import NamedTuple

from nbdproxy.requests import Request


class Send(NamedTuple):
    """Bytes of the negotiation that the peer must be sent, before anything else."""

    data: bytes


class StartTls(NamedTuple):
    """Everything from here on is TLS: do the handshake, then call `tls_started`."""


class Opened(NamedTuple):
    """The negotiation is over; requests for the export of this name follow."""

    export: str


class Refused(NamedTuple):
    """A request that breaks a rule: answer with `error` and `text`, do nothing else."""

    request: Request
    error: int
    text: str


class Closed(NamedTuple):
    """The client said good-bye (DISC in transmission, ABORT before): nothing more is read."""


ServerEvent = Request | Refused | Send | StartTls | Opened | Closed
"""What a server is told."""


class Ready(NamedTuple):
    """The negotiation is over; what the server said is in the connection's `export`."""


class DataReceived(NamedTuple):
    """A part of a READ: `data` is a view that is valid until the next `receive`."""

    cookie: int
    offset: int
    data: memoryview


class HoleReceived(NamedTuple):
    """A part of a READ that is all zero."""

    cookie: int
    offset: int
    length: int


class StatusReceived(NamedTuple):
    """The answer to BLOCK_STATUS: (length in bytes, flags) of each extent, ascending."""

    cookie: int
    extents: list[tuple[int, int]]


class Finished(NamedTuple):
    """The reply to a request is complete; `error` is 0, or what the server said, in `text`."""

    cookie: int
    error: int
    text: str


ClientEvent = Send | StartTls | Ready | DataReceived | HoleReceived | StatusReceived | Finished
"""What a client is told."""
