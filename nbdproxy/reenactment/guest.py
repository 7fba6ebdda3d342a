"""The client's end above the format driver: sends a guest's requests, and collects the answers.

The negotiation is the protocol core's. After it there are only requests without data in their
answers, and simple replies to them, which are written and read here by many at once.

Plain code that does not wait: what cannot be sent at once stays here, and what has arrived is read
when somebody has seen that there is something.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.client import ClientConnection
from nbdproxy.nbd.constants import SIMPLE_REPLY_MAGIC, ReplyStyle
from nbdproxy.nbd.events import Ready, Send
from nbdproxy.requests import Request, error_name

_BUFFER = 1 << 16
_PARTS = 256
"""Pieces that are sent at once; IOV_MAX is 1024."""


class RequestRefusedError(ProtocolError):
    """A request was answered with an error."""


class Guest:
    """A client of the default export at the other end of `sock`, which stays the caller's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.size: int | None = None
        """The disk's size in bytes; None until requests may be sent."""
        self.unanswered: set[int] = set()
        """The cookies of the requests that have no answer yet."""
        self._connection = ClientConnection("", best=ReplyStyle.SIMPLE, contexts=False)
        self._unsent: deque[memoryview] = deque()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._filled = 0

    @property
    def has_unsent(self) -> bool:
        """Whether there is something to be sent."""
        return bool(self._unsent)

    def request(self, request: Request) -> None:
        """Put a request behind what is to be sent; its cookie tells its answer from others."""
        command, flags, cookie, offset, length, payload = request
        head = codec.request(command, flags, cookie, offset, length, extended=False)
        self._unsent.append(memoryview(head))
        if payload:
            self._unsent.append(payload)
        self.unanswered.add(cookie)

    def send(self) -> None:
        """Send what the socket takes without waiting."""
        while self._unsent:
            parts = list(islice(self._unsent, _PARTS))
            try:
                count = self.sock.sendmsg(parts, [], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            for part in parts:
                if count < len(part):
                    self._unsent[0] = part[count:]
                    break
                count -= len(part)
                self._unsent.popleft()

    def receive(self) -> None:
        """Take in what has arrived; blocks only where nothing has.

        Raises RequestRefusedError for an answer that is an error, ProtocolError for what is none.
        """
        count = self.sock.recv_into(self._buffer[self._filled :])
        if not count:
            raise ProtocolError("it closed the connection")
        self._filled += count
        data = self._buffer[: self._filled]
        used = self._negotiate(data) if self.size is None else self._answers(data)
        rest = len(data) - used
        self._buffer[:rest] = data[used:]
        self._filled = rest

    def _negotiate(self, data: memoryview) -> int:
        connection = self._connection
        used, events = connection.receive(data)
        if connection.breach is not None:
            raise connection.breach
        for event in events:
            if type(event) is Send:
                self._unsent.append(memoryview(event.data))
            elif type(event) is Ready:
                assert connection.export is not None
                self.size = connection.export.size
        return used

    def _answers(self, data: memoryview) -> int:
        reply = codec.SIMPLE_REPLY
        used = len(data) - len(data) % reply.size
        for magic, error, cookie in reply.iter_unpack(data[:used]):
            if magic != SIMPLE_REPLY_MAGIC or cookie not in self.unanswered:
                raise ProtocolError("it sent what is no answer to a request")
            if error:
                raise RequestRefusedError(error_name(error))
            self.unanswered.discard(cookie)
        return used
