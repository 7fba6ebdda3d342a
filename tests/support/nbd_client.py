"""A small strict NBD client for tests: blocking, plain sockets, its own numbers.

It speaks fixed newstyle with GO and simple replies. Requests can be pipelined as one send or as
many; replies are collected by cookie in whatever order they come. Whatever the specification
forbids a server (a wrong magic, a cookie that nobody waits for, bytes behind an error reply) is an
AssertionError. Nothing is imported from the product, so that both cannot share a mistake.

Not covered: TLS, structured replies, EXPORT_NAME, oldstyle.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

READ, WRITE, DISC, FLUSH, TRIM, ZERO = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2
READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZERO, MULTI_CONN = 2, 4, 8, 32, 64, 256
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

_GREETING = b"NBDMAGICIHAVEOPT"
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_GO, _ACK, _INFO = 7, 1, 3

TIMEOUT_S = 20.0
"""Seconds after which a silent server fails the test."""


class NbdError(Exception):
    """A reply with an error; `errno` is the NBD number."""

    def __init__(self, errno: int) -> None:
        super().__init__(f"the server answered with error {errno}")
        self.errno = errno


class Op(NamedTuple):
    """One request to send; `length` is that of `data` for a WRITE."""

    command: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    flags: int = 0


class Reply(NamedTuple):
    """One reply: error number, and the data of a READ."""

    error: int
    data: bytes


def connect_socket(uri: str, timeout_s: float = TIMEOUT_S) -> tuple[socket.socket, str]:
    """Connect to the server that an NBD URI names; return the socket and the export's name."""
    parts = urlsplit(uri)
    name = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        sock.connect(parse_qs(parts.query)["socket"][0])
    else:
        address = (parts.hostname or "", parts.port or 10809)
        sock = socket.create_connection(address, timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock, name


class NbdClient:
    """One connection in transmission. Use it as a context manager: it ends with DISC.

    size, flags, description, block_sizes: what the server told of the export;
    waiting: what was sent and not answered yet, by cookie.
    """

    def __init__(self, uri: str, *, export: str | None = None) -> None:
        self.sock, name = connect_socket(uri)
        self.size, self.flags = -1, 0
        self.description = ""
        self.block_sizes: tuple[int, ...] = ()
        self.waiting: dict[int, Op] = {}
        self._cookie = 0
        try:
            self._negotiate(name if export is None else export)
        except BaseException:
            self.sock.close()
            raise

    @classmethod
    def at(cls, path: Path) -> NbdClient:
        """Connect to the default export behind a Unix socket."""
        return cls(f"nbd+unix:///?socket={path}")

    def _negotiate(self, name: str) -> None:
        assert self.take(16) == _GREETING
        (offered,) = struct.unpack(">H", self.take(2))
        assert offered & 3 == 3, "the server lacks fixed newstyle or NO_ZEROES"
        self.sock.sendall(struct.pack(">I", 3))
        raw = name.encode()
        body = struct.pack(">I", len(raw)) + raw + struct.pack(">HHH", 2, 2, 3)
        self.sock.sendall(_OPTION.pack(b"IHAVEOPT", _GO, len(body)) + body)
        while True:
            magic, option, kind, length = _OPTION_REPLY.unpack(self.take(_OPTION_REPLY.size))
            data = self.take(length)
            assert (magic, option) == (_OPTION_REPLY_MAGIC, _GO)
            if kind == _ACK:
                break
            if kind != _INFO:
                raise ConnectionRefusedError(f"GO was answered with {kind:#x}: {data!r}")
            self._note(data)
        assert self.size >= 0, "GO was acknowledged without INFO_EXPORT"

    def _note(self, data: bytes) -> None:
        (kind,) = struct.unpack_from(">H", data)
        if kind == 0:
            self.size, self.flags = struct.unpack(">QH", data[2:])
        elif kind == 2:
            self.description = data[2:].decode()
        elif kind == 3:
            self.block_sizes = struct.unpack(">III", data[2:])

    def take(self, count: int) -> bytes:
        """Read exactly that many bytes; raises ConnectionError at an early end."""
        parts = []
        while count:
            part = self.sock.recv(min(count, 1 << 20))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def pack(self, op: Op) -> tuple[int, bytes]:
        """Return a new cookie and the request's bytes; the request counts as sent."""
        self._cookie += 1
        length = len(op.data) if op.command == WRITE else op.length
        header = _REQUEST.pack(
            _REQUEST_MAGIC, op.flags, op.command, self._cookie, op.offset, length
        )
        self.waiting[self._cookie] = op._replace(length=length)
        return self._cookie, header + op.data

    def send(self, *ops: Op) -> list[int]:
        """Send requests with one call; return their cookies."""
        packed = [self.pack(op) for op in ops]
        self.sock.sendall(b"".join(data for _, data in packed))
        return [cookie for cookie, _ in packed]

    def receive(self) -> tuple[int, Reply]:
        """Wait for the next reply; return its cookie and what it says."""
        magic, error, cookie = _REPLY.unpack(self.take(_REPLY.size))
        assert magic == _REPLY_MAGIC, f"a reply began with {magic:#x}"
        assert cookie in self.waiting, f"nobody waits for cookie {cookie}"
        op = self.waiting.pop(cookie)
        data = self.take(op.length) if op.command == READ and not error else b""
        return cookie, Reply(error, data)

    def collect(self, cookies: Iterable[int]) -> dict[int, Reply]:
        """Wait for the replies to all of `cookies`; others that come first are returned, too."""
        wanted, found = set(cookies), {}
        while wanted:
            cookie, reply = self.receive()
            wanted.discard(cookie)
            found[cookie] = reply
        return found

    def do(self, *ops: Op) -> list[Reply]:
        """Send requests with one call, wait for all; return the replies in the requests' order."""
        cookies = self.send(*ops)
        found = self.collect(cookies)
        return [found[cookie] for cookie in cookies]

    def _one(self, op: Op) -> bytes:
        (reply,) = self.do(op)
        if reply.error:
            raise NbdError(reply.error)
        return reply.data

    def read(self, offset: int, length: int) -> bytes:
        """READ; raises NbdError."""
        return self._one(Op(READ, offset, length))

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """WRITE; raises NbdError."""
        self._one(Op(WRITE, offset, data=data, flags=flags))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """WRITE_ZEROES; raises NbdError."""
        self._one(Op(ZERO, offset, length, flags=flags))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """TRIM; raises NbdError."""
        self._one(Op(TRIM, offset, length, flags=flags))

    def flush(self) -> None:
        """FLUSH; raises NbdError."""
        self._one(Op(FLUSH))

    def disc(self) -> None:
        """Say good-bye, wait until the server has closed, and close."""
        self.sock.sendall(self.pack(Op(DISC))[1])
        while self.sock.recv(1 << 16):
            pass
        self.sock.close()

    def drop(self) -> None:
        """Close without a word."""
        self.sock.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.sock.fileno() >= 0:
            self.disc()
        self.sock.close()
