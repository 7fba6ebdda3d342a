"""A connection's bytes, in the clear or in TLS, for both ends of NBD.

The raw socket is tried before the event loop is asked to wait: under load a wake-up costs one
system call to read and one to send. TLS goes through trio's SSLStream. Nothing is sent once the
power is off.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from typing import Protocol

import trio

from nbdproxy.server.shared.power import Power, PowerLostError

_IOV_MAX = 1024
_TLS_PIECE = 256 * 1024
"""Bytes encrypted at a time: others get their turn in between."""


class Wire(Protocol):
    """A stream of bytes to a peer; OSError says that it is broken."""

    def receive_now(self, buffer: memoryview) -> int | None:
        """Fill the beginning of `buffer` with what is there; None if that is nothing, 0 at EOF."""
        ...

    async def receive(self, buffer: memoryview) -> int:
        """Wait for bytes; return how many, 0 at EOF."""
        ...

    async def send(self, parts: Sequence[memoryview]) -> None:
        """Send all of `parts`; PowerLostError if the power goes before."""
        ...

    async def close(self) -> None:
        """End the connection, as politely as its kind knows how."""
        ...


class SocketWire:
    """A non-blocking stream socket, which it owns."""

    def __init__(self, sock: socket.socket, power: Power) -> None:
        self.sock = sock
        self._power = power

    def receive_now(self, buffer: memoryview) -> int | None:
        """Fill the beginning of `buffer` with what is there."""
        try:
            return self.sock.recv_into(buffer)
        except BlockingIOError:
            return None

    async def receive(self, buffer: memoryview) -> int:
        """Wait for bytes; return how many, 0 at EOF."""
        while (count := self.receive_now(buffer)) is None:
            await trio.lowlevel.wait_readable(self.sock)
        return count

    async def send(self, parts: Sequence[memoryview]) -> None:
        """Send all of `parts`."""
        left = list(parts)
        while left:
            if self._power.off:
                raise PowerLostError
            try:
                if len(left) == 1:
                    sent = self.sock.send(left[0])
                else:
                    sent = self.sock.sendmsg(left[:_IOV_MAX])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
                continue
            while left and sent >= len(left[0]):
                sent -= len(left[0])
                del left[0]
            if sent:
                left[0] = left[0][sent:]

    async def close(self) -> None:
        """Close the socket."""
        self.sock.close()


class TlsWire:
    """TLS over a socket, which it owns. Errors of TLS are raised as OSError with OpenSSL's text."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream], power: Power) -> None:
        self._stream = stream
        self._power = power

    @classmethod
    async def start(
        cls,
        wire: SocketWire,
        context: ssl.SSLContext,
        power: Power,
        *,
        server_hostname: str | None = None,
        server_side: bool = False,
    ) -> TlsWire:
        """Do the handshake on a wire that has been in the clear; OSError if it fails."""
        stream = trio.SSLStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(wire.sock)),
            context,
            server_hostname=server_hostname,
            server_side=server_side,
        )
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            raise _broken("the TLS handshake failed", error) from None
        return cls(stream, power)

    def receive_now(self, buffer: memoryview) -> int | None:  # noqa: ARG002 - as the protocol says
        """Return None: what is there cannot be told without waiting."""
        return None

    async def receive(self, buffer: memoryview) -> int:
        """Wait for bytes; return how many, 0 at EOF."""
        try:
            data = await self._stream.receive_some(len(buffer))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _broken("the TLS connection broke", error) from None
        buffer[: len(data)] = data
        return len(data)

    async def send(self, parts: Sequence[memoryview]) -> None:
        """Send all of `parts`."""
        for part in parts:
            for at in range(0, len(part), _TLS_PIECE):
                if self._power.off:
                    raise PowerLostError
                try:
                    await self._stream.send_all(part[at : at + _TLS_PIECE])
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise _broken("the TLS connection broke", error) from None

    async def close(self) -> None:
        """Say good-bye in TLS if that does not block, and close the socket."""
        if self._power.off:
            await trio.aclose_forcefully(self._stream)
        else:
            await self._stream.aclose()


def _broken(what: str, error: Exception) -> ConnectionError:
    """Return an OSError that tells what OpenSSL, or the kernel, said."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message
    elif isinstance(cause, ssl.SSLError):
        reason = (cause.reason or str(cause)).replace("_", " ").lower()
    elif isinstance(cause, OSError):
        reason = cause.strerror or str(cause)
    else:
        reason = "the peer went away"
    return ConnectionError(f"{what}: {reason}")
