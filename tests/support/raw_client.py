"""An NBD client that says what it is told, option by option, in the clear or in TLS.

For tests of how a server takes what no decent client would send. `TlsClient` is the decent one:
`NbdClient` behind STARTTLS. Nothing is imported from the product.

Not covered: extended headers.
"""

from __future__ import annotations

import random
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from tests.support.nbd_client import NbdClient, Op, connect_socket

LIST, ABORT, EXPORT_NAME, STARTTLS, INFO, GO = 3, 2, 1, 5, 6, 7
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 8, 9, 10, 11
ACK, REP_INFO = 1, 3
ERR_POLICY, ERR_INVALID, ERR_TLS_REQD = 0x80000002, 0x80000003, 0x80000005
UNKNOWN_OPTION = 0x4E42
BLOCK_STATUS = 7

_GREETING = b"NBDMAGICIHAVEOPT\0\3"
_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")


def option(number: int, data: bytes = b"") -> bytes:
    """Return an option as it travels."""
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def name_and_infos(name: str, *infos: int) -> bytes:
    """Return the data of GO and INFO."""
    raw = name.encode()
    return struct.pack(f">I{len(raw)}sH{len(infos)}H", len(raw), raw, len(infos), *infos)


def name_and_contexts(name: str, *queries: str) -> bytes:
    """Return the data of SET_META_CONTEXT and LIST_META_CONTEXT."""
    texts = [name.encode(), *(query.encode() for query in queries)]
    counted = [struct.pack(">I", len(text)) + text for text in texts]
    return counted[0] + struct.pack(">I", len(queries)) + b"".join(counted[1:])


def tls_uri(uri: str, folder: Path) -> str:
    """Return what libnbd calls an export in TLS, with a folder of certificates of its own."""
    text = uri if uri.startswith("nbds") else uri.replace("nbd", "nbds", 1)
    joint = "&" if "?" in text else "?"
    return f"{text}{joint}tls-certificates={quote(str(folder))}&tls-hostname=localhost"


def request(command: int, offset: int, length: int, *, flags: int = 0, cookie: int = 0) -> bytes:
    """Return a request's header."""
    return _REQUEST.pack(0x25609513, flags, command, cookie, offset, length)


class ErrorReply(NamedTuple):
    """What an error chunk says."""

    error: int
    text: str


class RawClient:
    """One connection that has got its greeting; `sock` is TLS after `start_tls`."""

    def __init__(self, uri: str, *, flags: int | None = 3) -> None:
        self.sock, self.export = connect_socket(uri.replace("nbds", "nbd", 1))
        try:
            self._begin(flags)
        except BaseException:
            self.sock.close()
            raise

    @classmethod
    def over(cls, sock: socket.socket) -> RawClient:
        """Begin on a socket that is connected."""
        client = cls.__new__(cls)
        client.sock, client.export = sock, ""
        client._begin(3)
        return client

    def _begin(self, flags: int | None) -> None:
        assert self.take(18) == _GREETING
        if flags is not None:
            self.sock.sendall(struct.pack(">I", flags))

    def take(self, count: int) -> bytes:
        """Read exactly that many bytes; raises ConnectionError at an early end."""
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            data += part
        return data

    def rest(self) -> bytes:
        """Return all that still comes until the server closes."""
        parts = []
        try:
            while part := self.sock.recv(1 << 16):
                parts.append(part)
        except ConnectionError:
            pass
        return b"".join(parts)

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return (type, data) of its replies up to the final one."""
        self.sock.sendall(option(number, data))
        replies: list[tuple[int, bytes]] = []
        while not replies or ACK < replies[-1][0] < 1 << 31:
            magic, answered, kind, length = _REPLY.unpack(self.take(_REPLY.size))
            assert (magic, answered) == (0x3E889045565A9, number)
            replies.append((kind, self.take(length)))
        return replies

    def word(self, number: int, data: bytes = b"") -> int:
        """Send an option; return the type of its final reply."""
        return self.ask(number, data)[-1][0]

    def start_tls(self, context: ssl.SSLContext, hostname: str = "localhost") -> None:
        """Upgrade; raises ssl.SSLError or ConnectionError if the handshake fails."""
        assert self.word(STARTTLS) == ACK
        self.sock = context.wrap_socket(self.sock, server_hostname=hostname)

    def open_structured(self, *contexts: str) -> None:
        """Open the export with structured replies and these contexts."""
        assert self.word(STRUCTURED_REPLY) == ACK
        if contexts:
            assert self.word(SET_META_CONTEXT, name_and_contexts(self.export, *contexts)) == ACK
        assert self.word(GO, name_and_infos(self.export, 3)) == ACK

    def error_of(self, op: Op) -> ErrorReply:
        """Send a request that is expected to fail; return its structured error."""
        self.sock.sendall(request(op.command, op.offset, op.length or len(op.data)) + op.data)
        magic, flags, kind, _, length = _CHUNK.unpack(self.take(_CHUNK.size))
        assert (magic, flags) == (0x668E33EF, 1)
        assert kind in {0x8001, 0x8002}, "the request did not fail"
        body = self.take(length)
        error, size = struct.unpack_from(">IH", body)
        return ErrorReply(error, body[6 : 6 + size].decode())

    def close(self) -> None:
        """Close without a word."""
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TlsClient(NbdClient):
    """One connection in transmission, in TLS."""

    def __init__(self, uri: str, context: ssl.SSLContext, *, export: str | None = None) -> None:
        self._context = context
        super().__init__(uri.replace("nbds", "nbd", 1), export=export)

    def _negotiate(self, name: str) -> None:
        raw = RawClient.over(self.sock)
        raw.start_tls(self._context)
        self.sock = raw.sock
        replies = raw.ask(GO, name_and_infos(name, 2, 3))
        if replies[-1][0] != ACK:
            raise ConnectionRefusedError(f"GO was answered with {replies[-1]}")
        for _, data in replies[:-1]:
            self._note(data)


def assert_served(uri: str, context: ssl.SSLContext, *, within_s: float = 2.0) -> None:
    """A decent client in TLS can work, and does not wait for it."""
    started = time.monotonic()
    with TlsClient(uri, context) as client:
        end = client.size - 512
        client.write(end, b"A" * 512)
        client.flush()
        assert client.read(end, 512) == b"A" * 512
    assert time.monotonic() - started < within_s


def garbage(seed: int, count: int) -> bytes:
    """Return that many random bytes."""
    return random.Random(seed).randbytes(count)
